"""The operator as Triton kernels for NVIDIA GPUs: forward, backward, learned alpha, decoding. Imported on first use.

From the ground up, a room importing those before it:

- `shape.py`, which calls the kernels take;
- `rows.py` and `scores.py`, the arithmetic of their tiles;
- `columns.py` and `dense_window.py`, the two ways to the keys of a tile: gathered by a table, or one after the other;
- `launch.py`, what every kernel is made by, tile sizes and the arguments that the kernels share;
- `learned.py`, rungs between two keys, where a learned alpha puts them, and the columns of any pattern;
- `forward.py`, `key_gradients.py`, `backward.py`, `decode.py` and `paged.py`, the kernels;
- `chosen.py`, `chosen_forward.py`, `chosen_backward.py`, `chosen_decode.py`, those where queries choose blocks of keys.

In kernels, names begin with what they are: `p_` a pointer, `i_` which program or step, `o_` indices, `b_` a block
of values, `m_` a mask. Capitals are known when a kernel is compiled. A pointer that is None stands for what a call does
without. Strides come as one tuple a tensor: batch, token, head.
"""

from fibattn.errors import MissingExtraError

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise MissingExtraError("attention on a GPU needs Triton", "triton") from error
