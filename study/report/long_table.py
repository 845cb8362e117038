"""The long stage: finished models that were trained on in longer sequences, before and after."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from study.report.tables import NONE, Table, table, where_run
from study.store import over_sets

Sets = dict[str, dict[str, Any]]
"""Rows by held-out set and length."""
_BY_POSITION = "books"
"""The set of long documents."""


def long_tables(records: Iterable[dict[str, Any]]) -> list[Table]:
    """A table for all budgets, or none of no records; `records` are finished runs of the study `long`."""
    records = [one for one in records if one.get("lengthened")]
    if not records:
        return []
    lengths = sorted(map(int, next(iter(records[0]["evaluation"].values()))))
    rows = [row for record in records for row in _rows(record, lengths)]
    note = (
        f"The default recipe, and other attention in it, {where_run(records)}; perplexity, the geometric mean of the "
        f"four sets, over {over_sets(records[0], 'targets'):,} tokens of each, by the length of the sequences, and on "
        f"{_BY_POSITION} in the parts of the longest, from the first eighth to the last. The stage "
        "has a fifth of the tokens of the training before it; dense attention's rotary base is raised for it. Bounded: "
        "full layers see so many last tokens. Make it again with `python -m study run long --data DATA "
        "--tokens 106M`."
    )
    return [table("Long text: a stage in longer sequences", note, rows, words=2)]


def _rows(record: dict[str, Any], lengths: list[int]) -> Iterator[dict[str, str]]:
    known = {f"in {record['trained_at']:,}": (record["evaluation"], record["bounded"], record["training"])}
    for length, sets in record["lengthened"].items():
        stage = f"then in {int(length):,}"
        known[stage] = (sets, record["lengthened_bounded"], record["lengthened_training"])
    for trained, (plain, bounded, training) in known.items():
        speed = f"{training['tokens_per_second'] / 1e3:.0f} k"
        for tokens, sets in ({"": plain} | bounded).items():
            yield {
                "model": record["run"],
                "trained": trained + (f", bounded to {int(tokens):,}" if tokens else ""),
                "tokens": f"{record['tokens'] / 1e6:.0f} M",
                **{f"{length:,}": _perplexity(record, _longer(plain, sets), length) for length in lengths},
                **_by_position(sets, max(lengths)),
                "tokens/s": speed,
            }


def _longer(plain: Sets, sets: Sets) -> Sets:
    """All lengths: those that a bound does not change, and the others with it."""
    return {name: rows | sets[name] for name, rows in plain.items()}


def _perplexity(record: dict[str, Any], sets: Sets, length: int) -> str:
    return f"{math.exp(over_sets(record, 'nll', sets, length)):.2f}"


def _by_position(sets: Sets, length: int) -> dict[str, str]:
    bins = sets.get(_BY_POSITION, {}).get(str(length), {}).get("bins", [])
    parts = range(1, 9)
    return {f"{part}/8": f"{math.exp(bins[part - 1]):.2f}" if len(bins) == len(parts) else NONE for part in parts}
