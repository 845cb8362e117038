"""What making a trained dense model sparse costs, and what healing gives back, by layers kept, their place and tokens.

Every row is one conversion and one part of the dense model's tokens, measured as the dense model is, in the first row.
"""

import math
import re
import statistics
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fibattn import files
from fibattn.data.prepared import PreparedData, TokensInMemory
from fibattn.data.sequences import TrainingSequences
from fibattn.errors import InputError
from fibattn.evaluation.placement import evenly_kept, search
from fibattn.evaluation.repeats import frequent_pairs
from fibattn.evaluation.sweep import shared_targets, sweep
from fibattn.model.conversion import convert
from fibattn.model.converted_pattern import layers_of
from fibattn.model.loading import find_model, load_bounded, load_model, model_name
from fibattn.pattern import Pattern
from fibattn.training.converting import load_source, load_tokenizer_of, write_folder
from fibattn.training.healing import heal
from fibattn.training.healing_recipe import HealingRecipe
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe
from fibattn.training.run import train
from study.presets import key_count
from study.probes.copying import copying
from study.probes.fit import Keep, device, rows_of
from study.probes.settings import Healing

_COPIED = (256, 512)
_FREE = ("data", "rows", "work", "learning_rate")
"""Settings that may differ where rows are added to a result."""
_PLACEMENTS = ("measured", "own", "evenly", "worst", "fresh")
_SHAPES = ("rungs", "window", "window-W", "blocks-W-N", "anchored-W-N")


@dataclass(frozen=True)
class _Row:
    """One of `Healing.rows`."""

    placement: str
    count: int
    shape: str
    part: float
    learning_rate: float | None
    """Of the healing, where there is one."""

    @classmethod
    def read(cls, text: str, learning_rate: float) -> "_Row":
        try:
            placement, count, shape, part = text.split(":")
            heals = placement != "fresh" and float(part) > 0
            row = cls(placement, int(count), shape, float(part), learning_rate if heals else None)
        except ValueError:
            row = None
        shaped = row is not None and re.fullmatch(r"rungs|window|window-\d+|(blocks|anchored)-\d+-\d+", row.shape)
        if row is None or not shaped or row.placement not in _PLACEMENTS or not 0 <= row.part <= 1:
            known = f"PLACEMENT ({', '.join(_PLACEMENTS)}), SHAPE ({', '.join(_SHAPES)}), PART from 0 to 1"
            raise InputError(f"{text!r} is no row; give PLACEMENT:COUNT:SHAPE:PART, as measured:4:rungs:0.02: {known}")
        return row

    def __str__(self) -> str:
        rate = f" at {self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.placement}:{self.count}:{self.shape}:{self.part:g}{rate}"


def healing(
    settings: Healing, *, earlier: dict[str, Any] | None = None, keep: Keep = lambda result: None
) -> dict[str, Any]:
    """Convert, heal and measure; the result is plain JSON values.

    A row has `layers` (those that stay full), their `placement`, the others' `shape` and `keys` (of a query), the
    `part` of the tokens, the healing's `learning_rate`, the `seconds` of the training, and what `_Measure` finds. The
    first is the dense model's. Of a row that fails the log says why, and the next one is begun.

    Raises:
        InputError: for a row that is none, a model that is not dense, data that are not its own, an earlier result with
            other settings, and in the end where rows failed.
    """
    wanted = [_Row.read(text, settings.learning_rate) for text in settings.rows]
    folder, data = find_model(settings.model), PreparedData.open(settings.data)
    about: dict[str, Any] = {"probe": "healing"}
    about |= {name: _plain(value) for name, value in vars(settings).items() if name not in _FREE}
    about |= {"model": model_name(folder.resolve())}
    tokens = _recipe_of(settings.model).tokens if settings.tokens is None else settings.tokens
    about |= {"tokens": tokens, "data_fingerprint": data.fingerprint}
    found = rows_of(earlier, about)
    result = about | {"rows": found} | {name: (earlier or {}).get(name) for name in ("search", "own")}
    measure = _Measure(settings, data, files.read_json(folder / "config.json")["max_position_embeddings"])
    _say("what is common to all rows is ready")
    if not found:
        found.append({"layers": "all", "placement": "", "shape": "dense", "keys": None, "part": 0.0} | measure(folder))
        keep(result)
    measure.dense = found[0]["sets"]
    done = {_known(row) for row in found}
    _search_all(wanted, settings, folder, measure, result)
    failed = []
    for row in wanted:
        if row in done:
            continue
        settings.work.mkdir(parents=True, exist_ok=True)
        try:
            with TemporaryDirectory(prefix="healing-", dir=settings.work) as work:  # all else there is the user's
                own = replace(settings, work=Path(work))
                found.append(_measured(row, own, folder, measure, result))
        except Exception:
            traceback.print_exc()
            failed.append(row)
            continue
        keep(result)
        _say(f"{row}: {', '.join(f'{name} {found[-1][name]:.2f}' for name in ('rise', 'worst', 'seconds'))}")
    if failed:
        raise InputError(f"{len(failed)} rows failed, {failed[0]} first; what was wrong is said above")
    return result


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} healing, {what}", flush=True)


