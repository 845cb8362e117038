"""What the operator's tests share: random inputs, and one way to run any backend with all its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fibattn import LearnedPattern, Pattern, attend

FIBONACCI = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
# 12 rungs beyond a window of 4, the farthest at 139.
PATTERN = Pattern.scaled(4, FIBONACCI, 0.61, max_offset=150)


@dataclass(frozen=True)
class Shape:
    """One call's sizes; `keys` more than `tokens` means that the queries are the last of them."""

    tokens: int
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    size: int = 16
    keys: int | None = None


def random_inputs(
    shape: Shape, dtype: torch.dtype = torch.float64, kind: str = "normal", seed: int = 0
) -> list[Tensor]:
    """q, k and v: `normal`, `peaked` (a softmax that is nearly one key), `large` values, or `correlated`.

    Correlated: neighbours alike and a direction common to all, as in the activations of a trained model.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = shape.keys or shape.tokens
    heads = shape.kv_heads * shape.group
    sizes = [(shape.tokens, heads), (keys, shape.kv_heads), (keys, shape.kv_heads)]
    tensors = [torch.randn(shape.batch, t, h, shape.size, generator=generator, dtype=torch.float64) for t, h in sizes]
    if kind == "peaked":
        tensors[0] *= 12
    if kind == "large":
        tensors = [100 * tensors[0], tensors[1], 1000 * tensors[2]]
    if kind == "correlated":
        counts = (torch.arange(1, x.shape[1] + 1)[:, None, None] for x in tensors)
        tensors = [1 + x.cumsum(1) / count for x, count in zip(tensors, counts, strict=True)]
    return [x.to(dtype) for x in tensors]


@dataclass(frozen=True)
class Result:
    """Everything that a call computes, in float64."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse, **self.gradients}


Call = Callable[..., tuple[Tensor, Tensor]]


def run(call: Call, inputs: Sequence[Tensor], alpha: Tensor | None = None, lse_gradient: bool = True) -> Result:
    """`call(q, k, v[, alpha])` and the gradients of a fixed random functional of its two outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    names = ["q", "k", "v"]
    if alpha is not None:
        leaves.append(alpha.detach().clone().requires_grad_())
        names.append("alpha")
    out, lse = call(*leaves)
    generator = torch.Generator().manual_seed(99)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    loss = (out * weights).sum(dtype=torch.float64)
    if lse_gradient:
        loss = loss + (lse * torch.randn(lse.shape, generator=generator, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    named = {name: torch.zeros(1) if g is None else g for name, g in zip(names, gradients, strict=True)}
    return Result(out.detach().double(), lse.detach().double(), {name: g.double() for name, g in named.items()})


def fixed(pattern: Pattern | Sequence[Pattern], backend: str, **options: Any) -> Call:
    return lambda q, k, v: attend(q, k, v, pattern, backend=backend, return_lse=True, **options)


def learned(
    window: int, backend: str, rungs: Sequence[int] = FIBONACCI, max_offset: int | None = None, **options: Any
) -> Call:
    pattern = LearnedPattern(window, tuple(rungs), max_offset)
    return lambda q, k, v, alpha: attend(q, k, v, pattern, alpha=alpha, backend=backend, return_lse=True, **options)


def boundaries_to_positions(boundaries: Sequence[int]) -> Tensor:
    """`cu_seqlens` restated: the position of every token in its document, (1, tokens)."""
    lengths = [after - before for before, after in pairwise(boundaries)]
    return torch.cat([torch.arange(length) for length in lengths])[None]


def row_errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The mean and the worst distance of a row (last dimension) from where it should be."""
    distance = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    return float(distance.mean()), float(distance.max())


def assert_close(found: Result, expected: Result, tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest value it should have."""
    for name, wanted in expected.all().items():
        got = found.all()[name]
        assert got.shape == wanted.shape, name
        limit = tolerance * max(1.0, float(wanted.abs().max()))
        worst = float((got - wanted).abs().max())
        assert worst <= limit, f"{name}: off by {worst}, allowed {limit}"
