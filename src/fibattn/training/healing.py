"""Healing a converted model: stage after stage beside the dense model, each a run of the Trainer that goes on if cut.

A stage's folder is a run's: its recipe, metrics and checkpoints, and in the end the weights that it trained.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from fibattn import files, sealed
from fibattn.data.order import check_tokens
from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import TrainingSequences, read_tokens
from fibattn.data.tokenizer import check_same_vocabulary, load_tokenizer
from fibattn.errors import InputError, MissingExtraError
from fibattn.model import FibAttnConfig
from fibattn.model.loading import find_model
from fibattn.model.loss import check_head
from fibattn.model.native import dense_config, pattern_of, plain
from fibattn.training import checkpoints
from fibattn.training.card import say_healed
from fibattn.training.converting import RECORD, find_source, load_source
from fibattn.training.healing_recipe import HealingRecipe
from fibattn.training.healing_stages import AttentionMatching, Distillation, HealingStage
from fibattn.training.recipe import OptimizerRecipe, Recipe
from fibattn.training.run import claim, is_finished, sequences_of
from fibattn.training.trainer import FibTrainer, process_count

_WEIGHTS = "trained.safetensors"
_LONGEST = 2048
_UNTOLD = {"dtype", "transformers_version", "architectures", "use_cache", "auto_map"}
_UNTOLD |= {"pad_token_id", "bos_token_id", "eos_token_id"}
"""What of a configuration says nothing of the weights."""

Stage = Callable[[PreTrainedModel, PreTrainedModel, list[nn.Parameter]], HealingStage]


def heal(recipe: HealingRecipe, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Heal a converted model, or go on with it, and return the folder of the healed one; `callbacks` are the Trainer's.

    Raises:
        InputError: for a model that is not converted, a dense model that does not go with it, text that is too short,
            another run in the output folder, and what `HealingRecipe.check` and `Recipe.check` refuse.
    """
    recipe.check()
    if process_count() > 1:
        raise InputError(f"torchrun started {process_count()} processes; healing takes one, with one GPU")
    folder, finished = find_model(recipe.model), recipe.folder / "model"
    student, teacher, called = _pair(recipe, folder)
    trained_at = student.config.get_text_config().max_position_embeddings
    length = min(trained_at, _LONGEST) if recipe.sequence_length is None else recipe.sequence_length
    stages: dict[str, Stage] = {
        "attention": AttentionMatching,
        "logits": partial(Distillation, text_weight=recipe.text_weight),
    }
    runs = _runs(recipe, length)
    stream, fingerprint = _text(recipe, folder)
    inputs = {
        "student_sha256": " ".join(files.sha256(path) for path in sorted(folder.glob("*.safetensors"))),
        "config_sha256": files.sha256(folder / "config.json"),
        "teacher_sha256": _fingerprint(teacher),
        "data_fingerprint": fingerprint,
        "recipe": {name: getattr(recipe, name) for name in ("tokens", "matching", "text_weight", "lora", "seed")},
    }
    if recipe.lora is not None and find_spec("peft") is None:
        raise MissingExtraError("--lora needs peft", "lora")
    check_tokens(len(stream), length)
    for run in runs.values():  # what is refused before this leaves no folder behind
        claim(run, inputs)
    text = {name: sequences_of(run, stream, fingerprint, run.out / "order.npy") for name, run in runs.items()}
    if is_finished(finished):
        return finished
    dtype, adapted = student.dtype, None
    on_gpu = torch.cuda.is_available()
    if recipe.lora is None or not on_gpu:
        student.float()
    if recipe.lora is not None:
        adapted = _with_adapters(student, recipe.lora)
    trained = [one for one in student.parameters() if one.requires_grad]
    for one in (student, teacher if on_gpu else teacher.float()):
        one.to("cuda" if on_gpu else "cpu")  # pyright: ignore[reportArgumentType]
    for name, run in runs.items():
        _run(run, stages[name](student, teacher, trained), text[name], callbacks)
    whole: Any = student if adapted is None else adapted.merge_and_unload()
    steps = {name: run.steps for name, run in runs.items()}
    about = {**inputs, "teacher": called, "sequence_length": length, "steps": steps}
    _write(finished, folder, whole.requires_grad_(True).to(dtype), about)
    return finished