def _recipe_of(model: Path) -> Recipe:
    recipe = model / "recipe.json"
    if not recipe.exists():
        raise InputError(f"{recipe} is missing, which says what the model was trained on; give its run, or --tokens")
    return load_recipe(str(recipe))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _known(row: dict[str, Any]) -> _Row:
    count = len(row["layers"].split(", "))
    return _Row(row["placement"], count, row["shape"], row["part"], row.get("learning_rate"))


def _pattern(settings: Healing, shape: str, config: Any) -> tuple[dict[str, Any], float]:
    """The arguments of `fibattn.convert`, and how many keys a query of a converted layer has."""
    trained_at = config.max_position_embeddings
    kind, *numbers = shape.split("-")
    if kind in ("blocks", "anchored"):
        window, blocks = map(int, numbers)
        given = {"window": window, "blocks": blocks, "block_anchor": kind == "anchored"}
        return given | {"block_reach": min(trained_at, 64 * 16) - 1}, window + 1 + 16 * blocks
    if numbers:
        return {"window": int(numbers[0]), "rungs": 0}, int(numbers[0]) + 1
    given = {"window": settings.window, "base": "fibonacci", "schedule": "linear", "rungs": 15}
    entry = {**given, "rung_reach": trained_at - 1, "max_offset": trained_at - 1, "keep_layers": [], "full_reach": None}
    keys = key_count([layer.pattern for layer in layers_of(config, entry) if isinstance(layer.pattern, Pattern)])
    if shape == "window":
        return {**given, "window": round(keys) - 1, "rungs": 0}, round(keys)
    return {**given, "max_offset": trained_at - 1}, keys


def _search_all(
    wanted: list[_Row], settings: Healing, folder: Path, measure: "_Measure", result: dict[str, Any]
) -> None:
    """One search for all rows, so that they differ in one thing, and one for each shape that is to have its own.

    The first layers of a longer search are those of a shorter.
    """
    shared = [row.count for row in wanted if row.placement not in ("evenly", "own")]
    if shared and len((result["search"] or {"search": []})["search"]) < max(shared):
        result["search"] = _search(settings, "rungs", folder, measure, max(shared))
    result["own"] = result["own"] or {}
    for shape in dict.fromkeys(row.shape for row in wanted if row.placement == "own"):
        most = max(row.count for row in wanted if (row.placement, row.shape) == ("own", shape))
        if len(result["own"].get(shape, {"search": []})["search"]) < most:
            result["own"][shape] = _search(settings, shape, folder, measure, most)


def _search(settings: Healing, shape: str, folder: Path, measure: "_Measure", count: int) -> dict[str, Any]:
    _say(f"the search for {count} layers beside {shape} begins")
    model: Any = load_source(str(folder))
    pattern = _pattern(settings, shape, model.config)[0]
    return search(model.to(device()), pattern, measure.text(settings.search_tokens), count)


def _layers(row: _Row, depth: int, result: dict[str, Any]) -> list[int]:
    """The layers that stay full."""
    if row.placement == "evenly":
        return evenly_kept(depth, row.count)
    found = result["own"][row.shape] if row.placement == "own" else result["search"]
    if row.placement == "worst":
        return sorted(sorted(range(depth), key=lambda layer: found["alone"][layer])[: row.count])
    return sorted(step["layer"] for step in found["search"][: row.count])


def _measured(
    row: _Row, settings: Healing, folder: Path, measure: "_Measure", result: dict[str, Any]
) -> dict[str, Any]:
    """Make the model of a row, and measure it."""
    _say(f"{row} begins")
    out = settings.work / "converted"
    model: Any = load_source(str(folder))
    layers = _layers(row, model.config.num_hidden_layers, result)
    pattern, keys = _pattern(settings, row.shape, model.config)
    tokens, began = round(row.part * result["tokens"]), time.monotonic()
    if row.placement == "fresh":
        made = train(_fresh(settings, pattern, layers, tokens))
    else:
        convert(model, **pattern, keep_layers=layers)
        write_folder(out, model, load_tokenizer_of(str(folder)), source=str(folder))
        made = heal(_healing(settings, out, tokens)) if row.part else out
    took = round(time.monotonic() - began, 1)
    about = {"layers": ", ".join(map(str, layers)), "placement": row.placement, "shape": row.shape, "keys": keys}
    about |= {"part": row.part, "learning_rate": row.learning_rate}
    return {**about, **measure(made), "seconds": took}


