"""Training on cut rows: the Trainer's losses are those of one process, `fibattn train` as well; none hangs."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_cut
from forked import Server
from launching import launch, under_torchrun
from safetensors.torch import load_file

from fibattn import InputError, files
from fibattn.cli.main import main as cli
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.recipe_file import to_json
from fibattn.training.run import train


def losses(run: Recipe, name: str = "metrics.jsonl") -> list[float]:
    return [json.loads(line)["loss"] for line in (run.out / name).read_text().splitlines()]


def assert_same_numbers(found: Any, expected: Any) -> None:
    """Two JSON values that differ in rounding alone."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same_numbers(found[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same_numbers(one, other)
    else:
        assert found == expected


def counted(said: str) -> list[str]:
    """What the meters of an evaluation counted."""
    return [line.split(" in ")[0] for line in said.splitlines() if " at " in line]


def check_same(found: Recipe, expected: Recipe) -> None:
    """The losses of both runs, and their weights, are the same."""
    for name in ("metrics.jsonl", "held-out.jsonl"):
        assert losses(found, name) == pytest.approx(losses(expected, name), rel=2e-5)
    weights, whole = (load_file(run.out / "model" / "model.safetensors") for run in (found, expected))
    assert weights.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(weights[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would share one GPU")
def test_runs_over_several_processes_are_those_of_one(
    prepared: Path, forked: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelRecipe(hidden_size=32, intermediate_size=46, num_hidden_layers=3, num_attention_heads=4, window=4)
    shape = replace(shape, value_embeddings=True)
    rate = OptimizerRecipe(learning_rate=3e-3, warmup_steps=4)
    sizes = {"sequence_length": 32, "sequences_per_step": 4, "micro_batch": 2, "evaluate_tokens": 160}
    often = {"steps": 4, "log_every": 1, "save_every": 4, "evaluate_every": 2}
    one = Recipe(data=prepared, out=tmp_path / "one", model=shape, optimizer=rate, **sizes, **often)
    cut = replace(one, out=tmp_path / "cut", context_parallel=2)
    narrow = replace(one, out=tmp_path / "narrow", parallel="fsdp", precision="bf16", steps=2)
    learned = replace(
        one,
        out=tmp_path / "learned",
        model=replace(shape, schedule="learned"),
        optimizer=replace(rate, muon=True),
        save_every=2,
    )
    sharded = replace(learned, out=tmp_path / "sharded", parallel="fsdp")
    for recipe in (one, learned):
        train(recipe)
    words = [str(tmp_path)]
    for recipe in (sharded, cut, narrow):
        files.write_json(tmp_path / f"{recipe.out.name}.json", to_json(recipe))
        words.append(str(tmp_path / f"{recipe.out.name}.json"))
    # Killed in a checkpoint of two processes, the run goes on with four.
    began = time.monotonic()
    with pytest.raises(AssertionError, match="exitcode  : 7"):
        under_torchrun("train_cut.py", 2, *words[:2], "dies")
    assert time.monotonic() - began < 90  # half of which is starting
    assert [path.name for path in sharded.out.glob("checkpoint-*")] == ["checkpoint-2"]
    launch(forked, "train_cut.py", 4, *words, *train_cut.WAYS, "evaluate")
    evaluated = files.read_json(tmp_path / "evaluation.json")
    capsys.readouterr()
    assert cli(["eval", *train_cut.evaluation(tmp_path)]) == 0
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(4)]
    assert counted(said[0]) == counted(capsys.readouterr().err) != []
    assert not any(said[1:])
    assert_same_numbers(evaluated, files.read_json(tmp_path / "evaluation.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    for way in train_cut.WAYS:
        assert found[way] == pytest.approx(train_cut.stock(tmp_path, way, 1), rel=2e-5), way
    check_same(cut, one)
    check_same(sharded, learned)
    assert losses(narrow) == pytest.approx(losses(one)[:2], rel=1e-2)
    assert all(loss != float(torch.tensor(loss).bfloat16()) for loss in losses(narrow)), "a loss keeps its bits"
    shutil.rmtree(cut.out / "model")
    with pytest.raises(
        InputError, match="checkpoint-4 was written with weights sharded over processes; go on under torchrun"
    ):
        train(replace(cut, context_parallel=1))
    # What the message says does go on, in one process.
    files.write_json(tmp_path / "whole.json", to_json(replace(cut, context_parallel=1, parallel="fsdp")))
    launch(forked, "train_cut.py", 1, str(tmp_path), str(tmp_path / "whole.json"))
    check_same(cut, one)


def test_what_is_cut_takes_the_processes_of_torchrun(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "small", "--data", str(prepared), "--parallel", "fsdp"]) == 2
    assert "parallel is fsdp, and torchrun started no processes (torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences_per_step": 3}, "3 sequences a step do not divide over 4 processes in groups of 2; .* such as 2"),
        ({"context_parallel": 3}, "is 3, and 4 processes .* do not divide by it; start a multiple of it: .* 3 "),
        ({"sequence_length": 33}, "context_parallel is 2, and 33 tokens of a sequence do not divide"),
    ],
)
def test_a_recipe_that_does_not_divide_is_refused(changes: dict[str, int], message: str) -> None:
    recipe = Recipe(sequence_length=32, sequences_per_step=4, context_parallel=2)
    assert recipe.split(4) == (2, 1)
    with pytest.raises(InputError, match=message):
        replace(recipe, **changes).split(4)
