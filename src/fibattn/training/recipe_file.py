"""Recipes as JSON: a run writes its own as `recipe.json`, and `fibattn train recipe.json` does that run again."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fibattn import files
from fibattn.errors import InputError, suggestion
from fibattn.training.presets import PRESETS
from fibattn.training.recipe import Recipe


def load_recipe(name: str) -> Recipe:
    """A preset by name, or a recipe from a JSON file.

    Raises:
        InputError: for an unknown name, or a file with a misspelt key or a value of the wrong kind.
    """
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).suffix == ".json":
        return _from_json(Recipe, files.read_json(Path(name)), name)
    raise InputError(f"unknown recipe {name!r}: {suggestion(name, PRESETS, 'presets')} (a file of yours ends in .json)")


def to_json(recipe: Any) -> Any:
    """A recipe, or a part of one, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))  # paths are the only other kind of value


_DROPPED = {"cautious_decay": False}  # what recipes once had, at the value at which it said nothing


def _from_json(kind: type, value: Any, where: str) -> Any:
    """Build the dataclass `kind` from JSON, checking every key and value; `where` names the place in messages."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_shown(value)}; expected an object with keys")
    hints = get_type_hints(kind)
    value = {key: one for key, one in value.items() if key in hints or (key, one) not in _DROPPED.items()}
    for key in value:
        if key not in hints:
            raise InputError(f"{where} has an unknown key {key!r}: {suggestion(key, hints, 'keys')}")
    return kind(**{key: _value(hints[key], one, f"{where}: {key}") for key, one in value.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _from_json(kind, value, where)  # pyright: ignore[reportArgumentType]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], one, where) for one in value)
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            with contextlib.suppress(InputError):
                return _value(one, value, where)
    elif get_origin(kind) is Literal:
        if any(value == one and type(value) is type(one) for one in get_args(kind)):
            return value
    elif kind is float and type(value) in (int, float) and abs(value) < _HUGE:
        return float(value)
    elif kind is int and type(value) is int and abs(value) < _HUGE:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind in (bool, NoneType) and type(value) is kind:
        return value
    raise InputError(f"{where} is {_shown(value)}; expected {_expected(kind)}")


_HUGE = 1 << 63
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", Path: "a path"}


def _expected(kind: Any) -> str:
    """What a value of the type `kind` is, in words."""
    if get_origin(kind) is tuple:
        return f"a list, each {_expected(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        *others, last = map(_expected, get_args(kind))
        return f"{', '.join(others)} or {last}"
    return _WORDS[kind] + (" below 2**63" if kind in (int, float) else "")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