def _healing(settings: Healing, folder: Path, tokens: int) -> HealingRecipe:
    chosen = ("data", "learning_rate", "matching", "text_weight", "sequences_per_step")
    given = {name: getattr(settings, name) for name in chosen}
    return HealingRecipe(folder, tokens=tokens, micro_batch=settings.sequences_per_step, save_every=10**6, **given)


def _fresh(settings: Healing, pattern: dict[str, Any], layers: list[int], tokens: int) -> Recipe:
    """The dense model's recipe with a converted model's layers, for so many tokens."""
    dense = _recipe_of(settings.model)
    sparse = "fibonacci_attention" if pattern.get("rungs") else "sliding_attention"
    if "blocks" in pattern:
        sparse, pattern = "chosen_attention", pattern | {"block_rope": True}  # as a converted layer chooses
    kinds: Any = ["full_attention" if one in layers else sparse for one in range(dense.model.num_hidden_layers)]
    steps = max(1, tokens // (dense.sequence_length * dense.sequences_per_step))
    return replace(
        dense,
        data=settings.data,
        out=settings.work / "fresh",
        model=replace(dense.model, layer_types=tuple(kinds), **pattern),
        optimizer=replace(dense.optimizer, warmup_steps=min(dense.optimizer.warmup_steps, steps // 10)),
        steps=steps,
        compile=False,
        save_every=10**6,
        evaluate_every=None,
        track=(),
    )


class _Measure:
    """What is measured of every model, on the same text."""

    def __init__(self, settings: Healing, data: PreparedData, trained_at: int):
        self.data, self.trained_at = data, trained_at
        self.dense: list[dict[str, Any]] = []
        self.lengths = [factor * trained_at for factor in settings.factors]
        self.targets = shared_targets(data, lengths=self.lengths, sets=[], tokens=settings.eval_tokens)
        self.frequent = frequent_pairs(data, self.targets)

    def text(self, tokens: int) -> TrainingSequences:
        """Sequences of the ends of all held-out sets, as far from what is measured as may be."""
        step, parts, starts = self.trained_at, [], []
        for stream in self.data.validation.values():
            count = min(max(1, tokens // step // len(self.data.validation)), (len(stream) - 1) // step)
            starts.append(sum(map(len, parts)) + step * np.arange(count))
            parts.append(stream.sequence(len(stream) - count * step - 1, count * step + 1))
        return TrainingSequences(TokensInMemory(np.concatenate(parts)), np.concatenate(starts), step)

    def __call__(self, folder: Path) -> dict[str, Any]:
        """What a row says: geometric means over the sets, and in `sets` all that they are of.

        `perplexity` at the training length, its `rise` over the dense model's and that of the `worst` set in per cent,
        the perplexity at the longer lengths, bounded, that of `hits` (tokens that repeat an earlier pair), and the part
        of random tokens that is copied from so far back.
        """
        model, sets = load_model(folder), []
        self._sweep(model, self.lengths[:1], sets, frequent=self.frequent)
        copied = copying(model, _COPIED)
        if "full_attention" in (files.read_json(folder / "config.json").get("layer_types") or []):
            model = load_bounded(folder, self.trained_at - 1)
        self._sweep(model, self.lengths[1:], sets)
        self.dense = self.dense or sets
        near, right = (_at(one, self.trained_at) for one in (sets, self.dense))
        rises = [100 * (ours / dense - 1) for ours, dense in zip(near, right, strict=True)]
        mean = statistics.geometric_mean
        return {
            "perplexity": mean(near),
            "rise": 100 * (mean(near) / mean(right) - 1),
            "worst": max(rises),
            "far": {f"{length:,}": mean(_at(sets, length)) for length in self.lengths[1:]},
            "hits": mean([math.exp(row["hits"]["nll"]) for row in sets if "hits" in row]),
            "copied": {f"copied {distance}": right for distance, right in copied.items()},
            "sets": sets,
        }

    def _sweep(self, model: Any, lengths: list[int], into: list[dict[str, Any]], **how: Any) -> None:
        """Add a row for each held-out set and length."""
        for name, tokens in self.targets.items() if lengths else ():
            found = sweep(model, self.data, lengths=lengths, sets=[name], tokens=tokens, quiet=True, **how)["sets"]
            for length, row in found[name].items():
                kept = {"set": name, "length": int(length), "perplexity": row["perplexity"]}
                into.append(kept | {part: row["repeats"][part] for part in ("hits", "rest") if "repeats" in row})


def _at(sets: list[dict[str, Any]], length: int) -> list[float]:
    return [row["perplexity"] for row in sets if row["length"] == length]
