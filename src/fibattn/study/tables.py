"""The report's tables: the paper's beside ours, then what goes past the paper. Plain cells, for HTML and Markdown."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fibattn.progress import duration, quantity
from fibattn.study.findings import percent
from fibattn.study.results import PLAIN, Group, Model, Results, in_words, paper, ways

ABSENT = "not run"
_PAPER_SETS = ("fineweb_edu", "wikipedia")


@dataclass(frozen=True)
class Table:
    """A table and what to know when reading it."""

    title: str
    note: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in GitHub's Markdown; numbers to the right."""
        rule = "| --- |" + " ---: |" * (len(self.heading) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (self.heading, *self.rows)]
        return "\n".join([f"### {self.title}", "", self.note, "", lines[0], rule, *lines[1:], ""])


def papers_tables(group: Group) -> list[Table]:
    """The paper's tables of language models, ours beside the published figures."""
    return [_matrix(group), _extrapolation(group), _last_positions(group), _positions(group), _seeds(group)]


def beyond_tables(group: Group) -> list[Table]:
    """What the paper does not have: its models past the paper's, and what context past the training length is worth."""
    chosen = [model for model in group.models if not model.is_papers or model.name == "linear-w12"]
    tables = (_models(group, chosen, "Models past the paper"), _far_context(group))
    return [table for table in tables if table]


def other_budget(group: Group) -> list[Table]:
    """Tables for a group of runs that the main tables are not about."""
    at = f"at {quantity(group.tokens)} training tokens"
    extrapolation = _extrapolation(group)
    return [
        _models(group, group.models, f"Models {at}"),
        replace(extrapolation, title=f"Past the training length, {at}"),
    ]


def _models(group: Group, models: Sequence[Model], title: str) -> Table:
    dense, longest = group.get("dense"), group.lengths[-1]
    rows = []
    for model in sorted(models, key=lambda one: one.loss(group.trained_at)):
        losses = model.losses(group.trained_at)
        gap = None if dense is None or model is dense else model.gap(dense, group.trained_at)
        rows.append(
            (
                model.label,
                f"{model.first['model']['keys']:.0f}",
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                "–" if gap is None else percent(gap),
                "–" if gap is None or dense is None else _in_sigmas(gap, group.sigma(model, dense)),
                "–" if dense is None or model is dense else str(len(model.beside(dense))),
                percent(model.loss(longest) - model.loss(group.trained_at)),
            )
        )
    return Table(
        title,
        f"Perplexity at {group.trained_at:,} tokens on each held-out set, first seed, best first; data "
        f"{group.data_fingerprint[:12]}. Keys: what a query reads at that length, the mean over positions and layers. "
        "Against dense: the mean over the seeds that both have, so many. σ: the same in standard deviations over the "
        "seeds of one model, pooled over the two; a difference of two runs has √2 of that.",
        (
            "model",
            "keys",
            *group.sets,
            "against dense",
            "σ",
            "seeds",
            f"change at {longest // group.trained_at}×",
        ),
        tuple(rows),
    )


def _far_context(group: Group) -> Table | None:
    """What the text past the training length is worth, against a model that does not see it; None without one."""
    windows = [one for one in group.models if one.recipe["attention"] == "sliding" and not one.recipe["full_layers"]]
    if not windows:
        return None
    control, longest = max(windows, key=lambda one: one.recipe["window"]), group.lengths[-1]
    rows = []
    for model in group.models:
        near, far = (model.gaps_by_part(control, length) for length in (group.trained_at, longest))
        if model is not control and not model.is_papers and near:
            cells = (f"{gap:+.3f}".replace("-", "−") for gap in (near[-1], *far))
            rows.append((far[-1], (model.label, *cells)))
    factor = longest // group.trained_at
    return Table(
        f"Far context: against {control.label}, by part of a window of {longest:,}",
        f"Nats, the mean over the sets, less than zero is better. A longer window has fewer first tokens without "
        f"context, which helps every model, so a change at {factor}× says little of what far text is worth. Beside a "
        f"model that looks no farther than its window at the same tokens, it shows. First the last part of a window of "
        f"{group.trained_at:,}.",
        ("model", f"last at {group.trained_at:,}", *(f"{part}/8" for part in range(1, 9))),
        tuple(row for _, row in sorted(rows)),
    )


