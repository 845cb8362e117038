"""The ladder: from the paper's recipe at a tuned rate to the project's, a step at a time, as public speed-runs keep it.

What a step gave is in the study's tables. Steps that were dropped stay, so that nobody has to wonder. Steps that nobody
has run yet are here, too, and in no table.
"""

from dataclasses import dataclass, replace
from typing import Any

from fibattn.pattern import LayerType, hybrid_layers
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
    vocabulary: int | None = None
    """The size of the tokenizer that it is for; None for the study's own."""


def _step(
    steps: list[Step], name: str, change: str, since: str, kept: bool, vocabulary: int | None = None, **changes: Any
) -> None:
    """Add a step: `changes` are fields of the model, of the optimizer or of the recipe."""
    old = next(step.recipe for step in steps if step.name == since)
    model, optimizer = (
        {key: value for key, value in changes.items() if hasattr(part, key)} for part in (old.model, old.optimizer)
    )
    others = {key: value for key, value in changes.items() if key not in model and key not in optimizer}
    new = replace(old, model=replace(old.model, **model), optimizer=replace(old.optimizer, **optimizer), **others)
    steps.append(Step(name, change, since, kept, new, vocabulary))


_TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "warmup-30": ("30 steps of warm-up for 300", {"warmup_steps": 30}),
    "decay-3": ("a weight decay of 0.3 for 0.1 with Muon", {"muon_weight_decay": 0.3}),
    "decay-7": ("a weight decay of 0.7 with Muon", {"muon_weight_decay": 0.7}),
    "beta1-8": ("AdamW's mean over 5 steps for 10 (beta1 0.8)", {"beta1": 0.8}),
    "beta2-98": ("AdamW's second mean over 50 steps for 20 (beta2 0.98)", {"beta2": 0.98}),
    "muon-16": ("Muon at 1.6e-2", {"muon_learning_rate": 1.6e-2}),
    "hold": ("the highest rate for a quarter of the steps, then the fall", {"decay_fraction": 0.75}),
    "final-5": ("down to a twentieth of the highest rate, not to 0", {"final_fraction": 0.05}),
    "theta-200k": ("rotary positions with a base of 200,000", {"rope_theta": 200_000.0}),
    "skip": ("the embedding mixed into every layer's input", {"embedding_skip": True}),
    "stack": (
        "30 steps of warm-up, beta1 0.8, a weight decay of 0.7 with Muon, the embedding mixed in: all at once",
        {"warmup_steps": 30, "beta1": 0.8, "muon_weight_decay": 0.7, "embedding_skip": True},
    ),
    "groups-10": (
        "a KV head for each query head, a narrower feed-forward",
        {"num_key_value_heads": 10, "intermediate_size": 1792},
    ),
    "gates": ("gates for the heads", {"head_gates": True}),
    "eight": (
        "eight layers for ten, a seventh fewer parameters: for more text in the same time",
        {"num_hidden_layers": 8, **hybrid_layers(8, (3, 7), sparse="sliding_attention")},
    ),
    "epochs": ("whole passes over the text, not sequences drawn with replacement", {"order": "epochs"}),
}
"""Steps that change one thing in large steps: what is new, and the fields."""
_FEW: dict[str, tuple[str, dict[str, Any]]] = {
    "hold": (
        "the highest rate for a quarter of the steps, then down to a twentieth of it",
        {"decay_fraction": 0.75, "final_fraction": 0.05},
    ),
    "slow": ("rates lower by three tenths", {"learning_rate": 5.6e-3, "muon_learning_rate": 7.7e-3}),
}
"""Such steps in the recipe of five minutes with larger heads."""
_WINDOWS: dict[str, Any] = {"window": 127, **hybrid_layers(8, full=(7,), sparse="sliding_attention")}
"""Plain windows of 128 keys beside two full layers of 16."""
_TAKEN = ("beta1-8", "skip", "eight", "epochs")
"""Those that are in the recipe of five minutes, all at once."""


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
    _step(steps, "muon8", "Muon at 8e-3", "zero", True, muon_learning_rate=8e-3)
    swiglu = {"hidden_act": "silu", "gated_mlp": True, "intermediate_size": 1366}
    full = {"layer_types": ("full_attention",), "no_rope_layers": (1,)}
    change = "full attention in every layer"
    _step(steps, "dense8", change, "muon8", False, **full, window=ModelRecipe.window)
    batch = {"sequences_per_step": 64, "micro_batch": 64, "learning_rate": 4e-3, "muon_learning_rate": 1.1e-2}
    change = "64 sequences a step for 32, rates higher by a third"
    _step(steps, "batch", change, "muon8", True, **batch)
    _step(steps, "swiglu", "SwiGLU again", "zero", False, **swiglu)
    _step(steps, "skip", "the embedding mixed into every layer's input", "zero", False, embedding_skip=True)
    _step(steps, "dense", "full attention in every layer", "skip", False, **full)
    _reshape(steps)
    change = "AdamW at 6e-3, for the embedding and the norms"
    _step(steps, "embedding-6", change, "muon8", True, learning_rate=6e-3)
    _step(steps, "embedding-12", "AdamW at 1.2e-2", "muon8", False, learning_rate=1.2e-2)
    change = "the embedding mixed into every layer's input"
    _step(steps, "skip-6", change, "embedding-6", True, embedding_skip=True)
    _step(steps, "window-6", "plain windows of 128 keys for rungs", "skip-6", True, **_WINDOWS)
    change = "whole passes over the text, not sequences drawn with replacement: the default recipe"
    _step(steps, "epochs-6", change, "window-6", True, order="epochs")
    change = "full attention in every layer of the default recipe"
    _step(steps, "dense-6", change, "epochs-6", False, **full, window=ModelRecipe.window)
    _widen(steps, full)
    return tuple(steps)


