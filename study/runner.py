"""Runs a study: trains what is missing, evaluates it at once, writes one line of results, and goes on.

Several processes may work on one folder: a run belongs to whoever holds the lock on its working folder, and
the system gives the lock back when that process ends, however it ends.
"""

import gc
import shutil
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fibattn import files
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.progress import duration, quantity
from fibattn.training.recipe import Recipe
from fibattn.training.run import train
from study import measure
from study.presets import Run, Study
from study.same_bytes import targets_of
from study.store import Store, recipe_of
from study.turns import turn


@dataclass(frozen=True)
class Job:
    """A study to run, and where."""

    name: str
    study: Study
    data: Path
    out: Path
    work: Path
    """Where checkpoints and models lie until a run is evaluated."""
    tokens: int | None = None
    seconds: float | None = None
    """Of training, in place of `tokens`."""
    only: tuple[str, ...] = ()
    shard: tuple[int, int] = (0, 1)
    """Take every n-th run from the i-th on, for machines that share no folder."""
    deadline: float | None = None
    """No run begins that would end after this, in seconds of `time.monotonic`."""
    keep_models: bool = False
    like: Path | None = None
    """The same text in another tokenizer: evaluated are the bytes of so many of its tokens, not of the own ones."""


@dataclass(frozen=True)
class Outcome:
    """What became of the runs: their names."""

    finished: tuple[str, ...]
    failed: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    """What runs are trained and evaluated on."""

    data: PreparedData
    targets: dict[str, int]
    """Of each held-out set."""
    like: str | None
    """The fingerprint of the text whose bytes they are."""


@dataclass(frozen=True)
class _Task:
    run: Run
    recipe: Recipe
    key: str


def run_study(job: Job) -> Outcome:
    """Finish as much of the study as there is time for; a run that fails is noted, and the rest goes on.

    Runs that failed before come last.

    Raises:
        InputError: for data that are not whole, a held-out set too short for the longest sequences, a pattern that
            names no run, a run for another vocabulary or too small a budget.
    """
    store, data, study = Store(job.out), PreparedData.open(job.data), job.study
    tasks = _tasks(job, data, store)
    asked = [factor * study.recipe.sequence_length for factor in study.factors]
    lengths = sorted({*asked, *(task.recipe.sequence_length for task in tasks)})
    like = None if job.like is None else PreparedData.open(job.like)
    text = _Text(data, targets_of(data, like, lengths, study.eval_tokens), like and like.fingerprint)
    known = store.finished(asked)
    say(f"study {job.name}: {len(tasks)} runs, {sum(task.key in known for task in tasks)} finished already")
    earlier = {task.run.name: known[task.key]["evaluation"] for task in tasks if task.key in known}
    others = [name for name, sets in earlier.items() if measure.swept_targets(sets) != text.targets]
    if others:
        say(f"evaluated over other numbers of targets before, and left so: {', '.join(others)}")
    failed: list[str] = []
    before = store.failed()
    for task in sorted(tasks, key=lambda task: task.key in before):
        if task.key in store.finished(asked):
            _clear_leftovers(job, task)
            continue
        if not _fits(job, task, store):
            say(f"{task.run.name}: not enough time left, stopping here")
            break
        with locked(task.recipe.out) as mine:
            if not mine or task.key in store.finished(asked):
                say(f"{task.run.name}: another process has {'finished it' if mine else 'it'}")
                continue
            if not _attempt(job, task, text, store):
                failed.append(task.run.name)
                if not _device_works():
                    say("the GPU does not answer any more; the same command in a new process goes on from here")
                    break
        _say_progress(tasks, store.finished(asked))
    done = store.finished(asked)
    return Outcome(
        finished=tuple(task.run.name for task in tasks if task.key in done),
        failed=tuple(failed),
        left=tuple(task.run.name for task in tasks if task.key not in done and task.run.name not in failed),
    )


