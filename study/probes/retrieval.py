"""The retrieval probe: can a learned scale move a rung to the distance a task needs? (paper, section 6)

A copy task with two marked distances. Every token is one of 512 ids; the half its id is in says from which of
two distances the target at its position is copied. A few rungs can serve both distances only if the layers'
scales find them.

A rung that reads one key feels no gradient towards a key it does not read. So, as in the author's probe, each
rung gathers a Gaussian band of keys whose width shrinks while the model trains. The band lives here alone, as
plain dense attention; the other schedules go through the operator.

Even the narrowest band leaves a key that is far from all rungs a tiny weight, which queries and keys that grow large
can bring back: models then answer through the band what no rung reaches. So a finished model is asked twice, through
its bands, as the paper does, and through the operator with the rungs where its scales put them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fibattn.errors import InputError
from fibattn.model import FibAttnConfig, FibAttnForCausalLM
from fibattn.model.layers import FibAttnAttention
from fibattn.model.loss import IGNORED
from fibattn.model.rotary import Rotation, rotate
from fibattn.pattern import layer_alphas
from fibattn.training.recipe import OptimizerRecipe
from study.probes.fit import Keep, Stage, autocast, device, fit, rows_of
from study.probes.settings import Retrieval, Start

VOCABULARY, LENGTH, DISTANCES = 512, 512, (200, 350)
WIDEST, NARROWEST, ANNEALED = 40.0, 0.5, 0.8
"""The band's width in tokens at the start and the end, and the part of the steps in which it shrinks."""
EXTREMES = (0.55, 1.45)
"""The staggered start is the linear ramp clipped to these: a scale of 0.5 or 1.5 is infinitely far for a sigmoid."""

_MEASURES = tuple(f"{how}{distance}" for how in ("acc", "rungs") for distance in DISTANCES)
"""Accuracy for each distance through the bands, and through the rungs themselves."""

_EVALUATED = 1 << 40  # evaluation sequences are numbered from here, out of reach of any training


class MarkedCopies(Dataset[dict[str, Tensor]]):
    """Item i is a random sequence and its targets: the id found at the distance that the token's half marks.

    `input_ids` and `shift_labels` int64 (length,); positions before their distance have no target. The same
    seed and number give the same sequence.
    """

    def __init__(self, count: int, seed: int, *, first: int = 0, length: int = LENGTH, distances: tuple = DISTANCES):
        self.count, self.seed, self.first, self.length, self.distances = count, seed, first, length, distances

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = np.random.default_rng((self.seed, self.first + index)).integers(0, VOCABULARY, self.length)
        source = np.arange(self.length) - np.array(self.distances)[marks(ids)]
        targets = np.where(source >= 0, ids[source], IGNORED)
        return {"input_ids": torch.from_numpy(ids), "shift_labels": torch.from_numpy(targets)}


def marks(ids: Any) -> Any:
    """Which of the two distances each id asks for, 0 or 1."""
    return ids // (VOCABULARY // 2)


