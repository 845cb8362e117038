"""The five-minute demonstration: dense and hybrid attention past their training length, on real text.

The text is what every Python has: the sources of its standard library. Every step is skipped when it is
finished already, so an interrupted demonstration goes on where it was.
"""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from examples.demo.figures import Curve, distances, extrapolation
from fibattn import files, machine
from fibattn.data.prepare import prepare
from fibattn.data.prepared import PreparedData
from fibattn.evaluation.sweep import change, sweep
from fibattn.model.loading import load_model
from fibattn.pattern import Pattern, hybrid_layers
from fibattn.progress import quantity
from fibattn.training.presets import ON_CPU, PRESETS
from fibattn.training.recipe import ModelRecipe, Recipe
from fibattn.training.run import train
from study.report.page import inline_svg, write_page
from study.standard_library import standard_library

FACTORS = (1, 2, 4, 8)
_PROMPT = "def parse_"
_SAMPLE_TOKENS = 200

DENSE = Recipe(
    model=ModelRecipe(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        layer_types=("full_attention",),
        hidden_act="relu2",
        gated_mlp=False,
        qk_norm=True,
        embedding_skip=True,
        zero_init_outputs=True,
    ),
    optimizer=PRESETS[ON_CPU].optimizer,
    sequence_length=128,
    sequences_per_step=8,
    micro_batch=8,
    steps=900,
    order="epochs",
    save_every=300,
    evaluate_every=300,
    evaluate_tokens=8192,
)
"""The rival of the default recipe, at a size for which two cores take a minute or two, tuned there."""

_hybrid = hybrid_layers(2, full=(1,), sparse="sliding_attention")
HYBRID = replace(DENSE, model=replace(DENSE.model, window=31, full_reach="sequence", **_hybrid))
"""The default recipe at that size: windows, every second layer full, bounded once trained."""


def run_demo(out: Path, *, steps: int = DENSE.steps, vocab_size: int = 2048, held_out_tokens: int = 65_536) -> Path:
    """Prepare, train twice, evaluate, print and write the page; returns the page's path.

    Args:
        out: folder for everything that is made.
        steps: training steps of each model.
        vocab_size: size of the tokenizer.
        held_out_tokens: targets to evaluate on.

    Raises:
        InputError: when the standard library's sources are not on this machine, or for less than one step.
    """
    replace(DENSE, steps=steps).check()
    console = Console()
    console.print("1/4 preparing the standard library's sources", style="bold")
    data = prepare(out / "data", standard_library(vocab_size, held_out_tokens))
    trained: dict[str, Path] = {}
    for number, (label, recipe) in enumerate((("dense", DENSE), ("hybrid", HYBRID)), start=2):
        console.print(f"{number}/4 training: {label}", style="bold")
        trained[label] = train(replace(recipe, data=out / "data", out=out / label, steps=steps))
    console.print(f"4/4 evaluating both at up to {FACTORS[-1]} times the training length", style="bold")
    hybrid = load_model(trained["hybrid"])
    models = {
        "dense": load_model(trained["dense"]),
        "hybrid": hybrid,
        "dense, bounded": load_model(trained["dense"], full_reach=DENSE.sequence_length - 1),
    }
    lengths = [factor * DENSE.sequence_length for factor in FACTORS]
    results = {
        label: sweep(model, data, lengths=lengths, sets=[], tokens=held_out_tokens) for label, model in models.items()
    }
    return _report(out, data, results, hybrid, console)


def _report(
    out: Path,
    data: PreparedData,
    results: dict[str, dict[str, Any]],
    hybrid: PreTrainedModel,
    console: Console,
) -> Path:
    rows = [_row(label, result) for label, result in results.items()]
    lengths = [factor * DENSE.sequence_length for factor in FACTORS]
    console.print(_table(rows, lengths))
    sample = _sample(hybrid, data)
    console.print("\nthe hybrid model writes:", style="bold")
    console.print("".join(sample), markup=False, highlight=False, soft_wrap=True)
    folder = out / "report"
    curves = [Curve(row["label"], lengths, row["perplexities"]) for row in rows]
    patterns = _patterns(hybrid)
    files.write_json(folder / "results.json", results)
    page = write_page(
        folder / "index.html",
        "demo.html.j2",
        "examples.demo",
        headline=_headline(rows),
        corpus=f"the Python {platform.python_version()} standard library",
        trained_at=DENSE.sequence_length,
        targets=results["dense"]["sets"]["stdlib"][str(DENSE.sequence_length)]["targets"],
        extrapolation=inline_svg(extrapolation(curves, DENSE.sequence_length, folder / "extrapolation.svg")),
        distances=inline_svg(distances(patterns, DENSE.sequence_length - 1, folder / "distances.svg")),
        rows=rows,
        lengths=lengths,
        few_keys=min(len(pattern.distances) for pattern in patterns),
        generated=_SAMPLE_TOKENS,
        sample=sample,
        provenance=_provenance(out, data, hybrid),
    )
    console.print(f"\nthe page, its figures and their numbers are in {folder}; open {page}", soft_wrap=True)
    return page


