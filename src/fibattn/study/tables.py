"""The report's tables: the paper's beside ours, then what goes past the paper. Plain cells, for HTML and Markdown."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fibattn.progress import duration, quantity
from fibattn.study.findings import percent, position_gain
from fibattn.study.results import PLAIN, Group, Model, Results, mean_loss, paper

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
    return [_matrix(group), _extrapolation(group), _positions(group), _seeds(group)]


def beyond_table(group: Group) -> Table:
    """Every model that the paper does not have, against dense."""
    dense, longest = group.get("dense"), group.lengths[-1]
    rows = []
    for model in sorted(group.models, key=lambda one: one.loss(group.trained_at)):
        if model.is_papers and model.name != "linear-w12":
            continue
        near, far = model.loss(group.trained_at), model.loss(longest)
        against = away = "–"
        if dense and model is not dense:
            gap = _gap(model, dense, group)
            against, away = percent(gap), _in_sigmas(gap, group.sigma(model, dense))
        losses = model.losses(group.trained_at)
        rows.append(
            (
                model.label,
                f"{model.first['model']['keys']:.0f}",
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                against,
                away,
                percent(far - near),
            )
        )
    factor = longest // group.trained_at
    return Table(
        "Models past the paper",
        f"Perplexity at {group.trained_at:,} tokens on each held-out set, first seed, best first. Keys: what a query "
        "reads at that length, the mean over positions and layers. σ: the distance to dense in standard deviations "
        "over the seeds that the two have.",
        ("model", "keys", *group.sets, "against dense", "σ", f"change at {factor}×"),
        tuple(rows),
    )


def copying_table(group: Group) -> Table | None:
    """How well every run copies; None where none was asked."""
    runs = [(model.label, run) for model in group.models for run in model.runs if run.get("copying")]
    if not runs:
        return None
    distances = list(runs[0][1]["copying"])
    rows = [
        (label, str(run["seed"]), *(f"{run['copying'][distance]:.2f}" for distance in distances))
        for label, run in sorted(runs, key=lambda one: -sum(one[1]["copying"].values()))
    ]
    return Table(
        "Copying",
        "The part of random tokens, read a second time so many tokens after the first, that a model names. Runs from "
        "before this was measured are left out.",
        ("model", "seed", *(f"{distance} tokens" for distance in distances)),
        tuple(rows),
    )


def other_budget(group: Group) -> Table:
    """A short table for a group of runs that the main tables are not about."""
    dense, longest = group.get("dense"), group.lengths[-1]
    rows = []
    for model in sorted(group.models, key=lambda one: one.loss(group.trained_at)):
        near, far = model.loss(group.trained_at), model.loss(longest)
        losses = model.losses(group.trained_at)
        rows.append(
            (
                model.label,
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                percent(near - dense.loss(group.trained_at)) if dense and model is not dense else "–",
                percent(far - near),
            )
        )
    return Table(
        f"At {quantity(group.tokens)} training tokens",
        f"Perplexity at {group.trained_at:,} tokens, best first; data {group.data_fingerprint[:12]}.",
        ("model", *group.sets, "against dense", f"change at {longest // group.trained_at}×"),
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
            losses, gap = model.losses(group.trained_at), None if dense is None else _gap(model, dense, group)
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
        for rope in model.first["rope_scaling"]:
            name = {"yarn": "YaRN", "linear": "linear scaling"}[rope]
            rows.append((*_lengths(f"{model.label}, {name}", model, group, rope), "–", "–"))
    factors = [length // group.trained_at for length in group.lengths]
    return Table(
        "Table 2. Past the training length",
        f"Perplexity (geometric mean over the sets) at {group.trained_at:,} tokens, and its change in longer windows "
        "of the same text; best at the longest first. RoPE is plain unless a scaling is named, which is set for each "
        "length anew. The last two columns are the paper's changes (its power-of-two rungs grew with the evaluation "
        "length; ours stay those of training).",
        ("model", *(f"{factor}×" for factor in factors), "paper: 2×", "4×"),
        tuple(rows),
    )


def _lengths(label: str, model: Model, group: Group, rope: str = PLAIN) -> tuple[str, ...]:
    first = model.loss(group.trained_at)
    changes = [percent(model.loss(length, rope) - first) for length in group.lengths if length > group.trained_at]
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
    if fixed and linear:
        rows.append(("gain", *(f"{gain:.3f}" for gain in position_gain(fixed, linear, group.trained_at))))
    else:
        rows.append(("gain", ABSENT, *("–" for _ in range(7))))
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
        gap, away = _mean_gap(model, dense, group), _mean_gap(model, linear, group)
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


def cost_table(group: Group) -> Table:
    """What every model costs at the training length."""
    rows = []
    for model in sorted(group.models, key=lambda one: one.first["flops_per_token"]["attention"]):
        run = model.first
        memory = run["training"]["peak_memory_gib"]
        shared = (run["hardware"].get("processes_a_gpu") or 1) > 1
        rows.append(
            (
                model.label,
                f"{run['model']['parameters']:,}",
                f"{run['model']['keys']:.0f}",
                str(run["model"]["coverage"]),
                f"{run['flops_per_token']['attention'] / 1e6:.2f}",
                f"{100 * run['flops_per_token']['attention_share']:.1f} %",
                quantity(run["training"]["tokens_per_second"]) + (" (shared)" if shared else ""),
                "–" if memory is None else f"{memory:.1f}",
                run["hardware"]["device"],
            )
        )
    headings = (
        "model",
        "parameters",
        "keys",
        "distances",
        "attention, MFLOP",
        "share",
        "tokens/s",
        "memory, GiB",
        "device",
    )
    devices = {row[-1] for row in rows}
    alike = len(devices) == 1
    return Table(
        "Costs",
        "At the training length: keys that a query reads (mean), distinct distances that some layer attends to, "
        "forward operations of attention for a token, their share of the layers (the paper: about 16 %), speed "
        f"{f'on {devices.pop()} ' if alike else ''}(shared: another run used the same GPU at the time).",
        headings[:-1] if alike else headings,
        tuple(row[:-1] if alike else row for row in rows),
    )


def failures_table(results: Results) -> Table | None:
    """Runs that failed and have not been finished since."""
    if not results.failures:
        return None
    rows = tuple((one["run"], one["study"], one["time"][:16], one["error"][:160]) for one in results.failures)
    return Table("Failed runs", "Not finished since.", ("run", "study", "time", "error"), rows)


def provenance(group: Group) -> dict[str, str]:
    """Where the numbers of a group come from, in words."""
    runs = [run for model in group.models for run in model.runs]
    recipe, training = runs[0]["recipe"], sum(run["seconds"]["training"] for run in runs)
    rates = sorted({f"{run['recipe']['optimizer']['peak_rate']:g}" for run in runs})
    return {
        "runs": f"{len(runs)}, {quantity(group.tokens)} tokens each: {recipe['steps']:,} steps of "
        f"{recipe['windows_per_step']} windows of {recipe['length']:,}; {duration(training)} of training in all",
        "recipe": f"AdamW, peak rate {', '.join(rates)}, {recipe['optimizer']['warmup_steps']} warm-up steps, the same "
        "order of windows for all runs of a seed",
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
        "evaluation": f"{runs[0]['convention']}; {_targets(runs)} targets a set",
        "data fingerprint": group.data_fingerprint,
        "devices": ", ".join(sorted({run["hardware"]["device"] for run in runs})),
        "versions": "; ".join(
            sorted({", ".join(f"{name} {value}" for name, value in run["versions"].items()) for run in runs})
        ),
        "from": f"{min(run['time'] for run in runs)[:16]} to {max(run['time'] for run in runs)[:16]} UTC",
    }


def _targets(runs: Sequence[dict[str, Any]]) -> str:
    counts = {row["targets"] for run in runs for lengths in run["evaluation"].values() for row in lengths.values()}
    return " or ".join(f"{count:,}" for count in sorted(counts))


def _gap(model: Model, other: Model, group: Group) -> float:
    return model.loss(group.trained_at) - other.loss(group.trained_at)


def _against_linear(model: Model, group: Group) -> str:
    linear = group.get(f"linear-w{model.recipe['window']}")
    if linear is None or linear is model or model.recipe["base"] != "fibonacci":
        return "–"
    return _in_sigmas(_gap(model, linear, group), group.sigma(model, linear))


def _mean_gap(model: Model, other: Model | None, group: Group) -> float | None:
    """The mean difference of two models over the seeds that both have; None without, or for a model and itself."""
    if other is None or other is model:
        return None
    pairs = model.beside(other)
    gaps = [mean_loss(own, group.trained_at) - mean_loss(theirs, group.trained_at) for own, theirs in pairs]
    return statistics.mean(gaps) if gaps else None


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
