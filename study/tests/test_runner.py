"""Studies of tiny models, really run: finished, repeated, cut, failed, shared between processes."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import Forked, Server

from fibattn import InputError
from fibattn.data.prepared import PreparedData
from fibattn.data.tokenizer import load_tokenizer
from fibattn.evaluation.sweep import sweep
from fibattn.lock import locked
from fibattn.model.loading import load_model
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe, to_json
from fibattn.training.run import train
from study import runner
from study.presets import Study
from study.probes.lego import lego
from study.probes.ruler import ruler
from study.probes.settings import Lego, Ruler
from study.runner import Job, Outcome, run_study
from study.store import Store

CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_runs import tiny
from study.presets import STUDIES
from study.runner import Job, run_study
smoke = STUDIES["smoke"]
recipe = replace(smoke.recipe, steps={steps}, sequence_length=32, sequences_per_step=4, micro_batch=4)
recipe = replace(recipe, save_every=2, log_every=1, evaluate_every=10, evaluate_tokens=256)
study = replace(smoke, recipe=recipe, runs=tuple(map(tiny, smoke.runs)), factors=(1,), eval_tokens=512)
out = Path({out!r})
run_study(Job("smoke", study, Path({data!r}), out=out, work=out / "work", only={only!r}))
"""


@pytest.fixture
def child(forked: Server, prepared: Path) -> Callable[..., Forked]:
    """Begins a process that works through a tiny study."""

    def begin(out: Path, *, steps: int = 3, only: tuple[str, ...] = ()) -> Forked:
        tests = str(Path(__file__).parent)
        program = CHILD.format(tests=tests, out=str(out), data=str(prepared), steps=steps, only=only)
        return forked.start([sys.executable, "-c", program])

    return begin


def lines(out: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (out / "smoke" / f"{run}.jsonl").read_text().splitlines()]


DEFAULTS = json.loads(json.dumps(to_json(Recipe().resolved())))


def whole(kept: dict, name: str) -> object:
    """What a result kept of a part of its recipe, with the younger fields that it left out at their defaults."""
    return DEFAULTS[name] | kept[name] if isinstance(kept[name], dict) else kept[name]


def again(job: Job, folder: Path, **changes: object) -> tuple[Job, Outcome]:
    other = replace(job, out=folder, work=folder / "work", **changes)  # pyright: ignore[reportArgumentType]
    return other, run_study(other)


def test_a_result_is_that_of_the_model_it_names(job: Job, tmp_path: Path) -> None:
    run = job.study.chosen(["learned-w12"])[0]
    recipe = job.study.resolved(run, data=job.data, out=tmp_path / "run", tokens=None, compiled=False)
    model = load_model(train(recipe))
    expected = sweep(model, PreparedData.open(job.data), lengths=[32, 64, 128], sets=[], tokens=512)
    (found,) = lines(job.out, "learned-w12")
    assert found["evaluation"] == expected["sets"]
    layers = model.base_model.layers
    assert found["model"]["learned_alphas"] == [float(layer.self_attn.alpha.detach()) for layer in layers]
    assert found["model"]["parameters"] == model.num_parameters()
    assert found["tokens"] == 4 * 4 * 32
    assert whole(found["recipe"], "model") == json.loads(json.dumps(to_json(recipe.resolved().model)))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_chains_are_asked_as_by_the_probes(job: Job) -> None:
    (folder,) = (job.work).glob("linear-w12-seed43-*/model")
    (found,) = lines(job.out, "linear-w12-seed43")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for name, probe, kind in (("ruler", ruler, Ruler), ("lego", lego, Lego)):
        assert found[name] == probe(model, tokenizer, kind(items=job.study.items))["rows"]
        assert [row["items"] for row in found[name]] == [job.study.items] * 3


def test_stretched_rope_is_looked_at_past_the_training_length_on_the_same_tokens(job: Job) -> None:
    (found,) = lines(job.out, "dense")
    assert set(found["rope_scaling"]) == {"yarn", "linear"}
    for sets in found["rope_scaling"].values():
        for name, rows in sets.items():
            assert set(rows) == {"64", "128"}
            plain = found["evaluation"][name]
            assert all(rows[length]["targets"] == plain[length]["targets"] for length in rows)
            assert all(rows[length]["nll"] != plain[length]["nll"] for length in rows)


