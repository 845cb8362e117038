"""The ladder: its steps are the runs that were made, and its end is the default recipe."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fibattn.training.presets import DEFAULT, PRESETS
from study.ladder import LADDER
from study.presets import STUDIES
from study.report.ladder_table import ladder_table
from study.report.results import Results
from study.report.write import write_report
from study.store import key_of

RESULTS = Path(__file__).parents[1] / "results"
STUDY = STUDIES["ladder"]


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    return {one["run"]: one for one in Results.load(RESULTS).tuned["ladder"]}


@pytest.mark.parametrize("run", STUDY.runs, ids=lambda run: run.name)
def test_every_step_was_run_with_the_recipe_that_it_has(run, records) -> None:
    record = records[run.name]
    recipe = STUDY.resolved(run, data=Path("data"), out=Path("out"), tokens=106_000_000, compiled=True)
    assert key_of(recipe, record["inputs"]["data_fingerprint"]) == record["key"]


def test_all_steps_saw_the_same_text_in_the_same_order(records) -> None:
    assert len({(one["inputs"]["order_sha256"], one["inputs"]["data_fingerprint"]) for one in records.values()}) == 1


def test_a_step_changes_something_that_came_before_it() -> None:
    seen: dict[str, object] = {}
    for step in LADDER:
        assert (step.since is None) == (not seen)
        assert step.since is None or seen[step.since] != step.recipe
        seen[step.name] = step.recipe


def test_models_have_one_size(records) -> None:
    sizes = [one["model"]["parameters"] for one in records.values()]
    assert max(sizes) < 1.01 * min(sizes)


def test_the_default_recipe_is_the_last_step_that_was_kept() -> None:
    last = [step for step in LADDER if step.kept][-1].recipe
    chosen = PRESETS[DEFAULT]
    assert chosen.optimizer == last.optimizer
    assert replace(chosen.model, full_reach=None) == last.model
    assert (chosen.sequence_length, chosen.sequences_per_step) == (last.sequence_length, last.sequences_per_step)


def test_the_rival_differs_in_its_attention_alone() -> None:
    attention = ("layer_types", "no_rope_layers", "window", "full_reach")
    dense, hybrid = PRESETS["dense"], PRESETS[DEFAULT]
    same = {name: getattr(hybrid.model, name) for name in attention}
    assert replace(dense, out=hybrid.out, model=replace(dense.model, **same)) == hybrid


def test_the_table_shows_the_means_of_the_records(records) -> None:
    [table] = ladder_table(records.values())
    row = next(row for row in table.rows if row[0] == "muon8")
    losses = [rows["1024"] for rows in records["muon8"]["evaluation"].values()]
    assert row[3] == f"{math.prod(one['perplexity'] for one in losses) ** 0.25:.2f}"
    assert row[4] == f"{sum(one['bits_per_byte'] for one in losses) / 4:.4f}"


def test_a_folder_with_the_ladder_alone_has_its_table(tmp_path: Path) -> None:
    (tmp_path / "ladder").mkdir()
    for name in ("rate", "passes"):
        (tmp_path / "ladder" / f"{name}.jsonl").write_bytes((RESULTS / "ladder" / f"{name}.jsonl").read_bytes())
    told = write_report(tmp_path).read_text(encoding="utf-8")
    assert told.startswith("### The ladder")
    assert "| passes |" in told
