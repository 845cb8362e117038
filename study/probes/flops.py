"""Counted operations of a forward pass, for every model of a study."""

from dataclasses import replace
from typing import Any

from fibattn.errors import InputError
from fibattn.training.run import model_config
from study import cost
from study.presets import find_study
from study.probes.settings import Flops

_VOCABULARY = 32_768  # the paper's


def flops(settings: Flops) -> dict[str, Any]:
    """Operations for one token, the mean over a sequence; the result is plain JSON values.

    Raises:
        InputError: for an unknown study, or a length below 1.
    """
    study = find_study(settings.study)
    if settings.length is not None and settings.length < 1:
        raise InputError(f"length is {settings.length}; it must be at least 1")
    rows = []
    for run in study.runs:
        recipe, vocabulary = replace(run.recipe or study.recipe, model=run.model), run.vocabulary or _VOCABULARY
        length = settings.length or recipe.sequence_length
        found = cost.flops(model_config(recipe, vocabulary, 0), length)
        parts = {"projections": found.projections, "attention": found.attention, "head": found.head}
        about = {"model": run.name, "length": length, "vocabulary": vocabulary}
        rows.append({**about, **parts, "total": found.total, "attention_share": found.attention_share})
    return {"probe": "flops", "study": settings.study, "rows": rows}
