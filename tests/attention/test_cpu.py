"""The linear-time CPU backend against the specification, plain PyTorch, and numerical differentiation."""

import subprocess
import sys
from itertools import pairwise

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
    row_errors,
    run,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fibattn import LearnedPattern, Pattern, attend
from fibattn.attention import cpu
from fibattn.errors import InputError

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def compare_fixed(shape: Shape, pattern=PATTERN, dtype=torch.float64, kind="normal", **options) -> None:
    inputs = random_inputs(shape, dtype, kind)
    expected = run(fixed(pattern, "reference", **options), [x.double() for x in inputs])
    found = run(fixed(pattern, "cpu", **options), inputs)
    assert_close(found, expected, TOLERANCE[dtype])


def compare_learned(shape: Shape, alpha: float = 0.83, window: int = 4, dtype=torch.float64, **options) -> None:
    inputs = random_inputs(shape, dtype)
    scale = torch.tensor([alpha], dtype=dtype)
    expected = run(learned(window, "reference", **options), [x.double() for x in inputs], scale.double())
    found = run(learned(window, "cpu", **options), inputs, scale)
    assert_close(found, expected, TOLERANCE[dtype])


LENGTHS = sorted({1, 2, 4, 5, PATTERN.reach, PATTERN.reach + 1, 127, 128, 129})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_fixed_offsets_equal_the_reference_at_every_length(tokens: int, dtype: torch.dtype) -> None:
    compare_fixed(Shape(tokens, batch=2, kv_heads=2, group=2), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_learned_offsets_equal_the_reference_at_every_length(tokens: int, dtype: torch.dtype) -> None:
    compare_learned(Shape(tokens, batch=2, kv_heads=2, group=2), dtype=dtype, max_offset=150)


@pytest.mark.parametrize(
    ("group", "size"), [(1, 8), (2, 40), (4, 24), (8, 64), (7, 128), (3, 2), (1, 1), (2, 96), (4, 256)]
)
def test_any_ratio_of_heads_and_any_head_size(group: int, size: int) -> None:
    compare_fixed(Shape(70, kv_heads=2, group=group, size=size))
    compare_learned(Shape(70, kv_heads=2, group=group, size=size))


@pytest.mark.parametrize("window", [0, 1, 31, 32, 33, 64, 100, 300, 700, 4000])
def test_windows_from_none_to_longer_than_the_sequence(window: int) -> None:
    compare_fixed(Shape(330, kv_heads=2, group=2), Pattern.scaled(window, FIBONACCI))
    compare_learned(Shape(330, kv_heads=2, group=2), window=window)


@pytest.mark.parametrize("pattern", [Pattern(0), Pattern(9), Pattern(0, (1,)), Pattern(0, (69,)), Pattern(0, (70,))])
def test_few_offsets_or_none(pattern: Pattern) -> None:
    compare_fixed(Shape(70, kv_heads=2, group=2), pattern)


@pytest.mark.parametrize("kind", ["peaked", "large", "correlated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_that_are_not_white_noise(kind: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(Shape(150, kv_heads=2, group=2), dtype, kind)
    expected = run(fixed(PATTERN, "reference"), [x.double() for x in inputs])
    found = run(fixed(PATTERN, "cpu"), inputs)
    assert all(torch.isfinite(x).all() for x in found.all().values())
    # A logit of size s has an error of s times the precision, and the weights inherit it.
    largest = float(expected.lse.abs().max())
    assert_close(found, expected, 4 * largest * torch.finfo(dtype).eps + TOLERANCE[dtype])


def test_several_chunks_and_a_broken_last_block() -> None:
    # More tokens than one pass takes: the chunks meet inside.
    shape = Shape(701, batch=2, kv_heads=2, group=2, size=32)
    compare_fixed(shape)
    compare_learned(shape)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 127, 200])
def test_the_smallest_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    compare_fixed(Shape(tokens, batch=2, kv_heads=2, group=2))
    compare_learned(Shape(tokens, batch=2, kv_heads=2, group=2))
    compare_fixed(Shape(tokens, keys=tokens + 45, kv_heads=2, group=2))
    compare_learned(Shape(tokens, keys=tokens + 45, kv_heads=2, group=2))


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 200), (3, 150), (40, 41), (129, 300)])
def test_fewer_queries_than_keys(tokens: int, keys: int) -> None:
    compare_fixed(Shape(tokens, keys=keys, batch=2, kv_heads=2, group=2))
    compare_learned(Shape(tokens, keys=keys, batch=2, kv_heads=2, group=2))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(150, batch=2, kv_heads=3, group=2),
        Shape(7, keys=150, kv_heads=3),
        # From token 500 on every query has all rungs of every head, but the first head has fewer.
        Shape(701, batch=2, kv_heads=3, group=2, size=32),
        Shape(7, keys=701, kv_heads=3),
    ],
)
def test_every_kv_head_may_have_its_own_offsets(shape: Shape) -> None:
    compare_fixed(shape, [Pattern(4, (5, 9, 60)), Pattern(4), Pattern(4, (8, 33, 34, 120, 500))])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.25, 1.5])
