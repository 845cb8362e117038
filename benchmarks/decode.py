"""Time decoding on an NVIDIA GPU over the length of the context, and against the same dense model.

    PYTHONPATH=src python benchmarks/decode.py [--json FILE] [--batch 64] [--contexts 32768 ...]

Three tables: the operator alone and the paper's 60 M-parameter model at growing contexts (the aim: the same time
at all of them), and the decoding of 64 sequences at 32,768 tokens of context, sparse, hybrid and dense (the aim:
at least 5 times the dense model's tokens a second). Time and memory over the context, dense beside sparse:
`--batch 1 --contexts 1024 4096 16384 65536 262144 1048576`. Models are bfloat16, compiled whole, their step captured in
a CUDA graph; the dense one has a static cache. No prompt is run: caches are filled with random keys and values,
which a step reads as it would read real ones.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import triton
from decode_models import MODELS
from transformers import StaticCache

from fibattn import FibAttnForCausalLM, Pattern, attend_cached

CONTEXTS = (1024, 4096, 16384, 65536, 262144, 1048576)


def microseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The median of seven groups of repeats, by events on the GPU."""
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / repeats)
    return statistics.median(times)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def operator(batch: int, window: int) -> list[dict[str, object]]:
    """Time of one step of `attend_cached` at every context; a hundred steps are captured together."""
    pattern, steps = Pattern.fibonacci(window=window), 100
    q = torch.randn(batch, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 1, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rings = torch.randn(2, batch, pattern.reach + 1, 2, 64, device="cuda", dtype=torch.bfloat16)
    at = torch.zeros(1, 1, device="cuda", dtype=torch.int64)

    def work() -> None:
        for _ in range(steps):
            attend_cached(q, rings[0], rings[1], k, v, pattern, cache_positions=at)
            at.add_(1)

    replay, rows = captured(work), []
    for context in CONTEXTS:
        at.fill_(context)
        rows.append({"batch": batch, "window": window, "context": context, "us": microseconds(replay, 5) / steps})
    return rows


class Decoder:
    """A model, a static cache with `context` random tokens, and the captured step that draws the next ones."""

    def __init__(self, name: str, batch: int, room: int):
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.batch = batch
        model = FibAttnForCausalLM(MODELS[name]).to("cuda", torch.bfloat16).eval()
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        model(self.token, past_key_values=self.cache, use_cache=True)
        step = torch.compile(model.forward, fullgraph=True)

        def work() -> None:
            logits = step(self.token, past_key_values=self.cache, use_cache=True).logits
            self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

        self.step = captured(work)

    def fill(self, context: int) -> None:
        """Random keys and values, as if `context` tokens had gone by."""
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)

    def time(self, context: int) -> float:
        """Microseconds of a step at `context` tokens."""
        self.fill(context)
        return microseconds(self.step)

    def cache_bytes(self) -> int:
        """Of all layers and sequences."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def cache_rows(self) -> int:
        """Of all layers, for one sequence."""
        return sum(layer.keys.shape[2] for layer in self.cache.layers)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    source = torch.empty(2**30, device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source), 5) * 1e6


def flatness(rows: list[dict[str, object]]) -> str:
    """How far the times of all contexts lie from the shortest context's."""
    first = float(rows[0]["us"])  # pyright: ignore
    worst = max(abs(float(row["us"]) / first - 1) for row in rows)  # pyright: ignore
    return f"within {100 * worst:.1f} % of the time at {rows[0]['context']:,}"


def show_contexts(title: str, rows: list[dict[str, object]]) -> None:
    times = "  ".join(f"{row['context']:,}: {row['us']:.1f}" for row in rows)
    print(f"{title}, µs a token at a context of  {times}   {flatness(rows)}", flush=True)


def batches(context: int, batch: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    bandwidth = copy_bandwidth()
    for name in MODELS:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        decoder = Decoder(name, batch, context + 1024)
        us = decoder.time(context)
        cache = decoder.cache_bytes()
        peak = torch.cuda.max_memory_allocated()
        rows.append(
            {
                "model": name,
                "context": context,
                "batch": batch,
                "us": us,
                "tokens_per_second": batch / us * 1e6,
                "cache_bytes": cache,
                "cache_rows": decoder.cache_rows(),
                "peak_bytes": peak,
                "cache_read_floor_us": cache / bandwidth * 1e6,
            }
        )
        del decoder
    dense = float(rows[-1]["tokens_per_second"])  # pyright: ignore
    for row in rows:
        row["times_dense"] = float(row["tokens_per_second"]) / dense  # pyright: ignore
        print(
            f"{row['model']}, {context:,} tokens: {row['us']:.0f} µs a step of {batch}, "
            f"{row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['times_dense']:.1f} times dense; cache {row['cache_bytes'] / 2**20:,.0f} MiB "
            f"({row['cache_rows']:,} rows a sequence; to read it once takes {row['cache_read_floor_us']:.0f} µs), "
            f"peak {row['peak_bytes'] / 2**20:,.0f} MiB",
            flush=True,
        )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768])
    arguments = parser.parse_args()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; caches are filled with random states, no prompt is run")
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "versions": versions}
    result["operator"] = []
    for batch, window in ((1, 12), (64, 12), (1, 128), (64, 128)):
        rows = operator(batch, window)
        result["operator"] += rows  # pyright: ignore
        show_contexts(f"operator, batch {batch}, W={window}", rows)
    decoder = Decoder("linear stagger, W = 12", 1, 1)
    rows = [{"context": context, "us": decoder.time(context)} for context in CONTEXTS]
    result["model"] = rows
    show_contexts(f"60 M model, batch 1, {decoder.cache_rows():,} rows of cache", rows)
    del decoder
    result["batches"] = [row for context in arguments.contexts for row in batches(context, arguments.batch)]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
