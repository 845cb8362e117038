"""Models of other kinds on disk: loaded for conversion, and written as folders that whoever has them loads."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fibattn import files
from fibattn._version import __version__
from fibattn.errors import InputError
from fibattn.model.converted_pattern import STORED_PATTERN
from fibattn.model.loading import find_model, load_whole
from fibattn.model.native import pattern_of
from fibattn.sealed import seal
from fibattn.training.card import write_converted_card

RECORD = "conversion.json"
"""The file of a converted folder that says what it was made from, and how its kept layers were found."""


def find_source(name: str) -> str:
    """The model that `name` means, as Transformers takes it: of a folder or a run as `find_model`, else of the Hub."""
    return str(find_model(Path(name))) if Path(name).exists() else name


def load_source(name: str) -> PreTrainedModel:
    """The causal language model that `find_source` found, in the precision that it was saved in.

    Raises:
        InputError: for a model that cannot be loaded, or whose weights are quantised.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded ({str(error).splitlines()[0]}); check it, and the network") from None
    if (given := getattr(config, "quantization_config", None)) is not None:
        kind = given.get("quant_method") if isinstance(given, dict) else type(given).__name__
        raise InputError(f"the weights of {name} are quantised ({kind}); give those that they were made of")
    how = {"attn_implementation": "sdpa"} if hasattr(config, STORED_PATTERN) else {}  # an older folder's is left out
    return load_whole(name, "give a whole model, and check the network", dtype="auto", **how)


def load_tokenizer_of(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights of a model that `find_source` found; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_folder(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    source: str,
    placement: dict[str, Any] | None = None,
) -> None:
    """Write a model that was converted, or restored, as the folder `out`, whole or not at all.

    A converted one has a card and the record of its conversion, and is sealed. `source` says what it was made from;
    `placement` is what `fibattn.evaluation.placement.search` found, where the kept layers were measured.
    """
    pattern = pattern_of(model.base_model.config)
    with files.replacing_folder(out) as staged:
        model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if pattern is not None:
            found = Path(source).resolve() if Path(source).exists() else source  # for whoever heals it elsewhere
            record = {"source": str(found), "fibattn": __version__, "pattern": pattern, "placement": placement}
            files.write_json(staged / RECORD, record)
            write_converted_card(staged, out.name, source, model, placement)
            seal(staged)
        else:
            files.let_read(staged)
