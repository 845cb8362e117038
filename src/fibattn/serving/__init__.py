"""vLLM's plugin: the model, the backend of its layers, and what they need of the paged cache.

vLLM calls `register` in each of its processes, by the entry point `fibattn` of `vllm.general_plugins`. The rest
is imported when vLLM builds a model of ours. For Transformers' continuous batching see `fibattn.model.batching`.
"""

import logging

from fibattn.errors import InputError

TRIED = ("0.32.0",)
"""The versions of vLLM that the tests have run on."""

_log = logging.getLogger("vllm.fibattn")


def register() -> None:
    """Make the model and its attention known to vLLM; a second call changes nothing.

    Raises:
        InputError: when this vLLM lacks a door that the plugin needs.
    """
    import vllm

    tried = f"tried are {', '.join(TRIED)}"
    if vllm.__version__.partition("+")[0] not in TRIED:
        _log.warning("vLLM %s is none of those that fibattn was tried with: %s", vllm.__version__, tried)
    try:
        from vllm import ModelRegistry
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise InputError(f"vLLM {vllm.__version__} lacks what fibattn's plugin needs ({error}); {tried}") from None
    import fibattn.model  # noqa: F401  its configuration is known then, without trust_remote_code

    for name in ("FibAttnForCausalLM", "FibAttnConvertedForCausalLM"):
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
    if "FIBATTN" not in AttentionBackendEnum.__members__:
        register_backend("FIBATTN", f"{__name__}.backend.FibAttnBackend")
