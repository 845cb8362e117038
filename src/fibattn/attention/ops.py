"""The operator as PyTorch sees it: schemas, shapes without data, and gradients.

Each device's implementation is a set of plain functions behind `torch.ops.fibattn`, so that
`torch.compile` treats a call as one node; the autograd functions stand outside. Offsets travel as integers;
where every KV head has a pattern of its own, `offsets` holds them one after the other and `set_sizes` says
where to cut. Kernels are imported on first use.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fibattn.attention import cpu
from fibattn.attention import ring as decode
from fibattn.pattern import Pattern, interpolate

NO_LIMIT = 2**31 - 1
"""The `max_offset` of a schema where the caller set none."""

_library = torch.library.Library("fibattn", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? positions, float scale, int window"
_SAVED = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse"
_FIXED = "int[] offsets, int[] set_sizes"
_SCALED = "Tensor alpha, int[] rungs, int max_offset"
_INTERPRET = "bool interpret=False"
"""Whether CPU tensors go through the GPU's kernels, in Triton's interpreter. On a GPU it says nothing."""
_library.define(f"attend_forward({_INPUTS}, {_FIXED}, {_INTERPRET}) -> (Tensor, Tensor)")
_library.define(f"attend_backward({_SAVED}, {_INPUTS}, {_FIXED}, {_INTERPRET}) -> (Tensor, Tensor, Tensor)")
_library.define(f"attend_scaled_forward({_INPUTS}, {_SCALED}, {_INTERPRET}) -> (Tensor, Tensor)")
_library.define(
    f"attend_scaled_backward({_SAVED}, {_INPUTS}, {_SCALED}, {_INTERPRET}) -> (Tensor, Tensor, Tensor, Tensor)"
)

_RING = "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_positions"
_STEP = f"{_RING}, Tensor? positions, float scale, int window"
_library.define(f"attend_step({_STEP}, {_FIXED}, {_INTERPRET}) -> Tensor")
_library.define(f"attend_scaled_step({_STEP}, {_SCALED}, {_INTERPRET}) -> Tensor")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp as callers see it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp between forward and backward: its rounding would be in all of a row's weights."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def split_offsets(offsets: Sequence[int], set_sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The offsets of every KV head (or the one set that all share)."""
    ends = [sum(set_sizes[: i + 1]) for i in range(len(set_sizes))]
    return [tuple(offsets[end - size : end]) for end, size in zip(ends, set_sizes, strict=True)]


def _fixed_rungs(q: Tensor, window: int, offsets: Sequence[int], set_sizes: Sequence[int]) -> cpu.FixedRungs:
    return cpu.FixedRungs([Pattern(window, some) for some in split_offsets(offsets, set_sizes)], q.device)


def _kernels() -> Any:
    """The GPU's kernels; Triton is imported here and nowhere before."""
    from fibattn.attention import triton

    return triton


def _scaled_rungs(alpha: Tensor, rungs: Sequence[int], window: int, max_offset: int) -> cpu.ScaledRungs:
    return cpu.ScaledRungs(interpolate(rungs, float(alpha), window, max_offset), alpha.device)


@torch.library.impl(_library, "attend_forward", "CUDA")
def _triton_forward(q, k, v, positions, scale, window, offsets, set_sizes, interpret=False):
    return _kernels().fixed_forward(q, k, v, positions, scale, window, tuple(split_offsets(offsets, set_sizes)))


@torch.library.impl(_library, "attend_backward", "CUDA")
def _triton_backward(
    grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, offsets, set_sizes, interpret=False
):
    sets = tuple(split_offsets(offsets, set_sizes))
    return _kernels().fixed_backward(grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, sets)