def _shape(
    layers: int,
    heads: int,
    groups: int,
    inner: int,
    full: tuple[int, ...],
    sparse: LayerType = "fibonacci_attention",
) -> dict[str, Any]:
    """A model of so many layers and heads of 64, whose feed-forward has the width `inner`."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": 64 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        **hybrid_layers(layers, full, sparse=sparse),
    }


def _widen(steps: list[Step], full: dict[str, Any]) -> None:
    """Add steps whose windows are plain and wider, and what was tried on top of them."""
    change = "gates for the heads, and plain windows of 128 keys in place of rungs"
    _step(steps, "gates-window-6", change, "embedding-6", False, head_gates=True, **_WINDOWS)
    change = "full attention in every layer"
    _step(steps, "gates-dense-6", change, "gates-window-6", False, **full, window=ModelRecipe.window)
    window = {**_WINDOWS, **hybrid_layers(10, (4, 9), sparse="sliding_attention")}
    change = "plain windows of 128 keys, AdamW at 8e-3"
    _step(steps, "wide-window-64", change, "wide-64", True, learning_rate=8e-3, **window)
    for name, (change, fields) in _TURNS.items():
        _step(steps, f"wide-{name}-64", change, "wide-window-64", name in _TAKEN, **fields)
    _hasten(steps)


def _hasten(steps: list[Step]) -> None:
    """Add steps for five minutes: fewer layers, then a smaller vocabulary, and what was tried on top of each."""
    change = "the embedding mixed into every layer's input, AdamW's beta1 0.8, whole passes over the text"
    fields = {"embedding_skip": True, "beta1": 0.8, "order": "epochs"}
    _step(steps, "wide-eight-skip-64", change, "wide-eight-64", True, **fields)
    for decay in (0.3, 0.7):
        name = f"wide-eight-decay-{10 * decay:g}-64"
        change = f"a weight decay of {decay} for 0.1 with Muon"
        _step(steps, name, change, "wide-eight-skip-64", False, muon_weight_decay=decay)
    values = "embeddings of the values in every second layer"
    _step(steps, "wide-eight-values-64", values, "wide-eight-skip-64", False, value_embeddings=True)
    eight = _shape(8, 12, 3, 2944, (3, 7), sparse="sliding_attention")
    change = "vocabulary of 8,192, eight layers of 768 with 12 heads in 3 groups"
    _step(steps, "few-eight-64", change, "wide-eight-skip-64", True, 8192, **eight)
    change = f"{values}: as many parameters as at first"
    _step(steps, "few-eight-values-64", change, "few-eight-64", True, 8192, value_embeddings=True)
    change = "a KV head for each query head, a narrower feed-forward, a third more parameters"
    heads = {"num_key_value_heads": 12, "intermediate_size": 2560}
    _step(steps, "few-eight-heads-64", change, "few-eight-values-64", False, 8192, **heads)
    change = "a convolution of four over keys and values of the windows"
    _step(steps, "few-eight-heads-conv-64", change, "few-eight-heads-64", False, 8192, kv_convolution=4)
    change = "six heads of 128 for twelve of 64"
    six = {"num_attention_heads": 6, "num_key_value_heads": 6}
    _step(steps, "few-eight-six-64", change, "few-eight-heads-64", False, 8192, **six)
    for name, (change, fields) in _FEW.items():
        _step(steps, f"few-eight-six-{name}-64", change, "few-eight-six-64", False, 8192, **fields)


def _reshape(steps: list[Step]) -> None:
    """Add steps to other shapes, each as large as the others within 1 % unless it says otherwise."""
    wide, few = _shape(10, 10, 2, 2304, (4, 9)), {"vocabulary": 8192}
    change = "10 layers of 640, 10 heads in 2 groups"
    _step(steps, "wide", change, "muon8", False, **wide)
    _step(steps, "wide-64", change, "batch", True, **wide)
    narrow = _shape(10, 8, 2, 2432, (4, 9)) | {"hidden_size": 640, "head_dim": 64}
    change = "10 layers of 640, but 8 heads of 64 in 2 groups"
    _step(steps, "wide-8", change, "muon8", False, **narrow)
    _step(steps, "wide-8-64", change, "batch", False, **narrow)
    change = "vocabulary of 8,192, 16 layers of 576 with 9 heads in 3 groups"
    _step(steps, "few", change, "muon8", False, **few, **_shape(16, 9, 3, 2304, (7, 15)))
    change = "vocabulary of 8,192, 9 layers of 768 with 12 heads in 3 groups"
    wider = _shape(9, 12, 3, 2944, (4, 8))
    _step(steps, "few-wide", change, "muon8", False, **few, **wider)
    _step(steps, "few-wide-64", change, "batch", False, **few, **wider)
    change = "vocabulary of 8,192 and nothing else: a fifth fewer parameters"
    _step(steps, "few-small-64", change, "batch", False, **few)
    longer = {"sequence_length": 2048, "sequences_per_step": 32, "micro_batch": 32}
    change = "sequences of 2,048, half as many a step"
    _step(steps, "long", change, "muon8", False, **longer | {"sequences_per_step": 16, "micro_batch": 16})
    _step(steps, "long-64", "sequences of 2,048, 32 a step", "batch", False, **longer)
    _step(steps, "few-wide-long-64", "sequences of 2,048, 32 a step", "few-wide-64", False, **few, **longer)


LADDER = _climb()
MINUTES = tuple(step for step in LADDER if step.recipe.sequences_per_step * step.recipe.sequence_length == 65_536)
"""Those in large steps, for a budget of time; the last to be kept is the recipe of five minutes."""