def _patterns(model: PreTrainedModel) -> list[Pattern]:
    layers = range(model.config.num_hidden_layers)
    return [pattern for layer in layers for pattern in model.config.layer_patterns(layer)]


def _row(label: str, result: dict[str, Any]) -> dict[str, Any]:
    values = [row["perplexity"] for row in result["sets"]["stdlib"].values()]
    return {"label": label, "perplexities": values, "changes": [change(value, values[0]) for value in values]}


def _headline(rows: list[dict[str, Any]]) -> str:
    """What the numbers say, whichever way they come out."""
    far = {row["label"]: row["perplexities"][-1] / row["perplexities"][0] - 1 for row in rows}
    dense, hybrid = far["dense"], far["hybrid"]
    factor = FACTORS[-1]
    if dense > 0.05 and hybrid < 0.02:
        too = ", nor is that of dense attention bounded to the training length"
        bounded = too if far["dense, bounded"] < 0.02 else ""
        return (
            f"At {factor} times the training length dense attention's perplexity is {dense:.0%} higher. "
            f"The hybrid's is not{bounded}."
        )
    changes = ", ".join(f"{row['label']} {row['changes'][-1]}" for row in rows[:2])
    return f"Perplexity at {factor} times the training length: {changes}"


def _table(rows: list[dict[str, Any]], lengths: list[int]) -> Table:
    title = f"perplexity on held-out files, trained at {DENSE.sequence_length} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("length", justify="right")
    for row in rows:
        table.add_column(row["label"], justify="right")
        table.add_column("change", justify="right")
    for index, length in enumerate(lengths):
        cells = [cell for row in rows for cell in (f"{row['perplexities'][index]:.2f}", row["changes"][index])]
        table.add_row(f"{length:,} ({FACTORS[index]}×)", *cells)
    return table


def _sample(model: PreTrainedModel, data: PreparedData) -> tuple[str, str]:
    """What the model writes within its training length, and what it writes beyond."""
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    prompt = torch.tensor([[data.separator, *tokenizer.encode(_PROMPT, add_special_tokens=False)]], device=model.device)
    logging.set_verbosity_error()  # it would warn that the text outgrows the training length, which is the point
    torch.manual_seed(0)
    tokens = model.generate(  # pyright: ignore[reportCallIssue]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=0.7,
        min_new_tokens=_SAMPLE_TOKENS,
        max_new_tokens=_SAMPLE_TOKENS,
        pad_token_id=data.separator,
    )
    within, beyond = tokens[0, : DENSE.sequence_length], tokens[0, DENSE.sequence_length :]
    return tokenizer.decode(within, skip_special_tokens=True), tokenizer.decode(beyond, skip_special_tokens=True)


def _provenance(out: Path, data: PreparedData, model: PreTrainedModel) -> dict[str, str]:
    recipe = files.read_json(out / "hybrid" / "recipe.json")
    tokens = recipe["steps"] * recipe["sequences_per_step"] * recipe["sequence_length"]
    return {
        "parameters": f"{quantity(model.num_parameters())} in each model",
        "recipe": "the project's default for a GPU, smaller: Muon and AdamW, squared ReLU, query and key norms",
        "training": f"{quantity(tokens)} tokens: {recipe['steps']} steps of {recipe['sequences_per_step']} sequences "
        f"of {recipe['sequence_length']}, the same sequences in the same order for both",
        "seeds": f"weights {recipe['init_seed']}, data {recipe['data_seed']}",
        "text": f"{quantity(len(data.train))} training tokens; whole files held out",
        "data fingerprint": data.fingerprint,
        "device": machine.device_name(),
        "versions": ", ".join(f"{name} {number}" for name, number in machine.versions().items()),
    }
