"""One training run from recipe to finished model; run again, it goes on where it was."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from fibattn import files, machine, sealed
from fibattn.data.order import ensure_order
from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import TrainingSequences
from fibattn.data.tokenizer import load_tokenizer, save_tokenizer
from fibattn.errors import InputError, MissingExtraError
from fibattn.model import FibAttnConfig, FibAttnForCausalLM
from fibattn.progress import duration, quantity
from fibattn.training import checkpoints, start
from fibattn.training.card import change_bound, write_card
from fibattn.training.held_out import HeldOut
from fibattn.training.presets import ON_CPU
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe, to_json
from fibattn.training.trainer import FibTrainer, process_count

_MAY_CHANGE = {"log_every", "save_every", "keep_checkpoints", "track", "micro_batch", "out", "data", "start"}
_MAY_CHANGE |= {"evaluate_every", "evaluate_tokens", "parallel", "context_parallel"}
_MAY_CHANGE |= {"model.full_reach"}  # of the finished model; training is the same
_SINCE = {"config_sha256", "teacher_sha256"}  # inputs that runs of before did not write down
_CHAT = Path(__file__).with_name("chat.jinja")


def model_config(recipe: Recipe, vocab_size: int, separator: int) -> FibAttnConfig:
    """The configuration that a recipe means, for a tokenizer with `vocab_size` ids."""
    shape = to_json(recipe.resolved().model)
    theta, _ = shape.pop("rope_theta"), shape.pop("full_reach")  # the bound is for the finished model alone
    return FibAttnConfig(
        **shape,
        vocab_size=vocab_size,
        max_position_embeddings=recipe.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=separator,
        eos_token_id=separator,
    )


def build_model(recipe: Recipe, vocab_size: int, separator: int) -> FibAttnForCausalLM:
    """A freshly initialised model; `init_seed` alone decides its weights."""
    return _fresh(model_config(recipe, vocab_size, separator), recipe)


def _fresh(config: FibAttnConfig, recipe: Recipe) -> FibAttnForCausalLM:
    torch.manual_seed(recipe.init_seed)
    return FibAttnForCausalLM(config)


def enable_checkpointing(model: Any) -> None:
    """Compute activations again; renamed in the course of Transformers 5, where the old name warns."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train, or go on training, and return the folder of the finished model.

    `callbacks` are the Trainer's, for whoever wants to watch or hold a run.

    Raises:
        InputError: for a recipe that cannot train, data or a start that do not match, another recipe's run in the
            output folder, or a loss that is not finite.
    """
    recipe.check()
    recipe.split(process_count())
    state = PartialState(cpu=not torch.cuda.is_available())
    if missing := [name for name in recipe.track if find_spec(name) is None]:
        raise MissingExtraError(f"track asks for {', '.join(missing)}", "tracking")
    if recipe.compile and not torch.cuda.is_available():
        machine.check_compiler()
    with state.main_process_first():
        data = PreparedData.open(recipe.data, verify=state.is_main_process)
        tokenizer = _tokenizer(data)  # needed at the end, when much would be lost
        config = _config(recipe, data, tokenizer)  # a shape that cannot be claims no folder
        order = _order_path(recipe)
        sequences = sequences_of(recipe, data.train, data.fingerprint, order)
        inputs = {"data_fingerprint": data.fingerprint, "order_sha256": files.sha256(order)}
        if recipe.start is not None:
            inputs |= _start(recipe, config, data)
        claim(recipe, inputs)
        if recipe.keep_model and recipe.start is not None:
            start.keep(recipe.start, recipe.out, config)
        if not (recipe.out / "tokenizer").exists():
            save_tokenizer(tokenizer, recipe.out / "tokenizer")  # for who looks at a checkpoint
    finished = recipe.out / "model"
    if is_finished(finished):
        if state.is_main_process:
            _bound(finished, recipe)
        return finished
    disable_progress_bar()
    checkpoint = checkpoints.latest(recipe.out)
    model = _begun(config, recipe, checkpoint)
    _announce(model, sequences, recipe, state)
    trainer = FibTrainer(model, recipe, sequences, _held_out(recipe, data))
    if checkpoint is not None:
        _check_same(checkpoint, recipe, inputs)
        _check_sharded(checkpoint, trainer.is_fsdp_enabled)
        state.print(f"going on from {checkpoint}")
    trainer.run("train", checkpoint, callbacks)
    _finish(trainer, recipe, data, tokenizer, finished)
    return finished


def _begun(config: FibAttnConfig, recipe: Recipe, checkpoint: Path | None) -> FibAttnForCausalLM:
    """The model as training begins: fresh, or with the weights of its start; those of a checkpoint are loaded later."""
    try:
        model = _fresh(config, recipe)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise InputError(f"a model of these sizes does not fit into memory ({error}); make it smaller") from None
    if recipe.start is not None and checkpoint is None:
        start.load_weights(model, recipe.start)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _config(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerFast) -> FibAttnConfig:
    if recipe.keep_model and recipe.start is not None:
        return start.configuration(recipe.start, recipe.out, recipe.sequence_length)
    config = model_config(recipe, data.vocab_size, data.separator)
    if tokenizer.eos_token_id not in (None, data.separator):
        config.eos_token_id = [data.separator, tokenizer.eos_token_id]  # pyright: ignore  # so the turns of a chat end
    return config


def _held_out(recipe: Recipe, data: PreparedData) -> HeldOut | None:
    """What the loss is measured on in training; None where that is not wanted, or there is nothing."""
    if recipe.evaluate_every is None:
        return None
    length, tokens = recipe.sequence_length, recipe.evaluate_tokens
    return HeldOut.choose(data.validation, data.training, data.token_bytes, length, tokens)


def _announce(model: FibAttnForCausalLM, sequences: TrainingSequences, recipe: Recipe, state: PartialState) -> None:
    several = "" if state.num_processes == 1 else f"{state.num_processes} × "
    state.print(
        f"{quantity(model.num_parameters())} parameters, {quantity(recipe.tokens)} tokens in {recipe.steps} steps "
        f"of {recipe.sequences_per_step} sequences of {recipe.sequence_length}, on {several}{machine.device_name()}; "
        f"highest learning rate {recipe.optimizer.rates}"
    )
    if recipe.steps <= (warmup := recipe.optimizer.warmup_steps):
        state.print(
            f"the rate warms up for {warmup} steps and the run has {recipe.steps}: it ends before the learning rate is "
            f"{recipe.optimizer.learning_rate:g}; set optimizer.warmup_steps lower"
        )
    if not torch.cuda.is_available():
        _say_how_long(model, sequences, recipe, state)


def _say_how_long(model: FibAttnForCausalLM, sequences: TrainingSequences, recipe: Recipe, state: PartialState) -> None:
    """Say what a run without a GPU should be told before its first step: the hours, and the minutes of compiling."""
    one = {name: value[None] for name, value in sequences[0].items()}
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        model(**one, use_cache=False).loss.backward()
        took = time.monotonic() - began
    model.zero_grad()
    seconds = took * recipe.steps * recipe.sequences_per_step / state.num_processes
    if seconds > 3600:
        state.print(
            f"no GPU here: the run takes about {duration(seconds)}, {took:.2g} s for each sequence; the recipe "
            f"{ON_CPU} fits a CPU: fibattn train {ON_CPU} …"
        )
    if recipe.compile:
        state.print("the first step is compiled, which takes minutes")


def _tokenizer(data: PreparedData) -> PreTrainedTokenizerFast:
    try:
        return load_tokenizer(data.tokenizer_path)
    except InputError as error:
        raise InputError(f"{error}; run the same `fibattn prepare` again, it makes anew what is damaged") from None


def _start(recipe: Recipe, config: FibAttnConfig, data: PreparedData) -> dict[str, str]:
    """The fingerprints of the start; once the run has a checkpoint, the start itself is not needed any more."""
    assert recipe.start is not None
    if recipe.start.resolve() in (recipe.out.resolve(), recipe.out.resolve() / "model"):
        raise InputError(f"start is {recipe.start}, the place of the run itself; give the run another folder by --out")
    known = recipe.out / "inputs.json"
    if known.exists() and not recipe.start.exists():
        before = files.read_json(known)
        return {"start_sha256": ""} | {name: before[name] for name in before.keys() & {"start_sha256", *_SINCE}}
    fingerprints = start.fingerprints(recipe.start, data, kept=recipe.keep_model)
    with torch.device("meta"):
        start.check_shapes(FibAttnForCausalLM(config), recipe.start)
    return fingerprints


def _order_path(recipe: Recipe) -> Path:
    """Where the order of this recipe is: beside the data, so that every run of the same order shares it.

    Where the data may only be read, and nobody has made it there, it lies in the run's own folder.
    """
    sequences = recipe.steps * recipe.sequences_per_step
    name = f"{recipe.order}-seed{recipe.data_seed}-length{recipe.sequence_length}-sequences{sequences}.npy"
    path = recipe.data / "order" / name
    if not path.exists() and not os.access(recipe.data, os.W_OK):
        path = recipe.out / "order" / name
    return path


def sequences_of(recipe: Recipe, stream: TokenStream, fingerprint: str, order: Path) -> TrainingSequences:
    """The sequences of a run's steps, of a stream with this fingerprint, in the order of a file, made where it is not.

    Raises:
        InputError: as `fibattn.data.order.load_order`, and for a stream shorter than a sequence.
    """
    count, length = recipe.steps * recipe.sequences_per_step, recipe.sequence_length
    starts = ensure_order(order, recipe.order, recipe.data_seed, count, len(stream), length, fingerprint)
    return TrainingSequences(stream, starts, length)


def claim(recipe: Recipe, inputs: dict[str, str]) -> None:
    """Write down what the run is, or check that the run in the folder is this one, of which the bound may change."""
    path = recipe.out / "recipe.json"
    if path.exists():
        _check_same(recipe.out, recipe, inputs)
        if load_recipe(str(path)).full_reach == recipe.full_reach:
            return
    files.write_json(recipe.out / "inputs.json", inputs)
    files.write_json(path, to_json(recipe))


def _check_same(where: Path, recipe: Recipe, inputs: dict[str, str]) -> None:
    """Refuse to go on with a run folder or a checkpoint of another recipe or other inputs."""
    old, new = (_flat(to_json(one.resolved())) for one in (load_recipe(str(where / "recipe.json")), recipe))
    changed = [key for key in new if key not in _MAY_CHANGE and old.get(key) != new[key]]
    if changed:
        details = "; ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in changed)
        raise InputError(f"{where} holds another run: {details}. Give a new --out, or the old values")
    known = files.read_json(where / "inputs.json")
    wanted = {name: one for name, one in inputs.items() if name in known or name not in _SINCE}
    if others := [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]:
        raise InputError(
            f"{where} was trained on other data, in another order or from another start ({', '.join(others)} in "
            "inputs.json). Give a new --out, or the old ones"
        )


def _check_sharded(checkpoint: Path, sharded: bool) -> None:
    """Refuse a checkpoint whose optimizer has another form than the run's; the number of processes may change."""
    was = (checkpoint / "optimizer.bin").exists()
    if was != sharded:
        kept, way = "whole in each process", "with --parallel ddp, without --context-parallel"
        if was:
            kept, way = ("sharded over processes", "under torchrun, with any number of processes, and --parallel fsdp")
        raise InputError(f"{checkpoint} was written with weights {kept}; go on {way}, or give a new --out")


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe in JSON, those of its parts by their dotted names."""
    flat = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def is_finished(model: Path) -> bool:
    """Whether a run's model is there, which is then said.

    Raises:
        InputError: for a damaged one, and for anything else in its place.
    """
    if not sealed.is_sealed(model):
        if model.exists():
            raise InputError(f"{model} exists and is no finished model of a run; move it away, or give another --out")
        return False
    try:
        sealed.verify(model)
    except InputError as error:
        raise InputError(f"{error}, or remove {model}: the same command makes it anew from the last one") from None
    PartialState().print(f"{model} is finished already")
    return True


def _bound(finished: Path, recipe: Recipe) -> None:
    """Give a finished model the bound of the recipe, where it has another."""
    old = FibAttnConfig.from_pretrained(finished)
    if not recipe.keep_model and old.full_reach != recipe.full_reach:
        new = FibAttnConfig.from_pretrained(finished, full_reach=recipe.full_reach)
        new.save_pretrained(finished)
        change_bound(finished, old, new)
        sealed.seal(finished)
        print(f"full_reach was {old.full_reach} and is {new.full_reach} now; evaluations were of the model as it was")


def _finish(
    trainer: FibTrainer, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerFast, finished: Path
) -> None:
    """Write the model folder, with all that it is published with, sealed, by rename."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())  # pyright: ignore
    with files.replacing_folder(finished) if trainer.args.should_save else nullcontext(finished) as staged:
        trainer.save_model(str(staged))
        if trainer.args.should_save:
            # A base model knows no roles, but chat programs and instruction tuning ask for a template.
            tokenizer.chat_template = tokenizer.chat_template or _CHAT.read_text(encoding="utf-8")
            tokenizer.save_pretrained(staged)
            if (kept := recipe.out / start.GENERATION).exists():
                shutil.copy(kept, staged)
            config = FibAttnConfig.from_pretrained(staged)
            if recipe.full_reach is not None and not recipe.keep_model:
                config.full_reach = recipe.full_reach
                config.save_pretrained(staged)
            write_card(staged, config, parameters, recipe, data)
            sealed.seal(staged)
    trainer.accelerator.wait_for_everyone()
