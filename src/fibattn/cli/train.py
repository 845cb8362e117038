"""`fibattn train [RECIPE]`: train a model, or go on where the run was."""

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

from fibattn.cli.flags import parse
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.training.presets import DEFAULT, ON_CPU, PRESETS
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe

_PATIENCE = 20  # seconds


def run(arguments: list[str]) -> None:
    """Train the recipe (a preset or a recipe.json), with its fields overridden by flags."""
    with _said_once():
        recipe = _recipe(arguments)
    import torch  # these take seconds to import
    from accelerate import PartialState

    from fibattn.training.run import train

    if recipe.context_parallel > 1 and not torch.cuda.is_available():
        raise InputError(
            f"context_parallel is {recipe.context_parallel}, and sequences are cut over GPUs alone; leave it out"
        )

    # Of several processes of one training the first holds the lock for all.
    with locked(recipe.out) if _first_process() else nullcontext(True) as free:
        if not free:
            raise InputError(f"another process is training in {recipe.out}; wait for it, or give another --out")
        model = train(recipe)
    state = PartialState()
    command = shlex.join(["fibattn", "eval", str(model), "--data", str(recipe.data)])
    state.print(f"\nthe model is in {model}\nevaluate it: {command}")
    state.destroy_process_group()


@contextmanager
def _said_once() -> Iterator[None]:
    """Of several processes under torchrun the first one says what is wrong; it ends the others, who wait for that."""
    if _first_process():
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except (InputError, SystemExit) as error:
        code = getattr(error, "code", 2)
        time.sleep(_PATIENCE if code else 0)
        raise SystemExit(code) from None


def _recipe(arguments: list[str]) -> Recipe:
    """The recipe of the command line, checked as far as can be before torch is loaded, which takes seconds."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, flags = (arguments[0], arguments[1:]) if named else (DEFAULT, arguments)
    if {"-h", "--help"} & set(flags):
        print(f"usage: fibattn train [RECIPE] [flags]\n\nRECIPE is one of {', '.join(PRESETS)}, or a recipe.json;")
        print(f"{DEFAULT} when left out, {ON_CPU} without a GPU. The defaults below are those of {name}.\n")
    elif not named:
        name = _default()
    recipe = parse(Recipe, flags, f"fibattn train {name}", default=load_recipe(name))
    recipe.check()
    recipe.split(int(os.environ.get("WORLD_SIZE", "1")))
    PreparedData.open(recipe.data, verify=False)
    return recipe


def _default() -> str:
    """The recipe of who names none."""
    import torch

    if torch.cuda.is_available():
        return DEFAULT
    print(f"no GPU here: the recipe is {ON_CPU}, a toy; for the full size name it: fibattn train {DEFAULT} …")
    return ON_CPU


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
