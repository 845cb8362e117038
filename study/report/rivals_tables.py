"""The rivals' tables: what layers attend to, at tuned rates, one table for each budget."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from study.report.claims import percent
from study.report.tables import NONE, Table, speed, table, where_run
from study.rivals import FACTORS, SEEDS, Rivals, name_of
from study.store import over_sets

Records = dict[int, dict[str, Any]]
"""By seed."""


def rivals_tables(rivals: Rivals, records: Iterable[dict[str, Any]], recipe: str) -> list[Table]:
    """A table of models for each budget, the largest first, of finished runs of them; `recipe` in words."""
    by_tokens = sorted(by_budget(records).items(), reverse=True)
    return [_of_budget(rivals, recipe, tokens, found) for tokens, found in by_tokens]


def by_budget(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Finished runs by their tokens, then by name."""
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        found[record["tokens"]][record["run"]] = record
    return found


def _of_budget(rivals: Rivals, recipe: str, tokens: int, found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for model in rivals.models:
        tried = {factor: seeds_of(found, model, factor) for factor in FACTORS}
        tried = {factor: seeds for factor, seeds in tried.items() if seeds}
        if not tried:
            continue
        best = min(tried, key=lambda factor: _nll(tried[factor][min(tried[factor])]))
        rows.append(_row(model, best, sorted(tried), tried[best], seeds_of(found, "dense", best_rate(found, "dense"))))
    one = next(iter(found.values()))
    note = (
        f"{tokens / 1e6:.0f} M tokens, {recipe} but for the attention, {where_run(found.values())}; "
        f"the geometric mean of the four sets' perplexities over "
        f"{over_sets(one, 'targets'):,} tokens of each, the mean of the seeds and their standard deviation; against "
        "dense over the seeds that both have. "
        "Names: rungs or a plain window of so many distances, beside so many full layers of 16; 16 times the length "
        "with full layers bounded to the training length. Rates, in the recipe's: what was tried at seed 42, and "
        "where that is more than one, the best, of which the row is. Make one again with "
        f"`python -m study run {rivals.study} --data DATA --tokens {round(tokens / 1e6)}M --only RUN`."
    )
    return table(f"Rivals in {recipe}, {tokens / 1e6:.0f} M tokens", note, rows)


def seeds_of(found: dict[str, dict[str, Any]], model: str, factor: float) -> Records:
    """The finished runs of a model at `factor` times the rates."""
    names = {seed: name_of(model, factor, seed) for seed in SEEDS}
    return {seed: found[name] for seed, name in names.items() if name in found}


def best_rate(found: dict[str, dict[str, Any]], model: str) -> float:
    """The factor with the lowest loss of those that were tried; 1 where none was."""
    tried = {factor: seeds_of(found, model, factor) for factor in FACTORS}
    return min((f for f in FACTORS if tried[f]), key=lambda f: _nll(next(iter(tried[f].values()))), default=1.0)


def _row(model: str, best: float, tried: list[float], seeds: Records, dense: Records) -> dict[str, str]:
    nlls = [_nll(one) for one in seeds.values()]
    both = [seed for seed in seeds if seed in dense and model != "dense"]
    first = next(iter(seeds.values()))
    sets = list(first["evaluation"])
    spread = f" ± {statistics.stdev(map(math.exp, nlls)):.2f}" if len(nlls) > 1 else ""
    far = [_bounded(one) for one in seeds.values()]
    return {
        "model": model,
        "rates": ", ".join(f"{one:g}" for one in tried) + (f" (best {best:g})" if len(tried) > 1 else ""),
        "seeds": str(len(seeds)),
        "perplexity": f"{statistics.mean(map(math.exp, nlls)):.2f}{spread}",
        "against dense": _against(seeds, dense, both, _nll),
        **{
            f"{name}, against dense": _against(seeds, dense, both, lambda one, name=name: _loss(one, name))
            for name in sets
        },
        "16×, bounded": f"{math.exp(statistics.mean(far)):.2f}" if None not in far else NONE,  # pyright: ignore
        "copied from 256": f"{statistics.mean(one['copying']['256'] for one in seeds.values()):.2f}",
        "keys": f"{first['model']['keys']:.0f}",
        "tokens/s": speed(seeds.values()),
        "parameters": f"{first['model']['parameters'] / 1e6:.1f} M",
    }


def _against(seeds: Records, dense: Records, both: list[int], loss: Any) -> str:
    return percent(statistics.mean(loss(seeds[seed]) - loss(dense[seed]) for seed in both)) if both else NONE


def _loss(record: dict[str, Any], name: str) -> float:
    return record["evaluation"][name][str(record["trained_at"])]["nll"]


def _nll(record: dict[str, Any]) -> float:
    return over_sets(record, "nll")


def _bounded(record: dict[str, Any]) -> float | None:
    """The mean loss at 16 times the training length, with bounded full layers, or as it is where there are none."""
    sets = record["bounded"].get(str(record["trained_at"])) or record["evaluation"]
    far = 16 * record["trained_at"]
    return over_sets(record, "nll", sets, far) if all(str(far) in rows for rows in sets.values()) else None
