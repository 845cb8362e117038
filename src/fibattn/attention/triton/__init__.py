"""The operator as Triton kernels for NVIDIA GPUs: forward, backward, learned scale, decoding. Imported on first use.

From the ground up, a room importing those before it:

- `shape.py`, which calls the kernels take;
- `rows.py` and `scores.py`, the arithmetic of their tiles;
- `columns.py` and `dense_window.py`, the two ways to the keys of a tile: gathered by a table, or one after the other;
- `launch.py`, tile sizes and the arguments that the kernels share;
- `forward.py`, `key_gradients.py`, `backward.py` and `decode.py`, the kernels;
- `fixed.py` and `scaled.py`, which call them for fixed offsets and for a learned scale.

In kernels, names begin with what they are: `p_` a pointer, `i_` which program or step, `o_` indices, `b_` a block
of values, `m_` a mask. Capitals are known when a kernel is compiled.
"""

from fibattn.errors import MissingExtraError

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise MissingExtraError("attention on a GPU needs Triton", "triton") from error

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
