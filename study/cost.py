"""What a model costs, counted: floating-point operations of a forward pass, keys of a query, coverage.

Counted as the paper does (section 5): two operations for each multiply-add of a matrix product, causal
attention over the keys that are there, nothing for norms, softmax and rotation.
"""

from dataclasses import dataclass

from fibattn.model import FibAttnConfig
from fibattn.pattern import ChosenPattern, Pattern, layer_alphas, union_coverage


@dataclass(frozen=True)
class Flops:
    """Forward operations for one token, the mean over a sequence."""

    projections: float
    """Attention's four projections and the feed-forward, all layers."""
    attention: float
    """Scores and weighted values, all layers."""
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.attention + self.head

    @property
    def attention_share(self) -> float:
        """Attention's part of the layers, without the head."""
        return self.attention / (self.projections + self.attention)


def mean_keys(config: FibAttnConfig, length: int) -> list[float]:
    """For each layer, how many keys a query reads, the mean over the positions (and KV heads) of a sequence.

    A block's mean, which is only scored, counts half a key.
    """
    return [_layer_keys(config, layer, length) for layer in range(config.num_hidden_layers)]


def flops(config: FibAttnConfig, length: int) -> Flops:
    """The operations of a forward pass over sequences of `length`."""
    size, heads = config.head_dim or 0, config.num_attention_heads
    kv_heads, hidden = config.num_key_value_heads or 0, config.hidden_size
    feed_forward = (3 if config.gated_mlp else 2) * hidden * config.intermediate_size
    layer = hidden * (size * (2 * heads + 2 * kv_heads) + heads * config.head_gates) + feed_forward
    embedding_layers = sum(config.embeds_values(layer) for layer in range(config.num_hidden_layers))
    return Flops(
        projections=2.0 * (layer * config.num_hidden_layers + hidden * kv_heads * embedding_layers),
        attention=sum(4.0 * heads * size * keys for keys in mean_keys(config, length)),
        head=2.0 * hidden * config.vocab_size,
    )


def coverage(config: FibAttnConfig, length: int) -> int:
    """How many distinct distances inside `length` some sparse layer attends to, the window's included."""
    patterns = [pattern for layer in range(config.num_hidden_layers) for pattern in _starting_patterns(config, layer)]
    return union_coverage(patterns, length)


def _starting_patterns(config: FibAttnConfig, layer: int) -> tuple[Pattern, ...]:
    if config.learns_alpha(layer):
        return (Pattern.scaled(config.window, config.base_rungs, 1.0, config.max_offset),)
    return config.layer_patterns(layer) or ()


def _layer_keys(config: FibAttnConfig, layer: int, length: int) -> float:
    if config.learns_alpha(layer):
        alpha = layer_alphas("learned", layers=1)[0]
        rungs = config.learned_pattern.at(alpha)
        # A learned rung reads two keys, the farther one where there is one.
        distances = [*range(config.window + 1), *(rung.near + one for rung in rungs for one in (0, 1))]
        return sum(max(length - distance, 0) for distance in distances) / length
    if config.chooses(layer):
        return sum(_chosen_keys(config.chosen_pattern, query) for query in range(length)) / length
    patterns = config.layer_patterns(layer)
    if patterns is None:
        return (length + 1) / 2
    reads = sum(max(length - distance, 0) for pattern in patterns for distance in pattern.distances)
    return reads / (length * len(patterns))


def _chosen_keys(pattern: ChosenPattern, query: int) -> float:
    """What a query at a position reads: its window, the blocks it takes, and the means of all it may take."""
    nearest, block = max(pattern.window, pattern.block - 1), pattern.block
    blocks = sum(nearest < query - first <= pattern.reach for first in range(0, query + 1, block))
    taken = min(blocks, pattern.blocks)
    return min(query, pattern.window) + 1 + taken * block + blocks / 2
