"""The report's tables of what the paper does not have: models past it, other budgets, other questions, costs."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from fibattn.progress import quantity
from study.report.claims import percent
from study.report.paper_tables import extrapolation, positions
from study.report.results import PARTS, PLAIN, Frame, Group, paper
from study.report.tables import Table, against, perplexities, table, text, texts


def beyond_tables(group: Group) -> list[Table]:
    """What the paper does not have: its models past the paper's, and what context past the training length is worth."""
    chosen = [name for name in group.models.index if name not in group.papers or name == "linear-w12"]
    return [_models(group, chosen, "Models past the paper"), *_far_context(group)]


def other_budget(group: Group) -> list[Table]:
    """Tables for a group of runs that the main tables are not about."""
    at = f"at {quantity(group.tokens)} training tokens"
    tables = [
        _models(group, list(group.models.index), f"Models {at}"),
        replace(extrapolation(group), title=f"Past the training length, {at}"),
    ]
    if {"fixed-w12", "linear-w12"} <= set(group.models.index):
        tables.append(replace(positions(group), title=f"Loss by position, {at}"))
    return [*tables, *(replace(far, title=f"{far.title}, {at}") for far in _far_context(group))]


def _models(group: Group, names: Sequence[str], title: str) -> Table:
    near, far, own = group.first(group.trained_at), group.first(group.longest), perplexities(group)
    losses = group.loss(group.trained_at)
    rows = []
    for name in near[list(names)].sort_values(kind="stable").index:
        gap, sigma = against(group, name, "dense")
        both = "–" if name == "dense" or "dense" not in losses else str(len(losses[[name, "dense"]].dropna()))
        sets = (f"{own.at[name, one]:.2f}" for one in group.sets)
        keys = f"{group.models.at[name, 'keys']:.0f}"
        rows.append((group.label(name), keys, *sets, gap, sigma, both, percent(far[name] - near[name])))
    headings = ["model", "keys", *group.sets, "against dense", "σ", "seeds", f"change at {group.factor}×"]
    return table(
        title,
        f"Perplexity at {group.trained_at:,} tokens on each held-out set, first seed, best first; data "
        f"{group.data[:12]}. Keys: what a query reads at that length, the mean over positions and layers. "
        "Against dense: the mean over the seeds that both have, so many. σ: the same in standard deviations over the "
        "seeds of one model, pooled over the two; a difference of two runs has √2 of that. The "
        "change is without a bound.",
        pd.DataFrame(rows),
        headings,
    )


def _far_context(group: Group) -> list[Table]:
    """What the text past the training length is worth, against a model that does not see it; none without one."""
    control, last = group.plain_window, PARTS[-1]
    if control is None:
        return []
    rows = []
    for name in (name for name in group.models.index if name != control and name not in group.papers):
        for way in (PLAIN, *group.ways(name)):
            near, far = (group.gaps_by_part(name, control, n, way) for n in (group.trained_at, group.longest))
            if len(near):
                rows.append({"model": group.label(name, way), "near": near[last], **far})
    if not rows:
        return []
    frame = pd.DataFrame(rows).sort_values([last, "model"])
    frame = frame.assign(**{name: texts("{:+.3f}", frame[name]) for name in ("near", *PARTS)})
    return [
        table(
            f"Far context: against {group.label(control)}, by part of a window of {group.longest:,}",
            f"Nats, the mean over the sets, less than zero is better. A longer window has fewer first tokens without "
            f"context, which helps every model, so a change at {group.factor}× says little of what far text is worth. "
            f"Beside a model that looks no farther than its window at the same tokens, it shows. First the last part "
            f"of a window of {group.trained_at:,}.",
            frame,
            ["model", f"last at {group.trained_at:,}", *(f"{part}/8" for part in PARTS)],
        )
    ]


def asked_tables(groups: Sequence[Group]) -> list[Table]:
    """What every run was asked besides text; what no run was asked is left out."""
    runs = pd.concat([group.runs.sort_values(["label", "seed"], kind="stable") for group in groups], ignore_index=True)
    tables = (
        copying_table(runs),
        _forced_choice(runs, "ruler", "hops", "RULER, variable tracking", "ruler_vt"),
        _forced_choice(runs, "lego", "length", "LEGO over Z/2", "lego"),
    )
    return [one for one in tables if one]


