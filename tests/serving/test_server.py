"""vLLM's server under load: clients that come and go, half of them in the middle of an answer."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from openai import AsyncOpenAI
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SECONDS = float(os.environ.get("FIBATTN_LOAD_SECONDS", "20"))
CLIENTS, NEW = 64, 48
PROMPTS = [
    torch.randint(1, tiny_models.VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 3, 9, 40, 64, 65, 130, 257, 400, 700)
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, list[list[int]]]]:
    """Address and process of a server, and what it must answer to each prompt."""
    folder = tmp_path_factory.mktemp("served") / "model"
    made = tiny_models.model("bounded mixture", hidden_size=128, head_dim=32)
    made.save_pretrained(folder)
    words = {f"w{one}": one for one in range(tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [torch.tensor([one]) for one in PROMPTS]
    right = [made.generate(row, attention_mask=torch.ones_like(row), **how)[0, row.shape[1] :] for row in rows]  # pyright: ignore
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "128"]
    command += ["--kv-cache-memory-bytes", str(16 << 20), "--no-enable-prefix-caching"]
    environment = {**os.environ, "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "OMP_NUM_THREADS": "1"}
    with (folder.parent / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert server.poll() is None, (folder.parent / "log").read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(1)
        assert "layers are bounded: a request takes at most" in (folder.parent / "log").read_text()
        yield address, server.pid, [one.tolist() for one in right]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def memory(group: int) -> int:
    """MiB of the server's processes that no other process has."""
    total = 0
    for one in Path("/proc").iterdir():
        try:
            if one.name.isdigit() and os.getpgid(int(one.name)) == group:
                lines = (one / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        except (OSError, ProcessLookupError):
            continue
    return total >> 10


def metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


async def client(ask: Any, right: list[list[int]], until: float, seed: int) -> tuple[int, int]:
    """Asks until the time is over; how many answers were whole, and how many it left."""
    chance, whole, left = random.Random(seed), 0, 0
    while time.monotonic() < until:
        which, new = chance.randrange(len(PROMPTS)), chance.randint(1, NEW)
        leaves_after = chance.randint(0, new) if chance.random() < 0.5 else None
        more = {"ignore_eos": True, "return_token_ids": True}
        how: dict[str, Any] = {"model": "m", "max_tokens": new, "temperature": 0, "extra_body": more}
        stream = await ask.completions.create(prompt=PROMPTS[which], stream=True, **how)
        found: list[int] = []
        async for part in stream:
            found += part.choices[0].token_ids or []
            if leaves_after is not None and len(found) >= leaves_after:
                break
        await stream.close()
        assert found == right[which][: len(found)]
        if leaves_after is None:
            assert len(found) == new
        whole, left = whole + (leaves_after is None), left + (leaves_after is not None)
    return whole, left


async def watch(group: int, until: float, sizes: list[int]) -> None:
    """The server's memory, 24 times until then."""
    pause = (until - time.monotonic()) / 24
    while time.monotonic() < until:
        sizes.append(memory(group))
        await asyncio.sleep(pause)


def test_under_load(served: tuple[str, int, list[list[int]]]) -> None:
    address, process, right = served
    sizes: list[int] = []

    async def load() -> list[tuple[int, int]]:
        until = time.monotonic() + SECONDS
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=600) as ask:
            clients = [client(ask, right, until, one) for one in range(CLIENTS)]
            return (await asyncio.gather(watch(process, until, sizes), *clients))[1:]

    whole, left = (sum(one) for one in zip(*asyncio.run(load()), strict=True))
    print(f"{whole} whole, {left} left; MiB over time: {', '.join(map(str, sizes))}")
    assert min(whole, left) > CLIENTS / 4
    for _ in range(50):
        if metric(address, "vllm:num_requests_running") + metric(address, "vllm:num_requests_waiting") == 0:
            break
        time.sleep(0.2)
    assert metric(address, "vllm:kv_cache_usage_perc") == 0
    if SECONDS >= 600:  # allocators and caches fill for minutes
        assert sizes[-1] < 1.02 * sizes[len(sizes) // 2]
