"""What `attend` accepts, what they refuse and how, and which backend they take."""

import logging
import math

import pytest
import torch
from operator_inputs import FIBONACCI, Shape, fixed, learned, random_inputs, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fibattn import InputError, LearnedPattern, Pattern, attend, padded_positions
from fibattn.attention import api

PATTERN = Pattern(3, (5, 9))
LEARNED = LearnedPattern(3, (5, 9))


def tensors(dtype: torch.dtype = torch.float32, **changed: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """q (2, 6, 4, 8) and k, v (2, 6, 2, 8), or other shapes."""
    shapes = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8), **changed}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def refuses(message: str, pattern=PATTERN, **arguments) -> None:
    """The tensors are refused with the message, whether alpha is learned or not."""
    with pytest.raises(InputError, match=message):
        attend(pattern=pattern, **arguments)
    with pytest.raises(InputError, match=message):
        attend(pattern=LEARNED, alpha=torch.ones(1), **arguments)


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="window is -1"):
        attend(**tensors(), pattern=Pattern(-1))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("shape", [(6, 4, 8), (1, 2, 6, 4, 8), ()])
def test_a_wrong_number_of_dimensions_is_refused(name: str, shape: tuple[int, ...]) -> None:
    # The shape as it is printed, with its brackets escaped.
    printed = str(shape).replace("(", r"\(").replace(")", r"\)")
    refuses(rf"{name} has shape {printed}; expected \(batch, tokens, heads, head size\)", **tensors(**{name: shape}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_without_a_kernel_is_refused(dtype: torch.dtype) -> None:
    refuses(rf"q is {dtype}; expected one of torch.float16, torch.bfloat16, .*float64", **tensors(dtype))


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_dtypes_are_refused(name: str) -> None:
    given = tensors()
    given[name] = given[name].bfloat16()
    refuses(rf"{name} is torch.bfloat16 on cpu but q is torch.float32 on cpu; make them agree", **given)


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_devices_are_refused(name: str) -> None:
    given = tensors()
    given[name] = given[name].to("meta")
    refuses(rf"{name} is torch.float32 on meta but q is torch.float32 on cpu; make them agree", **given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_last_dimension_that_is_not_contiguous_is_refused(name: str) -> None:
    given = tensors()
    given[name] = given[name].mT.contiguous().mT
    refuses(rf"{name} has strides \(\d+, \d+, 1, \d\); the last dimension must be contiguous, copy it", **given)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"v": (2, 5, 2, 8)}, r"k is \(2, 6, 2, 8\) and v is \(2, 5, 2, 8\); their shapes must be equal"),
        ({"v": (2, 6, 2, 4)}, r"v is \(2, 6, 2, 4\); their shapes must be equal"),
        ({"q": (3, 6, 4, 8)}, r"q is \(3, 6, 4, 8\) and k is \(2, 6, 2, 8\); batch and head size must be equal"),
        ({"q": (2, 6, 4, 16)}, r"q is \(2, 6, 4, 16\) and k is .*; batch and head size must be equal"),
        ({"q": (2, 6, 5, 8)}, r"5 query heads do not divide into 2 KV heads; use a multiple of them"),
        ({"q": (2, 6, 1, 8)}, r"1 query heads do not divide into 2 KV heads"),
        ({"q": (2, 6, 0, 8)}, r"0 query heads do not divide into 2 KV heads"),
        ({"k": (2, 6, 0, 8), "v": (2, 6, 0, 8)}, r"4 query heads do not divide into 0 KV heads"),
        ({"q": (2, 7, 4, 8)}, r"7 query tokens and 6 key tokens; queries are the last of the keys"),
        ({"q": (2, 0, 4, 8)}, r"0 query tokens and 6 key tokens; .* at least 1"),
        ({"q": (2, 0, 4, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, r"0 query tokens and 0 key tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    refuses(message, **tensors(**shapes))


def test_the_layout_of_pytorchs_attention_is_noticed() -> None:
    """(batch, heads, tokens, head size): with fewer KV heads than heads at any length, else from 257 tokens on."""
    grouped = tensors(q=(2, 8, 20, 16), k=(2, 2, 20, 16), v=(2, 2, 20, 16))
    refuses(r"8 query tokens and 2 key tokens; .*The layout is \(batch, tokens, heads, head size\)", **grouped)
    alike = tensors(q=(1, 8, 300, 16), k=(1, 8, 300, 16), v=(1, 8, 300, 16))
    refuses(r"8 tokens with 300 heads; .* not \(batch, heads, tokens, head size\).*: call transpose\(1, 2\)", **alike)
    many = {name: torch.randn(1, 2, 128, 8) for name in "qkv"}
    assert attend(**many, pattern=PATTERN).shape == (1, 2, 128, 8)


@pytest.mark.parametrize(("batch", "size"), [(0, 8), (2, 0)])
def test_empty_batches_and_heads_are_refused(batch: int, size: int) -> None:
    given = tensors(q=(batch, 6, 4, size), k=(batch, 6, 2, size), v=(batch, 6, 2, size))
    refuses(rf"q is \({batch}, 6, 4, {size}\); batch and head size must be at least 1", **given)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    refuses(rf"scale is {scale}; it must be finite, or None for head size", **tensors(), scale=scale)


def test_a_scale_that_could_have_a_gradient_is_refused() -> None:
    refuses("scale is a Tensor; give a number, which has no gradient, or scale q", **tensors(), scale=torch.tensor(0.3))
    refuses("scale is a str; give a number", **tensors(), scale="1")


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [None, [[1.0]]])
def test_what_is_no_tensor_is_refused(name: str, value: object) -> None:
    wrong = rf"{name} is a {type(value).__name__}; give a tensor \(batch, tokens, heads, head size\)"
    refuses(wrong, **{**tensors(), name: value})


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.zeros(2, 6), r"positions are torch.float32 on cpu; expected integers on cpu"),
        (torch.zeros(2, 6, dtype=torch.int16), r"positions are torch.int16 on cpu; expected integers"),
        (torch.zeros(2, 6, dtype=torch.int64, device="meta"), r"positions are torch.int64 on meta; expected .* on cpu"),
        (torch.zeros(6, dtype=torch.int64), r"positions have shape \(6,\); expected \(2 or 1, 6\)"),
        (torch.zeros(3, 6, dtype=torch.int64), r"positions have shape \(3, 6\); expected \(2 or 1, 6\)"),
        (torch.zeros(2, 5, dtype=torch.int64), r"positions have shape \(2, 5\); expected \(2 or 1, 6\)"),
        (torch.tensor([[0, 1, 2, -7, 0, 1]]), r"positions go down to -7; a position inside a document is 0 or more"),
    ],
)
def test_bad_positions_are_refused(positions: torch.Tensor, message: str) -> None:
    refuses(message, **tensors(), positions=positions)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        (torch.tensor([0, 4, 2, 6]), r"cu_seqlens is \[0, 4, 2, 6\]; expected to rise from 0 to the 6 tokens"),
        (torch.tensor([0, 3, 5]), r"cu_seqlens is \[0, 3, 5\]; .* the 6 tokens"),
        (torch.tensor([0, 3, 7]), r"cu_seqlens is \[0, 3, 7\]; .* the 6 tokens"),
        (torch.tensor([1, 3, 6]), r"cu_seqlens is \[1, 3, 6\]; .* from 0 to"),
        (torch.tensor([6]), r"cu_seqlens is \[6\]; "),
        (torch.tensor([], dtype=torch.int32), r"cu_seqlens is \[\]; "),
        (torch.tensor([[0, 6]]), r"cu_seqlens is torch.int64 \(1, 2\); expected integers \(documents \+ 1,\)"),
        (torch.tensor([0.0, 6.0]), r"cu_seqlens is torch.float32 \(2,\); expected integers"),
        (torch.tensor([0, 6], device="meta"), r"cu_seqlens is on meta; expected integers on cpu"),
    ],
)
def test_bad_boundaries_are_refused(boundaries: torch.Tensor, message: str) -> None:
    one = tensors(q=(1, 6, 4, 8), k=(1, 6, 2, 8), v=(1, 6, 2, 8))
    refuses(message, **one, cu_seqlens=boundaries)


