"""Results on disk: appended, cut short, damaged, and known again by what they are results of."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fibattn import InputError, files
from fibattn.pattern import hybrid_layers
from fibattn.training.presets import PRESETS
from fibattn.training.recipe import Recipe
from study.presets import STUDIES
from study.store import Store, key_of, trials


def record(name: str = "dense", **more: object) -> dict:
    return {"kind": "failure", "study": "smoke", "run": name, "key": "k", "time": "2026-01-01", "error": "e", **more}


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = [record(time="2026-01-02"), record(time="2026-01-01"), record("other", time="2026-01-03")]
    paths = [store.append(one) for one in written]
    assert paths[0] == paths[1] != paths[2]
    assert store.records() == [written[1], written[0], written[2]]


@pytest.mark.parametrize(
    "tail", ['{"kind": "run", "stu', '{"kind": "run", "recipe": {"model": {}}', json.dumps(record("x"))]
)
def test_a_line_cut_by_a_kill_is_passed_over_and_not_built_upon(tmp_path: Path, tail: str) -> None:
    store = Store(tmp_path)
    path = store.append(record())
    path.write_text(path.read_text() + tail)
    assert store.records() == [record()]
    store.append(record(time="2026-02-01"))
    assert store.records() == [record(), record(time="2026-02-01")]
    assert path.read_text().count("\n") == 2


def test_a_first_line_cut_by_a_kill_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.append(record())
    path.write_bytes(path.read_bytes()[:-1])
    assert store.records() == []
    store.append(record())
    assert store.records() == [record()]


@pytest.mark.parametrize(
    "line",
    [
        '{"a": 1}',
        "[]",
        "{nonsense}",
        '{"kind": "run", "key": "x", "time": "t"}',
        json.dumps(record(time=2026)),
        json.dumps({name: value for name, value in record().items() if name != "study"}),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = Store(tmp_path).append(record())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"dense\.jsonl, line 2 is not a result"):
        Store(tmp_path).records()


_NO_TRIAL = "not a result of `python -m study far`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", _NO_TRIAL),
        ("x", "not valid JSON"),
        ("[]", "a list, expected an object"),
        ('{"candidate": "best"}', _NO_TRIAL),
    ],
)
def test_a_damaged_trial_is_named(tmp_path: Path, text: str, message: str) -> None:
    files.write_text(tmp_path / "far" / "x.json", text)
    with pytest.raises(InputError, match=rf"x\.json is {message}"):
        trials(tmp_path, "far")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").finished() == {}
    with pytest.raises(InputError, match=r"none does not exist; give the folder that `python -m study run` wrote"):
        Store(tmp_path / "none").records()


def test_key_is_of_what_moves_the_result() -> None:
    recipe = Recipe()
    key = key_of(recipe, "data")
    for same in (replace(recipe, out=Path("x")), replace(recipe, save_every=7), replace(recipe, data=Path("y"))):
        assert key_of(same, "data") == key
    changed = replace(recipe, model=replace(recipe.model, window=13))
    others = {key_of(changed, "data"), key_of(replace(recipe, init_seed=1), "data"), key_of(recipe, "other")}
    assert len(others | {key}) == 4


def test_one_recipe_in_other_words_has_one_key() -> None:
    short = replace(PRESETS["hybrid"].model, max_offset="sequence", full_reach="sequence")
    layers = hybrid_layers(16, full=(7, 15), sparse="sliding_attention")
    long = replace(short, **layers, max_offset=1023, full_reach=1023)
    assert short != long
    one, other = (key_of(Recipe(model=shape), "data") for shape in (short, long))
    assert one == other


def test_the_published_results_have_the_keys_of_their_recipes() -> None:
    published = Store(Path(__file__).parents[1] / "results").finished()
    beyond = STUDIES["beyond"]
    recipes = [beyond.resolved(run, data=Path(), out=Path(), tokens=106_000_000, compiled=True) for run in beyond.runs]
    (data,) = {one["inputs"]["data_fingerprint"] for one in published.values() if one["study"] == "beyond"}
    assert {key_of(recipe, data) for recipe in recipes} <= set(published)
