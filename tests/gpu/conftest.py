"""What tests on a GPU start from."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fill fresh memory with NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