class BandAttention(FibAttnAttention):
    """The learned layer with rungs blurred to Gaussian bands of `width` tokens, as dense attention.

    A key at distance d beyond the window weighs `exp(q·k)` times the sum over rungs of a Gaussian of `width`
    around `alpha · rung`, each Gaussian normalised over whole distances: a rung keeps the weight of one key
    however wide its band, and as the width goes to 0 this becomes the rung itself.
    """

    width: Tensor
    rungs: Tensor

    def __init__(self, config: FibAttnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # A tensor, or a compiled model would be compiled anew for every width.
        self.register_buffer("width", torch.tensor(WIDEST), persistent=False)
        self.register_buffer("rungs", torch.tensor(config.base_rungs, dtype=torch.float32), persistent=False)

    def bias(self, tokens: int) -> Tensor:
        """The log-weight of the keys at distances 0 … tokens - 1, float32 (tokens,)."""
        farthest = math.ceil(1.5 * self.config.base_rungs[-1] + 6 * WIDEST)
        distance = torch.arange(max(tokens, farthest), device=self.rungs.device, dtype=torch.float32)
        centers = self.alpha * self.rungs  # pyright: ignore[reportOptionalOperand]
        logs = -((distance - centers[:, None]) ** 2) / (2 * self.width**2)
        inside = (centers.round() <= self.config.window)[:, None]
        bands = logs.log_softmax(dim=-1).masked_fill(inside, -math.inf).logsumexp(dim=0)
        return torch.where(distance <= self.config.window, 0.0, bands)[:tokens]

    def forward(self, hidden: Tensor, rotation: Rotation, *_: Any, **__: Any) -> Tensor:
        """`hidden` (batch, tokens, hidden size) in and out; one document a row, no cache."""
        tokens = hidden.shape[1]
        shape = (*hidden.shape[:2], -1, self.head_dim)
        q, k, v = (project(hidden).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=2) for x in (k, v))
        index = torch.arange(tokens, device=hidden.device)
        distance = index[:, None] - index
        weights = self.bias(tokens)[distance.clamp(min=0)].masked_fill(distance < 0, -math.inf)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * self.scaling + weights
        out = torch.einsum("bhij,bjhd->bihd", logits.float().softmax(dim=-1).to(v.dtype), v)
        return self.o_proj(out.reshape(*hidden.shape[:2], -1))


def build(depth: int, start: Start, seed: int) -> FibAttnForCausalLM:
    """The probe's model: hidden size 256, 4 heads, 2 KV heads, window 8, 15 rungs.

    `uniform` and `staggered` learn their scales through bands, from 1 everywhere or from the linear ramp;
    `fixed` and `linear` have integer offsets.
    """
    learned = start in ("uniform", "staggered")
    config = FibAttnConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        window=8,
        rungs=15,
        schedule="learned" if learned else start,
    )
    torch.manual_seed(seed)
    model = FibAttnForCausalLM(config)
    if learned:
        _blur(model, layer_alphas("linear" if start == "staggered" else "fixed", layers=depth))
    return model


