"""AdamW, alone or beside Muon for the matrices between the embedding and the head.

Muon (https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest matrix with orthonormal
rows or columns. `torch.optim.Muon` does that one matrix at a time, thousands of small launches a step; here matrices of
one shape go through it together, and processes that hold parts of them share the work.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from fibattn.training.recipe import OptimizerRecipe

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic x ↦ ax + bx³ + cx⁵, from the page above; `torch.optim.Muon` has the same."""
_ITERATIONS = 5
_TABLE = ".value_embedding."  # in the name of each value embedding


def build_optimizer(model: nn.Module, chosen: OptimizerRecipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe; weight decay on parameters of two dimensions or more, none on the rest.

    Value embeddings, where a model has them, are a group of AdamW's of their own, with their own rate.
    """
    every = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    trained = [(name, one) for name, one in every if _TABLE not in name]
    tables = [one for name, one in every if _TABLE in name]
    is_matrix = {name: chosen.muon and one.dim() == 2 and _is_of_a_layer(name) for name, one in trained}
    adamw = {"lr": chosen.learning_rate, "betas": (chosen.beta1, chosen.beta2), "eps": chosen.epsilon, "fused": True}
    decayed = [one for name, one in trained if one.dim() >= 2 and not is_matrix[name]]
    groups = [
        {**adamw, "params": decayed, "weight_decay": chosen.weight_decay},
        {**adamw, "params": [one for _, one in trained if one.dim() < 2], "weight_decay": 0.0},
    ]
    if tables:
        pace = chosen.value_embedding_pace
        paced = {"lr": chosen.learning_rate * pace, "weight_decay": chosen.weight_decay / pace}
        groups.append({**adamw, "params": tables, **paced})  # AdamW's decay is the product of the two
    if not chosen.muon:
        return torch.optim.AdamW(groups)
    decay = chosen.weight_decay if chosen.muon_weight_decay is None else chosen.muon_weight_decay
    muon = {"lr": chosen.muon_learning_rate, "momentum": chosen.muon_momentum, "weight_decay": decay}
    matrices = [one for name, one in trained if is_matrix[name]]
    return MuonAndAdamW(groups, [{**muon, "params": matrices}])


def _is_of_a_layer(name: str) -> bool:
    """Whether Muon is for that matrix: of a layer, and no gate's, which is a vector for each head."""
    return ".layers." in f".{name}" and not name.endswith("_gate.weight")


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some groups of matrices, AdamW for the others, as one optimizer with one state.

    Args:
        adamw: groups of `torch.optim.AdamW`.
        muon: groups of matrices with `lr`, `momentum` (Nesterov's) and `weight_decay`. The rate is scaled by
            `0.2 * sqrt(max(rows, columns))`, so that an update is as large as AdamW's (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, adamw: list[dict[str, Any]], muon: list[dict[str, Any]]):
        self._adamw = torch.optim.AdamW(adamw)
        groups = [{**group, "muon": False} for group in self._adamw.param_groups]
        super().__init__([*groups, *({**group, "muon": True} for group in muon)], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for one in group["params"]:
            if one.grad is not None:
                by_shape.setdefault(one.shape, []).append(one)
        for shape, matrices in by_shape.items():
            for one in matrices:
                if "momentum" not in self.state[one]:
                    self.state[one]["momentum"] = torch.zeros_like(one)
            # PyTorch 2.11 has not all of these for sharded tensors, and each takes the slow way through their dispatch.
            weights = [local(one) for one in matrices]
            gradients = [local(one.grad) for one in matrices]  # pyright: ignore
            momenta = [local(self.state[one]["momentum"]) for one in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # pyright: ignore
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # pyright: ignore
            updates = _orthogonalized(ahead, matrices[0])
            rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore
            for weight, update in zip(weights, updates, strict=True):
                weight.add_(update, alpha=-rate)


def _orthogonalized(parts: Sequence[Tensor], like: Tensor) -> Sequence[Tensor]:
    """`orthogonalized`, of this process's parts of matrices like one: each process has as many whole, for a while."""
    # A processor has no 16-bit products that pay.
    dtype = torch.bfloat16 if like.is_cuda else torch.float32
    if not isinstance(like, DTensor):
        stacked = like.new_empty((len(parts), *like.shape), dtype=dtype)
        torch._foreach_copy_(stacked.unbind(), parts)  # pyright: ignore
        return orthogonalized(stacked).unbind()
    group, ranks, (rows, columns) = like.device_mesh.get_group(), like.device_mesh.size(), like.shape
    parts = [one.to(dtype) for one in parts]
    each, most, own = -(-len(parts) // ranks), -(-rows // ranks), len(parts[0])
    sent = functional.pad(torch.stack(parts), (0, 0, 0, most - own, 0, ranks * each - len(parts)))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    whole = got.view(ranks, each, most, columns).transpose(0, 1).reshape(each, ranks * most, columns)
    whole[:, :rows] = orthogonalized(whole[:, :rows])
    back = whole.view(each, ranks, most, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(sent, back.view_as(sent), group=group)  # `got` may be what `back` is a view of
    return sent[: len(parts), :own].unbind()


def orthogonalized(matrices: Tensor) -> Tensor:
    """The matrices (many, rows, columns) with their singular values brought near 1, between about 0.7 and 1.2."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; the whole where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
