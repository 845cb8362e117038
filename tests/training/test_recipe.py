"""Recipes as files and flags: what comes back, and what a slip of the keyboard gets."""

import ast
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server

from fibattn import FibAttnConfig, files
from fibattn.cli import eval as eval_verb
from fibattn.cli import pattern, prepare, sample
from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.training.presets import PRESETS
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.recipe_file import load_recipe, to_json
from fibattn.training.run import build_model, model_config

VERBS = (eval_verb, pattern, prepare, sample)


def test_defaults_are_the_papers_recipe() -> None:
    paper = PRESETS["paper"]
    assert (paper.steps, paper.sequences_per_step, paper.sequence_length) == (13_000, 32, 1024)
    assert paper.tokens == 425_984_000
    rate = {"learning_rate": 3e-4, "decay": "cosine", "decay_fraction": 1.0, "final_fraction": 0.1, "warmup_steps": 300}
    adamw = {"muon": False, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
    assert paper.optimizer == OptimizerRecipe(**rate, **adamw)  # pyright: ignore
    assert (paper.order, paper.init_seed, paper.data_seed) == ("random", 42, 42)
    assert paper.model.max_offset is None
    assert model_config(paper, 32_768, 0).to_dict() == FibAttnConfig().to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_survive_a_file(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe.check()
    recipe.split(1)
    path = tmp_path / "recipe.json"
    files.write_json(path, to_json(recipe))
    assert load_recipe(str(path)) == recipe


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"steps": 5, "model": {"window": 3, "max_offset": 7}, "optimizer": {"learning_rate": 1}}')
    shape = ModelRecipe(window=3, max_offset=7)
    assert load_recipe(str(path)) == Recipe(steps=5, model=shape, optimizer=OptimizerRecipe(learning_rate=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stpes": 5}', r"mine.json has an unknown key 'stpes': did you mean 'steps'\?"),
        ('{"model": {"widow": 5}}', r"mine.json: model has an unknown key 'widow': did you mean 'window'\?"),
        ('{"zzz": 5}', r"unknown key 'zzz': the keys are data, out, start, keep_model, model"),
        ('{"steps": "5"}', r"mine.json: steps is '5'; expected a whole number"),
        ('{"steps": true}', r"mine.json: steps is True; expected a whole number"),
        ('{"steps": 2.5}', r"mine.json: steps is 2.5; expected a whole number"),
        ('{"compile": 1}', r"mine.json: compile is 1; expected true or false"),
        ('{"order": "shuffled"}', r"mine.json: order is 'shuffled'; expected one of random, epochs"),
        (
            '{"track": "wandb"}',
            r"mine.json: track is 'wandb'; expected a list, each one of tensorboard, wandb, trackio",
        ),
        ('{"track": ["wand"]}', r"mine.json: track is 'wand'; expected one of tensorboard, wandb, trackio"),
        ('{"steps": 1e400}', r"mine.json: steps is inf; expected a whole number below"),
        (
            '{"steps": 1' + "0" * 400 + "}",
            r"mine.json: steps is 10*… \(401 characters\); expected a whole number below 2",
        ),
        (
            '{"optimizer": {"learning_rate": 1' + "0" * 400 + "}}",
            r"learning_rate is 10*… .*; expected a number below 2",
        ),
        ('{"model": {"max_offset": "all"}}', r"max_offset is 'all'; expected a whole number .*, sequence or null"),
        ('{"model": {"no_rope_layers": [1, true]}}', r"no_rope_layers is True; expected one of 0, 1"),
        ('{"model": 3}', r"mine.json: model is 3; expected an object"),
        ("[]", r"mine.json is a list, expected an object with keys; restore it"),
        ('{"steps": 5', r"mine.json is not valid JSON"),
    ],
)
def test_a_file_with_a_slip_is_refused_with_the_place_and_what_was_meant(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("papr", r"unknown recipe 'papr': did you mean 'paper'\?"),
        ("x", r"unknown recipe 'x': the presets are paper, dense, hybrid, five-minutes, "),
        ("missing.json", r"missing.json does not exist"),
    ],
)
def test_an_unknown_recipe_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(name)


def test_flags_override_one_field_and_leave_the_rest() -> None:
    flags = "--steps 7 --model.window 3 --optimizer.learning-rate 0.01 --order epochs --compile --track tensorboard"
    found = parse(Recipe, flags.split(), "fibattn train small", default=PRESETS["small"])
    small = PRESETS["small"]
    assert found == replace(
        small,
        steps=7,
        model=replace(small.model, window=3),
        optimizer=replace(small.optimizer, learning_rate=0.01),
        order="epochs",
        compile=True,
        track=("tensorboard",),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences_per_step": 0}, "sequences_per_step is 0; it must be at least 1"),
        ({"save_every": -1}, "save_every is -1; it must be at least 1"),
        (
            {"optimizer": OptimizerRecipe(learning_rate=float("nan"))},
            "optimizer.learning_rate is nan; it must be above 0",
        ),
        (
            {"optimizer": OptimizerRecipe(value_embedding_pace=float("inf"))},
            "optimizer.value_embedding_pace is inf; it must be above 0",
        ),
        ({"optimizer": OptimizerRecipe(beta2=1.5)}, "optimizer.beta2 is 1.5; it must be from 0 to below 1"),
        ({"optimizer": OptimizerRecipe(warmup_steps=-1)}, "optimizer.warmup_steps is -1; it must be from 0 to"),
        ({"model": ModelRecipe(layer_types=("full_attention",) * 17)}, "layer_types has 17 entries for 16 layers"),
        ({"model": ModelRecipe(no_rope_layers=())}, "no_rope_layers has 0 entries for 16 layers"),
        ({"model": ModelRecipe(head_dim=0)}, "model.head_dim is 0; it must be at least 1"),
        (
            {"model": ModelRecipe(full_reach="sequence")},
            "model.full_reach is sequence, but no layer has full attention",
        ),
        (
            {"model": ModelRecipe(layer_types=("full_attention",), full_reach=0)},
            "full_reach is 0; it must be at least 1",
        ),
        ({"model": ModelRecipe(max_offset=0)}, "max_offset is 0; it must be at least 1, sequence, or None"),
    ],
)
def test_values_that_cannot_train_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Recipe(), **changes).check()


