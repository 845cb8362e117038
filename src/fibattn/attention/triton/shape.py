"""Which calls the kernels take, and the sizes of one that do not depend on its length."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from fibattn.errors import InputError

UNREACHABLE = 2**30
"""An offset farther than any key: what fills up the shorter sets, and what a dropped rung becomes."""

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """The sizes of one call that do not depend on its length."""

    group: int
    padded_group: int
    size: int
    padded_size: int
    batch_queries: int
    rows: int
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether inputs are float32, which deserve more; `scores.py` says what."""
        return self.dtype == torch.float32


def shape_of(q: Tensor, k: Tensor) -> Shape:
    """The shape of a call, after checking that the kernels support it."""
    if k.shape[1] >= UNREACHABLE:
        raise InputError(f"{k.shape[1]} key tokens; the GPU kernels take fewer than {UNREACHABLE}")
    if q.shape[0] >= 2**16:
        raise InputError(f"the batch is {q.shape[0]}; the GPU kernels take at most {2**16 - 1}: split it")
    return _shape(q.shape[3], q.shape[2] // k.shape[2], q.dtype)


@cache
def _shape(size: int, group: int, dtype: torch.dtype) -> Shape:
    if dtype not in _SUPPORTED:
        raise InputError(
            f"q is {dtype}; the kernels take {', '.join(map(str, _SUPPORTED))}: convert it, or use backend='reference'"
        )
    if size % 8 or not 16 <= size <= 256:
        raise InputError(
            f"head size is {size}; the GPU kernels take multiples of 8 from 16 to 256: pad it with zeros "
            "(and give `scale`), or use backend='reference'"
        )
    padded = triton.next_power_of_2(group)
    rows = max(16, padded)
    return Shape(group, padded, size, triton.next_power_of_2(size), rows // padded, rows, dtype)
