"""The door into accelerate: `ParallelismConfig(cp_size=N)`, given to the Trainer or an `Accelerator`, cuts sequences.

Imported with accelerate. `Accelerator` has no interface for another way of cutting, so its `prepare` is replaced by one
that looks at the models first.
"""

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from fibattn.errors import InputError

_prepare: Callable[..., Any] = Accelerator.prepare


@functools.wraps(_prepare)
def _prepare_ours(self: Any, *args: Any, **kwargs: Any) -> Any:
    chosen = self.parallelism_config
    if chosen is not None and max(chosen.cp_size, chosen.sp_size) > 1:
        for one in args:
            if isinstance(one, nn.Module) and _attends_by_distance(one):
                self._prepare_cp = functools.partial(_prepare_cp, self, _model_to_cut(one, chosen))
    return _prepare(self, *args, **kwargs)


def _attends_by_distance(model: nn.Module) -> bool:
    """Whether a model has layers whose attention is not Transformers' alone: our own, or converted."""
    from fibattn.model.layer import LearnedScale  # takes seconds

    return any(isinstance(module, LearnedScale) or hasattr(module, "fibattn") for module in model.modules())


def _model_to_cut(model: nn.Module, chosen: Any) -> nn.Module:
    """The Transformers model inside of wrappers.

    Raises:
        InputError: for `sp_size` above 1, which cuts sequences inside of an attention that these layers do not have, so
            that each part would attend to itself alone; for `FibAttention` in a model of another kind.
    """
    from transformers import PreTrainedModel

    if chosen.sp_size > 1:
        raise InputError(
            f"sp_size is {chosen.sp_size}: accelerate's sequence parallelism exchanges heads inside of an attention "
            f"that layers with fixed distances do not have; set cp_size to {chosen.sp_size} and leave sp_size at 1"
        )
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise InputError(
            f"cp_size is {chosen.cp_size}, and a {type(model).__name__} with FibAttention layers cannot have its "
            "sequences cut; leave cp_size at 1, or use a FibAttnForCausalLM or a converted model"
        )
    return found


def _prepare_cp(self: Any, model: nn.Module, *args: Any) -> tuple[Any, ...]:
    """As the method of this name, which is for models with full attention alone."""
    from fibattn.parallel.context import ContextParallel

    self._cp_context = ContextParallel(model, self.torch_device_mesh["cp"].get_group()).cut
    return args


Accelerator.prepare = _prepare_ours
