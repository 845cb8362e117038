"""The paper's tables of language models, ours beside the published figures."""

import math
from collections.abc import Sequence

import pandas as pd

from study.report.claims import percent
from study.report.recipes import BASES
from study.report.results import PARTS, PLAIN, Frame, Group, paper, papers_gain, published_name
from study.report.tables import ABSENT, NONE, Table, against, perplexities, table, text, texts

_PAPER_SETS = ["fineweb_edu", "wikipedia"]


def papers_tables(group: Group) -> list[Table]:
    """The paper's tables of language models, ours beside the published figures."""
    return [_matrix(group), extrapolation(group), _last_positions(group), positions(group), _seeds(group)]


def _published() -> Frame:
    """The paper's perplexities at its training length, by the study's names of the models; the best first.

    `label`: what they are, in words; `log`: the logarithm of the mean over the sets.
    """
    rows = {"dense": {"label": "dense", **paper()["extrapolation_perplexity"]["dense"]["1024"]}}
    for one in paper()["matrix"]:
        name = published_name("{base}/{schedule}/w{window}".format(**one))
        rows[name] = {"label": f"{BASES[one['base']]}{one['schedule']}, W = {one['window']}", **one["perplexity"]}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame["log"] = frame[_PAPER_SETS].map(math.log).mean(axis=1)
    return frame.sort_values("log", kind="stable")


def _matrix(group: Group) -> Table:
    theirs, first = _published(), group.first(group.trained_at)
    ours = first[[name for name in theirs.index if name in ("dense", *group.papers) and name in first]]
    losses = ours.reindex(theirs.index)
    sparse = losses.drop("dense").dropna()
    ranks: Frame = pd.DataFrame({"ours": sparse.rank(), "theirs": theirs.loc[sparse.index, "log"].rank()})
    distances = {name: against(group, name, f"linear-{name.split('-')[-1]}")[1] for name in sparse.index}
    distances = {name: NONE if name.startswith("pow2") else cell for name, cell in distances.items()}
    own = perplexities(group).reindex(theirs.index)
    columns = {
        "model": theirs["label"],
        **{name: texts("{:.2f}", own[name].where(losses.notna())) for name in group.sets},
        "÷ dense": texts(_ratio, (losses - losses["dense"]).map(math.exp)),
        "to linear, σ": pd.Series(distances, dtype=object),
        "rank": texts("{:.0f}", ranks["ours"]),
        "paper: FineWeb-Edu": texts("{:.2f}", theirs["fineweb_edu"]),
        "Wikipedia": texts("{:.2f}", theirs["wikipedia"]),
        "paper ÷": texts(_ratio, (theirs["log"] - theirs.at["dense", "log"]).map(math.exp)),
        "paper rank": texts("{:.0f}", ranks["theirs"]),
    }
    columns[group.sets[0]] = columns[group.sets[0]].replace(NONE, ABSENT)
    note = (
        "In the paper's order, best first. Text and tokenizer differ from the paper's, so compare ratios to dense "
        "(first seeds, geometric means over the sets; the paper gives dense on two) and ranks (among the models run "
        "here), not perplexities. The column σ gives the distance to linear at the same window in standard deviations "
        "over seeds."
    )
    if len(ranks) >= 5:
        agreement = text("{:.2f}", ranks["ours"].corr(ranks["theirs"]))
        note += f" Rank correlation of our order with the paper's over these {len(ranks)} models: {agreement}."
    headings = [{"paper ÷": "÷ dense", "paper rank": "rank"}.get(name, name) for name in columns]
    frame = pd.DataFrame(columns).reindex(theirs.index)
    return table("Table 1. Perplexity at the training length", note, frame, headings)


def _ratio(value: float) -> str:
    return "1" if value == 1 else f"{value:.3f}"