@pytest.mark.parametrize("name", ["hybrid", "dense"])
def test_bounded_full_layers_are_looked_at_in_longer_sequences_on_the_same_tokens(job: Job, name: str) -> None:
    (found,) = lines(job.out, name)
    assert set(found["bounded"]) == {"32"}
    for name, rows in found["bounded"]["32"].items():
        assert set(rows) == {"64", "128"}
        plain = found["evaluation"][name]
        assert all(rows[length]["targets"] == plain[length]["targets"] for length in rows)
        assert all(rows[length]["nll"] != plain[length]["nll"] for length in rows)
    tried = {one["run"] for one in Store(job.out).records() if one["bounded"]}
    assert tried == {"dense", "dense-seed43", "hybrid"}


def test_a_copy_is_trained_on_in_longer_sequences_and_evaluated_at_every_length(job: Job) -> None:
    (found,) = lines(job.out, "dense")
    assert set(found["lengthened"]) == set(found["lengthened_bounded"]) == {"64"}
    assert found["lengthened_training"]["tokens_per_second"] > 0
    for name, rows in found["lengthened"]["64"].items():
        plain, bounded = found["evaluation"][name], found["lengthened_bounded"]["64"][name]
        assert set(rows) == set(plain) == {"32", "64", "128"}
        assert all(rows[length]["targets"] == plain[length]["targets"] for length in rows)
        assert all(rows[length]["nll"] != plain[length]["nll"] for length in rows)
        assert set(bounded) == {"128"}
        assert bounded["128"]["nll"] != rows["128"]["nll"]
    (folder,) = job.work.glob(f"dense-{found['key']}")
    recipe = to_json(load_recipe(str(folder / "lengthened" / "recipe.json")).resolved())
    assert (recipe["sequence_length"], recipe["start"]) == (64, str(folder / "model"))
    kept = found["lengthened_recipe"]
    assert kept["start"] == found["key"]
    assert all(recipe[name] == whole(kept, name) for name in kept if name != "start")
    tried = {one["run"] for one in Store(job.out).records() if one["lengthened"]}
    assert tried == {"dense", "dense-seed43"}


def test_what_is_not_bounded_before_its_long_stage_is_not_bounded_after_it(job: Job, tmp_path: Path) -> None:
    (dense,) = job.study.chosen(("dense",))
    free = replace(job.study, runs=(replace(dense, bounds=(), rope_scaling=()),), items=0)
    run_study(replace(job, study=free, out=tmp_path, work=tmp_path / "work", only=()))
    (found,) = lines(tmp_path, "dense")
    assert set(found["lengthened"]) == {"64"}
    assert (found["bounded"], found["lengthened_bounded"]) == ({}, {})


