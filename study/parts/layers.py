"""The model of a part: a recipe's, changed in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fibattn.model import FibAttnForCausalLM
from study.parts.table import Part


class CappedHead(nn.Linear):
    """A head whose logits stay between `cap` and its negative."""

    def __init__(self, like: nn.Linear, cap: float):
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.weight, self.cap = like.weight, cap

    def forward(self, input: Tensor) -> Tensor:
        """(…, hidden size) to logits (…, vocabulary)."""
        return self.cap * torch.tanh(super().forward(input).float() / self.cap)


class Paced(nn.Embedding):
    """An embedding that counts `pace` times what is stored of it.

    AdamW changes what is stored by as much, whatever the gradients' size, so that the embedding learns so much faster.
    """

    def __init__(self, like: nn.Embedding, pace: float):
        super().__init__(like.num_embeddings, like.embedding_dim, device="meta")
        self.weight, self.pace = like.weight, pace
        self.weight.data /= pace

    def forward(self, input: Tensor) -> Tensor:
        """Ids (batch, tokens) to (batch, tokens, dimension)."""
        return self.pace * super().forward(input)


class OneProduct(nn.Module):
    """A layer's projection to queries; keys and values come out of the same product, for `Rest` to hand on."""

    def __init__(self, projections: Sequence[nn.Linear]):
        super().__init__()
        self.projections = nn.ModuleList(projections)
        self.rest: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, tokens, hidden size) to (batch, tokens, query heads · head size)."""
        weights: list[Any] = [one.weight for one in self.projections]
        queries, *rest = functional.linear(hidden, torch.cat(weights)).split([len(one) for one in weights], dim=-1)
        self.rest = tuple(rest)
        return queries


class Rest(nn.Module):
    """The keys or values that the product before has made."""

    def __init__(self, product: OneProduct, index: int):
        super().__init__()
        self.product, self.index = (product,), index  # in a tuple, so that its weights are not this module's

    def forward(self, hidden: Tensor) -> Tensor:
        """Of the `hidden` that the product had: (batch, tokens, KV heads · head size)."""
        return self.product[0].rest[self.index]


def use(part: Part, model: FibAttnForCausalLM) -> None:
    """Give a fresh model the part."""
    if part.untied:
        model.config.tie_word_embeddings = False
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        nn.init.zeros_(model.lm_head.weight)
        model.model.embed_tokens = Paced(model.model.embed_tokens, part.pace)
    if part.cap is not None:
        model.lm_head = CappedHead(model.lm_head, part.cap)
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        if part.everywhere and attention.kv_convolution is None:
            shape = (2, part.convolution, len(attention.k_proj.weight))
            attention.kv_convolution = nn.Parameter(torch.zeros(shape))
        if part.joined:
            product = OneProduct((attention.q_proj, attention.k_proj, attention.v_proj))
            attention.q_proj, attention.k_proj, attention.v_proj = product, Rest(product, 0), Rest(product, 1)
