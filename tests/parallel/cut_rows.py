"""Run by torchrun, four processes: models on cut rows against the same on whole ones; a line of JSON for each."""

import json
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import foreign_decoders
import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from fibattn import InputError, convert
from fibattn.model.cache import CACHE_NAME
from fibattn.model.feed_forward import is_plain
from fibattn.parallel.context import ContextParallel
from fibattn.parallel.prefill import prefill
from fibattn.training.sharding import compile_layers

OWN = ("linear", "learned", "sliding", "mixture", "learned mixture", "bounded mixture", "modern")
MODELS: dict[str, Callable[[], Any]] = {
    **{kind: partial(tiny_models.model, kind) for kind in OWN},
    "rungs by head": partial(tiny_models.model, "linear", stagger_heads=True),
    "ten layers": partial(tiny_models.model, "linear", num_hidden_layers=10),
    "reach beyond the row": partial(tiny_models.model, "linear", rungs=14),
    "chosen": partial(tiny_models.model, "chosen"),
    "chosen, rotated": partial(tiny_models.model, "chosen, rotated"),
    "chosen near": partial(tiny_models.model, "chosen", window=3, block_reach=22, block_anchor=True),
    **{
        f"converted {kind}": lambda kind=kind: convert(foreign_decoders.model(kind), window=3, rungs=7, keep_layers=[1])
        for kind in ("llama", "gemma3_text")
    },
    "converted to blocks": lambda: convert(foreign_decoders.model("llama"), window=3, blocks=1, keep_layers=[1]),
}
WAYS = ("checkpointing", "sharded weights")
ROWS = ("plain", "packed", "padded", "padded and packed")
READERS: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name] for name in ("learned", "bounded mixture")},
    "gemma with a sliding layer": lambda: convert(
        foreign_decoders.model("gemma3_text"), window=3, rungs=7, keep_layers=[0]
    ),
}
TOKENS = 48
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def row(kind: str) -> dict[str, Tensor]:
    """Two rows with targets; short ones are a token for each of four processes."""
    ids = torch.randint(2, 61, (2, 4 if kind == "short" else TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 20:25] = -100
    given = {"input_ids": ids}
    if "padded" in kind:
        padding = 29 if "mostly" in kind else 13  # more than the text, in more than the first part
        given["attention_mask"] = torch.ones_like(ids)
        for some in ((0, slice(0, padding)), (1, slice(-5, None))):
            given["attention_mask"][some], labels[some] = 0, -100
        labels[0, padding] = -100  # nothing predicts the first token
    if "packed" in kind:
        lengths = (4, 23, TOKENS - 27)
        given["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None].repeat(2, 1)
    return {**given, "shift_labels": functional.pad(labels[:, 1:], (0, 1), value=-100)}


def loss_of(call: Any, given: dict[str, Tensor], converted: bool, share: float) -> Tensor:
    """A process's loss; of a converted model, which computes it in float32, made of its logits."""
    if not converted:
        return call(**given, use_cache=False).loss
    inputs = {name: x for name, x in given.items() if name != "shift_labels"}
    logits = call(**inputs, use_cache=False).logits.flatten(0, 1)
    return functional.cross_entropy(logits, given["shift_labels"].flatten(), reduction="sum") * share


def errors(name: str, kind: str, group: Any, way: str = "") -> dict[str, float]:
    """How far loss and gradients of a cut row are from those of a whole one, relative to the largest."""
    model, given, ranks = MODELS[name]().double().train(), row(kind), dist.get_world_size(group)
    converted, each = name.startswith("converted"), 1 / int((given["shift_labels"] != -100).sum())
    loss = loss_of(model, given, converted, each)
    loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    cutter = ContextParallel(model, group)
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    loss_is_plain = []
    if "sharded weights" in way:
        mesh = init_device_mesh("cpu", (ranks,))
        last = [model.model.norm, model.model.embed_tokens, model.lm_head]  # together, as accelerate has them
        for module in (*model.model.layers, last, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=module is not last)
        model.register_forward_hook(lambda *_: loss_is_plain.append(is_plain(model.lm_head, torch.device("cpu"))))
    if "compiled layers" in way:
        torch.compiler.reset()
        counters.clear()
        compile_layers(model, "aot_eager")
    call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    cut = {name: x.clone() for name, x in given.items()}
    with cutter.cut(list(cut.values()), [1] * len(cut)):
        part = loss_of(call, cut, converted, each * ranks)
        part.backward()
    assert all(torch.equal(cut[name], given[name]) for name in given)
    mean = averaged(part.detach(), group)
    if loss_is_plain:  # or it would hold all logits
        assert loss_is_plain == [True]
    if "compiled layers" in way:  # fewer than layers: two of one, two of its attention, the loss
        assert counters["stats"]["unique_graphs"] <= 6, counters
    found = {"loss": float((mean - loss).detach().abs() / loss.detach()), "gradients": 0.0, "alpha": 0.0}
    for name, parameter in model.named_parameters():
        sharded = isinstance(parameter.grad, DTensor)
        grad = parameter.grad.full_tensor() if sharded else averaged(parameter.grad, group)
        what = "alpha" if name.endswith("theta") else "gradients"
        off = (grad - whole[name]).abs().max() / whole[name].abs().max().clamp(min=1e-2)
        found[what] = max(found[what], float(off))
    return found


def reading(name: str, tokens: int) -> dict[str, Any]:
    """How far the cache of a text read by all is from that of one process, and whether the same tokens follow."""
    model = READERS[name]().double().eval()
    ids = torch.randint(2, 61, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    cache = prefill(model, ids)
    alone = DynamicCache(config=model.config)
    model(ids[:, : (held := cache.get_seq_length())], **{CACHE_NAME: alone})
    off = 0.0
    for one, other in zip(cache.layers, alone.layers, strict=True):
        assert type(one) is type(other)
        assert one.get_seq_length() == other.get_seq_length()
        off = max(off, *(float((getattr(one, x) - getattr(other, x)).abs().max()) for x in ("keys", "values")))
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(ids, **how, **given) for given in ({CACHE_NAME: cache}, {})]
    return {"read": [name, tokens, held], "off": off, "same": torch.equal(*texts)}


def averaged(x: Tensor, group: Any) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x / dist.get_world_size(group)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    pairs = [dist.new_group([first, first + 1]) for first in (0, 2)]
    half = dist.get_rank() // 2
    # The two pairs share the work.
    every_row = ("learned mixture", "bounded mixture", "chosen near")
    rows = [(name, kind) for name in MODELS for kind in (ROWS if name in every_row else ROWS[1:2])]
    cases = [(*one, pairs[half], "") for one in rows[half::2]]
    cases.append((("mixture", "chosen near")[half], "packed", pairs[half], "compiled"))  # seconds in each process
    everyone = dist.group.WORLD
    several = (*every_row, "rungs by head", "reach beyond the row", "converted llama")
    cases += [(name, "padded and packed", everyone, "") for name in several]
    cases += [(name, "short", everyone, "") for name in ("mixture", "bounded mixture")]
    cases += [("mixture", "packed", everyone, way) for way in WAYS]
    cases += [("chosen near", kind, everyone, "") for kind in ("packed", "mostly padded", "mostly padded and packed")]
    cases += [("converted to blocks", "mostly padded", everyone, "")]
    cases += [("ten layers", "packed", everyone, "sharded weights, compiled layers")]
    lines = []
    for name, kind, group, way in cases:
        found = errors(name, kind, group, way)
        if dist.get_rank(group) == 0:
            lines.append(json.dumps({"case": [name, kind, dist.get_world_size(group), way], **found}))
    lines += [json.dumps(reading(name, tokens)) for name in READERS for tokens in (13, 50)]
    block = re.search(r"^```python\n(import torch.distributed.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    named: dict[str, Any] = {"model": tiny_models.model("linear"), "input_ids": row("plain")["input_ids"]}
    exec(block[1].replace("dist.init_process_group()", "").replace("cache=", f"{CACHE_NAME}="), named)
    lines.append(json.dumps({"page": named["text"].shape[1] > TOKENS}))
    ids, rank = row("plain")["input_ids"], dist.get_rank()
    others = (ids + rank, ids[:, : 47 + (rank > 0)], ids[: 1 + rank % 2])  # in content, in whether it divides, in rows
    wrong: dict[str, list[Callable[[], Any]]] = {
        "unread": [lambda: prefill(tiny_models.model("mixture"), ids)],
        "unread blocks": [lambda: prefill(tiny_models.model("chosen", full_reach=9), ids)],
        "unread converted": [lambda: prefill(convert(foreign_decoders.model("llama"), window=3, blocks=1), ids)],
        "unread convolution": [lambda: prefill(tiny_models.model("sliding", kv_convolution=3), ids)],
        "undivided": [lambda: enter(ids[:, :46])],
        "unlike": [lambda rows=rows: enter(rows) for rows in others],
        "unlike texts": [lambda rows=rows: prefill(tiny_models.model("linear"), rows) for rows in others],
    }

    def enter(rows: Tensor) -> None:
        with ContextParallel(tiny_models.model(), everyone).cut([rows], [1]):
            pass

    for what, calls in wrong.items():
        for call in calls:
            try:
                call()
            except InputError as error:
                lines.append(json.dumps({what: str(error)}))
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, lines)
    if dist.get_rank() == 0:
        print("\n".join(line for some in gathered for line in some))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
