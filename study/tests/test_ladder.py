"""The ladder: its steps are the runs that were made, and its end is the default recipe."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fibattn.model.modeling import FibAttnForCausalLM
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.run import model_config
from study.ladder import LADDER, MINUTES, Step
from study.presets import STUDIES
from study.report.ladder_table import ladder_table
from study.report.results import Results
from study.report.write import write_report
from study.store import key_of

RESULTS = Path(__file__).parents[1] / "results"
STUDY = STUDIES["ladder"]


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    """Of the budget that all steps have but one, which has a little more: a quarter of the whole."""
    return {one["run"]: one for one in Results.load(RESULTS).tuned["ladder"] if one["tokens"] < 200_000_000}


RUN = [run for run in STUDY.runs if (RESULTS / "ladder" / f"{run.name}.jsonl").exists()]


@pytest.mark.parametrize("run", RUN, ids=lambda run: run.name)
def test_a_step_was_run_with_the_recipe_that_it_has(run, records) -> None:
    record = records[run.name]
    tokens = 129_000_000 if run.name == "wide-eight-64" else 106_000_000
    recipe = STUDY.resolved(run, data=Path("data"), out=Path("out"), tokens=tokens, compiled=True)
    assert key_of(recipe, record["inputs"]["data_fingerprint"]) == record["key"]


def test_a_step_stands_beside_the_one_before_it_that_was_run(records) -> None:
    [table] = ladder_table([records["batch"], records["few-wide-long-64"]])
    _, row = table.rows
    assert row[:3] == ("few-wide-long-64", f"{change('few-wide-64')}; {change('few-wide-long-64')}", "batch")
    assert "+2.03 %" in row
    assert "524,288 tokens" in table.note


def change(name: str) -> str:
    return next(step.change for step in LADDER if step.name == name)


def test_steps_of_one_length_saw_the_same_text_in_the_same_order(records) -> None:
    alike = [one for one in records.values() if one["recipe"]["order"] == "random" and one["trained_at"] == 1024]
    orders = defaultdict(set)
    for one in alike:
        orders[one["inputs"]["data_fingerprint"], one["tokens"]].add(one["inputs"]["order_sha256"])
    assert len(alike) > 9
    assert all(len(found) == 1 for found in orders.values())


def test_a_step_changes_something_that_came_before_it() -> None:
    seen: dict[str, object] = {}
    for step in LADDER:
        assert (step.since is None) == (not seen)
        assert step.since is None or seen[step.since] != (step.recipe, step.vocabulary)
        seen[step.name] = step.recipe, step.vocabulary


@pytest.mark.parametrize("step", LADDER, ids=lambda step: step.name)
def test_models_have_one_size_unless_they_say_otherwise(step: Step) -> None:
    with torch.device("meta"):
        model = FibAttnForCausalLM(model_config(step.recipe, step.vocabulary or 32_768, 0))
    alike = abs(model.num_parameters() / 60_836_352 - 1) < 0.01
    said = next((one.change for one in changed_by(step) if "parameters" in one.change), None)
    assert alike == (said is None or "as many parameters" in said)
    step.recipe.check()


def changed_by(step: Step) -> list[Step]:
    """The step and all that it builds on."""
    before = [one for one in LADDER if one.name == step.since]
    return [step, *(changed_by(before[0]) if before else [])]


@pytest.mark.parametrize(("preset", "large"), [(DEFAULT, False), ("five-minutes", True)])
def test_a_preset_is_the_last_step_of_its_kind_that_was_kept(preset: str, large: bool) -> None:
    last = [step for step in LADDER if step.kept and (step in MINUTES) == large][-1].recipe
    chosen = PRESETS[preset].resolved()
    unbounded = replace(chosen, model=replace(chosen.model, full_reach=None))
    alike = ("model", "optimizer", "order", "sequence_length", "sequences_per_step", "micro_batch")
    assert [getattr(unbounded, name) for name in alike] == [getattr(last.resolved(), name) for name in alike]


def test_every_step_of_the_presets_way_was_kept() -> None:
    ends = [[step for step in LADDER if step.kept and (step in MINUTES) == large][-1] for large in (False, True)]
    assert all(step.kept for end in ends for step in changed_by(end))


def test_the_rival_differs_in_its_attention_alone() -> None:
    attention = ("layer_types", "no_rope_layers", "window", "full_reach")
    dense, hybrid = PRESETS["dense"], PRESETS[DEFAULT]
    same = {name: getattr(hybrid.model, name) for name in attention}
    assert replace(dense, out=hybrid.out, model=replace(dense.model, **same)) == hybrid


def test_the_table_shows_the_means_of_the_records(records) -> None:
    table, _ = ladder_table(records.values())
    row = next(row for row in table.rows if row[0] == "muon8")
    losses = [rows["1024"] for rows in records["muon8"]["evaluation"].values()]
    assert row[3] == f"{math.prod(one['perplexity'] for one in losses) ** 0.25:.2f}"
    before = [rows["1024"]["bits_per_byte"] for rows in records["zero"]["evaluation"].values()]
    bits = [one["bits_per_byte"] for one in losses]
    assert row[6] == f"{100 * (sum(bits) / sum(before) - 1):+.2f} %".replace("-", "−")
    assert row[4] == f"{sum(one['bits_per_byte'] for one in losses) / 4:.4f}"


def test_a_step_in_another_vocabulary_is_known_by_it_and_compared_by_bits_a_byte(tmp_path: Path) -> None:
    (tmp_path / "ladder").mkdir()
    path = RESULTS / "ladder" / "batch.jsonl"
    record = json.loads(path.read_text())
    (run,) = STUDY.chosen(["few-small-64"])
    recipe = STUDY.resolved(run, data=Path("data"), out=Path("out"), tokens=106_000_000, compiled=True)
    for rows in record["evaluation"].values():
        rows["1024"]["bits_per_byte"] *= 0.99
    inputs = record["inputs"] | {"data_fingerprint": "other"}
    other = {"run": run.name, "key": key_of(recipe, "other"), "model": record["model"] | {"vocabulary": 8192}}
    (tmp_path / "ladder" / "batch.jsonl").write_bytes(path.read_bytes())
    (tmp_path / "ladder" / "few-small-64.jsonl").write_text(json.dumps(record | other | {"inputs": inputs}) + "\n")
    [table] = ladder_table(Results.load(tmp_path).tuned["ladder"])
    assert [(row[0], row[5], row[6]) for row in table.rows] == [("batch", "–", "–"), ("few-small-64", "–", "−1.00 %")]


def test_a_folder_with_the_ladder_alone_has_its_table(tmp_path: Path) -> None:
    (tmp_path / "ladder").mkdir()
    for name in ("rate", "passes"):
        (tmp_path / "ladder" / f"{name}.jsonl").write_bytes((RESULTS / "ladder" / f"{name}.jsonl").read_bytes())
    told = write_report(tmp_path).read_text(encoding="utf-8")
    assert told.startswith("### The ladder")
    assert "| passes |" in told
