"""Messages between the parts of a row: what lies before a part comes from the processes that hold it."""

from typing import Any

import torch
from torch import Tensor

from fibattn.errors import InputError

_ops: Any = torch.ops._c10d_functional


def exchange(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
    """x (tokens, ...) to the processes, so many tokens to each in order; what they send, in order, with gradients."""
    return _Exchange.apply(x.contiguous(), receive, send, group)


def gathered(x: Tensor, ranks: int, group: str) -> Tensor:
    """What each process has for x, (ranks, ...), at once and without gradients."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x[None].contiguous(), ranks, group))


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of what the processes have, at once and without gradients."""
    return _ops.wait_tensor(_ops.all_reduce(x, "sum", group))


def check_same(rows: Tensor, ranks: int, group: str) -> None:
    """Refuse rows that differ between processes: messages would not fit each other, or parts of rows be mixed."""
    total = rows.sum()
    mine = torch.cat((total[None], total.new_tensor((rows.numel(), rows.shape[-1]))))
    if bool((gathered(mine, ranks, group) != mine).any()):
        raise InputError(
            f"the processes that share rows have different ones, here {tuple(rows.shape)}; give all of them the same "
            "batch, it is cut for them (the Trainer and Accelerator.prepare see to that)"
        )


def wanted(distance: int, reach: int, tokens: int) -> int:
    """How many tokens a part needs of the one that lies `distance` parts before it: its last ones."""
    return min(max(reach - (distance - 1) * tokens, 0), tokens) if distance > 0 else 0


class _Exchange(torch.autograd.Function):
    """Gradients go back to where a token came from."""

    @staticmethod
    def forward(x: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
        return _ops.wait_tensor(_ops.all_to_all_single(x, receive, send, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.route = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        receive, send, group = ctx.route
        back = _ops.all_to_all_single(grad.contiguous(), send, receive, group)
        return _ops.wait_tensor(back), None, None, None
