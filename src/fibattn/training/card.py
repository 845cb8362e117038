"""The model card: what a finished model is, was trained on and reached, for those who find its folder."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fibattn import files
from fibattn._version import __version__
from fibattn.data.prepared import PreparedData
from fibattn.model import FibAttnConfig
from fibattn.model.converted_pattern import ConvertedLayer
from fibattn.model.loading import model_name
from fibattn.pattern import ChosenPattern
from fibattn.progress import quantity
from fibattn.sealed import CARD
from fibattn.training.recipe import Recipe

_BEGIN, _END = "<!-- results: `fibattn eval` writes here -->", "<!-- end of results -->"
_NONE_YET = "Not evaluated yet."
_EMPTY = f"## Results\n\n{_BEGIN}\n{_NONE_YET}\n{_END}"
_ATTENTION = {
    "fibonacci_attention": "window and distances",
    "sliding_attention": "window only",
    "chosen_attention": "window and blocks that queries choose",
    "full_attention": "full",
}

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- fibattn
- sparse-attention
---

# """

_UNHEALED = """The weights are those
of the original, whose layers learnt with more to attend to: expect it to be worse until it is healed."""

_LOAD = """## How to load

```
pip install PATH/TO/fibattn    # a clone of its repository; it is not on PyPI
```

```python
import fibattn
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/or/id/of/this/model")
tokenizer = AutoTokenizer.from_pretrained("path/or/id/of/this/model")
```

Programs that do not import `fibattn` themselves load it with `trust_remote_code=True`; the package must be installed
there too."""


def write_card(folder: Path, config: FibAttnConfig, parameters: int, recipe: Recipe, data: PreparedData) -> None:
    """Write the card of a model folder; its results are filled in by `add_results`."""
    sections = (_head(recipe, parameters), _attention(config), _training(recipe, data), _EMPTY, _LOAD)
    files.write_text(folder / CARD, "\n\n".join(sections) + "\n")


def write_converted_card(
    folder: Path, name: str, source: str, model: PreTrainedModel, placement: dict[str, Any] | None
) -> None:
    """Write the card of the folder of a model that was converted from `source`.

    `placement` is what `fibattn.evaluation.placement.search` found, where the kept layers were measured.
    """
    head = f"""{_FRONT}{name}

A decoder of {quantity(model.num_parameters())} parameters, converted from {source} (a {type(model).__name__}) with
fibattn {__version__} ([fixed-offset sparse attention](https://arxiv.org/abs/2606.28560)). {_UNHEALED}"""
    config = model.base_model.config
    attention = _attention(config) if isinstance(config, FibAttnConfig) else _converted_attention(model)
    sections = [head, attention, *([measured(placement)] if placement else []), _EMPTY, _LOAD]
    files.write_text(folder / CARD, "\n\n".join(sections) + "\n")


def say_healed(folder: Path, healing: dict[str, Any]) -> None:
    """Say in the card of a converted model that it was healed, and how; what `fibattn.training.healing` keeps of it."""
    path, recipe = folder / CARD, healing["recipe"]
    if not path.exists():
        return
    what = "all weights" if recipe["lora"] is None else f"LoRA of rank {recipe['lora']}, merged"
    matched, steps = healing["steps"].get("attention", 0), sum(healing["steps"].values())
    section = f"""## Healing

Trained on {quantity(recipe["tokens"])} tokens in sequences of {healing["sequence_length"]}, beside
{healing["teacher"]}: {what}. In {matched} of {steps} steps each sparse layer's attention learnt the output of the dense
model's, in the others the whole its next tokens (weight {1 - recipe["text_weight"]:g}) and the text's.

"""
    text = path.read_text(encoding="utf-8").replace(_UNHEALED, "It was trained since.")
    files.write_text(path, text.replace("## Results\n", f"{section}## Results\n", 1))


def add_results(folder: Path, result: dict[str, Any]) -> bool:
    """Put the length sweep `result` into the card of a model folder; says whether the card has a place."""
    return _fill(folder, _results(result))


def change_bound(folder: Path, old: FibAttnConfig, new: FibAttnConfig) -> None:
    """Say in the card that full layers have another bound; its results were those with the old one."""
    if _fill(folder, _NONE_YET):
        text = (folder / CARD).read_text(encoding="utf-8")
        files.write_text(folder / CARD, text.replace(_attention(old), _attention(new)))


def _fill(folder: Path, results: str) -> bool:
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        return False
    files.write_text(path, f"{before}{begin}\n{results}\n{end}{after}")
    return True


def _head(recipe: Recipe, parameters: int) -> str:
    return f"""{_FRONT}{recipe.out.name}

A decoder of {quantity(parameters)} parameters, trained with fibattn {__version__}
([fixed-offset sparse attention](https://arxiv.org/abs/2606.28560)) on sequences of {recipe.sequence_length} tokens. It
is a base model: it goes on with a text."""


def _attention(config: FibAttnConfig) -> str:
    window, rows = config.window, "\n".join(_layers(config))
    return f"""## Attention

In a layer with a window, every token attends to the {window} tokens before it; where there are distances, also to
the single tokens that far back.

| layers | attention | RoPE | distances beyond the window |
| --- | --- | --- | --- |
{rows}"""


