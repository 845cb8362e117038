"""The long stage: finished models that were trained on in longer sequences, before and after.

A model that several stages went on from stands once.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from study.report.tables import NONE, Table, speed, table, where_run
from study.rivals import DEFAULTS, name_of
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
    rows, bases = [], set()
    for record in records:
        base = json.dumps([record["recipe"], record["inputs"]], sort_keys=True)
        rows += [*([] if base in bases else _before(record, lengths)), *_after(record, lengths)]
        bases.add(base)
    note = (
        f"The default recipe, and other attention in it, {where_run(records)}; perplexity, the geometric mean of the "
        f"four sets, over {over_sets(records[0], 'targets'):,} tokens of each, by the length of the sequences, and on "
        f"{_BY_POSITION} in the parts of the longest, from the first eighth to the last. A stage "
        "warms up anew, to the rates of the training before it or a part of them; dense attention's rotary base is "
        "raised for it. Bounded: "
        "full layers see so many last tokens. Make it again with `python -m study run long --data DATA "
        "--tokens 106M --only RUN`."
    )
    return [table("Long text: a stage in longer sequences", note, rows, words=2)]


def _before(record: dict[str, Any], lengths: list[int]) -> Iterator[dict[str, str]]:
    known = {"": record["evaluation"]} | record["bounded"]
    trained, model = f"in {record['trained_at']:,}", {**record, "run": _base(record)}
    yield from _rows(model, trained, known, record["tokens"], record["training"], lengths)


def _after(record: dict[str, Any], lengths: list[int]) -> Iterator[dict[str, str]]:
    recipe, stage = record["recipe"], record["lengthened_recipe"]
    tokens = stage["steps"] * stage["sequences_per_step"] * stage["sequence_length"]
    rate = stage["optimizer"]["learning_rate"] / recipe["optimizer"]["learning_rate"]
    for length, sets in record["lengthened"].items():
        trained = f"then in {int(length):,}" + (f" at {rate:g} of the rates" if rate != 1 else "")
        known = {"": sets} | (record["lengthened_bounded"] if record["bounded"] else {})  # no full layer, no bound
        yield from _rows(record, trained, known, tokens, record["lengthened_training"], lengths)


def _base(record: dict[str, Any]) -> str:
    """The name of the model before its stage, with which the stage's begins."""
    name = max((one for one in DEFAULTS.models if record["run"].startswith(one)), key=len)
    return name_of(name, 1, record["seed"])


def _rows(
    record: dict[str, Any],
    trained: str,
    known: dict[str, Sets],
    tokens: int,
    training: dict[str, Any],
    lengths: list[int],
) -> Iterator[dict[str, str]]:
    """A row for each bound in `known`, "" for none."""
    for bound, sets in known.items():
        yield {
            "model": record["run"],
            "trained": trained + (f", bounded to {int(bound):,}" if bound else ""),
            "tokens": f"{tokens / 1e6:.0f} M",
            **{f"{length:,}": _perplexity(record, _longer(known[""], sets), length) for length in lengths},
            **_by_position(sets, max(lengths)),
            "tokens/s": speed([{**record, "training": training}]),
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
