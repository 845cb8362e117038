"""Messages between the parts of a row: what lies before a part comes from the processes that hold it.

A message has a beginning and an end, so that work can be done while it is under way, and its gradients go back in the
same two steps. All processes of a group take part, those that get nothing too: in the backward pass it is they who do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ops: Any = torch.ops._c10d_functional


class Message(NamedTuple):
    """A message under way: how many tokens come from each process, and how many went to each.

    `origin` stands for what was sent: a gradient must have the shape of what it is for, so it goes back through that.
    """

    content: Tensor
    origin: Tensor
    receive: list[int]
    send: list[int]
    group: str

    def end(self) -> Tensor:
        """Wait for what was sent: (tokens, ...)."""
        return _End.apply(*self)


def begin_halo(x: Tensor, tokens: int, reach: int, rank: int, ranks: int, group: str) -> Message:
    """Begin to fetch the `reach` tokens before this part, or as many as the row has there.

    Args:
        x: (tokens, ...), this process's part, or the last `reach` of it.
        tokens: how many a part has; all have as many.
        reach: how many tokens before its first are wanted; they may be in several parts.
        rank: the place of this part; `ranks`: how many there are; `group`: the name of their process group.
    """
    receive, send = ([_wanted(way * (rank - other), reach, tokens) for other in range(ranks)] for way in (1, -1))
    parts = [x[x.shape[0] - count :] for count in send if count] or [x[:0]]
    content, origin = _Begin.apply(torch.cat(parts), receive, send, group)
    return Message(content, origin, receive, send, group)


def gathered(x: Tensor, ranks: int, group: str) -> Tensor:
    """What each process has for x, (ranks, ...), at once and without gradients."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x[None].contiguous(), ranks, group))


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of what the processes have, at once and without gradients."""
    return _ops.wait_tensor(_ops.all_reduce(x, "sum", group))


def _wanted(distance: int, reach: int, tokens: int) -> int:
    """How many tokens a part needs of the one that lies `distance` parts before it: its last ones."""
    return min(max(reach - (distance - 1) * tokens, 0), tokens) if distance > 0 else 0


class _Begin(torch.autograd.Function):
    """Send; what comes back as gradients must have arrived."""

    @staticmethod
    def forward(x: Tensor, receive: list[int], send: list[int], group: str) -> tuple[Tensor, Tensor]:
        return _ops.all_to_all_single(x, receive, send, group), x.new_zeros(1).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.wait_tensor(grad), None, None, None


class _End(torch.autograd.Function):
    """Have it; gradients are sent back, each to where its token came from."""

    @staticmethod
    def forward(content: Tensor, origin: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
        return _ops.wait_tensor(content)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.route = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        receive, send, group = ctx.route
        return None, _ops.all_to_all_single(grad.contiguous(), send, receive, group), None, None, None
