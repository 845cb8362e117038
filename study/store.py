"""Results: append-only JSON Lines, one small file a run.

`RESULTS/STUDY/RUN.jsonl` has a line for every time the run was finished (`"kind": "run"`) or failed
(`"kind": "failure"`). A run is known by its key, a digest of its recipe and its data, so studies that share a
run share its result.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.errors import InputError
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import to_json

_ANY = {"key": str, "time": str, "study": str, "run": str}
_RUN = {
    **dict.fromkeys(("seed", "tokens", "trained_at"), int),
    **dict.fromkeys(("recipe", "inputs", "hardware", "versions", "training", "seconds", "model"), dict),
    **dict.fromkeys(("flops_per_token", "evaluation", "rope_scaling"), dict),
    "convention": str,
}
_FIELDS: dict[str, dict[str, type]] = {
    "run": {**_ANY, **_RUN},
    "failure": {**_ANY, "error": str},
}
"""What a line of each kind has at least."""

_HOUSEKEEPING = ("data", "out", "compile", "log_every", "save_every", "keep_checkpoints", "track", "micro_batch")
_HOUSEKEEPING += ("evaluate_every", "evaluate_tokens")

_FIRST = {
    *(
        "start",
        "model",
        "optimizer",
        "sequence_length",
        "sequences_per_step",
        "steps",
        "order",
        "init_seed",
        "data_seed",
    ),
    *("precision", "gradient_checkpointing", "parallel"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("layer_types", "no_rope_layers", "base", "schedule", "stagger_heads", "window", "rungs", "max_offset"),
    *("full_reach", "rope_theta"),
    *("learning_rate", "final_fraction", "warmup_steps", "beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm"),
}
"""The fields of a recipe and its parts that every result has."""


def recipe_of(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe moves the result, resolved, as JSON: without folders, logging and how the work is cut.

    Fields that are younger than the first results are left out at their defaults, so that those results stay known.
    """
    return _telling(to_json(recipe.resolved()), to_json(Recipe().resolved()))


def _telling(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _telling(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _HOUSEKEEPING and (name in _FIRST or value != defaults[name])
    }


def key_of(recipe: Recipe, data_fingerprint: str, stage: Recipe | None = None) -> str:
    """The digest by which a run of `recipe` on these data is known, or one that then went on by `stage`."""
    whole = recipe_of(recipe)
    return digest(whole if stage is None else whole | {"stage": recipe_of(stage)}, data_fingerprint)


def digest(recipe: dict[str, Any], data_fingerprint: str) -> str:
    """The same of what `recipe_of` gave."""
    text = json.dumps([recipe, data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def results(folder: Path, verb: str, is_one: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """What `python -m study VERB` wrote into `folder`, a file each, in the order of their names.

    Raises:
        InputError: for a file that is none.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        one = files.read_json(path)
        if not is_one(one):
            raise InputError(
                f"{path} is not a result of `python -m study {verb}`; move it out of the folder, or make it anew"
            )
        found.append(one)
    return found


def trials(folder: Path, verb: str) -> list[dict[str, Any]]:
    """The results of `python -m study VERB`, far or parts, in a results folder; raises as `results`."""
    return results(folder / verb, verb, lambda one: {"candidate", "seed", "evaluation", "training"} <= one.keys())


@dataclass(frozen=True)
class Store:
    """The results in one folder."""

    folder: Path

    def append(self, record: dict[str, Any]) -> Path:
        """Add one line to the file of `record["study"]` and `record["run"]`, in place of one that a kill cut short."""
        path = self.folder / record["study"] / f"{record['run']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return path

    def records(self) -> list[dict[str, Any]]:
        """All lines of all files, oldest first; a last line without its end was cut short by a kill, and is none.

        Raises:
            InputError: when the folder does not exist, or a whole line is not a result.
        """
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} does not exist; give the folder that `python -m study run` wrote")
        found = [record for path in sorted(self.folder.glob("*/*.jsonl")) for record in _read(path)]
        return sorted(found, key=lambda record: record["time"])

    def runs(self) -> list[dict[str, Any]]:
        """All results of finished runs, oldest first."""
        return [record for record in self.records() if record["kind"] == "run"] if self.folder.is_dir() else []

    def finished(self, lengths: Iterable[int] = ()) -> dict[str, dict[str, Any]]:
        """The newest result of every finished run, by key, of those that were evaluated at all of `lengths`."""
        wanted = set(map(str, lengths))
        return {
            one["key"]: one for one in self.runs() if all(wanted <= set(sets) for sets in one["evaluation"].values())
        }

    def failed(self) -> set[str]:
        """The keys of runs that failed once, finished since or not."""
        if not self.folder.is_dir():
            return set()
        return {record["key"] for record in self.records() if record["kind"] == "failure"}


LENGTHENED = "lengthened "


def ways(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The other evaluations of a finished model, by name.

    RoPE stretched (`yarn`, `linear`), full layers bounded to so many tokens (`1024`), or a copy trained on in sequences
    of so many (`lengthened 16384`). Results of earlier versions lack the last two.
    """
    longer = {f"{LENGTHENED}{length}": sets for length, sets in record.get("lengthened", {}).items()}
    return record["rope_scaling"] | record.get("bounded", {}) | longer


def over_sets(
    record: dict[str, Any], what: str, sets: dict[str, Any] | None = None, length: int | None = None
) -> float:
    """The mean over the held-out sets of what was measured, such as `nll`.

    Of the plain model at the training length, where no other `sets` (such as bounded ones) and `length` are given.
    """
    chosen, at = sets or record["evaluation"], str(length or record["trained_at"])
    return statistics.mean(lengths[at][what] for lengths in chosen.values())


def _read(path: Path) -> Iterator[dict[str, Any]]:
    *whole, _cut = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            wrong = [name for name, kind in _FIELDS[record["kind"]].items() if not isinstance(record[name], kind)]
            if wrong:
                raise TypeError(f"{wrong[0]} is {record[wrong[0]]!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is not a result ({error!r}); restore the file") from None
        yield record
