"""The layer and the cache for models of one's own: chunks equal the whole, gradients reach everything."""

import re

import pytest
import torch

from fibattn import AttentionCache, FibAttention, InputError, LearnedPattern, Pattern, attend, padded_positions

PATTERNS = {
    "fixed": Pattern(3, (5, 8, 13)),
    "learned": LearnedPattern(3, (1, 2, 3, 5, 8)),
    "a pattern for each head": [Pattern(3, (5, 13)), Pattern(3, (7,))],
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("chunks", [[60], [1] * 60, [7, 1, 1, 20, 1, 30], [40, 20]])
def test_a_sequence_in_parts_equals_the_whole(pattern, chunks: list[int]) -> None:
    layer = FibAttention(32, 4, pattern, kv_heads=2).double()
    hidden, cache = torch.randn(2, 60, 32, dtype=torch.float64), AttentionCache(pattern)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in hidden.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(hidden))
    assert cache.length == 60


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_compiled_layer_goes_on_with_its_cache(pattern) -> None:
    """Under `dynamic=True` the numbers of a pattern are symbols."""
    torch.compiler.reset()
    layer, hidden, cache = FibAttention(32, 4, pattern, kv_heads=2), torch.randn(2, 30, 32), AttentionCache(pattern)
    compiled = torch.compile(layer, dynamic=True, backend="eager")
    with torch.no_grad():
        parts = [compiled(part, cache=cache) for part in hidden.split([20, 1, 1, 8], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(hidden))


@pytest.mark.parametrize("modes", [(0, 1), (1, 0), (0, 1, 0, 0), (1, 0, 1)], ids=str)
def test_a_cache_outlives_inference_mode(modes: tuple[int, ...]) -> None:
    layer, pattern = FibAttention(32, 4, PATTERNS["fixed"]), PATTERNS["fixed"]
    hidden, cache, parts = torch.randn(2, 60, 32), AttentionCache(pattern), []
    for part, inference in zip(hidden.split(60 // len(modes), dim=1), modes, strict=True):
        with torch.inference_mode(bool(inference)):
            parts += [layer(token, cache=cache).detach().clone() for token in part.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(hidden))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_parameter_has_a_gradient(pattern) -> None:
    layer = FibAttention(32, 4, pattern, kv_heads=2)
    layer(torch.randn(2, 20, 32)).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in layer.parameters())


def test_without_rotary_positions_it_is_the_operator_between_projections() -> None:
    layer, hidden = FibAttention(32, 4, PATTERNS["fixed"], rope_theta=None), torch.randn(2, 20, 32)
    q, k, v = (project(hidden).view(2, 20, 4, 8) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    torch.testing.assert_close(layer(hidden), layer.o_proj(attend(q, k, v, PATTERNS["fixed"]).flatten(2)))


def test_padding_on_the_left_changes_nothing() -> None:
    layer, hidden = FibAttention(32, 4, PATTERNS["fixed"]), torch.randn(1, 20, 32)
    padded = torch.cat([torch.randn(1, 6, 32), hidden], dim=1)
    mask = torch.tensor([[0] * 6 + [1] * 20])
    torch.testing.assert_close(layer(padded, positions=padded_positions(mask))[:, 6:], layer(hidden))


def test_the_cache_stays_as_small_as_the_reach() -> None:
    cache, (q, k, v) = AttentionCache(PATTERNS["fixed"]), torch.randn(3, 1, 100, 2, 8)
    for at in range(100):
        cache.attend(*(x[:, at : at + 1] for x in (q, k, v)))
        assert cache._rings is not None
        assert cache._rings[0].shape[1] <= 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "4 query heads do not divide into 3 KV heads"),
        ({"heads": 5}, "a hidden size of 32 does not divide into 5 heads; give head_size"),
        ({"heads": 4, "head_size": 7}, "the head size is 7; RoPE needs an even one"),
        ({"heads": 4, "rope_theta": 0}, "rope_theta is 0; it must be a finite number above 0, or None"),
        ({"heads": 4, "rope_theta": float("inf")}, "rope_theta is inf; it must be a finite number above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FibAttention(32, pattern=PATTERNS["fixed"], **arguments)


@pytest.mark.parametrize("shape", [(1, 0, 32), (0, 4, 32), (4, 32)])
def test_states_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"hidden has shape \(.*\); expected \(batch, tokens, hidden size\), none 0"):
        FibAttention(32, 4, PATTERNS["fixed"])(torch.zeros(shape))


def test_a_cache_of_another_pattern_is_refused() -> None:
    layer = FibAttention(32, 4, PATTERNS["fixed"])
    for same in (Pattern(3, (5, 8, 13)), [Pattern(3, (5, 8, 13))]):
        layer(torch.zeros(1, 4, 32), cache=AttentionCache(same))
    with pytest.raises(InputError, match=r"the cache is for Pattern\(window=1, .*, the layer has Pattern\(window=3"):
        layer(torch.zeros(1, 4, 32), cache=AttentionCache(Pattern(1)))


@pytest.mark.parametrize("pattern", [12, "x", "", [], [Pattern(1), "x"], [LearnedPattern(1, (2,))]])
def test_what_is_no_pattern_has_no_cache(pattern: object) -> None:
    with pytest.raises(InputError, match=rf"pattern is {re.escape(repr(pattern))}; expected a fibattn\.Pattern"):
        AttentionCache(pattern)  # pyright: ignore
