"""The ladder: from the paper's recipe at a tuned rate to the project's, a step at a time, as public speed-runs keep it.

What a step gave is in the study's tables. Steps that were dropped stay, so that nobody has to wonder.
"""

from dataclasses import dataclass, replace
from typing import Any

from fibattn.pattern import hybrid_layers
from fibattn.training.recipe import ModelRecipe, Recipe


@dataclass(frozen=True)
class Step:
    """A recipe, and what is new in it."""

    name: str
    change: str
    since: str | None
    """The step that it changes."""
    kept: bool
    recipe: Recipe


def _step(steps: list[Step], name: str, change: str, since: str, kept: bool, **changes: Any) -> None:
    """Add a step: `changes` are fields of the model, of the optimizer or of the recipe."""
    old = next(step.recipe for step in steps if step.name == since)
    model, optimizer = (
        {key: value for key, value in changes.items() if hasattr(part, key)} for part in (old.model, old.optimizer)
    )
    others = {key: value for key, value in changes.items() if key not in model and key not in optimizer}
    new = replace(old, model=replace(old.model, **model), optimizer=replace(old.optimizer, **optimizer), **others)
    steps.append(Step(name, change, since, kept, new))


def _climb() -> tuple[Step, ...]:
    recipe = Recipe(
        model=ModelRecipe(window=64, **hybrid_layers(8, full=(7,))), compile=True, save_every=10**6, keep_checkpoints=1
    )
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=3e-3))
    steps = [Step("rate", "the hybrid at 3e-3: AdamW, cosine to a tenth", None, True, recipe)]
    relu2 = {"hidden_act": "relu2", "gated_mlp": False, "intermediate_size": 2048}
    passes = "squared ReLU without a gate for SwiGLU, residual stream in 16 bits"
    _step(steps, "passes", passes, "rate", True, **relu2, autocast_residual=True)
    muon = {"muon": True, "muon_learning_rate": 4e-3, "decay": "linear", "final_fraction": 0.0}
    _step(steps, "muon", "Muon at 4e-3 for the layers' matrices, linear to 0", "passes", True, **muon)
    _step(steps, "qk", "queries and keys normalised", "muon", True, qk_norm=True)
    _step(steps, "zero", "outputs of the layers begin at zero", "qk", True, zero_init_outputs=True)
    _step(steps, "muon8", "Muon at 8e-3: the default recipe", "zero", True, muon_learning_rate=8e-3)
    swiglu = {"hidden_act": "silu", "gated_mlp": True, "intermediate_size": 1366}
    full = {"layer_types": ("full_attention",), "no_rope_layers": (1,)}
    change = "full attention in every layer of the default recipe"
    _step(steps, "dense8", change, "muon8", False, **full, window=ModelRecipe.window)
    batch = {"sequences_per_step": 64, "micro_batch": 64, "learning_rate": 4e-3, "muon_learning_rate": 1.1e-2}
    change = "64 sequences a step for 32, rates higher by a third: the recipe of the five minutes"
    _step(steps, "batch", change, "muon8", False, **batch)
    _step(steps, "swiglu", "SwiGLU again", "zero", False, **swiglu)
    _step(steps, "skip", "the embedding mixed into every layer's input", "zero", False, embedding_skip=True)
    _step(steps, "dense", "full attention in every layer", "skip", False, **full)
    return tuple(steps)


LADDER = _climb()
