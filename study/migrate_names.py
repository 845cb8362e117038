"""Rewrites results that were made under the recipes' earlier field names; every measured value stays as it is.

python -m study.migrate_names study/results
"""

import json
import sys
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from study.store import key_of, recipe_of

_TOP = {"length": "sequence_length", "windows_per_step": "sequences_per_step"}
_OPTIMIZER = {"peak_rate": "learning_rate", "clip_norm": "max_grad_norm"}
_GONE = ("attention", "full_layers", "full_layers_rope", "clip_offsets", "bound_full_layers")


def model(old: dict[str, Any]) -> ModelRecipe:
    """The model's part of a recipe."""
    depth, full = old["num_hidden_layers"], old["full_layers"]
    kinds = [f"{'full' if layer in full else old['attention']}_attention" for layer in range(depth)]
    rotated = [int(old["full_layers_rope"] or layer not in full) for layer in range(depth)]
    return ModelRecipe(
        **{name: value for name, value in old.items() if name not in _GONE},
        layer_types=tuple(kinds),  # pyright: ignore[reportArgumentType]
        no_rope_layers=tuple(rotated),  # pyright: ignore[reportArgumentType]
        max_offset="sequence" if old["clip_offsets"] else None,
        full_reach="sequence" if old.get("bound_full_layers") else None,
    )


def recipe(old: dict[str, Any]) -> Recipe:
    """A recipe as `recipe_of` left it, but for its start."""
    parts = ("model", "optimizer", "start")
    rest: dict[str, Any] = {_TOP.get(name, name): value for name, value in old.items() if name not in parts}
    optimizer: dict[str, Any] = {_OPTIMIZER.get(name, name): value for name, value in old["optimizer"].items()}
    return Recipe(**rest, model=model(old["model"]), optimizer=OptimizerRecipe(**optimizer))


def record(old: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """One line of a results file; `keys` has the new key for each old one."""
    if old["kind"] != "run":
        return old | {"key": keys.get(old["key"], old["key"])}
    assert old["recipe"].get("start") is None, old["key"]
    new = old | {"recipe": recipe_of(recipe(old["recipe"])), "key": keys[old["key"]]}
    if "lengthened_recipe" in old:
        longer, start = recipe(old["lengthened_recipe"]), keys[old["lengthened_recipe"]["start"]]
        new["lengthened_recipe"] = recipe_of(longer) | {"start": start}
    return new


def check(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Nothing but recipes and keys may differ, and a recipe must say the same in other words."""
    assert list(old) == list(new)
    for name, value in old.items():
        if name not in ("recipe", "lengthened_recipe", "key"):
            assert json.dumps(value) == json.dumps(new[name]), name
    for name in ("recipe", "lengthened_recipe"):
        if name in old:
            assert back(new[name]) == {"start": None} | old[name] | {"start": new[name]["start"]}, name


def back(new: dict[str, Any]) -> dict[str, Any]:
    """A new recipe under the earlier names."""
    shape = dict(new["model"])
    kinds, rotated = shape.pop("layer_types"), shape.pop("no_rope_layers")
    offset, bound = shape.pop("max_offset"), shape.pop("full_reach")
    assert bound is None
    assert offset in (None, new["sequence_length"] - 1)
    sparse = [kind for kind in kinds if kind != "full_attention"]
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention" and sparse]
    shape |= {
        "attention": (sparse or kinds)[0].removesuffix("_attention"),
        "clip_offsets": offset is not None,
        "full_layers": full,
        "full_layers_rope": all(rotated),
    }
    names = {new: old for old, new in (*_TOP.items(), *_OPTIMIZER.items())}
    optimizer = {names.get(name, name): value for name, value in new["optimizer"].items()}
    rest = {names.get(name, name): value for name, value in new.items()}
    return rest | {"model": shape, "optimizer": optimizer}


def old_key(line: dict[str, Any]) -> dict[str, Any]:
    """A line whose recipe lacks nothing that recipes had in the end."""
    if line["kind"] == "run":
        line["recipe"]["model"].pop("bound_full_layers", None)
    return line


def migrate(folder: Path) -> None:
    """Rewrite all results in `folder`."""
    paths = sorted(folder.glob("*/*.jsonl"))
    lines = {path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths}
    runs = [one for found in lines.values() for one in found if one["kind"] == "run"]
    for one in runs:
        assert not one["recipe"]["model"].get("bound_full_layers")
    keys = {one["key"]: key_of(recipe(one["recipe"]), one["inputs"]["data_fingerprint"]) for one in runs}
    for path, found in lines.items():
        new = [record(one, keys) for one in found]
        for one, other in zip(found, new, strict=True):
            check(old_key(one), other)
        files.write_text(path, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in new))
    print(f"{len(runs)} runs under {len(set(keys.values()))} keys, {len(keys)} before")


if __name__ == "__main__":
    migrate(Path(sys.argv[1]))