@torch.library.impl(_library, "attend_scaled_forward", "CUDA")
def _triton_scaled_forward(q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    return _kernels().scaled_forward(q, k, v, positions, scale, window, alpha, rungs, max_offset)


@torch.library.impl(_library, "attend_scaled_backward", "CUDA")
def _triton_scaled_backward(
    grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False
):
    saved = (grad_out, grad_lse, out, lse)
    return _kernels().scaled_backward(*saved, q, k, v, positions, scale, window, alpha, rungs, max_offset)


@torch.library.impl(_library, "attend_forward", "CPU")
def _(q, k, v, positions, scale, window, offsets, set_sizes, interpret=False):
    if interpret:
        return _triton_forward(q, k, v, positions, scale, window, offsets, set_sizes)
    out, lse = cpu.forward(q, k, v, window, _fixed_rungs(q, window, offsets, set_sizes), scale, positions)
    return out, lse.to(kept_dtype(q.dtype))


@torch.library.impl(_library, "attend_backward", "CPU")
def _(grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, offsets, set_sizes, interpret=False):
    if interpret:
        inputs = (q, k, v, positions, scale, window, offsets, set_sizes)
        return _triton_backward(grad_out, grad_lse, out, lse, *inputs)
    rungs = _fixed_rungs(q, window, offsets, set_sizes)
    return cpu.backward(grad_out, grad_lse, q, k, v, out, lse, window, rungs, scale, positions)


@torch.library.impl(_library, "attend_scaled_forward", "CPU")
def _(q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    if interpret:
        return _triton_scaled_forward(q, k, v, positions, scale, window, alpha, rungs, max_offset)
    out, lse = cpu.forward(q, k, v, window, _scaled_rungs(alpha, rungs, window, max_offset), scale, positions)
    return out, lse.to(kept_dtype(q.dtype))


@torch.library.impl(_library, "attend_scaled_backward", "CPU")
def _(grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    if interpret:
        inputs = (q, k, v, positions, scale, window, alpha, rungs, max_offset)
        return _triton_scaled_backward(grad_out, grad_lse, out, lse, *inputs)
    some = _scaled_rungs(alpha, rungs, window, max_offset)
    grads = cpu.backward(grad_out, grad_lse, q, k, v, out, lse, window, some, scale, positions)
    # d alpha = sum of d fraction * rung, since a rung's distance is alpha * rung.
    total = sum(grad * rungs[rung.index] for grad, rung in zip(some.fraction_grad, some.rungs, strict=True))
    return *grads, torch.full_like(alpha, total)


@torch.library.impl(_library, "attend_step", "CUDA")
def _triton_step(
    q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, offsets, set_sizes, interpret=False
):
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return _kernels().fixed_decode(*cached, scale, window, tuple(split_offsets(offsets, set_sizes)))


@torch.library.impl(_library, "attend_scaled_step", "CUDA")
def _triton_scaled_step(
    q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, alpha, rungs, max_offset, interpret=False
):
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return _kernels().scaled_decode(*cached, scale, window, alpha, rungs, max_offset)


@torch.library.impl(_library, "attend_step", "CPU")
def _(q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, offsets, set_sizes, interpret=False):
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions, scale, window)
    if interpret:
        return _triton_step(*cached, offsets, set_sizes)
    return decode.step(*cached, split_offsets(offsets, set_sizes))


@torch.library.impl(_library, "attend_scaled_step", "CPU")
def _(q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions, scale, window)
    if interpret:
        return _triton_scaled_step(*cached, alpha, rungs, max_offset)
    return decode.scaled_step(*cached, interpolate(rungs, float(alpha), window, max_offset))


def _like(q: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return _like(q), q.new_empty(batch, heads, tokens, dtype=kept_dtype(q.dtype))


@torch.library.register_fake("fibattn::attend_forward", lib=_library)
def _(q, k, v, positions, scale, window, offsets, set_sizes, interpret=False):
    return _outputs(q)


@torch.library.register_fake("fibattn::attend_scaled_forward", lib=_library)
def _(q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    return _outputs(q)


@torch.library.register_fake("fibattn::attend_backward", lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, offsets, set_sizes, interpret=False):
    return _like(q), _like(k), _like(v)


@torch.library.register_fake("fibattn::attend_scaled_backward", lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    return _like(q), _like(k), _like(v), torch.empty_like(alpha)


@torch.library.register_fake("fibattn::attend_step", lib=_library)
def _(q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, offsets, set_sizes, interpret=False):
    return _like(q)


@torch.library.register_fake("fibattn::attend_scaled_step", lib=_library)
def _(q, k_cache, v_cache, k, v, cache_positions, positions, scale, window, alpha, rungs, max_offset, interpret=False):
    return _like(q)


class Attend(torch.autograd.Function):
    """`attend` with gradients in q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        scale: float,
        window: int,
        offsets: list[int],
        set_sizes: list[int],
        interpret: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As every autograd function's."""
        fixed = (scale, window, offsets, set_sizes, interpret)
        out, lse = torch.ops.fibattn.attend_forward(q, k, v, positions, *fixed)
        ctx.save_for_backward(q, k, v, positions, out, lse)
        ctx.arguments = fixed
        ctx.set_materialize_grads(False)
        return out, lse.to(lse_dtype(q.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """As every autograd function's."""
        q, k, v, positions, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = torch.ops.fibattn.attend_backward(grad_out, grad_lse, out, lse, q, k, v, positions, *ctx.arguments)
        return *grads, None, None, None, None, None, None


class AttendScaled(torch.autograd.Function):
    """`attend_scaled` with gradients in q, k, v and alpha."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        scale: float,
        window: int,
        alpha: Tensor,
        rungs: list[int],
        max_offset: int,
        interpret: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As every autograd function's."""
        inputs = (q, k, v, positions, scale, window, alpha, rungs, max_offset, interpret)
        out, lse = torch.ops.fibattn.attend_scaled_forward(*inputs)
        ctx.save_for_backward(q, k, v, positions, alpha, out, lse)
        ctx.arguments = (scale, window, rungs, max_offset, interpret)
        ctx.set_materialize_grads(False)
        return out, lse.to(lse_dtype(q.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """As every autograd function's."""
        q, k, v, positions, alpha, out, lse = ctx.saved_tensors
        scale, window, *rest = ctx.arguments
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        *grads, grad_alpha = torch.ops.fibattn.attend_scaled_backward(
            grad_out, grad_lse, out, lse, q, k, v, positions, scale, window, alpha, *rest
        )
        return *grads, None, None, None, grad_alpha, None, None, None
