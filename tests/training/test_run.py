"""Whole runs in processes of their own: killed, resumed, shared between processes."""

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server, together
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from fibattn import files, sealed
from fibattn.cli.main import main
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.model.loading import load_model
from fibattn.model.streaming import growing_layers
from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training import checkpoints
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import to_json
from fibattn.training.run import train


def loads_for_processes() -> bool:
    """Whether several processes on CPUs can read a checkpoint; PyTorch 2.11 loads nothing onto `cpu:0`."""
    try:
        torch.serialization.default_restore_location(torch.UntypedStorage(1), "cpu:0")
    except RuntimeError:
        return False
    return True


def write(recipe: Recipe, folder: Path) -> Path:
    path = folder / f"{recipe.out.name}.json"
    files.write_json(path, to_json(recipe))
    return path


def command(recipe: Recipe, folder: Path) -> list[str]:
    return [sys.executable, "-m", "fibattn", "train", str(write(recipe, folder))]


def losses(recipe: Recipe) -> list[float]:
    lines = (recipe.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, recipe.steps + 1))
    return [json.loads(line)["loss"] for line in lines]


def held_out_losses(recipe: Recipe) -> list[float]:
    return [json.loads(line)["loss"] for line in (recipe.out / "held-out.jsonl").read_text().splitlines()]


def test_killed_run_ends_with_the_same_bits(recipe: Recipe, forked: Server, tmp_path: Path) -> None:
    whole = replace(recipe, out=tmp_path / "whole", steps=40, save_every=3)
    train(whole)
    cut = replace(whole, out=tmp_path / "cut")
    for wanted in (4, 11):
        process = forked.start(command(cut, tmp_path))
        metrics = cut.out / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    forked.run(command(cut, tmp_path), check=True)
    assert losses(cut) == losses(whole)
    expected = load_file(whole.out / "model" / "model.safetensors")
    found = load_file(cut.out / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would share one GPU")
def test_two_processes_have_the_losses_of_one_also_when_they_go_on(
    recipe: Recipe, forked: Server, tmp_path: Path
) -> None:
    # Five held-out sequences: one process has two, then one, and the other two, then none.
    one = replace(recipe, out=tmp_path / "one", steps=6, evaluate_every=2, evaluate_tokens=5 * 32)
    train(one)
    two = replace(one, out=tmp_path / "two")
    for _ in ["from the start", "from the checkpoint in the middle"] if loads_for_processes() else ["from the start"]:
        said = together(forked.several(command(two, tmp_path), 2))
        assert ["the model is in" in one for one in said] == [True, False]
        for found in (losses, held_out_losses):
            torch.testing.assert_close(torch.tensor(found(two)), torch.tensor(found(one)), rtol=2e-5, atol=0)
        expected = load_file(one.out / "model" / "model.safetensors")
        found = load_file(two.out / "model" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
        shutil.rmtree(two.out / "model")
        shutil.rmtree(two.out / "checkpoint-6")


def test_metrics_are_those_of_a_whole_run_wherever_it_was_cut(recipe: Recipe) -> None:
    run = replace(recipe, steps=12, log_every=5, save_every=7)

    def lines() -> list[tuple[int, float]]:
        train(run)
        found = map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in found]

    whole = lines()
    assert [step for step, _ in whole] == [1, 5, 7, 10, 12]
    for made in ("model", "checkpoint-12"):
        shutil.rmtree(run.out / made)
    assert lines() == whole


def test_a_damaged_line_of_metrics_does_not_stop_a_run(recipe: Recipe) -> None:
    train(replace(recipe, steps=6))
    for lost in ("model", "checkpoint-6"):
        shutil.rmtree(recipe.out / lost)
    path = recipe.out / "metrics.jsonl"
    damage = b'{half\n\xff\xfe\n{"step": "a"}\n{"step": null}\n[]\n{"step": 1' + b"0" * 400 + b"}\n"
    path.write_bytes(damage + path.read_bytes() + b"\x80\n")
    (recipe.out / "checkpoint-6").touch()  # nor a file where a checkpoint is to be
    train(replace(recipe, steps=6))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_finished_run_is_left_alone(recipe: Recipe) -> None:
    model = train(replace(recipe, steps=2))
    before = files.sha256(model / "model.safetensors")
    assert train(replace(recipe, steps=2)) == model
    assert files.sha256(model / "model.safetensors") == before
    assert not list(recipe.out.glob(".*"))


def test_damaged_finished_model_is_refused_and_made_anew_when_removed(recipe: Recipe) -> None:
    model = train(replace(recipe, steps=2))
    before = files.sha256(model / "model.safetensors")
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"model.safetensors has 1000 bytes, expected .* or remove .*model: the same"):
        train(replace(recipe, steps=2))
    shutil.rmtree(model)
    assert train(replace(recipe, steps=2)) == model
    assert files.sha256(model / "model.safetensors") == before


