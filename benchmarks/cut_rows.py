"""What `benchmarks context-parallel` checks, counts and times, in each process that torchrun started."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fibattn.attention import attend
from fibattn.model import FibAttnForCausalLM
from fibattn.parallel.context import ContextParallel
from fibattn.parallel.shard import Shard
from fibattn.pattern import Pattern, hybrid_layers
from fibattn.training.presets import PRESETS
from fibattn.training.run import enable_checkpointing, model_config
from fibattn.training.sharding import compile_layers

VOCABULARY = 32_768


def say(line: str) -> None:
    """Print it once."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def model_of(
    chosen: Any, layers: int | None = None, reach: int | None = None, dense: bool = False, chooses: bool = False
) -> Any:
    """A fresh model on this process's device, the same weights in all; with `chooses` all layers choose blocks."""
    recipe = PRESETS["hybrid"]
    shape = recipe.model
    if chosen.size == "1b":
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
        shape = replace(
            shape, **sizes, **hybrid_layers(24, full=(7, 15, 23), sparse="sliding_attention"), num_hidden_layers=24
        )
    if dense:
        shape, reach = replace(shape, layer_types=("full_attention",), no_rope_layers=(1,)), None
    if chooses:
        blocks: Any = {"layer_types": ("chosen_attention",), "no_rope_layers": (1,), "window": 31, "kv_convolution": 4}
        shape, reach = replace(shape, **blocks), None
    if layers is not None:
        shape = replace(shape, num_hidden_layers=layers)
    config = model_config(replace(recipe, model=shape), VOCABULARY, 0)
    config.full_reach = reach
    config.zero_init_outputs = False  # or attention would have no gradients to check
    torch.manual_seed(0)
    with device():
        model = FibAttnForCausalLM(config).train()
    if chosen.checkpointing:
        enable_checkpointing(model)
    return model


def everyone() -> Any:
    """The group of all processes."""
    return dist.group.WORLD


