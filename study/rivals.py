"""The rivals in a tuned recipe: what layers attend to is all that differs, and the rate where others are tried, too."""

from dataclasses import dataclass, replace
from functools import cached_property

from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training.recipe import ModelRecipe, Recipe
from study.ladder import LADDER

FACTORS = (0.5, 1.0, 2.0)
"""The rates that are tried, in those of the recipe; AdamW's and Muon's together."""

SEEDS = (42, 43, 44)

OURS = "hybrid"
"""The name in the report of what stands for the project: windows, with rungs or without, beside two full layers."""


@dataclass(frozen=True)
class Rivals:
    """Models that share a recipe."""

    study: str
    """The name of the study of them."""
    recipe: Recipe
    ours: str
    """The one that stands for the project."""

    @cached_property
    def models(self) -> dict[str, ModelRecipe]:
        """By name: rungs, a plain window of so many distances, or a window and chosen blocks (as in `study far --only
        best`), beside so many full layers of 16."""
        dense = replace(
            self.recipe.model, layer_types=("full_attention",), no_rope_layers=(1,), window=12, full_reach=None
        )
        models = {"dense": dense}
        for full in ("two", "four", "three", "none"):
            models[f"rungs-w64-{full}"] = _attending(dense, 64, full, "fibonacci_attention")
        for full, widths in (("two", (70, 127, 128, 256, 32)), ("four", (70, 127, 128)), ("none", (70, 127))):
            for window in widths:
                models[f"window-w{window}-{full}"] = _attending(dense, window, full, "sliding_attention")
        blocks = _attending(dense, 31, "none", "chosen_attention")
        return {**models, "blocks-w31-none": replace(blocks, kv_convolution=4)}

    def at_rate(self, factor: float) -> Recipe:
        """The recipe at `factor` times its rates."""
        optimizer = self.recipe.optimizer.at(factor)
        return replace(self.recipe, optimizer=optimizer, save_every=10**6, keep_checkpoints=1)


_FULL = {"two": (8, (7,)), "four": (4, (3,)), "three": (5, (4,)), "none": (16, ())}
"""Which of so many layers are full, over and over."""


def _attending(dense: ModelRecipe, window: int, full: str, sparse: LayerType) -> ModelRecipe:
    of, which = _FULL[full]
    layers = hybrid_layers(of, which, sparse=sparse) if which else {"layer_types": (sparse,)}
    return replace(dense, window=window, **layers)


def bounds(model: ModelRecipe) -> tuple[int, ...]:
    """Of the full layers, in training lengths; none where there is no full layer."""
    return (1,) if "full_attention" in model.layer_types else ()


def name_of(model: str, factor: float, seed: int) -> str:
    """Of a run: `dense`, `dense-rate2`, `dense-seed43`."""
    return model + (f"-rate{factor:g}" if factor != 1 else "") + (f"-seed{seed}" if seed != SEEDS[0] else "")


def _of_step(name: str) -> Recipe:
    return next(step.recipe for step in LADDER if step.name == name)


RIVALS = Rivals("rivals", _of_step("muon8"), "rungs-w64-two")
"""In what was the default recipe until 2026-11-30. Far reading and parts of a model were tried in it, too."""

FINALISTS = Rivals("finalists", _of_step("skip-6"), "window-w127-two")
"""In the default recipe, but that sequences are drawn with replacement: what its attention was chosen from."""

DEFAULTS = Rivals("default", _of_step("epochs-6"), "window-w127-two")
"""In the default recipe as it is."""
