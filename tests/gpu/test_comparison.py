"""The comparison that kernels on a GPU are judged by, on a CPU: so that it is right wherever tests run."""

import pytest
import torch
from comparison import FIBONACCI, check, mask_of, tensors, torch_attend

from fibattn.attention import reference
from fibattn.pattern import Pattern

DOCUMENTS = torch.cat([torch.arange(17), torch.arange(23)])[None]


@pytest.mark.parametrize("positions", [None, DOCUMENTS])
def test_the_yardstick_attends_as_the_reference_does(positions) -> None:
    torch.manual_seed(0)
    q, k, v = tensors(2, 40, 4, 2, 16, torch.float64, device="cpu")
    patterns = (FIBONACCI, Pattern(3, (7, 20)))
    ours = torch_attend(q, k, v, mask_of(q, k, patterns, positions), 0.25)
    for one, other in zip(ours, reference.attend(q, k, v, patterns, 0.25, positions), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


def test_kernels_on_a_cpu_pass_it() -> None:
    torch.manual_seed(0)
    check(tensors(2, 40, 4, 2, 16, torch.bfloat16, device="cpu"), FIBONACCI, DOCUMENTS.expand(2, -1))