def say(text: str) -> None:
    """A line for whoever watches, with the time of day."""
    print(f"{datetime.now().astimezone():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def _tasks(job: Job, data: PreparedData, store: Store) -> list[_Task]:
    index, count = job.shard
    tasks = []
    chosen = [run for run in job.study.chosen(job.only) if job.only or run.vocabulary in (None, data.vocab_size)]
    for run in chosen[index::count]:
        if run.vocabulary not in (None, data.vocab_size):
            raise InputError(
                f"{run.name} is for a vocabulary of {run.vocabulary:,}, and {job.data} has {data.vocab_size:,} ids; "
                f"make its data with `fibattn prepare … --vocab-size {run.vocabulary}`, and add --like {job.data}"
            )
        compiled, tokens = torch.cuda.is_available(), job.tokens
        if job.seconds is not None:
            whole = job.study.resolved(run, data=job.data, out=job.work, tokens=None, compiled=compiled)
            tokens = int(job.seconds * _pace(run.name, whole, store))
        recipe = job.study.resolved(run, data=job.data, out=job.work, tokens=tokens, compiled=compiled)
        recipe.check()
        key = job.study.key(run, recipe, data.fingerprint)
        tasks.append(_Task(run, replace(recipe, out=job.work / f"{run.name}-{key}"), key))
    return tasks


def _pace(name: str, recipe: Recipe, store: Store) -> float:
    """Training tokens a second of the first finished run of `recipe` on such a device, whatever its budget and seed.

    The first, so that the same command always means the same run.

    Raises:
        InputError: where there is none.
    """
    device, wanted = measure.machine()["device"], _but_for_budget(recipe_of(recipe))
    for one in store.runs():
        alone = one["training"].get("alone") and one["hardware"]["device"] == device
        if alone and _but_for_budget(one["recipe"]) == wanted:
            return one["training"]["tokens_per_second"]
    raise InputError(
        f"how many tokens {name} trains on in a second of {device} is not known; run it for a while first, with "
        "--tokens in place of --seconds"
    )


def _but_for_budget(recipe: dict[str, Any]) -> dict[str, Any]:
    optimizer = {name: value for name, value in recipe["optimizer"].items() if name != "warmup_steps"}
    return recipe | {"optimizer": optimizer} | dict.fromkeys(("steps", "init_seed", "data_seed"))


def _attempt(job: Job, task: _Task, text: _Text, store: Store) -> bool:
    """Do one run and write its line; whether it came to its end."""
    about = {"study": job.name, "run": task.run.name, "key": task.key, "seed": task.run.seed}
    say(f"{task.run.name}: {quantity(task.recipe.tokens)} tokens")
    try:
        result = _measured(job, task, text)
    except Exception as error:
        traceback.print_exc()
        say(f"{task.run.name} failed: {error}")
        store.append({"kind": "failure", **about, "time": _now(), "error": _told(error)})
        return False
    finally:
        forget()
    store.append({"kind": "run", **about, "time": _now(), **result})
    _clear(task.recipe.out, job.keep_models)
    return True


def _measured(job: Job, task: _Task, text: _Text) -> dict[str, Any]:
    started, folder = time.monotonic(), task.recipe.out
    resumed = (folder / "recipe.json").exists()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with turn(job.work) as turns:
        model = train(task.recipe, turns)
        for one in turns:
            one.take()  # a model that was finished before has taken no step, and a short one too few
        forget()
        waited = sum(one.waited for one in turns)
        trained = time.monotonic()
        training = measure.training_summary(folder)
        evaluated = _evaluated(job.study, task, model, text)
    ended = time.monotonic()
    losses = ", ".join(
        f"{which} {next(iter(lengths.values()))['perplexity']:.2f}"
        for which, lengths in evaluated["evaluation"].items()
    )
    seconds = {"training": trained - started - waited, "evaluation": ended - trained, "all": ended - started - waited}
    took = f"trained in {duration(seconds['training'])}, evaluated in {duration(seconds['evaluation'])}"
    say(f"{task.run.name}: {took}; {losses}")
    return {
        "tokens": task.recipe.tokens,
        "trained_at": task.recipe.sequence_length,
        "recipe": recipe_of(task.recipe),
        "compiled": task.recipe.compile,
        "inputs": files.read_json(folder / "inputs.json"),
        "like": text.like,
        "hardware": measure.machine(),
        "versions": measure.versions(),
        "training": training,
        "seconds": seconds | {"waiting": waited},
        "resumed": resumed,
        **evaluated,
    }


def _evaluated(study: Study, task: _Task, model: Path, text: _Text) -> dict[str, Any]:
    run, data = task.run, text.data
    measured = measure.evaluate(model, data, study, text.targets)
    plain, longest = measured["evaluation"], max(study.factors)
    bounds = [n * task.recipe.sequence_length for n in run.bounds]
    bounds = [bound for bound in bounds if bound < longest * study.recipe.sequence_length]
    found = {
        **measured,
        "rope_scaling": {kind: measure.evaluate_stretched(model, data, kind, plain) for kind in run.rope_scaling},
        "bounded": {str(n): measure.evaluate_bounded(model, data, n, plain) for n in bounds},
        "lengthened": {},
    }
    return found | (_lengthened(run.lengthening.of(task.recipe, longest), task, data, plain) if run.lengthening else {})


def _lengthened(recipe: Recipe, task: _Task, data: PreparedData, plain: dict[str, Any]) -> dict[str, Any]:
    """The sweep `plain` with a copy of the finished model, trained on by `recipe`, and bounded to what it then saw.

    None where that fails, for the rest is done. A run that is not bounded before has no layer to bound.
    """
    length = recipe.sequence_length
    try:
        longer = train(recipe)
        forget()
        found = {str(length): measure.evaluate_lengthened(longer, data, plain)}
        past = max(map(int, next(iter(plain.values())))) > length
        bounded = (
            {str(length): measure.evaluate_bounded(longer, data, length, plain)} if past and task.run.bounds else {}
        )
    except Exception as error:
        traceback.print_exc()
        say(f"{recipe.out.parent.name}: training on at {length} failed, the rest is kept: {error}")
        return {"lengthened": {}, "lengthened_error": _told(error)}
    return {
        "lengthened": found,
        "lengthened_bounded": bounded,
        "lengthened_training": measure.training_summary(recipe.out),
        "lengthened_recipe": recipe_of(recipe) | {"start": task.key},
    }


def _fits(job: Job, task: _Task, store: Store) -> bool:
    """Whether the run would end in time, judged by the slowest of the last three on such a device, token for token.

    Older ones may have had slower code or a busier machine. What is lengthened is judged by its like where there is
    one. On a shared GPU every other process may be first.
    """
    if job.deadline is None:
        return True
    here = measure.machine()
    before = [
        one
        for one in sorted(store.finished().values(), key=lambda one: one["time"])
        if not one["resumed"] and all(one["hardware"].get(what) == here[what] for what in ("device", "processes_a_gpu"))
    ]
    alike = [one for one in before if bool(one.get("lengthened")) == bool(task.run.lengthening)] or before
    pace = max((one["seconds"]["all"] / one["tokens"] for one in alike[-3:]), default=0.0)
    return job.deadline - time.monotonic() > (here["processes_a_gpu"] or 1) * pace * task.recipe.tokens


def _say_progress(tasks: list[_Task], done: dict[str, dict[str, Any]]) -> None:
    finished = [done[task.key] for task in tasks if task.key in done]
    text, left = f"{len(finished)} of {len(tasks)} runs finished", len(tasks) - len(finished)
    whole = [one["seconds"]["all"] for one in finished if not one["resumed"]]  # others count from where they went on
    if whole and left:
        text += f", about {duration(statistics.mean(whole) * left)} of work left"
    say(text)


def forget() -> None:
    """Let go of the last model, its compiled code and its memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available() and _device_works():
        torch.cuda.empty_cache()


def _device_works() -> bool:
    """False after an error that leaves the process's GPU unusable."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _clear(folder: Path, keep_model: bool) -> None:
    """Remove a run's working folder, or all of it but the model and what made it."""
    if not keep_model:
        shutil.rmtree(folder)
        return
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _clear_leftovers(job: Job, task: _Task) -> None:
    """Clear what a kill left of a finished run; a model that was kept on purpose has no checkpoints beside it."""
    if task.recipe.out.exists():
        with locked(task.recipe.out) as mine:  # whoever else has it may be clearing it at this moment
            if mine and any(task.recipe.out.rglob("checkpoint-*")):
                _clear(task.recipe.out, job.keep_models)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
