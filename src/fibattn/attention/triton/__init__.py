"""The operator as Triton kernels for NVIDIA GPUs: forward, backward, learned scale, decoding. Imported on first use.

`forward.py`, `backward.py` and `decode.py` hold the kernels, `scaled.py` what a learned scale adds, `common.py`
what they share: checks, tile sizes, the offsets on the device and the tile arithmetic.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("attention on a GPU needs Triton; run `pip install 'fibattn[triton]'`") from error

from fibattn.attention.triton.backward import backward
from fibattn.attention.triton.common import offset_table
from fibattn.attention.triton.decode import decode
from fibattn.attention.triton.forward import forward
from fibattn.attention.triton.scaled import scaled_backward, scaled_decode, scaled_forward

__all__ = ["backward", "decode", "forward", "offset_table", "scaled_backward", "scaled_decode", "scaled_forward"]
