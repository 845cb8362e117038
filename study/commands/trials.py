"""What the verbs that train models in trial form share: their flags, and running them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fibattn.cli.flags import parse
from fibattn.errors import InputError, suggestion
from fibattn.progress import count
from fibattn.training.recipe import Recipe
from study.ladder import LADDER
from study.rivals import RIVALS

if TYPE_CHECKING:
    from study.trial import Candidate

AnyCandidate = TypeVar("AnyCandidate", bound="Candidate")


@dataclass(frozen=True)
class Arguments:
    """What all have."""

    data: Path
    """A folder made by `fibattn prepare`."""
    only: tuple[str, ...]
    """Names of candidates, with * and ? as in a shell, in the order in which they are to be run."""
    out: Path = Path("study/results")
    """Folder for the results of all studies."""
    work: Path | None = None
    """Where checkpoints lie until a run is measured; OUT/work when left out."""
    tokens: str = "106M"
    """Training tokens of each run."""
    eval_tokens: str = "524288"
    """Targets of each held-out set."""
    recipe: str | None = None
    """A step of the ladder, whose recipe the models are trained in; the rivals' when left out."""
    seeds: tuple[int, ...] = (42,)
    """Each seeds the weights and the order of the text of one run."""
    processes: int = 1
    """Processes side by side, spread over the GPUs."""


def run_verb(verb: str, about: str, table: Sequence[AnyCandidate], shown: str, arguments: list[str]) -> None:
    """Run the trials that were asked for of a table, alone or with several processes; exit status 1 when one failed.

    `about` and the names that are `shown` are the help.
    """
    given = parse(Arguments, arguments, f"python -m study {verb}", description=cleandoc(about) + shown)
    if given.processes < 1 or not (given.only and given.seeds):
        values = f"processes {given.processes}, only {list(given.only)}, seeds {list(given.seeds)}"
        raise InputError(f"{values}: give at least one of each")
    candidates, base = chosen(table, given.only), _base(given.recipe)
    if given.processes > 1:
        from study.processes import as_flags, side_by_side

        if side_by_side([verb, *as_flags(replace(given, processes=1))], given.processes):
            raise SystemExit(1)
        return
    from study.trial import Trials, run_trials

    failed = run_trials(
        Trials(
            verb=verb,
            candidates=candidates,
            data=given.data,
            out=given.out,
            work=given.work or given.out / "work",
            base=base,
            step=given.recipe,
            tokens=count(given.tokens),
            eval_tokens=count(given.eval_tokens),
            seeds=given.seeds,
        )
    )
    if failed:
        raise SystemExit(1)


def _base(step: str | None) -> Recipe:
    recipes = {one.name: one.recipe for one in LADDER}
    if step is not None and step not in recipes:
        raise InputError(f"no step of the ladder is named {step!r}: {suggestion(step, recipes, 'steps')}")
    return RIVALS.recipe if step is None else recipes[step]


def chosen(table: Sequence[AnyCandidate], patterns: Iterable[str]) -> tuple[AnyCandidate, ...]:
    """The candidates whose names match one of the shell-style `patterns`, in the order of the patterns.

    Raises:
        InputError: for a pattern that matches none.
    """
    found: dict[str, AnyCandidate] = {}
    for pattern in patterns:
        matches = [one for one in table if fnmatch(one.name, pattern)]
        if not matches:
            known = [one.name for one in table]
            raise InputError(f"no candidate is named {pattern!r}: {suggestion(pattern, known, 'candidates')}")
        found |= {one.name: one for one in matches}
    return tuple(found.values())
