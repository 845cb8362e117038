"""The door into accelerate: what it does before it prepares a model of this package for several processes.

Imported with accelerate. `Accelerator` has no interface for it, so its `prepare` is replaced by one that looks first.
"""

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from fibattn.errors import InputError

_prepare: Callable[..., Any] = Accelerator.prepare


@functools.wraps(_prepare)
def _prepare_checked(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(one, nn.Module) and _attends_by_distance(one) for one in args):
        _check(self)
    return _prepare(self, *args, **kwargs)


def _attends_by_distance(model: nn.Module) -> bool:
    """Whether a model has layers whose attention does not go through Transformers' alone: our own, or converted."""
    from fibattn.model.layer import LearnedScale  # takes seconds

    return any(isinstance(module, LearnedScale) or hasattr(module, "fibattn") for module in model.modules())


def _check(accelerator: Accelerator) -> None:
    """Refuse what cuts sequences behind a layer's back: each part would attend to itself alone, and numbers be wrong.

    Raises:
        InputError: for a `ParallelismConfig` with `cp_size` or `sp_size` above 1.
    """
    chosen = accelerator.parallelism_config
    for name, what in (("cp_size", "context parallelism"), ("sp_size", "sequence parallelism")):
        if chosen is not None and (size := getattr(chosen, name)) > 1:
            raise InputError(
                f"{name} is {size}: accelerate's {what} cuts sequences, and attention to fixed distances would not see "
                f"past its own part; leave {name} at 1 (data parallelism and FSDP take whole sequences)"
            )


Accelerator.prepare = _prepare_checked
