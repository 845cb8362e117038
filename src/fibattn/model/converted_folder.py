"""Converted models on disk: folders that come back sparse, and that whoever does not know them refuses.

A converted model is saved as one of this project's own where its architecture fits (`native`). Any other becomes a
folder of the model type `fibattn_converted`: its configuration holds the decoder's own and the pattern, and loading it
gives the decoder's class, converted. Earlier versions wrote the decoder's own model type, which other programs ran
dense; such folders are refused.
"""

import os
import warnings
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fibattn.errors import InputError
from fibattn.model.configuration import FoundByShim, SavesShim
from fibattn.model.conversion import apply
from fibattn.model.converted_layers import IMPLEMENTATION
from fibattn.model.converted_pattern import STORED_PATTERN, in_words
from fibattn.model.native import native_config, plain

_choose, _save = PreTrainedModel.get_correct_attn_implementation, PreTrainedConfig.save_pretrained


@strict
class FibAttnConvertedConfig(SavesShim, PreTrainedConfig):
    """Configuration of a converted decoder of an architecture that `FibAttnForCausalLM` does not have.

    Args:
        source: the decoder's own configuration, as it was saved before.
        pattern: the arguments of `fibattn.convert`, and the offsets of every layer, which follow from them.
    """

    model_type = "fibattn_converted"

    source: dict | None = None
    pattern: dict | None = None

    @classmethod
    def of(cls, source: PreTrainedConfig, pattern: dict[str, Any]) -> "FibAttnConvertedConfig":
        """The configuration that a converted decoder is saved with."""
        kind = (source.architectures or ["ForCausalLM"])[0].partition("For")[2]
        name = f"FibAttnConverted{f'For{kind}' if kind else 'Model'}"
        return cls(source=plain(source), pattern=pattern, architectures=[name], dtype=source.dtype)


class FibAttnConvertedModel(FoundByShim):
    """Loads the folder of a converted decoder: the decoder's own class without its head, its attention sparse."""

    config_class = FibAttnConvertedConfig
    auto: Any = AutoModel

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *args: Any, config: FibAttnConvertedConfig | None = None, **kwargs: Any
    ) -> Any:
        """The decoder, with Transformers' arguments and result.

        Raises:
            InputError: for another `attn_implementation` than SDPA, through which layers with their own attention run,
                and for a configuration that was changed.
        """
        config = config or FibAttnConvertedConfig.from_pretrained(folder)
        if config.dtype is not None:
            kwargs.setdefault("dtype", config.dtype)
        source, how = cls._source(config, kwargs)
        loaded = cls.auto.from_pretrained(folder, *args, config=source, **how)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        apply(model, config.pattern or {}, model.name_or_path)
        return loaded

    @classmethod
    def _from_config(cls, config: FibAttnConvertedConfig, **kwargs: Any) -> PreTrainedModel:
        """What the Auto classes call for a model with fresh weights."""
        source, how = cls._source(config, kwargs)
        return apply(cls.auto.from_config(source, **how), config.pattern or {}, "")

    @classmethod
    def _source(cls, config: FibAttnConvertedConfig, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The decoder's own configuration, and the loader's arguments for it."""
        if config.source is None or config.pattern is None:
            raise InputError("the configuration of a converted model lacks its source or pattern; convert it again")
        named = kwargs.get("attn_implementation", config._attn_implementation)  # the Auto classes give it to the latter
        if named not in (None, "sdpa"):
            raise InputError(
                f"attn_implementation is {named!r}; a converted {config.source['model_type']} has its own, and what "
                "keeps full attention runs through sdpa: leave it out. For the dense model call fibattn.restore on this"
            )
        source = CONFIG_MAPPING[config.source["model_type"]].from_dict(config.source)
        return source, {**kwargs, "attn_implementation": "sdpa"}


class FibAttnConvertedForCausalLM(FibAttnConvertedModel):
    """The same with the language-model head."""

    auto = AutoModelForCausalLM


def _loader(auto: Any) -> type[FibAttnConvertedModel]:
    name = auto.__name__.removeprefix("AutoModel")
    return type(f"FibAttnConverted{name}", (FibAttnConvertedModel,), {"auto": auto})


_OTHERS = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
LOADERS: dict[Any, type[FibAttnConvertedModel]] = {
    one.auto: one for one in (FibAttnConvertedModel, FibAttnConvertedForCausalLM, *map(_loader, _OTHERS))
}
"""For each Auto class what it loads a converted folder with."""


def _save_configuration(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
    """As in Transformers, but the configuration of a converted model is written as one of this project's kinds."""
    pattern = getattr(config, STORED_PATTERN, None)
    if pattern is None:
        return _save(config, *args, **kwargs)
    own = native_config(config, pattern) or FibAttnConvertedConfig.of(config, pattern)
    return own.save_pretrained(*args, **kwargs)


def _choose_attention(model: PreTrainedModel, requested: str | None, is_init_check: bool = False) -> str:
    """As in Transformers, but a configuration with a pattern makes no new model: its pattern would not be applied."""
    pattern = getattr(model.config, STORED_PATTERN, None)
    if pattern is not None and is_init_check:
        given = in_words(pattern)
        if requested in (None, IMPLEMENTATION):
            raise InputError(
                f"this configuration has a {STORED_PATTERN}, which nothing applies here. It is that of a converted "
                "model in memory: give it a copy of the original's; or of a folder that an earlier fibattn wrote: load "
                "that with attn_implementation='sdpa', which leaves the pattern out, call fibattn.convert(model, "
                f"{given}) and save it anew"
            )
        warnings.warn(f"the attention is {requested!r} and the pattern left out: {given}", stacklevel=2)
        delattr(model.config, STORED_PATTERN)
    return _choose(model, requested, is_init_check)


def install() -> None:
    """Put both in their places; Transformers has no door for either."""
    PreTrainedModel.get_correct_attn_implementation = _choose_attention  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedConfig.save_pretrained = _save_configuration  # pyright: ignore[reportAttributeAccessIssue]
