"""Decoders and the operator's decoding step, timed over the length of the context.

No prompt is run: caches are filled with random keys and values, which a step reads as it would read real ones.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
from transformers import StaticCache

from benchmarks.timing import copy_bandwidth, measure
from fibattn import FibAttnConfig, FibAttnForCausalLM, Pattern, attend_cached, plotting
from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.recipe import Recipe
from fibattn.training.run import model_config

MODELS = ("stagger", "hybrid", "hybrid-unbounded", "converted", "converted-wide", "converted-unbounded", "dense")
"""Of the paper's 60 M-parameter shape: its linear stagger, the default recipe, the dense one converted with four of its
16 layers full, or so with windows of 257 keys, two before they are bounded, dense."""
WINDOWS = (12, 128)
"""Of the operator by itself."""
_ROOM = 256  # for the steps that are timed

Row = dict[str, Any]


def operator(contexts: Sequence[int], batch: int, device: str) -> Iterator[Row]:
    """Microseconds of a step of `attend_cached`, the mean of many in a row, at every context."""
    steps = 20 if device == "cuda" else 10  # few, or launches take so long that no graph is captured
    options: dict[str, Any] = {"device": device, "dtype": _dtype(device)}
    q = torch.randn(batch, 1, 8, 64, **options)
    k, v = (torch.randn(batch, 1, 2, 64, **options) for _ in range(2))
    at = torch.zeros(1, 1, device=device, dtype=torch.int64)
    for window in WINDOWS:
        pattern = Pattern.fibonacci(window)
        rings = torch.randn(2, batch, pattern.reach + 1, 2, 64, **options)

        def work(pattern: Pattern = pattern, rings: torch.Tensor = rings) -> None:
            for _ in range(steps):
                attend_cached(q, rings[0], rings[1], k, v, pattern, cache_positions=at)
                at.add_(1)

        for context in contexts:
            at.fill_(context)
            with torch.no_grad():
                median = measure(work, device, cold=False).median / steps
            yield {"window": window, "batch": batch, "context": context, "median": median}


def models(names: Sequence[str], contexts: Sequence[int], batch: int, device: str) -> Iterator[Row]:
    """A row for every model and context: microseconds of a step, tokens a second, the cache and the peak memory.

    Where the GPU has too little memory the row has no times.
    """
    bandwidth, known = bandwidth_of(device), configurations()
    for name in names:
        config = known[name]
        bounded = all(config.layer_reach(layer) is not None for layer in range(config.num_hidden_layers))
        decoder: Decoder | None = None
        for context in contexts:
            row: Row = {"model": name, "context": context, "batch": batch, "median": None}
            try:
                if decoder is None or not bounded:
                    decoder = None
                    clear(device)
                    decoder = Decoder(config, batch, contexts[-1] if bounded else context, device)
                row |= decoder.time(context)
                row |= {"cache_bytes": decoder.cache_bytes, "cache_rows": decoder.cache_rows}
                row["least_us"] = least_bytes(decoder.model, context, batch) / bandwidth * 1e6
                row["tokens_per_second"] = batch / row["median"] * 1e6
                row["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
            except torch.OutOfMemoryError:
                decoder = None
            yield row


def prompts(names: Sequence[str], lengths: Sequence[int], device: str) -> Iterator[Row]:
    """Microseconds until the logits after a prompt, for every model and length; not compiled."""
    for name in names if lengths else ():
        clear(device)
        model: Any = FibAttnForCausalLM(configurations()[name]).to(device, _dtype(device)).eval()  # pyright: ignore
        for length in lengths:
            ids = torch.randint(model.config.vocab_size, (1, length), device=device)

            @torch.no_grad()
            def work(model: Any = model, ids: torch.Tensor = ids) -> None:
                model(ids, logits_to_keep=1, use_cache=True)

            yield {"model": name, "prompt": length, **asdict(measure(work, device, cold=False, capture=False))}


def clear(device: str) -> None:
    """Give back the memory of the model before, and begin to measure the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def least_bytes(model: Any, context: int, batch: int) -> int:
    """What a step must read: the weights, and the keys and values that each token attends to."""
    config, rows = model.config, 0
    heads, size = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        patterns = config.layer_patterns(layer)
        if patterns is None:
            rows += (context + 1) * heads
        else:
            seen = [sum(distance <= context for distance in pattern.distances) for pattern in patterns]
            rows += sum(seen) * heads // len(seen)
    # Of the embedding a row is read; tied, all of it is the head.
    untied = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    weights = sum(one.nbytes for one in model.parameters()) - untied
    return weights + batch * rows * 2 * size * model.dtype.itemsize


