"""Context parallelism of a model: its rows are cut, and it is told which part it has.

`cut` stands in for `torch.distributed.tensor.experimental.context_parallel`, which replaces PyTorch's attention and
gives each process the head and the tail of a row. Here a part is what stands together.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fibattn.errors import InputError
from fibattn.model.loss import IGNORED
from fibattn.parallel.exchange import check_same, summed
from fibattn.parallel.shard import Shard


class ContextParallel:
    """Cuts what a model is given over the processes of `group`.

    Args:
        model: a Transformers model of this package, or a converted one.
        group: every process of it is given the same rows.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.group, self.shard, self.inside = group, Shard.of(group), False
        self._names = list(inspect.signature(model.forward).parameters)
        model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._after)

    @contextmanager
    def cut(
        self,
        buffers: Sequence[Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: Collection[Tensor] | None = None,
    ) -> Iterator[None]:
        """Inside, the buffers are this process's part of them along their dimensions, and the model takes parts.

        Raises:
            InputError: for a length that does not divide, and buffers that are not the same in all processes.
        """
        buffers, dims = list(buffers or ()), list(buffer_seq_dims or ())
        ranks, rank = self.shard.ranks, self.shard.rank
        if buffers:
            check_same(buffers[0], ranks, self.shard.group)
        for buffer, dim in zip(buffers, dims, strict=True):
            if buffer.shape[dim] % ranks or not buffer.shape[dim]:
                raise InputError(f"{buffer.shape[dim]} tokens do not divide over cp_size {ranks}; pad to a multiple")
        whole = [buffer.detach() for buffer in buffers]
        for buffer, dim in zip(buffers, dims, strict=True):
            buffer.set_(buffer.chunk(ranks, dim)[rank].contiguous())  # pyright: ignore
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            for buffer, before in zip(buffers, whole, strict=True):
                if not any(buffer is kept for kept in no_restore_buffers or ()):
                    buffer.set_(before)  # pyright: ignore

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's forward pre-hook: what it must know of the whole row."""
        if not self.inside:
            return args, kwargs
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name in ("cache", "past_key_values", "cu_seq_lens_q"):
            if given.get(name) is not None:
                raise InputError(
                    f"{name} was given with a row that is cut over processes; leave it out. (Documents are packed by "
                    "position_ids that restart; what generates takes whole rows, outside of the context)"
                )
        targets = given.get("shift_labels")
        if targets is None and given.get("labels") is not None:
            raise InputError(
                "labels of a part cannot be shifted past its end; give shift_labels, made before the row is cut: "
                "torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)"
            )
        if targets is not None:
            given["labels"] = targets  # without labels other models compute no loss
            if given.get("num_items_in_batch") is None:
                given["num_items_in_batch"] = self.items(targets)
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        for name in ("shift_labels", "attention_mask", "position_ids"):
            if (x := given.get(name)) is not None and x.shape[-1] != tokens.shape[1]:
                raise InputError(
                    f"{name} is for {x.shape[-1]} tokens, and this part of the row has {tokens.shape[1]}; give "
                    "maybe_context_parallel all that is for tokens, so that it is cut alike"
                )
        if given.get("position_ids") is None:
            place = torch.arange(tokens.shape[1], device=tokens.device) + self.shard.rank * tokens.shape[1]
            given["position_ids"] = place[None]
        return (), {**given, "use_cache": False, "shard": self.shard}

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The model's forward hook."""
        if self.inside and getattr(output, "loss", None) is not None:
            output.loss = self.kept(output.loss)
        return output

    def items(self, targets: Tensor) -> Tensor:
        """What divides a process's summed loss, so that the mean over processes is that over the row's targets."""
        return summed((targets != IGNORED).sum(), self.shard.group) / self.shard.ranks

    def kept(self, loss: Tensor) -> Tensor:
        """A process's loss, while training; else the mean of all: an evaluation keeps that of some processes alone."""
        return loss if torch.is_grad_enabled() else summed(loss, self.shard.group) / self.shard.ranks
