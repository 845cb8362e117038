"""Parts of a model that the default recipe does not have: a table. No torch here."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fibattn.training.recipe import ModelRecipe, Recipe

if TYPE_CHECKING:
    from fibattn.model import FibAttnForCausalLM


@dataclass(frozen=True)
class Part:
    """A recipe's model with a part more."""

    name: str
    about: str
    cap: float | None = None
    """Logits are bent to stay between this and its negative: cap · tanh(logit / cap)."""
    gate: bool = False
    """Each head's output times 2 · sigmoid of a product of the layer's input (arXiv 2505.06708, by head)."""
    values: bool = False
    """Every second layer adds an embedding of the token to its value, times such a gate of each KV head."""
    pace: float = 1.0
    """How many times as fast embeddings of the values learn, and with a head of its own that of the tokens."""
    joined: bool = False
    """One product makes the queries, keys and values of a layer: the same numbers, perhaps sooner."""
    untied: bool = False
    """The head has a matrix of its own, which begins at zero."""
    convolution: int = 0
    """Keys and values carry those of their last so many tokens, in all layers but full ones."""
    everywhere: bool = False
    """In full layers, too."""

    def like(self, recipe: Recipe, reach: int) -> Recipe:
        """`recipe` with gates, value embeddings and the convolution, which the library has."""
        model = recipe.model
        if self.gate:
            model = replace(model, head_gates=True)
        if self.convolution:
            model = replace(model, kv_convolution=self.convolution)
        if not self.values:
            return replace(recipe, model=model)
        optimizer = replace(recipe.optimizer, value_embedding_pace=self.pace)
        return replace(recipe, model=replace(model, value_embeddings=True), optimizer=optimizer)

    def keys(self, length: int, model: ModelRecipe) -> float:
        """As without the part: a window, and at 1,024 tokens some six rungs where there are any."""
        return model.window + 1 + 6 * ("fibonacci_attention" in model.layer_types)

    def use(self, model: "FibAttnForCausalLM", reach: int) -> None:
        """Give a fresh model the part."""
        from study.parts.layers import use

        use(self, model)


PARTS = (
    Part("cap", "logits capped softly at 30", cap=30.0),
    Part("gate", "a gate for the output of each head", gate=True),
    Part("values", "embeddings of the values in every second layer, gated", values=True),
    Part("values-10", "embeddings of the values, ten times the rate for the tables", values=True, pace=10.0),
    Part("values-100", "embeddings of the values, a hundred times the rate", values=True, pace=100.0),
    Part("joined", "queries, keys and values from one product", joined=True),
    Part("untied", "a head of its own", untied=True),
    Part("conv", "a convolution of four over keys and values, in full layers, too", convolution=4, everywhere=True),
    Part("conv-sparse", "such a convolution in all layers but full ones", convolution=4),
    Part("untied-10", "a head of its own, ten times the rate for the embedding", untied=True, pace=10.0),
    Part("values-untied", "embeddings of the values, and a head of its own", values=True, untied=True),
    Part(
        "values-untied-30",
        "embeddings of the values, and a head of its own, both at thirty times the rate",
        values=True,
        untied=True,
        pace=30.0,
    ),
)
