"""What a converted model is healed by: two losses beside the dense model, each a module whose state is what it trains.

Layers are matched as in LoLCATs (Zhang and others, arXiv 2410.10254), all of them in one pass: each is given the input
that it has in the dense model, so that none waits for those before it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from fibattn.model.conversion import attention_modules
from fibattn.model.loss import SLICE_LOGITS
from fibattn.model.native import pattern_of


class HealingStage(nn.Module):
    """A loss of `student` beside `teacher`, causal language models on one device, by which `trained` is trained."""

    teacher: PreTrainedModel
    _tied_weights_keys = None  # the Trainer looks here when it goes on from a checkpoint

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, trained: Iterable[nn.Parameter]):
        super().__init__()
        self.student = student
        vars(self)["teacher"] = teacher.eval()  # no part of the module: neither trained, saved nor moved
        student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """The weights that are trained, each once."""
        return {name: one.detach() for name, one in self.named_parameters() if one.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take back what `state_dict` gave."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class AttentionMatching(HealingStage):
    """How far each sparse layer's attention is from the dense model's, given the same input.

    The mean over the layers of the squared distance between the outputs, over the square of the dense model's.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, trained: Iterable[nn.Parameter]):
        sparse, modules = sparse_layers(student), attention_modules(student.base_model)
        inside = {id(one) for layer in sparse for one in modules[layer].parameters()}
        super().__init__(student, teacher, [one for one in trained if id(one) in inside])
        self.sparse = sparse

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """The loss over sequences `input_ids` (batch, tokens)."""
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        found: list[Tensor] = []

        def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], _first(output)

        def give(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = seen[module.layer_idx][0]
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": hidden}
            return (hidden, *args[1:]), kwargs

        def compare(module: Any, args: Any, output: Any) -> Any:
            ours, right = _first(output).float(), seen[module.layer_idx][1]
            goal = right.float()
            found.append((ours - goal).square().mean() / goal.square().mean())
            return (right, *output[1:]) if isinstance(output, tuple) else right

        theirs, ours = (attention_modules(model.base_model) for model in (self.teacher, self.student))
        handles = [theirs[layer].register_forward_hook(record, with_kwargs=True) for layer in self.sparse]
        handles += [ours[layer].register_forward_pre_hook(give, with_kwargs=True) for layer in self.sparse]
        handles += [ours[layer].register_forward_hook(compare) for layer in self.sparse]
        try:
            with torch.no_grad():
                self.teacher.base_model(input_ids=input_ids, use_cache=False)
            self.student.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return CausalLMOutput(loss=torch.stack(found).mean())  # pyright: ignore[reportArgumentType]


class Distillation(HealingStage):
    """The divergence of the model's next tokens from the dense model's, mixed with the cross entropy of the text."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, trained: Iterable[nn.Parameter], *, text_weight: float
    ):
        super().__init__(student, teacher, trained)
        self.text_weight = text_weight

    def forward(self, input_ids: Tensor, shift_labels: Tensor, **_: Any) -> CausalLMOutput:
        """The mean loss in nats over all targets, `shift_labels` of `input_ids`, both (batch, tokens)."""
        with torch.no_grad():
            right = self.teacher.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        ours = self.student.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        head, goal = (one.get_output_embeddings().weight for one in (self.student, self.teacher))  # pyright: ignore
        if torch.is_autocast_enabled(ours.device.type):
            ours = ours.to(torch.get_autocast_dtype(ours.device.type))
        loss = _SummedLoss.apply(ours, head, right.to(ours.dtype), goal, shift_labels.flatten(), self.text_weight)
        return CausalLMOutput(loss=loss / shift_labels.numel())  # pyright: ignore


class _SummedLoss(torch.autograd.Function):
    """The loss of `Distillation`, summed, and its gradients at once, a slice of tokens after the other.

    All logits are most of the memory, and reading them most of the time: of a softmax, the gradient is what is there.
    """

    @staticmethod
    def forward(
        ctx: Any, ours: Tensor, head: Tensor, right: Tensor, right_head: Tensor, targets: Tensor, text_weight: float
    ) -> Tensor:
        step = max(1, SLICE_LOGITS // head.shape[0])
        total, grad_ours = ours.new_zeros((), dtype=torch.float32), torch.empty_like(ours)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        narrow, right_narrow = head.to(ours.dtype), right_head.to(ours.dtype)
        with torch.autocast(ours.device.type, enabled=False):
            for start in range(0, len(ours), step):
                some = slice(start, start + step)
                own = (ours[some] @ narrow.T).log_softmax(-1, dtype=torch.float32)
                dense = (right[some] @ right_narrow.T).log_softmax(-1, dtype=torch.float32)
                wanted = dense.exp().mul_(1 - text_weight)
                target = targets[some, None]
                total += dense.sub_(own).mul_(wanted).sum() - text_weight * own.gather(1, target).sum()
                wanted.scatter_add_(1, target, torch.full_like(target, text_weight, dtype=torch.float32))
                grad = own.exp_().sub_(wanted).to(ours.dtype)
                grad_ours[some] = grad @ narrow
                if grad_head is not None:
                    grad_head += grad.T @ ours[some]
        ctx.save_for_backward(grad_ours, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad_ours, grad_head = ctx.saved_tensors
        return grad_ours * upstream, grad_head if grad_head is None else grad_head * upstream, None, None, None, None


def sparse_layers(model: PreTrainedModel) -> list[int]:
    """The layers of a converted model that do not have their own attention."""
    config: Any = model.base_model.config
    pattern: Any = pattern_of(config)
    return [layer for layer in range(config.num_hidden_layers) if layer not in pattern["keep_layers"]]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
