"""The length sweep: a model at one, two, four, … times its training length, on every held-out set."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel

from fibattn.data.prepared import PreparedData
from fibattn.data.sequences import held_out_sequences
from fibattn.errors import InputError, suggestion
from fibattn.evaluation.loss import LAST, PositionLoss, token_losses
from fibattn.evaluation.repeats import repeats, repeats_table

CONVENTION = "disjoint sequences, every position; the same tokens at every length"


def sweep(
    model: PreTrainedModel,
    data: PreparedData,
    *,
    lengths: list[int],
    sets: list[str],
    tokens: int = 1_048_576,
    frequent: np.ndarray | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Evaluate on the same tokens at every length; the result is plain JSON values.

    Args:
        model: its vocabulary must be that of `data`.
        lengths: sequence lengths; the set is cut to whole sequences of each, so that all see the same targets.
        sets: names of held-out sets, all of them when empty.
        tokens: targets of each set at most.
        frequent: where given, from `frequent_pairs` over the same targets, rows have what `repeats` makes of them.
        how: batch_tokens, quiet and sharing, as in `token_losses`.

    Raises:
        InputError: for an unknown set, a vocabulary of another size, or a set shorter than what sequences of all
            lengths have in common.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if vocabulary < data.vocab_size:  # more rows than ids are padding
        raise InputError(
            f"the model has {vocabulary} token ids and the data {data.vocab_size}; use the data it was trained on"
        )
    results: dict[str, Any] = {}
    for name, limit in shared_targets(data, lengths=lengths, sets=sets, tokens=tokens).items():
        results[name], stream = {}, data.validation[name]
        size = int(stream.byte_counts(1, limit, data.token_bytes).sum())
        for length in lengths:
            sequences, label = held_out_sequences(stream, length, limit), f"{name} at {length}"
            losses = token_losses(model, sequences, label=label, **how)
            loss = PositionLoss(losses, size)
            results[name][str(length)] = row = {
                "targets": limit,
                "nll": loss.nll(),
                "perplexity": loss.perplexity(),
                "bits_per_byte": loss.bits_per_byte,
                "bins": loss.bins(),
                "last_256_perplexity": loss.perplexity(max(length - LAST, 0)),
            }
            if frequent is not None:
                row["repeats"] = repeats(losses, sequences, frequent, data.vocab_size)
    return {
        "trained_at": model.config.get_text_config().max_position_embeddings,
        "convention": CONVENTION,
        "data_fingerprint": data.fingerprint,
        "sets": results,
    }


def shared_targets(data: PreparedData, *, lengths: list[int], sets: list[str], tokens: int) -> dict[str, int]:
    """How many targets of each held-out set sequences of every length can have in common: whole sequences of each.

    `sets` and `tokens` as in `sweep`, which raises the same.
    """
    if not data.validation:
        raise InputError(f"{data.folder} has no held-out set; prepare the text again with --held-out or --val")
    for name in sets:
        if name not in data.validation:
            raise InputError(f"there is no held-out set {name!r}: {suggestion(name, data.validation, 'held-out sets')}")
    shared, longest, common = {}, max(lengths), math.lcm(*lengths)
    for name in sets or data.validation:
        held_out = len(data.validation[name])
        most = min(tokens, held_out - 1)
        shared[name] = most // common * common
        if longest <= most < common:
            raise InputError(
                f"sequences of {', '.join(map(str, sorted(lengths)))} end together only every {common:,} tokens, and "
                f"the held-out set {name!r} has {held_out:,} (limit {tokens:,}); give lengths that divide one another"
            )
        if shared[name] < 1:
            raise InputError(
                f"the held-out set {name!r} has {held_out} tokens (limit {tokens}), fewer than one sequence of "
                f"{longest}; evaluate shorter lengths, raise the limit, or hold out more text"
            )
    return shared


def usual_lengths(data: PreparedData, trained_at: int, sets: list[str], tokens: int) -> list[int]:
    """1, 2, 4 and 8 times the training length, as far as all `sets` have so long a sequence; `sets` as in `sweep`."""
    held_out = [len(one) for name, one in data.validation.items() if name in (sets or data.validation)]
    most = min(tokens, min(held_out, default=0) - 1)
    return [trained_at, *(length for factor in (2, 4, 8) if (length := trained_at * factor) <= most)]


def tables(result: dict[str, Any]) -> list[Table]:
    """The result as tables for people: of each held-out set the length sweep, the loss over the sequence, repeats."""
    made = []
    for name, lengths in result["sets"].items():
        table = Table(title=f"{name}: {next(iter(lengths.values()))['targets']:,} tokens", title_justify="left")
        for heading in ("length", "perplexity", "change", "bits/byte", f"last {LAST}"):
            table.add_column(heading, justify="right")
        base = lengths.get(str(result["trained_at"]), next(iter(lengths.values())))["perplexity"]
        for length, row in lengths.items():
            table.add_row(
                f"{int(length):,} ({int(length) / result['trained_at']:g}×)",
                f"{row['perplexity']:.2f}",
                change(row["perplexity"], base),
                f"{row['bits_per_byte']:.4f}",
                f"{row['last_256_perplexity']:.2f}",
            )
        made += [table, _bins(name, lengths)]
        if all("repeats" in row for row in lengths.values()):
            made.append(repeats_table(name, lengths))
    return made


def _bins(name: str, lengths: dict[str, Any]) -> Table:
    count = max(len(row["bins"]) for row in lengths.values())
    table = Table(title=f"{name}: loss in nats, from the first to the last part of a sequence", title_justify="left")
    for heading in ("length", *(f"{part + 1}/{count}" for part in range(count))):
        table.add_column(heading, justify="right")
    for length, row in lengths.items():
        if len(row["bins"]) == count:  # sequences of fewer tokens have no such parts
            table.add_row(f"{int(length):,}", *(f"{value:.3f}" for value in row["bins"]))
    return table


def change(value: float, base: float) -> str:
    """How much `value` differs from `base`, in per cent."""
    return "" if value == base else f"{100 * (value / base - 1):+.1f} %"


def default_output(model: Path, ways: str = "") -> Path | None:
    """Where an evaluation goes unless told: into the run of the model or checkpoint; None where there is none.

    `ways` is what sets it apart from a whole evaluation, which it must not replace.
    """
    run, name = model.resolve().parent, model.resolve().name
    if not (run / "recipe.json").exists():
        return None
    return run / f"evaluation{'' if name == 'model' else f'-{name}'}{ways}.json"
