"""The retrieval probe: its task against loops, its bands against the rungs they narrow to."""

import json
import math
from itertools import pairwise

import pytest
import torch

from fibattn import FibAttnForCausalLM, LearnedPattern, attend
from fibattn.errors import InputError
from fibattn.model.loss import IGNORED
from study.probes import retrieval
from study.probes.retrieval import BandAttention, MarkedCopies, band_width, build, set_width
from study.probes.settings import Retrieval, Start


def test_targets_are_the_ids_at_the_marked_distance() -> None:
    item = MarkedCopies(3, seed=1)[2]
    ids, targets = item["input_ids"].tolist(), item["shift_labels"].tolist()
    assert len(ids) == len(targets) == 512
    assert 0 <= min(ids) < max(ids) < 512
    for position, (token, target) in enumerate(zip(ids, targets, strict=True)):
        distance = 350 if token >= 256 else 200
        assert target == (ids[position - distance] if position >= distance else IGNORED)


def test_sequences_depend_on_seed_and_number_alone() -> None:
    one = MarkedCopies(4, seed=1)[3]["input_ids"]
    assert torch.equal(one, MarkedCopies(2, seed=1, first=2)[1]["input_ids"])
    assert not torch.equal(one, MarkedCopies(4, seed=2)[3]["input_ids"])
    assert not torch.equal(one, MarkedCopies(4, seed=1)[2]["input_ids"])


def test_starts_are_uniform_and_the_clipped_ramp() -> None:
    def alphas(start: Start) -> list[float]:
        return [layer.self_attn.alpha.item() for layer in build(4, start, 0).model.layers]  # pyright: ignore

    assert alphas("uniform") == pytest.approx([1.0] * 4)
    assert alphas("staggered") == pytest.approx([0.55, 0.5 + 1 / 3, 0.5 + 2 / 3, 1.45])


def test_band_weights_match_loops() -> None:
    band = build(2, "staggered", 0).model.layers[1].self_attn
    assert isinstance(band, BandAttention)
    set_width(band, 7.0)
    alpha = band.alpha.item()
    expected = [float(distance <= 8) for distance in range(300)]
    for rung in (rung for rung in band.config.base_rungs if round(alpha * rung) > 8):
        bell = [math.exp(-((distance - alpha * rung) ** 2) / (2 * 7.0**2)) for distance in range(4000)]
        total = sum(bell)
        for distance in range(9, 300):
            expected[distance] += bell[distance] / total
    torch.testing.assert_close(band.bias(300).exp(), torch.tensor(expected), rtol=1e-3, atol=1e-9)


def test_narrow_band_is_the_rung() -> None:
    band = build(2, "uniform", 0).model.layers[0].self_attn
    assert isinstance(band, BandAttention)
    set_width(band, 0.01)
    hidden = torch.randn(1, 60, 256, generator=torch.Generator().manual_seed(0))
    still = torch.ones(1, 60, 1, 64), torch.zeros(1, 60, 1, 64)
    q, k, v = (project(hidden).view(1, 60, -1, 64) for project in (band.q_proj, band.k_proj, band.v_proj))
    sparse = attend(q, k, v, LearnedPattern(8, band.config.base_rungs), alpha=band.alpha)
    torch.testing.assert_close(band(hidden, still), band.o_proj(sparse.flatten(2)), rtol=1e-4, atol=1e-5)


def test_wide_band_feels_a_rung_it_does_not_reach() -> None:
    """The gradient of the weight at distance 40 pulls the scale up, towards 34 · alpha = 40."""
    band = build(2, "uniform", 0).model.layers[0].self_attn
    assert isinstance(band, BandAttention)
    set_width(band, 3.0)
    band.bias(60)[40].backward()
    assert band.theta is not None
    assert band.theta.grad is not None
    assert band.theta.grad.item() > 0


