"""Operations counted by PyTorch while a model runs, against those counted on paper."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fibattn import FibAttnConfig, FibAttnForCausalLM
from study.cost import flops, mean_keys

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "window": 3,
    "rungs": 7,
    "max_position_embeddings": 50,
}


@pytest.mark.parametrize("gated", [True, False])
def test_dense_model_runs_the_operations_that_were_counted(gated: bool) -> None:
    config = FibAttnConfig(**SHAPE, layer_types=["full_attention"] * 3, gated_mlp=gated, value_embeddings=gated)
    config._attn_implementation = "eager"
    model = FibAttnForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 50, dtype=torch.long), use_cache=False)
    counted = flops(config, 50)
    # Eager attention computes the upper triangle, too: 50 keys where (50 + 1) / 2 are attended to.
    expected = counted.projections + counted.head + counted.attention * 50 / 25.5
    assert counter.get_total_flops() == pytest.approx(50 * expected)


@pytest.mark.parametrize("schedule", ["fixed", "linear", "coprime"])
def test_keys_are_those_of_the_pattern(schedule: str) -> None:
    config = FibAttnConfig(**SHAPE, schedule=schedule)
    for layer, keys in enumerate(mean_keys(config, 50)):
        (pattern,) = config.layer_patterns(layer) or ()
        attended = [sum(distance <= query for distance in pattern.distances) for query in range(50)]
        assert keys == pytest.approx(sum(attended) / 50)


def test_chosen_blocks_count_with_their_window_and_the_means_that_are_scored() -> None:
    config = FibAttnConfig(**SHAPE, layer_types=["chosen_attention"] * 3, blocks=1, block_size=16, block_reach=40)
    reads = [min(query, 3) + 1 for query in range(50)]
    for query in range(50):
        behind = [first for first in (0, 16, 32) if 15 < query - first <= 40]
        reads[query] += 16 * min(len(behind), 1) + len(behind) / 2
    assert mean_keys(config, 50) == pytest.approx([sum(reads) / 50] * 3)


def test_attention_share_is_the_papers() -> None:
    """About 16 % of a layer at the paper's shape is what dense scores and values take there."""
    dense = FibAttnConfig(layer_types=["full_attention"] * 16)
    assert flops(dense, 1024).attention_share == pytest.approx(0.16, abs=0.001)
    assert flops(FibAttnConfig(), 1024).attention_share < 0.01
