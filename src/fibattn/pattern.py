"""Which distances a layer attends to, and what a stack of layers reaches. Plain Python integers, no torch.

A query at position `i` attends to the positions `i - d` for every distance `d` of its layer's pattern: the
dense local window `0 … window` and a few far offsets, `round(alpha * rung)` for the rungs of a base
sequence (arXiv 2606.28560, section 3). Offsets are resolved here, once, in float64 with Python's rounding
(half to even), and stay integers; nothing else in the package rounds.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, TypedDict, get_args

from fibattn.errors import InputError, whole_number

Base = Literal["fibonacci", "power_of_two"]
Schedule = Literal["fixed", "linear", "coprime", "learned"]
LayerType = Literal["fibonacci_attention", "sliding_attention", "chosen_attention", "full_attention"]
"""Window and rungs, the window alone, window and the blocks that a query chooses, or everything."""


class Layers(TypedDict):
    """What every layer does, as the configuration and recipes have it."""

    layer_types: tuple[LayerType, ...]
    no_rope_layers: tuple[Literal[0, 1], ...]


def hybrid_layers(layers: int, full: Collection[int], sparse: LayerType = "fibonacci_attention") -> Layers:
    """`layers` of type `sparse` with rotary positions, but for those numbered in `full`: full attention without.

    Raises:
        InputError: for a number that is no layer's.
    """
    outside = [layer for layer in full if not 0 <= layer < layers]
    if outside:
        raise InputError(f"the full layers {outside} do not exist; the layers are 0 … {layers - 1}")
    return Layers(
        layer_types=tuple("full_attention" if layer in full else sparse for layer in range(layers)),
        no_rope_layers=tuple(0 if layer in full else 1 for layer in range(layers)),
    )


_MOST_RUNGS = 90
"""The Fibonacci numbers up to here still fit into 63 bits when they are scaled by 1.5."""


def base_rungs(base: Base, *, count: int = 15, reach: int = 1023) -> tuple[int, ...]:
    """The rungs of a base sequence before scaling.

    `fibonacci` gives the first `count` of 1, 2, 3, 5, 8, …; `power_of_two` gives 1, 2, 4, … up to the
    largest that is at most `reach` (the paper's reach-matched log-sparse control).

    Raises:
        InputError: for an unknown base, a `count` that is negative or more than 90, or a `reach` below 1.
    """
    if base == "fibonacci":
        count = whole_number("the number of rungs", count)
        if not 0 <= count <= _MOST_RUNGS:
            raise InputError(f"the number of rungs is {count}; it must be from 0 to {_MOST_RUNGS}: no text is longer")
        rungs = [1, 2]
        while len(rungs) < count:
            rungs.append(rungs[-1] + rungs[-2])
        return tuple(rungs[:count])
    if base == "power_of_two":
        reach = whole_number("the reach of a power-of-two base", reach)
        if reach < 1:
            raise InputError(f"the reach of a power-of-two base is {reach}; it must be at least 1")
        return tuple(1 << exponent for exponent in range(reach.bit_length()))
    raise InputError(f"unknown base {base!r}; the bases are {', '.join(get_args(Base))}")


def layer_alphas(schedule: Schedule, *, layers: int) -> tuple[float, ...]:
    """The scale of every layer's rungs, first layer first (paper, section 3.3).

    `fixed` and `learned` are 1 everywhere (a learned scale starts there); `linear` is
    `0.5 + layer / (layers - 1)`; `coprime` visits the same values with the largest stride up to
    `layers / 2` that is coprime to `layers`. A single layer has the middle of the ramp, 1.

    Raises:
        InputError: for an unknown schedule or fewer than one layer.
    """
    if whole_number("the number of layers", layers) < 1:
        raise InputError(f"the number of layers is {layers}; it must be at least 1")
    if schedule in ("fixed", "learned"):
        return (1.0,) * layers
    ramp = tuple(0.5 + layer / (layers - 1) for layer in range(layers)) if layers > 1 else (1.0,)
    if schedule == "linear":
        return ramp
    if schedule == "coprime":
        stride = next((s for s in range(layers // 2, 0, -1) if math.gcd(s, layers) == 1), 1)
        return tuple(ramp[stride * layer % layers] for layer in range(layers))
    raise InputError(f"unknown schedule {schedule!r}; the schedules are {', '.join(get_args(Schedule))}")


@dataclass(frozen=True)
class Pattern:
    """The distances one layer (or one KV head of it) attends to: `0 … window` and the `offsets` beyond.

    `window = W` keeps `W + 1` keys, the query's own position among them: FlashAttention's window size
    `(W, 0)`, Transformers' `sliding_window = W + 1`. A pattern does not depend on the length of any
    input; an offset as long as the sequence or longer simply has no key there.

    Raises:
        InputError: for a negative window, for offsets that are not strictly increasing and beyond it, and for anything
            but whole numbers below 2**63.
    """

    window: int
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", whole_number("window", self.window))
        object.__setattr__(self, "offsets", _whole_numbers("offset", self.offsets))
        if self.window < 0:
            raise InputError(f"window is {self.window}; it must be 0 or more (0 attends to the query's own position)")
        nearest = self.window
        for offset in self.offsets:
            if offset <= nearest:
                found = f"offset {offset} follows {nearest}" if nearest > self.window else f"offset {offset} is inside"
                raise InputError(f"{found} (window {self.window}); offsets must be beyond it and strictly increasing")
            nearest = offset

    @classmethod
    def fibonacci(
        cls, window: int = 12, alpha: float = 1.0, rungs: int = 15, max_offset: int | None = None
    ) -> "Pattern":
        """A window and `rungs` Fibonacci rungs scaled by `alpha`, none farther than `max_offset`."""
        return cls.scaled(window, base_rungs("fibonacci", count=rungs), alpha, max_offset)

    @classmethod
    def power_of_two(
        cls, window: int = 8, alpha: float = 1.0, reach: int = 1023, max_offset: int | None = None
    ) -> "Pattern":
        """A window and the powers of two up to `reach` scaled by `alpha`, none farther than `max_offset`."""
        return cls.scaled(window, base_rungs("power_of_two", reach=reach), alpha, max_offset)

    @classmethod
    def scaled(cls, window: int, rungs: Sequence[int], alpha: float = 1.0, max_offset: int | None = None) -> "Pattern":
        """Any rungs scaled by `alpha`: `round(alpha * rung)`, kept where beyond the window and within `max_offset`."""
        _check_alpha(alpha, rungs)
        window = whole_number("window", window)
        _check_max_offset(max_offset)
        distances = {round(alpha * rung) for rung in rungs}
        limit = math.inf if max_offset is None else max_offset
        return cls(window, tuple(sorted(d for d in distances if window < d <= limit)))

    @property
    def reach(self) -> int:
        """The farthest distance."""
        return self.offsets[-1] if self.offsets else self.window

    @property
    def distances(self) -> tuple[int, ...]:
        """Every distance, nearest first: the window's and the offsets."""
        return (*range(self.window + 1), *self.offsets)


def layer_patterns(
    base: Base,
    schedule: Schedule,
    *,
    layers: int,
    window: int,
    rungs: int = 15,
    reach: int = 1023,
    max_offset: int | None = None,
) -> tuple[Pattern, ...]:
    """The pattern of every layer of a stack; a learned schedule gives the one it starts from (alpha = 1)."""
    sequence = base_rungs(base, count=rungs, reach=reach)
    return tuple(Pattern.scaled(window, sequence, alpha, max_offset) for alpha in layer_alphas(schedule, layers=layers))


@dataclass(frozen=True)
class InterpolatedRung:
    """One rung at a real-valued distance `near + fraction`, between the keys at `near` and `near + 1`."""

    index: int
    near: int
    fraction: float


@dataclass(frozen=True)
class LearnedPattern:
    """The distances of a layer that learns how far its rungs are: `0 … window` and `alpha * rung`.

    `alpha` is a parameter of the model and is given to `fibattn.attend` beside the pattern. A rung between two keys
    reads their linear interpolation, so that alpha has a gradient (paper, section 3.4).

    Args:
        window: distances 0 … window are always attended, as in `Pattern`.
        rungs: the base rungs, positive and strictly increasing; those inside the window count where alpha moves them
            beyond it.
        max_offset: rungs whose nearer key is farther than this are dropped; None keeps all.
        largest_alpha: what alpha never exceeds. Only `reach`, and so the size of a cache, depends on it.

    Raises:
        InputError: for values outside the above.
    """

    window: int
    rungs: tuple[int, ...]
    max_offset: int | None = None
    largest_alpha: float = 1.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Pattern(self.window).window)
        object.__setattr__(self, "rungs", _whole_numbers("rung", self.rungs))
        _check_max_offset(self.max_offset)
        if any(rung <= before for before, rung in zip((0, *self.rungs), self.rungs, strict=False)):
            raise InputError(f"rungs are {list(self.rungs)}; they must be positive and strictly increasing")
        _check_alpha(self.largest_alpha, self.rungs)

    def at(self, alpha: float) -> tuple[InterpolatedRung, ...]:
        """The rungs that this alpha keeps, in order.

        A rung is kept when its rounded distance is beyond the window and the nearer of its two keys is within
        `max_offset`; of several rungs between the same two keys the first is kept.

        Raises:
            InputError: when `alpha` is not a finite number above 0.
        """
        _check_alpha(alpha, self.rungs)
        kept: dict[int, InterpolatedRung] = {}
        for index, rung in enumerate(self.rungs):
            distance = alpha * rung
            near = math.floor(distance)
            within = self.max_offset is None or near <= self.max_offset
            if round(distance) > self.window and within and near not in kept:
                kept[near] = InterpolatedRung(index, near, distance - near)
        return tuple(kept.values())

    @property
    def reach(self) -> int:
        """The farthest distance that is read for any alpha up to `largest_alpha`, both keys of a rung counted."""
        nearer = math.floor(self.largest_alpha * (self.rungs[-1] if self.rungs else 0))
        return max(self.window, 1 + (nearer if self.max_offset is None else min(nearer, self.max_offset)))


