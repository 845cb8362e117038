"""`python -m study run NAME`: a matrix of training runs, evaluated, with its results and its report."""

import os
import time
from dataclasses import dataclass, replace
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import tyro

from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.progress import count
from study.presets import STUDIES, Study, find_study

STARTED = time.monotonic()


@dataclass(frozen=True)
class Arguments:
    """Train and evaluate every run of a study that is not finished yet, and write the report.

    Results are small files in OUT/NAME; run it again to go on. The studies:
    """

    name: Annotated[str, tyro.conf.Positional]
    """Which study."""
    data: Path | None = None
    """A folder made by `fibattn prepare`; smoke makes its own from the standard library when left out."""
    out: Path | None = None
    """Folder for the results of all studies; when left out smoke for smoke, else study/results."""
    work: Path | None = None
    """Where checkpoints lie until a run is evaluated; OUT/work when left out."""
    tokens: str | None = None
    """Training tokens of each run, such as 106M; the study's own budget when left out."""
    seconds: float | None = None
    """In place of tokens: as many as these seconds of training hold, at the pace of the first finished run of the same
    recipe on such a device."""
    eval_tokens: str | None = None
    """Targets of each held-out set."""
    like: Path | None = None
    """The same text in another tokenizer: evaluated are the bytes of so many of its tokens, so that models compare."""
    only: tuple[str, ...] = ()
    """Names of runs, with * and ? as in a shell."""
    minutes: float | None = None
    """Start no run that would not end within so many minutes, at the pace of earlier runs; without any, start all."""
    processes: int = 1
    """Processes side by side, spread over the GPUs; two a GPU, and one trains while the other compiles."""
    shard: str = "0/1"
    """I/N: take every N-th run from the I-th on, for machines that share no folder."""
    keep_models: bool = False
    """Keep the finished models in the working folder."""
    report: bool = True
    """Write the report of OUT at the end."""


def run(arguments: list[str]) -> None:
    """Run the study, alone or with several processes; the exit status is 1 when a run failed."""
    studies = "".join(f"\n  {name:<14}{study.about}" for name, study in STUDIES.items())
    about = cleandoc(Arguments.__doc__ or "") + studies
    chosen = parse(Arguments, arguments, "python -m study run", description=about)
    study, out = find_study(chosen.name), chosen.out or Path("smoke" if chosen.name == "smoke" else "study/results")
    _check(chosen, out)
    study.chosen(chosen.only)
    tokens = None if chosen.tokens is None else count(chosen.tokens)
    if chosen.eval_tokens is not None:
        study = replace(study, eval_tokens=count(chosen.eval_tokens))
    data = chosen.data or _standard_library(out / "data", max(study.eval_tokens, STUDIES["smoke"].eval_tokens))
    if chosen.processes > 1:
        from study.processes import as_flags, side_by_side

        child = ["run", chosen.name, *as_flags(replace(chosen, data=data, processes=1, report=False), but=("name",))]
        failed = side_by_side(child, chosen.processes) != 0
    else:
        failed = _alone(chosen, study, tokens, data, out)
    from study.store import Store

    if chosen.report and Store(out).finished():
        from study.report.write import write_report

        print(f"the report is in {write_report(out)}")
    if failed:
        raise SystemExit(1)


def _alone(chosen: Arguments, study: Study, tokens: int | None, data: Path, out: Path) -> bool:
    """Run the study in this process; whether a run failed."""
    from study.runner import Job, run_study

    index, _, shards = chosen.shard.partition("/")
    outcome = run_study(
        Job(
            name=chosen.name,
            study=study,
            data=data,
            out=out,
            work=chosen.work or out / "work",
            tokens=tokens,
            seconds=chosen.seconds,
            only=chosen.only,
            shard=(int(index), int(shards)),
            deadline=None if chosen.minutes is None else STARTED + 60 * chosen.minutes,
            keep_models=chosen.keep_models,
            like=chosen.like,
        )
    )
    for what, names in (("finished", outcome.finished), ("left", outcome.left), ("failed", outcome.failed)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return bool(outcome.failed)


def _check(chosen: Arguments, out: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise InputError(
            f"torchrun started {ranks} processes as parts of one training, but a study trains a run in each; "
            f"`python -m study run {chosen.name} --processes {ranks}` does that, and `torchrun … -m fibattn train "
            "RECIPE` trains one run with all"
        )
    index, _, shards = chosen.shard.partition("/")
    if not (index.isdecimal() and shards.isdecimal() and int(index) < int(shards)):
        raise InputError(f"--shard is {chosen.shard!r}; expected I/N with I from 0 to N - 1, such as 0/2")
    if chosen.processes < 1:
        raise InputError(f"--processes is {chosen.processes}; it must be at least 1")
    for name in ("minutes", "seconds"):
        if (value := getattr(chosen, name)) is not None and not value > 0:
            raise InputError(f"--{name} is {value:g}; it must be above 0")
    if chosen.seconds is not None and chosen.tokens is not None:
        raise InputError(f"--seconds is {chosen.seconds:g} and --tokens {chosen.tokens}; give one of them")
    for flag, folder in (("--out", out), ("--work", chosen.work or out)):
        taken = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        if taken:
            raise InputError(f"{flag} is {folder}, but {taken} is a file; give a folder")
    if chosen.data is None and chosen.name != "smoke":
        raise InputError(f"which data? Give --data, a folder made by `fibattn prepare`, to study {chosen.name}")


def _standard_library(folder: Path, held_out_tokens: int) -> Path:
    from fibattn.data.prepare import prepare
    from study.standard_library import standard_library

    prepare(folder, standard_library(2048, held_out_tokens))
    return folder
