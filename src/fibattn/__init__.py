"""Fixed-offset sparse attention: a dense local window plus a few Fibonacci-spaced distances.

`attend` is the operator, `Pattern` says which distances, `FibAttnForCausalLM` is a Hugging Face model made
of both. Importing the package registers the model with Transformers' Auto classes.
"""

import sys
from pathlib import Path

from fibattn._version import __version__


def _is_command_line() -> bool:
    """Whether this is the `fibattn` command, which imports only the rooms that its verb needs."""
    return Path(sys.argv[0]).stem == "fibattn" or sys.orig_argv[1:3] == ["-m", "fibattn"]


if not _is_command_line():
    from fibattn.attention import attend, attend_cached, attend_scaled, attend_scaled_cached
    from fibattn.errors import InputError
    from fibattn.model import FibAttnConfig, FibAttnForCausalLM, FibAttnModel
    from fibattn.model.conversion import convert, restore
    from fibattn.pattern import Pattern, layer_alphas, layer_patterns

    __all__ = [
        "FibAttnConfig",
        "FibAttnForCausalLM",
        "FibAttnModel",
        "InputError",
        "Pattern",
        "__version__",
        "attend",
        "attend_cached",
        "attend_scaled",
        "attend_scaled_cached",
        "convert",
        "layer_alphas",
        "layer_patterns",
        "restore",
    ]
