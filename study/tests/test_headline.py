"""The first figure: dense attention and the hybrid, tuned, at the budget where most is known of both."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fibattn.training.presets import DEFAULT, PRESETS
from study.ladder import LADDER
from study.presets import STUDIES
from study.report import charts
from study.report.headline import tuned_headline
from study.rivals import DEFAULTS, FINALISTS, RIVALS, Rivals

RIVAL = RIVALS.ours


def record(run: str, near: float, tokens: int = 106, seed: int = 42, far: bool = True, yarn: bool = False) -> Any:
    def sets(**losses: float) -> dict[str, Any]:
        return {name: {length.strip("_"): {"nll": loss} for length, loss in losses.items()} for name in ("a", "b")}

    return {
        "run": run,
        "seed": seed,
        "tokens": tokens,
        "trained_at": 1024,
        "evaluation": sets(_1024=near, _16384=near + 1) if far else sets(_1024=near),
        "bounded": {"1024": sets(_16384=near - 0.1)} if far else {},
        "rope_scaling": {"yarn": sets(_16384=near + 0.2)} if yarn else {},
    }


def shown(*records: dict[str, Any]) -> dict[str, dict[int, float]]:
    found = tuned_headline(RIVALS, records)
    assert found is not None
    return {one.name: {length: math.log(value) for length, value in one.perplexities.items()} for one in found.curves}


def test_every_way_of_dense_and_the_default_recipe_as_it_is_saved_are_curves() -> None:
    assert shown(record("dense", 3.0, yarn=True), record(RIVAL, 2.9)) == {
        "dense": pytest.approx({1024: 3.0, 16384: 4.0}),
        "dense, YaRN": pytest.approx({1024: 3.0, 16384: 3.2}),
        "dense, bounded": pytest.approx({1024: 3.0, 16384: 2.9}),
        "hybrid": pytest.approx({1024: 2.9, 16384: 2.8}),
    }


def test_the_largest_budget_is_taken_at_which_both_were_looked_at_far_out() -> None:
    small, large = [record("dense", 3.0), record(RIVAL, 2.9)], [record("dense", 2.5, 426), record(RIVAL, 2.4, 426)]
    assert shown(*small, *large)["dense"][1024] == pytest.approx(2.5)
    assert shown(*small, large[0])["dense"][1024] == pytest.approx(3.0)
    near = record(RIVAL, 2.4, 426, far=False)
    assert shown(*small, large[0], near)["dense"][1024] == pytest.approx(3.0)


def test_where_nothing_is_known_far_out_the_default_recipe_is_a_point_and_alone_dense_is_all() -> None:
    only_near = record(RIVAL, 2.9, far=False)
    assert shown(record("dense", 3.0), only_near)["hybrid"] == pytest.approx({1024: 2.9})
    assert set(shown(record("dense", 3.0))) == {"dense", "dense, bounded"}
    assert tuned_headline(RIVALS, [record(RIVAL, 2.9)]) is None


def test_ours_is_shown_far_out_where_it_is_more_than_a_point() -> None:
    def far(*records: dict[str, Any]) -> bool:
        found = tuned_headline(RIVALS, records)
        return found is not None and found.shows_ours_far_out

    dense = record("dense", 3.0)
    assert far(dense, record(RIVAL, 2.9))
    assert not far(dense, record(RIVAL, 2.9, far=False))
    assert not far(dense)


def test_means_are_over_the_seeds_that_both_have_and_were_looked_at_far_out() -> None:
    dense = [record("dense", 3.0), record("dense-seed43", 3.2, seed=43), record("dense-seed44", 9.0, seed=44)]
    ours = [record(RIVAL, 9.0, far=False), record(f"{RIVAL}-seed43", 2.9, seed=43)]
    found = shown(*dense, *ours)
    assert (found["dense"][1024], found["hybrid"][1024]) == pytest.approx((3.2, 2.9))
    found = tuned_headline(RIVALS, [*dense[:2], record(RIVAL, 2.7), ours[1]])
    assert found is not None
    assert found.seeds == 2
    assert f"perplexity {math.exp(2.8):.2f} for the hybrid" in found.words
    assert f"{math.exp(3.1):.2f} for dense attention (the mean of 2 seeds)" in found.words


@pytest.mark.parametrize(
    ("rivals", "step", "model"),
    [
        (RIVALS, "muon8", "rungs-w64-two"),
        (FINALISTS, "skip-6", "rungs-w64-two"),
        (DEFAULTS, "epochs-6", DEFAULTS.ours),
    ],
)
def test_rivals_are_trained_as_a_step_of_the_ladder_and_one_is_its_model(rivals: Rivals, step: str, model: str) -> None:
    recipe = next(one.recipe for one in LADDER if one.name == step)
    assert rivals.at_rate(1.0).optimizer == recipe.optimizer
    assert rivals.models[model] == recipe.model
    assert any(run.name == rivals.ours for run in STUDIES[rivals.study].runs)


def test_the_one_that_is_ours_is_the_default_recipe_and_the_finalists_differ_in_the_order_of_the_text() -> None:
    default, ours = PRESETS[DEFAULT], DEFAULTS.at_rate(1.0)
    assert DEFAULTS.models[DEFAULTS.ours] == FINALISTS.models[FINALISTS.ours] == replace(default.model, full_reach=None)
    for fields in ("optimizer", "sequence_length", "sequences_per_step", "steps"):
        assert getattr(ours, fields) == getattr(default, fields) == getattr(FINALISTS.at_rate(1.0), fields)
    assert (ours.order, default.order, FINALISTS.recipe.order) == ("epochs", "epochs", "random")


def test_the_figure_keeps_its_numbers_and_what_is_not_known_is_empty(tmp_path: Path) -> None:
    found = tuned_headline(RIVALS, [record("dense", 3.0), record(RIVAL, 2.9, far=False)])
    assert found is not None
    kept = pd.read_csv(charts.headline(found, tmp_path / "headline.svg").with_suffix(".csv"), index_col="length")
    assert kept.loc[1024, "hybrid"] == pytest.approx(math.exp(2.9))
    assert pd.isna(kept.loc[16384, "hybrid"])
    assert "hybrid 18 at 1,024" in (tmp_path / "headline.svg").read_text()
