"""The model: one Hugging Face class for every row of the study, registered with the Auto classes."""

import sys
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fibattn.model.configuration import FibAttnConfig
from fibattn.model.modeling import FibAttnForCausalLM, FibAttnModel
from fibattn.model.unapplied import install

AutoConfig.register(FibAttnConfig.model_type, FibAttnConfig, exist_ok=True)
AutoModel.register(FibAttnConfig, FibAttnModel, exist_ok=True)
AutoModelForCausalLM.register(FibAttnConfig, FibAttnForCausalLM, exist_ok=True)
# Registering reaches no table of names. By this one the Trainer's label smoothing knows whose labels to shift, and
# lm-eval, pipelines and model cards what the model is for.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FibAttnConfig.model_type] = FibAttnForCausalLM.__name__
# `transformers serve` looks for a model's class in the library itself, and holds a copy of the library from before
# others of its modules replaced it.
_server = sys.modules.get("transformers.cli.serving.model_manager")
_library: Any = transformers if _server is None else _server.transformers
_library.FibAttnForCausalLM = FibAttnForCausalLM
install()

__all__ = ["FibAttnConfig", "FibAttnForCausalLM", "FibAttnModel"]
