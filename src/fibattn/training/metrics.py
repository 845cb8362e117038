"""What a run writes down of itself as it goes: JSON Lines, and progress for whoever watches."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from fibattn import files
from fibattn.progress import Meter
from fibattn.training.recipe import Recipe


class MetricsFile(TrainerCallback):
    """`metrics.jsonl` has a line every `log_every` steps and with each checkpoint and evaluation, `held-out.jsonl` one
    for each evaluation.

    `tokens_per_second` leaves the time of evaluations out.
    """

    def __init__(self, recipe: Recipe, meter: Meter):
        self.path, self.meter = recipe.out / "metrics.jsonl", meter
        self.held_out = recipe.out / "held-out.jsonl"
        self._step_tokens = recipe.sequences_per_step * recipe.sequence_length
        self._notes = {"training": "", "held out": ""}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Drop what a killed run wrote past its last checkpoint, and start the clock."""
        state.compute_steps(args, state.max_steps)  # those of this run: a resumed state has its checkpoint's
        self._last, self._last_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            for path in (self.path, self.held_out):
                _cut(path, state.global_step)
        self.meter.resume(state.global_step * self._step_tokens)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress. A line ends with each checkpoint: a resumed run knows no losses from before it."""
        self.meter.update(self._step_tokens, self.meter.note)
        control.should_log |= state.global_step % args.save_steps == 0 or state.global_step == state.max_steps
        control.should_log |= control.should_evaluate

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Append one line."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now = time.monotonic()
        speed = (state.global_step - self._last_step) * self._step_tokens / max(now - self._last, 1e-9)
        self._last, self._last_step = now, state.global_step
        line = {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(speed),
        }
        self._note("training", f"step {state.global_step}, loss {logs['loss']:.4f}")
        self._append(self.path, state.global_step, line)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        """Append one line to `held-out.jsonl`, and take the evaluation off the clock."""
        self._last += metrics["eval_runtime"]
        if not state.is_world_process_zero:
            return
        line: dict[str, Any] = {}
        sets: dict[str, dict[str, float]] = {}
        for key, value in metrics.items():
            name, slash, what = key.removeprefix("eval_").rpartition("/")
            if slash:
                sets.setdefault(name, {})[what] = value
            elif what in ("loss", "training_loss", "gap", "bits_per_byte"):
                line[what] = value
        line |= {"sets": sets, "seconds": round(metrics["eval_runtime"], 3)}
        self._note("held out", f"held out {metrics['eval_bits_per_byte']:.4f} bits/byte")
        self._append(self.held_out, state.global_step, line)

    def _note(self, what: str, note: str) -> None:
        self._notes[what] = note
        self.meter.note = ", ".join(filter(None, self._notes.values()))

    def _append(self, path: Path, step: int, line: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "tokens": step * self._step_tokens} | line) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop the lines of a JSON Lines file after `step`, and what is no whole line."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        files.write_text(path, "".join(line for line in lines if line.endswith("\n") and _step(line) <= step))


def _step(line: str) -> float:
    """The step of a line of metrics; of one that cannot be read, none that there is."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int | float) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
