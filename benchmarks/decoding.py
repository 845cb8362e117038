"""`python -m benchmarks decoding`: time and memory of a decoded token over the length of its context."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError

Model = Literal["stagger", "hybrid", "hybrid-unbounded", "converted", "converted-wide", "converted-unbounded", "dense"]


@dataclass(frozen=True)
class Arguments:
    """Time decoding: the operator by itself, and models with a static cache, sparse, hybrid and dense.

    On a GPU bfloat16, compiled whole, the step replayed as a CUDA graph; on a CPU float32, as it is.
    """

    contexts: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    """Tokens before the one that is timed."""
    batches: tuple[int, ...] = (1,)
    """Sequences of a step; the figure is of the first."""
    models: tuple[Model, ...] = get_args(Model)
    """Which models, of the paper's 60 M-parameter shape: its linear stagger, the default recipe, the dense one
    converted with four of its 16 layers full, or so with windows of 257 keys, two before they are bounded, dense."""
    prompts: tuple[int, ...] = ()
    """Tokens of a prompt whose reading is timed, too, of one sequence: until the logits of the next token."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; the GPU when there is one."""
    out: Path = Path("bench")
    """Folder for decoding.json, decoding.csv and the figure."""


def run(arguments: list[str]) -> None:
    """Time, print a line for each row, write the files."""
    chosen = parse(Arguments, arguments, "python -m benchmarks decoding")
    if min(*chosen.prompts, *chosen.contexts, *chosen.batches, 1) < 1 or not (
        chosen.contexts and chosen.batches and chosen.models
    ):
        raise InputError(
            f"contexts {chosen.contexts}, batches {chosen.batches}, prompts {chosen.prompts}, models {chosen.models}: "
            "numbers must be at least 1, and there must be a context, a batch and a model"
        )
    from benchmarks import decoders
    from benchmarks.environment import device_of, environment, heading

    device = device_of(chosen.device)
    print(f"{heading()}; caches are filled with random states, no prompt is run", flush=True)
    result: dict[str, Any] = {"environment": environment(), "prompts": [], "operator": [], "models": []}
    for row in decoders.prompts(chosen.models, chosen.prompts, device):
        result["prompts"].append(row)
        print(f"{row['model']}, a prompt of {row['prompt']:,} tokens: {row['median'] / 1e3:,.2f} ms", flush=True)
        files.write_json(chosen.out / "decoding.json", result)
    contexts = sorted(set(chosen.contexts))
    for batch in chosen.batches:
        for row in decoders.operator(contexts, batch, device):
            result["operator"].append(row)
            where = f"{row['context']:,} tokens, {batch} at once"
            print(f"operator, W = {row['window']}, {where}: {row['median']:,.1f} µs", flush=True)
        for row in decoders.models(chosen.models, contexts, batch, device):
            result["models"].append(row)
            print(decoders.line_of(row), flush=True)
            files.write_json(chosen.out / "decoding.json", result)
    drawn = [row for row in result["models"] if row["batch"] == chosen.batches[0]]
    figure = decoders.draw(drawn, chosen.out / "decoding.svg")
    print(f"written to {chosen.out / 'decoding.json'}, {figure.with_suffix('.csv')} and {figure}")
