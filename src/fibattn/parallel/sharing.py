"""Sequences that processes of torchrun share, each cut over a few of them: for evaluation, without gradients."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fibattn.errors import InputError
from fibattn.parallel.context import ContextParallel
from fibattn.parallel.exchange import gathered


class Sharing:
    """Groups of `cut` processes, in order: each takes its share of sequences, of which a process has a part.

    All processes make one, and then the same calls of `whole`.

    Args:
        model: what is called on parts, with the whole of its weights in every process.
        cut: how many processes share a sequence.

    Raises:
        InputError: when the processes do not divide into such groups.
    """

    def __init__(self, model: nn.Module, cut: int = 1):
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if cut < 1 or processes % cut:
            raise InputError(
                f"context_parallel is {cut}, and {processes} processes do not divide by it; start a multiple of "
                f"it: torchrun --nproc-per-node {max(cut, 2)} -m fibattn …"
            )
        self.cut, self.groups = cut, processes // cut
        self.group = dist.get_rank() // cut if processes > 1 else 0
        self._cutter = None
        if cut > 1:
            groups: Any = [dist.new_group(range(first, first + cut)) for first in range(0, processes, cut)]
            self._cutter = ContextParallel(model, groups[self.group])

    def rows(self, count: int) -> range:
        """Of `count` sequences those of this process's group."""
        return range(self.group, count, self.groups)

    def parts(self, *buffers: Tensor) -> AbstractContextManager[None]:
        """Inside, the buffers (sequences, tokens) are this process's part of them, and the model takes parts."""
        return nullcontext() if self._cutter is None else self._cutter.cut(buffers, [1] * len(buffers))

    def whole(self, found: Tensor, count: int) -> Tensor:
        """Of (own sequences, tokens of a part) from every process, (count, tokens), in order."""
        if self.groups * self.cut == 1:
            return found
        most = -(-count // self.groups)
        padded = torch.zeros(most, found.shape[1], dtype=found.dtype, device=found.device)
        padded[: len(found)] = found
        every = gathered(padded, self.groups * self.cut, dist.group.WORLD.group_name)  # pyright: ignore
        by_row = every.view(self.groups, self.cut, most, -1).permute(2, 0, 1, 3)
        return by_row.reshape(most * self.groups, -1)[:count]
