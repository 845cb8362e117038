"""The ladder's table: what every step gave, against the step that it changes."""

import math
from collections.abc import Iterable
from typing import Any

from study.ladder import LADDER
from study.report.claims import percent
from study.report.tables import NONE, Table, table, where_run
from study.store import over_sets


def ladder_table(records: Iterable[dict[str, Any]]) -> list[Table]:
    """The table, or none where no step was run; `records` are finished runs of the study `ladder`."""
    found = {record["run"]: record for record in records}
    rows = []
    for step in LADDER:
        if step.name not in found:
            continue
        record = found[step.name]
        nll = over_sets(record, "nll")
        before = found.get(step.since or "")
        rows.append(
            {
                "step": step.name,
                "what is new": step.change,
                "changes": step.since or NONE,
                "perplexity": f"{math.exp(nll):.2f}",
                "bits a byte": f"{over_sets(record, 'bits_per_byte'):.4f}",
                "perplexity, change": NONE if before is None else percent(nll - over_sets(before, "nll")),
                "tokens/s": f"{record['training']['tokens_per_second'] / 1000:.0f} k",
                "parameters": f"{record['model']['parameters'] / 1e6:.1f} M",
                "": "kept" if step.kept else "not kept",
            }
        )
    if not rows:
        return []
    one = next(iter(found.values()))
    note = (
        f"{one['tokens'] / 1e6:.0f} M tokens, sequences of {one['trained_at']:,}, seed {one['seed']}, "
        f"{where_run(found.values())}; the geometric mean of the four sets' "
        f"perplexities over {over_sets(one, 'targets'):,} tokens of each, and the mean of their bits a byte. One seed: "
        "between two seeds of one recipe perplexity differed by 1 to 2 % at 3e-3 with AdamW, most of it from the order "
        "of the text, which is the same in all steps. Make a step again with `python -m study run ladder --data DATA "
        "--tokens 106M --only STEP`."
    )
    return [table("The ladder: from the paper's recipe to the project's", note, rows, words=3)]
