"""Recall over distance: does a far token arrive, where a plain window of the same cost cannot reach?

A row is noise with pairs of a key and a value somewhere in it; when a key comes again, its value is asked.
Associative recall has several pairs, so a model must tell whose value is asked; the passkey is one pair whose key
is always the same. Small models learn both, from short rows to long ones, with distances spread evenly over the
orders of magnitude, and are asked at distances up to and past the longest row. Perplexity hardly shows such reach;
here it is all that counts.

A sparse model must pass a value on from layer to layer, so rows hold few pairs: what fits into the hidden state
on the way is not what is measured.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fibattn.errors import InputError
from fibattn.model import FibAttnConfig, FibAttnForCausalLM
from fibattn.model.loss import IGNORED
from fibattn.pattern import LayerType, hybrid_layers
from fibattn.training.recipe import OptimizerRecipe
from study.presets import key_count
from study.probes.fit import Keep, Stage, autocast, device, fit, rows_of
from study.probes.settings import Recall

Task = Literal["associative", "passkey"]
TASKS: tuple[Task, ...] = get_args(Task)
PAIRS: dict[Task, int] = {"associative": 4, "passkey": 1}
"""Pairs of key and value in a row."""
_BLOCK = 2 * max(PAIRS.values())

NOISE, KEYS, VALUES = 64, 64, 64
VOCABULARY = NOISE + KEYS + VALUES
"""Ids of noise, then the keys (the first is the passkey's), then the values."""

TOKENS_A_QUESTION = 16
"""In a training row whose pairs are asked often, each is asked once for so many tokens, from another distance."""
SHORTEST = 16
"""Tokens of a row of the first lesson: the pairs, and questions. Whose value is asked is learnt from the key before
each value. A layer that does not know yet where to look spreads over the whole row; in a longer one it hardly sees
that key, and nothing is learnt for thousands of steps (`docs/log.md`)."""

_EVALUATED = 1 << 40  # evaluation rows are numbered from here, out of reach of any training


class RecallRows(Dataset[dict[str, Tensor]]):
    """Item i is a row of noise with pairs in it, and the values asked of it: `input_ids` and `shift_labels`.

    The pairs stand in one block, each a key with its value right after it. A pair is asked by its key, `distance` after
    the key in the block; the answer never follows. Both arrays are int64 (length,); the same seed and number give the
    same row.

    Args:
        count: how many items there are.
        length: tokens of a row.
        starts: the block begins at one of so many first tokens.
        nearest, farthest: distances are drawn from this range, evenly in their logarithm, as far as the row allows.
        asked: questions for each pair; one that meets another is left out.
        tasks: item i has the task at i modulo their number.
        seed: of all items.
        first: the number of the first item.
    """

    def __init__(
        self,
        count: int,
        length: int,
        *,
        starts: int,
        nearest: int,
        farthest: int,
        asked: int,
        tasks: Sequence[Task],
        seed: int,
        first: int = 0,
    ):
        self.count, self.length, self.starts, self.nearest, self.farthest = count, length, starts, nearest, farthest
        self.asked, self.tasks, self.seed, self.first = asked, tuple(tasks), seed, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, self.first + index))
        task = self.tasks[index % len(self.tasks)]
        count = PAIRS[task]
        keys = NOISE + (np.zeros(1, int) if task == "passkey" else 1 + rng.choice(KEYS - 1, count, replace=False))
        values = NOISE + KEYS + rng.integers(0, VALUES, count)
        ids, targets = rng.integers(0, NOISE, self.length), np.full(self.length, IGNORED)
        planted = rng.integers(self.starts) + 2 * np.arange(count)
        ids[planted], ids[planted + 1] = keys, values
        low = np.maximum(self.nearest, planted[-1] + 2 - planted)
        high = np.minimum(self.farthest, self.length - 1 - planted)
        logs = rng.uniform(np.log(low), np.log(high + 1), (self.asked, count))
        distances = np.exp(logs).astype(np.int64).clip(low, high)
        places, chosen = np.unique(planted + distances, return_index=True)
        ids[places], targets[places] = keys[chosen % count], values[chosen % count]
        return {"input_ids": torch.from_numpy(ids), "shift_labels": torch.from_numpy(targets)}


def training_rows(count: int, length: int, asked: int, tasks: Sequence[Task], seed: int, first: int = 0) -> RecallRows:
    """Rows to learn from: the block in their first half, each pair asked `asked` times, from the block's end on."""
    return RecallRows(
        count,
        length,
        starts=length // 2 - _BLOCK + 1,
        nearest=1,
        farthest=length,
        asked=asked,
        tasks=tasks,
        seed=seed,
        first=first,
    )