@dataclass(frozen=True)
class ChosenPattern:
    """A window, and beyond it the keys of those blocks that suit a query best by their mean key.

    A row's keys are cut into blocks of `block`, from its first. A query may choose a block that ends before it, begins
    within `reach` and in the query's document, and is not all inside the window.

    Args:
        window: distances 0 … window are always attended, as in `Pattern`.
        blocks: how many a query chooses; the query heads of a KV head choose together.
        block: keys of a block: 16, 32, 64 or 128.
        reach: how far back the first key of a block may be, below 64 blocks.
        anchored: whoever can choose the first block of its document does. Models that were trained dense leave much
            attention there.

    Raises:
        InputError: for values outside the above.
    """

    window: int = 31
    blocks: int = 4
    block: int = 16
    reach: int = 1023
    anchored: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Pattern(self.window).window)
        if self.block not in (16, 32, 64, 128):
            raise InputError(f"block is {self.block!r}; blocks have 16, 32, 64 or 128 keys")
        if not 1 <= whole_number("blocks", self.blocks) <= 64:
            raise InputError(f"blocks is {self.blocks}; a query chooses 1 to 64 of them")
        if not self.window <= whole_number("reach", self.reach) < 64 * self.block:
            limits = f"at least the window, {self.window}, and below 64 blocks, {64 * self.block}"
            raise InputError(f"the blocks' reach is {self.reach}; it must be {limits}")


