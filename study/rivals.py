"""The rivals at the tuned recipe: what layers attend to is all that differs, each at its own best rate."""

from dataclasses import replace

from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.recipe import ModelRecipe, Recipe

_recipe = PRESETS[DEFAULT]
_dense = PRESETS["dense"].model


def _attending(window: int, full: tuple[int, ...], *, of: int, sparse: LayerType) -> ModelRecipe:
    layers = hybrid_layers(of, full, sparse=sparse) if full else {"layer_types": (sparse,)}
    return replace(_dense, window=window, **layers)


def _models() -> dict[str, ModelRecipe]:
    places = {"two": (8, (7,)), "four": (4, (3,)), "three": (5, (4,)), "none": (16, ())}
    models = {"dense": _dense}
    for full, window in (("two", 64), ("four", 64), ("three", 64), ("none", 64)):
        of, which = places[full]
        models[f"rungs-w{window}-{full}"] = _attending(window, which, of=of, sparse="fibonacci_attention")
    for full, window in (
        ("two", 70),
        ("two", 128),
        ("two", 256),
        ("two", 32),
        ("four", 70),
        ("four", 128),
        ("none", 70),
        ("none", 127),
    ):
        of, which = places[full]
        models[f"window-w{window}-{full}"] = _attending(window, which, of=of, sparse="sliding_attention")
    blocks = _attending(31, (), of=16, sparse="chosen_attention")
    return {**models, "blocks-w31-none": replace(blocks, kv_convolution=4)}


MODELS = _models()
"""By name: rungs, a plain window of so many distances, or a window and chosen blocks (as in `study far --only best`),
beside so many full layers of 16."""

FACTORS = (0.5, 1.0, 2.0)
"""The rates that are tried, in those of the default recipe; AdamW's and Muon's together."""

SEEDS = (42, 43, 44)


def bounds(model: ModelRecipe) -> tuple[int, ...]:
    """Of the full layers, in training lengths; none where there is no full layer."""
    return (1,) if "full_attention" in model.layer_types else ()


def at_rate(factor: float) -> Recipe:
    """The default recipe at `factor` times its rates."""
    return replace(_recipe, optimizer=_recipe.optimizer.at(factor), save_every=10**6, keep_checkpoints=1)


def name_of(model: str, factor: float, seed: int) -> str:
    """Of a run: `dense`, `dense-rate2`, `dense-seed43`."""
    return model + (f"-rate{factor:g}" if factor != 1 else "") + (f"-seed{seed}" if seed != SEEDS[0] else "")
