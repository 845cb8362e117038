"""Public tasks, LAMBADA and BLiMP among them, through lm-eval (the extra `evaluation`).

Conventions are lm-eval's, so that numbers compare with those of others: a text without a context is scored after
the bos token, perplexity rolls over each document by itself, and its last window is filled up with context.
"""

import logging
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fibattn.errors import InputError, MissingExtraError
from study.probes.settings import Harness


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int | None = None, batch: int = 16
) -> Any:
    """The model as lm-eval's `HFLM`, in bfloat16 autocast on a GPU.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        length: the longest input; the training length when None.
        batch: inputs of a forward pass.

    Raises:
        InputError: when lm-eval is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(f"the harness needs lm-eval ({error})", "evaluation") from None
    wrap: Any = HFLM
    return wrap(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=model.config.get_text_config().max_position_embeddings if length is None else length,
        batch_size=batch,
        mixed_precision_dtype=torch.bfloat16 if model.device.type == "cuda" else None,
    )


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Harness) -> dict[str, Any]:
    """Evaluate on lm-eval tasks; the result is plain JSON values.

    Raises:
        InputError: for an unknown task, data that cannot be had, or when lm-eval is not installed.
    """
    tasks, include = settings.tasks, settings.include
    wrapped = language_model(model, tokenizer, length=settings.length, batch=settings.batch)
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    evaluate: Any = lm_eval.simple_evaluate
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = None if include is None else TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or set(tasks) - set(manager.all_tasks):
        # Reading all that lm-eval comes with takes seconds.
        manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if task not in manager.all_tasks:
            near = get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them"
            raise InputError(f"lm-eval knows no task {task!r}: {hint}")
    try:
        found = evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=settings.limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:
        raise InputError(
            f"the data of {', '.join(tasks)} cannot be had ({str(error).splitlines()[0]}); run once with a network so "
            "that the Hub's cache holds it, or choose tasks with local data by include"
        ) from None
    return {
        "probe": "harness",
        "lm_eval": lm_eval.__version__,
        "length": wrapped.max_length,
        "limit": settings.limit,
        "rows": [{"task": task, **_numbers(values)} for task, values in found["results"].items()],
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task under short names: `acc`, `acc_stderr`; those with a filter keep its name."""
    numbers = {key.removesuffix(",none"): value for key, value in values.items()}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float)}
