"""What making a trained dense model sparse costs, and what healing gives back, by layers kept, their place and tokens.

Every row is one conversion and one part of the dense model's tokens, measured as the dense model is, in the first row.
"""

import itertools
import math
import shutil
import statistics
import time
from pathlib import Path
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
from fibattn.training.converting import load_source, load_tokenizer_of, write_folder
from fibattn.training.healing import heal
from fibattn.training.healing_recipe import HealingRecipe
from fibattn.training.recipe import load_recipe
from study.presets import key_count
from study.probes.copying import copying
from study.probes.fit import Keep, device, rows_of
from study.probes.settings import Healing, Placement, Shape

_COPIED = (256, 512)
_FREE = ("data", "parts", "counts", "placements", "shapes", "work")
"""Settings that may differ where rows are added to a result."""


def healing(
    settings: Healing, *, earlier: dict[str, Any] | None = None, keep: Keep = lambda result: None
) -> dict[str, Any]:
    """Convert, heal and measure; the result is plain JSON values.

    A row has `layers` (those that stay full), their `placement`, the others' `shape` and `keys` (of a query), the
    `part` of the tokens, the `seconds` of the healing, and what `_Measure` finds. The first is the dense model's.

    Raises:
        InputError: for a model that is not dense, data that are not its own, and an earlier result with other settings.
    """
    folder, data = find_model(settings.model), PreparedData.open(settings.data)
    about: dict[str, Any] = {"probe": "healing"}
    about |= {name: _plain(value) for name, value in vars(settings).items() if name not in _FREE}
    about |= {"model": model_name(folder.resolve())}
    about |= {"tokens": settings.tokens or _trained_on(settings.model), "data_fingerprint": data.fingerprint}
    found = rows_of(earlier, about)
    result = about | {"rows": found, "searches": (earlier or {}).get("searches", {})}
    measure = _Measure(settings, data, files.read_json(folder / "config.json")["max_position_embeddings"])
    measure.dense = found[0]["sets"] if found else []
    if not found:
        found.append({"layers": "all", "placement": "", "shape": "dense", "keys": None, "part": 0.0} | measure(folder))
        keep(result)
    done = {_known(row) for row in found}
    for count, part, placement, shape in itertools.product(
        settings.counts, settings.parts, settings.placements, settings.shapes
    ):
        if (count, part, placement, shape) in done:
            continue
        layers = _layers(placement, count, shape, settings, measure, folder, result["searches"])
        made, keys = _converted(folder, settings, shape, layers, measure.trained_at)
        began = time.monotonic()
        if part:
            made = heal(_recipe(settings, made, round(part * about["tokens"])))
        took = round(time.monotonic() - began, 1)
        row = {"layers": ", ".join(map(str, layers)), "placement": placement, "shape": shape, "keys": keys}
        found.append(row | {"part": part, **measure(made), "seconds": took})
        keep(result)
    shutil.rmtree(settings.work, ignore_errors=True)
    return result


def _trained_on(model: Path) -> int:
    recipe = model / "recipe.json"
    if not recipe.exists():
        raise InputError(f"{recipe} is missing, which says how many tokens the model was trained on; give --tokens")
    return load_recipe(str(recipe)).tokens


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _known(row: dict[str, Any]) -> tuple[Any, ...]:
    return len(row["layers"].split(", ")), row["part"], row["placement"], row["shape"]


def _pattern(settings: Healing, shape: Shape, config: Any) -> tuple[dict[str, Any], float]:
    """The arguments of `fibattn.convert`, and how many keys a query of a converted layer has."""
    trained_at = config.max_position_embeddings
    given = {"window": settings.window, "base": "fibonacci", "schedule": "linear", "rungs": 15}
    entry = {**given, "rung_reach": trained_at - 1, "max_offset": trained_at - 1, "keep_layers": [], "full_reach": None}
    keys = key_count([layer.pattern for layer in layers_of(config, entry) if layer.pattern])
    if shape == "window":
        return {"window": round(keys) - 1, "rungs": 0}, round(keys)
    return {**given, "max_offset": trained_at - 1}, keys


def _layers(
    placement: Placement,
    count: int,
    shape: Shape,
    settings: Healing,
    measure: "_Measure",
    folder: Path,
    searches: dict[str, Any],
) -> list[int]:
    """The layers that stay full; a search for as many is made once."""
    model: Any = load_source(str(folder), attn_implementation="sdpa")
    if placement == "evenly":
        return evenly_kept(model.config.num_hidden_layers, count)
    name = f"{shape}, {count}"
    if name not in searches:
        pattern = _pattern(settings, shape, model.config)[0]
        searches[name] = search(model.to(device()), pattern, measure.text(settings.search_tokens), count)
    if placement == "measured":
        return sorted(step["layer"] for step in searches[name]["search"])
    alone = searches[name]["alone"]
    return sorted(sorted(range(len(alone)), key=lambda layer: alone[layer])[:count])


def _converted(folder: Path, settings: Healing, shape: Shape, layers: list[int], trained_at: int) -> tuple[Path, float]:
    """The folder of the converted model, and its keys."""
    out = settings.work / "converted"
    for old in (out, settings.work / "converted-healed"):
        shutil.rmtree(old, ignore_errors=True)
    model = load_source(str(folder), attn_implementation="sdpa")
    pattern, keys = _pattern(settings, shape, model.config)
    convert(model, **pattern, keep_layers=layers)
    write_folder(out, model, load_tokenizer_of(str(folder)), source=str(folder))
    return out, keys


def _recipe(settings: Healing, folder: Path, tokens: int) -> HealingRecipe:
    chosen = ("data", "learning_rate", "matching", "text_weight", "sequences_per_step")
    given = {name: getattr(settings, name) for name in chosen}
    return HealingRecipe(folder, tokens=tokens, micro_batch=settings.sequences_per_step, save_every=10**6, **given)


class _Measure:
    """What is measured of every model, on the same text."""

    def __init__(self, settings: Healing, data: PreparedData, trained_at: int):
        self.data, self.trained_at, self.dense = data, trained_at, []
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
