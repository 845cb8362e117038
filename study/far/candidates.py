"""What is tried in place of single far keys: a table. No torch here.

Every candidate is the recipe of the ladder's step muon8 with other sparse layers: 16 of them (alone), or 14 beside the
full layers 7 and 15. Nothing looks farther back than a training sequence is long.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.recipe import ModelRecipe, Recipe

if TYPE_CHECKING:
    from fibattn.model import FibAttnForCausalLM

BESIDE = (7, 15)
"""The full layers of a hybrid."""
TAPS = 4
"""Tokens that a convolution sums over, each one's own among them."""
_LAYERS = PRESETS[DEFAULT].model.num_hidden_layers


@dataclass(frozen=True)
class Candidate:
    """What the sparse layers read, beside their window."""

    name: str
    about: str
    window: int = 70
    """Distances 0 … window are read."""
    far: Literal["nothing", "rungs", "means", "best"] = "nothing"
    """Single keys at the hybrid's distances; the means of the spans between Fibonacci distances; the keys of the
    blocks whose mean key suits a query best."""
    full: tuple[int, ...] = ()
    """Layers with full attention, without rotary positions unless they are all."""
    carry: Literal["nothing", "convolution", "shift"] = "nothing"
    """In sparse layers: a causal convolution of four over keys and values, or half of each key's dimensions from the
    token before."""
    half: bool = False
    """Rungs in every second KV head alone; the others have the window."""
    rotated: bool = True
    """Whether far columns have rotary positions."""
    blocks: int = 4
    """How many blocks a query takes; its group of heads shares them."""
    block: int = 16
    """Keys of a block."""
    spans: bool = False
    """One block from each of as many spans, not the best of all."""
    sink: bool = False
    """A learned score for each head that takes weight and gives nothing."""
    random_window: bool = False
    """Draw each layer's window anew for every step, from a quarter of it up."""

    @property
    def plain(self) -> bool:
        """Whether the library's own attention reads it all."""
        near = not (self.sink or self.random_window) and self.rotated
        return near and self.far in ("nothing", "rungs")

    @property
    def configured(self) -> bool:
        """Whether the configuration of a model says it all, so that users can have it."""
        near = (self.plain and not self.half) or (self.in_operator and not (self.rotated or self.sink))
        return near and self.carry != "shift"

    @property
    def in_operator(self) -> bool:
        """Whether `attend_chosen` reads it all."""
        return self.far == "best" and not self.spans and self.block >= 16 and not self.random_window

    def like(self, recipe: Recipe, reach: int) -> Recipe:
        """`recipe` with as many full layers; sparse ones have the window, and what else a configuration can say."""
        return replace(recipe, model=self._model(recipe.model, reach))

    def _model(self, model: ModelRecipe, reach: int) -> ModelRecipe:
        layers = model.num_hidden_layers
        full = [layer for layer in self.full if layer < layers]
        if len(full) == layers:
            return replace(model, layer_types=("full_attention",), no_rope_layers=(1,), window=ModelRecipe.window)
        sparse: LayerType = "fibonacci_attention" if self.far == "rungs" else "sliding_attention"
        if self.configured:
            sparse = "chosen_attention" if self.far == "best" else sparse
            blocks = {"blocks": self.blocks, "block_size": self.block, "block_reach": reach}
            model = replace(model, kv_convolution=TAPS if self.carry == "convolution" else 0, **blocks)
        return replace(model, window=self.window, **hybrid_layers(layers, full, sparse=sparse))

    def keys(self, length: int, model: ModelRecipe) -> float:
        """What a sparse layer reads for a token `length` tokens into the text, in keys with their values.

        A block's mean counts half, for it has no value; a mean of a span four, for its two prefix sums are float32.
        """
        near = self.window + 1
        if self.far == "rungs":
            return near + (3 if self.half else 6)  # the mean over the layers at 1,024 tokens
        if self.far == "means":
            return near + 4 * len(spans(self.window, length))
        if self.far == "best":
            return near + self.blocks * self.block + length / self.block * 0.5
        return near

    def use(self, model: "FibAttnForCausalLM", reach: int) -> None:
        """Let the sparse layers of a fresh model of this recipe read as this says, `reach` back at most."""
        from study.far.layer import use

        use(self, model, reach)


def fibonacci(above: int, below: int) -> tuple[int, ...]:
    """The Fibonacci numbers between two numbers."""
    found, a, b = [], 1, 2
    while b < below:
        if b > above:
            found.append(b)
        a, b = b, a + b
    return tuple(found)


def spans(window: int, reach: int, count: int | None = None) -> tuple[tuple[int, int], ...]:
    """The distances past `window` up to `reach` cut at Fibonacci numbers: (first - 1, last) of every span.

    With `count`, so many spans at most, from every second number; the nearest span takes what is left.
    """
    cuts = fibonacci(window, reach)
    if count is not None:
        cuts = cuts[::-1][1::2][: count - 1][::-1]
    edges = (window, *cuts, reach)
    return tuple(pairwise(edges))


def _beside(one: Candidate) -> Candidate:
    return replace(one, name=f"{one.name}-beside", full=BESIDE)


def _table() -> tuple[Candidate, ...]:
    best = Candidate(
        "best",
        "the four best blocks of 16 keys, NoPE, keys carry their neighbourhood",
        window=31,
        far="best",
        carry="convolution",
        rotated=False,
    )
    window, rungs = Candidate("window", "plain window"), Candidate("rungs", "staggered rungs", window=64, far="rungs")
    wide = Candidate("window-128", "plain window of 128 keys", window=127)
    conv = replace(wide, name="window-conv", about="window of 128, convolution", carry="convolution")
    means = Candidate("means", "means of Fibonacci spans", window=64, far="means")
    alone = (
        best,
        replace(best, name="best-plain", about="the same without the convolution", carry="nothing"),
        replace(best, name="best-rope", about="the same, far keys rotated", rotated=True),
        replace(best, name="best-spans", about="one block of 16 from each of four spans, the best there", spans=True),
        replace(best, name="best-sink", about="the same, learned sinks", sink=True),
        wide,
        conv,
        replace(conv, name="window-shift", about="window of 128, half of a key from the token before", carry="shift"),
        window,
        rungs,
        replace(rungs, name="rungs-half", about="rungs in half of the heads, a window in the others", half=True),
        replace(rungs, name="rungs-conv", about="rungs, convolution", carry="convolution"),
        replace(rungs, name="rungs-nope", about="rungs without rotary positions", rotated=False),
        means,
        replace(means, name="means-conv", about="means of spans, convolution", carry="convolution"),
        replace(means, name="means-nope-conv", about="NoPE means, convolution", carry="convolution", rotated=False),
        replace(window, name="window-sink", about="plain window, learned sinks", sink=True),
        replace(wide, name="window-random", about="windows of 32 to 128 keys, drawn anew", random_window=True),
    )
    every = tuple(range(_LAYERS))
    return (*alone, *map(_beside, alone), Candidate("dense", "full attention in every layer", full=every))


CANDIDATES = _table()
