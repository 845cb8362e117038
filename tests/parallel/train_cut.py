"""Run by torchrun, also on CPUs: the stock Trainer, or recipes of `fibattn train`, on cut rows."""

import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import foreign_decoders
import tiny_models
import torch
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

from fibattn import convert, files
from fibattn.cli.main import main as cli
from fibattn.training.recipe_file import load_recipe
from fibattn.training.run import train

ROWS, LENGTH = 12, 48


def rows() -> list[dict[str, torch.Tensor]]:
    """Some targets are left out, more in one row than in another, and some rows are padded."""
    drawn = torch.randint(2, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    made = []
    for index, ids in enumerate(drawn):
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[3 * index : 3 * index + 10] = -100
        if index % 2:
            mask[: 2 * index], labels[: 2 * index + 1] = 0, -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


class Dies(TrainerCallback):
    """One process is gone in the middle of the last checkpoint, while weights are gathered for it."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == state.max_steps and not state.is_world_process_zero:
            model.register_state_dict_pre_hook(lambda *_: os._exit(7))


def stock(out: Path, way: str, processes: int) -> list[float]:
    """The losses that the Trainer logs, of training and of an evaluation, with its norms of gradients.

    Several processes cut each row over two, and half as many share the rows and the weights.
    """
    groups = max(processes // 2, 1)
    converted = way == "converted, smoothed"
    kept = {"window": 3, "rungs": 7, "keep_layers": [1]}
    model = convert(foreign_decoders.model("qwen2"), **kept) if converted else tiny_models.model("mixture")
    chosen: dict[str, Any] = {"label_smoothing_factor": 0.1} if "smoothed" in way else {}
    if way == "accumulated, checkpointed":
        chosen = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=2 // groups,
        per_device_eval_batch_size=4 // groups,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        parallelism_config=ParallelismConfig(cp_size=2, dp_shard_size=groups) if processes > 1 else None,
        fsdp=True if processes > 1 else None,
        **chosen,
    )
    given = rows()  # of the last batch of an evaluation, where it is not full, accelerate drops copies that are none
    trainer = Trainer(model=model, args=arguments, train_dataset=given, eval_dataset=given[:8])  # pyright: ignore
    trainer.train()
    return [
        line[name] for line in trainer.state.log_history for name in ("loss", "grad_norm", "eval_loss") if name in line
    ]


def evaluation(out: Path) -> list[str]:
    """The words of an evaluation of the run "one" of the folder."""
    data = load_recipe(str(out / "one" / "recipe.json")).data
    return [str(out / "one"), "--data", str(data), "--lengths", "32", "64", "--out", str(out / "evaluation.json")]


WAYS = ("plain", "accumulated, checkpointed", "smoothed", "converted, smoothed")


_init = AcceleratorState.__init__


def _init_as_on_gpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in vars(self):
        self.distributed_type = DistributedType.FSDP


def main(out: Path, *words: str) -> None:
    torch.set_num_threads(1)
    # accelerate shards no weights over CPUs, and so cuts no sequences over them.
    AcceleratorState.__init__ = _init_as_on_gpus
    for word in words:
        if word.endswith(".json"):
            train(load_recipe(word), [Dies()] if "dies" in words else [])
    ways = [word for word in words if word in WAYS]
    found = {way: stock(out, way, int(os.environ["WORLD_SIZE"])) for way in ways}
    if os.environ["RANK"] == "0":
        files.write_json(out / "found.json", found)
    if "evaluate" in words:
        with (out / f"said-{os.environ['RANK']}").open("w") as said, redirect_stderr(said):
            assert cli(["eval", *evaluation(out), "--context-parallel", "2"]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
