"""Transformers' Trainer with what the recipe needs: its rate, parameter groups and loss, and whole checkpoints.

The order of the data is a file and is read in sequence, so a run's position is its step and nothing else.
"""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from fibattn import files
from fibattn.data.sequences import TrainingSequences
from fibattn.errors import InputError
from fibattn.progress import Meter
from fibattn.training import checkpoints, sharding
from fibattn.training.held_out import HeldOut
from fibattn.training.metrics import MetricsFile
from fibattn.training.optimizers import build_optimizer, local
from fibattn.training.recipe import OptimizerRecipe, Recipe


def rate_factor(step: int, optimizer: OptimizerRecipe, steps: int) -> float:
    """The learning rate of `step` (counted from 1) over the highest: linear warm-up, a plateau, then the decay.

    The paper's is a cosine without a plateau (section 4).
    """
    if step <= optimizer.warmup_steps:
        return step / optimizer.warmup_steps
    decay = (steps - optimizer.warmup_steps) * optimizer.decay_fraction
    left = min(max(steps - step, 0) / max(decay, 1), 1.0)
    shape = left if optimizer.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return optimizer.final_fraction + (1 - optimizer.final_fraction) * shape


def training_arguments(recipe: Recipe, processes: int, *, evaluates: bool = False) -> TrainingArguments:
    """The recipe in the Trainer's words; `evaluates`: there is held-out text to measure the loss on."""
    on_gpu = torch.cuda.is_available()
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    cut = recipe.context_parallel
    # accelerate cuts sequences beside sharded weights alone.
    sharded = "LOCAL_RANK" in os.environ and (recipe.parallel == "fsdp" or cut > 1)
    micro_batch, micro_batches = recipe.split(processes)
    # A step replayed as a CUDA graph waits for no launch; where gradients add up over several, it would overwrite them.
    whole = recipe.compile and not sharded  # in parts it is done by `sharding.compile_layers`
    graphed = whole and on_gpu and processes == micro_batches == 1
    arguments = TrainingArguments(
        output_dir=str(recipe.out),
        run_name=recipe.out.name,
        max_steps=recipe.steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=bf16,
        torch_compile=whole,
        torch_compile_mode="reduce-overhead" if graphed else None,
        use_cpu=not on_gpu,
        use_cache=True,  # in the finished model's configuration, where the Trainer writes it; training makes none
        # Data parallelism is called sharded, too: accelerate takes no replicas beside sequences that are cut.
        parallelism_config=ParallelismConfig(cp_size=cut, dp_shard_size=processes // cut) if cut > 1 else None,
        fsdp=True if sharded else None,  # pyright: ignore[reportArgumentType]
        fsdp_config={"transformer_layer_cls_to_wrap": ["FibAttnDecoderLayer"]} if sharded else None,
        seed=recipe.init_seed,
        train_sampling_strategy="sequential",
        dataloader_num_workers=2 if on_gpu else 0,
        dataloader_persistent_workers=on_gpu,
        dataloader_pin_memory=on_gpu,
        # A blocking copy would wait for everything that the GPU still has to do.
        accelerator_config={"non_blocking": on_gpu},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        # With the filter on, every micro-batch waits for the GPU to look at the loss; `log` looks at it instead.
        logging_nan_inf_filter=False,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        save_steps=recipe.save_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.evaluate_every,
        report_to=list(recipe.track) or "none",
        disable_tqdm=True,
    )
    # One process takes one GPU; where there are more, the Trainer would split the model's batch between threads.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class FibTrainer(Trainer):
    """Trains one recipe on sequences in a given order, and looks at `held_out` every so often.

    `evaluation_seconds` is what that has taken so far, in this process.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, sequences: TrainingSequences, held_out: HeldOut | None = None):
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType]
            args=training_arguments(recipe, process_count(), evaluates=held_out is not None),
            train_dataset=sequences,
            eval_dataset=held_out and held_out.held_out,  # pyright: ignore[reportArgumentType]
        )
        self.recipe, self.sequences, self.held_out = recipe, sequences, held_out
        self.evaluation_seconds = 0.0
        if self.is_fsdp_enabled and self.args.bf16:
            sharding.narrow(model, self.accelerator.state.fsdp_plugin, self.accelerator.device.type)
        if self.is_fsdp_enabled and recipe.compile:
            sharding.compile_layers(model)
        # `compute_loss` returns the mean of a micro-batch, and micro-batches are equal: let the Trainer average.
        self.model_accepts_loss_kwargs = False
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def run(self, label: str, checkpoint: Path | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train, or go on from a checkpoint, with metrics in the run's folder and progress under a label."""
        with Meter(label, self.recipe.tokens, "tokens", quiet=not self.is_world_process_zero()) as meter:
            for callback in (MetricsFile(self.recipe, meter), *callbacks):
                self.add_callback(callback)
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Transformers would warn of tied weights, which no checkpoint has twice."""
        tied = self.model._tied_weights_keys or {}  # pyright: ignore
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))  # pyright: ignore

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.recipe.optimizer)  # pyright: ignore
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's rate; its first step is step 1, the scheduler's is 0."""
        if self.lr_scheduler is None:
            chosen = self.recipe.optimizer
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,  # pyright: ignore[reportArgumentType]
                lambda done: rate_factor(done + 1, chosen, num_training_steps),
            )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mean over all targets of the sequences, each token's successor, the last one's included."""
        outputs = model(input_ids=inputs["input_ids"], shift_labels=inputs["shift_labels"], use_cache=False)
        if not outputs.loss.is_cuda and not torch.isfinite(outputs.loss):
            step = self.state.global_step + 1
            self._stop(f"the loss is {float(outputs.loss.detach())}", step, step)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on `held_out`, logged; called every `evaluate_every` steps and after the last.

        Not the Trainer's own loop: that makes all logits, draws random numbers for its loader, and calls the compiled
        model, for which sequences of another number are compiled again.
        """
        assert self.held_out is not None
        began = time.monotonic()
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        with torch.compiler.set_stance("force_eager"):  # what is sharded is compiled in place
            found = self.held_out.losses(model, self.args.eval_batch_size, self.accelerator)
        found["runtime"] = time.monotonic() - began
        self.evaluation_seconds += found["runtime"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate walks all modules for every micro-batch, and knows no attention."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass the metrics on, unless the loss is not finite: then stop, before a checkpoint keeps the damage."""
        for name, what in (("loss", "the loss"), ("eval_loss", "the held-out loss")):
            if not math.isfinite(loss := logs.get(name, 0.0)):
                self._stop(f"{what} is {loss}", self._first_unlogged(), self.state.global_step)
        super().log(logs, start_time)

    def _first_unlogged(self) -> int:
        return (self.state.global_step - 1) // self.recipe.log_every * self.recipe.log_every + 1

    def _stop(self, what: str, first: int, last: int) -> NoReturn:
        """End the run: `what` happened in one of the steps from `first` to `last`, counted from 1."""
        recipe, a_step = self.recipe, self.recipe.sequences_per_step
        starts = [int(start) for start in self.sequences.order[(first - 1) * a_step : last * a_step]]
        report = recipe.out / "not-finite.json"
        about = {"what": what, "first_step": first, "last_step": last, "sequence_starts": starts}
        files.write_json(report, about | {"first_sequence": (first - 1) * a_step})
        kept = checkpoints.latest(recipe.out)
        raise InputError(
            f"{what} {f'at step {last}' if first == last else f'in one of the steps {first} to {last}'}, sequences "
            f"{(first - 1) * a_step} to {last * a_step - 1} of the order. They start at tokens "
            f"{', '.join(map(str, starts[:8]))}{', …' if len(starts) > 8 else ''} of the training stream; all are in "
            f"{report}. {f'{kept} is kept' if kept else 'There is no checkpoint yet'}; try a lower "
            f"optimizer.learning_rate (now {recipe.optimizer.learning_rate}) in a new run"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, less the pickle of its arguments: the recipe says more."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir is not None:
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # of sharded weights, where a tied one is there twice
            state_dict = {name: one for name, one in state_dict.items() if name not in self.model.all_tied_weights_keys}  # pyright: ignore
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.recipe.out / checkpoints.STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A loss is looked at when it is logged; the weights may have gone since, or in this very step.
        if not all(bool(torch.isfinite(local(parameter)).all()) for parameter in model.parameters()):
            self._stop("a weight is not finite", self._first_unlogged(), self.state.global_step)
        if self.args.should_save:
            shutil.rmtree(self.recipe.out / checkpoints.STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with files.naming_a_full_disk(self.recipe.out):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(self.recipe.out, self.state.global_step, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def process_count() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
