"""Tables of what `python -m study probe` measured: the paper's retrieval probe beside ours, the others as they are."""

from pathlib import Path
from typing import Any

from fibattn.model.loading import model_name
from study.report.recalled import recalled
from study.report.results import Probes, paper
from study.report.tables import ABSENT, Table

_TITLES = {
    "recall": "Recall over distance",
    "ruler": "RULER, variable tracking",
    "lego": "LEGO over Z/2",
    "harness": "lm-eval",
    "latency": "Latency of a forward pass",
}
_PAPERS = {"ruler": "ruler_vt", "lego": "lego"}


def retrieval_table(probes: Probes) -> Table:
    """The paper's retrieval probe, ours beside the published figures."""
    ours = {(row["depth"], row["start"]): row for row in probes.get("retrieval", [{}])[-1].get("rows", ())}
    rows = []
    for row in paper()["retrieval_probe"]:
        found = ours.get((row["depth"], row["init"]))
        low, high = row["alpha_range"]
        cells = (ABSENT, "–", "–", "–", "–")
        if found:
            measured = ("acc200", "acc350", "rungs200", "rungs350")
            accuracies = (f"{found[name]:.2f}" if name in found else "–" for name in measured)
            cells = (*accuracies, f"{found['alpha_min']:.2f} … {found['alpha_max']:.2f}")
        theirs = (f"{row['acc200']:.2f}", f"{row['acc350']:.2f}", f"{low:.2f} … {high:.2f}")
        rows.append((f"depth {row['depth']}, {row['init']}", *cells, *theirs))
    return Table(
        "Table 5. The retrieval probe",
        "Accuracy of copying from the two marked distances, through the bands that the models were trained with and "
        "through the rungs themselves, and the range of α that was learnt; means of the seeds.",
        ("model", "bands: at 200", "at 350", "rungs: at 200", "at 350", "α", "paper: at 200", "at 350", "α"),
        tuple(rows),
    )


def other_probes(probes: Probes) -> list[Table]:
    """A table for every other probe that was run."""
    several = [(name, probe) for name in _TITLES for probe in probes.get(name, ())]
    return [_recall(probe) if name == "recall" else _plain(name, probe) for name, probe in several]


def _recall(probe: dict[str, Any]) -> Table:
    models = recalled(probe)
    return Table(
        _TITLES["recall"],
        f"How often the value is found, by distance in tokens: the median of so many seeds. Keys: of a query in a "
        f"sparse layer. {_about(probe)}",
        ("model", "keys", "task", "seeds", *(f"{distance:,}" for distance in models[0].median)),
        tuple(
            (
                one.variant,
                f"{one.keys:,.0f}",
                one.task,
                str(len(one.seeds)),
                *(f"{right:.2f}" for right in one.median.values()),
            )
            for one in models
        ),
    )


def _plain(name: str, probe: dict[str, Any]) -> Table:
    rows = [flat(row) for row in probe["rows"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    published = paper()["auxiliary"].get(_PAPERS.get(name, name))
    title = _TITLES[name]
    if "model" in probe:
        title += f": {model_name(Path(probe['model']))}"
    return Table(
        title,
        _about(probe) + (f" The paper: {published}." if published is not None else ""),
        tuple(column.replace("_", " ") for column in columns),
        tuple(tuple(cell(row.get(column)) for column in columns) for row in rows),
    )


def _about(probe: dict[str, Any]) -> str:
    """A sentence of a probe's settings and the devices that it ran on."""
    said = [(name, value) for name, value in probe.items() if isinstance(value, int | float | str)]
    about = [f"{name.replace('_', ' ')} {value}" for name, value in said if name not in ("probe", "model")]
    devices = dict.fromkeys(row["made"]["device"] for row in probe["rows"] if "made" in row)
    about += [f"on {device}" for device in devices if "device" not in probe]
    text = "; ".join(about)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a column for each distance or task; single runs, and how it was made, are left to the JSON."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "made":
            continue
        if isinstance(value, dict):
            flat |= value
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3f}"
    return "–" if value is None else str(value)
