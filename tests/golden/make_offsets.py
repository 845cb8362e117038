"""Write `offsets.json`: the offsets of every static layer of the study, without importing the package.

Float64 is emulated with exact fractions (a result is the exact value rounded to 53 bits, half to even), so
that the ties of the specification fall where the specification says: the scale is
`0.5 + layer / (layers - 1)`, each operation rounded, and an offset is the rounded product, half to even.

Run `python tests/golden/make_offsets.py` to write the file again; it must not change.
"""

import json
from fractions import Fraction
from pathlib import Path

LAYERS = 16
WINDOWS = (6, 8, 10, 12)
LIMITS = (None, 1023)
RUNGS = {
    "fibonacci": (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987),
    "power_of_two": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
COPRIME_STRIDE = 7


def half_even(value: Fraction) -> int:
    """The nearest integer, the even one of two."""
    below = value.numerator // value.denominator
    rest = value - below
    return below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))


def float64(value: Fraction) -> Fraction:
    """The nearest number of 53 significant bits."""
    unit = Fraction(1)
    while value / unit >= 2**53:
        unit *= 2
    while value and value / unit < 2**52:
        unit /= 2
    return half_even(value / unit) * unit


def alpha(schedule: str, layer: int) -> Fraction:
    slot = {"fixed": None, "linear": layer, "coprime": COPRIME_STRIDE * layer % LAYERS}[schedule]
    if slot is None:
        return Fraction(1)
    return float64(Fraction(1, 2) + float64(Fraction(slot, LAYERS - 1)))


def offsets(base: str, schedule: str, window: int, limit: int | None) -> list[list[int]]:
    layers = []
    for layer in range(LAYERS):
        scale = alpha(schedule, layer)
        scaled = {half_even(float64(scale * rung)) for rung in RUNGS[base]}
        layers.append(sorted(d for d in scaled if d > window and (limit is None or d <= limit)))
    return layers


def table() -> dict[str, list[list[int]]]:
    """All cases by name, `base/schedule/window/max_offset`."""
    return {
        f"{base}/{schedule}/{window}/{limit}": offsets(base, schedule, window, limit)
        for base in RUNGS
        for schedule in ("fixed", "linear", "coprime")
        for window in WINDOWS
        for limit in LIMITS
    }


if __name__ == "__main__":
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(layers)}" for name, layers in table().items())
    Path(__file__).with_name("offsets.json").write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
