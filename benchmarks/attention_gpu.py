"""Time the attention kernels on an NVIDIA GPU, one by one and together, against dense attention.

    PYTHONPATH=src python benchmarks/attention_gpu.py table        # the issue's table
    PYTHONPATH=src python benchmarks/attention_gpu.py sweep        # tile sizes of every kernel

Times are medians over repeated runs, in microseconds, by events on the GPU with the L2 cache flushed
between runs. "floor" is q, k, v and the output once over the copy bandwidth measured by the same script.
"""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fibattn.attention import attend, attend_scaled
from fibattn.attention.triton import backward, forward, offset_table
from fibattn.pattern import Pattern, base_rungs

FORWARD = importlib.import_module("fibattn.attention.triton.forward")
BACKWARD = importlib.import_module("fibattn.attention.triton.backward")
SHAPES = {"small": (8, 2, 64), "large": (32, 8, 128)}


def microseconds(work: Callable[[], object], rep: int = 60) -> float:
    return 1000 * triton.testing.do_bench(work, warmup=10, rep=rep, return_mode="median")


def tensors(batch: int, tokens: int, shape: str) -> list[torch.Tensor]:
    heads, kv_heads, size = SHAPES[shape]
    return [
        torch.randn(batch, tokens, h, size, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
    ]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    source = torch.empty(2**30, device="cuda", dtype=torch.int32).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source)) * 1e6


def backward_time(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], rep: int = 60) -> float:
    """Forward and backward together."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(function(*inputs))

    def work() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad)

    return microseconds(work, rep)


def dense(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def flex(pattern: Pattern, tokens: int) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, offsets = pattern.window, pattern.offsets

    def allowed(b, h, i, j):  # noqa: ANN001, ANN202
        distance = i - j
        kept = (distance >= 0) & (distance <= window)
        for offset in offsets:
            kept = kept | (distance == offset)
        return kept

    mask = torch.compile(create_block_mask)(allowed, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def parts(inputs: list[torch.Tensor], pattern: Pattern) -> dict[str, Callable[[], object]]:
    """Each kernel by itself: the forward, and the backward's two."""
    q, k, v = inputs
    table = offset_table((pattern.offsets,), q.device)
    scale = q.shape[-1] ** -0.5
    out, lse = forward(q, k, v, None, scale, pattern.window, table)
    grad = torch.randn_like(out)
    return {
        "forward": lambda: forward(q, k, v, None, scale, pattern.window, table),
        "backward": lambda: backward(grad, None, out, lse, q, k, v, None, scale, pattern.window, table),
    }


class Only:
    """A kernel's stand-in that launches it, or not."""

    def __init__(self, kernel: object, run: bool):
        self.kernel, self.run = kernel, run

    def __getitem__(self, grid: object) -> Callable[..., object]:
        return self.kernel[grid] if self.run else lambda *args, **options: None


def kernel_times(
    inputs: list[torch.Tensor], pattern: Pattern, which: tuple[str, ...] = ("fwd", "dq", "dkv")
) -> dict[str, float]:
    works = parts(inputs, pattern)
    times = {}
    if "fwd" in which:
        times["fwd"] = microseconds(works["forward"])
    query, key = BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel
    for name, runs in (("dq", (True, False)), ("dkv", (False, True))):
        if name in which:
            BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel = Only(query, runs[0]), Only(key, runs[1])
            times[name] = microseconds(works["backward"])
    BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel = query, key
    return times


SPACE = {
    "fwd": [
        {"block": block, "near": max(2 * block, 32), "rungs": rungs, "warps": warps, "stages": stages}
        for block, warps in ((16, 4), (16, 2), (8, 2), (8, 1), (4, 1), (32, 4))
        for rungs in (4, 8)
        for stages in (1, 2)
    ],
    "dkv": [
        {"block": block, "near": near, "warps": warps}
        for block in (16, 32, 64, 128)
        for near in (32, 64)
        for warps in (2, 4, 8)
    ],
}
SPACE["dq"] = SPACE["fwd"]
HEURISTIC = {"fwd": (FORWARD, "tiles_for"), "dq": (BACKWARD, "query_tiles_for"), "dkv": (BACKWARD, "key_tiles_for")}