def asked_tables(groups: Sequence[Group]) -> list[Table]:
    """What every run was asked besides text; what no run was asked is left out."""
    tables = (
        copying_table(groups),
        _forced_choice(groups, "ruler", "hops", "RULER, variable tracking", "ruler_vt"),
        _forced_choice(groups, "lego", "length", "LEGO over Z/2", "lego"),
    )
    return [table for table in tables if table]


def _forced_choice(groups: Sequence[Group], task: str, sizes: str, title: str, published: str) -> Table | None:
    """How often, and by how much, every run prefers the right answer; None where none was asked."""
    runs = [
        (model.label, group.tokens, run)
        for group in groups
        for model in group.models
        for run in model.runs
        if run.get(task)
    ]
    if not runs:
        return None
    asked = runs[0][2][task]
    rows = [
        (
            label,
            quantity(tokens),
            str(run["seed"]),
            *(f"{row['accuracy']:.2f}, {row['margin']:+.2f} ± {row['margin_error'] or 0:.2f}" for row in run[task]),
        )
        for label, tokens, run in runs
    ]
    chances = " and ".join(dict.fromkeys(f"{row['chance']:.2f}" for row in asked))
    return Table(
        title,
        f"Forced choice among the values in the text, {asked[0]['items']} items: accuracy (chance {chances}), and by "
        "how many nats the right answer is ahead of the best wrong one, with its standard error. "
        f"The paper: {paper()['auxiliary'][published]}. Runs from before this was measured are left out.",
        ("model", "training tokens", "seed", *(f"{sizes} {row[sizes]}" for row in asked)),
        tuple(rows),
    )


def copying_table(groups: Sequence[Group]) -> Table | None:
    """How well every run copies; None where none was asked."""
    runs = [
        (model.label, group.tokens, run)
        for group in groups
        for model in group.models
        for run in model.runs
        if run.get("copying")
    ]
    if not runs:
        return None
    distances = list(runs[0][2]["copying"])
    rows = [
        (label, quantity(tokens), str(run["seed"]), *(f"{run['copying'][distance]:.2f}" for distance in distances))
        for label, tokens, run in sorted(runs, key=lambda one: -sum(one[2]["copying"].values()))
    ]
    return Table(
        "Copying",
        "The part of random tokens, read a second time so many tokens after the first, that a model names. Runs from "
        "before this was measured are left out.",
        ("model", "training tokens", "seed", *(f"{distance} tokens" for distance in distances)),
        tuple(rows),
    )


def _matrix(group: Group) -> Table:
    published = {_key(row): row["perplexity"] for row in paper()["matrix"]}
    papers_dense = paper()["extrapolation_perplexity"]["dense"]["1024"]
    dense = group.get("dense")
    ours = {model.paper_key: model for model in group.models if model.paper_key}
    ranks = _ranks({key: model.loss(group.trained_at) for key, model in ours.items() if key != "dense"})
    theirs = _ranks({key: _log_mean(row) for key, row in published.items() if key in ours})
    rows = [_dense_row(group, dense, papers_dense)]
    for key in sorted(published, key=lambda key: _log_mean(published[key])):
        model, row = ours.get(key), published[key]
        ratio = math.exp(_log_mean(row) - _log_mean(papers_dense))
        cells = (ABSENT, *("–" for _ in group.sets[1:]), "–", "–", "–")
        if model is not None:
            losses, gap = model.losses(group.trained_at), None if dense is None else model.gap(dense, group.trained_at)
            cells = (
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                "–" if gap is None else f"{math.exp(gap):.3f}",
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
        "(geometric means over the sets; the paper gives dense on two) and ranks (among the models run here), not "
        "perplexities. The column σ gives the distance to linear at the same window in standard deviations over seeds.",
        ("model", *group.sets, "÷ dense", "to linear, σ", "rank", "paper: FineWeb-Edu", "Wikipedia", "÷ dense", "rank"),
        tuple(rows),
    )