def test_data_that_may_only_be_read_are_trained_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = recipe.out.with_name("data")
    shutil.copytree(recipe.data, theirs, ignore=shutil.ignore_patterns("order"))
    run, allowed = replace(recipe, data=theirs, steps=2), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs and allowed(path, mode))
    train(run)
    assert not (theirs / "order").exists()
    assert len(list((run.out / "order").glob("*.npy"))) == 1
    assert train(run).exists(), "and again"


def test_a_place_that_is_taken_is_noticed_before_any_training(recipe: Recipe) -> None:
    (recipe.out / "model").mkdir(parents=True)
    (recipe.out / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"model exists and is no finished model of a run; move it away"):
        train(recipe)
    assert not checkpoints.latest(recipe.out)


def test_two_commands_do_not_train_in_one_folder(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(recipe.out):
        assert main(["train", "small", "--data", str(recipe.data), "--out", str(recipe.out)]) == 2
    assert f"another process is training in {recipe.out}; wait for it" in capsys.readouterr().err
    assert not recipe.out.exists()


def test_a_new_checkpoint_is_kept_beside_a_later_damaged_one(tmp_path: Path) -> None:
    def publish(step: int, keep: int) -> list[int]:
        folder = tmp_path / checkpoints.STAGING / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("recipe.json", "inputs.json"):
            (tmp_path / name).write_text("{}")
        checkpoints.publish(tmp_path, step, keep)
        return [int(path.name.split("-")[1]) for path in sorted(tmp_path.glob("checkpoint-*"))]

    assert publish(100, 3) == [100]
    assert publish(200, 3) == [100, 200]
    assert publish(300, 3) == [100, 200, 300]
    (tmp_path / "checkpoint-300" / "recipe.json").write_text("damaged")
    assert publish(250, 2) == [200, 250]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-250"
    assert publish(260, 1) == [260]


def test_another_recipe_in_the_same_folder_is_refused(recipe: Recipe) -> None:
    train(replace(recipe, steps=2))
    other = replace(recipe, steps=3, model=replace(recipe.model, window=5))
    with pytest.raises(InputError, match=r"model.window was 4 and is now 5; steps was 2 and is now 3"):
        train(other)


def test_a_checkpoint_of_another_run_is_refused(recipe: Recipe) -> None:
    train(replace(recipe, steps=3))
    other = replace(recipe, steps=6, out=recipe.out.with_name("other"), data_seed=7)
    other.out.mkdir()
    shutil.copytree(recipe.out / "checkpoint-3", other.out / "checkpoint-3")
    with pytest.raises(InputError, match=r"checkpoint-3 holds another run: steps was 3 and is now 6; data_seed was 42"):
        train(other)


def test_a_run_of_an_older_version_goes_on(recipe: Recipe) -> None:
    """A field that the recipe did not have yet has its default."""
    train(replace(recipe, steps=3))
    for path in (recipe.out / "recipe.json", recipe.out / "checkpoint-3" / "recipe.json"):
        values = files.read_json(path)
        del values["gradient_checkpointing"], values["model"]["no_rope_layers"]
        files.write_json(path, values)
    sealed.seal(recipe.out / "checkpoint-3")
    shutil.rmtree(recipe.out / "model")
    train(replace(recipe, steps=3))


def test_a_run_that_ends_within_its_warm_up_says_so(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(recipe, steps=5))
    assert "warms up" not in capsys.readouterr().out
    train(replace(recipe, steps=4, out=recipe.out.with_name("short")))
    assert "warms up for 4 steps and the run has 4" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about runs without a GPU")
def test_a_run_too_long_for_a_cpu_says_so_before_its_first_step(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    for steps in (4, 1_500_000):
        with pytest.raises(KeyboardInterrupt):
            train(replace(recipe, steps=steps, out=recipe.out / str(steps)), [Stop()])
        said = capsys.readouterr().out
        assert ("no GPU here: the run takes about " in said) == (steps > 4)
        assert ("the recipe small fits a CPU: fibattn train small" in said) == (steps > 4)


def test_a_run_goes_on_with_smaller_micro_batches(recipe: Recipe) -> None:
    """As it must after running out of memory."""
    whole = replace(recipe, steps=4, micro_batch=4)
    train(whole)
    cut = replace(whole, out=recipe.out.with_name("cut"))
    shutil.copytree(whole.out, cut.out)
    shutil.rmtree(cut.out / "model")
    shutil.rmtree(cut.out / "checkpoint-4")
    files.write_json(cut.out / "recipe.json", to_json(cut))
    sizes: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sizes.append(kwargs["train_dataloader"].total_batch_size)

    train(replace(cut, micro_batch=1), [Watch()])
    assert sizes == [1]
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


def test_nothing_that_was_written_is_read_by_unpickling_code(recipe: Recipe) -> None:
    train(replace(recipe, steps=2))
    assert not list(recipe.out.rglob("training_args.bin"))
    for path in (*recipe.out.rglob("*.pt"), *recipe.out.rglob("*.pth")):
        with torch.serialization.safe_globals(_numpy_state()):
            torch.load(path, weights_only=True)


def _numpy_state() -> list[Any]:
    """What Transformers itself allows in the random state that it reads."""
    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_not_installed_is_named(recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"track asks for trackio, which is not installed; install it: pip"):
        train(replace(recipe, track=("trackio",)))


def test_damaged_checkpoint_is_passed_over(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(recipe, steps=6))
    newest = recipe.out / "checkpoint-6" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoints.latest(recipe.out) == recipe.out / "checkpoint-3"
    assert "has 100 bytes, expected" in capsys.readouterr().err
    manifest = recipe.out / "checkpoint-6" / "COMPLETE.json"
    for damaged in ("[]", '{"model.safetensors": 3}', ""):
        manifest.write_text(damaged)
        assert checkpoints.latest(recipe.out) == recipe.out / "checkpoint-3"
        assert "COMPLETE.json" in capsys.readouterr().err
    (recipe.out / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        checkpoints.latest(recipe.out)


def poison(checkpoint: Path, value: float) -> None:
    """Put a value among the weights of a checkpoint, and seal it again."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = value
    save_file(weights, path, metadata={"format": "pt"})
    sealed.seal(checkpoint)


def test_infinite_loss_stops_with_the_step_its_sequences_and_a_checkpoint(recipe: Recipe) -> None:
    train(replace(recipe, steps=9))
    shutil.rmtree(recipe.out / "model")
    shutil.rmtree(recipe.out / "checkpoint-9")
    poison(recipe.out / "checkpoint-6", math.inf)
    starts = np.load(next((recipe.data / "order").glob("random-seed42-length32-sequences36.npy")))[6 * 4 : 7 * 4]
    at = ", ".join(map(str, starts))
    said = rf"the loss is nan at step 7, sequences 24 to 27 of the order\. They start at tokens {at} of"
    with pytest.raises(InputError, match=said):
        train(replace(recipe, steps=9))
    report = files.read_json(recipe.out / "not-finite.json")
    assert (report["first_step"], report["last_step"], report["first_sequence"]) == (7, 7, 24)
    assert report["sequence_starts"] == starts.tolist()
    assert checkpoints.latest(recipe.out) == recipe.out / "checkpoint-6"


def test_weights_that_are_not_finite_are_never_kept(recipe: Recipe) -> None:
    wild = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e30, warmup_steps=0), save_every=1)
    with pytest.raises(
        InputError, match=r"(the loss|a weight) is .* at step \d+, sequences .* optimizer.learning_rate"
    ):
        train(wild)
    kept = checkpoints.latest(recipe.out)
    assert kept is not None
    assert all(bool(weight.isfinite().all()) for weight in load_file(kept / "model.safetensors").values())


def test_init_and_data_seeds_are_separate(recipe: Recipe) -> None:
    def first_losses(**seeds: int) -> list[float]:
        run = replace(recipe, steps=1, out=recipe.out / str(seeds), **seeds)
        train(run)
        return losses(run)

    same = first_losses()
    assert first_losses(init_seed=1) != same
    assert first_losses(data_seed=1) != same


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_other_layers_train(recipe: Recipe, kind: LayerType) -> None:
    shape = replace(recipe.model, **hybrid_layers(3, full=(1,), sparse=kind))
    run = replace(recipe, model=shape, steps=10)
    train(run)
    assert losses(run)[-1] < losses(run)[0]


def test_a_bound_is_the_finished_models_and_changes_no_training(recipe: Recipe) -> None:
    plain = replace(recipe, model=replace(recipe.model, **hybrid_layers(3, full=(1,))), steps=3)
    bounded = replace(plain, model=replace(plain.model, full_reach="sequence"), out=recipe.out.parent / "bounded")
    free, held = (load_model(train(run)) for run in (plain, bounded))
    assert (free.config.full_reach, held.config.full_reach) == (None, recipe.sequence_length - 1)
    assert (growing_layers(free), growing_layers(held)) == (1, 0)
    ids = torch.randint(
        free.config.vocab_size, (1, 3 * recipe.sequence_length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        near, far = (
            (held(ids).logits - free(ids).logits)[0]
            .abs()
            .amax(-1)
            .split([recipe.sequence_length, 2 * recipe.sequence_length])
        )
    assert near.max() < 1e-4 < far.min()
    assert "the last 32" in (bounded.out / "model" / "README.md").read_text()


def test_a_finished_run_is_bounded_without_training(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train(replace(recipe, model=replace(recipe.model, **hybrid_layers(3, full=(1,))), steps=2))
    weights, card = files.sha256(model / "model.safetensors"), (model / "README.md").read_text()
    (model / "README.md").write_text(card.replace("Not evaluated yet.", "Perplexity 5.") + "\nMy own words.\n")
    command = ["train", str(recipe.out / "recipe.json"), "--out", str(recipe.out)]
    assert main([*command, "--model.full-reach", "sequence"]) == 0
    assert "full_reach was None and is 31 now" in capsys.readouterr().out
    assert files.sha256(model / "model.safetensors") == weights
    assert (growing_layers(load_model(model)), load_model(model).config.full_reach) == (0, 31)
    sealed.verify(model)
    assert "the last 32" in (model / "README.md").read_text()
    assert "Perplexity 5." not in (model / "README.md").read_text()
    assert (model / "README.md").read_text().endswith("\nMy own words.\n")
    assert main(command) == 0, "the recipe has the bound"
    assert "full_reach" not in capsys.readouterr().out
    assert main([*command, "--model.full-reach", "None"]) == 0
    assert (load_model(model).config.full_reach, "the last 32" in (model / "README.md").read_text()) == (None, False)


def test_a_finished_model_keeps_a_cache_unasked(recipe: Recipe) -> None:
    model = load_model(train(replace(recipe, steps=2)))
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        first = model(ids)
        step = model(ids[:, :1], past_key_values=first.past_key_values)
        whole = model(torch.cat([ids, ids[:, :1]], dim=1), use_cache=False)
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1])


def test_what_begins_is_said_with_its_rates(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(recipe, steps=1, optimizer=replace(recipe.optimizer, learning_rate=3e-5, muon=True))
    train(recipe)
    rates = "3e-05 (AdamW), 0.003 (Muon, the matrices of the layers)"
    assert f"highest learning rate {rates}\n" in capsys.readouterr().out
    assert f"| highest learning rate | {rates} |" in (recipe.out / "model" / "README.md").read_text()


def test_gradient_checkpointing_and_micro_batches_change_nothing(recipe: Recipe) -> None:
    train(replace(recipe, steps=3))
    other = replace(recipe, steps=3, out=recipe.out.parent / "other", gradient_checkpointing=True, micro_batch=4)
    train(other)
    torch.testing.assert_close(
        torch.tensor(losses(other)), torch.tensor(losses(replace(recipe, steps=3))), rtol=1e-5, atol=0
    )


def test_a_run_of_before_goes_on(recipe: Recipe) -> None:
    run = replace(recipe, steps=6)
    train(run)
    shutil.rmtree(run.out / "model")
    for path in (run.out / "recipe.json", run.out / "checkpoint-6" / "recipe.json"):
        text = path.read_text()
        assert text.count('"muon_momentum"') == 1
        path.write_text(text.replace('"muon_momentum"', '"cautious_decay": false, "muon_momentum"'))
    sealed.seal(run.out / "checkpoint-6")
    assert train(run).exists()
    path = run.out / "recipe.json"
    path.write_text(path.read_text().replace('"cautious_decay": false', '"cautious_decay": true'))
    with pytest.raises(InputError, match="optimizer has an unknown key 'cautious_decay'"):
        train(run)
