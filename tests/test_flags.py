"""Flags that are given more than once: nothing that was typed is dropped without a word."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from fibattn.cli.flags import parse
from fibattn.cli.prepare import Arguments as Prepare
from fibattn.cli.prepare import plan_of
from fibattn.errors import InputError


@dataclass(frozen=True)
class Part:
    lengths: tuple[int, ...] = ()
    size: int = 1


@dataclass(frozen=True)
class Everything:
    what: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="WHAT")] = ()
    names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    numbers: tuple[float, ...] | None = None
    steps: int = 3
    fast: bool = False
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--names a --names b", Everything(names=("a", "b"))),
        ("--names a b --steps 5 --names=c --names d e", Everything(names=("a", "b", "c", "d", "e"), steps=5)),
        ("x --names=a y --names=b z", Everything(what=("x", "y", "z"), names=("a", "b"))),
        ("--numbers 1 -2 --fast --numbers -3.5", Everything(numbers=(1, -2, -3.5), fast=True)),
        ("--part.lengths 1 --part.size 2 --part.lengths 3 4", Everything(part=Part((1, 3, 4), 2))),
        ("--names a=b --names a=c=d --names=e=f", Everything(names=("a=b", "a=c=d", "e=f"))),
        ("--names a --names b -- x", Everything(what=("x",), names=("a", "b"))),
        ("x --names a b", Everything(what=("x",), names=("a", "b"))),
        ("--steps 4 --steps 5", Everything(steps=5)),
    ],
)
def test_all_values_of_a_flag_count(words: str, expected: Everything) -> None:
    assert parse(Everything, words.split(), "try") == expected


def test_two_held_out_sets_are_both_held_out(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name)
    words = ["out", *(f"{name}={tmp_path}/{name}.txt" for name in "ab")]
    words += ["--val", f"a={tmp_path}/c.txt", "--val", f"b={tmp_path}/d.txt"]
    plan = plan_of(parse(Prepare, words, "prepare"))
    assert {name: source.paths for name, source in plan.validation.items()} == {
        "a": (tmp_path / "c.txt",),
        "b": (tmp_path / "d.txt",),
    }


@pytest.mark.parametrize("flag", ["--val", "--weights", "--text", "--key"])
def test_one_name_with_two_values_is_refused(tmp_path: Path, flag: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    words = ["out", f"a={tmp_path}/a.txt", flag, "a=1", flag, "a=2"]
    with pytest.raises(InputError, match=f"{flag} gives 'a' twice: '1' and '2'; leave one out"):
        plan_of(parse(Prepare, words, "prepare"))