def test_learned_offsets_where_a_distance_is_an_integer(alpha: float) -> None:
    compare_learned(Shape(150, batch=2, kv_heads=2, group=2), alpha=alpha)


@pytest.mark.parametrize("boundaries", [[0, 150], [0, 1, 2, 150], [0, 30, 31, 95, 150], [0, 149, 150]])
def test_packed_documents_equal_the_reference(boundaries: list[int]) -> None:
    shape, given = Shape(150, kv_heads=2, group=2), torch.tensor(boundaries)
    compare_fixed(shape, cu_seqlens=given)
    compare_learned(shape, cu_seqlens=given)


@pytest.mark.parametrize("boundaries", [[0, 150], [0, 1, 2, 150], [0, 30, 31, 95, 150], [0, 149, 150]])
def test_packed_documents_equal_documents_on_their_own(boundaries: list[int]) -> None:
    q, k, v = random_inputs(Shape(150, kv_heads=2, group=2))
    alpha = torch.tensor([0.83], dtype=torch.float64)
    parts = [slice(*ends) for ends in pairwise(boundaries)]
    alone = [attend(q[:, s], k[:, s], v[:, s], PATTERN) for s in parts]
    pattern = LearnedPattern(4, FIBONACCI)
    moved = [attend(q[:, s], k[:, s], v[:, s], pattern, alpha=alpha) for s in parts]
    for given in (
        {"cu_seqlens": torch.tensor(boundaries, dtype=torch.int32)},
        {"positions": boundaries_to_positions(boundaries)},
    ):
        torch.testing.assert_close(attend(q, k, v, PATTERN, **given), torch.cat(alone, 1), rtol=1e-12, atol=1e-12)
        found = attend(q, k, v, pattern, alpha=alpha, **given)
        torch.testing.assert_close(found, torch.cat(moved, 1), rtol=1e-12, atol=1e-12)


def test_positions_may_differ_over_the_batch_and_come_with_fewer_queries() -> None:
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 200, (2, 60), generator=generator)
    compare_fixed(Shape(60, batch=2, keys=150, kv_heads=2, group=2), positions=positions)
    compare_learned(Shape(60, batch=2, keys=150, kv_heads=2, group=2), positions=positions)
    compare_fixed(Shape(60, batch=2, keys=150), positions=positions[:1].int())


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_finite_scale(scale: float) -> None:
    compare_fixed(Shape(60, kv_heads=2), scale=scale)
    compare_learned(Shape(60, kv_heads=2), scale=scale)


@pytest.mark.parametrize("output", ["out", "lse"])
def test_gradients_of_either_output_alone(output: str) -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(Shape(60, kv_heads=2, group=2)))
    alpha = torch.tensor([0.83], dtype=torch.float64, requires_grad=True)
    for call, leaves in ((fixed(PATTERN, "cpu"), (q, k, v)), (learned(4, "cpu"), (q, k, v, alpha))):
        chosen = call(*leaves)[output == "lse"]
        specified = (fixed(PATTERN, "reference") if len(leaves) == 3 else learned(4, "reference"))(*leaves)
        found = torch.autograd.grad(chosen.sin().sum(), leaves, allow_unused=True)
        expected = torch.autograd.grad(specified[output == "lse"].sin().sum(), leaves, allow_unused=True)
        for got, wanted in zip(found, expected, strict=True):
            wanted = torch.zeros_like(got) if wanted is None else wanted
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


# Half precision: as good as plain PyTorch in the same precision, twice over.


