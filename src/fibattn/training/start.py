"""Beginning with the weights of a finished model: to go on in longer sequences, or on other text."""

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_model

from fibattn import files, sealed
from fibattn.data.prepared import PreparedData
from fibattn.data.tokenizer import check_same_vocabulary
from fibattn.errors import InputError
from fibattn.model import FibAttnConfig, FibAttnForCausalLM

KEPT, GENERATION = "start.json", "generation_config.json"
"""A run's copies of the configuration of a start that it keeps, and of how that generates."""
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NEEDED = (_CONFIG, _WEIGHTS, "tokenizer.json")


def fingerprints(start: Path, data: PreparedData, *, kept: bool) -> dict[str, str]:
    """The SHA-256 of the weights that a run begins with, and of their configuration where it is `kept`.

    Raises:
        InputError: where no finished model is, it was cut short or changed, or it was trained with another tokenizer.
    """
    folder = _model(start)
    sealing = sealed.is_sealed(folder)  # as is what this project writes, and not what others do
    sums = sealed.verify(folder) if sealing else {name: files.sha256(folder / name) for name in _NEEDED}
    check_same_vocabulary(folder, data)
    return {"start_sha256": sums[_WEIGHTS]} | ({"config_sha256": sums[_CONFIG]} if kept else {})


def configuration(start: Path, run: Path, length: int) -> FibAttnConfig:
    """The configuration of the finished model `start`, for a run in sequences of `length` that keeps it.

    The run has a copy, since it may go on without its start. A longer `length` is the new training length, but where
    the rotary positions are scaled by the old one.

    Raises:
        InputError: where no finished model is, or one of another kind.
    """
    copy = run / KEPT
    found = files.read_json(copy if copy.exists() else _model(start) / _CONFIG)
    if (kind := found.get("model_type")) != FibAttnConfig.model_type:
        raise InputError(f"{start} is a {kind} model; only fibattn models are trained here, others by Transformers")
    config = FibAttnConfig.from_dict(found)
    if config.rope_parameters["rope_type"] in ("default", "linear", "llama3"):  # pyright: ignore
        config.max_position_embeddings = max(config.max_position_embeddings, length)
    return config


def keep(start: Path, run: Path, config: FibAttnConfig) -> None:
    """Give the run its copies of the configuration of a start that it keeps, and of how that generates."""
    if not (run / KEPT).exists() and (how := _model(start) / GENERATION).exists():
        shutil.copy(how, run / GENERATION)
    files.write_json(run / KEPT, config.to_dict())


def check_shapes(model: FibAttnForCausalLM, start: Path) -> None:
    """Refuse a `start` that has other weights than `model`, which may be on the meta device."""
    path = _model(start) / _WEIGHTS
    before = files.read_json(path.with_name(_CONFIG))
    if model.config.converted_from is None and before.get("converted_from"):
        raise InputError(f"{start} was converted from another model, which no recipe describes; add --keep-model")
    if (was := before.get("hidden_act", model.config.hidden_act)) != model.config.hidden_act:
        raise InputError(
            f"{start} has the activation {was}, the recipe {model.config.hidden_act}; give the recipe that of its start"
        )
    with safe_open(path, framework="pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ours = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{path} does not fit the recipe: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here; give the recipe the sizes of its start, or keep_model"
            )


def load_weights(model: FibAttnForCausalLM, start: Path) -> None:
    """Put the weights of the finished model `start` into `model`, which has the same."""
    load_model(model, _model(start) / _WEIGHTS)


def _model(start: Path) -> Path:
    for folder in (start, start / "model"):
        if all((folder / name).exists() for name in _NEEDED):  # a checkpoint has no tokenizer
            return folder
    raise InputError(
        f"{start} holds no finished model ({', '.join(_NEEDED)}); give a finished run, or a model's folder"
    )
