"""Five minutes of training: steps of the ladder beside programs from outside, by bits per byte of the same text."""

import statistics
from collections.abc import Iterable
from typing import Any

from study.report.tables import Table, table, where_run

OUTSIDE = "karpathy/autoresearch"
_ORDERS = {"epochs": "in passes", "random": "drawn"}


def five_minutes_table(records: Iterable[dict[str, Any]], outside: Iterable[dict[str, Any]]) -> list[Table]:
    """The table, or none where no step was run; `outside` is what `python -m study outside` wrote."""
    rows, records = [], list(records)
    for one in records:
        seconds = one["tokens"] / one["training"]["tokens_per_second"]
        for length in sorted(map(int, next(iter(one["evaluation"].values())))):
            bits = {name: lengths[str(length)]["bits_per_byte"] for name, lengths in one["evaluation"].items()}
            order, size = one["recipe"]["order"], one["model"]["parameters"]
            rows.append(_row(one["run"], order, length, bits, one["tokens"], seconds, size))
    if not rows:
        return []
    for other in outside:
        size, seconds = other["parameters"], other["training_seconds"]
        order = other.get("order", "random")
        rows.append(_row(OUTSIDE, order, 2048, other["bits_per_byte"], other["tokens"], seconds, size))
    note = (
        f"{where_run(records)}; steps of the ladder, of which `few-eight-values-64` is the preset `five-minutes`; "
        "seconds of training, without compiling and evaluating. Bits per byte of the same bytes of each held-out set, "
        "every position of disjoint sequences, full layers unbounded; text is read in whole passes or drawn with "
        "replacement. The "
        f"program from outside is {OUTSIDE}, branch exp/H100/mar8, its train.py as it is, with a vocabulary of 8,192 "
        "of its own. FlashAttention 3, which comes from a hub, is replaced by PyTorch's Flex attention for windows and "
        "cuDNN's for full layers; its authors had 460 to 500 M tokens in five minutes of an "
        "H100. Make a step of the ladder again with `python -m study run five-minutes --data DATA --only STEP "
        "--tokens TOKENS`, or `--seconds 300`, those for a vocabulary of 8,192 with `--data DATA-8192 --like DATA`, "
        "and `python -m study outside CHECKOUT --data DATA-8192 --like DATA`."
    )
    return [table("Five minutes of one GPU", note, rows)]


def _row(
    name: str, order: str, length: int, bits: dict[str, float], tokens: int, seconds: float, parameters: int
) -> dict[str, str]:
    return {
        "model": name,
        "text": _ORDERS[order],
        "in sequences of": f"{length:,}",
        "bits a byte": f"{statistics.mean(bits.values()):.4f}",
        **{which: f"{value:.4f}" for which, value in bits.items()},
        "training tokens": f"{tokens / 1e6:.0f} M",
        "seconds": f"{seconds:.0f}",
        "tokens/s": f"{tokens / seconds / 1e3:,.0f} k",
        "parameters": f"{parameters / 1e6:.1f} M",
    }
