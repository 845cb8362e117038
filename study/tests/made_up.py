"""Records of runs that nobody did, with losses as a test wants them."""

import math
from functools import cache
from pathlib import Path
from typing import Any

from study.presets import STUDIES, Run
from study.report.results import Group, grouped, paper, published_name
from study.store import recipe_of

SETS = ("fineweb_edu", "wikipedia")
Losses = dict[int, float]


@cache
def run_of(name: str) -> Run:
    return next(run for study in ("paper", "beyond") for run in STUDIES[study].runs if run.name == name)


def sets(losses: Losses | dict[str, Losses], bins: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """An evaluation: losses by length, alike for all sets or for each."""
    by_set = {name: losses.get(name, losses) for name in SETS}  # pyright: ignore
    return {
        name: {
            str(n): {
                "nll": loss,
                "bins": bins[name] if bins else [loss] * 8,
                "last_256_perplexity": math.exp(loss),
                "targets": 1024,
            }
            for n, loss in own.items()
        }
        for name, own in by_set.items()
    }


def record(name: str, evaluation: dict[str, Any], seed: int = 42, **more: Any) -> dict[str, Any]:
    """A finished run of the study's model `name`; `more` replaces whole fields."""
    study, run = STUDIES["paper"], run_of(name)
    if seed != 42:
        run = run.repeated(seed)
    recipe = study.resolved(run, data=Path("data"), out=Path("out"), tokens=None, compiled=False)
    return {
        "kind": "run",
        "study": "paper",
        "run": run.name,
        "key": f"{run.name} {recipe.tokens} {more.get('time', '')}",
        "seed": seed,
        "time": f"2026-01-01T00:00:{len(name):02}",
        "tokens": recipe.tokens,
        "trained_at": 1024,
        "recipe": recipe_of(recipe),
        "inputs": {"data_fingerprint": "the paper's"},
        "hardware": {"device": "GPU", "processes_a_gpu": 2},
        "versions": {},
        "training": {"tokens_per_second": 1.0, "peak_memory_gib": None},
        "seconds": {"training": 1.0},
        "model": {"keys": 20.0, "parameters": 1, "coverage": 1, "learned_alphas": None},
        "flops_per_token": {"attention": 1.0, "attention_share": 0.1},
        "convention": "every position",
        "evaluation": evaluation,
        "rope_scaling": {},
        **more,
    }


def published_run(key: str, factor: float = 1.0, seed: int = 42, **more: Any) -> dict[str, Any]:
    """A run with the figures that the paper gives for `key`."""
    published = paper()["extrapolation_perplexity"][key]
    losses = {name: {int(n): math.log(row[name] * factor) for n, row in published.items()} for name in SETS}
    alphas = {"keys": 20.0, "parameters": 1, "coverage": 1, "learned_alphas": [0.97, 1.04]}
    own = {"model": alphas} if "learned" in key else {}
    bins = paper()["position_nll_8_bins"].get(key)
    return record(published_name(key), sets(losses, bins), seed, **{**own, **more})


def published() -> dict[str, list[dict[str, Any]]]:
    """The paper's models by the names that the presets give them, with its seeds."""
    models = {}
    for key in paper()["extrapolation_perplexity"]:
        seeds = paper()["seeds_w12_fineweb_edu"].get(key.removesuffix("/w12"), [1.0]) if key.endswith("/w12") else [1.0]
        models[published_name(key)] = [published_run(key, one / seeds[0], 42 + n) for n, one in enumerate(seeds)]
    return models


def group(models: dict[str, list[dict[str, Any]]]) -> Group:
    (found,) = grouped(one for runs in models.values() for one in runs)
    return found
