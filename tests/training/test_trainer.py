"""The recipe's formulas, and a whole run against the paper's algorithm written out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import build_model, train
from fibattn.training.trainer import rate_factor, training_arguments

PAPER = OptimizerRecipe()


def test_the_papers_rate() -> None:
    rates = [3e-4 * rate_factor(step, PAPER, 13_000) for step in range(1, 13_001)]
    assert rates[0] == 1e-6
    assert rates[149] == pytest.approx(1.5e-4)
    assert rates[299] == 3e-4
    assert rates[299 + 6350] == pytest.approx(0.55 * 3e-4)
    assert rates[-1] == pytest.approx(3e-5)
    assert np.argmax(rates) == 299
    for step in (301, 5000, 12_999):
        turn = math.pi * (step - 300) / 12_700
        assert rates[step - 1] == pytest.approx(3e-5 + 2.7e-4 * (1 + math.cos(turn)) / 2)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 5), (5, 5), (5, 3), (1, 2)])
def test_rates_of_short_runs_stay_between_nothing_and_the_peak(warmup: int, steps: int) -> None:
    chosen = OptimizerRecipe(warmup_steps=warmup)
    rates = [rate_factor(step, chosen, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    if steps > warmup:
        assert rates[-1] == pytest.approx(0.1)


def test_a_plateau_and_a_linear_fall_to_nothing() -> None:
    chosen = OptimizerRecipe(warmup_steps=10, decay="linear", decay_fraction=0.4, final_fraction=0.0)
    rates = [rate_factor(step, chosen, 110) for step in range(1, 111)]
    assert rates[4] == 0.5
    assert rates[9:70] == [1.0] * 61
    assert rates[69:] == pytest.approx([1 - done / 40 for done in range(41)])


def test_arguments_of_the_papers_run() -> None:
    arguments = training_arguments(Recipe(micro_batch=4), processes=2)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 4)
    assert (arguments.max_steps, arguments.max_grad_norm) == (13_000, 1.0)
    assert arguments.train_sampling_strategy == "sequential"
    assert not arguments.logging_nan_inf_filter
    assert arguments.n_gpu <= 1


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_precision(precision: Any) -> None:
    expected = precision == "bf16" or (precision == "auto" and torch.cuda.is_available())
    assert training_arguments(Recipe(precision=precision), 1).bf16 == expected


def by_hand(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The paper's algorithm: sequences at random, all targets, clipping, AdamW; loss, norm and rate of every step."""
    data = PreparedData.open(recipe.data)
    starts = np.random.RandomState(recipe.data_seed).randint(
        0, len(data.train) - recipe.sequence_length, size=recipe.steps * recipe.sequences_per_step
    )
    model = build_model(recipe, data.vocab_size, data.separator)
    chosen, moments, log = recipe.optimizer, {}, []
    for step in range(1, recipe.steps + 1):
        mine = starts[(step - 1) * recipe.sequences_per_step : step * recipe.sequences_per_step]
        tokens = torch.stack(
            [torch.from_numpy(data.train.sequence(int(start), recipe.sequence_length + 1)) for start in mine]
        )
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        named = dict(model.named_parameters())
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads.values()))
        rate = chosen.learning_rate * rate_factor(step, chosen, recipe.steps)
        with torch.no_grad():
            for name, parameter in named.items():
                grad = grads[name].double() * min(1.0, chosen.max_grad_norm / norm)
                first, second = moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
                first = chosen.beta1 * first + (1 - chosen.beta1) * grad
                second = chosen.beta2 * second + (1 - chosen.beta2) * grad**2
                moments[name] = first, second
                towards = (first / (1 - chosen.beta1**step)) / (
                    (second / (1 - chosen.beta2**step)).sqrt() + chosen.epsilon
                )
                decay = chosen.weight_decay if parameter.dim() >= 2 else 0.0
                pace = chosen.value_embedding_pace if ".value_embedding." in name else 1.0
                parameter.copy_(parameter.double() * (1 - rate * decay) - pace * rate * towards)
        log.append({"step": step, "loss": float(loss.detach()), "grad_norm": norm, "learning_rate": rate})
    return log, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes", [{"schedule": "coprime"}, {"schedule": "learned"}, {"value_embeddings": True}], ids=str
)
def test_a_run_is_the_papers_algorithm(recipe: Recipe, changes: dict[str, Any]) -> None:
    """Clipping bites (the norms are above it), micro-batches are averaged, all targets of a sequence count."""
    run = replace(
        recipe,
        model=replace(recipe.model, **changes),
        optimizer=replace(recipe.optimizer, max_grad_norm=0.5, weight_decay=0.3),
        steps=7,
    )
    train(run)
    expected, weights = by_hand(run)
    found = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0.5 for line in expected)
    for got, right in zip(found, expected, strict=True):
        for name, value in right.items():
            assert got[name] == pytest.approx(value, rel=1e-4), f"{name} of step {right['step']}"
        assert got["tokens"] == right["step"] * 4 * 32
    saved = load_file(run.out / "model" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=2e-5)


def test_epochs_show_every_sequence_once(recipe: Recipe) -> None:
    run = replace(recipe, order="epochs", steps=2)
    train(run)
    (order,) = (run.data / "order").glob("epochs-seed42-length32-sequences8.npy")
    starts = np.load(order)
    assert len(set(starts.tolist())) == 8
    assert not (starts % 32).any()


def test_the_seed_of_the_weights_is_all_that_moves_them() -> None:
    """Rows of the study start from the same weights, whatever else differs."""
    shape = ModelRecipe(hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    rows = [
        Recipe(model=shape),
        Recipe(model=replace(shape, schedule="learned"), data_seed=7),
        Recipe(model=replace(shape, layer_types=("full_attention",)), sequence_length=64),
        Recipe(model=replace(shape, base="power_of_two", window=8)),
    ]
    states = []
    for row in rows:
        torch.manual_seed(len(states))
        states.append(dict(build_model(row, 64, 0).named_parameters()))
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())
    other = dict(build_model(Recipe(model=shape, init_seed=43), 64, 0).named_parameters())
    assert not torch.equal(other["model.embed_tokens.weight"], states[0]["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps is 0; it must be at least 1"),
        (
            {"sequence_length": 10**7},
            r"one sequence of 10000000 needs 10000001; prepare more text or train on shorter sequences",
        ),
        ({"data": Path("nowhere")}, r"nowhere"),
    ],
)
def test_a_recipe_that_cannot_train_is_refused_before_anything_is_written(
    recipe: Recipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(replace(recipe, **changes))
    assert not recipe.out.exists()
