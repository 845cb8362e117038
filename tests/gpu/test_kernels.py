"""The kernels on a GPU: precision, properties, determinism, compilation. `pytest tests/gpu`

Precision is judged against the float64 reference on inputs that were rounded first. The yardstick is the
same attention written with PyTorch's own operators in the same precision: neither the mean error nor that of
the worst row may be more than twice its error. Outputs come from memory poisoned with NaN.
"""

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor

from fibattn.attention import attend, attend_scaled, ops, reference
from fibattn.errors import InputError
from fibattn.pattern import Pattern, base_rungs, interpolate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
]

FIBONACCI = Pattern.fibonacci(window=12)
RUNGS = base_rungs("fibonacci")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill fresh memory with NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def tensors(batch, tokens, heads, kv_heads, size, dtype=torch.bfloat16, keys=None, kind="random"):
    """q, k, v on the GPU, rounded to `dtype`."""
    keys = tokens if keys is None else keys
    q = torch.randn(batch, tokens, heads, size, device="cuda")
    k, v = (torch.randn(batch, keys, kv_heads, size, device="cuda") for _ in range(2))
    if kind == "peaked":  # one key dominates
        k[:, :: max(keys // 7, 1)] *= 12
    if kind == "correlated":  # neighbours alike, and a common direction, as in real activations
        q, k, v = (x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device="cuda")[:, None, None] + 1 for x in (q, k, v))
    if kind == "large":
        q, k, v = q * 8, k * 8, v * 100
    return [x.to(dtype) for x in (q, k, v)]


def torch_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same attention in PyTorch's operators, in the precision of q: mask (B or 1, Hkv or 1, Tq, Tk)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(group, 1)
    scores = (q.transpose(1, 2) @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2), torch.logsumexp(scores.float(), -1)


def mask_of(q: Tensor, k: Tensor, patterns, positions=None) -> Tensor:
    return torch.stack([reference._allowed(q, k, one.distances, positions) for one in patterns], 1)


def with_gradients(function, inputs, upstream=None):
    """Output, log-sum-exp and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    if upstream is None:
        torch.manual_seed(1)
        upstream = (torch.randn_like(out), torch.randn_like(lse))
    upstream = [x.to(y.dtype) for x, y in zip(upstream, (out, lse), strict=True)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, upstream)], upstream


def assert_precise(ours: list[Tensor], theirs: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    names = ("out", "lse", "dq", "dk", "dv", "dalpha")
    for name, mine, yardstick, exact in zip(names, ours, theirs, right, strict=False):
        assert torch.isfinite(mine).all(), name
        exact = exact.double()
        rows = [(x.double() - exact).reshape(-1, x.shape[-1] if x.ndim == 4 else 1) for x in (mine, yardstick)]
        # What rounding the exact result once would cost: no computation can be asked to be better.
        once = (exact.to(dtype).double() - exact).reshape(-1, rows[0].shape[-1])
        tiny = torch.finfo(dtype).eps * exact.abs().mean() * 0.02 + 1e-9
        mean, bar = (x.abs().mean() for x in rows)
        assert mean <= 2 * torch.maximum(bar, once.abs().mean()) + tiny, (
            f"{name}: mean error {mean:.2e}, PyTorch {bar:.2e}"
        )
        worst, bar = (x.norm(dim=1).max() for x in rows)
        floor = torch.maximum(bar, once.norm(dim=1).max())
        assert worst <= 2 * floor + 50 * tiny, f"{name}: worst row {worst:.2e}, PyTorch {bar:.2e}"


def check(inputs, pattern, positions=None, scale=None):
    q, k, _ = inputs
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ours, upstream = with_gradients(
        partial(attend, pattern=pattern, positions=positions, scale=scale, return_lse=True), inputs
    )
    mask = mask_of(q, k, patterns, positions)
    theirs, _ = with_gradients(partial(torch_attend, mask=mask, scale=scale), inputs, upstream)
    right, _ = with_gradients(
        lambda q, k, v: reference.attend(q, k, v, patterns, scale, positions), [x.double() for x in inputs], upstream
    )
    assert_precise(ours, theirs, right, q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 40, 64, 96, 128, 256])
def test_head_sizes(size, dtype):
    check(tensors(2, 300, 8, 2, size, dtype), Pattern(12, (13, 21, 34, 55, 89, 144, 233)))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2), (32, 1)])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_groups(heads, dtype):
    check(tensors(2, 129, *heads, 64, dtype), Pattern(12, (13, 21, 34, 55, 89)))


@pytest.mark.parametrize("tokens", [1, 2, 11, 12, 13, 14, 127, 128, 129, 986, 987, 988, 989, 1100])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_lengths(tokens, dtype):
    check(tensors(2, tokens, 8, 2, 64, dtype), FIBONACCI)


@pytest.mark.parametrize("kind", ["random", "peaked", "correlated", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_of_input(kind, dtype):
    check(tensors(3, 700, 8, 2, 64, dtype, kind=kind), FIBONACCI)
    check(tensors(2, 300, 8, 2, 128, dtype, kind=kind), Pattern.fibonacci(window=40))


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17, 31, 32, 33, 128, 500, 3000])
def test_windows(window):
    check(tensors(2, 600, 8, 2, 64), Pattern.fibonacci(window=window))


def test_many_rungs():
    check(tensors(2, 300, 4, 2, 64), Pattern(2, tuple(range(4, 200, 3))))


@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
def test_fewer_queries_than_keys(tokens):
    check(tensors(2, tokens, 8, 2, 64, keys=260), Pattern(12, (13, 40, 129, 250)))


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_pattern_for_each_head(dtype):
    patterns = [Pattern(12, (13, 40)), Pattern(12), Pattern(12, (20, 40, 60, 100, 200)), Pattern(12, (299,))]
    check(tensors(2, 300, 8, 4, 64, dtype), patterns)


@pytest.mark.parametrize("scale", [0.0, 0.5, -0.1])
def test_scale(scale):
    check(tensors(2, 100, 4, 2, 64), Pattern(5, (9, 30)), scale=scale)


def test_positions():
    documents = torch.cat([torch.arange(n) for n in (1, 100, 17, 182)])[None].cuda()
    check(tensors(2, 300, 8, 2, 64), Pattern(12, (13, 40, 90)), positions=documents)
    padded = torch.stack([torch.arange(300), (torch.arange(300) - 60).clamp(min=0)]).cuda()
    check(tensors(2, 300, 8, 2, 64), Pattern(12, (13, 40, 90)), positions=padded)


# ---- learned scale


def torch_attend_scaled(q, k, v, alpha, window, rungs, scale):
    """`attend_scaled` in PyTorch's operators, in the precision of q: keys and values interpolated, then attended."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    own = torch.arange(q.shape[2], device=q.device)
    distance = own[:, None] - own[None]
    near = (q @ k.transpose(-1, -2) * scale).masked_fill(~((distance >= 0) & (distance <= window)), -torch.inf)
    columns, values = [near], []
    for rung in interpolate(rungs, float(alpha.detach()), window):
        fraction = (alpha.double() * rungs[rung.index] - rung.near).to(q.dtype)
        lo, hi = (own - rung.near).clamp(min=0), (own - rung.near - 1).clamp(min=0)
        key, value = ((1 - fraction) * x[:, :, lo] + fraction * x[:, :, hi] for x in (k, v))
        values.append(value)
        columns.append(((q * key).sum(-1) * scale).masked_fill(own < rung.near, -torch.inf)[..., None])
    scores = torch.cat(columns, -1)
    weights = torch.softmax(scores, -1)
    out = weights[..., : k.shape[2]] @ v
    for i, value in enumerate(values):
        out = out + weights[..., k.shape[2] + i, None] * value
    return out.transpose(1, 2), torch.logsumexp(scores.float(), -1)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.73, 1.0625, 1.4999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_scale(alpha, dtype):
    inputs = [*tensors(2, 700, 8, 2, 64, dtype), torch.tensor(alpha, device="cuda", dtype=torch.float32)]
    check_scaled(inputs)


@pytest.mark.parametrize(("size", "heads"), [(40, (7, 1)), (128, (8, 2)), (128, (2, 2))])
def test_learned_scale_of_other_shapes(size, heads):
    check_scaled([*tensors(2, 300, *heads, size), torch.tensor(1.1, device="cuda")])


def check_scaled(inputs, window=12):
    scale = inputs[0].shape[-1] ** -0.5
    ours, upstream = with_gradients(
        lambda q, k, v, a: attend_scaled(q, k, v, window, RUNGS, a, return_lse=True), inputs
    )
    theirs, _ = with_gradients(
        lambda q, k, v, a: torch_attend_scaled(q, k, v, a, window, RUNGS, scale), inputs, upstream
    )
    exact = [x.double() for x in inputs]
    right, _ = with_gradients(
        lambda q, k, v, a: reference.attend_scaled(q, k, v, window, RUNGS, a, scale, None, None), exact, upstream
    )
    assert_precise(ours[:5], theirs[:5], right[:5], inputs[0].dtype)
    return [(x[5].double() - right[5]).abs() for x in (ours, theirs)]


@pytest.mark.parametrize("alpha", [0.5, 1.0625])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_scale(alpha, dtype):
    """One number is right or wrong by luck, so its error is the mean over a few inputs."""
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        errors.append(check_scaled([*tensors(1, 300, 8, 2, 64, dtype), torch.tensor(alpha, device="cuda")]))
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours <= 2 * theirs


def test_rungs_are_resolved_as_in_the_pattern():
    scaled, columns, shape = (
        importlib.import_module(f"fibattn.attention.triton.{room}") for room in ("scaled", "columns", "shape")
    )
    for alpha in [*torch.linspace(0.4, 1.6, 241, dtype=torch.float64).tolist(), 0.7, 1.3125, 1.1875]:
        for max_offset in (ops.NO_LIMIT, 400):
            found = scaled.resolve(torch.tensor(alpha, dtype=torch.float64, device="cuda"), RUNGS, 12, max_offset)
            right = interpolate(RUNGS, alpha, 12, max_offset)
            count = int(found.table[0, 0])
            assert found.table[0, 1 : 1 + count].tolist() == [rung.near for rung in right]
            assert found.factors[:count].tolist() == [RUNGS[rung.index] for rung in right]
            exact = torch.tensor([rung.fraction for rung in right]).float()
            assert found.fractions[:count].tolist() == exact.tolist()
            # The kernels' tiles read past the last rung, where there must be no key.
            past = found.table.as_strided((columns.MOST_RUNGS,), (1,), 1 + count)
            assert (past == shape.UNREACHABLE).all()
            assert (found.fractions[count : count + columns.MOST_RUNGS] == 0).all()


def test_learned_scale_with_documents():
    documents = torch.cat([torch.arange(n) for n in (1, 100, 17, 182)])[None].cuda()
    inputs = [*tensors(2, 300, 8, 2, 64, torch.float32), torch.tensor(1.05, device="cuda")]
    ours, upstream = with_gradients(
        lambda q, k, v, a: attend_scaled(q, k, v, 12, RUNGS, a, positions=documents, return_lse=True), inputs
    )
    right, _ = with_gradients(
        lambda q, k, v, a: reference.attend_scaled(q, k, v, 12, RUNGS, a, 0.125, documents, None),
        [x.double() for x in inputs],
        upstream,
    )
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-4, atol=2e-5)


