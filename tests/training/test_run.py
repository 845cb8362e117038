"""Whole runs in processes of their own: killed, resumed, shared between processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fibattn import files
from fibattn.errors import InputError
from fibattn.training import checkpoints
from fibattn.training.recipe import ModelRecipe, Recipe, to_json
from fibattn.training.run import train


def write(recipe: Recipe, folder: Path) -> Path:
    path = folder / f"{recipe.out.name}.json"
    files.write_json(path, to_json(recipe))
    return path


def command(recipe: Recipe, folder: Path, *before: str) -> list[str]:
    return [sys.executable, *before, "-m", "fibattn", "train", str(write(recipe, folder))]


def losses(recipe: Recipe) -> list[float]:
    lines = (recipe.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, recipe.steps + 1))
    return [json.loads(line)["loss"] for line in lines]


def test_killed_run_ends_with_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    whole = replace(recipe, out=tmp_path / "whole", steps=40, save_every=3)
    train(whole)
    cut = replace(whole, out=tmp_path / "cut")
    kills = 0
    for wanted in (4, 11):
        process = subprocess.Popen(command(cut, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = cut.out / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2, "the run ended before it could be killed"
    subprocess.run(command(cut, tmp_path), check=True, capture_output=True)
    assert losses(cut) == losses(whole)
    expected = load_file(whole.out / "model" / "model.safetensors")
    found = load_file(cut.out / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_two_processes_have_the_losses_of_one(recipe: Recipe, tmp_path: Path, parallel: str, schedule: str) -> None:
    shape = replace(recipe.model, schedule=schedule)
    one = replace(recipe, out=tmp_path / "one", model=shape, steps=6)
    train(one)
    two = replace(one, out=tmp_path / "two", parallel=parallel)
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(29500 + os.getpid() % 500),
    )
    run = subprocess.run(command(two, tmp_path, *launch), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=2e-5, atol=0)
    expected = load_file(one.out / "model" / "model.safetensors")
    found = load_file(two.out / "model" / "model.safetensors")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_finished_run_is_left_alone(recipe: Recipe) -> None:
    model = train(replace(recipe, steps=2))
    before = files.sha256(model / "model.safetensors")
    assert train(replace(recipe, steps=2)) == model
    assert files.sha256(model / "model.safetensors") == before
    assert not list(recipe.out.glob(".*"))


def test_another_recipe_in_the_same_folder_is_refused(recipe: Recipe) -> None:
    train(replace(recipe, steps=2))
    with pytest.raises(InputError, match=r"steps was 2 and is now 3"):
        train(replace(recipe, steps=3))


def test_damaged_checkpoint_is_passed_over(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(recipe, steps=6))
    newest = recipe.out / "checkpoint-6" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoints.latest(recipe.out) == recipe.out / "checkpoint-3"
    assert "has 100 bytes, expected" in capsys.readouterr().err
    (recipe.out / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        checkpoints.latest(recipe.out)


def test_infinite_loss_stops_with_step_and_windows(recipe: Recipe) -> None:
    wild = replace(recipe, optimizer=replace(recipe.optimizer, peak_rate=1e30, warmup_steps=0), save_every=1)
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+\. The windows .* start at tokens \d+"):
        train(wild)
    assert checkpoints.latest(recipe.out) is not None


def test_init_and_data_seeds_are_separate(recipe: Recipe) -> None:
    def first_losses(**seeds: int) -> list[float]:
        run = replace(recipe, steps=1, out=recipe.out / str(seeds), **seeds)
        train(run)
        return losses(run)

    same = first_losses()
    assert first_losses(init_seed=1) != same
    assert first_losses(data_seed=1) != same


@pytest.mark.parametrize("attention", ["sliding", "full"])
def test_other_layers_train(recipe: Recipe, attention: str) -> None:
    shape = replace(recipe.model, attention=attention, full_layers=(1,), full_layers_rope=False)
    run = replace(recipe, model=shape, steps=10)
    train(run)
    assert losses(run)[-1] < losses(run)[0]


def test_gradient_checkpointing_and_micro_batches_change_nothing(recipe: Recipe) -> None:
    train(replace(recipe, steps=3))
    other = replace(recipe, steps=3, out=recipe.out.parent / "other", gradient_checkpointing=True, micro_batch=4)
    train(other)
    torch.testing.assert_close(
        torch.tensor(losses(other)), torch.tensor(losses(replace(recipe, steps=3))), rtol=1e-5, atol=0
    )


def test_model_recipe_default_is_the_paper() -> None:
    assert ModelRecipe() == Recipe().model
