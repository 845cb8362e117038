"""Trains and measures models in trial form, as the ladder's runs: same recipe, text, order and sets, a file a run.

What is tried stands in a table of its own, `far/candidates.py` or `parts/table.py`; a model of a recipe is
changed in place, so that nothing of a trial is in the library.
"""

import json
import shutil
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fibattn import files
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.evaluation.repeats import frequent_pairs
from fibattn.evaluation.sweep import shared_targets, sweep
from fibattn.lock import locked
from fibattn.model import FibAttnForCausalLM
from fibattn.training.recipe import ModelRecipe, Recipe
from fibattn.training.run import claim, model_config, sequences_of
from fibattn.training.trainer import FibTrainer
from study import measure
from study.lengthening import warmup
from study.probes.copying import copying, distances
from study.rivals import RIVALS
from study.runner import forget, say
from study.store import key_of, recipe_of
from study.turns import turn

FACTOR = 16
"""The longest sequences of the evaluation, in training lengths."""


class Candidate(Protocol):
    """What is tried: a frozen dataclass, whose fields are kept with the result."""

    @property
    def name(self) -> str:
        """Of its result file, too."""
        ...

    @property
    def about(self) -> str:
        """In words."""
        ...

    def like(self, recipe: Recipe, reach: int) -> Recipe:
        """`recipe` with what a configuration and an optimizer can say of it; sparse layers look back so far."""
        ...

    def keys(self, length: int, model: ModelRecipe) -> float:
        """What a sparse layer of `model` reads for a token `length` tokens into the text, in keys with their values."""
        ...

    def use(self, model: FibAttnForCausalLM, reach: int) -> None:
        """Make a fresh model of that recipe what is tried."""
        ...


@dataclass(frozen=True)
class Trials:
    """What is to be run, and where."""

    verb: str
    """Of `python -m study`, and the folder of the results in `out`."""
    candidates: tuple[Candidate, ...]
    data: Path
    out: Path
    work: Path
    base: Recipe = RIVALS.recipe
    """All but what is tried."""
    tokens: int = 106_000_000
    eval_tokens: int = 524_288
    seeds: tuple[int, ...] = (42,)
    step: str | None = None
    """Of the ladder, where `base` is its recipe and not the rivals'."""


def run_trials(trials: Trials) -> tuple[str, ...]:
    """Finish what is not finished yet; the names of those that failed. Several processes may share the folders.

    Raises:
        InputError: for data that are not whole, held-out sets too short for the longest sequences, and a budget below a
            step.
    """
    data, failed = PreparedData.open(trials.data), []
    if trials.tokens < (step := trials.base.sequences_per_step * trials.base.sequence_length):
        raise InputError(f"a budget of {trials.tokens} tokens is less than one step of {step:,}; give more")
    lengths = [trials.base.sequence_length * factor for factor in (1, FACTOR)]
    targets = shared_targets(data, lengths=lengths, sets=[], tokens=trials.eval_tokens)
    frequent = _frequent(trials, data, targets)
    for seed in trials.seeds:
        for candidate in trials.candidates:
            name = candidate.name + (f"-seed{seed}" if seed != 42 else "") + (f"@{trials.step}" if trials.step else "")
            result, base = trials.out / trials.verb / f"{name}.json", _base(trials, seed, name)
            recipe = candidate.like(base, base.sequence_length - 1)
            with locked(recipe.out.parent) as mine:
                if not mine or result.exists():
                    continue
                try:
                    found = _measured(trials, candidate, recipe, data, frequent)
                    about = {"candidate": candidate.name, "seed": seed, "step": trials.step}
                    about["base"] = key_of(base, data.fingerprint)
                    files.write_json(result, about | found)
                    shutil.rmtree(recipe.out)
                except Exception:
                    traceback.print_exc()
                    say(f"{name} failed")
                    failed.append(name)
                finally:
                    forget()
    return tuple(failed)


def _base(trials: Trials, seed: int, name: str) -> Recipe:
    """The recipe without what is tried."""
    base = trials.base
    steps = trials.tokens // (base.sequences_per_step * base.sequence_length)
    return replace(
        base,
        data=trials.data,
        out=trials.work / name / "run",
        model=replace(base.model, full_reach=None),
        optimizer=replace(base.optimizer, warmup_steps=warmup(base, steps)),
        steps=steps,
        init_seed=seed,
        data_seed=seed,
        compile=torch.cuda.is_available(),
        save_every=10**6,
        evaluate_every=None,
    )


