"""What must hold of any correct implementation, asked of the linear-time CPU backend."""

import pytest
import torch
from operator_inputs import (
    FIBONACCI,
    PATTERN,
    Shape,
    assert_close,
    boundaries_to_positions,
    fixed,
    learned,
    random_inputs,
    run,
)
from torch import Tensor

from fibattn import LearnedPattern, Pattern, attend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("learns", [False, True])
def test_a_window_over_everything_is_causal_attention(tokens: int, learns: bool) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), out.new_zeros(())

    inputs = random_inputs(Shape(tokens, batch=2, kv_heads=2, group=4, size=32))
    expected = run(dense, inputs, lse_gradient=False)
    if learns:
        alpha = torch.tensor([0.9], dtype=torch.float64)
        found = run(learned(tokens - 1, "cpu", rungs=()), inputs, alpha, lse_gradient=False)
        assert float(found.gradients["alpha"]) == 0
    else:
        found = run(fixed(Pattern(tokens - 1), "cpu"), inputs, lse_gradient=False)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(found.gradients[name], expected.gradients[name], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-11, atol=1e-12)


def sliding(keys: int, tokens: int) -> Tensor:
    """A boolean band: each query and the `keys - 1` positions before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril() & torch.ones(tokens, tokens, dtype=torch.bool).triu(
        1 - keys
    )


@pytest.mark.parametrize("window", [0, 1, 7, 64])
def test_a_window_of_w_is_w_plus_one_keys_as_flash_attention_and_transformers_count(window: int) -> None:
    from transformers.masking_utils import causal_mask_function, sliding_window_overlay

    tokens = 100
    inputs = random_inputs(Shape(tokens, batch=2, kv_heads=2, group=2))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    found = attend(*inputs, Pattern(window))
    mask = sliding(window + 1, tokens)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-11, atol=1e-12)
    # Transformers' own rule for `sliding_window = W + 1`, and FlashAttention's (W, 0): i - W <= j <= i.
    band = sliding_window_overlay(window + 1)
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    assert torch.equal(band(0, 0, rows, columns) & causal_mask_function(0, 0, rows, columns), mask)
    assert torch.equal((rows - window <= columns) & (columns <= rows), mask)


def outputs(inputs: list[Tensor], learns: bool) -> Tensor:
    if learns:
        alpha = torch.tensor([1.0], dtype=inputs[0].dtype)
        return attend(*inputs, LearnedPattern(4, FIBONACCI, max_offset=150), alpha=alpha)
    return attend(*inputs, PATTERN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [0, 1, 77, 199])
def test_a_token_reaches_the_rows_at_its_distances_and_no_others(changed: int, dtype: torch.dtype) -> None:
    tokens = 200
    inputs = random_inputs(Shape(tokens, kv_heads=2, group=2), dtype)
    other = [x.clone() for x in inputs]
    other[1][:, changed] += 1
    other[2][:, changed] -= 2
    moved = (attend(*inputs, PATTERN) != attend(*other, PATTERN)).any(dim=-1).any(dim=-1)[0]
    reached = {changed + distance for distance in PATTERN.distances if changed + distance < tokens}
    assert set(moved.nonzero().flatten().tolist()) == reached


@pytest.mark.parametrize("changed", [0, 77, 199])
def test_a_token_reaches_the_two_rows_around_each_learned_distance(changed: int) -> None:
    tokens, alpha = 200, 0.83
    inputs = random_inputs(Shape(tokens, kv_heads=2, group=2))
    other = [x.clone() for x in inputs]
    other[1][:, changed] += 1
    other[2][:, changed] -= 2
    scale = torch.tensor([alpha], dtype=torch.float64)
    found = [attend(*some, LearnedPattern(4, FIBONACCI), alpha=scale) for some in (inputs, other)]
    moved = (found[0] != found[1]).any(dim=-1).any(dim=-1)[0]
    distances = {*range(5)}
    for rung in FIBONACCI:
        if round(alpha * rung) > 4:
            distances |= {int(alpha * rung), int(alpha * rung) + 1}
    reached = {changed + distance for distance in distances if changed + distance < tokens}
    assert set(moved.nonzero().flatten().tolist()) == reached


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_future_changes_nothing(dtype: torch.dtype, learns: bool) -> None:
    inputs, other = (random_inputs(Shape(200, kv_heads=2, group=2), dtype, seed=seed) for seed in (0, 1))
    for present in (1, 33, 150):
        mixed = [torch.cat([a[:, :present], 50 * b[:, present:]], dim=1) for a, b in zip(inputs, other, strict=True)]
        assert torch.equal(outputs(mixed, learns)[:, :present], outputs(inputs, learns)[:, :present])


@pytest.mark.parametrize("learns", [False, True])
def test_another_slot_of_the_batch_changes_nothing(learns: bool) -> None:
    inputs, other = (random_inputs(Shape(150, batch=3, kv_heads=2, group=2), seed=seed) for seed in (0, 1))
    mixed = [x.clone() for x in inputs]
    for x, y in zip(mixed, other, strict=True):
        x[1] = y[1]
    found, expected = outputs(mixed, learns), outputs(inputs, learns)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(found[1], expected[1])


def test_an_offset_as_long_as_the_sequence_or_longer_changes_nothing() -> None:
    inputs = random_inputs(Shape(60, batch=2, kv_heads=2, group=2))
    near = run(fixed(Pattern(4, (9, 59)), "cpu"), inputs)
    for far in (60, 61, 1023, 2**31 - 1, 2**31, 2**40):
        found = run(fixed(Pattern(4, (9, 59, far)), "cpu"), inputs)
        assert_close(found, near, 1e-14)


def test_learned_rungs_as_long_as_the_sequence_or_longer_change_nothing() -> None:
    inputs, alpha = random_inputs(Shape(60, kv_heads=2, group=2)), torch.tensor([0.83], dtype=torch.float64)
    near = run(learned(4, "cpu", rungs=FIBONACCI[:9]), inputs, alpha)
    for far in ((), (89,), (1000, 2**33)):
        assert_close(run(learned(4, "cpu", rungs=(*FIBONACCI[:9], *far)), inputs, alpha), near, 1e-13)


def test_rungs_past_max_offset_change_nothing() -> None:
    inputs, alpha = random_inputs(Shape(150, kv_heads=2, group=2)), torch.tensor([0.83], dtype=torch.float64)
    cut = run(learned(4, "cpu", rungs=FIBONACCI[:7]), inputs, alpha)
    assert_close(run(learned(4, "cpu", max_offset=int(0.83 * 34) - 1), inputs, alpha), cut, 1e-13)
    kept = run(learned(4, "cpu", rungs=FIBONACCI[:8]), inputs, alpha)
    assert_close(run(learned(4, "cpu", max_offset=int(0.83 * 34)), inputs, alpha), kept, 1e-13)


@pytest.mark.parametrize("learns", [False, True])
def test_two_runs_have_the_same_bits(learns: bool) -> None:
    inputs = random_inputs(Shape(500, batch=2, kv_heads=2, group=4, size=32), torch.float32)
    alpha = torch.tensor([0.83]) if learns else None
    call = learned(4, "cpu") if learns else fixed(PATTERN, "cpu")
    first, *others = (run(call, inputs, alpha) for _ in range(4))
    for other in others:
        assert all(torch.equal(other.all()[name], x) for name, x in first.all().items())


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x with other strides, the last dimension contiguous."""
    if layout == "heads before tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens before the batch":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "part of a projection":
        wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan, dtype=x.dtype)
        wide[:, :, 1:-2, 2:-3] = x
        return wide[:, :, 1:-2, 2:-3]
    if layout == "every second token":
        wide = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    raise ValueError(layout)