def _asked(runs: Frame, answers: Frame) -> Frame:
    """The answers of runs beside what they are."""
    about = {
        "model": runs["label"],
        "training tokens": texts(quantity, runs["tokens"]),
        "seed": runs["seed"].astype(str),
    }
    return pd.DataFrame(about).join(answers)


def _forced_choice(runs: Frame, task: str, sizes: str, title: str, published: str) -> Table | None:
    """How often, and by how much, every run prefers the right answer; None where none was asked."""
    runs = runs[runs[task].map(bool)]
    if runs.empty:
        return None
    answers = [
        {
            f"{sizes} {row[sizes]}": text(
                "{0[accuracy]:.2f}, {0[margin]:+.2f} ± {1:.2f}".format(row, row["margin_error"] or 0), 0
            )
            for row in rows
        }
        for rows in runs[task]
    ]
    first = runs[task].iloc[0]
    chances = " and ".join(dict.fromkeys(f"{row['chance']:.2f}" for row in first))
    return table(
        title,
        f"Forced choice among the values in the text, {first[0]['items']} items: accuracy (chance {chances}), and by "
        "how many nats the right answer is ahead of the best wrong one, with its standard error. "
        f"The paper: {paper()['auxiliary'][published]}. Runs from before this was measured are left out.",
        _asked(runs, pd.DataFrame(answers, index=runs.index)),
        words=3,
    )


def copying_table(runs: Frame) -> Table | None:
    """How well every run copies; None where none was asked."""
    runs = runs[runs["copying"].map(bool)]
    if runs.empty:
        return None
    found = pd.DataFrame(list(runs["copying"]), index=runs.index).rename(columns=int).sort_index(axis=1)
    order = (-found.max(axis=1)).sort_values(kind="stable").index
    cells = found.map(lambda right: text("{:.2f}", right)).rename(columns=lambda n: f"{n:,} tokens")
    return table(
        "Copying",
        "The part of random tokens, read a second time so many tokens after the first, that a model names. Two copies "
        "fit into a training sequence up to half its length. Full layers are unbounded. Runs from before this was "
        "measured are left out; older ones were not asked past the training sequence.",
        _asked(runs, cells).loc[order],
        words=3,
    )


def cost_table(groups: Sequence[Group]) -> Table:
    """What every model of the first group costs at the training length; a run of any budget tells its speed."""
    models = groups[0].models.sort_values("attention", kind="stable")
    runs: Frame = pd.concat([group.runs for group in groups])
    speeds = runs[runs["alone"]].groupby(["shape", "device"])["speed"].max()
    alone = pd.Series(speeds.reindex(pd.MultiIndex.from_frame(models[["shape", "device"]])).to_numpy(), models.index)
    full = models["kind"].isin(["dense", "hybrid", "window hybrid"])
    columns = {
        "model": models["label"],
        "parameters": texts("{:,}", models["parameters"]),
        "keys": texts("{:.0f}", models["keys"]),
        "distances": texts("{}", models["coverage"]).mask(full, "all"),
        "attention, MFLOP": texts("{:.2f}", models["attention"] / 1e6),
        "share": texts("{:.1f} %", 100 * models["attention_share"]),
        "tokens/s": texts(quantity, alone),
        "memory, GiB": texts("{:.1f}", models["memory"]),
        "device": models["device"],
    }
    return table(
        "Costs",
        "At the training length: keys that a query reads (mean), distinct distances that some layer attends to, "
        "forward operations of attention for a token, their share of the layers (the paper: about 16 %), and the speed "
        "of training, the best run of any budget that had its GPU for itself (machines differ by some per cent; "
        "the oldest runs had slower code).",
        columns,
    )


def failures_table(failures: Frame) -> list[Table]:
    """Runs that failed and have not been finished since, if there are any."""
    if failures.empty:
        return []
    rows = failures.assign(time=failures["time"].str[:16], error=failures["error"].str[:160])
    return [table("Failed runs", "Not finished since.", rows[["run", "study", "time", "error"]])]
