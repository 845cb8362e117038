"""The table of far reading: every candidate that was run, against a plain window of about as many keys."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from study.far.candidates import CANDIDATES
from study.report.claims import percent
from study.report.tables import NONE, Table, speed, table, where_run
from study.store import over_sets, trials

_CONTROLS = ("window", "window-128")
FAR_BACK = 128
"""Repeated pairs are far where they stood at least so many tokens back."""


def far_records(folder: Path) -> list[dict[str, Any]]:
    """The results of `python -m study far` in a results folder, in the order of the candidates, then of seeds."""
    order = {one.name: number for number, one in enumerate(CANDIDATES)}
    return sorted(
        trials(folder, "far"), key=lambda one: (order.get(one["candidate"], len(order)), one["candidate"], one["seed"])
    )


def far_table(records: Iterable[dict[str, Any]], rivals: Iterable[dict[str, Any]] = ()) -> list[Table]:
    """The table, or none of no records; a change is left out where its control was not run with the same seed.

    `rivals` are finished runs of that study, whose dense models are the same as here.
    """
    found = {(one["candidate"], one["seed"], one["tokens"]): one for one in records}
    dense = {
        (one["seed"], one["tokens"]): one for one in rivals if one["run"].removesuffix(f"-seed{one['seed']}") == "dense"
    }
    rows = [_row(record, found, dense.get((record["seed"], record["tokens"]))) for record in found.values()]
    if not rows:
        return []
    one = next(iter(found.values()))
    sets = len(one["evaluation"])
    note = (
        f"The recipe of the step muon8 with other sparse layers, sequences of {one['trained_at']:,}, "
        f"{where_run(found.values())}; geometric means over {sets} held-out sets. "
        "Keys: what a sparse layer reads for a token far into the text, with its values, and a summary that is only "
        f"scored as half a key; kB: over all layers, the last {one['trained_at']:,} tokens in full ones. Against: a "
        "plain window of about as many keys, beside as many full layers, same seed and text; the least and most of the "
        "sets in brackets. 16×: full layers bounded. Far repeats: perplexity on pairs of tokens that stood at least "
        f"{FAR_BACK} tokens back. Copied: random tokens named from 256 back. Speeds are of trial forms where "
        "no model's configuration says what is read. Make a row with `python -m study far --data DATA --tokens 106M "
        "--only CANDIDATE`."
    )
    return [table("Far reading: what was tried in place of single far keys", note, rows, words=2)]


def _row(
    record: dict[str, Any], found: dict[tuple[str, int, int], dict[str, Any]], rival: dict[str, Any] | None
) -> dict[str, str]:
    control = _control(record, found)
    dense = found.get(("dense", record["seed"], record["tokens"]), rival)
    if dense is not None and dense["inputs"] != record["inputs"]:
        dense = None
    nll, trained_at = over_sets(record, "nll"), record["trained_at"]
    return {
        "candidate": record["candidate"] + ("" if record["seed"] == 42 else f", seed {record['seed']}"),
        "what it is": record["about"],
        "tokens": f"{record['tokens'] / 1e6:.0f} M",
        "full layers": str(record["model"]["full_layers"]),
        "keys": "all" if record["candidate"].startswith("dense") else f"{record['model']['keys']:.0f}",
        "kB": f"{record['model']['bytes'] / 1000:.0f}",
        "perplexity": f"{math.exp(nll):.2f}",
        "against": NONE if control is None or control is record else _change(record, control),
        "against dense": NONE if dense is None or dense is record else percent(nll - over_sets(dense, "nll")),
        "16×": f"{math.exp(over_sets(record, 'nll', record['bounded'], 16 * trained_at)):.2f}",
        "far repeats": _far_repeats(record),
        "copied": f"{record['copying'].get(str(trained_at // 4), math.nan):.2f}",
        "tokens/s": speed([record]),
    }


def _control(record: dict[str, Any], found: dict[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any] | None:
    """The plain window beside as many full layers whose number of keys is nearest."""
    if record["candidate"].startswith("dense"):
        return None
    known = (
        found.get((f"{name}{end}", record["seed"], record["tokens"])) for name in _CONTROLS for end in ("", "-beside")
    )
    alike = [one for one in known if one and one["model"]["full_layers"] == record["model"]["full_layers"]]
    return min(alike, key=lambda one: abs(one["model"]["keys"] - record["model"]["keys"]), default=None)


def _change(record: dict[str, Any], control: dict[str, Any]) -> str:
    mine, other = _losses(record), _losses(control)
    each = [mine[name] - other[name] for name in mine]
    return f"{percent(statistics.mean(each))} ({percent(min(each))}, {percent(max(each))})"


def _far_repeats(record: dict[str, Any]) -> str:
    """Over all sets together."""
    sets = (next(iter(lengths.values()))["repeats"]["by_distance"] for lengths in record["evaluation"].values())
    rows = [row for found in sets for row in found if row["first"] >= FAR_BACK]
    targets = sum(row["targets"] for row in rows)
    return f"{math.exp(sum(row['targets'] * row['nll'] for row in rows) / targets):.2f}" if targets else NONE


def _losses(record: dict[str, Any]) -> dict[str, float]:
    return {name: lengths[str(record["trained_at"])]["nll"] for name, lengths in record["evaluation"].items()}