# ---- properties


def test_a_window_of_everything_is_dense_attention():
    q, k, v = tensors(2, 200, 8, 2, 64, torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, Pattern(199)).double(), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_token_changes_only_the_rows_that_attend_to_it(dtype):
    q, k, v = tensors(2, 400, 8, 2, 64, dtype)
    before = attend(q, k, v, FIBONACCI)
    for token in (0, 100, 250, 399):
        k2, v2 = k.clone(), v.clone()
        k2[:, token] += 1
        v2[:, token] -= 1
        changed = (attend(q, k2, v2, FIBONACCI) != before).flatten(2).any(-1).any(0)
        assert set(changed.nonzero()[:, 0].tolist()) == {token + d for d in FIBONACCI.distances if token + d < 400}


def test_the_future_changes_nothing():
    q, k, v = tensors(2, 400, 8, 2, 64)
    half = [x[:, :200] for x in (q, k, v)]
    assert torch.equal(attend(q, k, v, FIBONACCI)[:, :200], attend(*half, FIBONACCI))


def test_packed_equals_separate():
    lengths = [64, 128, 16, 192]
    q, k, v = tensors(1, sum(lengths), 8, 2, 64)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda", dtype=torch.int32)
    packed = attend(q, k, v, FIBONACCI, cu_seqlens=ends)
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = attend(*(x[:, first:last] for x in (q, k, v)), FIBONACCI)
        assert torch.equal(packed[:, first:last], alone)


