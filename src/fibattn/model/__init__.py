"""The model: one Hugging Face class for every row of the study, registered with the Auto classes."""

import sys
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fibattn.model.configuration import FibAttnConfig
from fibattn.model.converted_folder import (
    LOADERS,
    FibAttnConvertedConfig,
    FibAttnConvertedForCausalLM,
    FibAttnConvertedModel,
    install,
)
from fibattn.model.modeling import FibAttnForCausalLM, FibAttnModel

AutoModel.register(FibAttnConfig, FibAttnModel, exist_ok=True)
AutoModelForCausalLM.register(FibAttnConfig, FibAttnForCausalLM, exist_ok=True)
for _auto, _loader in LOADERS.items():
    _auto.register(FibAttnConvertedConfig, _loader, exist_ok=True)
# `transformers serve` looks for a model's class in the library itself, and holds a copy of the library from before
# others of its modules replaced it.
_server = sys.modules.get("transformers.cli.serving.model_manager")
_library: Any = transformers if _server is None else _server.transformers
_kinds = ((FibAttnConfig, FibAttnForCausalLM), (FibAttnConvertedConfig, FibAttnConvertedForCausalLM))
for _config, _model in _kinds:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    setattr(_library, _model.__name__, _model)
    # Registering reaches no table of names. By this one the Trainer's label smoothing knows whose labels to shift, and
    # lm-eval, pipelines and model cards what the model is for.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model.__name__
install()

__all__ = [
    "FibAttnConfig",
    "FibAttnConvertedConfig",
    "FibAttnConvertedForCausalLM",
    "FibAttnConvertedModel",
    "FibAttnForCausalLM",
    "FibAttnModel",
]
