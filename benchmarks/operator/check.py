"""Whether a provider's numbers are right, at the length that is timed."""

import torch

from benchmarks.operator.cases import Case
from benchmarks.operator.providers import Call
from fibattn.attention import attend
from fibattn.pattern import Pattern

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 3e-3, "float32": 1e-4}
"""Relative error (Euclidean norms) that the rounding of a dtype explains."""

_TAIL = 32


def errors(call: Call, case: Case, pattern: Pattern, backward: bool) -> dict[str, float]:
    """Relative errors against the float64 reference: of `out` and, with `backward`, of `dq`, `dk` and `dv`.

    The reference is quadratic, so only the last 32 queries are looked at: their outputs, and the gradients
    that they alone send to all queries, keys and values.
    """
    inputs = [x.requires_grad_(backward) for x in case.inputs()]
    with torch.set_grad_enabled(backward):
        out = call.function(*inputs)
    tail = min(_TAIL, case.length)
    upstream = torch.zeros_like(out)
    upstream[:, -tail:] = torch.randn_like(upstream[:, -tail:])
    found = {"out": out.detach()[:, -tail:]}
    if backward:
        gradients = torch.autograd.grad(out, inputs, upstream)
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    right = attend(exact[0][:, -tail:], exact[1], exact[2], pattern, backend="reference")
    assert isinstance(right, torch.Tensor)
    expected = {"out": right.detach()}
    if backward:
        gradients = torch.autograd.grad(right, exact, upstream[:, -tail:].double())
        expected |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    # Some gradients vanish (with a single key the softmax is constant); those are held to the upstream's size.
    least = 1e-2 * upstream.double().norm()
    return {
        name: float((found[name].double() - wanted).norm() / torch.maximum(wanted.norm(), least))
        for name, wanted in expected.items()
    }
