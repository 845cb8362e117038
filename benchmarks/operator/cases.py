"""What is measured: shapes, windows and lengths, and the suites that the documentation quotes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fibattn.errors import InputError
from fibattn.pattern import Pattern

SHAPES = {"small": (8, 2, 64), "large": (32, 8, 128)}
"""Query heads, KV heads and head size: the paper's model, and one like an 8-billion-parameter model's."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One input: `batch` sequences of `length` tokens in a shape, and the window of its pattern."""

    shape: str
    window: int
    length: int
    batch: int
    dtype: str
    device: str

    @property
    def pattern(self) -> Pattern:
        """The paper's: 15 Fibonacci rungs at alpha = 1."""
        return Pattern.fibonacci(self.window)

    @property
    def label(self) -> str:
        """As in a table's row."""
        return f"{self.shape} W={self.window} {self.length:,} × {self.batch:,}"

    @property
    def _elements(self) -> tuple[int, int]:
        """Elements of q (or the output), and of k (or v)."""
        heads, kv_heads, size = SHAPES[self.shape]
        return self.batch * self.length * heads * size, self.batch * self.length * kv_heads * size

    @property
    def forward_bytes(self) -> int:
        """Bytes of q, k, v and the output, each once: what a forward pass cannot do without."""
        return 2 * sum(self._elements) * DTYPES[self.dtype].itemsize

    @property
    def training_bytes(self) -> int:
        """Forward, then q, k, v, the output and its gradient read and three gradients written, each once."""
        # Of q's size: q, o, its gradient, dq. Of k's size: k, v, dk, dv.
        return self.forward_bytes + 4 * sum(self._elements) * DTYPES[self.dtype].itemsize

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in and out of a forward and backward pass: q, k, v, o, their gradients, log-sum-exp."""
        return 2 * self.forward_bytes + 4 * self.batch * self.length * SHAPES[self.shape][0]

    def inputs(self) -> list[Tensor]:
        """q, k and v, (batch, length, heads, head size), standard normal, the same on every call."""
        heads, kv_heads, size = SHAPES[self.shape]
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"generator": generator, "device": self.device, "dtype": DTYPES[self.dtype]}
        return [torch.randn(self.batch, self.length, h, size, **options) for h in (heads, kv_heads, kv_heads)]


@dataclass(frozen=True)
class Grid:
    """All lengths with all windows of one shape; `providers` are all that can run when empty."""

    shape: str
    windows: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int = 1
    """Tokens of all sequences together, at least one sequence."""
    providers: tuple[str, ...] = ()

    def cases(self, device: str, dtype: str) -> Iterator[Case]:
        """Every case of the grid.

        Raises:
            InputError: for a shape or dtype that is not in the tables above, or a number below its least.
        """
        if self.shape not in SHAPES or dtype not in DTYPES:
            raise InputError(
                f"shape {self.shape!r} in {dtype!r}: shapes are {', '.join(SHAPES)}, dtypes {', '.join(DTYPES)}"
            )
        if min(self.lengths, default=0) < 1 or min(self.windows, default=-1) < 0 or self.tokens < 1:
            raise InputError(
                f"lengths {self.lengths}, windows {self.windows}, tokens {self.tokens}: "
                "lengths and tokens must be at least 1, windows at least 0"
            )
        for window in self.windows:
            for length in self.lengths:
                yield Case(self.shape, window, length, math.ceil(self.tokens / length), dtype, device)


OURS = ("fibattn", "fibattn-learned")
SUITES = {
    "cuda": (
        Grid("small", (12,), (1024, 4096, 16_384), tokens=32_768),
        Grid("small", (128,), (1024, 4096, 16_384), tokens=32_768, providers=OURS),
        Grid("large", (12,), (8192, 32_768, 131_072), tokens=16_384),
        Grid("large", (128,), (8192, 32_768, 131_072), tokens=16_384, providers=OURS),
        Grid("small", (12,), tuple(4**n for n in range(5, 11)), tokens=2**20, providers=OURS[:1]),
    ),
    "cpu": (
        Grid("small", (12,), (1024, 4096, 16_384)),
        Grid("small", (12,), (65_536,), providers=OURS),
    ),
}
"""What a device is measured on unless told otherwise."""