def device() -> Any:
    """This process's."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def row(tokens: int, packed: bool = False) -> dict[str, Any]:
    """A random row and its targets, the same in all processes; `packed`: of documents of many lengths."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(VOCABULARY, (1, tokens + 1), generator=generator)
    given = {"input_ids": drawn[:, :-1].contiguous(), "shift_labels": drawn[:, 1:].contiguous()}
    given["position_ids"] = torch.arange(tokens)[None]
    if packed:
        ends = torch.randint(1, tokens, (12,), generator=generator).sort().values.tolist()
        lengths = [b - a for a, b in itertools.pairwise([0, *ends, tokens])]
        given["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return {name: x.to(device()) for name, x in given.items()}


@contextmanager
def narrow(on: bool) -> Iterator[None]:
    """Autocast to bf16 on a GPU; on a CPU, where it is only tried out, everything stays float32."""
    with torch.autocast("cuda", torch.bfloat16, enabled=on and torch.cuda.is_available()):
        yield


def gradients(model: Any, given: dict[str, Any], cutter: Any = None, bf16: bool = True) -> tuple[float, Any]:
    """Loss and gradients (one tensor, float32) of a row; with a `cutter` of a cut one, averaged over processes."""
    model.zero_grad(set_to_none=True)
    given = {name: x.clone() for name, x in given.items()}
    inside = cutter.cut(list(given.values()), [1] * len(given)) if cutter else nullcontext()
    with inside:
        with narrow(bf16):
            loss = model(**given, use_cache=False).loss
        loss.backward()
    grads: list[Any] = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([(x.full_tensor() if isinstance(x, DTensor) else x).flatten().float() for x in grads])
    loss = loss.detach().float()
    if cutter:
        for x in (loss,) if isinstance(grads[0], DTensor) else (flat, loss):  # sharded ones are averaged already
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return float(loss), flat


def shard_weights(model: Any) -> None:
    """Cut the weights over all processes in the groups that accelerate makes, gathered in bf16 on GPUs."""
    gathered = torch.bfloat16 if torch.cuda.is_available() else None
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    last = [model.model.norm, model.model.embed_tokens, model.lm_head]
    for module in (*model.model.layers, last, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not last)


def check(chosen: Any) -> list[dict[str, Any]]:
    """Errors of the gradients of a cut row, and of a whole one in as many bits, against a whole one in float32."""
    rows, compiled = [], ", compiled" if chosen.compile else ""
    for name, reach, packed, compiles, sharded in (
        ("bounded", chosen.full_reach, False, False, False),
        ("bounded, packed", chosen.full_reach, True, False, False),
        ("full", None, True, False, False),
        (f"bounded, packed{compiled}", chosen.full_reach, True, chosen.compile, False),
        (f"bounded, packed{compiled}, weights sharded", chosen.full_reach, True, chosen.compile, True),
        ("chosen blocks, packed", None, True, False, False),
    ):
        model = model_of(chosen, 8, reach, chooses="chosen" in name)
        given = row(chosen.check_tokens, packed)
        right_loss, right = gradients(model, given, bf16=False)
        whole_loss, whole = gradients(model, given)
        cutter = ContextParallel(model, everyone())
        if sharded:
            shard_weights(model)
        if compiles:
            compile_layers(model)
        cut_loss, cut = gradients(model, given, cutter)
        errors = [float((x - right).norm() / right.norm()) for x in (whole, cut)]
        limit = max(2 * errors[0], 1e-5)
        rows.append({"case": name, "whole": errors[0], "cut": errors[1], "right": errors[1] <= limit})
        losses = f"loss {right_loss:.6f} in float32, {whole_loss:.6f} whole, {cut_loss:.6f} cut"
        verdict = "ok" if errors[1] <= limit else "WRONG"
        say(f"{name}: gradients off by {errors[0]:.2e} whole, {errors[1]:.2e} cut, {verdict}; {losses}")
        del model, right, whole, cut
    return rows


class Bytes(TorchDispatchMode):
    """Counts what this process sends to others while it is on, forward and backward."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at each operation."""
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            self.count += args[0].nbytes
        return function(*args, **(kwargs or {}))


def count(chosen: Any) -> list[dict[str, Any]]:
    """Bytes that each process sends in a layer, forward and backward, and its time beside that without messages."""
    shard, ranks = Shard.of(everyone()), dist.get_world_size()
    config = model_of(chosen).config
    layers = {config.layer_reach(layer): layer for layer in range(config.num_hidden_layers)}
    reaches: list[Any] = sorted(reach for reach in layers if reach is not None)
    rows = []
    for reach, length in itertools.product(dict.fromkeys((reaches[0], reaches[-1], chosen.full_reach)), chosen.lengths):
        pattern = config.layer_patterns(layers[reach]) if reach in layers else (Pattern(reach),)
        sent, times = of_layer(shard, pattern, config, length // ranks)
        most = torch.tensor([sent], device=device())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        rows.append({"reach": reach, "tokens": length, "bytes": int(most), "ms": times[0], "ms_alone": times[1]})
        told = f"a process sends at most {int(most):,} bytes; {times[0]:.3f} ms, {times[1]:.3f} without messages"
        say(f"reach {reach:,}, a row of {length:,} tokens: {told}")
    return rows


def of_layer(shard: Shard, pattern: Any, config: Any, tokens: int) -> tuple[int, list[float]]:
    """Bytes sent and milliseconds, with messages and without, of attention to a pattern, forward and backward."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    shapes = [(1, tokens, one, config.head_dim) for one in heads]
    given = [torch.randn(shape, device=device(), dtype=dtype, requires_grad=True) for shape in shapes]
    grad = torch.randn_like(given[0])
    attends: Any = (shard.attend, attend)
    ways = [lambda way=way: way(*given, pattern).backward(grad) for way in attends]
    with Bytes() as sent:
        ways[0]()
    return sent.count, [clocked(way) for way in ways]


def scale(chosen: Any) -> list[dict[str, Any]]:
    """Tokens a second and process in whole training steps, of a whole row in each process and of one over all."""
    rows: list[dict[str, Any]] = []
    for cut in (False, True) if chosen.alone else (True,):
        length = chosen.tokens * (dist.get_world_size() if cut else 1)
        step = Step(chosen, cut, row(length))
        seconds = clocked(step, chosen.steps) / 1000
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        rows.append({"cut": cut, "tokens": length, "seconds": seconds, "speed": chosen.tokens / seconds, "peak": peak})
        part = f", {rows[-1]['speed'] / rows[0]['speed']:.1%} of alone" if len(rows) > 1 else ""
        model = f"{chosen.size}, dense" if chosen.dense else chosen.size
        what = f"{model}, a row of {length:,} tokens {'over all' if cut else 'in each'}"
        part += f", peak {peak:.1f} GiB" if peak is not None else ""
        say(f"{what}: {seconds:.3f} s, {rows[-1]['speed'] / 1e3:.1f} k tokens/s a process{part}")
        del step
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


class Step:
    """A training step of a fresh model with AdamW: whole weights in each process, gradients averaged where `cut`."""

    def __init__(self, chosen: Any, cut: bool, given: dict[str, Any]):
        self.model, self.given = model_of(chosen, reach=chosen.full_reach, dense=chosen.dense), given
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.cutter = ContextParallel(self.model, everyone()) if cut else None
        if chosen.compile:
            compile_layers(self.model)

    def __call__(self) -> None:
        """Forward, backward, update."""
        inputs = {name: x.clone() for name, x in self.given.items()}
        with self.cutter.cut(list(inputs.values()), [1] * len(inputs)) if self.cutter else nullcontext():
            with narrow(True):
                loss = self.model(**inputs, use_cache=False).loss
            loss.backward()
        if self.cutter:
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()  # pyright: ignore
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def clocked(work: Callable[[], object], runs: int = 10) -> float:
    """Median milliseconds of work, after two runs that warm up; the processes begin together."""
    times = []
    for turn in range(runs + 2):
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn > 1:
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)
