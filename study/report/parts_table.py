"""The table of parts: each in the model of the step muon8 or of another, against that model as it is."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from study.parts.table import PARTS
from study.report.claims import percent
from study.report.tables import NONE, Table, speed, table, where_run
from study.store import digest, over_sets, trials


def parts_table(folder: Path, runs: Iterable[dict[str, Any]]) -> list[Table]:
    """The table of a folder's results, or none; changes are against the same recipe among the finished `runs`."""
    order = {one.name: number for number, one in enumerate(PARTS)}
    records = [one for one in trials(folder, "parts") if one["candidate"] in order]
    known = {one["key"]: one for one in runs}
    rows = [
        _row(one, known.get(one.get("base") or digest(one["recipe"], one["inputs"]["data_fingerprint"])))
        for one in sorted(records, key=lambda one: (one["tokens"], order[one["candidate"]], one["seed"]))
    ]
    if not rows:
        return []
    note = (
        "The recipe of the step muon8 or of another of the ladder with a part more, in trial form (gates and value "
        "embeddings are the library's own since), sequences of "
        f"{records[0]['trained_at']:,}, {where_run(records)}; geometric means over the held-out sets. 16×: full layers "
        "bounded. Copied: random tokens named from 256 back. Make a row with `python -m study parts --data DATA "
        "--tokens 106M --only PART`, with `--recipe STEP` in that of another step."
    )
    return [table("Parts that the default recipe does not have", note, rows, words=2)]


def _row(record: dict[str, Any], default: dict[str, Any] | None) -> dict[str, str]:
    nll, trained_at = over_sets(record, "nll"), record["trained_at"]
    return {
        "part": record["candidate"] + ("" if record["seed"] == 42 else f", seed {record['seed']}"),
        "what it is": record["about"],
        "recipe": record.get("step") or "muon8",
        "tokens": f"{record['tokens'] / 1e6:.0f} M",
        "perplexity": f"{math.exp(nll):.2f}",
        "bits a byte": _bits(record),
        "against the recipe": NONE if default is None else percent(nll - over_sets(default, "nll")),
        "16×": f"{math.exp(over_sets(record, 'nll', record['bounded'], 16 * trained_at)):.2f}",
        "copied": f"{record['copying'].get(str(trained_at // 4), math.nan):.2f}",
        "tokens/s": speed([record]),
        "parameters": f"{record['model']['parameters'] / 1e6:.1f} M",
    }


def _bits(record: dict[str, Any]) -> str:
    """At the training length and at twice that, where it was looked at."""
    lengths = [int(length) for length in next(iter(record["evaluation"].values()))]
    return ", ".join(f"{over_sets(record, 'bits_per_byte', length=length):.4f}" for length in lengths)
