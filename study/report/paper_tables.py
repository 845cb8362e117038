"""The paper's tables of language models, ours beside the published figures."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from study.report.findings import percent, real_minus
from study.report.results import PLAIN, Group, Model, paper, papers_gain
from study.report.tables import ABSENT, Table, against

_PAPER_SETS = ("fineweb_edu", "wikipedia")


def papers_tables(group: Group) -> list[Table]:
    """The paper's tables of language models, ours beside the published figures."""
    return [_matrix(group), extrapolation(group), _last_positions(group), positions(group), _seeds(group)]


def _matrix(group: Group) -> Table:
    published = {_key(row): row["perplexity"] for row in paper()["matrix"]}
    papers_dense = paper()["extrapolation_perplexity"]["dense"]["1024"]
    dense, at = group.get("dense"), group.trained_at
    ours = {model.paper_key: model for model in group.models if model.paper_key}
    ranks = _ranks({key: model.loss(at) for key, model in ours.items() if key != "dense"})
    theirs = _ranks({key: _log_mean(row) for key, row in published.items() if key in ours})
    rows = [_dense_row(group, dense, papers_dense)]
    for key in sorted(published, key=lambda key: _log_mean(published[key])):
        model, row = ours.get(key), published[key]
        ratio = math.exp(_log_mean(row) - _log_mean(papers_dense))
        cells = (ABSENT, *("–" for _ in group.sets[1:]), "–", "–", "–")
        if model is not None:
            losses = model.losses(at)
            cells = (
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                "–" if dense is None else f"{math.exp(model.loss(at) - dense.loss(at)):.3f}",
                _against_linear(model, group),
                str(ranks[key]),
            )
        rows.append(
            (
                _words(key),
                *cells,
                f"{row['fineweb_edu']:.2f}",
                f"{row['wikipedia']:.2f}",
                f"{ratio:.3f}",
                str(theirs.get(key, "–")),
            )
        )
    return Table(
        "Table 1. Perplexity at the training length",
        "In the paper's order, best first. Text and tokenizer differ from the paper's, so compare ratios to dense "
        "(first seeds, geometric means over the sets; the paper gives dense on two) and ranks (among the models run "
        "here), not perplexities. The column σ gives the distance to linear at the same window in standard deviations "
        "over seeds." + _agreement(ranks, theirs),
        ("model", *group.sets, "÷ dense", "to linear, σ", "rank", "paper: FineWeb-Edu", "Wikipedia", "÷ dense", "rank"),
        tuple(rows),
    )


def _agreement(ranks: dict[str, int], theirs: dict[str, int]) -> str:
    """How well two orders of the same models agree; nothing for fewer than five."""
    if len(ranks) < 5:
        return ""
    agreement = statistics.correlation([ranks[key] for key in ranks], [theirs[key] for key in ranks])
    words = real_minus(f"{agreement:.2f}")
    return f" Rank correlation of our order with the paper's over these {len(ranks)} models: {words}."


def _dense_row(group: Group, dense: Model | None, published: dict[str, float]) -> tuple[str, ...]:
    cells = (ABSENT, *("–" for _ in group.sets[1:]), "–")
    if dense is not None:
        losses = dense.losses(group.trained_at)
        cells = (*(f"{math.exp(losses[name]):.2f}" for name in group.sets), "1")
    return ("dense", *cells, "–", "–", f"{published['fineweb_edu']:.2f}", f"{published['wikipedia']:.2f}", "1", "–")


