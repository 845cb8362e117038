"""The loss on tokens that repeat an earlier pair, by how far back it stood: what a model recalls of its context.

The measure is Zoology's (Arora and others, arXiv:2312.04927). A target is a hit where it and the token before it stood
next to each other earlier in the same sequence, and this pair is not frequent in the training text (there: over 1,250
times), where a model knows it by heart. All other targets are the rest. The distance of a hit is from the target to
the last earlier one; the authors do not look at it.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.table import Table

from fibattn.data.prepared import PreparedData
from fibattn.data.sequences import TrainingSequences
from fibattn.progress import Meter

FREQUENT = 1250
"""A pair that stands in the training text more often than this is frequent."""

_CHUNK = 1 << 22
_SHOWN = 3  # powers of two that a column of the table takes together


def frequent_pairs(data: PreparedData, targets: dict[str, int], *, quiet: bool = False) -> np.ndarray:
    """Pairs that come again in the first `targets` tokens of a held-out set and are frequent in training, sorted int64.

    A pair of tokens is the number first · vocabulary + second. The training text is read once.
    """
    repeated = [
        _repeated(_pairs(data.validation[name].sequence(0, n + 1), data.vocab_size)) for name, n in targets.items()
    ]
    pairs = np.unique(np.concatenate(repeated))
    counts, tokens = np.zeros(len(pairs), np.int64), len(data.train)
    starts = range(0, tokens - 1, _CHUNK)

    def counted(start: int) -> np.ndarray:
        found = np.sort(_pairs(data.train.sequence(start, min(_CHUNK + 1, tokens - start)), data.vocab_size))
        return np.searchsorted(found, pairs, side="right") - np.searchsorted(found, pairs)

    # Sorting holds no lock, so threads share the work.
    with Meter("pairs in training", len(starts), "chunks", quiet=quiet) as meter, ThreadPoolExecutor() as threads:
        for found in threads.map(counted, starts):
            counts += found
            meter.update(1)
    return pairs[counts > FREQUENT]


def repeats(losses: np.ndarray, sequences: TrainingSequences, frequent: np.ndarray, vocabulary: int) -> dict[str, Any]:
    """The loss on hits, by distance, and on the rest, as JSON values.

    `hits`, `rest`, and `frequent`, which are those of the rest that repeat an earlier pair, each have `targets` and
    their mean `nll` in nats (None of none). `by_distance` has a row for each power of two where there is a hit: `first`
    and `last` distance, `targets`, `nll`.

    Args:
        losses: (sequences, length), of every target.
        sequences: what they are of.
        frequent: sorted, from `frequent_pairs` over the same tokens.
        vocabulary: the tokenizer's.
    """
    rows = (sequences.stream.sequence(start, sequences.length + 1) for start in sequences.order.tolist())
    pairs = np.stack([_pairs(row, vocabulary) for row in rows])
    distances = last_distances(pairs)
    again, known = distances > 0, np.isin(pairs, frequent)
    hits = again & ~known
    powers = np.floor(np.log2(np.maximum(distances, 1))).astype(np.int64)
    parts = ((power, losses[hits & (powers == power)]) for power in range(sequences.length.bit_length()))
    return {
        "hits": _mean(losses[hits]),
        "rest": _mean(losses[~hits]),
        "frequent": _mean(losses[again & known]),
        "by_distance": [
            {"first": 1 << power, "last": (2 << power) - 1} | _mean(part) for power, part in parts if part.size
        ],
    }


def last_distances(pairs: np.ndarray) -> np.ndarray:
    """How far before each entry of a row the same last stood, 0 where nowhere; both int64 (rows, length)."""
    order = np.argsort(pairs, axis=1, kind="stable")
    ordered = np.take_along_axis(pairs, order, axis=1)
    steps = np.where(ordered[:, 1:] == ordered[:, :-1], np.diff(order, axis=1), 0)
    distances = np.zeros_like(pairs)
    np.put_along_axis(distances, order[:, 1:], steps, axis=1)
    return distances


def repeats_table(name: str, lengths: dict[str, Any]) -> Table:
    """The perplexity on hits, by distance, and on the rest, a row for each length; `lengths` as in the sweep."""
    firsts = sorted({_column(row["first"]) for one in lengths.values() for row in one["repeats"]["by_distance"]})
    table = Table(title=f"{name}: perplexity of repeated pairs (hits), by distance", title_justify="left")
    headings = (f"{first:,}–{(first << _SHOWN) - 1:,}" for first in firsts)
    for heading in ("length", "share", "hits", *headings, "rest"):
        table.add_column(heading, justify="right")
    for length, one in lengths.items():
        found = one["repeats"]
        columns = [[row for row in found["by_distance"] if _column(row["first"]) == first] for first in firsts]
        share = found["hits"]["targets"] / one["targets"]
        cells = map(_perplexity, ([found["hits"]], *columns, [found["rest"]]))
        table.add_row(f"{int(length):,}", f"{100 * share:.1f} %", *cells)
    return table


def _column(first: int) -> int:
    """The first distance of the table's column for distances from `first` on."""
    return 1 << (first.bit_length() - 1) // _SHOWN * _SHOWN


def _perplexity(groups: list[dict[str, Any]]) -> str:
    """Of several groups together; nothing where they are empty."""
    targets = sum(group["targets"] for group in groups)
    return f"{math.exp(sum(g['targets'] * g['nll'] for g in groups if g['targets']) / targets):.2f}" if targets else ""


def _mean(losses: np.ndarray) -> dict[str, Any]:
    return {"targets": losses.size, "nll": float(losses.mean(dtype=np.float64)) if losses.size else None}


def _repeated(pairs: np.ndarray) -> np.ndarray:
    found, counts = np.unique(pairs, return_counts=True)
    return found[counts > 1]


def _pairs(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Each of the tokens but the first with the one before it, as one number."""
    return tokens[:-1] * vocabulary + tokens[1:]