def lesson_plan(length: int) -> dict[int, list[int]]:
    """One lesson after another: the tokens of its rows, and how often they ask each pair, one part after another.

    Rows grow four times as long each time, at last `length`: what is far is learnt from what is near. Pairs are asked
    often at first, then once as in the evaluation: where they are asked often, an answer can come from the question
    before and need not come from the pair itself.
    """
    lengths = [SHORTEST]
    while 4 * lengths[-1] < length:
        lengths.append(4 * lengths[-1])
    often = {tokens: tokens // TOKENS_A_QUESTION for tokens in [*lengths, length]}
    return {tokens: [asked, 1] if asked > 1 else [1] for tokens, asked in often.items()}


def lessons(length: int, steps: int, batch_tokens: int, seed: int) -> list[Stage]:
    """The stages of a training: every lesson has as many steps, and every part of it.

    The first lesson has no passkeys: they teach to fetch whatever value there is, and that is hard to unlearn.
    """
    plan, stages, made = lesson_plan(length), [], 0
    for (tokens, parts), share in zip(plan.items(), _split(steps, len(plan)), strict=True):
        tasks: tuple[Task, ...] = TASKS if stages else ("associative",)
        batch = max(1, batch_tokens // tokens)
        for asked, count in zip(parts, _split(share, len(parts)), strict=True):
            stages.append(Stage(training_rows(count * batch, tokens, asked, tasks, seed, made), count, batch))
            made += count * batch
    return stages


def _split(steps: int, parts: int) -> list[int]:
    return [steps * (part + 1) // parts - steps * part // parts for part in range(parts)]


def questions(count: int, distance: int, task: Task, seed: int) -> RecallRows:
    """Fresh rows that ask each pair once, from 4/5 of `distance` to `distance`, and are a quarter longer than it.

    A range, not one number, so that no pattern is lucky or unlucky with it.
    """
    length = distance + max(distance // 4, 32)
    return RecallRows(
        count,
        length,
        starts=length - distance - _BLOCK + 2,
        nearest=max(distance * 4 // 5, 1),
        farthest=distance,
        asked=1,
        tasks=(task,),
        seed=seed,
        first=_EVALUATED,
    )


def variants(length: int, *, window: int, layers: int) -> dict[str, FibAttnConfig]:
    """The models that are compared, by name; one shape, hidden size 256, different attention.

    `stagger` has rungs up to the length; `window` has no rungs and as many keys instead; the hybrids have two
    full-attention layers without RoPE, in the middle and at the end; `dense` is all full. In `chosen` queries read a
    window of 32 and the four best blocks of 16 among the last 1,024 tokens, keys and values carry those of the three
    tokens before; `convolved hybrid` is the window hybrid with the latter alone. The `reaching hybrid` takes as many
    keys in larger blocks, and chooses from four times as far back as a row is long, 8,191 at most.
    """

    def config(
        sparse: LayerType,
        window: int,
        full: Collection[int] = (),
        convolution: int = 0,
        block: int = 16,
        reach: int = min(length, 1024) - 1,
    ) -> FibAttnConfig:
        kinds = hybrid_layers(layers, full, sparse)
        return FibAttnConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
            window=window,
            rungs=_rungs(length),
            max_offset=length - 1,
            blocks=max(64 // block, 1),
            block_size=block,
            block_reach=reach,
            kv_convolution=convolution,
            layer_types=list(kinds["layer_types"]),
            no_rope_layers=list(kinds["no_rope_layers"]),
        )

    stagger = config("fibonacci_attention", window)
    equal, two = round(keys(stagger)) - 1, (layers // 2 - 1, layers - 1)
    far = min(4 * length, 8192)
    block = max(32, 1 << (-(-far // 64) - 1).bit_length())
    return {
        "window": config("sliding_attention", equal),
        "stagger": stagger,
        "hybrid": config("fibonacci_attention", window, two),
        "window hybrid": config("sliding_attention", equal, two),
        "dense": config("full_attention", window),
        "chosen": config("chosen_attention", 31, convolution=4),
        "chosen hybrid": config("chosen_attention", 31, two, convolution=4),
        "convolved hybrid": config("sliding_attention", equal, two, convolution=4),
        "reaching hybrid": config("chosen_attention", 31, two, convolution=4, block=block, reach=far - 1),
    }


def _rungs(length: int) -> int:
    """How many Fibonacci rungs it takes for the smallest scale, 1/2, to get to `length`."""
    rung, following, count = 1, 2, 1
    while rung < 2 * length:
        rung, following, count = following, rung + following, count + 1
    return count


def keys(config: FibAttnConfig) -> float:
    """How many keys a query of a sparse layer attends to, the mean over those layers; the length where none is."""
    if "chosen_attention" in (config.layer_types or []):
        return config.window + 1 + config.blocks * config.block_size
    sparse = [one for layer in range(config.num_hidden_layers) for one in config.layer_patterns(layer) or ()]
    return key_count(sparse) if sparse else float(config.max_position_embeddings)


@torch.inference_mode()
def accuracy(model: nn.Module, rows: RecallRows, batch: int) -> tuple[float, int]:
    """How often the most likely value is the right one, and of how many questions."""
    model.eval()
    where = next(model.parameters()).device
    right = asked = 0
    for items in DataLoader(rows, batch_size=batch):
        targets = items["shift_labels"].to(where)
        with autocast(where):
            hidden = model.base_model(input_ids=items["input_ids"].to(where), use_cache=False).last_hidden_state  # pyright: ignore
            found = model.get_output_embeddings()(hidden[targets != IGNORED]).argmax(dim=-1)  # pyright: ignore
        right += int((found == targets[targets != IGNORED]).sum())
        asked += len(found)
    return right / asked, asked


def recall(
    settings: Recall, *, earlier: dict[str, Any] | None = None, keep: Keep = lambda result: None
) -> dict[str, Any]:
    """Train the variants on both tasks and ask them at every distance; the result is plain JSON values.

    Args:
        settings: what is trained and asked.
        earlier: a result to go on with.
        keep: called with the result so far after every model.

    Raises:
        InputError: for an unknown variant, a value that cannot run or an earlier result with other settings.
    """
    length, layers, steps, asked = settings.length, settings.layers, settings.steps, settings.asked
    distances, batch_tokens, seeds = settings.distances, settings.batch_tokens, settings.seeds
    if length < 128 or layers < 2 or min(distances, default=0) < SHORTEST:
        raise InputError(
            f"length is {length} (at least 128), layers {layers} (at least 2), distances {list(distances)} "
            f"(each at least {SHORTEST}); change what is too small"
        )
    if min(steps, batch_tokens, asked) < 1 or min(seeds, default=-1) < 0:
        raise InputError(
            f"steps {steps}, batch_tokens {batch_tokens}, asked {asked}, seeds {list(seeds)}: each number must be at "
            f"least 1, and there must be a seed, none below 0"
        )
    known = variants(length, window=settings.window, layers=layers)
    unknown = [name for name in settings.names if name not in known]
    if unknown:
        raise InputError(f"unknown variant {unknown[0]!r}; the variants are {', '.join(known)}")
    optimizer = OptimizerRecipe(learning_rate=settings.learning_rate, warmup_steps=min(200, steps // 10))
    optimizer.check()
    about: dict[str, Any] = {
        "probe": "recall",
        "trained_at": length,
        "layers": layers,
        "window": settings.window,
        "pairs": dict(PAIRS),
        "values": VALUES,
        "distances": list(distances),
        "lessons": {str(tokens): parts for tokens, parts in lesson_plan(length).items()},
        "steps": steps,
        "batch_tokens": batch_tokens,
        "learning_rate": settings.learning_rate,
        "asked": asked,
    }
    if settings.bound is not None:
        about["bound"] = settings.bound
    rows = rows_of(earlier, about)
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed, name in itertools.product(seeds, settings.names or tuple(known)[:5]):
        if (name, seed) not in done:
            torch.manual_seed(seed)
            model = FibAttnForCausalLM(known[name]).to(device())  # pyright: ignore[reportArgumentType]
            label = f"recall {name}, seed {seed}"
            loss = fit(model, lessons(length, steps, batch_tokens, seed), optimizer=optimizer, label=label)
            if settings.bound is not None:
                model = _bounded(model, settings.bound)
            made = {"variant": name, "seed": seed, "keys": keys(known[name]), "loss": loss}
            rows += [{**made, "task": task, "accuracy": _asked(model, task, seed, settings)} for task in TASKS]
            keep(about | {"rows": list(rows)})
    return about | {"rows": rows}


def _bounded(model: FibAttnForCausalLM, bound: int) -> FibAttnForCausalLM:
    """The same model with full layers that look back no farther."""
    config = FibAttnConfig.from_dict(model.config.to_dict(), full_reach=bound)
    made = FibAttnForCausalLM(config).to(model.device)  # pyright: ignore[reportArgumentType]
    made.load_state_dict(model.state_dict())
    return made


def _asked(model: nn.Module, task: Task, seed: int, settings: Recall) -> dict[str, float]:
    """Accuracy at every distance."""
    found = {}
    for distance in settings.distances:
        rows = questions(-(-settings.asked // PAIRS[task]), distance, task, seed)
        found[str(distance)] = accuracy(model, rows, max(1, settings.batch_tokens // rows.length))[0]
    return found
