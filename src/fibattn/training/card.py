"""The model card: what a finished model is, was trained on and reached, for those who find its folder."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fibattn import files
from fibattn._version import __version__
from fibattn.data.prepared import PreparedData
from fibattn.model import FibAttnConfig
from fibattn.model.loading import model_name
from fibattn.progress import quantity
from fibattn.sealed import CARD
from fibattn.training.recipe import Recipe

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"
_BEGIN, _END = "<!-- results: `fibattn eval` writes here -->", "<!-- end of results -->"
_ATTENTION = {
    "fibonacci_attention": "window and distances",
    "sliding_attention": "window only",
    "full_attention": "full",
}


def write_card(folder: Path, config: FibAttnConfig, parameters: int, recipe: Recipe, data: PreparedData) -> None:
    """Write the card of a model folder; its results are filled in by `add_results`."""
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers", pipeline_tag="text-generation", tags=["fibattn", "sparse-attention"]
        ),
        template_path=str(_TEMPLATE),
        title=recipe.out.name,
        parameters=quantity(parameters),
        version=__version__,
        length=recipe.length,
        window=config.window,
        layers=list(_layers(config)),
        tokens=quantity(recipe.tokens),
        recipe=recipe,
        start=None if recipe.start is None else model_name(recipe.start.resolve()),
        sources=", ".join(f"{source['name']} ({_taken(source)} tokens)" for source in data.sources if source["train"]),
        fingerprint=data.fingerprint,
        results=f"{_BEGIN}\nNot evaluated yet.\n{_END}",
    )
    files.write_text(folder / CARD, f"{card}\n")


def add_results(folder: Path, result: dict[str, Any]) -> bool:
    """Put the length sweep `result` into the card of a model folder; says whether the card has a place."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        return False
    files.write_text(path, f"{before}{begin}\n{_results(result)}\n{end}{after}")
    return True


def _layers(config: FibAttnConfig) -> Iterator[dict[str, str]]:
    """A row of the card for each run of layers that are the same."""
    rows = []
    for layer, kind in enumerate(config.layer_types or []):
        patterns = config.layer_patterns(layer)
        distances = " / ".join(", ".join(map(str, pattern.offsets)) for pattern in patterns or ())
        if config.learns_alpha(layer):
            distances = f"{', '.join(map(str, config.base_rungs))}, times a learned scale"
        rotated = "yes" if (config.no_rope_layers or [])[layer] else "no"
        bound = f", the last {config.full_reach + 1:,}" if config.full_reach and kind == "full_attention" else ""
        rows.append({"attention": _ATTENTION[kind] + bound, "rope": rotated, "distances": distances or "none"})
    for row, run in groupby(enumerate(rows), key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        yield {"layers": f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}", **row}


def _taken(source: dict[str, Any]) -> str:
    return quantity(source["train"]["tokens"])


def _results(result: dict[str, Any]) -> str:
    """Tables in Markdown, one a held-out set."""
    lines = [f"Perplexity on held-out text ({result['convention']}); data fingerprint `{result['data_fingerprint']}`."]
    for name, lengths in result["sets"].items():
        targets = next(iter(lengths.values()))["targets"]
        lines += [
            "",
            f"{name}, {targets:,} tokens:",
            "",
            "| length | perplexity | bits per byte |",
            "| --: | --: | --: |",
        ]
        lines += [
            f"| {int(length):,} ({int(length) / result['trained_at']:g}×) | {row['perplexity']:.2f} | "
            f"{row['bits_per_byte']:.4f} |"
            for length, row in lengths.items()
        ]
    return "\n".join(lines)
