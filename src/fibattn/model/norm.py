"""RMSNorm that stays exact, and silent, where activations are narrower than its weight."""

import torch
from torch import Tensor, nn


class FibAttnRMSNorm(nn.RMSNorm):
    """PyTorch's, computed in the weight's dtype where the input is narrower, as under autocast.

    PyTorch does so too, but by a slower way, and warns of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` (…, size) in and out; the wider of its dtype and the weight's."""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))
