"""The operator as Triton kernels for NVIDIA GPUs: forward, backward, learned scale, decoding. Imported on first use.

`forward.py`, `backward.py` and `decode.py` hold the kernels, `fixed.py` and `scaled.py` call them for fixed offsets
and for a learned scale, `common.py` has what they share: checks, tile sizes, the columns and the tile arithmetic.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("attention on a GPU needs Triton; run `pip install 'fibattn[triton]'`") from error

from fibattn.attention.triton.fixed import fixed_backward, fixed_decode, fixed_forward
from fibattn.attention.triton.scaled import scaled_backward, scaled_decode, scaled_forward

__all__ = [
    "fixed_backward",
    "fixed_decode",
    "fixed_forward",
    "scaled_backward",
    "scaled_decode",
    "scaled_forward",
]
