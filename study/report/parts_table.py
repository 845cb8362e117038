"""The table of parts: each in the default recipe's model, against that model as it is."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from study.parts.table import PARTS
from study.report.claims import percent
from study.report.tables import NONE, Table, speed, table, where_run
from study.rivals import RIVALS
from study.store import over_sets


def parts_table(folder: Path, rivals: Iterable[dict[str, Any]]) -> list[Table]:
    """The table of a folder's results, or none; a change is left out where the default recipe lacks the seed or budget.

    `rivals` are finished runs of that study, among which it is.
    """
    order = {one.name: number for number, one in enumerate(PARTS)}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("parts/*.json")]
    records = [one for one in records if one["candidate"] in order]
    default = {(one["seed"], one["tokens"]): one for one in rivals if one["run"].split("-seed")[0] == RIVALS.ours}
    rows = [
        _row(one, default.get((one["seed"], one["tokens"])))
        for one in sorted(records, key=lambda one: (order[one["candidate"]], one["seed"], one["tokens"]))
    ]
    if not rows:
        return []
    note = (
        f"The default recipe with a part more, in trial form, sequences of {records[0]['trained_at']:,}, "
        f"{where_run(records)}; geometric means over the held-out sets. 16×: full layers bounded. Copied: random "
        "tokens named from 256 back. Make a row with `python -m study parts --data DATA --tokens 106M --only PART`."
    )
    return [table("Parts that the default recipe lacks", note, rows, words=2)]


def _row(record: dict[str, Any], default: dict[str, Any] | None) -> dict[str, str]:
    nll, trained_at = over_sets(record, "nll"), record["trained_at"]
    return {
        "part": record["candidate"] + ("" if record["seed"] == 42 else f", seed {record['seed']}"),
        "what it is": record["about"],
        "tokens": f"{record['tokens'] / 1e6:.0f} M",
        "perplexity": f"{math.exp(nll):.2f}",
        "against the default": NONE if default is None else percent(nll - over_sets(default, "nll")),
        "16×": f"{math.exp(over_sets(record, 'nll', record['bounded'], 16 * trained_at)):.2f}",
        "copied": f"{record['copying'].get(str(trained_at // 4), math.nan):.2f}",
        "tokens/s": speed([record]),
        "parameters": f"{record['model']['parameters'] / 1e6:.1f} M",
    }
