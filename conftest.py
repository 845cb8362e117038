"""Fixtures that several rooms share: a small corpus, prepared once, a model of it, processes, a browser for pages."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import CHROMIUM, Browser
from forked import Server

if TYPE_CHECKING:
    from fibattn import FibAttnForCausalLM

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests that run side by side share the cores; threads that spin for a core would take it from each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(number: int) -> str:
    """Text with structure at several scales, the same every time."""
    word = LETTERS[number % 26] * (1 + number % 4)
    return f"{word} {number * number % 97} follows {LETTERS[number * 7 % 26]}{number % 10}; so says line {number}.\n"


def pytest_collection_finish() -> None:
    """Let no later collection of garbage walk what the imports left, a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Triton's bindings count what is still frozen at the end as leaks, at length."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def forked() -> Iterator[Server]:
    """Processes in which the library is imported."""
    server = Server("fibattn.cli.main", "fibattn.data.prepare", "fibattn.evaluation.sweep", "fibattn.training.run")
    yield server
    server.close()


@pytest.fixture(scope="session")
def foreign() -> Iterator[Server]:
    """Processes in which PyTorch and other things are imported, but nothing that knows models."""
    server = Server("datasets", "torch._dynamo", "torch.distributed.tensor")
    yield server
    server.close()


@pytest.fixture(scope="session")
def prepared(forked: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with some 40 k training tokens and a held-out set, vocabulary 512."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = folder / "texts"
    texts.mkdir()
    for document in range(40):
        lines = (sentence(document * 31 + line) for line in range(60))
        (texts / f"{document:02d}.txt").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "fibattn", "prepare", str(folder / "data"), str(texts)]
    forked.run([*command, "--vocab-size", "512", "--held-out", "0.15"], check=True)
    return folder / "data"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="session")
def model(prepared: Path) -> "FibAttnForCausalLM":
    """An untrained model that goes with the prepared text; large weights, so that its choices differ clearly."""
    import torch

    from fibattn import FibAttnConfig, FibAttnForCausalLM
    from fibattn.data.prepared import PreparedData

    data = PreparedData.open(prepared)
    torch.manual_seed(0)
    config = FibAttnConfig(
        vocab_size=data.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        window=6,
        initializer_range=0.4,
        bos_token_id=data.separator,
        eos_token_id=data.separator,
    )
    return FibAttnForCausalLM(config).eval()
