"""The operator as PyTorch sees it: schemas, shapes without data, and gradients.

Each device's implementation is a set of plain functions behind `torch.ops.fibattn`, so that `torch.compile` treats a
call as one node; the autograd function stands outside. A pattern travels as integers: where every KV head has offsets
of its own, `offsets` holds them one after the other and `set_sizes` says where to cut. With an `alpha`, `offsets` are
the base rungs of a learned pattern. Kernels are imported on first use.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fibattn.attention import cpu, reference, ring
from fibattn.attention.reference import Patterns, wide
from fibattn.errors import InputError
from fibattn.pattern import InterpolatedRung, LearnedPattern, Pattern

NO_LIMIT = 2**31 - 1
"""The `max_offset` of a schema where there is none."""

_library = torch.library.Library("fibattn", "DEF")
_PATTERN = "float scale, int window, int[] offsets, int[] set_sizes, int max_offset"
_INTERPRET = "bool interpret=False"
"""Whether CPU tensors go through the GPU's kernels, in Triton's interpreter. On a GPU it says nothing."""
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? positions, {_PATTERN}, {_INTERPRET}"
_SAVED = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse"
_RING = "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_positions"
_library.define(f"attend_forward({_INPUTS}) -> (Tensor, Tensor)")
# The last gradient is alpha's; without one it is empty.
_library.define(f"attend_backward({_SAVED}, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"attend_step({_RING}, Tensor? alpha, Tensor? positions, {_PATTERN}, {_INTERPRET}) -> Tensor")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    positions: Tensor | None,
    scale: float,
    patterns: Patterns,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp, with gradients in q, k, v and alpha."""
    if backend == "reference":
        return reference.attend(q, k, v, patterns, scale, positions, alpha)
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Compiled, PyTorch loses the gradient of an operator inside `torch.func.grad`: it gives zeros, and warns.
        torch._dynamo.graph_break()
    given = (q, k, v, alpha, positions, scale, *as_integers(patterns), interpreted(backend, q))
    out, lse = _Attend.apply(*given) if tracked() else torch.ops.fibattn.attend_forward(*given)
    return out, lse.to(wide(q))


def tracked() -> bool:
    """Whether more than the output may be wanted. A function of autograd costs the host as much as all the rest."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def interpreted(backend: str, q: Tensor) -> bool:
    """Whether the GPU's kernels are to run on the CPU, in Triton's interpreter."""
    return backend == "triton" and q.device.type == "cpu"


def as_integers(patterns: Patterns) -> tuple[int, list[int], list[int], int]:
    """Window, offsets, sizes of the sets and limit, as schemas have them."""
    if isinstance(patterns, LearnedPattern):
        limit = NO_LIMIT if patterns.max_offset is None else patterns.max_offset
        return patterns.window, list(patterns.rungs), [len(patterns.rungs)], limit
    offsets = [offset for one in patterns for offset in one.offsets]
    return patterns[0].window, offsets, [len(one.offsets) for one in patterns], NO_LIMIT


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp between forward and backward: its rounding would be in all of a row's weights."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


class Given(NamedTuple):
    """A pattern and a way to run it, as the schemas have them."""

    scale: float
    window: int
    offsets: Sequence[int]
    set_sizes: Sequence[int]
    max_offset: int
    interpret: bool = False

    @property
    def sets(self) -> tuple[tuple[int, ...], ...]:
        """The offsets of every KV head, or the one set that all share; with an alpha the base rungs."""
        ends = accumulate(self.set_sizes)
        return tuple(tuple(self.offsets[end - size : end]) for end, size in zip(ends, self.set_sizes, strict=True))

    def at(self, alpha: Tensor) -> tuple[InterpolatedRung, ...]:
        """The rungs of a learned pattern."""
        return LearnedPattern(self.window, tuple(self.offsets), self.max_offset).at(float(alpha))

    def beyond(self, alpha: Tensor | None) -> tuple[tuple[tuple[int, ...], ...], list[float] | None]:
        """`sets`, and None; with an alpha the nearer keys of its rungs, and how far beyond these the rungs are."""
        if alpha is None:
            return self.sets, None
        rungs = self.at(alpha)
        return (tuple(rung.near for rung in rungs),), [rung.fraction for rung in rungs]

    def by_kernels(self, q: Tensor) -> bool:
        """Whether the GPU's kernels are to run, if only in the interpreter."""
        return self.interpret or q.is_cuda

    def columns(self, q: Tensor, k: Tensor, alpha: Tensor | None) -> Any:
        """What they read."""
        return kernels("learned").columns_of(q, k, alpha, self.window, self.sets, self.max_offset)

    def rungs(self, q: Tensor, alpha: Tensor | None) -> cpu.Rungs:
        """What lies beyond the window, for the CPU."""
        if alpha is None:
            return cpu.FixedRungs([Pattern(self.window, some) for some in self.sets], q.device)
        return cpu.LearnedRungs(self.at(alpha), q.device)


