"""The specification against the paper's sentences, written out as loops over Python numbers."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from operator_inputs import Shape, boundaries_to_positions, random_inputs
from torch import Tensor

from fibattn import ChosenPattern, LearnedPattern, Pattern, attend, attend_chosen


def softmax_sum(scores: list[float], values: list[list[float]]) -> tuple[list[float], float]:
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = sum(weights)
    sums = [sum(w * value[c] for w, value in zip(weights, values, strict=True)) / total for c in range(len(values[0]))]
    return sums, largest + math.log(total)


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def by_loops(q: Tensor, k: Tensor, v: Tensor, row, positions: list[list[int]] | None) -> tuple[Tensor, Tensor]:
    """Attention of every query alone; `row(query, keys, values, kv_head, own, limit)` says to what."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64)
    group, past = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys, values = k[b, :, h // group].tolist(), v[b, :, h // group].tolist()
            for i in range(q.shape[1]):
                own = past + i
                limit = own if positions is None else min(own, positions[b % len(positions)][i])
                scores, chosen = row(q[b, i, h].tolist(), keys, values, h // group, own, limit)
                result, lse[b, h, i] = softmax_sum(scores, chosen)
                out[b, i, h] = torch.tensor(result, dtype=torch.float64)
    return out, lse


def attend_by_loops(q, k, v, sets: Sequence[Sequence[int]], scale: float, positions=None) -> tuple[Tensor, Tensor]:
    def row(query, keys, values, head, own, limit):
        seen = [own - distance for distance in sets[head % len(sets)] if distance <= limit]
        return [scale * dot(query, keys[j]) for j in seen], [values[j] for j in seen]

    return by_loops(q, k, v, row, positions)


def attend_interpolated_by_loops(
    q, k, v, window: int, rungs: Sequence[int], alpha: float, scale: float, positions=None, max_offset=None
) -> tuple[Tensor, Tensor]:
    def row(query, keys, values, head, own, limit):
        seen = [own - distance for distance in range(window + 1) if distance <= limit]
        scores, chosen = [scale * dot(query, keys[j]) for j in seen], [values[j] for j in seen]
        taken = set()
        for rung in rungs:
            distance = alpha * rung
            lo = math.floor(distance)
            f = distance - lo
            if round(distance) <= window or lo in taken or (max_offset is not None and lo > max_offset):
                continue
            taken.add(lo)
            if lo > limit:
                continue
            # The farther key is clamped at the first of the document.
            far = own - min(lo + 1, limit)
            scores.append(scale * ((1 - f) * dot(query, keys[own - lo]) + f * dot(query, keys[far])))
            chosen.append([(1 - f) * a + f * b for a, b in zip(values[own - lo], values[far], strict=True)])
        return scores, chosen

    return by_loops(q, k, v, row, positions)


def attend_chosen_by_loops(
    given: Sequence[Tensor], trust: Sequence[float], pattern: ChosenPattern, scale: float, positions=None
) -> tuple[Tensor, Tensor]:
    q, k, v, far_q, far_k = (x.tolist() for x in given)
    out, lse = torch.empty_like(given[0]), given[0].new_empty(len(q), len(q[0][0]), len(q[0]))
    tokens, keys, kv_heads, block = len(q[0]), len(k[0]), len(k[0][0]), pattern.block
    group, past = len(q[0][0]) // kv_heads, keys - tokens
    for b, kv, i in itertools.product(range(len(q)), range(kv_heads), range(tokens)):
        places = range(past, keys) if positions is None else positions[b % len(positions)]
        longest = max(range(tokens), key=lambda t: places[t])
        first, own, limit = past + longest - places[longest], past + i, min(past + i, places[i])
        starts = [
            s
            for s in range(first, own - block + 1, block)
            if s >= 0 and pattern.window < own - s <= min(pattern.reach, limit)
        ]
        rows = {s: [far_k[b][j][kv] for j in range(s, s + block)] for s in starts}
        means = {s: [sum(column) / block for column in zip(*found, strict=True)] for s, found in rows.items()}
        shares = dict.fromkeys(starts, 0.0)
        for h in range(kv * group, (kv + 1) * group) if starts else ():
            scores = [scale * dot(far_q[b][i][h], means[s]) for s in starts]
            for s, score in zip(starts, scores, strict=True):
                shares[s] += math.exp(score) / sum(map(math.exp, scores))
        chosen = sorted(starts, key=lambda s: -shares[s])
        if pattern.anchored:
            chosen.sort(key=lambda s: s != own - limit)
        near = range(own - min(pattern.window, limit), own + 1)
        far = [(s, j) for s in chosen[: pattern.blocks] for j in range(s, s + block) if own - j > pattern.window]
        for h in range(kv * group, (kv + 1) * group):
            scores = [scale * dot(q[b][i][h], k[b][j][kv]) for j in near]
            for s, j in far:
                raised = [a + trust[kv] * mean for a, mean in zip(far_k[b][j][kv], means[s], strict=True)]
                scores.append(scale * dot(far_q[b][i][h], raised))
            result, lse[b, h, i] = softmax_sum(scores, [v[b][j][kv] for j in [*near, *(j for _, j in far)]])
            out[b, i, h] = torch.tensor(result, dtype=torch.float64)
    return out, lse


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-11, atol=1e-12)


SHAPES = {
    "one token": Shape(1, size=3),
    "shorter than the window": Shape(2, size=3),
    "plain": Shape(13, size=4),
    "batch and grouped heads": Shape(12, batch=2, kv_heads=2, group=3, size=3),
    "fewer queries than keys": Shape(4, batch=2, kv_heads=2, group=2, size=3, keys=14),
    "one query": Shape(1, kv_heads=1, group=2, size=3, keys=12),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pattern", [Pattern(3, (5, 8)), Pattern(0, (1, 4, 90)), Pattern(0), Pattern(40)])
def test_fixed_offsets_equal_the_loops(shape: Shape, pattern: Pattern) -> None:
    q, k, v = random_inputs(shape)
    found = attend(q, k, v, pattern, return_lse=True, backend="reference")
    check(found, attend_by_loops(q, k, v, [pattern.distances], shape.size**-0.5))


@pytest.mark.parametrize("window", [90, 2**63 - 1])
def test_a_window_of_any_size_is_everything(window: int) -> None:
    q, k, v = random_inputs(Shape(12, size=3))
    found = attend(q, k, v, Pattern(window), return_lse=True, backend="reference")
    check(found, attend_by_loops(q, k, v, [range(12)], 3**-0.5))
    learned = LearnedPattern(window, (1, 2)), torch.tensor([1.0], dtype=torch.float64)
    check(attend(q, k, v, learned[0], alpha=learned[1], return_lse=True, backend="reference"), found)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.7])
