"""A converted model in the hands of a loader that knows nothing of conversion: it must not run dense unasked.

`config.json` of a converted model names its attention, `fibattn`, but a loader may pass `attn_implementation=None`, and
Transformers then takes its default. Loaders that do (`transformers serve`), and other engines, choose a class by the
configuration's `architectures`: there the folder names one that nobody has. The Auto classes choose by `model_type`;
once this package is imported, None means to them what the folder says.
"""

import warnings
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from fibattn.model.converted_layers import IMPLEMENTATION, STORED_PATTERN

_PREFIX = "FibAttnConverted"

_choose, _save = PreTrainedModel.get_correct_attn_implementation, PreTrainedConfig.save_pretrained


def _choose_attention(model: PreTrainedModel, requested: str | None, is_init_check: bool = False) -> str:
    """As in Transformers, but a model whose configuration has a pattern runs dense only when that is asked for."""
    if hasattr(model.config, STORED_PATTERN):
        if requested is None:
            requested = IMPLEMENTATION
        elif requested != IMPLEMENTATION and is_init_check:
            warnings.warn(
                f"this is a converted model, but its attention was set to {requested!r} while loading: it runs dense. "
                "For its pattern leave attn_implementation out and call fibattn.convert(model)",
                stacklevel=2,
            )
    return _choose(model, requested, is_init_check)


def _save_configuration(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
    """As in Transformers, but a configuration that has a pattern names an architecture of its own."""
    if hasattr(config, STORED_PATTERN):
        names: list[str] = config.architectures or []
        config.architectures = [name if name.startswith(_PREFIX) else f"{_PREFIX}{name}" for name in names]
    _save(config, *args, **kwargs)


def install() -> None:
    """Put both in their places; Transformers has no door for either."""
    PreTrainedModel.get_correct_attn_implementation = _choose_attention  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedConfig.save_pretrained = _save_configuration  # pyright: ignore[reportAttributeAccessIssue]
