"""The rotary positions of a converted decoder: its own frequencies, exact under casts, at angles in float64.

Transformers keeps the frequencies in buffers, which `model.bfloat16()` rounds for good, and computes angles in float32,
which blur at millions of tokens. A converted model streams that far, so hooks on its rotary module mend both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fibattn.model.rotary import Rotation, cosines_and_sines

_ARGUMENTS = ("x", "position_ids", "layer_type")


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that make cosines and sines, one in every decoder known."""
    return [module for module in decoder.modules() if type(module).__name__.endswith("RotaryEmbedding")]


def keep_exact(module: nn.Module) -> None:
    """Make a rotary module's frequencies anew, now and after every cast: one there and back would not show."""
    _refill(module)
    module._apply = partial(_apply, module)  # as a method of the module's class would be; copies keep it


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    type(module)._apply(module, fn, recurse)
    _refill(module)
    return module


def _refill(module: nn.Module) -> None:
    kinds: Any = module.rope_type
    for layer_type, rope_type in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        names = [_named(name, layer_type) for name in ("inv_freq", "original_inv_freq")]
        device = getattr(module, names[0]).device
        if device.type == "meta":
            continue
        make: Any = ROPE_INIT_FUNCTIONS.get(rope_type, getattr(module, "compute_default_rope_parameters", None))
        frequencies = make(module.config, **({} if layer_type is None else {"layer_type": layer_type}))[0]
        for name in names:
            setattr(module, name, frequencies.clone().to(device))
        setattr(module, _named("max_seq_len_cached", layer_type), module.original_max_seq_len)


def before_rotation(module: nn.Module, _: tuple[Any, ...]) -> None:
    """A rotary module's forward pre-hook: frequencies that were cast past `_apply`, as by FSDP, are made anew."""
    if any(one.dtype != torch.float32 for name, one in module.named_buffers() if name.endswith("inv_freq")):
        _refill(module)


def after_rotation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Rotation) -> Rotation:
    """A rotary module's forward hook: the same cosines and sines (batch or 1, tokens, head size), from float64.

    What Transformers computed is dropped; its forward ran to choose the scalings that depend on the length.
    """
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    layer_type = given.get("layer_type")
    frequencies: Tensor = getattr(module, _named("inv_freq", layer_type))
    factor = float(getattr(module, _named("attention_scaling", layer_type)))
    at = given["position_ids"]
    cosines, sines = cosines_and_sines(at, frequencies.to(at.device), factor, found[0].dtype)
    return cosines[:, :, 0], sines[:, :, 0]


def _named(name: str, layer_type: str | None) -> str:
    """What Transformers calls a rotary module's attribute where types of layers have rotations of their own."""
    return name if layer_type is None else f"{layer_type}_{name}"