def plainly(mask: Tensor):
    """Masked softmax attention, every step in the dtype of the inputs."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)

    return call


def allowed(pattern: Pattern, tokens: int) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return sum((distance == d for d in pattern.distances), torch.zeros(tokens, tokens, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "peaked", "correlated"])
@pytest.mark.parametrize("size", [16, 64])
def test_half_precision_is_at_most_twice_as_wrong_as_plain_pytorch(dtype: torch.dtype, kind: str, size: int) -> None:
    inputs = random_inputs(Shape(200, batch=2, kv_heads=2, group=4, size=size), dtype, kind)
    expected = run(fixed(PATTERN, "reference"), [x.double() for x in inputs])
    plain = run(plainly(allowed(PATTERN, 200)), inputs)
    found = run(fixed(PATTERN, "cpu"), inputs)
    for name, wanted in expected.all().items():
        errors, plain_errors = row_errors(found.all()[name], wanted), row_errors(plain.all()[name], wanted)
        assert errors[0] <= 2 * plain_errors[0], f"{name}, mean row: {errors[0]} against {plain_errors[0]}"
        assert errors[1] <= 2 * plain_errors[1], f"{name}, worst row: {errors[1]} against {plain_errors[1]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_learned_offsets_in_half_precision_only_round_the_result(dtype: torch.dtype) -> None:
    inputs = random_inputs(Shape(200, batch=2, kv_heads=2, group=4, size=32), dtype)
    alpha = torch.tensor([0.83])
    expected = run(learned(4, "reference"), [x.double() for x in inputs], alpha.double())
    found = run(learned(4, "cpu"), inputs, alpha)
    for name, wanted in expected.all().items():
        got = found.all()[name]
        # One rounding of the result, and the stored output rounded once where the backward reads it.
        limit = torch.finfo(dtype).eps * (wanted.abs() + float(wanted.abs().max()))
        assert ((got - wanted).abs() <= limit).all(), name
    assert abs(float(found.gradients["alpha"] - expected.gradients["alpha"])) < 0.02 * abs(
        float(expected.gradients["alpha"])
    )


def test_outputs_have_the_documented_dtypes() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        inputs = [x.requires_grad_() for x in random_inputs(Shape(9), dtype)]
        out, lse = attend(*inputs, Pattern(2), return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        out.sum().backward()
        assert [x.grad.dtype for x in inputs] == [dtype] * 3


# Numerical differentiation


def small(tokens: int = 11, **sizes) -> list[Tensor]:
    return [x.requires_grad_() for x in random_inputs(Shape(tokens, kv_heads=2, group=2, size=3, **sizes), seed=5)]


@pytest.mark.parametrize("boundaries", [None, [0, 4, 11]])
def test_gradcheck_of_fixed_offsets(boundaries: list[int] | None) -> None:
    given = None if boundaries is None else torch.tensor(boundaries)
    call = fixed([Pattern(2, (4, 7)), Pattern(2, (3,))], "cpu", cu_seqlens=given)
    assert torch.autograd.gradcheck(call, small())


def test_gradcheck_of_fixed_offsets_with_fewer_queries_than_keys() -> None:
    assert torch.autograd.gradcheck(fixed(Pattern(2, (4, 7)), "cpu"), small(3, keys=11, batch=2))


@pytest.mark.parametrize("boundaries", [None, [0, 4, 11]])
@pytest.mark.parametrize("alpha", [0.71, 1.29])
def test_gradcheck_of_learned_offsets(boundaries: list[int] | None, alpha: float) -> None:
    given = None if boundaries is None else torch.tensor(boundaries)
    scale = torch.tensor([alpha], dtype=torch.float64, requires_grad=True)
    call = learned(1, "cpu", rungs=(1, 2, 3, 5, 8), cu_seqlens=given)
    assert torch.autograd.gradcheck(call, [*small(), scale])


def test_alpha_has_the_gradient_of_larger_distances_where_they_are_integers() -> None:
    inputs = random_inputs(Shape(60, kv_heads=2, group=2))
    call, step = learned(4, "cpu"), 1e-7

    def functional(alpha: Tensor) -> Tensor:
        return call(*inputs, alpha)[0].sin().sum()

    alpha = torch.ones(1, dtype=torch.float64, requires_grad=True)
    functional(alpha).backward()
    ahead = (functional(alpha.detach() + step) - functional(alpha.detach())) / step
    assert float(ahead) != 0
    torch.testing.assert_close(alpha.grad[0], ahead, rtol=1e-4, atol=0)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    q, k, v = small()
    # The incoming gradient is constant in the second: only that of the operator's own derivative is missing.
    for function in (torch.sin, torch.abs):
        out = function(attend(q, k, v, Pattern(2)))
        (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(InputError, match="attend has no second derivatives; backend='reference' has them"):
            (first.square().sum() + q.square().sum()).backward()
    (first,) = torch.autograd.grad(attend(q, k, v, Pattern(2), backend="reference").sum(), q, create_graph=True)
    first.square().sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("learns", [False, True])
def test_functional_transforms_equal_autograd(learns: bool) -> None:
    q, k, v = (x.detach() for x in small())
    alpha = torch.tensor(0.83, dtype=q.dtype)
    inputs = (q, k, v, alpha) if learns else (q, k, v)

    def call(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None = None) -> Tensor:
        pattern = LearnedPattern(1, (1, 2, 3, 5)) if learns else Pattern(1, (3, 5))
        return attend(q, k, v, pattern, alpha=alpha).sin()

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    found = torch.func.grad(lambda *x: call(*x).sum(), argnums=tuple(range(len(inputs))))(*inputs)
    _, pull = torch.func.vjp(call, *inputs)
    for pulled, mine, right in zip(pull(torch.ones_like(q)), found, expected, strict=True):
        assert torch.equal(mine, right)
        assert torch.equal(pulled, right)
    stacked = torch.func.vmap(lambda q: call(q, *inputs[1:]))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(stacked, torch.stack([call(q, *inputs[1:]), call(2 * q, *inputs[1:])]))


@pytest.mark.parametrize("grad", [True, False])
def test_a_tangent_is_refused_rather_than_lost(grad: bool) -> None:
    q, k, v = (x.detach() for x in small())
    with torch.set_grad_enabled(grad):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda q: attend(q, k, v, Pattern(2)), (q,), (q,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            attend(forward_ad.make_dual(q, torch.ones_like(q)), k, v, Pattern(2))


def test_positions_may_be_mapped_over() -> None:
    q, k, v = (x.detach() for x in small())
    positions = torch.stack([torch.arange(q.shape[1]), torch.arange(q.shape[1]) % 4])
    mapped = torch.func.vmap(lambda at: attend(q, k, v, Pattern(2), positions=at[None]))(positions)
    for found, at in zip(mapped, positions, strict=True):
        assert torch.equal(found, attend(q, k, v, Pattern(2), positions=at[None]))


def test_a_compiled_functional_gradient_is_right() -> None:
    q, k, v = (x.detach() for x in small())
    gradient = torch.func.grad(lambda q: attend(q, k, v, Pattern(2)).sin().sum())
    found = torch.compile(lambda q: gradient(q), backend="aot_eager")(q)
    torch.testing.assert_close(found, gradient(q))


def test_the_operator_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, Pattern(2, (5,)))

    inputs = tuple(x.detach() for x in small())
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(Layer(), inputs, dynamic_shapes=({1: tokens},) * 3)
    longer = random_inputs(Shape(70, batch=inputs[0].shape[0], kv_heads=2, group=2, size=inputs[0].shape[-1]))
    longer = [x[:, :, : y.shape[2]].to(y.dtype) for x, y in zip(longer, inputs, strict=True)]
    torch.testing.assert_close(exported.module()(*longer), attend(*longer, Pattern(2, (5,))))


# Cost

LONG = """
import sys, torch
from fibattn import LearnedPattern, Pattern, attend
from fibattn.machine import process_peak
torch.manual_seed(0)
learns = sys.argv[1] == "learned"
q = torch.randn(1, 65536, 8, 64, requires_grad=True)
k, v = (torch.randn(1, 65536, 2, 64, requires_grad=True) for _ in range(2))
alpha = torch.ones(1, requires_grad=True)
rungs = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
pattern = LearnedPattern(12, rungs) if learns else Pattern.fibonacci(12)
out = attend(q, k, v, pattern, alpha=alpha if learns else None)
out.sum().backward()
assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
print(process_peak())
"""


@pytest.mark.parametrize("schedule", ["fixed", "learned"])
def test_forward_and_backward_of_65536_tokens_stay_under_two_gigabytes(schedule: str) -> None:
    done = subprocess.run([sys.executable, "-c", LONG, schedule], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2e9


def test_work_is_linear_in_length() -> None:
    def operations(tokens: int) -> int:
        q, k, v = random_inputs(Shape(tokens, kv_heads=1, group=2, size=16), torch.float32)
        arguments = (4, cpu.FixedRungs([PATTERN], q.device), 0.25, None)
        with FlopCounterMode(display=False) as counter:
            out, lse = cpu.forward(q, k, v, *arguments)
            cpu.backward(torch.ones_like(out), None, q, k, v, out, lse, *arguments)
        return counter.get_total_flops()

    # Eight times the tokens: 8 times the multiplications where it is linear, 64 where it is quadratic.
    assert 7.9 < operations(32_768) / operations(4_096) < 8.1