def extrapolation(group: Group) -> Table:
    """Every model in longer and longer sequences, best at the longest first."""
    published = {
        published_name(key): pd.DataFrame(row).loc[_PAPER_SETS].map(math.log).mean()
        for key, row in paper()["extrapolation_perplexity"].items()
    }
    far, rows = group.lengths[1:], []
    for name in group.first(group.longest).sort_values(kind="stable").index:
        known = published.get(name) if name in ("dense", *group.papers) else None
        for way in (PLAIN, *group.ways(name)):
            near = group.first(group.trained_at, way)[name]
            row = {"model": group.tried(name, way), "1×": f"{math.exp(near):.2f}"}
            row |= {f"{n // group.trained_at}×": percent(group.first(n, way)[name] - near) for n in far}
            if known is not None and way == PLAIN:
                row |= {f"paper {n}": percent(known[n] - known["1024"]) for n in ("2048", "4096")}
            rows.append(row)
    headings = [f"{n // group.trained_at}×" for n in group.lengths]
    frame = pd.DataFrame(rows, columns=["model", *headings, "paper 2048", "paper 4096"])
    return table(
        "Table 2. Past the training length",
        f"Perplexity (geometric mean over the sets) at {group.trained_at:,} tokens, and its change in longer sequences "
        "of the same text; best at the longest first. RoPE is plain unless a scaling is named, which is set for each "
        "length anew. Bounded: full layers see the last so many tokens alone. A tenth more: a copy trained on for a "
        "tenth of the steps in sequences so long, with a larger RoPE base. The last two columns are the paper's "
        "changes (its power-of-two rungs grew with the evaluation length; ours stay those of training).",
        frame,
        ["model", *headings, "paper: 2×", "4×"],
    )


def _last_positions(group: Group) -> Table:
    plain = group.models[["run"]].merge(group.losses[group.losses["way"] == PLAIN], on="run")
    last = plain.pivot_table(index="model", columns="length", values="last")[group.lengths]
    last = last.loc[group.models.index].sort_values(group.longest, kind="stable")
    columns = {f"{n // group.trained_at}×": texts("{:.2f}", last[n].map(math.exp)) for n in group.lengths}
    return table(
        "Table 2, the other convention. The last 256 positions of every window",
        "Perplexity (geometric mean over the sets) where context is longest. Windows of different lengths end at "
        "different tokens, so compare down a column, not along a row. RoPE is plain, full layers are "
        "unbounded.",
        pd.DataFrame({"model": group.models.loc[last.index, "label"], **columns}),
    )


def positions(group: Group) -> Table:
    """What the stagger gains over fixed distances in each part of the training sequence, beside the paper's gain."""
    parts, rows = group.by_part(group.trained_at), {}
    for name in (name for name in ("fixed-w12", "linear-w12") if name in group.models.index):
        rows[group.label(name)] = parts.loc[name].sort_index().iloc[0]
    gain = group.gaps_by_part("fixed-w12", "linear-w12", group.trained_at)
    rows |= {"gain": gain.reindex(PARTS), "paper: gain": papers_gain()}
    frame = pd.DataFrame(rows).T.map(lambda value: text("{:.3f}", value))
    if gain.empty:
        frame.at["gain", PARTS[0]] = ABSENT
    return table(
        "Table 3. Loss by position",
        "Nats, the mean over the sets, in eight equal parts of the training sequence; gain: fixed minus linear, "
        "W = 12.",
        frame.rename_axis("part of the sequence").reset_index(),
    )


def _seeds(group: Group) -> Table:
    published = {published_name(f"{key}/w12"): values for key, values in paper()["seeds_w12_fineweb_edu"].items()}
    labels, losses = _published()["label"], group.loss(group.trained_at)
    rows = []
    for name in [*group.models.index, *(name for name in published if name not in group.models.index)]:
        seeds = losses[name].dropna() if name in losses else pd.Series(dtype=float)
        theirs = published.get(name, []) if name in group.papers or seeds.empty else []
        if len(seeds) < 2 and not theirs:
            continue
        rows.append(
            (
                group.label(name) if len(seeds) else labels[name],
                " ".join(f"{math.exp(loss):.2f}" for loss in seeds) or ABSENT,
                f"{100 * seeds.std():.2f} %" if len(seeds) > 1 else ABSENT if len(seeds) else NONE,
                against(group, name, "dense")[0],
                against(group, name, "linear-w12")[1],
                *_spread(theirs),
            )
        )
    return table(
        "Table 4. Seeds",
        "Perplexity (geometric mean over the sets) at the training length for each seed; here a seed sets the weights "
        "and the order of data, in the paper the order alone. Against dense and to linear, W = 12: the mean over the "
        "seeds that both have, the latter in σ pooled over the two.",
        pd.DataFrame(rows),
        ["model", "perplexities", "σ", "against dense", "to linear, σ", "paper: FineWeb-Edu", "σ"],
    )


def _spread(values: Sequence[float]) -> tuple[str, str]:
    """Published perplexities of several seeds, and their deviation."""
    if not values:
        return NONE, NONE
    seeds = pd.Series(values)
    return " ".join(f"{value:.2f}" for value in values), f"{100 * seeds.std() / seeds.mean():.2f} %"
