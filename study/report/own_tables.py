"""The report's tables of what the paper does not have: models past it, other budgets, other questions, costs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fibattn.progress import quantity
from study.report.findings import percent, real_minus
from study.report.paper_tables import extrapolation, positions
from study.report.results import PLAIN, Group, Model, Results, paper
from study.report.tables import Table, against


def beyond_tables(group: Group) -> list[Table]:
    """What the paper does not have: its models past the paper's, and what context past the training length is worth."""
    chosen = [model for model in group.models if not model.is_papers or model.name == "linear-w12"]
    tables = (_models(group, chosen, "Models past the paper"), _far_context(group))
    return [table for table in tables if table]


def other_budget(group: Group) -> list[Table]:
    """Tables for a group of runs that the main tables are not about."""
    at = f"at {quantity(group.tokens)} training tokens"
    tables = [
        _models(group, group.models, f"Models {at}"),
        replace(extrapolation(group), title=f"Past the training length, {at}"),
    ]
    if group.get("fixed-w12") and group.get("linear-w12"):
        tables.append(replace(positions(group), title=f"Loss by position, {at}"))
    far = _far_context(group)
    return [*tables, replace(far, title=f"{far.title}, {at}")] if far else tables


def _models(group: Group, models: Sequence[Model], title: str) -> Table:
    dense, longest = group.get("dense"), group.lengths[-1]
    rows = []
    for model in sorted(models, key=lambda one: one.loss(group.trained_at)):
        losses = model.losses(group.trained_at)
        gap, away = against(model, dense, group)
        rows.append(
            (
                model.label,
                f"{model.keys:.0f}",
                *(f"{math.exp(losses[name]):.2f}" for name in group.sets),
                gap,
                away,
                "–" if dense is None or model is dense else str(len(model.beside(dense))),
                percent(model.loss(longest) - model.loss(group.trained_at)),
            )
        )
    return Table(
        title,
        f"Perplexity at {group.trained_at:,} tokens on each held-out set, first seed, best first; data "
        f"{group.data_fingerprint[:12]}. Keys: what a query reads at that length, the mean over positions and layers. "
        "Against dense: the mean over the seeds that both have, so many. σ: the same in standard deviations over the "
        "seeds of one model, pooled over the two; a difference of two runs has √2 of that. The "
        "change is without a bound.",
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
    control, longest = group.plain_window, group.lengths[-1]
    if control is None:
        return None
    rows = []
    for model in (one for one in group.models if one is not control and not one.is_papers):
        for way in (PLAIN, *model.ways()):
            near, far = (model.gaps_by_part(control, length, way) for length in (group.trained_at, longest))
            if near:
                cells = (real_minus(f"{gap:+.3f}") for gap in (near[-1], *far))
                rows.append((far[-1], (model.label_of(way), *cells)))
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
    runs = _runs_with(task, groups)
    if not runs:
        return None
    asked = runs[0][2][task]
    rows = [
        (
            label,
            quantity(tokens),
            str(run["seed"]),
            *(_choice(row) for row in run[task]),
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


def _choice(row: dict[str, Any]) -> str:
    return real_minus(f"{row['accuracy']:.2f}, {row['margin']:+.2f} ± {row['margin_error'] or 0:.2f}")


def _runs_with(measure: str, groups: Sequence[Group]) -> list[tuple[str, int, dict[str, Any]]]:
    """The runs that have `measure`, each with its model's label and its budget; a budget's in the order of labels."""
    return [
        (model.label, group.tokens, run)
        for group in groups
        for model in sorted(group.models, key=lambda model: model.label)
        for run in model.runs
        if run.get(measure)
    ]


def copying_table(groups: Sequence[Group]) -> Table | None:
    """How well every run copies; None where none was asked."""
    runs = _runs_with("copying", groups)
    if not runs:
        return None
    distances = sorted({distance for *_, run in runs for distance in run["copying"]}, key=int)
    rows = []
    for label, tokens, run in sorted(runs, key=lambda one: -max(one[2]["copying"].values())):
        found = (run["copying"].get(distance) for distance in distances)
        cells = ("–" if right is None else f"{right:.2f}" for right in found)
        rows.append((label, quantity(tokens), str(run["seed"]), *cells))
    return Table(
        "Copying",
        "The part of random tokens, read a second time so many tokens after the first, that a model names. Two copies "
        "fit into a training window up to half its length. Full layers are unbounded. Runs from before this was "
        "measured are left out; older ones were not asked past the training window.",
        ("model", "training tokens", "seed", *(f"{int(distance):,} tokens" for distance in distances)),
        tuple(rows),
    )


def cost_table(groups: Sequence[Group]) -> Table:
    """What every model of the first group costs at the training length; a run of any budget tells its speed."""
    rows = []
    for model in sorted(groups[0].models, key=lambda one: one.first["flops_per_token"]["attention"]):
        run, own = model.first, model.recipe
        alone = [one for group in groups for same in group.models if same.recipe == own for one in same.alone()]
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
        "of training, the best run of any budget that had its GPU for itself (machines differ by some per cent; "
        "the oldest runs had slower code).",
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