def test_boundaries_that_are_no_tensor_are_refused() -> None:
    one = tensors(q=(1, 6, 4, 8), k=(1, 6, 2, 8), v=(1, 6, 2, 8))
    refuses("cu_seqlens are a list; give a tensor of integers on cpu", **one, cu_seqlens=[0, 6])


def test_boundaries_need_one_row_with_as_many_keys_as_queries() -> None:
    remedy = "pack the documents into one row, or give positions"
    boundaries = torch.tensor([0, 6])
    refuses(rf"a batch of one .* not 2 × 6 queries and 6 keys; {remedy}", **tensors(), cu_seqlens=boundaries)
    longer = tensors(q=(1, 6, 4, 8), k=(1, 9, 2, 8), v=(1, 9, 2, 8))
    refuses(rf"not 1 × 6 queries and 9 keys; {remedy}", **longer, cu_seqlens=boundaries)


def test_positions_and_boundaries_together_are_refused() -> None:
    one = tensors(q=(1, 6, 4, 8), k=(1, 6, 2, 8), v=(1, 6, 2, 8))
    given = {"positions": torch.arange(6)[None], "cu_seqlens": torch.tensor([0, 6])}
    refuses("both positions and cu_seqlens were given; they say the same, give one", **one, **given)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([PATTERN] * 3, r"3 patterns for 2 KV heads; give one, or one for each"),
        ([], r"0 patterns for 2 KV heads"),
        ([Pattern(3), Pattern(4)], r"patterns have windows \[3, 4\]; KV heads of one layer must share their window"),
        ([1, 2], r"pattern is \[1, 2\]; expected a fibattn.Pattern, a sequence of them"),
        (["fibonacci", PATTERN], r"pattern is .*'fibonacci'.*; expected a fibattn.Pattern"),
    ],
)
def test_bad_patterns_are_refused(pattern, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attend(**tensors(), pattern=pattern)


@pytest.mark.parametrize("pattern", [7, None])
def test_what_is_no_pattern_at_all_is_refused(pattern) -> None:
    with pytest.raises(InputError, match=f"pattern is {pattern}; expected a fibattn.Pattern"):
        attend(**tensors(), pattern=pattern)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.ones(2), r"alpha is \(2,\) torch.float32 on cpu; it must be one floating-point number on cpu"),
        (torch.ones(1, dtype=torch.int64), r"alpha is \(1,\) torch.int64 on cpu; it must be one floating-point"),
        (torch.ones(1, device="meta"), r"alpha is \(1,\) torch.float32 on meta; it must be .* on cpu"),
        (torch.tensor(math.nan), r"alpha is nan; it must be a finite number above 0"),
        (torch.tensor([math.inf]), r"alpha is inf; it must be a finite number above 0"),
        (torch.tensor([-0.5]), r"alpha is -0.5; it must be a finite number above 0"),
        (torch.tensor([0.0]), r"alpha is 0.0; it must be a finite number above 0"),
    ],
)
def test_bad_scales_of_the_rungs_are_refused(alpha: torch.Tensor, message: str, backend: api.Backend) -> None:
    with pytest.raises(InputError, match=message):
        attend(**tensors(), pattern=LEARNED, alpha=alpha, backend=backend)