def test_a_batch_entry_does_not_see_the_others():
    inputs = tensors(3, 200, 8, 2, 64)
    together = attend(*inputs, FIBONACCI)
    for i in range(3):
        assert torch.equal(together[i : i + 1], attend(*(x[i : i + 1] for x in inputs), FIBONACCI))


def test_offsets_beyond_the_length_do_nothing():
    inputs = tensors(2, 200, 8, 2, 64)
    beyond = Pattern(12, (*FIBONACCI.offsets[:8], 2000, 10**6, 10**12))
    (ours, _), (right, _) = (
        with_gradients(partial(attend, pattern=one, return_lse=True), inputs) for one in (beyond, FIBONACCI)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_strided_views_equal_copies():
    packed = torch.randn(2, 300, 12, 64, device="cuda", dtype=torch.bfloat16)
    views = [packed[:, :, :8], packed[:, :, 8:10], packed[:, :, 10:]]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    copies = [x.contiguous() for x in views]
    right, upstream = with_gradients(partial(attend, pattern=FIBONACCI, return_lse=True), copies)
    for inputs in (views, heads_first):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, FIBONACCI, return_lse=True)
        ours = [out, lse, *torch.autograd.grad((out, lse), leaves, upstream)]
        assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_expanded_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(1, 50, 4, 2, 64, torch.float32))
    ours = torch.autograd.grad(attend(q, k, v, FIBONACCI).sum(), (q, k, v))
    right = torch.autograd.grad(attend(q, k, v, FIBONACCI, backend="reference").sum(), (q, k, v))
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_strides_past_32_bits():
    """Rows so far apart that element offsets need 64 bits."""
    tokens, stride = 40, 2**26 + 64
    buffer = torch.empty(tokens * stride, device="cuda", dtype=torch.bfloat16)
    views = [
        buffer.as_strided((1, tokens, h, 64), (tokens * stride, stride, 64, 1), s)
        for h, s in ((4, 0), (2, 256), (2, 384))
    ]
    for view in views:
        view.copy_(torch.randn(view.shape, device="cuda"))
    ours, upstream = with_views(views)
    right, _ = with_gradients(partial(attend, pattern=Pattern(5, (9, 30)), return_lse=True), views, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def with_views(views):
    leaves = [x.detach().requires_grad_() for x in views]
    out, lse = attend(*leaves, Pattern(5, (9, 30)), return_lse=True)
    upstream = [torch.randn_like(out), torch.randn_like(lse)]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, upstream)], upstream


