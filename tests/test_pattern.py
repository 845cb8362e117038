"""Patterns against numbers worked out elsewhere: golden offsets, path enumeration, Zeckendorf's theorem."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fibattn.errors import InputError
from fibattn.pattern import (
    LearnedPattern,
    Pattern,
    base_rungs,
    compose,
    layer_alphas,
    layer_patterns,
    union_coverage,
)

FIBONACCI = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "offsets.json").read_text())


# Bases and schedules


def test_fibonacci_base_has_the_papers_fifteen_rungs() -> None:
    assert base_rungs("fibonacci") == FIBONACCI


@pytest.mark.parametrize("count", range(6))
def test_fibonacci_base_can_be_any_number_of_rungs(count: int) -> None:
    assert base_rungs("fibonacci", count=count) == FIBONACCI[:count]


@pytest.mark.parametrize(("reach", "last"), [(1, 1), (2, 2), (3, 2), (4, 4), (1023, 512), (1024, 1024), (4095, 2048)])
def test_power_of_two_base_ends_at_the_largest_power_within_reach(reach: int, last: int) -> None:
    rungs = base_rungs("power_of_two", reach=reach)
    assert rungs[0] == 1
    assert rungs[-1] == last
    assert all(after == 2 * before for before, after in itertools.pairwise(rungs))


def test_linear_schedule_runs_from_half_to_one_and_a_half() -> None:
    assert layer_alphas("linear", layers=5) == (0.5, 0.75, 1.0, 1.25, 1.5)
    alphas = layer_alphas("linear", layers=16)
    assert (alphas[0], alphas[-1]) == (0.5, 1.5)
    assert alphas[5] == 0.5 + 5 / 15


@pytest.mark.parametrize(("layers", "stride"), [(16, 7), (4, 1), (6, 1), (2, 1), (3, 1), (5, 2), (8, 3), (12, 5)])
def test_coprime_schedule_visits_the_ramp_with_the_papers_stride(layers: int, stride: int) -> None:
    ramp = [0.5 + layer / (layers - 1) for layer in range(layers)]
    alphas = layer_alphas("coprime", layers=layers)
    assert list(alphas) == [ramp[stride * layer % layers] for layer in range(layers)]
    assert sorted(alphas) == ramp


@pytest.mark.parametrize("schedule", ["fixed", "learned"])
def test_fixed_and_learned_schedules_start_at_one(schedule: str) -> None:
    assert layer_alphas(schedule, layers=7) == (1.0,) * 7


@pytest.mark.parametrize("schedule", ["fixed", "linear", "coprime", "learned"])
def test_a_single_layer_has_the_middle_of_the_ramp(schedule: str) -> None:
    assert layer_alphas(schedule, layers=1) == (1.0,)


# Offsets


@pytest.mark.parametrize("case", GOLDEN)
def test_offsets_of_every_layer_are_the_golden_ones(case: str) -> None:
    base, schedule, window, limit = case.split("/")
    patterns = layer_patterns(
        base, schedule, layers=16, window=int(window), max_offset=None if limit == "None" else int(limit)
    )
    assert [list(pattern.offsets) for pattern in patterns] == GOLDEN[case]
    assert {pattern.window for pattern in patterns} == {int(window)}


def test_golden_file_is_what_its_generator_writes(tmp_path: Path) -> None:
    script = tmp_path / "make_offsets.py"
    script.write_text((Path(__file__).parent / "golden" / "make_offsets.py").read_text(encoding="utf-8"))
    subprocess.run([sys.executable, str(script)], check=True)
    assert json.loads((tmp_path / "offsets.json").read_text()) == GOLDEN


def test_golden_file_covers_the_whole_study() -> None:
    assert len(GOLDEN) == 4 * 2 * 3 * 2
    assert all(len(layers) == 16 for layers in GOLDEN.values())


@pytest.mark.parametrize(
    ("alpha", "rung", "distance"), [(0.5, 13, 6), (0.5, 21, 10), (0.5, 55, 28), (0.5, 233, 116), (1.5, 987, 1480)]
)
def test_ties_round_to_even(alpha: float, rung: int, distance: int) -> None:
    assert Pattern.scaled(0, [rung], alpha).offsets == (distance,)


def test_rungs_that_round_to_the_same_distance_collapse() -> None:
    # 0.5 * 3 = 1.5 and 0.5 * 5 = 2.5 both round to 2.
    assert Pattern.scaled(0, [1, 2, 3, 5], 0.5).offsets == (1, 2)


def test_a_rung_at_the_window_is_dropped_and_the_next_kept() -> None:
    assert Pattern.fibonacci(window=8).offsets == FIBONACCI[5:]
    assert Pattern.fibonacci(window=7).offsets == FIBONACCI[4:]


def test_max_offset_is_inclusive() -> None:
    assert Pattern.fibonacci(window=8, max_offset=610).reach == 610
    assert Pattern.fibonacci(window=8, max_offset=609).reach == 377
    assert Pattern.fibonacci(window=8, max_offset=0) == Pattern(8)


def test_pattern_properties() -> None:
    pattern = Pattern(2, (5, 9))
    assert pattern.distances == (0, 1, 2, 5, 9)
    assert pattern.reach == 9
    assert Pattern(3).reach == 3
    assert Pattern(0).distances == (0,)
    assert Pattern.power_of_two(window=8, reach=100).offsets == (16, 32, 64)
    assert Pattern(2, (5, 9)) == pattern
    assert hash(Pattern(2, (5, 9))) == hash(pattern)


@given(
    window=st.integers(0, 20),
    alpha=st.floats(0.01, 4),
    limit=st.one_of(st.none(), st.integers(0, 2000)),
    count=st.integers(0, 18),
)
def test_offsets_are_increasing_beyond_the_window_and_within_the_limit(
    window: int, alpha: float, limit: int | None, count: int
) -> None:
    offsets = Pattern.fibonacci(window, alpha, count, limit).offsets
    assert list(offsets) == sorted(set(offsets))
    assert all(window < offset <= (math.inf if limit is None else limit) for offset in offsets)
    assert all(
        any(abs(alpha * rung - offset) <= 0.5 for rung in base_rungs("fibonacci", count=count)) for offset in offsets
    )


def test_importing_patterns_does_not_import_torch() -> None:
    code = "import sys; from fibattn import Pattern; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


# What a stack reaches


@pytest.mark.parametrize(("schedule", "covered"), [("fixed", 19), ("linear", 133), ("coprime", 133)])
def test_union_coverage_of_the_papers_stack(schedule: str, covered: int) -> None:
    # The paper says about 19 and about 75. With the window's nine distances the first is exact; the second is
    # what eight layers give (74), sixteen give 133.
    patterns = layer_patterns("fibonacci", schedule, layers=16, window=8)
    golden = {distance for layer in GOLDEN[f"fibonacci/{schedule}/8/1023"] for distance in layer}
    assert union_coverage(patterns, context=1024) == covered == len(golden) + 9
    if schedule == "linear":
        assert union_coverage(layer_patterns("fibonacci", schedule, layers=8, window=8), context=1024) == 74


def test_union_coverage_counts_only_distances_inside_the_context() -> None:
    assert union_coverage([Pattern(4, (8, 20))], context=20) == 6
    assert union_coverage([Pattern(4, (8, 20))], context=3) == 3
    assert union_coverage([], context=3) == 0


def fewest_layers_by_enumeration(layers: list[list[Pattern] | None], limit: int) -> list[int | None]:
    """Every path, literally: each layer is left out or moves by one of its distances."""
    steps = []
    for layer in layers:
        moves = range(limit + 1) if layer is None else {d for pattern in layer for d in pattern.distances}
        steps.append([None, *moves])
    fewest: list[int | None] = [None] * (limit + 1)
    for path in itertools.product(*steps):
        used = [step for step in path if step is not None]
        if sum(used) <= limit:
            known = fewest[sum(used)]
            fewest[sum(used)] = len(used) if known is None else min(known, len(used))
    return fewest


patterns = st.builds(
    lambda window, gaps: Pattern(window, tuple(itertools.accumulate(gaps, initial=window))[1:]),
    st.integers(0, 3),
    st.lists(st.integers(1, 9), max_size=3),
)
stacks = st.lists(st.one_of(st.none(), st.lists(patterns, min_size=1, max_size=2)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(stack=stacks, limit=st.integers(0, 12))
def test_composition_equals_enumerating_every_path(stack: list[list[Pattern] | None], limit: int) -> None:
    expected = fewest_layers_by_enumeration(stack, limit)
    found = compose(stack, limit)
    assert list(found) == expected


@settings(deadline=None, max_examples=40)
@given(stack=st.lists(st.lists(patterns, min_size=1, max_size=2), max_size=3))
def test_composition_without_a_limit_ends_at_the_farthest_distance(stack: list[list[Pattern]]) -> None:
    farthest = sum(max(pattern.distances[-1] for pattern in layer) for layer in stack)
    needed = compose(stack)
    assert len(needed) == farthest + 1
    assert needed[-1] is not None
    assert list(needed) == fewest_layers_by_enumeration(stack, farthest)


def zeckendorf_terms(number: int) -> int:
    terms = 0
    for rung in reversed(FIBONACCI):
        if rung <= number:
            number -= rung
            terms += 1
    assert number == 0
    return terms


def test_fewest_layers_of_fibonacci_rungs_are_zeckendorfs_terms() -> None:
    layer = Pattern.fibonacci(window=0)
    assert layer.offsets == FIBONACCI
    # Every integer below the next Fibonacci number, 1597, is a sum of at most eight of the rungs.
    found = compose([[layer]] * 8, limit=1596)
    assert list(found) == [zeckendorf_terms(distance) for distance in range(1597)]


def test_too_few_layers_leave_the_first_gap_where_zeckendorf_needs_more() -> None:
    layers = 3
    expected = next(d for d in range(1597) if zeckendorf_terms(d) > layers)
    assert compose([[Pattern.fibonacci(window=0)]] * layers, limit=1596).index(None) == expected == 33


def test_several_kv_heads_add_their_distances() -> None:
    apart = compose([[Pattern(0, (3,)), Pattern(0, (5,))]], limit=8)
    assert apart == (0, None, None, 1, None, 1, None, None, None)


def test_full_attention_reaches_everything_from_where_it_stands() -> None:
    found = compose([[Pattern(0, (7,))], None], limit=20)
    assert found == (0, *[1] * 20)
    assert compose([None], limit=0) == (0,)


def test_composition_of_nothing_is_distance_zero() -> None:
    assert compose([]) == (0,)
    assert compose([], limit=3) == (0, None, None, None)


def test_composition_is_exact_for_thousands_of_distances_in_seconds() -> None:
    stack = layer_patterns("fibonacci", "linear", layers=16, window=12)
    limit = 12_000
    begun = time.perf_counter()
    found = compose([[pattern] for pattern in stack], limit)
    assert time.perf_counter() - begun < 5
    fewest = np.full(limit + 1, 99)
    fewest[0] = 0
    for pattern in stack:
        after = fewest.copy()
        for distance in pattern.distances:
            after[distance:] = np.minimum(after[distance:], fewest[: limit + 1 - distance] + 1)
        fewest = after
    assert [99 if needed is None else needed for needed in found] == fewest.tolist()


# The learned schedule


def kept_literally(rungs: list[int], alpha: float, window: int, max_offset: int | None) -> list[tuple[int, int, float]]:
    """Word for word: keep a rung when round(d) > W and lo is inside the context; drop a second one of the same lo."""
    kept, seen = [], []
    for index in range(len(rungs)):
        d = alpha * rungs[index]
        lo = math.floor(d)
        f = d - lo
        if not round(d) > window:
            continue
        if max_offset is not None and lo > max_offset:
            continue
        if lo in seen:
            continue
        seen.append(lo)
        kept.append((index, lo, f))
    return kept


@given(
    rungs=st.lists(st.integers(1, 400), unique=True, max_size=12).map(sorted),
    alpha=st.one_of(st.floats(0.05, 2), st.sampled_from([0.25, 0.5, 1.0, 1.5])),
    window=st.integers(0, 40),
    limit=st.one_of(st.none(), st.integers(0, 500)),
)
@settings(max_examples=300)
def test_learned_rungs_are_kept_by_the_papers_rule(
    rungs: list[int], alpha: float, window: int, limit: int | None
) -> None:
    found = LearnedPattern(window, tuple(rungs), limit).at(alpha)
    assert [(rung.index, rung.near, rung.fraction) for rung in found] == kept_literally(rungs, alpha, window, limit)
    assert all(0 <= rung.fraction < 1 for rung in found)


def test_rungs_may_be_any_sequence() -> None:
    assert LearnedPattern(3, range(5, 10, 4)) == LearnedPattern(3, [5, 9]) == LearnedPattern(3, (5, 9))  # pyright: ignore


def test_learned_rungs_at_the_start_are_the_fixed_ones_between_keys_zero_and_one() -> None:
    found = LearnedPattern(8, FIBONACCI).at(1.0)
    assert tuple(rung.near for rung in found) == Pattern.fibonacci(window=8).offsets
    assert {rung.fraction for rung in found} == {0.0}


def test_learned_rung_just_beyond_the_window_starts_inside_it() -> None:
    # round(8.6) = 9 is beyond a window of 8, though its nearer key is inside.
    (rung,) = LearnedPattern(8, (43,)).at(0.2)
    assert (rung.near, round(rung.fraction, 9)) == (8, 0.6)
    assert LearnedPattern(8, (42,)).at(0.2) == ()


def test_learned_rungs_between_the_same_keys_keep_the_first() -> None:
    found = LearnedPattern(0, (10, 11, 12)).at(0.5)
    assert [(rung.index, rung.near) for rung in found] == [(0, 5), (2, 6)]


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pattern(-1), r"window is -1; it must be 0 or more"),
        (lambda: Pattern(8, (8,)), r"offset 8 is inside \(window 8\); offsets must be beyond it"),
        (lambda: Pattern(8, (0,)), r"offset 0 is inside \(window 8\)"),
        (lambda: Pattern(8, (-5,)), r"offset -5 is inside \(window 8\)"),
        (lambda: Pattern(8, (13, 13)), r"offset 13 follows 13 .*strictly increasing"),
        (lambda: Pattern(8, (21, 13)), r"offset 13 follows 21 .*strictly increasing"),
        (lambda: Pattern.fibonacci(alpha=math.nan), r"alpha is nan; it must be a finite number above 0"),
        (lambda: Pattern.fibonacci(alpha=math.inf), r"alpha is inf; it must be a finite number above 0"),
        (lambda: Pattern.fibonacci(alpha=-1.0), r"alpha is -1.0; it must be a finite number above 0"),
        (lambda: Pattern.power_of_two(alpha=0.0), r"alpha is 0.0; it must be a finite number above 0"),
        (lambda: Pattern.fibonacci(rungs=-2), r"the number of rungs is -2; it must be from 0 to 90"),
        (lambda: Pattern.power_of_two(reach=0), r"the reach of a power-of-two base is 0; it must be at least 1"),
        (lambda: Pattern.fibonacci(max_offset=-1), r"max_offset is -1; it must be 0 or more, or None"),
        (lambda: base_rungs("lucas"), r"unknown base 'lucas'; the bases are fibonacci, power_of_two"),
        (
            lambda: layer_alphas("zigzag", layers=4),
            r"unknown schedule 'zigzag'; the schedules are fixed, linear, coprime, learned",
        ),
        (lambda: layer_alphas("linear", layers=0), r"the number of layers is 0; it must be at least 1"),
        (lambda: layer_patterns("fibonacci", "linear", layers=2, window=-1), r"window is -1"),
        (lambda: LearnedPattern(0, (5,)).at(math.nan), r"alpha is nan; it must be a finite number above 0"),
        (lambda: LearnedPattern(0, (5,)).at(-0.5), r"alpha is -0.5; it must be a finite number above 0"),
        (lambda: LearnedPattern(0, (5,)).at(math.inf), r"alpha is inf; it must be a finite number above 0"),
        (lambda: compose([[Pattern(1)]], limit=-1), r"limit is -1; it must be 0 or more"),
        (lambda: compose([[Pattern(1)], None]), r"full attention reaches every distance; say how far .*`limit`"),
        (lambda: Pattern(2.5), "window is 2.5; it must be a whole number"),
        (lambda: Pattern("2"), "window is '2'; it must be a whole number"),
        (lambda: Pattern(3, (5, 1 << 63)), r"offset is \d+; it must be a whole number below 2\*\*63"),
        (lambda: Pattern(3, offsets=5), "offsets are 5; give a sequence of whole numbers"),
        (lambda: Pattern.fibonacci(window="3"), "window is '3'; it must be a whole number"),
        (lambda: Pattern.fibonacci(rungs=2.5), "the number of rungs is 2.5; it must be a whole number"),
        (lambda: Pattern.fibonacci(alpha="1"), "alpha is 1; it must be a finite number above 0"),
        (lambda: Pattern.fibonacci(max_offset="x"), "max_offset is 'x'; it must be a whole number"),
        (lambda: Pattern.power_of_two(reach=2.5), "the reach of a power-of-two base is 2.5; it must be a whole number"),
        (lambda: Pattern.scaled(3, [3.5]), "rung is 3.5; it must be a whole number"),
        (lambda: LearnedPattern(-2, (5, 9)), "window is -2; it must be 0 or more"),
        (lambda: LearnedPattern(2, (5, 9), max_offset=-1), "max_offset is -1; it must be 0 or more, or None"),
        (lambda: LearnedPattern(2, (9, 5)), r"rungs are \[9, 5\]; they must be positive and strictly increasing"),
        (lambda: LearnedPattern(2, (5, 5)), r"rungs are \[5, 5\]; they must be positive and strictly increasing"),
        (lambda: LearnedPattern(2, (0, 5)), r"rungs are \[0, 5\]; they must be positive"),
        (lambda: LearnedPattern(2, (-3, 5)), r"rungs are \[-3, 5\]; they must be positive"),
        (lambda: LearnedPattern(2, 5), "rungs are 5; give a sequence of whole numbers"),
        (lambda: LearnedPattern(2, (5,), largest_alpha=math.inf), "alpha is inf; it must be a finite number above 0"),
        (lambda: base_rungs("fibonacci", count=91), "the number of rungs is 91; it must be from 0 to 90"),
    ],
)
def test_bad_input_names_the_value_and_what_is_allowed(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_whole_numbers_of_other_kinds_become_pythons() -> None:
    pattern = Pattern(np.int64(3), [np.int32(5), 8])  # pyright: ignore[reportArgumentType]
    assert pattern == Pattern(3, (5, 8))
    assert hash(pattern) == hash(Pattern(3, (5, 8)))
    assert json.dumps(pattern.distances) == "[0, 1, 2, 3, 5, 8]"


@pytest.mark.parametrize("alpha", [1e306, 1.7e308])
def test_alpha_so_large_that_distances_overflow_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha is 1"):
        Pattern.fibonacci(alpha=alpha)
    with pytest.raises(InputError, match="alpha is 1"):
        LearnedPattern(8, FIBONACCI).at(alpha)
