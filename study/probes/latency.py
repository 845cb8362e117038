"""How long a forward pass takes: static offsets, learned scales, the hybrid and dense attention, the rest equal.

The paper's learned models cost five times the inference time because their gather is not fused; here they go
through the same kernels as the static ones.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fibattn.errors import InputError
from fibattn.machine import device_name
from fibattn.model import FibAttnConfig, FibAttnForCausalLM
from fibattn.pattern import hybrid_layers
from fibattn.progress import Meter
from fibattn.training.presets import DEFAULT, PRESETS
from study.probes.fit import device
from study.probes.settings import Latency


def models(**shape: Any) -> dict[str, FibAttnConfig]:
    """What is compared, at the paper's shape unless `shape` changes fields of the configuration.

    `static` and `learned` have a window of 12; the hybrid has the finished default recipe's attention, its full
    layers in the middle and at the end.
    """
    default = PRESETS[DEFAULT]
    layers = shape.get("num_hidden_layers", FibAttnConfig.num_hidden_layers)
    hybrid = hybrid_layers(layers, (layers // 2 - 1, layers - 1), sparse=default.model.layer_types[0])
    return {
        "static": FibAttnConfig(schedule="linear", **shape),
        "learned": FibAttnConfig(schedule="learned", **shape),
        "hybrid": FibAttnConfig(
            window=default.model.window,
            full_reach=default.full_reach,
            max_offset=default.resolved().model.max_offset,  # pyright: ignore[reportArgumentType]
            layer_types=list(hybrid["layer_types"]),
            no_rope_layers=list(hybrid["no_rope_layers"]),
            **shape,
        ),
        "dense": FibAttnConfig(layer_types=["full_attention"] * layers, **shape),
    }


def time_calls(call: Callable[[], Any], *, warmup: int, repeats: int) -> list[float]:
    """The seconds that each of `repeats` calls takes after `warmup` more; a GPU has finished when a call ends."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        call()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return taken


@torch.inference_mode()
def latency(settings: Latency, configs: dict[str, FibAttnConfig] | None = None) -> dict[str, Any]:
    """The time of a forward pass with random weights; the result is plain JSON values.

    A pass computes all hidden states and the logits of the last token, as the reading of a prompt does. bfloat16
    weights on a GPU, float32 on the CPU. The batch at a length is as many sequences as `tokens` holds, at least one:
    8 x 1024 comes first.

    `configs` is what is timed, by name; `models()` when None.

    Raises:
        InputError: for a length, or another number, below 1.
    """
    lengths, tokens, warmup, repeats = settings.lengths, settings.tokens, settings.warmup, settings.repeats
    if min(min(lengths, default=0), tokens, repeats) < 1 or warmup < 0:
        raise InputError(
            f"lengths {list(lengths)}, tokens {tokens}, repeats {repeats}: each must be at least 1; warmup is {warmup}"
        )
    where = device()
    rows = []
    configs = models() if configs is None else configs
    with Meter("latency", len(configs) * len(lengths), "cases") as meter:
        for name, config in configs.items():
            torch.manual_seed(0)
            model: Any = FibAttnForCausalLM(config).eval().to(where)  # pyright: ignore[reportArgumentType]
            if where.type == "cuda":
                model = model.to(torch.bfloat16)
            if settings.compiled:
                model = torch.compile(model)
            for length in lengths:
                batch = max(1, tokens // length)
                ids = torch.randint(config.vocab_size, (batch, length)).to(where)
                taken = time_calls(
                    lambda model=model, ids=ids: model(input_ids=ids, use_cache=False, logits_to_keep=1),
                    warmup=warmup,
                    repeats=repeats,
                )
                rows.append({"model": name, "batch": batch, "length": length, **_summary(taken, batch * length)})
                meter.update(1, f"{name} {batch} x {length}: {rows[-1]['median_ms']:.2f} ms")
    return {
        "probe": "latency",
        "device": device_name(),
        "dtype": "bfloat16" if where.type == "cuda" else "float32",
        "torch": torch.__version__,
        "compiled": settings.compiled,
        "warmup": warmup,
        "repeats": repeats,
        "rows": rows,
    }


def _summary(seconds: list[float], tokens: int) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median_ms": 1e3 * median,
        "quartile_low_ms": 1e3 * low,
        "quartile_high_ms": 1e3 * high,
        "tokens_per_second": tokens / median,
    }
