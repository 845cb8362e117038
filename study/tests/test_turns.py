"""Turns on a shared GPU: who trains, who waits, and that nobody waits for ever."""

import fcntl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerCallback

from fibattn.training.run import train
from study import turns
from study.runner import Job
from study.turns import Turn, turn


@pytest.fixture
def two_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "processes_a_gpu", lambda: 2)


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def lock_of(folder: Path) -> Path:
    (path,) = folder.glob("turn-*.lock")
    return path


def compiled(one: TrainerCallback) -> None:
    for _ in range(turns._COMPILED):
        one.on_step_end(None, None, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("two_a_gpu")
def test_the_second_waits_for_the_end_of_the_first(tmp_path: Path) -> None:
    with turn(tmp_path) as (second,):
        with turn(tmp_path) as (first,):
            compiled(first)
            its_turn = threading.Event()
            waiting = threading.Thread(target=lambda: (compiled(second), its_turn.set()), daemon=True)
            waiting.start()
            assert not its_turn.wait(0.3)
        assert its_turn.wait(10)
        waiting.join()
        assert first.waited < 0.3 <= second.waited


@pytest.mark.usefixtures("two_a_gpu")
def test_who_takes_too_few_steps_to_get_a_turn_takes_it_after_them_and_once(tmp_path: Path) -> None:
    with turn(tmp_path) as (one,):
        assert is_free(lock_of(tmp_path))
        one.take()
        assert not is_free(lock_of(tmp_path))
        waited = one.waited
        compiled(one)
        assert one.waited == waited


@pytest.mark.usefixtures("two_a_gpu")
def test_a_training_that_fails_gives_its_turn_up(tmp_path: Path) -> None:
    workers = []

    def failing() -> None:
        with turn(tmp_path) as (one,):
            compiled(one)
            assert not is_free(lock_of(tmp_path))
            # The Trainer's workers are forked, and have the file open as long as they live.
            workers.append(subprocess.Popen(["sleep", "60"], pass_fds=[one.lock.fileno()]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert is_free(lock_of(tmp_path))
    workers[0].kill()
    workers[0].wait()


def test_whoever_has_a_gpu_alone_does_not_wait(tmp_path: Path) -> None:
    with turn(tmp_path) as callbacks:
        assert callbacks == []


def test_a_real_training_holds_its_turn_from_its_third_step_on(job: Job, tmp_path: Path) -> None:
    lock = tmp_path / "turn"
    free = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            free.append(is_free(lock))

    recipe = job.study.resolved(job.study.runs[0], data=job.data, out=tmp_path / "run", tokens=None, compiled=False)
    one = Turn(lock)
    train(replace(recipe, steps=5), [one, Watch()])
    assert free == [True, True, False, False, False]
    assert not is_free(lock)  # what follows belongs to the turn
    one.end()
    assert is_free(lock)
