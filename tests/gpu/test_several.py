"""`fibattn train` over two GPUs, weights sharded and rows cut: it learns what one GPU does, and goes on with one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fibattn import files
from fibattn.pattern import hybrid_layers
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.recipe_file import to_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"two GPUs are needed, not {torch.cuda.device_count()}"),
]

STEPS = 40


def losses(recipe: Recipe) -> list[float]:
    return [json.loads(line)["loss"] for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]


def train(recipe: Recipe, processes: int) -> list[float]:
    """The losses of a run, by the command that users give."""
    path = recipe.out.with_suffix(".json")
    files.write_json(path, to_json(recipe))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *launcher, "fibattn", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return losses(recipe)


@pytest.mark.parametrize("full_reach", [None, 100], ids=["unbounded", "bounded"])
def test_two_gpus_learn_what_one_does(prepared: Path, tmp_path: Path, full_reach: int | None) -> None:
    shape = ModelRecipe(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        window=40,
        full_reach=full_reach,
        qk_norm=True,
        autocast_residual=True,
        **hybrid_layers(2, full=(1,)),
    )
    one = Recipe(
        data=prepared,
        out=tmp_path / "one",
        model=shape,
        optimizer=OptimizerRecipe(learning_rate=3e-3, muon=True, muon_learning_rate=8e-3, warmup_steps=5),
        sequence_length=512,
        sequences_per_step=8,
        micro_batch=4,
        steps=STEPS,
        log_every=1,
        save_every=STEPS // 2,
        evaluate_tokens=2048,
        compile=True,
    )
    alone = train(one, 1)
    assert alone[-1] < alone[0] - 1
    for changes in (
        {"parallel": "fsdp"},
        {"context_parallel": 2},
        {"context_parallel": 2, "gradient_checkpointing": True},
    ):
        run = replace(one, out=tmp_path / "-".join(changes), **changes)
        np.testing.assert_allclose(train(run, 2), alone, atol=0.03, err_msg=str(changes))


def test_a_run_of_two_gpus_goes_on_with_one(prepared: Path, tmp_path: Path) -> None:
    shape = ModelRecipe(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, window=20)
    optimizer = OptimizerRecipe(learning_rate=3e-3, muon=True, muon_learning_rate=8e-3, warmup_steps=5)
    sizes = {"sequence_length": 256, "sequences_per_step": 4, "micro_batch": 2, "evaluate_tokens": 1024}
    whole = Recipe(
        data=prepared, out=tmp_path / "whole", model=shape, optimizer=optimizer, steps=20, log_every=1, **sizes
    )
    whole = replace(whole, save_every=10, parallel="fsdp")
    expected = train(whole, 2)
    (whole.out / "metrics.jsonl").unlink()
    for name in ("model", "checkpoint-20"):
        (whole.out / name).rename(whole.out.parent / name)
    found = train(whole, 1)
    np.testing.assert_allclose(found[-10:], expected[-10:], atol=0.03)
