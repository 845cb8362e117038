"""Fixed-offset sparse attention: a dense local window plus a few Fibonacci-spaced distances.

`attend` is the operator, `Pattern` says which distances, `FibAttnForCausalLM` is a Hugging Face model made
of both. Names are imported on first use, so what needs no PyTorch loads none. The model is registered with the Auto
classes as soon as both this package and Transformers are imported, whichever comes first.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fibattn._version import __version__

if TYPE_CHECKING:
    from fibattn.attention import (
        AttentionCache,
        attend,
        attend_cached,
        attend_chosen,
        attend_chosen_cached,
        padded_positions,
    )
    from fibattn.errors import InputError
    from fibattn.model import FibAttnConfig, FibAttnForCausalLM, FibAttnModel
    from fibattn.model.conversion import convert, restore
    from fibattn.model.layer import FibAttention
    from fibattn.pattern import ChosenPattern, LearnedPattern, Pattern, base_rungs, layer_alphas, layer_patterns

__all__ = [
    "AttentionCache",
    "ChosenPattern",
    "FibAttention",
    "FibAttnConfig",
    "FibAttnForCausalLM",
    "FibAttnModel",
    "InputError",
    "LearnedPattern",
    "Pattern",
    "__version__",
    "attend",
    "attend_cached",
    "attend_chosen",
    "attend_chosen_cached",
    "base_rungs",
    "convert",
    "layer_alphas",
    "layer_patterns",
    "padded_positions",
    "restore",
]
_HOMES = {
    "attention": (
        "AttentionCache",
        "attend",
        "attend_cached",
        "attend_chosen",
        "attend_chosen_cached",
        "padded_positions",
    ),
    "errors": ("InputError",),
    "model": ("FibAttnConfig", "FibAttnForCausalLM", "FibAttnModel"),
    "model.conversion": ("convert", "restore"),
    "model.layer": ("FibAttention",),
    "pattern": ("ChosenPattern", "LearnedPattern", "Pattern", "base_rungs", "layer_alphas", "layer_patterns"),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'fibattn' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"fibattn.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_AFTERWARDS = {
    "transformers": "fibattn.model",
    "peft": "fibattn.model.adapters",
    "accelerate": "fibattn.parallel.door",
    "transformers.trainer": "fibattn.parallel.trainer",
}
"""What makes this package known to a library, once both are imported."""


class _Finder:
    """Finds these libraries as the finders behind it do, and has this package made known to each once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _AFTERWARDS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_load_and_tell, spec.loader.exec_module)
        return spec


def _load_and_tell(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    load(module)
    importlib.import_module(_AFTERWARDS[module.__name__])


_finders = ((type(one).__module__, type(one).__name__) for one in sys.meta_path)
if (__name__, _Finder.__name__) not in _finders:  # two would ask each other for ever
    sys.meta_path.insert(0, _Finder())
for _library, _home in _AFTERWARDS.items():
    if _library in sys.modules:
        importlib.import_module(_home)
