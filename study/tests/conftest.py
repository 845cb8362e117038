"""A study of tiny models, really run, once."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import tiny

from study.lengthening import Lengthening
from study.presets import STUDIES, Study
from study.runner import Job, run_study


@pytest.fixture(scope="session")
def study() -> Study:
    """The study `smoke`, smaller, and second seeds of two of its runs."""
    smoke = STUDIES["smoke"]
    runs = tuple(tiny(run) for run in smoke.runs)
    runs = tuple(replace(run, lengthening=Lengthening(2)) if run.lengthening else run for run in runs)
    seeds = tuple(run.repeated(43) for run in runs if run.name in ("dense", "linear-w12"))
    recipe = replace(
        smoke.recipe, sequence_length=32, sequences_per_step=4, micro_batch=4, steps=4, save_every=2, log_every=1
    )
    return replace(smoke, recipe=recipe, runs=runs + seeds, factors=(1, 2, 4), eval_tokens=512)


@pytest.fixture(scope="session")
def job(study: Study, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The whole tiny study, finished; its models are kept. Workers of a test run make it together."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "study"
    done = Job("smoke", study, prepared, out=folder, work=folder / "work", keep_models=True)
    while (outcome := run_study(done)).left:
        time.sleep(0.2)
    assert outcome.finished == tuple(run.name for run in study.runs)
    assert not outcome.failed
    return done