@functools.cache
def bandwidth_of(device: str) -> float:
    """`copy_bandwidth`, measured once; it takes 8 GB, so before anything whose peak is."""
    return copy_bandwidth(device)


def configurations() -> dict[str, FibAttnConfig]:
    """The models' configurations, by name."""
    default, dense = PRESETS[DEFAULT], PRESETS["dense"]

    def converted(window: int, sparse: LayerType) -> Recipe:
        kinds: Any = hybrid_layers(16, full=(9, 10, 11, 12), sparse=sparse)["layer_types"]
        return replace(dense, model=replace(dense.model, layer_types=kinds, window=window))

    narrow, wide = converted(64, "fibonacci_attention"), converted(256, "sliding_attention")
    recipes = (PRESETS["paper"], default, default, narrow, wide, narrow, dense)
    found = [model_config(recipe, FibAttnConfig.vocab_size, separator=0) for recipe in recipes]
    for bounded in (1, 3, 4):
        found[bounded].full_reach = default.full_reach
    return dict(zip(MODELS, found, strict=True))


class Decoder:
    """A model with random weights, a static cache, and the step that draws the next tokens."""

    def __init__(self, config: FibAttnConfig, batch: int, context: int, device: str):
        torch.manual_seed(0)
        self.device = device
        model: Any = FibAttnForCausalLM(config).to(device, _dtype(device)).eval()  # pyright: ignore
        cache = StaticCache(config=config, max_cache_len=context + _ROOM)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        self.layers: list[Any] = list(cache.layers)
        self.model = model
        step: Callable[..., Any] = model.forward
        if device == "cuda":
            torch.compiler.reset()  # or the eighth model would meet the limit on recompilations
            step = torch.compile(model.forward, fullgraph=True)

        @torch.no_grad()
        def work() -> None:
            logits = step(token, past_key_values=cache, use_cache=True).logits
            token.copy_(logits[:, -1].argmax(-1, keepdim=True))

        self.work = work

    def time(self, context: int) -> Row:
        """Microseconds of a step with random keys and values in the cache, as if `context` tokens had gone by."""
        for layer in self.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        return asdict(measure(self.work, self.device, cold=False))

    @property
    def cache_bytes(self) -> int:
        """Of all layers and sequences."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def cache_rows(self) -> int:
        """Of all layers, for one sequence."""
        return sum(layer.keys.shape[2] for layer in self.layers)


def line_of(row: Row) -> str:
    """A row of a model in words."""
    what = f"{row['model']}, {row['context']:,} tokens, {row['batch']} at once"
    if row["median"] is None:
        return f"{what}: does not fit into the memory of this GPU"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**20:,.0f} MiB"
    return (
        f"{what}: {row['median'] / 1000:.3f} ms a step, {row['tokens_per_second']:,.0f} tokens/s; reading what it "
        f"must would take {row['least_us'] / 1000:.3f} ms; cache {row['cache_bytes'] / 2**20:,.0f} MiB "
        f"({row['cache_rows']:,} rows a sequence){peak}"
    )


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Time and cache over context, axes logarithmic; SVG and PNG, and the CSV beside them. Of rows of one batch."""
    columns = (("ms", "milliseconds a step"), ("cache_mib", "MiB of cache"))
    timed = [row for row in rows if row["median"] is not None]
    points = [(row["model"], row["context"], row["median"] / 1e3, row["cache_bytes"] / 2**20) for row in timed]
    contexts = sorted({row["context"] for row in timed})
    with plt.rc_context(plotting.STYLE):
        figure, panels = plt.subplots(2, figsize=(5.4, 6.4), layout="constrained")
        for name in dict.fromkeys(point[0] for point in points):
            kind, _, unbounded = name.partition("-")
            look = {"color": plotting.COLOURS[kind], "linestyle": "--" if unbounded else "-"}
            own = [point for point in points if point[0] == name]
            for index, axes in enumerate(panels):
                xs, ys = [point[1] for point in own], [point[2 + index] for point in own]
                axes.plot(xs, ys, marker="o", **look, label=name.replace("-", ", "))
        for axes, (_, label) in zip(panels, columns, strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(plotting.plain)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
            axes.set_ylabel(label)
        panels[-1].set_xlabel("context (tokens, k = 1,024)")
        panels[0].legend(frameon=False)
        return plotting.save(figure, path, ("model", "context", *(name for name, _ in columns)), points)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32
