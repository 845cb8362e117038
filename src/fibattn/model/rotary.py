"""Rotary positions: Llama's, with Transformers' scaling where a layer asks for it."""

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

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
        if self.rope_type != "default":
            frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, None)
            return frequencies
        self.attention_scaling = 1.0
        size, theta = self.config.head_dim or 0, float(self.config.rope_parameters["rope_theta"])  # pyright: ignore
        return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        """Cosines and sines (batch or 1, tokens, 1, head size) in the dtype of `x`, computed in float32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary embedding to x (batch, tokens, heads, head size)."""
    cosine, sine = rotation
    left, right = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-right, left), dim=-1) * sine).to(x.dtype)
