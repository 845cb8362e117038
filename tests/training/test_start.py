"""A run that begins with the weights of another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fibattn import files, sealed
from fibattn.data.prepared import PreparedData
from fibattn.data.tokenizer import load_tokenizer
from fibattn.errors import InputError
from fibattn.model import FibAttnForCausalLM
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe, to_json
from fibattn.training.run import build_model, train
from fibattn.training.start import load_weights


@pytest.fixture
def finished(recipe: Recipe) -> Path:
    """A finished run's folder."""
    train(recipe)
    return recipe.out


def longer(recipe: Recipe, start: Path | None) -> Recipe:
    """Sequences twice as long, full attention, another RoPE base."""
    shape = replace(recipe.model, layer_types=("full_attention",), rope_theta=3e4)
    return replace(recipe, start=start, out=recipe.out.with_name("longer"), sequence_length=64, model=shape, steps=2)


def built(recipe: Recipe) -> FibAttnForCausalLM:
    data = PreparedData.open(recipe.data)
    return build_model(recipe, data.vocab_size, data.separator)


def first_loss(recipe: Recipe) -> float:
    train(recipe)
    return json.loads((recipe.out / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_weights_are_those_of_the_start_whatever_the_layers_attend_to(recipe: Recipe, finished: Path) -> None:
    model = built(longer(recipe, finished))
    fresh = model.model.embed_tokens.weight.detach().clone()
    load_weights(model, finished)
    stored, now = load_file(finished / "model" / "model.safetensors"), model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in stored.items())
    assert not torch.equal(fresh, model.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_run_goes_on_from_what_was_learnt_and_says_so(recipe: Recipe, finished: Path) -> None:
    run = longer(recipe, finished / "model")
    assert first_loss(run) < first_loss(replace(run, start=None, out=recipe.out.with_name("fresh"))) - 0.5
    assert "| began with | the weights of run |" in (run.out / "model" / "README.md").read_text()
    files.write_json(recipe.out / "again.json", to_json(run))
    assert load_recipe(str(recipe.out / "again.json")) == run
    assert "start_sha256" in files.read_json(run.out / "inputs.json")


def test_a_run_goes_on_from_the_start_that_it_began_with_alone(recipe: Recipe, finished: Path) -> None:
    run = replace(longer(recipe, finished), save_every=1)
    train(run)
    moved = finished.rename(finished.with_name("moved"))
    train(replace(run, start=moved))
    train(run)  # finished: its start may be gone
    shutil.rmtree(run.out / "model")
    train(run)  # so it may where there is a checkpoint
    train(replace(run, start=moved, out=run.out.with_name("again")))
    for weights in ("longer", "again"):
        assert files.sha256(run.out.with_name(weights) / "model" / "model.safetensors") == files.sha256(
            run.out / "model" / "model.safetensors"
        )
    other = replace(recipe, out=recipe.out.with_name("other"), init_seed=7, steps=1)
    train(other)
    with pytest.raises(InputError, match="trained on other data, in another order or from another start"):
        train(replace(run, start=other.out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"embed_tokens.weight is \(\d+, 32\) there and \(\d+, 64\) here"),
        ({"num_hidden_layers": 2}, r"layers.2.input_layernorm.weight is \(32,\) there and absent here"),
        (
            {"layer_types": ("fibonacci_attention",), "schedule": "learned"},
            r"layers.0.self_attn.theta is absent there and \(1,\) here",
        ),
    ],
)
def test_a_start_of_another_shape_is_refused(
    recipe: Recipe, finished: Path, changes: dict[str, Any], message: str
) -> None:
    run = longer(recipe, finished)
    with pytest.raises(InputError, match=f"model.safetensors does not fit the recipe: .*{message}; give the recipe"):
        train(replace(run, model=replace(run.model, **changes)))
    train(run)  # what was refused has not claimed the folder


def test_a_start_that_is_none_is_refused(recipe: Recipe, finished: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere holds no finished model \(config.json, .*; give a finished run"):
        train(longer(recipe, Path("nowhere")))
    with pytest.raises(InputError, match="checkpoint-12 holds no finished model"):
        train(longer(recipe, finished / "checkpoint-12"))
    with (finished / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"model.safetensors has 1000 bytes"):
        train(longer(recipe, finished))
    assert not longer(recipe, finished).out.exists()


def test_a_start_that_is_the_runs_own_place_is_refused_and_left_as_it_is(recipe: Recipe, finished: Path) -> None:
    model = finished / "model"
    before = {path.name for path in model.iterdir()}
    for start, out in ((model, model), (model, finished), (finished, finished)):
        with pytest.raises(InputError, match="the place of the run itself; give the run another folder by --out"):
            train(replace(recipe, start=start, keep_model=True, out=out))
    assert {path.name for path in model.iterdir()} == before


def test_a_model_that_was_saved_by_others_is_a_start(recipe: Recipe, finished: Path) -> None:
    saved = recipe.out.with_name("saved")
    FibAttnForCausalLM.from_pretrained(finished / "model").save_pretrained(saved)
    load_tokenizer(finished / "model").save_pretrained(saved)
    ours, theirs = (
        train(replace(longer(recipe, one), out=recipe.out.with_name(f"from-{one.name}"))) for one in (finished, saved)
    )
    assert files.sha256(ours / "model.safetensors") == files.sha256(theirs / "model.safetensors")
    (saved / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="saved holds no finished model"):
        train(longer(recipe, saved))


def test_a_start_with_another_tokenizer_is_refused(recipe: Recipe, finished: Path) -> None:
    other = shutil.copytree(finished / "model", finished / "other")
    tokenizer = files.read_json(other / "tokenizer.json")
    words = tokenizer["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]
    files.write_json(other / "tokenizer.json", tokenizer)
    sealed.seal(other)
    with pytest.raises(InputError, match=r"other was trained with another tokenizer .* --tokenizer .*other"):
        train(longer(recipe, other))


def test_a_kept_start_that_attends_to_something_else_is_another(recipe: Recipe, finished: Path) -> None:
    run = replace(recipe, start=finished, keep_model=True, out=recipe.out.with_name("kept"), steps=2)
    train(run)
    config = finished / "model" / "config.json"
    files.write_json(config, files.read_json(config) | {"window": 2})
    sealed.seal(config.parent)
    with pytest.raises(InputError, match="kept was trained on other data"):
        train(run)


@pytest.mark.parametrize(
    ("length", "scaling", "trained_at"), [(64, "default", 64), (16, "default", 32), (64, "dynamic", 32)]
)
def test_a_kept_start_in_longer_sequences_has_their_length(
    recipe: Recipe, finished: Path, length: int, scaling: str, trained_at: int
) -> None:
    config = finished / "model" / "config.json"
    rotary = {"rope_type": scaling, "rope_theta": 1e4} | ({"factor": 2.0} if scaling == "dynamic" else {})
    files.write_json(config, files.read_json(config) | {"rope_parameters": rotary})
    sealed.seal(config.parent)
    run = replace(recipe, start=finished, keep_model=True, out=recipe.out.with_name("kept"), steps=2)
    before, after = (
        files.read_json(folder / "config.json")
        for folder in (finished / "model", train(replace(run, sequence_length=length)))
    )
    assert after["max_position_embeddings"] == trained_at
    assert {name for name in before if before[name] != after[name]} <= {"max_position_embeddings"}


def test_a_kept_start_keeps_how_it_generates(recipe: Recipe, finished: Path) -> None:
    how = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6}
    files.write_json(finished / "model" / "generation_config.json", how)
    sealed.seal(finished / "model")
    run = replace(recipe, start=finished, keep_model=True, out=recipe.out.with_name("kept"), steps=2)
    found = files.read_json(train(run) / "generation_config.json")
    assert {name: found[name] for name in how} == how


def test_another_activation_than_the_starts_is_refused(recipe: Recipe, finished: Path) -> None:
    shape = replace(recipe.model, hidden_act="relu2")
    with pytest.raises(InputError, match="has the activation silu, the recipe relu2; give the recipe that of its"):
        train(replace(recipe, start=finished, model=shape, out=recipe.out.with_name("other")))


def test_a_run_without_a_start_is_not_one_whose_start_is_gone(recipe: Recipe, finished: Path) -> None:
    with pytest.raises(InputError, match=r"run was trained on other data, .* another start"):
        train(replace(recipe, start=finished.with_name("gone")))
