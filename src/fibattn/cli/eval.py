"""`fibattn eval MODEL`: perplexity by length, by position and where text repeats itself; bits per byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fibattn import files
from fibattn.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Evaluate a trained model on held-out text, at its training length and beyond."""

    model: Annotated[Path, tyro.conf.Positional]
    """A model folder, a finished run, or a checkpoint."""
    data: Path
    """The prepared folder with the held-out sets."""
    lengths: tuple[int, ...] = ()
    """Of the sequences; when left out 1, 2, 4 and 8 times the training length, as far as the held-out sets go."""
    sets: tuple[str, ...] = ()
    """Held-out sets; all when left out."""
    tokens: int = 1_048_576
    """Targets of each set at most."""
    batch_tokens: int = 32_768
    """Tokens of a forward pass; fewer need less memory."""
    full_reach: int | Literal["saved"] | None = "saved"
    """Let full-attention layers look back only so far, None to the beginning; left out: as the model was saved."""
    context_parallel: int = 1
    """Over how many GPUs each sequence is cut, for those too long for one; the processes of torchrun share the rest."""
    out: Path | None = None
    """Where the JSON goes. Left out: into the run, where the model is of one. A whole evaluation (without --lengths,
    --sets, --tokens and --full-reach) goes into the card, too; any other has a file of its own."""


def run(arguments: list[str]) -> None:
    """Evaluate, print a table for each held-out set, write the JSON."""
    chosen = parse(Arguments, arguments, "fibattn eval")
    import torch
    from accelerate import PartialState
    from rich.console import Console

    from fibattn.data.prepared import PreparedData
    from fibattn.data.tokenizer import check_same_vocabulary
    from fibattn.errors import InputError
    from fibattn.evaluation.positions import by_position, positions_table
    from fibattn.evaluation.repeats import FREQUENT, frequent_pairs
    from fibattn.evaluation.sweep import default_output, shared_targets, sweep, tables, usual_lengths
    from fibattn.model.loading import find_model, load_bounded
    from fibattn.parallel.sharing import Sharing
    from fibattn.training.card import add_results

    if any(length < 1 for length in chosen.lengths) or chosen.tokens < 1 or chosen.batch_tokens < 1:
        values = f"lengths {chosen.lengths}, tokens {chosen.tokens}, batch_tokens {chosen.batch_tokens}"
        raise InputError(f"{values}: each must be at least 1")
    state = PartialState(cpu=not torch.cuda.is_available())
    folder, data = find_model(chosen.model), PreparedData.open(chosen.data)
    ways = _ways(chosen, folder, data.fingerprint)
    out = chosen.out or default_output(folder, ways)
    if out is not None:
        files.check_writable(out)
    check_same_vocabulary(folder, data)
    model = load_bounded(folder, chosen.full_reach)
    trained_at = model.config.get_text_config().max_position_embeddings
    lengths = sorted(set(chosen.lengths)) or usual_lengths(data, trained_at, list(chosen.sets), chosen.tokens)
    sharing = Sharing(model.base_model, chosen.context_parallel)
    if odd := [length for length in lengths if length % sharing.cut]:
        raise InputError(f"sequences of {odd[0]} do not divide by context_parallel {sharing.cut}; change one of them")
    limits: dict[str, Any] = {"tokens": chosen.tokens, "batch_tokens": chosen.batch_tokens}
    limits |= {"quiet": not state.is_main_process, "sharing": sharing}
    targets = shared_targets(data, lengths=lengths, sets=list(chosen.sets), tokens=chosen.tokens)
    frequent = frequent_pairs(data, targets, quiet=not state.is_main_process)
    result = sweep(model, data, lengths=lengths, sets=list(targets), frequent=frequent, **limits)
    positions = by_position(model, data, length=max(lengths), sets=list(targets), **limits)
    state.destroy_process_group()
    if not state.is_main_process:
        return
    result |= {"frequent_above": FREQUENT, "positions": positions, "model": str(folder)}
    if (bound := getattr(model.config, "full_reach", None)) is not None:
        result["full_reach"] = bound
    console = Console()
    for table in (*tables(result), *([positions_table(positions)] if positions else [])):
        console.print(table)
    if out is not None:
        files.write_json(out, result)
    in_card = chosen.out is None and not ways and add_results(folder, result)
    kept = f"{'the card has the perplexities' if in_card else 'not written'}, --out FILE keeps all"
    console.print(f"convention: {result['convention']}; {f'written to {out}' if out else kept}", soft_wrap=True)


def _ways(chosen: Arguments, model: Path, data: str) -> str:
    """In what an evaluation differs from a whole one, as a part of a file's name; empty where in nothing."""
    inputs = model.resolve().parent / "inputs.json"
    own = files.read_json(inputs).get("data_fingerprint") if inputs.exists() else None
    given = {
        "data": "" if own in (None, data) else data[:8],
        "full-reach": "" if chosen.full_reach == "saved" else str(chosen.full_reach),
        "lengths": "-".join(map(str, sorted(set(chosen.lengths)))),
        "sets": "-".join(sorted(chosen.sets)),
        "tokens": "" if chosen.tokens == Arguments.tokens else str(chosen.tokens),
    }
    return "".join(f"-{name}-{value}" for name, value in given.items() if value)
