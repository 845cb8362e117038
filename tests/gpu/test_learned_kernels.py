"""The kernels on a GPU with a learned alpha: precision, its gradient, its rungs. `pytest tests/gpu`"""

import importlib

import pytest
import torch
from comparison import DTYPES, RUNGS, assert_precise, tensors, with_gradients

from fibattn.attention import attend, ops, reference
from fibattn.pattern import LearnedPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
    pytest.mark.usefixtures("poisoned_memory"),
]

PATTERN = LearnedPattern(12, RUNGS)


def torch_attend_learned(q, k, v, alpha, pattern, scale):
    """`attend` in PyTorch's operators, in the precision of q: keys and values interpolated, then attended."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    own = torch.arange(q.shape[2], device=q.device)
    distance = own[:, None] - own[None]
    near = (q @ k.transpose(-1, -2) * scale).masked_fill(~((distance >= 0) & (distance <= pattern.window)), -torch.inf)
    columns, values = [near], []
    for rung in pattern.at(float(alpha.detach())):
        fraction = (alpha.double() * pattern.rungs[rung.index] - rung.near).to(q.dtype)
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
def test_learned_alpha(alpha, dtype):
    inputs = [*tensors(2, 700, 8, 2, 64, dtype), torch.tensor(alpha, device="cuda", dtype=torch.float32)]
    check_learned(inputs)


@pytest.mark.parametrize(("size", "heads"), [(40, (7, 1)), (128, (8, 2)), (128, (2, 2))])
def test_learned_alpha_of_other_shapes(size, heads):
    check_learned([*tensors(2, 300, *heads, size), torch.tensor(1.1, device="cuda")])


def check_learned(inputs):
    scale = inputs[0].shape[-1] ** -0.5
    ours, upstream = with_gradients(lambda q, k, v, a: attend(q, k, v, PATTERN, alpha=a, return_lse=True), inputs)
    theirs, _ = with_gradients(lambda q, k, v, a: torch_attend_learned(q, k, v, a, PATTERN, scale), inputs, upstream)
    exact = [x.double() for x in inputs]
    right, _ = with_gradients(lambda q, k, v, a: reference.attend(q, k, v, PATTERN, scale, None, a), exact, upstream)
    assert_precise(ours[:5], theirs[:5], right[:5], inputs[0].dtype)
    return [(x[5].double() - right[5]).abs() for x in (ours, theirs)]


@pytest.mark.parametrize("alpha", [0.5, 1.0625])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_alpha(alpha, dtype):
    """One number is right or wrong by luck, so its error is the mean over a few inputs."""
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        errors.append(check_learned([*tensors(1, 300, 8, 2, 64, dtype), torch.tensor(alpha, device="cuda")]))
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours <= 2 * theirs


def test_rungs_are_resolved_as_in_the_pattern():
    learned, shape = (importlib.import_module(f"fibattn.attention.triton.{room}") for room in ("learned", "shape"))
    for alpha in [*torch.linspace(0.4, 1.6, 241, dtype=torch.float64).tolist(), 0.7, 1.3125, 1.1875]:
        for max_offset in (ops.NO_LIMIT, 400):
            where = torch.tensor(alpha, dtype=torch.float64, device="cuda")
            rungs, fractions, factors = learned.resolve(where, RUNGS, 12, max_offset)
            right = LearnedPattern(12, RUNGS, max_offset).at(alpha)
            count = int(rungs[0, 0])
            assert rungs[0, 1 : 1 + count].tolist() == [rung.near for rung in right]
            assert factors[:count].tolist() == [RUNGS[rung.index] for rung in right]
            exact = torch.tensor([rung.fraction for rung in right]).float()
            assert fractions[:count].tolist() == exact.tolist()
            # The kernels' tiles read past the last rung, where there must be no key.
            past = rungs.as_strided((learned.MOST_RUNGS,), (1,), 1 + count)
            assert (past == shape.UNREACHABLE).all()
            assert (fractions[count : count + learned.MOST_RUNGS] == 0).all()


def test_learned_alpha_with_documents():
    documents = torch.cat([torch.arange(n) for n in (1, 100, 17, 182)])[None].cuda()
    inputs = [*tensors(2, 300, 8, 2, 64, torch.float32), torch.tensor(1.05, device="cuda")]
    ours, upstream = with_gradients(
        lambda q, k, v, a: attend(q, k, v, PATTERN, alpha=a, positions=documents, return_lse=True), inputs
    )
    right, _ = with_gradients(
        lambda q, k, v, a: reference.attend(q, k, v, PATTERN, 0.125, documents, a),
        [x.double() for x in inputs],
        upstream,
    )
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-4, atol=2e-5)