@pytest.mark.parametrize(
    "layout", ["heads before tokens", "tokens before the batch", "part of a projection", "every second token"]
)
@pytest.mark.parametrize("learns", [False, True])
def test_strided_views_equal_contiguous_tensors(layout: str, learns: bool) -> None:
    inputs = random_inputs(Shape(90, batch=2, kv_heads=2, group=2))
    views = [laid_out(x, layout) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    alpha = torch.tensor([0.83], dtype=torch.float64) if learns else None
    call = learned(4, "cpu") if learns else fixed(PATTERN, "cpu")
    found, expected = run(call, views, alpha), run(call, inputs, alpha)
    assert_close(found, expected, 1e-14)


def test_expanded_keys_and_gradients_are_taken() -> None:
    q, k, v = random_inputs(Shape(60, batch=3, kv_heads=1, group=2))
    k, v = k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    expected = attend(q, k.contiguous(), v.contiguous(), PATTERN)
    torch.testing.assert_close(attend(q, k, v, PATTERN), expected, rtol=1e-13, atol=1e-13)
    leaf = q.clone().requires_grad_()
    attend(leaf, k, v, PATTERN).sum().backward()  # its upstream gradient is one number, expanded
    again = q.clone().requires_grad_()
    attend(again, k, v, PATTERN).backward(torch.ones_like(q))
    assert torch.equal(leaf.grad, again.grad)


def test_inputs_are_left_as_they_were() -> None:
    inputs = random_inputs(Shape(60, kv_heads=2, group=2))
    before = [x.clone() for x in inputs]
    positions = boundaries_to_positions([0, 20, 60])
    run(fixed(PATTERN, "cpu", positions=positions), inputs)
    run(learned(4, "cpu", positions=positions), inputs, torch.tensor([0.83], dtype=torch.float64))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert torch.equal(positions, boundaries_to_positions([0, 20, 60]))
