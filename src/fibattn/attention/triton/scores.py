"""Scores and what softmax makes of them.

`EXACT`, in all kernels, says that inputs are float32: they deserve scores scaled without a rounding more, a
log-sum-exp in float64 between forward and backward, and long sums in float64.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NO_ROW = tl.constexpr(1e30)
"""The log-sum-exp of a row that does not exist: its weights are 0."""

NO_SCORE = tl.constexpr(-1e30)
"""The greatest of no scores: finite, for a row may have no key among the first columns, nor in a part of them."""


@triton.jit
def row_products(b_x, b_y, EXACT: tl.constexpr):
    """Products of all rows of [..., R, BD] and [..., C, BD]. [..., R, C]

    float32 is summed in parts of 16 and these in pairs: one long sum is rounded more often than PyTorch's. The pairs
    are added in float64, or the compiler would make one long sum of two products that are added.
    """
    if EXACT and b_x.shape[-1] > 16:
        b_x_even, b_x_odd = tl.split(in_pairs(b_x))
        b_y_even, b_y_odd = tl.split(in_pairs(b_y))
        b_even = row_products(b_x_even, b_y_even, EXACT).to(tl.float64)
        b_products = (b_even + row_products(b_x_odd, b_y_odd, EXACT).to(tl.float64)).to(tl.float32)
    elif len(b_x.shape) == 3:
        b_products = tl.dot(b_x, tl.permute(b_y, (0, 2, 1)), input_precision="ieee")
    else:
        b_products = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    return b_products


@triton.jit
def in_pairs(b_x):
    """The rows' elements two by two. [..., BD] to [..., BD // 2, 2]"""
    if len(b_x.shape) == 3:
        b_pairs = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2])
    else:
        b_pairs = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2])
    return b_pairs


@triton.jit
def scaled_scores(b_s, scale, EXACT: tl.constexpr):
    """Scores as softmax takes them: times the scale, and in 16 bits to base 2, which float32 cannot afford.

    float32's become float64, where the product is exact: rounded to float32, it would be so in the forward alone, for
    the backward kernels' compiler makes one instruction of it and the subtraction of the log-sum-exp, and a weight of 1
    would be off by the rounding of a score.
    """
    return b_s.to(tl.float64) * scale if EXACT else b_s * (scale * LOG2E)


@triton.jit
def power(b_x, EXACT: tl.constexpr):
    """The exponential of a difference of scaled scores. float32"""
    return tl.exp2((b_x * LOG2E).to(tl.float32)) if EXACT else tl.exp2(b_x)


@triton.jit
def softmax_weights(b_s, b_lse, EXACT: tl.constexpr):
    """The exponential of scaled scores less the natural log-sum-exp, which is float64 where it must be exact."""
    return power(b_s - (b_lse if EXACT else b_lse * LOG2E), EXACT)


@triton.jit
def softmax_step(b_s, b_max, b_sum, EXACT: tl.constexpr):
    """The weights of a tile of scaled scores in a running softmax, and what those of the tiles before shrink by.

    [..., C], [...]; then the maximum and the sum up to here [...].
    """
    b_new = tl.maximum(b_max, tl.max(b_s, -1))
    b_p = power(b_s - tl.expand_dims(b_new, -1), EXACT)
    b_shrink = power(b_max - b_new, EXACT)
    return b_p, b_shrink, b_new, b_sum * b_shrink + tl.sum(b_p, -1)
