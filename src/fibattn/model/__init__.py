"""The model: one Hugging Face class for every row of the study, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fibattn.model.configuration import FibAttnConfig
from fibattn.model.modeling import FibAttnForCausalLM, FibAttnModel

AutoConfig.register(FibAttnConfig.model_type, FibAttnConfig, exist_ok=True)
AutoModel.register(FibAttnConfig, FibAttnModel, exist_ok=True)
AutoModelForCausalLM.register(FibAttnConfig, FibAttnForCausalLM, exist_ok=True)

__all__ = ["FibAttnConfig", "FibAttnForCausalLM", "FibAttnModel"]