def _measured(
    trials: Trials, candidate: Candidate, recipe: Recipe, data: PreparedData, frequent: np.ndarray
) -> dict[str, Any]:
    """Train and evaluate one; JSON values."""
    began, length = time.monotonic(), recipe.sequence_length
    say(f"{candidate.name}, seed {recipe.init_seed}: {candidate.about}")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        turns = stack.enter_context(turn(trials.work))
        model, inputs = _train(candidate, recipe, data, turns)
        trained, waited = time.monotonic(), sum(one.waited for one in turns)
        forget()
        how: dict[str, Any] = {"sets": [], "tokens": trials.eval_tokens, "quiet": True}
        trained_model = _fresh(candidate, recipe, data, None, like=model)
        evaluation = sweep(trained_model, data, lengths=[length, 2 * length], frequent=frequent, **how)["sets"]
        copied = copying(trained_model, distances(length))
        bounded = _fresh(candidate, recipe, data, length - 1, like=model)
        longer = sweep(bounded, data, lengths=[FACTOR * length], **how)["sets"]
    ended = time.monotonic()
    shape = recipe.resolved().model
    read, layers = candidate.keys(length, shape), len(shape.layer_types)
    full = shape.layer_types.count("full_attention")
    a_key = 4 * shape.num_key_value_heads * (shape.head_dim or shape.hidden_size // shape.num_attention_heads)
    found = {
        "about": candidate.about,
        "settings": asdict(candidate),  # pyright: ignore[reportArgumentType]
        "command": f"python -m study {trials.verb} --data DATA --tokens {trials.tokens} "
        f"--eval-tokens {trials.eval_tokens} --only {candidate.name} --seeds {recipe.init_seed}"
        + (f" --recipe {trials.step}" if trials.step else ""),
        "tokens": recipe.tokens,
        "trained_at": length,
        "recipe": recipe_of(recipe),
        "inputs": inputs,
        "hardware": measure.machine(),
        "versions": measure.versions(),
        "training": measure.training_summary(recipe.out),
        "seconds": {"training": trained - began - waited, "evaluation": ended - trained, "waiting": waited},
        "model": {
            "parameters": sum(one.numel() for one in model.parameters()),
            "keys": read,
            "full_layers": full,
            "bytes": a_key * (read * (layers - full) + length * full),
        },
        "evaluation": evaluation,
        "bounded": longer,
        "copying": copied,
    }
    short, long = (_perplexity(one) for one in (evaluation, longer))
    speed, back = found["training"]["tokens_per_second"], str(length // 4)
    say(
        f"{candidate.name}: perplexity {short:.2f}, {long:.2f} at {FACTOR} times; copied {copied.get(back, 0):.2f} "
        f"from {back} back; {speed / 1000:.0f} k tokens/s, {found['seconds']['training']:.0f} s and "
        f"{found['seconds']['evaluation']:.0f} s"
    )
    return found


def _train(candidate: Candidate, recipe: Recipe, data: PreparedData, turns: list[Any]) -> tuple[Any, dict[str, str]]:
    """The trained model, and what it was trained on."""
    shutil.rmtree(recipe.out, ignore_errors=True)
    order = recipe.out / "order.npy"
    sequences = sequences_of(recipe, data.train, data.fingerprint, order)
    inputs = {"data_fingerprint": data.fingerprint, "order_sha256": files.sha256(order)}
    claim(recipe, inputs)
    model = _fresh(candidate, recipe, data, None)
    FibTrainer(model, recipe, sequences).run(candidate.name, callbacks=turns)
    return model, inputs


def _fresh(
    candidate: Candidate, recipe: Recipe, data: PreparedData, full_reach: int | None, like: Any = None
) -> FibAttnForCausalLM:
    """A model of the candidate, with the weights of one that was trained where `like` is given, on its device."""
    config = model_config(recipe, data.vocab_size, data.separator)
    config.full_reach = full_reach if "full_attention" in (config.layer_types or []) else None
    torch.manual_seed(recipe.init_seed)
    model = FibAttnForCausalLM(config)
    candidate.use(model, recipe.sequence_length - 1)
    if like is not None:
        model.load_state_dict(like.state_dict())
        model.to(next(like.parameters()).device)
    return model


def _frequent(trials: Trials, data: PreparedData, targets: dict[str, int]) -> np.ndarray:
    """What `frequent_pairs` finds, kept in the working folder: it reads all of the training text."""
    about = json.dumps([data.fingerprint, targets])
    note, path = trials.work / "frequent.json", trials.work / "frequent.npy"
    trials.work.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text(encoding="utf-8") == about:
        return np.load(path)
    found = frequent_pairs(data, targets, quiet=True)
    staged = path.with_name(f".{time.monotonic_ns()}-frequent.npy")
    np.save(staged, found)
    staged.replace(path)
    files.write_text(note, about)
    return found


def _perplexity(sets: dict[str, Any]) -> float:
    """The geometric mean over the held-out sets."""
    return float(np.exp(np.mean([next(iter(lengths.values()))["nll"] for lengths in sets.values()])))
