"""Models on disk: which folder is meant, and the model in it, whole."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fibattn import files
from fibattn.errors import InputError
from fibattn.model.configuration import FibAttnConfig
from fibattn.sealed import is_sealed, verify


def model_name(folder: Path) -> str:
    """What a model folder is called: by the run that it is in, or by its own name."""
    return (folder.parent if folder.name == "model" else folder).name


def find_model(path: Path) -> Path:
    """The model folder that `path` names: itself, or the finished model of a run.

    Raises:
        InputError: when there is no model, or a sealed one was cut short or changed.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").exists():
            if is_sealed(folder):
                verify(folder)
            return folder
    found = sorted(path.glob("checkpoint-*/config.json"))
    checkpoint = f", or a checkpoint of this one, such as {found[0].parent}" if found else ""
    raise InputError(f"{path} holds no model (config.json is missing); give a model folder or finished run{checkpoint}")


def load_model(folder: Path, **changes: Any) -> PreTrainedModel:
    """The model in `folder`, float32, on the GPU where there is one; `changes` go into its configuration.

    Raises:
        InputError: when the files are not those of a causal language model, or weights are missing or cut short.
    """
    model = load_whole(folder, "restore it or train it anew", dtype=torch.float32, **changes)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore


def load_whole(name: Path | str, repair: str, **how: Any) -> PreTrainedModel:
    """A causal language model of Transformers with all of its weights; `how` is for `from_pretrained`.

    Raises:
        InputError: when it cannot be loaded or weights are missing; the message ends with `repair`, what to do.
    """
    disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **how)  # pyright: ignore
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} holds no model that can be loaded ({reason}); {repair}") from None
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise InputError(f"{name} lacks {len(names)} weights, {names[0]} among them; {repair}")
    return model


def load_bounded(folder: Path, full_reach: int | Literal["saved"] | None) -> PreTrainedModel:
    """The model in `folder`, its full-attention layers looking back `full_reach` tokens at most.

    None takes a bound away that the model was saved with; "saved" leaves the model as it is.

    Raises:
        InputError: as `load_model`, for a bound below 1, and on a model that is not this project's.
    """
    if full_reach == "saved":
        return load_model(folder)
    config = files.read_json(folder / "config.json")
    if (kind := config.get("model_type")) != FibAttnConfig.model_type:
        raise InputError(f"{folder} is a {kind} model; only fibattn models take a full reach, leave it out")
    if "full_attention" not in (config.get("layer_types") or []):
        raise InputError(f"full_reach is {full_reach}, but no layer of {folder} has full attention; leave it out")
    return load_model(folder, full_reach=full_reach)
