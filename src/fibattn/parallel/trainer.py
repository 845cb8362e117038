"""The door into Transformers' Trainer, imported with it: what it does on cut rows that is wrong there or refused.

It has no interface for that, so its method that gets rows ready for the cut is replaced by one that looks first.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.trainer import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from fibattn.errors import InputError
from fibattn.model.loss import IGNORED
from fibattn.parallel.context import ContextParallel

_prepare: Callable[..., Any] = Trainer._prepare_context_parallel_inputs  # pyright: ignore


@functools.wraps(_prepare)
def _prepare_ours(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
    cutter = getattr(getattr(self.accelerator, "_cp_context", None), "__self__", None)
    if not isinstance(cutter, ContextParallel):
        return _prepare(self, model, inputs)
    if self.compute_loss_func is not None:
        raise InputError(
            "compute_loss_func would be given parts of rows, whose labels it cannot shift past the end; leave it out, "
            "since the model computes the loss, or leave cp_size at 1"
        )
    smoothed = self.label_smoother is not None and "labels" in inputs
    if smoothed:
        self.label_smoother = _CutSmoother(self.label_smoother, cutter)
        inputs["labels"] = inputs.get("shift_labels", functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED))
    # A model is asked for the name of its attention alone, which must be "sdpa": that of converted ones is not.
    context, inputs = _prepare(self, None, inputs)
    if smoothed:
        del inputs["shift_labels"]  # or the model would compute a loss, and not the logits
    return context, inputs


class _CutSmoother(LabelSmoother):
    """The Trainer's label smoothing for targets that were shifted before their row was cut."""

    def __init__(self, given: Any, cutter: ContextParallel):
        super().__init__(given.epsilon, given.ignore_index)
        self.cutter = cutter

    def __call__(self, model_output: Any, labels: Tensor, shift_labels: bool = False, **given: Any) -> Tensor:
        if not self.cutter.inside:
            return super().__call__(model_output, labels, shift_labels, **given)
        if given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = self.cutter.items(labels)
        return self.cutter.kept(super().__call__(model_output, labels, **given))


Trainer._prepare_context_parallel_inputs = _prepare_ours  # pyright: ignore
