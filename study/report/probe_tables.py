"""Tables of what `python -m study probe` measured: the paper's retrieval probe beside ours, the others as they are."""

from pathlib import Path
from typing import Any

import pandas as pd

from fibattn.model.loading import model_name
from study.report.results import Frame, Probes, paper
from study.report.tables import ABSENT, NONE, Table, table, text

_TITLES = {
    "recall": "Recall over distance",
    "ruler": "RULER, variable tracking",
    "lego": "LEGO over Z/2",
    "harness": "lm-eval",
    "latency": "Latency of a forward pass",
    "flops": "Operations of a forward pass",
    "healing": "Conversion and healing",
}
_NOT_SAID = ("probe", "model", "data_fingerprint")
_PAPERS = {"ruler": "ruler_vt", "lego": "lego"}


def retrieval_table(probes: Probes) -> Table:
    """The paper's retrieval probe, ours beside the published figures."""
    ours = {(row["depth"], row["start"]): row for row in probes.get("retrieval", [{}])[-1].get("rows", ())}
    rows = []
    for theirs in paper()["retrieval_probe"]:
        found = ours.get((theirs["depth"], theirs["init"]), {})
        measured = [text("{:.2f}", found.get(name)) for name in ("acc200", "acc350", "rungs200", "rungs350")]
        alphas = "{alpha_min:.2f} … {alpha_max:.2f}".format(**found) if found else NONE
        cells = (*measured, alphas) if found else (ABSENT, *measured[1:], alphas)
        low, high = theirs["alpha_range"]
        published = (f"{theirs['acc200']:.2f}", f"{theirs['acc350']:.2f}", f"{low:.2f} … {high:.2f}")
        rows.append((f"depth {theirs['depth']}, {theirs['init']}", *cells, *published))
    return table(
        "Table 5. The retrieval probe",
        "Accuracy of copying from the two marked distances, through the bands that the models were trained with and "
        "through the rungs themselves, and the range of α that was learnt; means of the seeds.",
        pd.DataFrame(rows),
        ["model", "bands: at 200", "at 350", "rungs: at 200", "at 350", "α", "paper: at 200", "at 350", "α"],
    )


def other_probes(probes: Probes) -> list[Table]:
    """A table for every other probe that was run."""
    several = [(name, probe) for name in _TITLES for probe in probes.get(name, ())]
    return [_recall(probe) if name == "recall" else _plain(name, probe) for name, probe in several]


def unbounded_recall(probes: Probes) -> dict[str, Any] | None:
    """The last run of the recall probe whose full layers looked back to the beginning."""
    return next((one for one in reversed(probes.get("recall", ())) if not one.get("bound")), None)


def recalled(probe: dict[str, Any]) -> Frame:
    """What the recall probe found: a row for every variant, task, seed and distance."""
    rows = [
        {**{name: row[name] for name in ("variant", "keys", "task", "seed")}, "distance": int(n), "accuracy": right}
        for row in probe["rows"]
        for n, right in row["accuracy"].items()
    ]
    return pd.DataFrame(rows)


def _recall(probe: dict[str, Any]) -> Table:
    found = recalled(probe)
    models = found.groupby(["variant", "keys", "task"], sort=False)
    median = found.groupby(["variant", "keys", "task", "distance"], sort=False)["accuracy"].median().unstack("distance")
    frame = median.reindex(models.groups).map("{:.2f}".format).rename(columns=lambda n: f"{n:,}")
    frame.insert(0, "seeds", models["seed"].nunique().astype(str))
    frame = frame.reset_index()
    frame["keys"] = frame["keys"].map("{:,.0f}".format)
    bound = probe.get("bound")
    return table(
        _TITLES["recall"] + (f", full layers bounded to {bound + 1:,} tokens" if bound else ""),
        f"How often the value is found, by distance in tokens: the median of so many seeds. Keys: of a query in a "
        f"sparse layer. {_about(probe)}",
        frame.rename(columns={"variant": "model"}),
        ["model", "keys", "task", *frame.columns[3:]],
    )


def _plain(name: str, probe: dict[str, Any]) -> Table:
    published = paper()["auxiliary"].get(_PAPERS.get(name, name))
    title = f"{_TITLES[name]}: {model_name(Path(probe['model']))}" if "model" in probe else _TITLES[name]
    note = _about(probe) + (f" The paper: {published}." if published is not None else "")
    frame = pd.DataFrame([flat(row) for row in probe["rows"]], dtype=object)
    return table(title, note, frame.map(cell), [str(column).replace("_", " ") for column in frame.columns])


def _about(probe: dict[str, Any]) -> str:
    """A sentence of a probe's settings and the devices that it ran on."""
    said = [(name, value) for name, value in probe.items() if isinstance(value, int | float | str)]
    about = [f"{name.replace('_', ' ')} {value}" for name, value in said if name not in _NOT_SAID]
    devices = dict.fromkeys(row["made"]["device"] for row in probe["rows"] if "made" in row)
    about += [f"on {device}" for device in devices if "device" not in probe]
    words = "; ".join(about)
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a column for each distance or task; single runs, and how it was made, are left to the JSON."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and name != "made":
            cells |= value
        elif not isinstance(value, dict | list):
            cells[name] = value
    return cells


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        if 0 < abs(value) < 1e-2:
            return f"{value:.2g}"
        return text("{:,.0f}" if abs(value) >= 1e4 else "{:.3f}", value)
    return NONE if value is None else str(value)
