"""Finds this model's classes in the installed package: `pip install fibattn`.

`save_pretrained` puts this file beside the weights, so that what is called with `trust_remote_code=True` and never
heard of `fibattn` (servers, evaluation harnesses) can load the folder.
"""

from fibattn.model import FibAttnConfig, FibAttnForCausalLM, FibAttnModel

__all__ = ["FibAttnConfig", "FibAttnForCausalLM", "FibAttnModel"]