def _pair(recipe: HealingRecipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    """The converted model and the dense one, which go together, and how the latter is called."""
    student = load_source(str(folder))
    config: Any = student.base_model.config
    if pattern_of(config) is None:
        raise InputError(f"{folder} was not converted; heal what `fibattn convert` wrote")
    before: Any = dense_config(config) if isinstance(config, FibAttnConfig) else config
    record = folder / RECORD
    name = recipe.teacher or (files.read_json(record).get("source") if record.exists() else None)
    if name is None:
        raise InputError(f"{folder} does not say what it was converted from (by {RECORD}); give --teacher")
    try:
        teacher = load_source(find_source(name))
    except InputError as error:
        raise InputError(f"the dense model: {error}; if it is elsewhere now, give --teacher") from None
    of_teacher: Any = teacher.base_model.config
    right, found = ({name: x for name, x in plain(one).items() if name not in _UNTOLD} for one in (before, of_teacher))
    wrong = [key for key in ("model_type", *right, *found) if right.get(key) != found.get(key)]
    if wrong:
        raise InputError(
            f"{name} is not what {folder} was converted from: {wrong[0]} is {found.get(wrong[0])} there, expected "
            f"{right.get(wrong[0])}; give the dense model by --teacher"
        )
    ours, theirs = (one.get_input_embeddings().weight.detach().float() for one in (student, teacher))  # pyright: ignore
    if (ours - theirs).norm() > 0.5 * theirs.norm():
        raise InputError(f"{name} has other weights than what {folder} was converted from; give that by --teacher")
    check_head(student, torch.arange(8)[None])
    return student, teacher, name


def _fingerprint(model: PreTrainedModel) -> str:
    """The SHA-256 of some numbers of each weight, from all over it: a whole model may be large, or lie on the Hub."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        flat = weight.detach().flatten()
        digest.update(flat[:: max(len(flat) // 4096, 1)].float().numpy().tobytes())
    return digest.hexdigest()


def _runs(recipe: HealingRecipe, length: int) -> dict[str, Recipe]:
    """What the Trainer is told of each stage that has steps."""
    step = recipe.sequences_per_step * length
    if recipe.tokens < step:
        raise InputError(f"tokens is {recipe.tokens}, less than the {step} of one step; give more, or smaller steps")
    whole = recipe.tokens // step
    matching = round(whole * recipe.matching)
    shared = Recipe(
        data=recipe.data or recipe.text[0],
        start=recipe.model,
        keep_model=True,
        sequence_length=length,
        sequences_per_step=recipe.sequences_per_step,
        micro_batch=recipe.micro_batch,
        order="epochs",
        data_seed=recipe.seed,
        save_every=recipe.save_every,
        keep_checkpoints=1,
        evaluate_every=None,
    )
    runs = {}
    for seed, (name, steps) in enumerate({"attention": matching, "logits": whole - matching}.items(), recipe.seed):
        if steps:
            warmup = min(100, steps // 10)
            rate = OptimizerRecipe(
                recipe.learning_rate, warmup_steps=warmup, final_fraction=0.0, decay="linear", weight_decay=0.0
            )
            runs[name] = replace(shared, out=recipe.folder / name, steps=steps, optimizer=rate, data_seed=seed)
            runs[name].check()
    return runs


def _text(recipe: HealingRecipe, folder: Path) -> tuple[TokenStream, str]:
    """What is trained on, and its fingerprint."""
    if recipe.data is not None:
        data = PreparedData.open(recipe.data)
        check_same_vocabulary(folder, data)
        return data.train, data.fingerprint
    stream = read_tokens(recipe.text, load_tokenizer(folder), recipe.tokens + 1)
    return stream, stream.fingerprint


def _with_adapters(student: PreTrainedModel, rank: int) -> Any:
    """Put LoRA at the projections of the attention; the adapters alone are trained then."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # a run that goes on begins with the same
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    chosen = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=names)
    return get_peft_model(student, chosen)


def _run(run: Recipe, stage: HealingStage, sequences: TrainingSequences, callbacks: Sequence[TrainerCallback]) -> None:
    """Train one stage, from its last checkpoint where it has one; once done, its weights are kept and no checkpoint."""
    weights = run.out / _WEIGHTS
    if weights.exists():
        stage.load_state_dict(load_file(weights))
        return
    FibTrainer(stage, run, sequences).run(f"heal, {run.out.name}", checkpoints.latest(run.out), callbacks)
    with files.replacing(weights) as temporary:
        save_file(stage.state_dict(), temporary)
    for checkpoint in checkpoints.folders(run.out):
        shutil.rmtree(checkpoint)


def _write(finished: Path, folder: Path, model: PreTrainedModel, healing: dict[str, Any]) -> None:
    """The converted folder again with the healed weights, sealed, by rename."""
    with files.replacing_folder(finished) as staged:
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns("*.safetensors*", "COMPLETE.json"))
        model.save_pretrained(staged)
        if (staged / RECORD).exists():
            files.write_json(staged / RECORD, files.read_json(staged / RECORD) | {"healing": healing})
        say_healed(staged, healing)
        sealed.seal(staged)
