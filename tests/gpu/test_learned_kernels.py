"""The kernels on a GPU with a learned scale: precision, its gradient, its rungs. `pytest tests/gpu`"""

import importlib

import pytest
import torch
from comparison import DTYPES, RUNGS, assert_precise, tensors, with_gradients

from fibattn.attention import attend_scaled, ops, reference
from fibattn.pattern import interpolate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
    pytest.mark.usefixtures("poisoned_memory"),
]


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
