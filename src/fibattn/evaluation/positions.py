"""Perplexity by position in long documents, in the form of flash-linear-attention's `evals/ppl.py`.

That cuts a text into sequences of one length, and averages the loss over blocks of 2,048 positions. Here each sequence
is the beginning of a document that is at least so long, so that a later position always has more of the same text
before it; there, documents are joined and then cut.
"""

import itertools
import math
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel

from fibattn.data.prepared import PreparedData
from fibattn.data.sequences import document_beginnings
from fibattn.evaluation.loss import token_losses

BLOCK, BLOCKS = 2048, 8
"""Positions of a block; of a length with fewer than so many blocks, an eighth."""


def by_position(
    model: PreTrainedModel, data: PreparedData, *, length: int, sets: list[str], tokens: int = 1_048_576, **how: Any
) -> dict[str, Any]:
    """The loss in blocks of positions, for each held-out set with a document of at least `length` targets.

    Args:
        model: its vocabulary must be that of `data`.
        length: of how many tokens from a document's beginning the next one is asked.
        tokens: targets of each set at most; documents are taken in order.
        how: batch_tokens, quiet and sharing, as in `token_losses`.

    Returns:
        For each set `documents`, their number, and `blocks`, a list: `first` and `last` position, the block's mean
        `nll` in nats, its `perplexity`, and `cumulative_perplexity`, that of all positions up to its last.

    Raises:
        InputError: when the model changes its logits after the output embedding.
    """
    results: dict[str, Any] = {}
    for name in sets:
        sequences = document_beginnings(data.validation[name], length, tokens)
        if len(sequences):
            losses = token_losses(model, sequences, label=f"{name} by position", **how)
            results[name] = {"documents": len(sequences), "blocks": _blocks(losses.mean(axis=0, dtype=np.float64))}
    return results


def _blocks(means: np.ndarray) -> list[dict[str, Any]]:
    """Of the mean loss at every position."""
    block = max(min(BLOCK, len(means) // BLOCKS), 1)
    return [
        {
            "first": first,
            "last": end - 1,
            "nll": (nll := float(means[first:end].mean())),
            "perplexity": math.exp(nll),
            "cumulative_perplexity": math.exp(float(means[:end].mean())),
        }
        for first, end in itertools.pairwise([*range(0, len(means), block), len(means)])
    ]


def positions_table(results: dict[str, Any]) -> Table:
    """A row for each block, with its perplexity on every set, and one for all of a document's positions."""
    sets = list(results.values())
    table = Table(title="perplexity by position in a document", title_justify="left")
    for heading in ("positions", *(f"{name} ({one['documents']:,})" for name, one in results.items())):
        table.add_column(heading, justify="right")
    for rows in zip(*(one["blocks"] for one in sets), strict=True):
        positions = f"{rows[0]['first']:,}–{rows[0]['last']:,}"
        table.add_row(positions, *(f"{row['perplexity']:.2f}" for row in rows))
    table.add_section()
    table.add_row("all", *(f"{one['blocks'][-1]['cumulative_perplexity']:.2f}" for one in sets))
    return table