def sweep(arguments: argparse.Namespace) -> None:
    """Times of one kernel for every tile configuration."""
    for shape, tokens in (("small", 1024), ("large", 8192)):
        if shape not in arguments.shapes:
            continue
        inputs = tensors((32768 if shape == "small" else 16384) // tokens, tokens, shape)
        for window, kernel in itertools.product(arguments.windows, arguments.kernels):
            pattern = Pattern.fibonacci(window=window)
            room, name = HEURISTIC[kernel]
            standard = getattr(room, name)
            rows = []
            for change in SPACE[kernel]:
                setattr(room, name, lambda s, change=change: replace(standard(s), **change))
                try:
                    rows.append((kernel_times(inputs, pattern, (kernel,))[kernel], change))
                except Exception as error:  # noqa: BLE001
                    rows.append((float("inf"), {**change, "error": str(error)[:60]}))
            setattr(room, name, standard)
            rows.sort(key=lambda row: row[0])
            print(f"{shape} W={window} {kernel} {tokens}")
            for time, change in [*rows[: arguments.top], *[row for row in rows if row[0] == float("inf")]]:
                print(f"   {time:8.1f}  {change}")
            sys.stdout.flush()


def table(arguments: argparse.Namespace) -> None:
    """The comparison the issue asks for."""
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"copy {bandwidth / 1e12:.2f} TB/s"
    )
    results = []
    cases = [("small", 32768, t) for t in (1024, 4096, 16384, 32768)]
    cases += [("large", 16384, 8192), ("large", 32768, 32768), ("large", 131072, 131072)]
    cases += [("small", 1048576, 1024), ("small", 1048576, 65536), ("small", 1048576, 1048576)]
    for shape, total, tokens in cases:
        inputs = tensors(total // tokens, tokens, shape)
        floor = (2 * inputs[0].nbytes + inputs[1].nbytes + inputs[2].nbytes) / bandwidth * 1e6
        for window in (12, 128):
            pattern = Pattern.fibonacci(window=window)
            row = {"shape": shape, "tokens": tokens, "total": total, "window": window, "floor": floor}
            row.update(kernel_times(inputs, pattern))
            row["fwd+bwd"] = backward_time(lambda q, k, v, p=pattern: attend(q, k, v, p), inputs)
            if total <= 2**17:
                alpha = torch.tensor(1.0, device="cuda")
                rungs = base_rungs("fibonacci")
                row["learned fwd"] = microseconds(lambda: attend_scaled(*inputs, window, rungs, alpha))
                row["learned fwd+bwd"] = backward_time(
                    lambda q, k, v, a, w=window: attend_scaled(q, k, v, w, rungs, a), [*inputs, alpha]
                )
            if window == 12 and tokens <= arguments.dense_up_to:
                for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                    row[f"{name} fwd"] = microseconds(lambda b=backend: dense(b)(*inputs))
                    if tokens <= 32768:
                        row[f"{name} fwd+bwd"] = backward_time(dense(backend), inputs)
            if window == 12 and arguments.flex and total <= 2**17:
                run = flex(pattern, tokens)
                row["flex fwd"] = microseconds(lambda run=run: run(*inputs))
                row["flex fwd+bwd"] = backward_time(run, inputs)
            results.append(row)
            print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump(results, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("sweep")
    one.add_argument("--kernels", nargs="+", default=["fwd", "dq", "dkv"])
    one.add_argument("--windows", nargs="+", type=int, default=[12])
    one.add_argument("--shapes", nargs="+", default=["small", "large"])
    one.add_argument("--top", type=int, default=6)
    one.set_defaults(run=sweep)
    one = verbs.add_parser("table")
    one.add_argument("--dense-up-to", type=int, default=32768)
    one.add_argument("--flex", action="store_true")
    one.add_argument("--json")
    one.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
