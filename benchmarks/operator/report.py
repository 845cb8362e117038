"""The result for people: a table with ratios, and times over length as a figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.operator.attention import PASSES
from benchmarks.operator.cases import OURS, SHAPES
from benchmarks.operator.providers import PROVIDERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

_WORDS = {
    "fibattn": "fibattn",
    "fibattn-learned": "fibattn, learned alpha",
    "dense-flash": "dense, FlashAttention",
    "dense-cudnn": "dense, cuDNN",
    "dense-math": "dense, not fused",
    "flex": "FlexAttention",
    "mask": "PyTorch with a mask",
}
"""Every provider's name in the figure."""


def table(result: dict[str, Any]) -> Table:
    """One row for every provider and case; "×" is how many times longer than this project's operator it takes."""
    made = Table(box=None, pad_edge=False)
    made.add_column("case, tokens × batch", no_wrap=True)
    made.add_column("provider", no_wrap=True)
    for heading in ("fwd µs", "×", "of floor", "GB/s", "fwd+bwd µs", "×", "GB/s", "peak MB", "of tensors", "error"):
        made.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row, base in _with_base(result["rows"]):
        case = _case(row)
        forward, both = (row.get(one) for one in PASSES)
        peak = row.get("peak_bytes")
        made.add_row(
            case if case != before else "",
            row["provider"],
            *_cells(forward, base.get("forward")),
            f"{forward['median'] / row['floor_us']:.1f}" if forward else "",
            f"{forward['useful_gb_per_second']:,.0f}" if forward else "",
            *_cells(both, base.get("forward_backward")),
            f"{both['useful_gb_per_second']:,.0f}" if both else "",
            f"{peak / 1e6:,.0f}" if peak else "",
            f"{peak / row['tensor_bytes']:.2f}" if peak and row["device"] == "cuda" else "",
            ("" if row["right"] else "WRONG ") + f"{max(row['errors'].values()):.0e}" if row.get("errors") else "",
        )
        before = case
    return made


def reasons(result: dict[str, Any]) -> list[str]:
    """Why measurements are missing, each said once."""
    found: dict[str, list[str]] = {}
    for row in result["rows"]:
        for one, reason in row["not_run"].items():
            passes = "" if one == "forward" or row["not_run"].get("forward") == reason else f" {one.replace('_', '+')}"
            places = found.setdefault(f"{row['provider']}{passes}: {reason}", [])
            if _case(row) not in places:
                places.append(_case(row))
    return [f"{reason} ({'; '.join(places)})" for reason, places in found.items()]


def draw(result: dict[str, Any], path: Path) -> Path:
    """Milliseconds for a million tokens over length, a panel for each shape and pass, one below the other.

    SVG and PNG at `path`; the CSV beside them holds every row of the result.
    """
    from matplotlib import pyplot as plt

    from fibattn.plotting import STYLE, save

    rows = [row for row in result["rows"] if any(one in row for one in PASSES)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows)) or ["small"]
    panels = [(shape, one) for shape in shapes for one in PASSES]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(panels), figsize=(5.4, 2.3 * len(panels) + 1.3), layout="constrained")
        for axes, (shape, one) in zip(grid, panels, strict=True):
            _curves(axes, [row for row in rows if row["shape"] == shape and one in row], one)
            axes.set_title(f"{_in_words(shape)}: {one.replace('_', ' + ')}", loc="left", fontsize=11)
            axes.set_ylabel("ms for a million tokens")
        grid[-1].set_xlabel("length (tokens, k = 1,024)")
        named = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
        case = ("shape", "window", "length", "batch", "dtype", "provider")
        numbers = [
            (*(row[name] for name in case), one, *(row[one][name] for name in ("median", "least", "most")))
            for row in rows
            for one in PASSES
            if one in row
        ]
        return save(figure, path, (*case, "pass", "median_us", "least_us", "most_us"), numbers)


def _curves(axes: "Axes", rows: list[Row], one: str) -> None:
    """A line for each provider and window; of cases of the same length the one with the most tokens."""
    from matplotlib.ticker import NullFormatter

    from fibattn.plotting import COLOURS, QUIET, plain

    ours, dense = (COLOURS["stagger"], COLOURS["learned"]), (COLOURS["dense"], "#fb923c", "#7c2d12")
    colours = dict(zip(PROVIDERS, (*ours, *dense, "#7c3aed", QUIET), strict=True))
    for provider, window in dict.fromkeys((row["provider"], row["window"]) for row in rows):
        some = [row for row in rows if (row["provider"], row["window"]) == (provider, window)]
        times = {row["length"]: _per_million(row, one) for row in sorted(some, key=lambda r: (r["length"], r["batch"]))}
        style = ("o-" if provider in OURS else "s--") if window == rows[0]["window"] else "^:"
        label = _WORDS[provider] + ("" if PROVIDERS[provider].dense else f", W = {window}")
        axes.plot(list(times), list(times.values()), style, color=colours[provider], label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 2**20:g}M" if value >= 2**20 else f"{value / 2**10:g}k")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _in_words(shape: str) -> str:
    heads, kv_heads, size = SHAPES[shape]
    return f"{heads}/{kv_heads} heads of {size}"


def _per_million(row: Row, one: str) -> float:
    """Milliseconds."""
    return row[one]["median"] / (row["length"] * row["batch"]) * 1e3


def _with_base(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Every row with that of this project's operator on the same case."""
    ours = {_case(row): row for row in rows if row["provider"] == "fibattn"}
    return ((row, ours.get(_case(row), {})) for row in rows)


def _cells(times: Row | None, base: Row | None) -> tuple[str, str]:
    if times is None:
        return "", ""
    return f"{times['median']:,.0f}", f"{times['median'] / base['median']:.2f}" if base else ""


def _case(row: Row) -> str:
    return f"{row['shape']} W={row['window']} {row['length']:,} × {row['batch']:,}"
