"""The feed-forward products padded to sizes at which tensor cores are fast, whatever size the model has.

The paper's feed-forward size, 1366, is no multiple of 8, so rows of 16-bit matrices start at odd addresses and
their products run at a fraction of the speed. Parameters and checkpoints keep the model's size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional


def padded_gated(
    hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor], multiple: int = 64
) -> Tensor:
    """`down(act(gate(x)) * up(x))` of weights padded to a multiple of `multiple`, gate and up in one product.

    The padding adds exact zeros, so values and gradients are those of the plain formula. The products run in
    the autocast dtype where that is on.

    Args:
        hidden: (batch, tokens, hidden size).
        gate, up: (feed-forward size, hidden size).
        down: (hidden size, feed-forward size).
        act: the activation, element by element.
        multiple: what the padded feed-forward size is a multiple of.
    """
    dtype = _product_dtype(hidden)
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    extra = -gate.shape[0] % multiple
    both = functional.pad(torch.stack((gate, up)), (0, 0, 0, extra)).flatten(0, 1)
    gated, lifted = functional.linear(hidden.to(dtype), both).chunk(2, dim=-1)
    return functional.linear(act(gated) * lifted, functional.pad(down, (0, extra)))


def gains_from_padding(hidden: Tensor, projections: Sequence[nn.Linear]) -> bool:
    """Whether `padded_gated` is faster: in 16 bits on a GPU, with enough tokens to pay for copying the weights.

    Projections that are more than their weight run as they are.
    """
    if not (hidden.is_cuda and _product_dtype(hidden).itemsize == 2):
        return False
    plain = all(is_plain(one, hidden.device) for one in projections)
    return plain and hidden.shape[0] * hidden.shape[1] >= projections[0].out_features


def is_plain(linear: nn.Linear, device: torch.device) -> bool:
    """Whether a linear layer is a product with its weight and no more, so that the product may be taken elsewhere.

    Adapters replace a layer or hook into it, quantisation may replace the weight alone, offloading keeps it elsewhere.
    """
    hooks = (*linear._forward_hooks.values(), *linear._forward_pre_hooks.values())
    kind = type(linear)
    if isinstance(linear, FSDPModule):  # whose class and hooks are made for each
        kind, hooks = kind.__bases__[-1], [one for one in hooks if not one.__module__.startswith("torch.distributed.")]
    if kind is not nn.Linear or hooks:
        return False
    # FSDP hands out plain tensors for parameters.
    return type(linear.weight) in (nn.Parameter, Tensor) and linear.weight.device == device and linear.bias is None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