@pytest.mark.parametrize("learned", [False, True])
def test_the_backward_repeats_bit_for_bit(learned):
    inputs = tensors(4, 1024, 8, 2, 64)
    if learned:
        inputs.append(torch.tensor(1.03, device="cuda"))

    def function(q, k, v, alpha=None):
        if alpha is None:
            return attend(q, k, v, FIBONACCI, return_lse=True)
        return attend_scaled(q, k, v, 12, RUNGS, alpha, return_lse=True)

    first, upstream = with_gradients(function, inputs)
    for _ in range(30):
        again, _ = with_gradients(function, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- as an operator


@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(learned):
    q, k, v = tensors(2, 40, 4, 2, 64, torch.float32)
    rest = (None, 0.125, 5)
    rest += (torch.tensor(1.1, device="cuda"), [1, 8, 21], ops.NO_LIMIT) if learned else ([9, 30], [2])
    name = "attend_scaled" if learned else "attend"
    forward, backward = (getattr(torch.ops.fibattn, f"{name}_{way}").default for way in ("forward", "backward"))
    torch.library.opcheck(forward, (q, k, v, *rest))
    out, lse = forward(q, k, v, *rest)
    torch.library.opcheck(backward, (torch.randn_like(out), None, out, lse, q, k, v, *rest))


@pytest.mark.parametrize("learned", [False, True])
def test_twenty_lengths_compile_twice_at_most(learned):
    kernels = [
        getattr(importlib.import_module(f"fibattn.attention.triton.{room}"), name)
        for room, name in (
            ("forward", "forward_kernel"),
            ("backward", "query_grad_kernel"),
            ("key_gradients", "rung_grad_kernel"),
            ("key_gradients", "window_grad_kernel"),
        )
    ]
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in kernels]
    before = [len(cache) for cache in caches]
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def function(q, k, v, alpha):
        if learned:
            return attend_scaled(q, k, v, 12, RUNGS, alpha)
        return attend(q, k, v, FIBONACCI)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counting, fullgraph=True)
    alpha = torch.tensor(1.1, device="cuda", requires_grad=True)
    for tokens in (1, 2, 3, 16, 31, 64, 100, 128, 129, 200, 255, 256, 257, 333, 400, 512, 600, 777, 1000, 1024):
        # A shape of its own (9 heads of 72), so that binaries of other tests do not count. Batches of one apart:
        # PyTorch compiles those by themselves, whatever the operator.
        inputs = [x.requires_grad_() for x in tensors(2 + tokens % 2, tokens, 9, 3, 72)]
        out = compiled(*inputs, alpha)
        out.sum().backward()
        assert torch.equal(out, function(*inputs, alpha))
    assert graphs <= 2
    assert all(len(cache) - n <= 2 for cache, n in zip(caches, before, strict=True))


