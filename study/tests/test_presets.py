"""The tables of runs: what is in them, and that every one can be built."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest

from fibattn import InputError, Pattern, layer_patterns
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.recipe import Recipe
from fibattn.training.run import model_config
from study.presets import HYBRID, STUDIES, TUNED, Run, Study, find_study, key_count
from study.store import key_of

EVERY = [(name, run.name) for name, study in STUDIES.items() if name not in TUNED for run in study.runs]


def resolved(study: Study, run: Run, tokens: int | None = None) -> Recipe:
    return study.resolved(run, data=Path("data"), out=Path("out"), tokens=tokens, compiled=False)


def named(study: str, run: str) -> Run:
    return next(one for one in STUDIES[study].runs if one.name == run)


@pytest.mark.parametrize(("study", "name"), EVERY)
def test_every_run_can_be_built_and_differs_in_its_attention_alone(study: str, name: str) -> None:
    whole = STUDIES[study]
    recipe = resolved(whole, named(study, name))
    recipe.check()
    recipe.split(1)
    model_config(recipe, 512, 0)
    first = resolved(whole, whole.runs[0])
    same = replace(recipe, model=first.model, init_seed=first.init_seed, data_seed=first.data_seed)
    assert same == first
    assert recipe.init_seed == recipe.data_seed


@pytest.mark.parametrize("study", STUDIES)
def test_names_are_unique(study: str) -> None:
    names = [run.name for run in STUDIES[study].runs]
    assert len(set(names)) == len(names)


def test_paper_has_the_published_matrix() -> None:
    published = json.loads(files("study").joinpath("paper.json").read_text())["matrix"]
    wanted = {(row["base"], row["schedule"], row["window"]) for row in published}
    runs = [run for run in STUDIES["paper"].runs if run.name not in ("dense", "hybrid")]
    assert len(wanted) == len(runs) == 21
    assert {(run.model.base, run.model.schedule, run.model.window) for run in runs} == wanted
    assert all(run.model.max_offset is None for run in runs)


def test_paper_keeps_rungs_past_the_training_length_and_beyond_does_not() -> None:
    def farthest(study: str, run: str) -> int:
        config = model_config(resolved(STUDIES[study], named(study, run)), 512, 0)
        return max(offset for sets in config.layer_offsets if sets for offsets in sets for offset in offsets)

    assert farthest("paper", "linear-w12") == 1480
    assert max(farthest("beyond", name) for name in ("hybrid", "stagger-w12", "heads-w128")) <= 1023


def test_controls_read_as_many_keys_as_the_stagger() -> None:
    beyond = STUDIES["beyond"]
    windows = [run.model.window for run in beyond.runs if run.model.layer_types == ("sliding_attention",)]
    for window in (12, 32, 64, 128, 256):
        config = model_config(resolved(beyond, named("beyond", f"stagger-w{window}")), 512, 0)
        keys = window + 1 + mean(len(offsets) for sets in config.layer_offsets if sets for offsets in sets)
        assert min(abs(keys - (control + 1)) for control in windows) <= 0.5


def test_the_hybrid_is_in_paper_and_beyond_as_one_run_with_the_full_layers_of_the_default_recipe() -> None:
    keys = {key_of(resolved(STUDIES[study], named(study, "hybrid")), "data") for study in ("paper", "beyond")}
    assert len(keys) == 1
    for recipe in (resolved(STUDIES["paper"], HYBRID), PRESETS[DEFAULT]):
        kinds = recipe.resolved().model.layer_types
        assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == [7, 15]


def test_budget_scales_steps_and_a_long_warm_up() -> None:
    study, run = STUDIES["paper"], STUDIES["paper"].runs[0]
    quarter, tiny = resolved(study, run, 106_000_000), resolved(study, run, 1_000_000)
    assert (quarter.steps, quarter.optimizer.warmup_steps) == (3234, 300)
    assert (tiny.steps, tiny.optimizer.warmup_steps) == (30, 3)
    assert resolved(study, run).tokens == 425_984_000
    with pytest.raises(InputError, match=r"32000 tokens is less than one step of 32,768"):
        resolved(study, run, 32_000)


def test_lengthening_is_a_tenth_of_the_tokens_in_the_longest_sequences() -> None:
    run = named("paper", "dense")
    recipe = resolved(STUDIES["paper"], run, 106_000_000)
    assert run.lengthening is not None
    longer = run.lengthening.of(recipe, 16)
    assert (longer.sequence_length, longer.start) == (16_384, Path("out/model"))
    assert longer.sequences_per_step * longer.sequence_length == recipe.sequences_per_step * recipe.sequence_length
    assert 0.099 < longer.tokens / recipe.tokens < 0.1
    longer.split(1)
    slowest = [model_config(one, 512, 0).rope_parameters["rope_theta"] ** -(62 / 64) for one in (recipe, longer)]
    assert slowest[1] * 16 == pytest.approx(slowest[0])
    same = {"sequence_length": 1024, "sequences_per_step": 32, "micro_batch": 32, "steps": recipe.steps, "start": None}
    assert replace(longer, out=recipe.out, model=recipe.model, optimizer=recipe.optimizer, **same) == recipe


@pytest.mark.parametrize(("name", "turned"), [("dense", True), ("window-w127-two", False)])
def test_the_long_stage_is_a_fifth_of_the_tokens_in_steps_of_16_sequences(name: str, turned: bool) -> None:
    run = named("long", name)
    recipe = resolved(STUDIES["long"], run, 426_000_000)
    assert run.lengthening is not None
    longer = run.lengthening.of(recipe, 32)
    assert (longer.sequence_length, longer.sequences_per_step) == (8192, 16)
    assert longer.tokens / recipe.tokens == pytest.approx(0.2, abs=0.001)
    assert (longer.model.rope_theta > recipe.model.rope_theta) == turned  # full layers without RoPE have none to turn


def test_a_stage_of_its_own_rate_makes_another_run_of_the_same_model() -> None:
    study = STUDIES["long"]
    recipes = {run.name: resolved(study, run, 106_000_000) for run in study.runs}
    keys = {run.name: study.key(run, recipes[run.name], "data") for run in study.runs}
    assert len(set(keys.values())) == len(study.runs)
    assert keys["dense"] == key_of(recipes["dense"], "data")
    assert recipes["dense"] == recipes["dense-stage0.25"] == recipes["dense-short"]
    stages = {run.name: run.lengthening.of(recipes[run.name], 32) for run in study.runs if run.lengthening}
    rates = [stages[name].optimizer.muon_learning_rate for name in ("dense", "dense-stage0.25", "dense-short")]
    assert rates == [8e-3, 2e-3, 2e-3]
    ours = stages["window-w127-two-stage0.25"]
    assert stages["dense-short"].tokens / ours.tokens == pytest.approx(446 / 767, abs=0.01)
    more = stages["window-w127-two-more0.25"]
    assert (more.sequence_length, more.sequences_per_step, more.optimizer.learning_rate) == (1024, 32, 1.5e-3)
    assert more.tokens == pytest.approx(ours.tokens, rel=0.01)
    assert stages["blocks-w31-none-stage0.25-seed43"].model.block_reach == 1023  # as many keys are read as before


RESULTS = [path for study in TUNED for path in sorted((Path(__file__).parents[1] / "results" / study).glob("*.jsonl"))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_result_at_a_tuned_rate_is_of_the_recipe_that_its_run_has(path: Path) -> None:
    study, run = STUDIES[path.parent.name], named(path.parent.name, path.stem)
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        recipe = study.resolved(run, data=Path("data"), out=Path("out"), tokens=record["tokens"], compiled=True)
        assert study.key(run, recipe, record["inputs"]["data_fingerprint"]) == record["key"]


def test_runs_are_chosen_by_pattern() -> None:
    chosen = STUDIES["paper"].chosen(["pow2-*-w8", "dense"])
    assert [run.name for run in chosen] == ["dense", "pow2-fixed-w8", "pow2-linear-w8"]
    with pytest.raises(InputError, match="no run of the study is named 'linaer-w12': did you mean 'linear-w12'"):
        STUDIES["paper"].chosen(["linaer-w12"])


def test_unknown_study_is_refused() -> None:
    with pytest.raises(InputError, match="unknown study 'papre': did you mean 'paper'"):
        find_study("papre")


def test_key_count_is_the_mean_of_the_patterns() -> None:
    assert key_count([Pattern(4, (8, 20)), Pattern(0)]) == 4
    far = (13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
    assert key_count(layer_patterns("fibonacci", "fixed", layers=2, window=12)) == 13 + len(far)