def _training(recipe: Recipe, data: PreparedData) -> str:
    taken = {source["name"]: quantity(source["train"]["tokens"]) for source in data.sources if source["train"]}
    optimizer = recipe.optimizer
    falls = optimizer.decay_fraction
    plateau = f" the highest, and in the last {falls:.0%} of the rest" if falls < 1 else ""
    rows = {
        "tokens": f"{quantity(recipe.tokens)}: {recipe.steps} steps of {recipe.sequences_per_step} sequences of "
        f"{recipe.sequence_length}",
        "began with": recipe.start and f"the weights of {model_name(recipe.start.resolve())}",
        "text": ", ".join(f"{name} ({tokens} tokens)" for name, tokens in taken.items()),
        "data fingerprint": f"`{data.fingerprint}`",
        "seeds": f"weights {recipe.init_seed}, data {recipe.data_seed}",
        "highest learning rate": optimizer.rates,
        "learning rate over time": f"{optimizer.warmup_steps} steps of warm-up, then{plateau} {optimizer.decay} to "
        f"{optimizer.final_fraction:g} of the highest",
    }
    lines = (f"| {name} | {value} |" for name, value in rows.items() if value)
    return "\n".join(("## Training", "", "| | |", "| --- | --- |", *lines))


def _layers(config: FibAttnConfig) -> Iterator[str]:
    """A row of the card for each run of layers that are the same."""
    rows = []
    for layer, kind in enumerate(config.layer_types or []):
        patterns = config.layer_patterns(layer)
        distances = " / ".join(", ".join(map(str, pattern.offsets)) for pattern in patterns or ())
        if config.learns_alpha(layer):
            distances = f"{', '.join(map(str, config.base_rungs))}, times a learned scale"
        if config.chooses(layer):
            distances = _blocks(config.chosen_pattern)
        rotated = "yes" if (config.no_rope_layers or [])[layer] else "no"
        window = patterns[0].window if patterns else config.window
        bounded = window != config.window or (patterns is not None and kind == "full_attention")
        bound = f", the last {window + 1:,}" if bounded else ""
        rows.append(f"{_ATTENTION[kind]}{bound} | {rotated} | {distances or 'none'}")
    return _grouped(rows)


def _converted_attention(model: PreTrainedModel) -> str:
    found = (getattr(module, "fibattn", None) for module in model.modules())
    rows = [_converted_row(layer) for layer in found if isinstance(layer, ConvertedLayer)]
    return f"""## Attention

| layers | attention | distances beyond the window |
| --- | --- | --- |
{chr(10).join(_grouped(rows))}"""


def _converted_row(layer: ConvertedLayer) -> str:
    if isinstance(layer.pattern, ChosenPattern):
        return f"the last {layer.pattern.window + 1:,} | {_blocks(layer.pattern)}"
    if layer.pattern is None:
        return f"its own, {'full' if layer.sliding_window is None else f'the last {layer.sliding_window:,}'} | none"
    return f"the last {layer.pattern.window + 1:,} | {', '.join(map(str, layer.pattern.offsets)) or 'none'}"


def _blocks(chosen: ChosenPattern) -> str:
    anchor = ", the first of the text always" if chosen.anchored else ""
    return f"{chosen.blocks} blocks of {chosen.block} keys among the last {chosen.reach + 1:,}{anchor}"


def _grouped(rows: Sequence[str]) -> Iterator[str]:
    """Rows of a table, each with the numbers of the layers that have it."""
    for row, run in groupby(enumerate(rows), key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        yield f"| {numbers[0]}{f'–{numbers[-1]}' if len(numbers) > 1 else ''} | {row} |"


def measured(found: dict[str, Any]) -> str:
    """How the kept layers were found, in Markdown: what `fibattn.evaluation.placement.search` returns."""
    kept = [step["layer"] for step in found["search"]]
    lines = [
        f"| {layer} | {rise:+.4f} | {kept.index(layer) + 1 if layer in kept else ''} |"
        for layer, rise in enumerate(found["alone"])
    ]
    evenly = found["evenly"]
    return f"""## Which layers keep their attention

Measured on {found["sequences"]} sequences of {found["sequence_length"]} tokens, in {found["seconds"]:.0f} s; losses in
nats a token. The original has {found["dense"]:.4f}, with no layer kept it is {found["none"]:.4f}, with those kept here
{found["search"][-1]["loss"]:.4f}, with the layers {", ".join(map(str, evenly["layers"]))} {evenly["loss"]:.4f}.

| layer | rise where it alone is sparse | kept, in this order |
| --: | --: | --: |
{chr(10).join(lines)}"""


def _results(result: dict[str, Any]) -> str:
    """Tables in Markdown, one a held-out set."""
    lines = [f"Perplexity on held-out text ({result['convention']}); data fingerprint `{result['data_fingerprint']}`."]
    for name, lengths in result["sets"].items():
        targets = next(iter(lengths.values()))["targets"]
        lines += ["", f"{name}, {targets:,} tokens:", ""]
        lines += ["| length | perplexity | bits per byte |", "| --: | --: | --: |"]
        lines += [
            f"| {int(length):,} ({int(length) / result['trained_at']:g}×) | {row['perplexity']:.2f} | "
            f"{row['bits_per_byte']:.4f} |"
            for length, row in lengths.items()
        ]
    return "\n".join(lines)
