"""`python -m study probe NAME`: measures beside perplexity, each as a table and a JSON file that the report reads."""

import importlib
import re
from dataclasses import make_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError, suggestion
from study.probes import settings

FOLDER = Path("study/results/probes")
_TRAINING = ("retrieval", "recall", "healing")
"""Probes that train models, and write every row as it comes: cut short, the same command goes on with what is left."""
_ASKING = ("ruler", "lego", "harness")
"""Probes of a trained model."""
PROBES: dict[str, type] = {
    kind.__name__.lower(): kind
    for kind in (
        settings.Retrieval,
        settings.Recall,
        settings.Ruler,
        settings.Lego,
        settings.Harness,
        settings.Latency,
        settings.Flops,
        settings.Healing,
    )
}


def run(arguments: list[str]) -> None:
    """Run the probe named by the first argument, print its table, write its JSON."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m study probe NAME [flags]      python -m study probe NAME --help\n")
        print("\n".join(f"  {name:<11}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in PROBES.items()))
        return
    name = arguments[0]
    if name not in PROBES:
        raise InputError(f"there is no probe {name!r}: {suggestion(name, PROBES, 'probes')}")
    chosen: Any = parse(
        _arguments(name), arguments[1:], f"python -m study probe {name}", description=PROBES[name].__doc__
    )
    out = chosen.out or _default(name, chosen)
    if chosen.out is None and name not in _TRAINING and out.exists():
        raise InputError(f"{out} is there already; give --out {out} to replace it, or another file")
    files.check_writable(out)
    result = _measure(name, chosen, out)
    _print(result)
    if name not in _TRAINING:
        _write(out, result)
    print(f"written to {out}")


def _arguments(name: str) -> type:
    """The probe's settings, the model where it asks one, and where the result goes."""
    what = {"ruler": "model", "lego": "model", "harness": "model", "latency": "device", "flops": "study"}.get(name)
    default = f"{FOLDER}/{name}{f'-{what.upper()}' if what else ''}.json"
    fields: list[Any] = []
    if name in _ASKING:
        fields.append(
            ("model", Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="A model, or a finished run.")])
        )
    fields.append(("settings", Annotated[PROBES[name], tyro.conf.arg(name="")]))
    where = f"Where the JSON goes; {default} when left out."
    fields.append(("out", Annotated[Path | None, tyro.conf.arg(help=where)], None))
    return make_dataclass("Arguments", fields, frozen=True)


def _default(name: str, chosen: Any) -> Path:
    """A file for each model, device or study, so that the report has them all and none overwrites another."""
    if name in _TRAINING:
        return FOLDER / f"{name}.json"
    if name == "flops":
        return FOLDER / f"{name}-{chosen.settings.study}.json"
    if name == "latency":
        from fibattn.machine import device_name

        return FOLDER / f"{name}-{re.sub(r'[^a-z0-9]+', '-', device_name().lower()).strip('-')}.json"
    from fibattn.model.loading import find_model, model_name

    return FOLDER / f"{name}-{model_name(find_model(chosen.model).resolve())}.json"


def _write(path: Path, result: dict[str, Any]) -> None:
    """The result, and in every new row on what and when it was made."""
    from study.measure import machine, versions

    made = {**machine(), **versions(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    for row in result["rows"]:
        row.setdefault("made", made)
    files.write_json(path, result)


def _measure(name: str, chosen: Any, out: Path) -> dict[str, Any]:
    """Call the function of the probe's name in the module of its name, with a trained model where it takes one."""
    probe = getattr(importlib.import_module(f"study.probes.{name}"), name)
    if name in _TRAINING:
        earlier = files.read_json(out) if out.exists() else None
        return probe(chosen.settings, earlier=earlier, keep=partial(_write, out))
    if name not in _ASKING:
        return probe(chosen.settings)
    from fibattn.data.tokenizer import load_tokenizer, tokenizer_folder
    from fibattn.model.loading import find_model, load_model

    folder = find_model(chosen.model)
    result = probe(load_model(folder), load_tokenizer(tokenizer_folder(folder)), chosen.settings)
    return {"probe": name, "model": str(folder), **result}


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from study.report.probe_tables import cell, flat

    rows = [flat(row) for row in result["rows"]]
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in columns))
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    console.print(table)
