"""What the report says of a recipe: the one place that knows how a record writes it."""

import hashlib
import json
import statistics
from typing import Any

from fibattn.training.recipe import ModelRecipe, Recipe
from fibattn.training.run import model_config
from study.cost import mean_keys
from study.presets import paper_name

BASES = {"fibonacci": "", "power_of_two": "power-of-two "}
"""What stands before the schedule in a label."""


def described(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as columns of the report's frames.

    `kind` is dense, hybrid, window hybrid, window, stagger, or for a model such as the paper's its schedule; `shape`
    the model's part as JSON, and `digest` six letters of all of it but for the seeds.
    """
    own = recipe["model"]
    layers, clipped = own["layer_types"], own["max_offset"] is not None
    full = tuple(number for number, kind in enumerate(layers) if kind == "full_attention")
    papers = not full and "fibonacci_attention" in layers and not (clipped or own["stagger_heads"])
    if len(full) == len(layers):
        kind, label, full = "dense", "dense", ()
    elif "sliding_attention" in layers:
        kind, label = "window", f"window only, W = {own['window']}"
    else:
        kind = own["schedule"] if papers else "stagger"
        heads = " over heads too" if own["stagger_heads"] else ""
        label = f"{BASES[own['base']]}{own['schedule']}{heads}, W = {own['window']}"
        label += ", clipped" if clipped and not full else ""
    if full:
        kind = "window hybrid" if kind == "window" else "hybrid"
        rotated = all(own["no_rope_layers"][layer] for layer in full)
        label = f"hybrid: {label}, full {', '.join(map(str, full))}{' with RoPE' * rotated}"
    text = json.dumps({**recipe, "init_seed": None, "data_seed": None}, sort_keys=True)
    return {
        "kind": kind,
        "label": label,
        "window": own.get("window"),
        "full_layers": full,
        "heads": own["stagger_heads"],
        "paper_name": paper_name(own["base"], own["schedule"], own["window"]) if papers else "",
        "shape": json.dumps(own, sort_keys=True),
        "digest": hashlib.sha256(text.encode()).hexdigest()[:6],
        "rate": recipe["optimizer"]["learning_rate"],
        "warmup_steps": recipe["optimizer"]["warmup_steps"],
        "step": f"{recipe['sequences_per_step']} sequences of {recipe['sequence_length']:,}",
    }


def keys_at(shape: str, trained_at: int, length: int) -> float:
    """How many keys a query reads in a sequence of `length`, the mean over layers and positions."""
    recipe = Recipe(model=ModelRecipe(**json.loads(shape)), sequence_length=trained_at)
    # How many ids the tokenizer has does not matter here.
    return statistics.mean(mean_keys(model_config(recipe, vocab_size=1, separator=0), length))
