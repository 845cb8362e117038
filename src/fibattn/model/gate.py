"""Gates of the heads: how much of what each has read goes on, or of what a token's embedding adds to its values."""

import torch
from torch import Tensor, nn


class FibAttnGate(nn.Module):
    """A number for every head of each token, from 0 to 2 and 1 at first (arXiv 2505.06708, by head)."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, hidden_size))

    def forward(self, hidden: Tensor, of: Tensor) -> Tensor:
        """`of` (batch, tokens, heads, size) times the gates of the input `hidden` (batch, tokens, hidden size)."""
        return of * (2 * torch.sigmoid(hidden @ self.weight.T.to(hidden.dtype)))[..., None].to(of.dtype)