def test_any_finite_scale_multiplies_the_dot_products(scale: float) -> None:
    q, k, v = random_inputs(Shape(9, size=3))
    pattern = Pattern(1, (4,))
    found = attend(q, k, v, pattern, scale=scale, return_lse=True, backend="reference")
    check(found, attend_by_loops(q, k, v, [pattern.distances], scale))


def test_every_kv_head_has_its_own_distances() -> None:
    q, k, v = random_inputs(Shape(14, batch=2, kv_heads=3, group=2, size=3))
    patterns = [Pattern(2, (5,)), Pattern(2), Pattern(2, (3, 7, 11))]
    found = attend(q, k, v, patterns, return_lse=True, backend="reference")
    check(found, attend_by_loops(q, k, v, [pattern.distances for pattern in patterns], 3**-0.5))


def test_packed_documents_are_separate() -> None:
    q, k, v = random_inputs(Shape(14, kv_heads=2, group=2, size=3))
    boundaries = [0, 1, 6, 14]
    pattern, positions = Pattern(2, (4, 6)), boundaries_to_positions(boundaries)
    expected = attend_by_loops(q, k, v, [pattern.distances], 3**-0.5, positions.tolist())
    packed = attend(q, k, v, pattern, cu_seqlens=torch.tensor(boundaries), return_lse=True, backend="reference")
    check(packed, expected)
    check(attend(q, k, v, pattern, positions=positions, return_lse=True, backend="reference"), expected)