def test_alpha_and_a_learned_pattern_come_together() -> None:
    with pytest.raises(InputError, match="alpha is None; a LearnedPattern reads at alpha times its rungs"):
        attend(**tensors(), pattern=LEARNED)
    with pytest.raises(InputError, match=r"alpha is 1\.0; .*: give a tensor with one floating-point number, on cpu"):
        attend(**tensors(), pattern=LEARNED, alpha=1.0)  # pyright: ignore
    with pytest.raises(InputError, match="alpha was given, but a Pattern's offsets are fixed"):
        attend(**tensors(), pattern=PATTERN, alpha=torch.ones(1))
    with pytest.raises(InputError, match=r"expected a fibattn\.Pattern, a sequence of them or a LearnedPattern"):
        attend(**tensors(), pattern=[LEARNED, LEARNED], alpha=torch.ones(1))  # pyright: ignore


def test_an_unknown_backend_is_refused() -> None:
    refuses("unknown backend 'flash'; the backends are auto, reference, cpu, triton", **tensors(), backend="flash")


def test_an_explicit_backend_never_becomes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refuses("backend 'triton' runs on an NVIDIA GPU, not on cpu; use 'auto'", **tensors(), backend="triton")
    with pytest.raises(InputError, match="backend 'cpu' runs on the CPU, not on mps:0; use 'auto' or 'triton'"):
        attend(**elsewhere(), pattern=PATTERN, backend="cpu")


def test_a_device_without_a_backend_is_told_of_the_reference() -> None:
    with pytest.raises(InputError, match="no backend for mps:0; backend='reference' runs anywhere, in quadratic time"):
        attend(**elsewhere(), pattern=PATTERN)


def elsewhere() -> dict[str, Tensor]:
    """Tensors of a device that this machine need not have; they hold nothing."""
    with FakeTensorMode():
        return {name: torch.empty(x.shape, device="mps") for name, x in tensors().items()}


def test_on_the_meta_device_there_are_shapes() -> None:
    meta = {name: x.to("meta").requires_grad_() for name, x in tensors().items()}
    out, lse = attend(**meta, pattern=PATTERN, return_lse=True)
    out.sum().backward()
    assert (out.shape, lse.shape) == (meta["q"].shape, tuple(meta["q"].shape[i] for i in (0, 2, 1)))
    assert meta["k"].grad.is_meta