def _blur(model: FibAttnForCausalLM, alphas: Sequence[float]) -> None:
    """Put bands in place of the rungs, the weights kept, and start each layer's scale at its alpha."""
    for index, (layer, alpha) in enumerate(zip(model.model.layers, alphas, strict=True)):
        band = BandAttention(model.config, index)
        band.load_state_dict(layer.self_attn.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            clipped = min(max(alpha, EXTREMES[0]), EXTREMES[1])
            band.theta.fill_(math.log((clipped - 0.5) / (1.5 - clipped)))  # pyright: ignore[reportOptionalMemberAccess]
        layer.self_attn = band


def _sharpen(model: FibAttnForCausalLM) -> None:
    """Put the operator's layers back in place of the bands, weights and scales kept."""
    for index, layer in enumerate(model.model.layers):
        band = layer.self_attn
        sharp = FibAttnAttention(model.config, index).to(band.q_proj.weight.device)  # pyright: ignore
        sharp.load_state_dict(band.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        layer.self_attn = sharp


def band_width(step: int, steps: int) -> float:
    """The band's width at `step` of `steps`: geometric from 40 to 0.5 over the first four fifths, then level."""
    done = min(step / max(ANNEALED * steps, 1), 1.0)
    return WIDEST * (NARROWEST / WIDEST) ** done


def set_width(model: nn.Module, width: float) -> None:
    """Set the width of every band of `model`."""
    for module in model.modules():
        if isinstance(module, BandAttention):
            module.width.fill_(width)


@torch.inference_mode()
def accuracy(model: nn.Module, data: MarkedCopies, batch: int) -> tuple[float, float]:
    """How often the most likely id is the right one, for each of the two distances."""
    model.eval()
    where = next(model.parameters()).device
    right, asked = torch.zeros(2), torch.zeros(2)
    for items in DataLoader(data, batch_size=batch):
        ids, targets = items["input_ids"], items["shift_labels"]
        with autocast(where):
            found = model(input_ids=ids.to(where), use_cache=False).logits.argmax(dim=-1).cpu()
        for mark in (0, 1):
            counted = (targets != IGNORED) & (marks(ids) == mark)
            right[mark] += (found == targets)[counted].sum()
            asked[mark] += counted.sum()
    near, far = (right / asked).tolist()
    return near, far


def retrieval(
    settings: Retrieval, *, earlier: dict[str, Any] | None = None, keep: Keep = lambda result: None
) -> dict[str, Any]:
    """Run the probe for every depth, start and seed; the result is plain JSON values.

    Args:
        settings: what is trained and asked.
        earlier: a result to go on with.
        keep: called with the result so far after every row.

    Raises:
        InputError: for a value that cannot run or an earlier result with other settings.
    """
    depths, starts, seeds, steps = settings.depths, settings.starts, settings.seeds, settings.steps
    if (
        min(min(depths, default=0), steps, settings.batch, settings.sequences, len(starts)) < 1
        or min(seeds, default=-1) < 0
    ):
        raise InputError(
            f"depths {list(depths)}, steps {steps}, batch {settings.batch}, sequences {settings.sequences}, starts "
            f"{list(starts)}, seeds {list(seeds)}: each number must be at least 1, and there must be a start and a "
            "seed, none below 0"
        )
    optimizer = OptimizerRecipe(learning_rate=settings.learning_rate, warmup_steps=min(200, steps // 10))
    optimizer.check()
    about: dict[str, Any] = {
        "probe": "retrieval",
        "task": {"distances": list(DISTANCES), "length": LENGTH, "vocabulary": VOCABULARY},
        "band": {"widest": WIDEST, "narrowest": NARROWEST, "annealed": ANNEALED},
        "steps": steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "sequences": settings.sequences,
        "seeds": list(seeds),
    }
    rows = {(row["depth"], row["start"]): row for row in rows_of(earlier, about)}
    for depth, start in itertools.product(depths, starts):
        if (depth, start) not in rows:
            runs = [_run(depth, start, seed, settings, optimizer) for seed in seeds]
            rows[depth, start] = {"depth": depth, "start": start, **_mean(runs), "runs": runs}
            keep(about | {"rows": list(rows.values())})
    return about | {"rows": list(rows.values())}


def _run(depth: int, start: Start, seed: int, settings: Retrieval, optimizer: OptimizerRecipe) -> dict[str, Any]:
    steps, batch = settings.steps, settings.batch
    model = build(depth, start, seed).to(device())  # pyright: ignore[reportArgumentType]
    loss = fit(
        model,
        [Stage(MarkedCopies(steps * batch, seed), steps, batch)],
        optimizer=optimizer,
        label=f"retrieval depth {depth} {start} seed {seed}",
        before_step=lambda step: set_width(model, band_width(step, steps)),
    )
    set_width(model, NARROWEST)
    asked = MarkedCopies(settings.sequences, seed, first=_EVALUATED)
    through_bands = accuracy(model, asked, batch)
    layers = [layer.self_attn for layer in model.model.layers]
    learned = [layer.alpha.item() for layer in layers if isinstance(layer, BandAttention)]  # pyright: ignore
    if learned:
        _sharpen(model)
    through_rungs = accuracy(model, asked, batch) if learned else through_bands
    return {
        "seed": seed,
        "loss": loss,
        "alphas": learned or list(layer_alphas(start, layers=depth)),  # pyright: ignore[reportArgumentType]
        **dict(zip(_MEASURES, (*through_bands, *through_rungs), strict=True)),
    }


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with the lowest and the highest scale of a run averaged as the paper does."""
    means: dict[str, Any] = {name: sum(run[name] for run in runs) / len(runs) for name in _MEASURES}
    means["alpha_min"] = sum(min(run["alphas"]) for run in runs) / len(runs)
    means["alpha_max"] = sum(max(run["alphas"]) for run in runs) / len(runs)
    return means
