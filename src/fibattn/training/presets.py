"""The recipes that have a name, as a Python table."""

import math
from dataclasses import replace
from pathlib import Path

from fibattn.pattern import hybrid_layers
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe

_tuned = Recipe(
    optimizer=OptimizerRecipe(
        learning_rate=6e-3, muon=True, muon_learning_rate=8e-3, decay="linear", final_fraction=0.0
    ),
    order="epochs",
    compile=True,
)
_dense = ModelRecipe(
    intermediate_size=2048,
    hidden_act="relu2",
    gated_mlp=False,
    qk_norm=True,
    embedding_skip=True,
    zero_init_outputs=True,
    autocast_residual=True,
    layer_types=("full_attention",),
)
_hybrid = replace(_dense, window=127, full_reach="sequence", **hybrid_layers(8, full=(7,), sparse="sliding_attention"))
_minutes = replace(
    _hybrid,
    hidden_size=768,
    intermediate_size=2944,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=3,
    value_embeddings=True,
    **hybrid_layers(4, full=(3,), sparse="sliding_attention"),
)


def _larger(layers: int, heads: int, *, head_size: int, sequences: int, micro_batch: int, steps: int) -> Recipe:
    """The default recipe in a larger model, for sequences of 2,048 and about 20 tokens a parameter.

    Rates fall with the root of the width: an update of Muon, as large as AdamW's, then turns what goes through a matrix
    as far in a wide one as in a narrow one (arXiv 2310.17813, section 3). They were not tuned at these sizes.
    """
    width = heads * head_size
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return replace(
        _tuned,
        model=replace(_hybrid, **shape, num_attention_heads=heads, num_key_value_heads=4),
        optimizer=replace(_tuned.optimizer.at(math.sqrt(_hybrid.hidden_size / width)), warmup_steps=1000),
        sequence_length=2048,
        sequences_per_step=sequences,
        micro_batch=micro_batch,
        steps=steps,
    )


_small = replace(
    _hybrid,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    window=32,
    **hybrid_layers(3, full=(2,), sparse="sliding_attention"),
)

_recipes = {
    "paper": Recipe(model=ModelRecipe(max_offset=None), compile=True),
    "dense": replace(_tuned, model=_dense),
    "hybrid": replace(_tuned, model=_hybrid),
    "five-minutes": replace(
        _tuned,
        model=_minutes,
        optimizer=replace(_tuned.optimizer, learning_rate=8e-3, muon_learning_rate=1.1e-2, beta1=0.8),
        sequences_per_step=64,
        micro_batch=64,
        steps=5004,
    ),
    "hybrid-125m": _larger(16, 12, head_size=64, sequences=64, micro_batch=32, steps=19_000),
    "hybrid-300m": _larger(24, 16, head_size=64, sequences=128, micro_batch=16, steps=23_000),
    "hybrid-1b": _larger(24, 16, head_size=128, sequences=256, micro_batch=16, steps=43_000),
    "small": Recipe(
        model=_small,
        order="epochs",
        optimizer=replace(_tuned.optimizer, learning_rate=2.4e-2, muon_weight_decay=0.7, beta1=0.8, warmup_steps=10),
        sequence_length=256,
        sequences_per_step=16,
        steps=600,
        micro_batch=16,
        save_every=100,
        evaluate_every=100,
        evaluate_tokens=16_384,
    ),
}
PRESETS = {name: replace(recipe, out=Path("runs") / name) for name, recipe in _recipes.items()}
"""`paper` is the paper's linear stagger at its rate; `hybrid` the project's own, tuned (the study's ladder): windows of
128 keys, and two full layers without rotary positions, bounded once trained; `dense` its rival, full attention and all
else the same. `five-minutes`, for a vocabulary of 8,192, is the best that was tried for five minutes of an H200. Those
with a size are larger, for days of a GPU; `small` is for a laptop, every third layer full, and tuned there."""

DEFAULT, ON_CPU = "hybrid", "small"
"""The recipe of who names none, with a GPU and without."""
