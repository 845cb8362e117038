"""Five minutes of training: the preset of that name beside programs from outside, by bits per byte of the same text."""

import statistics
from collections.abc import Iterable
from typing import Any

from study.ladder import MINUTES
from study.report.tables import Table, table, where_run

OUTSIDE = "karpathy/autoresearch"
_STEPS = {step.name: step for step in MINUTES}


def five_minutes_table(records: Iterable[dict[str, Any]], outside: Iterable[dict[str, Any]]) -> list[Table]:
    """The table, or none where the preset was not run; `outside` is what `python -m study outside` wrote."""
    rows, records = [], list(records)
    for one in records:
        seconds = one["tokens"] / one["training"]["tokens_per_second"]
        for length in sorted(map(int, next(iter(one["evaluation"].values())))):
            bits = {name: lengths[str(length)]["bits_per_byte"] for name, lengths in one["evaluation"].items()}
            name = f"{_told(one['run'])}, in sequences of {length:,}"
            rows.append(_row(name, bits, one["tokens"], seconds, one["model"]["parameters"]))
    if not rows:
        return []
    for other in outside:
        name = f"{OUTSIDE}, in sequences of 2,048"
        rows.append(_row(name, other["bits_per_byte"], other["tokens"], other["training_seconds"], other["parameters"]))
    note = (
        f"{where_run(records)}; seconds of training, without compiling and "
        "evaluating. Bits per byte of the same bytes of each held-out set, every position of disjoint sequences. The "
        f"program from outside is {OUTSIDE}, branch exp/H100/mar8, its train.py as it is, with a vocabulary of 8,192 "
        "of its own. FlashAttention 3, which comes from a hub, is replaced by PyTorch's Flex attention for windows and "
        "cuDNN's for full layers; its authors had 460 to 500 M tokens in five minutes of an "
        "H100. Make these again with `python -m study run five-minutes --data DATA --only five-minutes`, steps of the "
        "ladder with `--only STEP --seconds 300`, those for a vocabulary of 8,192 with `--data DATA-8192 --like DATA`, "
        "and `python -m study outside CHECKOUT --data DATA-8192 --like DATA`."
    )
    return [table("Five minutes of one GPU", note, rows)]


def _told(name: str) -> str:
    """A run's name; of a step, too, what is new in it and in the large steps before it."""
    changes: list[str] = []
    step = _STEPS.get(name)
    while step is not None:
        changes.append(step.change)
        step = _STEPS.get(step.since or "")
    return f"{name} ({'; '.join(reversed(changes))})" if changes else name


def _row(name: str, bits: dict[str, float], tokens: int, seconds: float, parameters: int) -> dict[str, str]:
    return {
        "model": name,
        "bits a byte": f"{statistics.mean(bits.values()):.4f}",
        **{which: f"{value:.4f}" for which, value in bits.items()},
        "training tokens": f"{tokens / 1e6:.0f} M",
        "seconds": f"{seconds:.0f}",
        "tokens/s": f"{tokens / seconds / 1e3:,.0f} k",
        "parameters": f"{parameters / 1e6:.1f} M",
    }
