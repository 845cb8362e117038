"""The study of rivals as groups: so that what the project set out to do is judged in the tuned recipe, too."""

from collections.abc import Iterable
from typing import Any

from fibattn.training.presets import DEFAULT
from study.presets import STUDIES
from study.report.results import Group, grouped

RIVAL = "rungs-w64-two"
"""The default recipe by its name in the study `rivals`."""


def tuned_groups(records: Iterable[dict[str, Any]]) -> list[Group]:
    """The finished runs of that study by budget, most training first, without those not looked at far out.

    The default recipe has its own name in them.
    """
    rivals = STUDIES["rivals"]
    wanted = {str(factor * rivals.recipe.sequence_length) for factor in rivals.factors}
    whole = (one for one in records if all(wanted <= set(rows) for rows in one["evaluation"].values()))
    groups = grouped({**one, "run": one["run"].replace(RIVAL, DEFAULT)} for one in whole)
    return sorted(groups, key=lambda group: -group.tokens)