def kernels(room: str) -> Any:
    """Some of the GPU's kernels; Triton is imported here and nowhere before."""
    return import_module(f"fibattn.attention.triton.{room}")


@torch.library.impl("fibattn::attend_forward", ("cuda", "cpu"), lib=_library)
def _(q, k, v, alpha, positions, *pattern):
    given = Given(*pattern)
    if given.by_kernels(q):
        return kernels("forward").forward(q, k, v, positions, given.scale, given.columns(q, k, alpha))
    out, lse = cpu.forward(q, k, v, given.window, given.rungs(q, alpha), given.scale, positions)
    return out, lse.to(kept_dtype(q.dtype))


@torch.library.impl("fibattn::attend_backward", ("cuda", "cpu"), lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, alpha, positions, *pattern):
    given = Given(*pattern)
    if given.by_kernels(q):
        saved, rest = (grad_out, grad_lse, out, lse), (positions, given.scale, given.columns(q, k, alpha))
        *grads, partial = kernels("backward").backward(*saved, q, k, v, *rest)
        if alpha is None:
            return *grads, q.new_empty(0)
        return *grads, partial.sum(dtype=torch.float64).to(alpha.dtype).reshape(alpha.shape)
    rungs = given.rungs(q, alpha)
    grads = cpu.backward(grad_out, grad_lse, q, k, v, out, lse, given.window, rungs, given.scale, positions)
    if not isinstance(rungs, cpu.LearnedRungs):
        return *grads, q.new_empty(0)
    # d alpha = sum of d fraction * rung, since a rung's distance is alpha * rung.
    total = sum(grad * given.offsets[rung.index] for grad, rung in zip(rungs.fraction_grad, rungs.rungs, strict=True))
    return *grads, torch.full_like(alpha, total)


@torch.library.impl("fibattn::attend_step", ("cuda", "cpu"), lib=_library)
def _(q, k_cache, v_cache, k, v, cache_positions, alpha, positions, *pattern):
    given = Given(*pattern)
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions, given.scale, given.window)
    if given.by_kernels(q):
        rungs = kernels("learned").rungs_of(q, alpha, given.window, given.sets, given.max_offset)
        return kernels("decode").decode(*cached, *rungs)
    return ring.step(*cached, *given.beyond(alpha))


def result_like(x: Tensor) -> Tensor:
    """Room for a result, laid out as kernels leave it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fibattn::attend_forward", lib=_library)
def output_and_sums(q, *_, **__):
    """What a forward gives, without data."""
    batch, tokens, heads = q.shape[:3]
    return result_like(q), q.new_empty(batch, heads, tokens, dtype=kept_dtype(q.dtype))


@torch.library.register_fake("fibattn::attend_backward", lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, alpha, *_, **__):
    return result_like(q), result_like(k), result_like(v), q.new_empty(0) if alpha is None else torch.empty_like(alpha)


torch.library.register_fake("fibattn::attend_step", lambda q, *_, **__: result_like(q), lib=_library)


class _Attend(torch.autograd.Function):
    """The forward operator with gradients in q, k, v and alpha."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, alpha, positions, scale, window, offsets, set_sizes, max_offset, interpret):
        # A compiler counts the arguments, so they are all named.
        pattern = (scale, window, offsets, set_sizes, max_offset, interpret)
        return torch.ops.fibattn.attend_forward(q, k, v, alpha, positions, *pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.rest = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        # A compiler has no second derivatives to refuse, and need not see through another function.
        call = torch.ops.fibattn.attend_backward if torch.compiler.is_compiling() else _Gradients.apply
        grads = call(grad_out, grad_lse, out, lse, *inputs, *ctx.rest)
        return *grads[:3], None if inputs[3] is None else grads[3], *[None] * (1 + len(ctx.rest))


class _Gradients(torch.autograd.Function):
    """The backward operator. A derivative of it is refused; to take a part of it for constant would be wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.fibattn.attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise InputError("attend has no second derivatives; backend='reference' has them, in quadratic time")