def test_compiled_by_inductor():
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, FIBONACCI).float().square().sum(), fullgraph=True)
    inputs = [x.requires_grad_() for x in tensors(2, 200, 8, 2, 64)]
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    right = torch.autograd.grad(attend(*inputs, FIBONACCI).float().square().sum(), inputs)
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact)


def test_nothing_waits_for_the_gpu():
    inputs = [x.requires_grad_() for x in tensors(2, 200, 8, 2, 64)]
    ends = torch.tensor([0, 50, 400], device="cuda")
    alpha = torch.tensor(1.1, device="cuda", requires_grad=True)
    packed = [x.detach().reshape(1, 400, *x.shape[2:]).requires_grad_() for x in inputs]

    def work():
        attend(*inputs, FIBONACCI).sum().backward()
        attend(*packed, FIBONACCI, cu_seqlens=ends).sum().backward()
        attend_scaled(*inputs, 12, RUNGS, alpha).sum().backward()

    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unsupported_input_is_refused():
    for dtype, size, message in (
        (torch.float64, 64, "float64"),
        (torch.float32, 20, "20"),
        (torch.float32, 264, "264"),
    ):
        q = torch.randn(1, 4, 2, size, dtype=dtype, device="cuda")
        with pytest.raises(InputError, match=message):
            attend(q, q, q, Pattern(2))
    q = torch.randn(1, 4, 2, 64, device="cuda")
    with pytest.raises(InputError, match="cpu"):
        attend(q, q.cpu(), q, Pattern(2))
    with pytest.raises(InputError, match="'cpu' runs on the CPU"):
        attend(q, q, q, Pattern(2), backend="cpu")