def test_a_run_is_kept_when_training_it_on_fails(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train

    def out_of_memory(recipe: Recipe, *more: Any) -> Path:
        if recipe.start is not None:
            raise RuntimeError("out of memory")
        return whole(recipe, *more)

    monkeypatch.setattr(runner, "train", out_of_memory)
    again = replace(job, out=tmp_path, work=tmp_path / "work", only=("dense",))
    assert run_study(again).finished == ("dense",)
    (found,) = lines(tmp_path, "dense")
    assert (found["lengthened"], found["lengthened_error"]) == ({}, "RuntimeError: out of memory")
    assert set(found["bounded"]) == {"32"}
    assert "training on at 64 failed, the rest is kept: out of memory" in capsys.readouterr().err


def test_finished_runs_are_left_alone(job: Job) -> None:
    before = {path: path.read_bytes() for path in job.out.glob("smoke/*.jsonl")}
    assert len(before) == len(job.study.runs)
    assert run_study(job).finished == tuple(run.name for run in job.study.runs)
    assert {path: path.read_bytes() for path in job.out.glob("smoke/*.jsonl")} == before


def test_runs_that_were_evaluated_over_other_targets_are_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(job)
    assert "other numbers of targets" not in capsys.readouterr().err
    run_study(replace(job, study=replace(job.study, eval_tokens=job.study.eval_tokens // 2)))
    names = ", ".join(run.name for run in job.study.runs)
    assert f"evaluated over other numbers of targets before, and left so: {names}" in capsys.readouterr().err


def test_all_runs_of_a_seed_have_one_order(job: Job) -> None:
    orders = {
        seed: {r["inputs"]["order_sha256"] for r in Store(job.out).records() if r["seed"] == seed} for seed in (42, 43)
    }
    assert [len(found) for found in orders.values()] == [1, 1]
    assert orders[42] != orders[43]


def test_kept_models_and_nothing_else_stay(job: Job, tmp_path: Path) -> None:
    assert len(list(job.work.glob("dense-*/model/model.safetensors"))) == 2  # of two seeds
    assert not list(job.work.glob("*/checkpoint-*"))
    other, _ = again(job, tmp_path, keep_models=False, only=("fixed-w12",))
    assert not list(other.work.iterdir())


def test_what_a_kill_left_of_a_finished_run_is_cleared_and_a_kept_model_is_not(job: Job, tmp_path: Path) -> None:
    other, _ = again(job, tmp_path, keep_models=True, only=("fixed-w12",))
    (folder,) = other.work.glob("fixed-w12-*")
    run_study(replace(other, keep_models=False))
    assert (folder / "model").exists()
    (folder / "checkpoint-2").mkdir()
    run_study(replace(other, keep_models=False))
    assert not folder.exists()


def test_a_finished_run_that_another_process_is_clearing_is_left_to_it(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = again(job, tmp_path, keep_models=True, only=("fixed-w12",))
    (folder,) = other.work.glob("fixed-w12-*")

    def vanishing(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "rglob", vanishing)  # as where folders go while they are looked through
    with locked(folder) as mine:
        assert mine
        assert run_study(other).finished == ("fixed-w12",)


def test_a_failed_run_is_noted_and_the_rest_goes_on(job: Job, tmp_path: Path) -> None:
    runs = job.study.chosen(["dense", "fixed-w12"])
    broken = replace(runs[0], model=replace(runs[0].model, num_attention_heads=5))
    study = replace(job.study, runs=(broken, runs[1]), factors=(1,))
    other, outcome = again(job, tmp_path, study=study)
    assert outcome == Outcome(finished=("fixed-w12",), failed=("dense",), left=())
    (failure,) = lines(other.out, "dense")
    assert failure["kind"] == "failure"
    assert "5 attention heads" in failure["error"]
    right = replace(study, runs=(broken, replace(runs[1], seed=44)))
    _, outcome = again(job, tmp_path, study=right)
    assert outcome.failed == ("dense",)
    assert [r["kind"] for r in Store(tmp_path).records()] == ["failure", "run", "run", "failure"]


def test_a_killed_run_goes_on_and_ends_alike(
    study: Study, prepared: Path, child: Callable[..., Forked], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    only = ("linear-w12",)
    brief = replace(study, recipe=replace(study.recipe, steps=30, evaluate_every=10, evaluate_tokens=256), factors=(1,))
    run_study(Job("smoke", brief, prepared, out=whole, work=whole / "work", only=only))
    process = child(cut, steps=30, only=only)
    while process.poll() is None:
        if any(path.read_text().count("\n") >= 5 for path in cut.glob("work/*/metrics.jsonl")):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (cut / "smoke").exists()
    assert child(cut, steps=30, only=only).wait() == 0
    (one,), (other,) = lines(whole, "linear-w12"), lines(cut, "linear-w12")
    assert (one["resumed"], other["resumed"]) == (False, True)
    assert one["evaluation"] == other["evaluation"]
    assert one["training"]["curve"] == other["training"]["curve"]
    looks = one["training"]["held_out"]
    assert [tokens for tokens, _, _ in looks] == [10 * 128, 20 * 128, 30 * 128]
    assert all(2 < loss < 8 and abs(gap) < 1 for _, loss, gap in looks)
    assert looks == other["training"]["held_out"]


def test_two_processes_share_the_runs(child: Callable[..., Forked], tmp_path: Path) -> None:
    only = ("fixed-w12", "linear-w12", "coprime-w12")
    both = [child(tmp_path, only=only) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [len(lines(tmp_path, name)) for name in only] == [1, 1, 1]


def test_shards_part_the_runs(job: Job, study: Study) -> None:
    parts = [run_study(replace(job, shard=(index, 2))).finished for index in (0, 1)]
    names = tuple(run.name for run in study.runs)
    assert parts == [names[0::2], names[1::2]]


def test_no_run_begins_that_would_end_too_late(job: Job, tmp_path: Path) -> None:
    other, first = again(job, tmp_path, only=("fixed-w12",))
    took = lines(other.out, "fixed-w12")[0]["seconds"]["all"]
    assert first.finished == ("fixed-w12",)
    late = run_study(replace(other, only=("dense",), deadline=time.monotonic() + took / 10))
    assert late == Outcome(finished=(), failed=(), left=("dense",))


def test_a_run_is_judged_by_its_like_and_by_whoever_shares_its_gpu(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(processes: int | None, left: float, lengthened: bool = False) -> bool:
        here = {"device": "a GPU", "processes_a_gpu": processes}
        seconds = {"training": 60.0, "evaluation": 40.0, "all": 100.0}
        alone = {"seconds": seconds, "tokens": 10, "resumed": False, "hardware": here, "time": "2"}
        slower = alone | {"seconds": {"training": 600.0, "all": 1000.0}, "time": "1"}
        other = alone | {"seconds": {"training": 600.0, "all": 1000.0}, "hardware": here | {"processes_a_gpu": 9}}
        monkeypatch.setattr(runner.measure, "machine", lambda: here)
        dense = alone | {"seconds": {"all": 300.0}, "lengthened": {"16384": {}}, "time": "3"}
        runs = {"other": other, **{f"run {n}": alone for n in range(3)}, "an old one": slower, "dense": dense}
        store = SimpleNamespace(finished=lambda: runs)
        task = SimpleNamespace(recipe=SimpleNamespace(tokens=10), run=SimpleNamespace(lengthening=lengthened))
        return runner._fits(replace(job, deadline=time.monotonic() + left), task, store)  # pyright: ignore

    assert (fits(1, 110), fits(1, 90)) == (True, False)
    assert (fits(None, 110), fits(None, 90)) == (True, False)
    assert (fits(3, 310), fits(3, 290)) == (True, False)
    assert (fits(1, 310, lengthened=True), fits(1, 290, lengthened=True)) == (True, False)


@pytest.mark.parametrize("tokens", [127, 0, -1])
def test_a_held_out_set_too_short_is_noticed_before_any_training(job: Job, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(InputError, match=rf"\(limit {tokens}\), fewer than one sequence of 128; evaluate shorter"):
        again(job, tmp_path, study=replace(job.study, eval_tokens=tokens))
    assert not list(tmp_path.iterdir())


def test_who_has_a_run_is_said(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = runner.locked

    @contextmanager
    def held_by_another(folder: Path) -> Iterator[bool]:
        with held(folder), held(folder) as mine:
            yield mine

    @contextmanager
    def finished_meanwhile(folder: Path) -> Iterator[bool]:
        shutil.copytree(job.out / "smoke", tmp_path / "smoke")
        with held(folder) as mine:
            yield mine

    for claimed, said in ((held_by_another, "dense: another process has it"), (finished_meanwhile, "has finished it")):
        monkeypatch.setattr(runner, "locked", claimed)
        again(job, tmp_path, only=("dense",))
        assert f"{said}\n" in capsys.readouterr().err


def test_work_left_is_reckoned_by_runs_that_were_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*finished: tuple[float, bool]) -> str:
        runs = {
            str(key): {"seconds": {"all": took}, "resumed": resumed} for key, (took, resumed) in enumerate(finished)
        }
        tasks = [SimpleNamespace(key=str(key)) for key in range(5)]
        runner._say_progress(tasks, runs)  # pyright: ignore[reportArgumentType]
        return capsys.readouterr().err.strip()

    assert said((100, False), (1, True), (50, False)).endswith("3 of 5 runs finished, about 2m30s of work left")
    assert said((1, True)).endswith("1 of 5 runs finished")


def test_command_runs_a_study_and_writes_its_report(prepared: Path, forked: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "study", "run", "smoke", "--data", str(prepared), "--out", str(tmp_path)]
    flags = ["--tokens", "3k", "--eval-tokens", "2048", "--only", "hybrid", "--processes", "2"]
    done = forked.run([*command, *flags], check=True)
    assert [path.name for path in tmp_path.glob("smoke/*")] == ["hybrid.jsonl"]
    assert "[0] " in done.stderr
    assert "[1] " in done.stderr
    assert (tmp_path / "report" / "index.html").exists()
    bad = forked.run([*command, "--shard", "2/2"])
    assert bad.returncode == 2
    assert "--shard is '2/2'; expected I/N" in bad.stderr


def test_a_terminated_command_leaves_no_process_behind(prepared: Path, forked: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "study", "run", "smoke", "--data", str(prepared), "--out", str(tmp_path)]
    parent = forked.start([*command, "--processes", "2"])
    while parent.said("stderr").count("k tokens\n") < 2:
        assert parent.poll() is None, parent.said("stderr")
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.wait() == 130
    assert "interrupted; what was finished is kept" in parent.said("stderr")
    runs = list(tmp_path.glob("work/*"))
    assert len(runs) == 2
    for run in runs:
        with runner.locked(run) as free:
            assert free


def test_seconds_are_tokens_at_the_pace_of_the_first_run_of_the_recipe(job: Job, tmp_path: Path) -> None:
    short, _ = again(job, tmp_path, only=("linear-w12",))
    (before,) = lines(tmp_path, "linear-w12")
    a_step = 4 * 32
    seconds = 7.5 * a_step / before["training"]["tokens_per_second"]
    for _ in range(2):  # the second time there is nothing to do
        outcome = run_study(replace(short, seconds=seconds))
        assert (outcome.finished, outcome.failed) == (("linear-w12",), ())
    assert [one["tokens"] for one in lines(tmp_path, "linear-w12")] == [4 * a_step, 7 * a_step]
    with pytest.raises(InputError, match=r"how many tokens dense trains on in a second of .* is not known; run it for"):
        run_study(replace(short, seconds=seconds, only=("dense",)))


def test_a_run_for_another_vocabulary_is_refused_where_it_is_named(job: Job, tmp_path: Path) -> None:
    first, second = job.study.runs[:2]
    runs = (replace(first, vocabulary=8192), second)
    other = replace(job, study=replace(job.study, runs=runs), out=tmp_path, work=tmp_path / "work")
    with pytest.raises(InputError, match=f"{first.name} is for a vocabulary of 8,192, and .* ids; make its data with"):
        run_study(replace(other, only=(first.name,)))
    assert run_study(replace(other, deadline=0.0)).left == (second.name,)


def test_runs_in_longer_sequences_are_evaluated_in_those_of_the_study_and_their_own(job: Job, tmp_path: Path) -> None:
    (run,) = job.study.chosen(["hybrid"])
    longer = replace(job.study.recipe, sequence_length=64)
    study = replace(job.study, factors=(1,), runs=(replace(run, recipe=longer),))
    run_study(replace(job, study=study, out=tmp_path, work=tmp_path / "work"))
    (found,) = lines(tmp_path, "hybrid")
    assert found["trained_at"] == 64
    assert all(set(rows) == {"32", "64"} for rows in found["evaluation"].values())


def test_what_was_evaluated_at_fewer_lengths_is_not_finished(job: Job, tmp_path: Path) -> None:
    few = replace(job.study, factors=(1,))
    other, _ = again(job, tmp_path, only=("linear-w12",), study=few, keep_models=False)
    assert run_study(other).finished == ("linear-w12",)
    more = run_study(replace(other, study=job.study))
    assert more.finished == ("linear-w12",)
    found = lines(tmp_path, "linear-w12")
    assert [set(next(iter(one["evaluation"].values()))) for one in found] == [{"32"}, {"32", "64", "128"}]
    assert len({one["key"] for one in found}) == 1
    assert run_study(replace(other, study=few)).finished == ("linear-w12",)
    assert len(lines(tmp_path, "linear-w12")) == 2
