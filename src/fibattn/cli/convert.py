"""`fibattn convert MODEL OUT`: a Llama, Qwen, Gemma, … with this attention, as a folder that whoever has it loads."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.pattern import Base

_KEEP = "layers by number (7,15), every n-th (every:4), or as many measured on a text (auto:4)"


@dataclass(frozen=True)
class Arguments:
    """Convert a decoder to fixed-offset attention, or one that was converted back; weights stay as they are."""

    model: Annotated[str, tyro.conf.Positional]
    """What to convert: a model's folder, or a name of the Hub."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not be there yet."""
    window: int | None = None
    """Distances 0 … WINDOW are attended: window + 1 keys."""
    rungs: int | None = None
    """How many Fibonacci distances there are before scaling, of which those beyond the window count; 0 for none. 15
    when left out, none beside blocks; of powers of two there are as many as training was long for."""
    blocks: int | None = None
    """In place of distances: how many blocks of keys each query chooses beyond the window, by what is in them."""
    block_size: Literal[16, 32, 64, 128] = 16
    """Keys of a block."""
    block_reach: int | None = None
    """How far back a block may begin; as far as in training, 64 blocks at most, when left out."""
    block_anchor: bool = True
    """Let one of the blocks always be the first of the text, where pretrained models leave much attention."""
    base: Base = "fibonacci"
    """The distances before scaling: Fibonacci numbers or powers of two."""
    schedule: Literal["fixed", "linear", "coprime"] = "linear"
    """How the scale of the distances goes over the layers."""
    max_offset: int | Literal["sequence"] | None = "sequence"
    """Drop rungs farther than this; sequence: those that the model was never trained at. None keeps all."""
    keep: str = ""
    """Layers that keep their own attention: by number (7,15), every n-th (every:4), or as many measured on a text
    (auto:4), which takes a pass over it for each layer and place. Without it all are converted."""
    full_reach: int | Literal["sequence"] | None = None
    """How far back those layers look; sequence: as far as in training, so that it runs for ever at constant cost.
    None: as far as they did."""
    text: tuple[Path, ...] = ()
    """For --keep auto: files of text like the model's use (.txt, .jsonl, .parquet, …)."""
    tokens: int = 65_536
    """For --keep auto: how much of the text is measured."""
    sequence_length: int = 2048
    """For --keep auto: tokens of a sequence, at most as many as the model was trained at."""
    restore: bool = False
    """The way back: write the dense model that a converted one was made from, with its present weights."""


def run(arguments: list[str]) -> None:
    """Convert, measure where that is asked for, and write the folder."""
    chosen = parse(Arguments, arguments, "fibattn convert")
    _check(chosen)
    from fibattn.model.conversion import convert, restore
    from fibattn.training.converting import find_source, load_source, load_tokenizer_of, write_folder

    source = find_source(chosen.model)
    model: Any = load_source(source)
    tokenizer = load_tokenizer_of(source)
    if tokenizer is None:
        print(f"{chosen.model} has no tokenizer; the folder has none, either")
    if chosen.restore:
        dense = restore(model)
        write_folder(chosen.out, dense, tokenizer, source=chosen.model)
        print(f"{chosen.out} is a {type(dense).__name__} again")
        return
    farthest = model.base_model.config.max_position_embeddings - 1
    names = ("window", "rungs", "base", "schedule", "blocks", "block_size", "block_reach", "block_anchor")
    pattern = {name: getattr(chosen, name) for name in names}
    beyond = farthest if chosen.blocks is None else None  # blocks have a reach of their own
    pattern["max_offset"] = beyond if chosen.max_offset == "sequence" else chosen.max_offset
    full_reach = farthest if chosen.full_reach == "sequence" else chosen.full_reach
    kept, placement = _kept(chosen, model, tokenizer, pattern, full_reach)
    convert(model, **pattern, keep_layers=kept, full_reach=full_reach)
    write_folder(chosen.out, model, tokenizer, source=chosen.model, placement=placement)
    print(f"{chosen.out} holds the converted model; try it: {shlex.join(['fibattn', 'sample', str(chosen.out)])} …")


def _check(chosen: Arguments) -> None:
    """Refuse what cannot be, before the model is loaded."""
    if chosen.out.exists():
        raise InputError(f"{chosen.out} is there already; give another place, or move it away")
    if chosen.restore:
        if chosen != Arguments(chosen.model, chosen.out, restore=True):
            raise InputError("--restore goes back by itself; leave the other flags out")
    elif chosen.window is None:
        raise InputError("give --window to convert a model (128, for example), or --restore alone to go back")
    names, auto = ("text", "tokens", "sequence_length"), chosen.keep.startswith("auto:")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(chosen, name) != getattr(Arguments, name)]
    if (given and not auto) or (auto and not chosen.text):
        said = "--text is not" if auto else f"{given[0]} is given"
        raise InputError(f"--keep is {chosen.keep!r}, {said}; the two go together: --keep auto:4 --text FILE")
    if chosen.tokens < 1 or chosen.sequence_length < 1:
        raise InputError(f"tokens {chosen.tokens}, sequence_length {chosen.sequence_length}: each must be at least 1")


def _kept(
    chosen: Arguments, model: Any, tokenizer: Any, pattern: dict[str, Any], full_reach: int | None
) -> tuple[list[int], dict[str, Any] | None]:
    """The layers that keep their own attention, and what was found where they are measured."""
    depth = model.base_model.config.num_hidden_layers
    how, _, number = chosen.keep.partition(":")
    if how == "auto" and number.isdecimal():
        found = _measured(chosen, model, tokenizer, pattern, full_reach, int(number))
        return sorted(step["layer"] for step in found["search"]), found
    if how == "every" and number.isdecimal() and 0 < int(number) <= depth:
        return list(range(int(number) - 1, depth, int(number))), None
    numbers = chosen.keep.split(",") if chosen.keep else []
    if not all(one.strip().isdecimal() for one in numbers):
        raise InputError(f"--keep is {chosen.keep!r}; expected, of {depth} layers, {_KEEP}")
    return [int(one) for one in numbers], None


def _measured(
    chosen: Arguments, model: Any, tokenizer: Any, pattern: dict[str, Any], full_reach: int | None, count: int
) -> dict[str, Any]:
    """What the search for `count` layers finds; shown as a table."""
    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from fibattn.data.sequences import held_out_sequences, read_tokens
    from fibattn.evaluation.placement import search
    from fibattn.training.card import measured

    if tokenizer is None:
        raise InputError(f"--keep is {chosen.keep!r}, and {chosen.model} has no tokenizer to read a text with")
    length = min(chosen.sequence_length, model.base_model.config.max_position_embeddings)
    if pattern["window"] >= length - 1:
        raise InputError(
            f"--window is {pattern['window']}, which covers the sequences of {length} tokens that would be measured; "
            "give a smaller window or a longer --sequence-length"
        )
    text = held_out_sequences(read_tokens(chosen.text, tokenizer, chosen.tokens + 1), length, chosen.tokens)
    found = search(model.to("cuda" if torch.cuda.is_available() else "cpu"), pattern, text, count, full_reach)
    Console().print(Markdown(measured(found)))
    return {**found, "text": [str(path) for path in chosen.text]}
