"""The rivals: models of one size, at the best of the rates that were tried, against dense over seeds that both have."""

import math
from typing import Any

import pytest
import torch

from fibattn.model.modeling import FibAttnForCausalLM
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.recipe import Recipe
from fibattn.training.run import model_config
from study.report.rivals_tables import rivals_tables
from study.rivals import DEFAULTS, FINALISTS, RIVALS, Rivals

SETS = (RIVALS, FINALISTS, DEFAULTS)


def record(run: str, nll: float, far: float, *, seed: int = 42, copied: float = 0.5) -> dict[str, Any]:
    rows = {"1024": {"nll": nll, "targets": 4096}}
    return {
        "run": run,
        "seed": seed,
        "tokens": 106_000_000,
        "trained_at": 1024,
        "hardware": {"device": "GPU"},
        "versions": {"torch": "2"},
        "evaluation": {"books": rows | {"16384": {"nll": far + 1}}, "docs": rows | {"16384": {"nll": far + 1}}},
        "bounded": {"1024": {name: {"16384": {"nll": far}, "32768": {"nll": far + 2}} for name in ("books", "docs")}},
        "copying": {"256": copied},
        "model": {"keys": 70.0, "parameters": 60_000_000},
        "training": {"tokens_per_second": 800_000.0},
    }


@pytest.mark.parametrize("name", RIVALS.models)
@pytest.mark.parametrize("rivals", SETS, ids=lambda rivals: rivals.study)
def test_rivals_have_one_size(rivals: Rivals, name: str) -> None:
    sizes = []
    for model in (rivals.models[name], rivals.recipe.model):
        with torch.device("meta"):
            made = FibAttnForCausalLM(model_config(Recipe(model=model), 1024, 0))
        sizes.append(sum(parameter.numel() for parameter in made.parameters()))
    # A convolution has a few weights that are nobody's else.
    assert sizes[0] == pytest.approx(sizes[1], rel=0.001 if rivals.models[name].kv_convolution else 0)


def test_the_default_recipe_is_among_them() -> None:
    models = DEFAULTS.models.values()
    assert any(
        (model.layer_types, model.window, model.no_rope_layers)
        == (PRESETS[DEFAULT].model.layer_types, PRESETS[DEFAULT].model.window, PRESETS[DEFAULT].model.no_rope_layers)
        for model in models
    )


def test_a_row_is_of_the_best_rate_and_compares_common_seeds() -> None:
    [table] = rivals_tables(
        RIVALS,
        [
            record("dense", 3.00, 2.9),
            record("dense-seed43", 3.10, 2.9, seed=43),
            record("rungs-w64-two", 3.05, 2.9),
            record("rungs-w64-two-rate2", 2.98, 2.8),
            record("rungs-w64-two-rate2-seed43", 3.00, 2.6, seed=43),
            record("rungs-w64-two-rate2-seed44", 3.20, 2.7, seed=44),
        ],
        "the recipe",
    )
    dense, rungs = (dict(zip(table.frame.columns, row, strict=True)) for row in table.rows)
    assert (
        dense["perplexity"]
        == f"{(math.exp(3.0) + math.exp(3.1)) / 2:.2f} ± {(math.exp(3.1) - math.exp(3.0)) / math.sqrt(2):.2f}"
    )
    assert (rungs["rates"], rungs["seeds"]) == ("1, 2 (best 2)", "3")
    assert rungs["against dense"] == f"−{100 * -math.expm1(-0.06):.1f} %"
    assert rungs["16×, bounded"] == f"{math.exp(2.7):.2f}"
    assert rungs["copied from 256"] == "0.50"