def test_heads_may_be_narrower_or_wider_than_their_share_of_the_width() -> None:
    shape = ModelRecipe(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    sizes = [model_config(Recipe(model=replace(shape, head_dim=size)), 512, 0).head_dim for size in (None, 16, 32)]
    assert sizes == [24, 16, 32]
    model = build_model(Recipe(model=replace(shape, head_dim=16)), 512, 0)
    assert model.base_model.layers[0].self_attn.q_proj.weight.shape == (4 * 16, 96)
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 512)


@pytest.mark.parametrize(
    ("processes", "most", "cut"),
    [(1, 32, (32, 1)), (2, 32, (16, 1)), (4, 3, (2, 4)), (1, 12, (8, 4)), (32, 5, (1, 1))],
)
def test_a_step_is_cut_into_equal_micro_batches_for_any_number_of_processes(
    processes: int, most: int, cut: tuple[int, int]
) -> None:
    assert Recipe(sequences_per_step=32, micro_batch=most).split(processes) == cut


def test_a_step_that_does_not_divide_over_the_processes_is_refused_with_one_that_does() -> None:
    with pytest.raises(InputError, match=r"32 sequences a step do not divide over 3 processes; .* of 3, such as 30"):
        Recipe(sequences_per_step=32).split(3)
    with pytest.raises(InputError, match=r"2 sequences a step do not divide over 8 processes; .* of 8, such as 8"):
        Recipe(sequences_per_step=2).split(8)


TRAIN = [sys.executable, "-m", "fibattn", "train"]


def test_the_verb_trains_a_file_with_flags_over_it_and_the_file_it_leaves_says_so(
    recipe: Recipe, forked: Server, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    files.write_json(path, to_json(recipe))
    done = forked.run([*TRAIN, path, "--steps", "2", "--out", tmp_path / "here"], check=True)
    assert f"the model is in {tmp_path / 'here' / 'model'}" in done.stdout
    kept = load_recipe(str(tmp_path / "here" / "recipe.json"))
    assert kept == replace(recipe, steps=2, out=tmp_path / "here")
    assert len((tmp_path / "here" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "here" / "model" / "config.json").read_text())["model_type"] == "fibattn"


def test_the_verb_answers_a_slip_in_one_line(forked: Server, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"stpes": 5}')
    done = forked.run([*TRAIN, path])
    assert done.returncode == 2
    assert done.stderr == f"fibattn train: {path} has an unknown key 'stpes': did you mean 'steps'?\n"
    done = forked.run([*TRAIN, "small", "--stpes", "5"])
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [Recipe, ModelRecipe, OptimizerRecipe, *(one.Arguments for one in VERBS)])
def test_every_field_has_words_for_the_help(kind: type) -> None:
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    for one, after in itertools.pairwise(body.body):
        if isinstance(one, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(one)
            assert isinstance(after.value, ast.Constant), ast.unparse(one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--sequences-per-step", "3"], "3 sequences a step do not divide over 2 processes"),
        (["smal"], "unknown recipe 'smal'"),
        (["small", "--stpes", "3"], "Unrecognized options: --stpes"),
        (["small", "--data", "nowhere"], "nowhere holds no prepared data"),
    ],
)
def test_of_several_processes_one_says_what_is_wrong(forked: Server, words: list[str], message: str) -> None:
    first, second = forked.several([*TRAIN, *words], 2)
    assert first.wait() == 2
    assert second.poll() is None, "the second waits for torchrun to end it"
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait() == -signal.SIGTERM
    assert (first.said("stdout") + first.said("stderr")).count(message) == 1
    assert second.said("stdout") + second.said("stderr") == ""


def test_of_several_processes_one_says_what_the_training_refuses(prepared: Path, tmp_path: Path) -> None:
    other = Recipe(data=prepared, out=tmp_path / "run", sequence_length=32, micro_batch=8)
    files.write_json(other.out / "recipe.json", to_json(other))
    files.write_json(tmp_path / "recipe.json", to_json(replace(other, steps=7)))
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fibattn", "train"]
    done = subprocess.run([*several, str(tmp_path / "recipe.json")], capture_output=True, text=True, check=False)
    assert done.stderr.count("holds another run: steps was 13000 and is now 7") == 1
    assert "exitcode  : 2" in done.stderr
    assert "fibattn/training" not in done.stderr, "no process shows where"