def test_a_finished_model_is_asked_through_its_rungs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bands that stay wide, what they see differs from what the rungs read."""
    seen: list[tuple[bool, list[float]]] = []

    def look(model: FibAttnForCausalLM, data: MarkedCopies, batch: int) -> tuple[float, float]:
        layers = [layer.self_attn for layer in model.model.layers]
        learned = [layer.alpha.item() for layer in layers if layer.theta is not None]  # pyright: ignore
        seen.append((isinstance(layers[0], BandAttention), learned))
        return len(seen) / 8, 0.0

    monkeypatch.setattr(retrieval, "accuracy", look)
    options: dict = {"depths": (2,), "seeds": (0,), "steps": 1, "batch": 1, "sequences": 1}
    (row,) = retrieval.retrieval(Retrieval(starts=("staggered",), **options))["rows"]
    assert [bands for bands, _ in seen] == [True, False]
    assert seen[0][1] == seen[1][1] == row["runs"][0]["alphas"]
    assert (row["acc200"], row["rungs200"]) == (0.125, 0.25)
    (row,) = retrieval.retrieval(Retrieval(starts=("linear",), **options))["rows"]
    assert len(seen) == 3
    assert row["acc200"] == row["rungs200"]


def test_width_is_annealed_over_four_fifths() -> None:
    widths = [band_width(step, 100) for step in range(100)]
    assert widths[0] == 40.0
    assert widths[80:] == pytest.approx([0.5] * 20)
    assert all(before > after for before, after in pairwise(widths[:81]))
    model = build(2, "uniform", 0)
    set_width(model, 3.0)
    assert {layer.self_attn.width.item() for layer in model.model.layers} == {3.0}  # pyright: ignore


def test_probe_repeats_itself_and_learns_on_easy_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """At distances 2 and 5, inside the window, a few steps at length 24 already beat chance (1 / 512)."""

    def copies(count: int, seed: int, **options: int) -> MarkedCopies:
        return MarkedCopies(count, seed, length=24, distances=(2, 5), **options)

    monkeypatch.setattr(retrieval, "MarkedCopies", copies)

    def probe(steps: int) -> dict:
        options: dict = {"steps": steps, "batch": 8, "learning_rate": 3e-3, "sequences": 16}
        return retrieval.retrieval(Retrieval(depths=(2,), starts=("staggered",), seeds=(0,), **options))

    assert probe(3) == probe(3)
    row = probe(40)["rows"][0]
    assert row["runs"][0]["loss"] < math.log(512)
    assert max(row["acc200"], row["acc350"]) > 0.02


def test_static_offsets_go_through_the_operator() -> None:
    result = retrieval.retrieval(Retrieval(depths=(2,), starts=("linear",), seeds=(0,), steps=1, batch=1, sequences=1))
    assert (result["rows"][0]["alpha_min"], result["rows"][0]["alpha_max"]) == (0.5, 1.5)
    assert not any(isinstance(layer.self_attn, BandAttention) for layer in build(2, "linear", 0).model.layers)


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(InputError, match="steps 0"):
        retrieval.retrieval(Retrieval(steps=0))
    with pytest.raises(InputError, match=r"depths \[\]"):
        retrieval.retrieval(Retrieval(depths=()))
    nothing: dict
    for nothing in ({"seeds": ()}, {"starts": ()}):
        with pytest.raises(InputError, match=rf"{next(iter(nothing))} \[\]"):
            retrieval.retrieval(Retrieval(**nothing))


def test_a_cut_probe_goes_on_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict] = []
    options: dict = {"depths": (1, 2), "starts": ("linear",), "seeds": (0,), "steps": 1, "batch": 1, "sequences": 1}
    result = retrieval.retrieval(Retrieval(**options), keep=kept.append)
    assert [len(one["rows"]) for one in kept] == [1, 2]
    assert kept[-1] == result

    def only_depth_2(depth: int, *_: object) -> dict:
        assert depth == 2
        return result["rows"][1]["runs"][0]

    monkeypatch.setattr(retrieval, "_run", only_depth_2)
    earlier = json.loads(json.dumps(kept[0]))
    assert retrieval.retrieval(Retrieval(**options), earlier=earlier) == result
    with pytest.raises(InputError, match=r"batch was 1 and is now 2\. Give a new --out"):
        retrieval.retrieval(Retrieval(**options | {"batch": 2}), earlier=earlier)