def reach_of(pattern: Pattern | Sequence[Pattern] | LearnedPattern | ChosenPattern, alpha: float = 0.0) -> int:
    """The farthest distance of a layer, whose KV heads may have patterns of their own, or learn an `alpha`."""
    if isinstance(pattern, LearnedPattern) and alpha > pattern.largest_alpha:
        pattern = replace(pattern, largest_alpha=alpha)
    return max(one.reach for one in pattern) if isinstance(pattern, Sequence) else pattern.reach


def _whole_numbers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence):
        raise InputError(f"{name}s are {values!r}; give a sequence of whole numbers")
    return tuple(whole_number(name, one) for one in values)


def _check_max_offset(max_offset: int | None) -> None:
    if max_offset is not None and whole_number("max_offset", max_offset) < 0:
        raise InputError(f"max_offset is {max_offset}; it must be 0 or more, or None for no limit")


def _check_alpha(alpha: float, rungs: Sequence[int]) -> None:
    rungs = [whole_number("rung", rung) for rung in rungs]
    if not (isinstance(alpha, Real) and alpha > 0 and math.isfinite(alpha * max(rungs, default=1))):
        raise InputError(f"alpha is {alpha}; it must be a finite number above 0, and so must alpha times a rung")


def union_coverage(patterns: Sequence[Pattern], context: int) -> int:
    """How many distinct distances inside `context` at least one of the patterns attends to, the window's included."""
    return len({d for pattern in patterns for d in pattern.distances if d < context})


def compose(layers: Sequence[Sequence[Pattern] | None], limit: int | None = None) -> tuple[int | None, ...]:
    """What a stack of layers reaches: the fewest layers that carry a value over each distance, None where no path does.

    A path moves by one distance of each layer it uses and stays put (the residual stream) in the others.
    Since every integer is a sum of Fibonacci numbers (Zeckendorf), a few layers of Fibonacci rungs reach
    every distance up to some thousands.

    Args:
        layers: for each layer the patterns of its KV heads (one pattern when they share it), or None for
            a layer with full attention.
        limit: the farthest distance to look at; the sum of the layers' reaches when None.

    Raises:
        InputError: when `limit` is negative, or None although a layer has full attention.
    """
    if limit is None:
        if any(layer is None for layer in layers):
            raise InputError("a layer with full attention reaches every distance; say how far to look with `limit`")
        limit = sum(max(pattern.reach for pattern in layer) for layer in layers if layer is not None)
    if limit < 0:
        raise InputError(f"limit is {limit}; it must be 0 or more")
    # Bit d of reached[n] says that at most n layers reach distance d; shifting a set by x adds a step of x.
    everything = (1 << (limit + 1)) - 1
    reached = [1] + [0] * len(layers)
    for depth, layer in enumerate(layers):
        for used in range(depth, -1, -1):
            reached[used + 1] |= _step(reached[used], layer, everything)
    needed: list[int | None] = [None] * (limit + 1)
    found = 0
    for used, distances in enumerate(reached):
        fresh = distances & ~found
        found |= fresh
        while fresh:
            lowest = fresh & -fresh
            needed[lowest.bit_length() - 1] = used
            fresh ^= lowest
    return tuple(needed)


def _step(start: int, layer: Sequence[Pattern] | None, everything: int) -> int:
    """The set `start` of distances moved by every distance of one layer."""
    if layer is None:
        return everything & -(start & -start) if start else 0
    result = 0
    for pattern in layer:
        result |= _widen(start, pattern.window)
        for offset in pattern.offsets:
            result |= start << offset
    return result & everything


def _widen(start: int, window: int) -> int:
    """`start` moved by each of 0 … window, by doubling."""
    width, result = 0, start
    while width < window:
        move = min(width + 1, window - width)
        result |= result << move
        width += move
    return result
