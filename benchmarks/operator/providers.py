"""Who computes: this project's operator, and what a user would take otherwise. One setup function each."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.operator.cases import DTYPES, SHAPES, Case
from fibattn.attention import attend
from fibattn.errors import how_to_install
from fibattn.pattern import LearnedPattern, Pattern, base_rungs

_MOST_QUADRATIC = 8 * 2**30
_FLEX_BLOCK = 128


@dataclass(frozen=True)
class Call:
    """`function(q, k, v)` gives the output; `parameters` are tensors beside these that need a gradient."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """One way to compute attention.

    `obstacle(case, backward)` says why it cannot, or is None; `setup(case)` makes the call; `dense` says
    that it attends to every distance rather than to the case's pattern.
    """

    what: str
    setup: Callable[[Case], Call]
    obstacle: Callable[[Case, bool], str | None]
    dense: bool = field(default=False)

    def computes(self, case: Case) -> Pattern:
        """The pattern that its output is checked against."""
        return Pattern(case.length - 1) if self.dense else case.pattern


def _ours(case: Case) -> Call:
    return Call(lambda q, k, v: attend(q, k, v, case.pattern))


def _learned(case: Case) -> Call:
    alpha = torch.ones((), device=case.device, requires_grad=True)
    pattern = LearnedPattern(case.window, base_rungs("fibonacci"))
    return Call(lambda q, k, v: attend(q, k, v, pattern, alpha=alpha), (alpha,))


def _dense(backend: SDPBackend) -> Callable[[Case], Call]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return lambda case: Call(run)


def _masked(case: Case) -> Call:
    own = torch.arange(case.length, device=case.device)
    distances = torch.tensor(case.pattern.distances, device=case.device)
    mask = torch.isin(own[:, None] - own, distances)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return Call(run)


def _flex(case: Case) -> Call:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    window, offsets = case.window, case.pattern.offsets

    def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        kept = (distance >= 0) & (distance <= window)
        for offset in offsets:
            kept = kept | (distance == offset)
        return kept

    counts, indices = (x.to(case.device) for x in flex_blocks(case.pattern, case.length))
    mask = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=_FLEX_BLOCK, mask_mod=attended, seq_lengths=(case.length, case.length)
    )
    torch.compiler.reset()  # or the eighth case would meet the limit on recompilations
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)  # pyright: ignore

    return Call(run)


def flex_blocks(pattern: Pattern, length: int) -> tuple[Tensor, Tensor]:
    """Which blocks of 128 keys each block of 128 queries looks into, as FlexAttention's counts and indices.

    Written down from the distances, since evaluating a mask of `length` squared would take longer than all
    the attention that is measured. Both int32: (1, 1, blocks) and (1, 1, blocks, blocks).
    """
    blocks = -(-length // _FLEX_BLOCK)
    first = torch.arange(blocks)[:, None] * _FLEX_BLOCK
    distances = torch.tensor([d for d in pattern.distances if d < length])
    touched = torch.zeros(blocks, blocks + 1, dtype=torch.bool)
    for edge in (first, first + _FLEX_BLOCK - 1):
        keys = edge - distances
        touched.scatter_(1, torch.where(keys < 0, blocks, keys.div(_FLEX_BLOCK, rounding_mode="floor")), True)
    touched = touched[:, :blocks]
    indices = touched.int().argsort(dim=1, descending=True, stable=True).int()
    return touched.sum(1).int()[None, None], indices[None, None]


def _missing_triton(case: Case, backward: bool) -> str | None:
    if case.device == "cuda" and importlib.util.find_spec("triton") is None:
        return f"needs Triton: {how_to_install('triton')}"
    return None


def _flash_obstacle(case: Case, backward: bool) -> str | None:
    if case.device != "cuda":
        return None
    return _fused_obstacle(case, "FlashAttention", torch.backends.cuda.can_use_flash_attention)


def _cudnn_obstacle(case: Case, backward: bool) -> str | None:
    if case.device != "cuda":
        return f"needs an NVIDIA GPU, not {case.device}"
    return _fused_obstacle(case, "cuDNN attention", torch.backends.cuda.can_use_cudnn_attention)


def _fused_obstacle(case: Case, name: str, usable: Callable[..., bool]) -> str | None:
    heads, kv_heads, size = SHAPES[case.shape]
    q, k = (torch.empty(1, h, 128, size, device="cuda", dtype=DTYPES[case.dtype]) for h in (heads, kv_heads))
    if usable(torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, True)):
        return None
    return f"this PyTorch has no {name} for {case.dtype}, head size {size} on {torch.cuda.get_device_name()}"


def _quadratic_obstacle(case: Case, backward: bool) -> str | None:
    scores = 4 * case.batch * SHAPES[case.shape][0] * case.length**2
    if scores >= _MOST_QUADRATIC:
        return f"its scores would take {scores / 2**30:,.0f} GiB, the limit here is {_MOST_QUADRATIC / 2**30:.0f}"
    return None


def _flex_obstacle(case: Case, backward: bool) -> str | None:
    if case.device == "cuda":
        return _missing_triton(case, backward)
    if backward:
        return "FlexAttention has no backward on a CPU"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "needs a C++ compiler (g++ or clang++) to be compiled for a CPU"
    return None


PROVIDERS = {
    "fibattn": Provider("this project's operator", _ours, _missing_triton),
    "fibattn-learned": Provider("the same with a learned alpha", _learned, _missing_triton),
    "dense-flash": Provider(
        "dense causal attention, PyTorch's flash kernel", _dense(SDPBackend.FLASH_ATTENTION), _flash_obstacle, True
    ),
    "dense-cudnn": Provider("dense causal attention, cuDNN", _dense(SDPBackend.CUDNN_ATTENTION), _cudnn_obstacle, True),
    "dense-math": Provider("dense causal attention, unfused", _dense(SDPBackend.MATH), _quadratic_obstacle, True),
    "flex": Provider("FlexAttention with the same mask, compiled", _flex, _flex_obstacle),
    "mask": Provider("PyTorch's attention with a boolean mask", _masked, _quadratic_obstacle),
}
"""In the order of a table's rows."""