def _dense_row(group: Group, dense: Model | None, published: dict[str, float]) -> tuple[str, ...]:
    cells = (ABSENT, *("–" for _ in group.sets[1:]), "–")
    if dense is not None:
        losses = dense.losses(group.trained_at)
        cells = (*(f"{math.exp(losses[name]):.2f}" for name in group.sets), "1")
    return ("dense", *cells, "–", "–", f"{published['fineweb_edu']:.2f}", f"{published['wikipedia']:.2f}", "1", "–")


def _extrapolation(group: Group) -> Table:
    published = paper()["extrapolation_perplexity"]
    rows = []
    order = sorted(group.models, key=lambda model: model.loss(group.lengths[-1]))
    for model in order:
        row = published.get(model.paper_key or "", {})
        change = {int(length): _log_mean(one) - _log_mean(row["1024"]) for length, one in row.items()}
        rows.append(
            (*_lengths(model.label, model, group), *(percent(change[n]) if change else "–" for n in (2048, 4096)))
        )
        rows += [
            (*_lengths(f"{model.label}, {in_words(way)}", model, group, way), "–", "–") for way in ways(model.first)
        ]
    factors = [length // group.trained_at for length in group.lengths]
    return Table(
        "Table 2. Past the training length",
        f"Perplexity (geometric mean over the sets) at {group.trained_at:,} tokens, and its change in longer windows "
        "of the same text; best at the longest first. RoPE is plain unless a scaling is named, which is set for each "
        "length anew. Bounded: full layers see the last so many tokens alone. The last two columns are the paper's "
        "changes (its power-of-two rungs grew with the evaluation length; ours stay those of training).",
        ("model", *(f"{factor}×" for factor in factors), "paper: 2×", "4×"),
        tuple(rows),
    )


def _last_positions(group: Group) -> Table:
    order = sorted(group.models, key=lambda model: model.last(group.lengths[-1]))
    return Table(
        "Table 2, the other convention. The last 256 positions of every window",
        "Perplexity (geometric mean over the sets) where context is longest. Windows of different lengths end at "
        "different tokens, so compare down a column, not along a row. RoPE is plain.",
        ("model", *(f"{length // group.trained_at}×" for length in group.lengths)),
        tuple((model.label, *(f"{math.exp(model.last(n)):.2f}" for n in group.lengths)) for model in order),
    )


def _lengths(label: str, model: Model, group: Group, way: str = PLAIN) -> tuple[str, ...]:
    first = model.loss(group.trained_at)
    changes = [percent(model.loss(length, way) - first) for length in group.lengths if length > group.trained_at]
    return (label, f"{math.exp(first):.2f}", *changes)


def _positions(group: Group) -> Table:
    published = paper()["position_nll_8_bins"]
    keys = {name: f"fibonacci/{name.removesuffix('-w12')}/w12" for name in ("fixed-w12", "linear-w12")}
    theirs = {
        name: [statistics.mean(values) for values in zip(*published[key].values(), strict=True)]
        for name, key in keys.items()
    }
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    rows: list[tuple[str, ...]] = [
        (model.label, *(f"{loss:.3f}" for loss in model.bins(group.trained_at))) for model in (fixed, linear) if model
    ]
    ours = fixed.gaps_by_part(linear, group.trained_at) if fixed and linear else []
    rows.append(("gain", *(f"{gain:.3f}" for gain in ours)) if ours else ("gain", ABSENT, *("–" for _ in range(7))))
    gains = [one - other for one, other in zip(theirs["fixed-w12"], theirs["linear-w12"], strict=True)]
    rows.append(("paper: gain", *(f"{gain:.3f}" for gain in gains)))
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
        gap, away = (
            None if other is None or other is model else model.gap(other, group.trained_at) for other in (dense, linear)
        )
        rows.append(
            (
                model.label,
                " ".join(f"{math.exp(loss):.2f}" for loss in losses),
                spread,
                "–" if gap is None else percent(gap),
                "–" if away is None or linear is None else _in_sigmas(away, group.sigma(model, linear)),
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


def cost_table(groups: Sequence[Group]) -> Table:
    """What every model of the first group costs at the training length; a run of any budget tells its speed."""
    rows = []
    for model in sorted(groups[0].models, key=lambda one: one.first["flops_per_token"]["attention"]):
        run, own = model.first, model.recipe
        alone = [run for group in groups for same in group.models if same.recipe == own for run in same.alone()]
        speeds = [one["training"] for one in alone if one["hardware"]["device"] == run["hardware"]["device"]]
        memory = run["training"]["peak_memory_gib"]
        rows.append(
            (
                model.label,
                f"{run['model']['parameters']:,}",
                f"{run['model']['keys']:.0f}",
                "all" if own["attention"] == "full" or own["full_layers"] else str(run["model"]["coverage"]),
                f"{run['flops_per_token']['attention'] / 1e6:.2f}",
                f"{100 * run['flops_per_token']['attention_share']:.1f} %",
                quantity(max(one["tokens_per_second"] for one in speeds)) if speeds else "–",
                "–" if memory is None else f"{memory:.1f}",
                run["hardware"]["device"],
            )
        )
    return Table(
        "Costs",
        "At the training length: keys that a query reads (mean), distinct distances that some layer attends to, "
        "forward operations of attention for a token, their share of the layers (the paper: about 16 %), and the speed "
        "of training, the best run of any budget that had its GPU for itself (machines differ by some per cent).",
        (
            "model",
            "parameters",
            "keys",
            "distances",
            "attention, MFLOP",
            "share",
            "tokens/s",
            "memory, GiB",
            "device",
        ),
        tuple(rows),
    )


def failures_table(results: Results) -> Table | None:
    """Runs that failed and have not been finished since."""
    if not results.failures:
        return None
    rows = tuple((one["run"], one["study"], one["time"][:16], one["error"][:160]) for one in results.failures)
    return Table("Failed runs", "Not finished since.", ("run", "study", "time", "error"), rows)


def provenance(groups: Sequence[Group]) -> dict[str, str]:
    """Where the numbers of the groups come from, in words."""
    runs = [run for group in groups for model in group.models for run in model.runs]
    recipe, training = runs[0]["recipe"], sum(run["seconds"]["training"] for run in runs)
    rates = sorted({f"{run['recipe']['optimizer']['peak_rate']:g}" for run in runs})
    budgets = (
        f"{sum(len(model.runs) for model in group.models)} of {quantity(group.tokens)} tokens" for group in groups
    )
    return {
        "runs": f"{', '.join(budgets)}; {recipe['windows_per_step']} windows of {recipe['length']:,} a step; "
        f"{duration(training)} of training in all",
        "recipe": f"AdamW, peak rate {', '.join(rates)}, {recipe['optimizer']['warmup_steps']} warm-up steps, the same "
        "order of windows for all runs of a seed",
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
        "evaluation": f"{runs[0]['convention']}; {_targets(runs)} targets a set",
        "data fingerprint": ", ".join(dict.fromkeys(group.data_fingerprint for group in groups)),
        "devices": ", ".join(sorted({run["hardware"]["device"] for run in runs})),
        "versions": _versions(runs),
        "from": f"{min(run['time'] for run in runs)[:16]} to {max(run['time'] for run in runs)[:16]} UTC",
    }


def _versions(runs: Sequence[dict[str, Any]]) -> str:
    """Every package with all versions that were used."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, version in run["versions"].items():
            found[name].add(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())


def _targets(runs: Sequence[dict[str, Any]]) -> str:
    counts = {row["targets"] for run in runs for lengths in run["evaluation"].values() for row in lengths.values()}
    return " or ".join(f"{count:,}" for count in sorted(counts))


def _against_linear(model: Model, group: Group) -> str:
    linear = group.get(f"linear-w{model.recipe['window']}")
    if linear is None or linear is model or model.recipe["base"] != "fibonacci":
        return "–"
    gap = model.gap(linear, group.trained_at)
    return "–" if gap is None else _in_sigmas(gap, group.sigma(model, linear))


def _in_sigmas(gap: float, sigma: float | None) -> str:
    return "–" if not sigma else f"{gap / sigma:+.1f}".replace("-", "−")


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
