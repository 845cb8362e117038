"""`python -m study far`: candidates of far reading, trained and measured."""

from dataclasses import dataclass, replace
from inspect import cleandoc
from pathlib import Path

from fibattn.cli.flags import parse
from fibattn.cli.prepare import count
from study.far.candidates import CANDIDATES, chosen


@dataclass(frozen=True)
class Arguments:
    """Train the default recipe with other sparse layers, and write a file for each run into OUT/far.

    What is finished is skipped. With several processes a GPU they take turns. The candidates; all but dense also with
    "-beside", beside two full layers:
    """

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
    seeds: tuple[int, ...] = (42,)
    """Each seeds the weights and the order of the text of one run."""
    processes: int = 1
    """Processes side by side, spread over the GPUs."""


def run(arguments: list[str]) -> None:
    """Run the trials, alone or with several processes; the exit status is 1 when one failed."""
    names = "".join(f"\n  {one.name:<16}{one.about}" for one in CANDIDATES if not one.name.endswith("-beside"))
    given = parse(Arguments, arguments, "python -m study far", description=cleandoc(Arguments.__doc__ or "") + names)
    candidates = chosen(given.only)
    if given.processes > 1:
        from study.processes import side_by_side

        if side_by_side(as_flags(replace(given, processes=1)), given.processes):
            raise SystemExit(1)
        return
    from study.far.trial import Trials, run_trials

    failed = run_trials(
        Trials(
            candidates=candidates,
            data=given.data,
            out=given.out,
            work=given.work or given.out / "work",
            tokens=count(given.tokens),
            eval_tokens=count(given.eval_tokens),
            seeds=given.seeds,
        )
    )
    if failed:
        raise SystemExit(1)


def as_flags(given: Arguments) -> list[str]:
    """The command line that gives these arguments."""
    words = ["far", "--data", str(given.data), "--only", *given.only, "--out", str(given.out)]
    words += ["--work", str(given.work)] if given.work else []
    words += ["--tokens", given.tokens, "--eval-tokens", given.eval_tokens]
    return [*words, "--seeds", *map(str, given.seeds), "--processes", str(given.processes)]
