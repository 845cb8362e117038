"""The operator as PyTorch sees it: honest schemas and shapes, and one graph for many lengths."""

from typing import Any

import pytest
import torch
from operator_inputs import FIBONACCI, Shape, fixed, learned, random_inputs, run
from torch import Tensor

from fibattn import LearnedPattern, Pattern, attend, attend_cached
from fibattn.errors import InputError

NO_LIMIT = 2**31 - 1
OPS = torch.ops.fibattn
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


FIXED = (0.3, 3, [5, 9, 40], [3], NO_LIMIT)
FOR_EACH_HEAD = (0.3, 3, [5, 9, 40, 7], [3, 1], NO_LIMIT)
LEARNED = (0.3, 3, [5, 8, 13, 21], [4], 30)


def arguments(dtype: torch.dtype, packed: bool, keys: int | None = None, learns: bool = False) -> tuple[Any, ...]:
    q, k, v = random_inputs(Shape(20, batch=2, kv_heads=2, group=2, size=8, keys=keys), dtype)
    # A view, as a projection's heads are: the results must not inherit its strides.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    alpha = torch.tensor([0.83], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    positions = torch.arange(20, dtype=torch.int32)[None] % 7 if packed else None
    return q, k, v, alpha if learns else None, positions


@pytest.mark.parametrize(
    ("dtype", "packed", "keys"),
    [
        (torch.float32, False, None),
        (torch.float32, True, 33),
        (torch.float64, True, None),
        (torch.float64, False, 33),
        (torch.bfloat16, False, None),
        (torch.bfloat16, True, 33),
    ],
)
@pytest.mark.parametrize("pattern", [FIXED, FOR_EACH_HEAD, LEARNED], ids=["fixed", "for each head", "learned"])
def test_the_operators_keep_pytorchs_contract(
    dtype: torch.dtype, packed: bool, keys: int | None, pattern: tuple[Any, ...]
) -> None:
    inputs = (*arguments(dtype, packed, keys, learns=pattern is LEARNED), *pattern)
    torch.library.opcheck(OPS.attend_forward.default, inputs, test_utils=CHECKS)
    out, lse = OPS.attend_forward(*inputs)
    for grad_lse in (None, torch.randn_like(lse)):
        saved = (torch.randn_like(out), grad_lse, out, lse)
        torch.library.opcheck(OPS.attend_backward.default, (*saved, *inputs), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", [FIXED, LEARNED], ids=["fixed", "learned"])
def test_results_without_data_have_the_layout_of_real_ones(dtype: torch.dtype, pattern: tuple[Any, ...]) -> None:
    inputs = arguments(dtype, packed=True, keys=33, learns=pattern is LEARNED)

    def everything(*tensors: Tensor | None) -> list[tuple]:
        out, lse = OPS.attend_forward(*tensors, *pattern)
        grads = OPS.attend_backward(out, lse, out, lse, *tensors, *pattern)
        return [(x.shape, x.dtype, x.stride()) for x in (out, lse, *grads)]

    meta = [None if x is None else x.to("meta") for x in inputs]
    assert everything(*meta) == everything(*inputs)


class Counter:
    """A compiler that changes nothing and counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_serves_every_length(learns: bool, packed: bool) -> None:
    torch._dynamo.reset()
    counter = Counter()
    alpha = torch.tensor([0.83], dtype=torch.float64) if learns else None
    pattern = LearnedPattern(4, FIBONACCI) if learns else Pattern.fibonacci(4, max_offset=60)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, pattern, alpha=alpha, positions=positions, return_lse=True)

    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for tokens in (20, 33, 64, 65, 100, 128, 257):
        q, k, v = random_inputs(Shape(tokens, batch=2, kv_heads=2, group=2))
        positions = torch.arange(tokens)[None] % 19 if packed else None
        found = compiled(q, k, v, positions, alpha)
        expected = forward(q, k, v, positions, alpha)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    # One of the first length, and one of all others.
    assert counter.graphs <= 2


@pytest.mark.parametrize("learns", [False, True])
def test_compiled_gradients_have_the_bits_of_eager_ones(learns: bool) -> None:
    torch._dynamo.reset()
    call = learned(4, "auto") if learns else fixed(Pattern.fibonacci(4, max_offset=60), "auto")
    alpha = torch.tensor([0.83], dtype=torch.float64) if learns else None
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (33, 80, 130):
        inputs = random_inputs(Shape(tokens, batch=2, kv_heads=2, group=2))
        found, expected = run(compiled, inputs, alpha), run(call, inputs, alpha)
        assert all(torch.equal(found.all()[name], x) for name, x in expected.all().items())


def test_a_scale_does_not_break_the_graph() -> None:
    """Under `dynamic=True` a number is a symbol from the start."""
    torch._dynamo.reset()
    counter = Counter()

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attend(q, k, v, Pattern(3, (5, 9)), scale=scale)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (20, 33, 50):
        inputs = random_inputs(Shape(tokens))
        assert torch.equal(compiled(*inputs, 0.5), forward(*inputs, 0.5))
    assert counter.graphs == 1
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"scale is {scale}"):
            forward(*random_inputs(Shape(20)), scale)


def test_patterns_do_not_break_the_graph_where_every_size_is_a_symbol() -> None:
    torch._dynamo.reset()
    heads, scaled, alpha = [Pattern(3, (5, 9)), Pattern(3, (4,))], LearnedPattern(4, FIBONACCI), torch.tensor(0.83)
    how: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": "eager"}
    q, k, v = random_inputs(Shape(20, batch=2, kv_heads=2, group=2))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, heads), **how)
    assert torch.equal(compiled(q, k, v), attend(q, k, v, heads))
    positions, rings = torch.arange(20)[None], [k.new_zeros(2, 30, *k.shape[2:]) for _ in range(2)]
    found = [
        call(q, *(ring.clone() for ring in rings), k, v, scaled, cache_positions=positions, alpha=alpha)
        for call in (torch.compile(attend_cached, **how), attend_cached)
    ]
    assert torch.equal(*found)


def test_boundaries_of_documents_compile_too() -> None:
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(
        lambda q, k, v, ends: attend(q, k, v, Pattern(3, (5, 9)), cu_seqlens=ends), fullgraph=True, backend=counter
    )
    for tokens, ends in ((20, [0, 7, 20]), (30, [0, 4, 9, 30]), (50, [0, 50]), (64, [0, 1, 2, 3, 64])):
        inputs = random_inputs(Shape(tokens))
        expected = attend(*inputs, Pattern(3, (5, 9)), cu_seqlens=torch.tensor(ends))
        assert torch.equal(compiled(*inputs, torch.tensor(ends)), expected)
    assert counter.graphs <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_autocast_casts_the_inputs_and_reaches_no_further(dtype: torch.dtype, learns: bool) -> None:
    """As PyTorch's own attention: under autocast q, k and v are cast, and that is all."""
    inputs = random_inputs(Shape(80, kv_heads=2, group=2), dtype)
    alpha = torch.tensor([0.83]) if learns else None
    call = learned(3, "cpu") if learns else fixed(Pattern(3, (5, 9)), "cpu")
    expected = run(lambda q, k, v, *alpha: call(q.bfloat16(), k.bfloat16(), v.bfloat16(), *alpha), inputs, alpha)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(call, inputs, alpha)
    assert all(torch.equal(found.all()[name], x) for name, x in expected.all().items())


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    q, k, v = random_inputs(Shape(40, kv_heads=2, group=2))
    assert not attend(q, k, v, Pattern(3)).requires_grad
    with torch.no_grad():
        assert not attend(q.requires_grad_(), k, v, Pattern(3)).requires_grad
    out = attend(q, k, v, Pattern(3))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape


def test_gradient_of_keys_alone_equals_that_of_all_three() -> None:
    inputs = random_inputs(Shape(40, kv_heads=2, group=2))
    whole = run(fixed(Pattern(3, (9,)), "cpu"), inputs, lse_gradient=False).gradients["k"]
    q, k, v = inputs
    k = k.requires_grad_()
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    (attend(q, k, v, Pattern(3, (9,))) * weights.bfloat16().double()).sum().backward()
    assert torch.equal(k.grad, whole)


def test_inputs_of_several_widths_under_autocast_are_what_pytorchs_attention_takes() -> None:
    q, k, v = random_inputs(Shape(20), torch.float32)
    mixed = (q, k, v.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*mixed, Pattern(19))
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in mixed), is_causal=True
        ).transpose(1, 2)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = [x.double() for x in (q, k, v)]
        assert attend(*wide, Pattern(3)).dtype == torch.float64


def test_a_ring_keeps_its_dtype_under_autocast() -> None:
    q, k, v = random_inputs(Shape(9), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 9):
            rings = [torch.zeros(1, 9, 1, 16, dtype=dtype) for _ in range(2)]
            at = torch.arange(tokens)[None]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                new = (x[:, :tokens] for x in (k, v))
                out = attend_cached(q[:, :tokens], *rings, *new, Pattern(3, (8,)), cache_positions=at)
            assert out.dtype == dtype


def test_autocast_compiles_whole() -> None:
    torch._dynamo.reset()
    inputs = random_inputs(Shape(20), torch.float32)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, Pattern(3, (9,))), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*inputs), attend(*inputs, Pattern(3, (9,))))
    assert compiled(*inputs).dtype == torch.float32
