"""Held-out sets cut to the same bytes, whatever the tokenizer, so that bits per byte compare."""

import numpy as np

from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.errors import InputError
from fibattn.evaluation.sweep import shared_targets


def targets_of(data: PreparedData, like: PreparedData | None, lengths: list[int], tokens: int) -> dict[str, int]:
    """How many targets of each held-out set to evaluate: whole sequences of every length, at most `tokens`.

    With `like`, the same text in another tokenizer, as many as lie within the bytes of its first `tokens` targets.

    Raises:
        InputError: for other held-out sets than `like` has, or one that is shorter than the longest sequence.
    """
    if like is None:
        return shared_targets(data, lengths=lengths, sets=[], tokens=tokens)
    targets: dict[str, int] = {}
    for name, size in sizes_of(data, like, tokens).items():
        within = targets_within(data.validation[name], data.token_bytes, size)
        targets |= shared_targets(data, lengths=lengths, sets=[name], tokens=within)
    return targets


def check_same_sets(data: PreparedData, like: PreparedData) -> None:
    """Refuse two texts whose held-out sets have other names.

    Raises:
        InputError: naming both.
    """
    if set(data.validation) != set(like.validation):
        raise InputError(
            f"{data.folder} has the held-out sets {', '.join(data.validation)}, and {like.folder} has "
            f"{', '.join(like.validation)}; prepare both from the same text"
        )


def sizes_of(data: PreparedData, like: PreparedData, tokens: int) -> dict[str, int]:
    """The bytes of the first `tokens` targets of each held-out set of `like`, which `data` must have, too.

    Raises:
        InputError: as `check_same_sets`.
    """
    check_same_sets(data, like)
    return {
        name: int(stream.byte_counts(1, min(tokens, len(stream) - 1), like.token_bytes).sum())
        for name, stream in like.validation.items()
    }


def targets_within(stream: TokenStream, token_bytes: np.ndarray, size: int) -> int:
    """How many targets from the first on have at most `size` bytes."""
    counts = stream.byte_counts(1, len(stream) - 1, token_bytes)
    return int(np.searchsorted(np.cumsum(counts), size, side="right"))