def extrapolation(group: Group) -> Table:
    """Every model in longer and longer windows, best at the longest first."""
    published = paper()["extrapolation_perplexity"]
    rows = []
    order = sorted(group.models, key=lambda model: model.loss(group.lengths[-1]))
    for model in order:
        row = published.get(model.paper_key or "", {})
        change = {int(length): _log_mean(one) - _log_mean(row["1024"]) for length, one in row.items()}
        rows.append(
            (*_lengths(model.label, model, group), *(percent(change[n]) if change else "–" for n in (2048, 4096)))
        )
        rows += [(*_lengths(model.label_of_tried(way), model, group, way), "–", "–") for way in model.ways()]
    factors = [length // group.trained_at for length in group.lengths]
    return Table(
        "Table 2. Past the training length",
        f"Perplexity (geometric mean over the sets) at {group.trained_at:,} tokens, and its change in longer windows "
        "of the same text; best at the longest first. RoPE is plain unless a scaling is named, which is set for each "
        "length anew. Bounded: full layers see the last so many tokens alone. A tenth more: a copy trained on for a "
        "tenth of the steps in windows so long, with a larger RoPE base. The last two columns are the paper's "
        "changes (its power-of-two rungs grew with the evaluation length; ours stay those of training).",
        ("model", *(f"{factor}×" for factor in factors), "paper: 2×", "4×"),
        tuple(rows),
    )


def _last_positions(group: Group) -> Table:
    order = sorted(group.models, key=lambda model: model.last(group.lengths[-1]))
    return Table(
        "Table 2, the other convention. The last 256 positions of every window",
        "Perplexity (geometric mean over the sets) where context is longest. Windows of different lengths end at "
        "different tokens, so compare down a column, not along a row. RoPE is plain, full layers are "
        "unbounded.",
        ("model", *(f"{length // group.trained_at}×" for length in group.lengths)),
        tuple((model.label, *(f"{math.exp(model.last(n)):.2f}" for n in group.lengths)) for model in order),
    )


def _lengths(label: str, model: Model, group: Group, way: str = PLAIN) -> tuple[str, ...]:
    first = model.loss(group.trained_at, way)
    changes = [percent(model.loss(length, way) - first) for length in group.lengths if length > group.trained_at]
    return (label, f"{math.exp(first):.2f}", *changes)


def positions(group: Group) -> Table:
    """What the stagger gains over fixed distances in each part of the training window, beside the paper's gain."""
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    rows: list[tuple[str, ...]] = [
        (model.label, *(f"{loss:.3f}" for loss in model.bins(group.trained_at))) for model in (fixed, linear) if model
    ]
    ours = fixed.gaps_by_part(linear, group.trained_at) if fixed and linear else []
    rows.append(("gain", *(f"{gain:.3f}" for gain in ours)) if ours else ("gain", ABSENT, *("–" for _ in range(7))))
    rows.append(("paper: gain", *(f"{gain:.3f}" for gain in papers_gain())))
    return Table(
        "Table 3. Loss by position",
        "Nats, the mean over the sets, in eight equal parts of the training window; gain: fixed minus linear, W = 12.",
        ("part of the window", *(str(part) for part in range(1, 9))),
        tuple(rows),
    )


def _seeds(group: Group) -> Table:
    published = {_words(f"{key}/w12"): values for key, values in paper()["seeds_w12_fineweb_edu"].items()}
    linear, dense = group.get("linear-w12"), group.get("dense")
    rows, seen = [], set()
    for model in group.models:
        losses = model.seed_losses(group.trained_at)
        theirs = published.get(_words(model.paper_key or ""))
        seen.add(_words(model.paper_key or ""))
        if len(losses) < 2 and theirs is None:
            continue
        spread = f"{100 * statistics.stdev(losses):.2f} %" if len(losses) > 1 else ABSENT
        rows.append(
            (
                model.label,
                " ".join(f"{math.exp(loss):.2f}" for loss in losses),
                spread,
                against(model, dense, group)[0],
                against(model, linear, group)[1],
                *_papers_spread(theirs),
            )
        )
    rows += [
        (words, ABSENT, "–", "–", "–", *_papers_spread(values))
        for words, values in published.items()
        if words not in seen
    ]
    return Table(
        "Table 4. Seeds",
        "Perplexity (geometric mean over the sets) at the training length for each seed; here a seed sets the weights "
        "and the order of data, in the paper the order alone. Against dense and to linear, W = 12: the mean over the "
        "seeds that both have, the latter in σ pooled over the two.",
        ("model", "perplexities", "σ", "against dense", "to linear, σ", "paper: FineWeb-Edu", "σ"),
        tuple(rows),
    )


def _papers_spread(values: Sequence[float] | None) -> tuple[str, str]:
    if values is None:
        return "–", "–"
    return " ".join(
        f"{value:.2f}" for value in values
    ), f"{100 * statistics.stdev(values) / statistics.mean(values):.2f} %"


def _against_linear(model: Model, group: Group) -> str:
    if model.recipe["base"] != "fibonacci":
        return "–"
    return against(model, group.get(f"linear-w{model.recipe['window']}"), group)[1]


def _ranks(losses: dict[Any, float]) -> dict[Any, int]:
    return {key: rank for rank, key in enumerate(sorted(losses, key=lambda key: losses[key]), start=1)}


def _log_mean(perplexities: dict[str, float]) -> float:
    return statistics.mean(math.log(perplexities[name]) for name in _PAPER_SETS)


def _key(row: dict[str, Any]) -> str:
    return f"{row['base']}/{row['schedule']}/w{row['window']}"


def _words(key: str) -> str:
    """A published key as `Model.label` says it."""
    base, _, rest = key.partition("/")
    schedule, _, window = rest.partition("/")
    if not window:
        return key
    return f"{'power-of-two ' if base == 'power_of_two' else ''}{schedule}, W = {window[1:]}"
