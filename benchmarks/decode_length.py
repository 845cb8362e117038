"""Time and memory of a decoded token over the length of its context, sparse, hybrid and dense, on any device.

    PYTHONPATH=src python benchmarks/decode_length.py --figure docs/figures/decode-cpu.svg

One sequence of the paper's 60 M-parameter model with a static cache, a token at a time, as it is, neither compiled nor
captured: float32 on a CPU, bfloat16 on a GPU. No prompt is run: caches are filled with random keys and values, which a
step reads as it would read real ones. `decode.py` measures the compiled steps of a GPU.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from decode_models import MODELS
from matplotlib import pyplot as plt
from transformers import StaticCache

from fibattn import FibAttnForCausalLM, plotting

Row = tuple[str, int, float, float]


def measure(name: str, context: int, device: str, repeats: int) -> Row:
    """Milliseconds a token, the median, and MiB of cache, with `context` tokens in it."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = FibAttnForCausalLM(MODELS[name]).to(device, dtype).eval()
    cache = StaticCache(config=model.config, max_cache_len=context + 3 * repeats)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.uniform_(-1, 1)
        layer.values.uniform_(-1, 1)
        layer.cumulative_length.fill_(context)
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**20
    return name, context, statistics.median(times[2:]), size


def draw(rows: list[Row], path: Path) -> None:
    """Both over context, axes logarithmic."""
    with plt.rc_context(plotting.STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
        for name, colour in zip(MODELS, plotting.COLOURS, strict=False):
            mine = [row for row in rows if row[0] == name]
            for axes, column in zip(panels, (2, 3), strict=True):
                axes.plot([row[1] for row in mine], [row[column] for row in mine], "o-", color=colour, label=name)
        for axes, label in zip(panels, ("milliseconds a token", "MiB of cache"), strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            contexts = sorted({row[1] for row in rows})
            axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
            axes.set_xlabel("context (tokens, k = 1,024)")
            axes.set_ylabel(label)
        panels[0].legend(frameon=False)
        plotting.save(figure, path, ("model", "context", "ms", "cache_mib"), rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, Python {platform.python_version()}, torch {torch.__version__}, {transformers.__version__=}")
    rows = []
    for context in arguments.contexts:
        for name in MODELS:
            rows.append(measure(name, context, device, arguments.repeats))
            print(
                f"{context:>9,}  {name:<24}{rows[-1][2]:>10.1f} ms a token {rows[-1][3]:>10.1f} MiB of cache",
                flush=True,
            )
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
