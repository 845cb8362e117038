"""The ladder's tables: what every step gave, against the step that it changes, one table for each budget."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from study.ladder import LADDER, Step
from study.report.claims import percent, real_minus
from study.report.tables import NONE, Table, speed, table, where_run
from study.store import over_sets

Records = dict[str, dict[str, Any]]
"""By step."""


def ladder_table(records: Iterable[dict[str, Any]]) -> list[Table]:
    """The tables, that with the most steps first; `records` are finished runs of the study `ladder`."""
    by_budget: dict[int, Records] = defaultdict(dict)
    for record in records:
        by_budget[round(record["tokens"] / 1e6)][record["run"]] = record
    return [_of_budget(found) for found in sorted(by_budget.values(), key=len, reverse=True)]


def _of_budget(found: Records) -> Table:
    rows = []
    for step in LADDER:
        if step.name in found:
            since, new = _since_one_that_ran(step, found)
            row = {"step": step.name, "what is new": new, "changes": since or NONE}
            kept = {"": "kept" if step.kept else "not kept"}
            rows.append(row | _measured(found[step.name], found.get(since or "")) | kept)
    one = next((one for one in found.values() if not one.get("like")), next(iter(found.values())))
    budget = f"{one['tokens'] / 1e6:.0f}"
    note = (
        f"{budget} M tokens, seed {one['seed']}, {where_run(found.values())}; in sequences of "
        f"{_length(one):,} the geometric mean of the four sets' perplexities over {over_sets(one, 'targets'):,} tokens "
        "of each, and the mean of their bits a byte, which another vocabulary leaves comparable. One seed: "
        "between two seeds of one recipe perplexity differed by 1 to 2 % at 3e-3 with AdamW, most of it from the order "
        "of the text, which is the same in all steps of one length and batch. Make a step again with `python -m study "
        f"run ladder --data DATA --tokens {budget}M --only STEP`, in a vocabulary "
        "of 8,192 with `--data DATA-8192 --like DATA`."
    )
    return table(f"The ladder: from the paper's recipe to the project's, {budget} M tokens", note, rows, words=3)


def _since_one_that_ran(step: Step, found: Records) -> tuple[str | None, str]:
    """The step that `step` changes, and how; where that has not run, the one before it, and both changes."""
    since, changes = step.since, [step.change]
    while since is not None and since not in found:
        between = next(one for one in LADDER if one.name == since)
        since, changes = between.since, [between.change, *changes]
    return since, "; ".join(changes)


def _measured(record: dict[str, Any], before: dict[str, Any] | None) -> dict[str, str]:
    nll, bits = (over_sets(record, what, length=_length(record)) for what in ("nll", "bits_per_byte"))
    change = worse = NONE
    if before is not None:
        if before["inputs"]["data_fingerprint"] == record["inputs"]["data_fingerprint"]:
            change = percent(nll - over_sets(before, "nll", length=_length(before)))
        old = over_sets(before, "bits_per_byte", length=_length(before))
        worse = real_minus(f"{100 * (bits / old - 1):+.2f} %")
    return {
        "perplexity": f"{math.exp(nll):.2f}",
        "bits a byte": f"{bits:.4f}",
        "perplexity, change": change,
        "bits a byte, change": worse,
        "tokens/s": speed([record]),
        "parameters": f"{record['model']['parameters'] / 1e6:.1f} M",
    }


def _length(record: dict[str, Any]) -> int:
    """The shortest in which a run was evaluated, which all have."""
    return min(map(int, next(iter(record["evaluation"].values()))))
