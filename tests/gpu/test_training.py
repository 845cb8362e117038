"""Training on a GPU: a compiled run, whose steps are replayed as CUDA graphs, learns what a plain one does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import TrainingSequences
from fibattn.data.shards import write_shard
from fibattn.pattern import hybrid_layers
from fibattn.training.held_out import HeldOut
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import build_model
from fibattn.training.trainer import FibTrainer
from study.probes.recall import recall
from study.probes.retrieval import build, retrieval, set_width
from study.probes.settings import Recall, Retrieval

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
]

VOCABULARY, STEPS = 512, 40
SHAPE = ModelRecipe(hidden_size=128, intermediate_size=342, num_hidden_layers=3, num_attention_heads=4)


class Losses(TrainerCallback):
    """Keeps the loss of every step, and of every evaluation."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.held_out: list[float] = []

    def on_log(self, args, state, control, logs, **_) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])
        if "eval_loss" in logs:
            self.held_out.append(logs["eval_loss"])


def trained(recipe: Recipe, folder: Path, *, watched: bool = False) -> tuple[Losses, torch.Tensor]:
    """The losses of a run on a text that repeats itself at a distance, and its embedding at the end.

    `watched`: held out is the same text.
    """
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(2, VOCABULARY, 300), 100).astype(np.uint16)
    folder.mkdir()
    write_shard(folder / "train.bin", [tokens], np.ones(VOCABULARY, np.uint16), np.dtype(np.uint16), len(tokens), None)
    starts = rng.integers(0, len(tokens) - recipe.sequence_length - 1, recipe.steps * recipe.sequences_per_step)
    stream = TokenStream([folder / "train.bin"])
    sizes = np.ones(VOCABULARY, np.uint16)
    same = {"same": stream}
    held_out = HeldOut.choose(same, same, sizes, recipe.sequence_length, recipe.evaluate_tokens)
    trainer = FibTrainer(
        build_model(recipe, VOCABULARY, 0),
        replace(recipe, out=folder),
        TrainingSequences(stream, starts, recipe.sequence_length),
        held_out if watched else None,
    )
    trainer.args.save_strategy = "no"
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    return losses, trainer.model.model.embed_tokens.weight.detach().clone()  # pyright: ignore


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"schedule": "learned"}, {"window": 80, **hybrid_layers(3, full=(2,))}],
    ids=["stagger", "learned", "hybrid"],
)
def test_compiled_steps_learn_what_plain_ones_do(changes: dict, micro_batch: int, tmp_path: Path) -> None:
    recipe = Recipe(
        model=replace(SHAPE, **changes),
        optimizer=OptimizerRecipe(learning_rate=3e-3, warmup_steps=5),
        sequence_length=256,
        sequences_per_step=8,
        micro_batch=micro_batch,
        steps=STEPS,
        log_every=1,
    )
    # The graphs first: nothing that the kernels keep may come from a graph's memory.
    (compiled, embedding), (plain, same) = (
        trained(replace(recipe, compile=way), tmp_path / str(way)) for way in (True, False)
    )
    assert len(plain.values) == len(compiled.values) == STEPS
    assert plain.values[-1] < plain.values[0] - 1
    np.testing.assert_allclose(compiled.values, plain.values, atol=0.03)
    assert (same - embedding).norm() < 0.1 * embedding.norm()
    torch._dynamo.reset()


def test_evaluations_between_replayed_steps_leave_them_as_they_are(tmp_path: Path) -> None:
    """They take more sequences than a step, from the memory that the graphs do not own."""
    recipe = Recipe(
        model=replace(SHAPE, window=80, **hybrid_layers(3, full=(2,))),
        optimizer=OptimizerRecipe(learning_rate=3e-3, warmup_steps=5),
        sequence_length=256,
        sequences_per_step=8,
        micro_batch=8,
        steps=STEPS,
        log_every=1,
        evaluate_every=4,
        evaluate_tokens=21 * 256,
        compile=True,
    )
    watched, embedding = trained(recipe, tmp_path / "watched", watched=True)
    alone, same = trained(recipe, tmp_path / "alone")
    np.testing.assert_allclose(watched.values, alone.values, atol=0.01)
    assert (same - embedding).norm() < 0.1 * embedding.norm()
    assert len(watched.held_out) == STEPS // 4
    # The same text: after a step, its loss is between those of the steps before and after it, which fall fast.
    before, after = watched.values[3::4], [*watched.values[4::4], watched.values[-1]]
    assert all(low - 0.1 < found < high + 0.1 for low, found, high in zip(after, watched.held_out, before, strict=True))
    torch._dynamo.reset()


def probes() -> list[float]:
    """The losses of short probes: a stagger, a hybrid, and bands whose width shrinks from step to step."""
    options = {"length": 256, "window": 8, "layers": 2, "distances": (32,), "batch_tokens": 2048, "asked": 8}
    rows = recall(Recall(names=("stagger", "hybrid"), steps=30, seeds=(0,), **options))["rows"]
    copies = Retrieval(depths=(2,), starts=("staggered",), seeds=(0,), steps=30, batch=4, sequences=4)
    rows += retrieval(copies)["rows"][0]["runs"]
    return [row["loss"] for row in rows]


def test_compiled_probes_learn_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = probes()
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    np.testing.assert_allclose(compiled, probes(), rtol=0.01)
    torch._dynamo.reset()


def test_a_replayed_probe_sees_the_width_change() -> None:
    """A CUDA graph reads the width of the bands from where it was recorded."""
    model = build(2, "staggered", 0).cuda()  # pyright: ignore[reportArgumentType]
    compiled = torch.compile(model, mode="reduce-overhead")
    ids = torch.randint(0, 512, (2, 512), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    losses = []
    for width in (40.0, 40.0, 40.0, 0.5, 7.0):
        set_width(model, width)
        ours, right = (float(one(input_ids=ids, shift_labels=ids, use_cache=False).loss) for one in (compiled, model))
        assert abs(ours - right) < 2e-4
        losses.append(right)
    assert min(abs(losses[2] - losses[3]), abs(losses[3] - losses[4])) > 1e-3
    torch._dynamo.reset()