def test_every_row_of_a_batch_can_be_packed_differently() -> None:
    q, k, v = random_inputs(Shape(5, batch=2, size=3, keys=9))
    positions, pattern = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]]), Pattern(1, (3, 5))
    found = attend(q, k, v, pattern, positions=positions, return_lse=True, backend="reference")
    check(found, attend_by_loops(q, k, v, [pattern.distances], 3**-0.5, positions.tolist()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 0.77, 1.0, 1.31])
@pytest.mark.parametrize("max_offset", [None, 7])
def test_learned_offsets_equal_the_loops(shape: Shape, alpha: float, max_offset: int | None) -> None:
    q, k, v = random_inputs(shape)
    rungs, scale = (1, 2, 3, 5, 8, 13), torch.tensor([alpha], dtype=torch.float64)
    found = attend(q, k, v, LearnedPattern(2, rungs, max_offset), alpha=scale, return_lse=True, backend="reference")
    expected = attend_interpolated_by_loops(q, k, v, 2, rungs, alpha, shape.size**-0.5, max_offset=max_offset)
    check(found, expected)


@pytest.mark.parametrize("window", [0, 1, 30])
def test_learned_offsets_of_packed_documents_equal_the_loops(window: int) -> None:
    q, k, v = random_inputs(Shape(16, kv_heads=2, group=2, size=3))
    boundaries, rungs, alpha = [0, 5, 6, 16], (1, 2, 3, 5, 8), 0.9
    positions = boundaries_to_positions(boundaries)
    expected = attend_interpolated_by_loops(q, k, v, window, rungs, alpha, 3**-0.5, positions.tolist())
    for given in ({"positions": positions}, {"cu_seqlens": torch.tensor(boundaries)}):
        pattern, scale = LearnedPattern(window, rungs), torch.tensor(alpha, dtype=torch.float64)
        found = attend(q, k, v, pattern, alpha=scale, return_lse=True, backend="reference", **given)
        check(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("shape", "pattern", "positions"),
    [
        (Shape(90, batch=2, kv_heads=2, group=2, size=3), ChosenPattern(5, 2, 16, 70), None),
        (Shape(90, kv_heads=2, group=2, size=3), ChosenPattern(20, 1, 16, 50, anchored=True), None),
        (Shape(9, batch=2, size=3, keys=120), ChosenPattern(3, 3, 16, 100), None),
        (
            Shape(80, batch=2, size=3),
            ChosenPattern(5, 1, 16, 60, anchored=True),
            [[*range(80)], [0] * 13 + [*range(67)]],
        ),
        (Shape(90, size=3), ChosenPattern(5, 2, 16, 70), [[*range(20), *range(55), *range(15)]]),
        (Shape(20, size=3, keys=60), ChosenPattern(5, 2, 16, 40), [[*range(47, 67)]]),
    ],
    ids=["heads", "anchored", "few queries", "padded", "packed", "begun before its keys"],
)
def test_chosen_blocks_equal_the_loops(
    shape: Shape, pattern: ChosenPattern, positions: list[list[int]] | None, backend: str
) -> None:
    q, k, v = random_inputs(shape)
    far_q, far_k, _ = random_inputs(shape, seed=1)
    trust = torch.linspace(0.5, 2, shape.kv_heads, dtype=torch.float64)
    how = {} if positions is None else {"positions": torch.tensor(positions)}
    found = attend_chosen(q, k, v, pattern, far=(far_q, far_k), trust=trust, backend=backend, **how)  # pyright: ignore
    given = (q, k, v, far_q, far_k)
    check(found, attend_chosen_by_loops(given, trust.tolist(), pattern, shape.size**-0.5, positions))


def test_only_the_result_is_rounded_to_the_input_dtype() -> None:
    q, k, v = random_inputs(Shape(20, size=8), dtype=torch.bfloat16)
    pattern = Pattern(2, (5, 13))
    exact, exact_lse = attend(q.double(), k.double(), v.double(), pattern, return_lse=True, backend="reference")
    out, lse = attend(q, k, v, pattern, return_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
    assert lse.dtype == torch.float32
    assert torch.equal(lse, exact_lse.float())