def test_auto_takes_the_cpu_backend_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    api._say.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="fibattn"):
        for _ in range(3):
            found = attend(**(given := tensors()), pattern=PATTERN)
            assert torch.equal(found, attend(**given, pattern=PATTERN, backend="cpu"))
    assert [record.getMessage() for record in caplog.records] == ["backend 'cpu' for cpu tensors"]


def test_the_lse_comes_only_when_asked_for() -> None:
    given = tensors()
    out, lse = attend(**given, pattern=PATTERN, return_lse=True)
    assert torch.equal(attend(**given, pattern=PATTERN), out)
    assert lse.shape == (2, 4, 6)
    out, lse = attend(**given, pattern=LEARNED, alpha=torch.ones(1), return_lse=True)
    assert torch.equal(attend(**given, pattern=LEARNED, alpha=torch.ones(1)), out)
    assert lse.shape == (2, 4, 6)


def test_lse_is_the_natural_logarithm() -> None:
    q, k, v = (torch.zeros(1, 10, 1, 4) for _ in range(3))
    _, lse = attend(q, k, v, Pattern(2, (5,)), return_lse=True)
    counts = torch.tensor([1, 2, 3, 3, 3, 4, 4, 4, 4, 4])
    torch.testing.assert_close(lse[0, 0], counts.log())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_equal_positions(dtype: torch.dtype) -> None:
    q, k, v = random_inputs(Shape(20))
    boundaries, positions = torch.tensor([0, 7, 8, 20], dtype=dtype), [*range(7), 0, *range(12)]
    found = attend(q, k, v, PATTERN, cu_seqlens=boundaries)
    assert torch.equal(found, attend(q, k, v, PATTERN, positions=torch.tensor([positions], dtype=dtype)))


@pytest.mark.parametrize("empty", [[0, 0, 7, 20], [0, 7, 7, 7, 20], [0, 7, 20, 20]])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_documents_do_nothing(empty: list[int], backend: api.Backend) -> None:
    q, k, v = random_inputs(Shape(20))
    expected = attend(q, k, v, PATTERN, cu_seqlens=torch.tensor([0, 7, 20]), backend=backend)
    assert torch.equal(attend(q, k, v, PATTERN, cu_seqlens=torch.tensor(empty), backend=backend), expected)


def test_positions_beyond_the_first_key_do_no_harm() -> None:
    q, k, v = random_inputs(Shape(20, batch=2))
    far = torch.full((1, 20), 10**6)
    assert torch.equal(attend(q, k, v, PATTERN, positions=far), attend(q, k, v, PATTERN))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_have_any_shape_of_one_element(shape: tuple[int, ...]) -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(Shape(20)))
    for backend in ("cpu", "reference"):
        alpha = torch.full(shape, 0.9, dtype=torch.float64, requires_grad=True)
        out = attend(q, k, v, LEARNED, alpha=alpha, backend=backend)
        assert out.shape == q.shape
        out.sum().backward()
        assert alpha.grad.shape == shape


def test_alpha_of_one_equals_fixed_offsets() -> None:
    # An integer distance has no part of the farther key.
    inputs = random_inputs(Shape(150, batch=2, kv_heads=2, group=2))
    found = run(learned(8, "cpu"), inputs, torch.ones(1, dtype=torch.float64))
    expected = run(fixed(Pattern.scaled(8, FIBONACCI), "cpu"), inputs)
    for name, wanted in expected.all().items():
        torch.testing.assert_close(found.all()[name], wanted, rtol=1e-12, atol=1e-12)


def test_positions_for_padding_keep_it_out_of_sight() -> None:
    q, k, v = random_inputs(Shape(20, batch=2))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    assert padded_positions(mask)[0].tolist() == [0] * 7 + list(range(13))
    assert padded_positions(mask.bool(), 3).tolist() == [[10, 11, 12], [17, 18, 19]]
    found = attend(q, k, v, PATTERN, positions=padded_positions(mask))
    alone = attend(q[:1, 7:], k[:1, 7:], v[:1, 7:], PATTERN)
    torch.testing.assert_close(found[:1, 7:], alone)
    torch.testing.assert_close(found[1:], attend(q[1:], k[1:], v[1:], PATTERN))
    with pytest.raises(InputError, match=r"the mask has shape \(2, 1, 20\); expected \(batch, tokens\)"):
        padded_positions(mask[:, None])
    with pytest.raises(InputError, match=r"the mask has shape \(2, 20\); expected \(batch, 21 tokens or more\)"):
        padded_positions(mask, 21)
    with pytest.raises(InputError, match=r"the mask has shape \(2, 0\); expected \(batch, tokens\), 0 for padding"):
        padded_positions(mask[:, :0])
