"""Rotary positions: Llama's, with Transformers' scaling where a layer asks for it.

The frequencies stay float32 and the angles are computed in float64, whatever the model is cast to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from fibattn.errors import InputError, suggestion
from fibattn.model.configuration import FibAttnConfig

Rotation = tuple[Tensor, Tensor]


class FibAttnRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, plain or with the scaling that `rope_parameters` asks for."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: FibAttnConfig, *, scaled: bool = True):
        super().__init__()
        self.config = config
        self.rope_type = str(config.rope_parameters["rope_type"]) if scaled else "default"  # pyright: ignore
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        frequencies = self.frequencies()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def frequencies(self) -> Tensor:
        """The inverse frequencies (head size / 2,); also sets the factor on the cosines and sines."""
        given: dict = self.config.rope_parameters  # pyright: ignore
        if self.rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            kinds = suggestion(self.rope_type, ["default", *ROPE_INIT_FUNCTIONS], "types")
            raise InputError(f"unknown rope_type {self.rope_type!r} in rope_parameters: {kinds}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                f"partial_rotary_factor is {given['partial_rotary_factor']} in rope_parameters; heads rotate whole "
                "here, leave it out"
            )
        if self.rope_type != "default":
            frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, None)
            return frequencies
        self.attention_scaling = 1.0
        return plain_frequencies(float(given["rope_theta"]), self.config.head_dim or 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `to_empty` and the like do to a module; the frequencies are made anew after it."""
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:
            self._refill(self.inv_freq.device)
        return self

    def _refill(self, device: torch.device) -> None:
        with torch.device("cpu"):
            frequencies = self.frequencies().to(device)
        self.inv_freq, self.original_inv_freq = frequencies, frequencies.clone()
        self.max_seq_len_cached = self.original_max_seq_len

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        """Cosines and sines (batch or 1, tokens, 1, head size) in the dtype of `x`, of angles in float64.

        In float32 the angles blur with the position: at millions of tokens a model no longer tells near ones apart.
        """
        # FSDP's mixed precision casts buffers past `_apply`, and `load_state_dict(assign=True)` leaves them on meta.
        if self.inv_freq.dtype != torch.float32 or (self.inv_freq.is_meta and not x.is_meta):
            self._refill(x.device)
        return cosines_and_sines(position_ids, self.inv_freq.to(x.device), self.attention_scaling, x.dtype)


def plain_frequencies(theta: float, size: int, device: torch.device | None = None) -> Tensor:
    """The inverse frequencies (head size / 2,) of rotary positions with the base `theta`, float32, unscaled."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


@torch.library.custom_op("fibattn::cosines_and_sines", mutates_args=())
def cosines_and_sines(
    position_ids: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch or 1, tokens, 1, head size) in `dtype`, of angles in float64, times `factor`."""
    # An operator, for one reason: `torch.compile` would take the angles apart and give every layer its own cosines.
    wide = torch.float32 if position_ids.device.type == "mps" else torch.float64  # what an Apple GPU has
    angles = position_ids[..., None].to(wide) * frequencies.to(wide)
    waves = [(wave(angles) * factor).to(dtype) for wave in (torch.cos, torch.sin)]
    cosines, sines = (torch.cat((wave, wave), dim=-1)[:, :, None] for wave in waves)
    return cosines, sines


@cosines_and_sines.register_fake
def _(position_ids: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*position_ids.shape, 1, 2 * frequencies.shape[0])
    empty = position_ids.new_empty(shape, dtype=dtype)
    return empty, torch.empty_like(empty)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary embedding to x (batch, tokens, heads, head size)."""
    cosine, sine = rotation
    left, right = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-right, left), dim=-1) * sine).to(x.dtype)
