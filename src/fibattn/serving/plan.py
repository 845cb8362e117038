"""What a configuration means to an engine with a paged cache: how many tokens each of its layers keeps."""

from collections import Counter
from collections.abc import Sequence

from fibattn.model.configuration import FibAttnConfig


def windows(config: FibAttnConfig, block: int, chunk: int, longest: int) -> list[int | None]:
    """How many tokens of every layer vLLM is to keep, the newest included; None for all.

    Either each layer's own reach, or one for all layers of a type, the longest: fewer groups of layers, each of which
    has tables of its own. The first where it takes less memory.

    Args:
        block: tokens of a block.
        chunk: the most tokens of a step.
        longest: the most tokens of a request.
    """
    reaches = [config.layer_reach(layer) for layer in range(config.num_hidden_layers)]
    full = [kind == "full_attention" for kind in config.layer_types or []]
    most = {kind: max((reach or 0) for reach, one in zip(reaches, full, strict=True) if one == kind) for kind in full}
    own = [None if reach is None else reach + 1 for reach in reaches]
    shared = [None if reach is None else most[kind] + 1 for reach, kind in zip(reaches, full, strict=True)]
    return min(shared, own, key=lambda windows: rows_held(windows, block, chunk, longest))


def rows_held(windows: Sequence[int | None], block: int, chunk: int, longest: int) -> int:
    """The rows that a request takes at most in all layers, in blocks, and with layers grouped as vLLM groups them."""
    counts = Counter(windows)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    rows = 0
    for window, layers in counts.items():
        tokens = longest if window is None else min(window - 1 + chunk, longest)
        rows += -(-layers // size) * size * (-(-tokens // block) + (window is not None)) * block
    return rows
