"""`fibattn train [RECIPE]`: train a model, or go on where the run was."""

import os
import shlex
from contextlib import nullcontext

from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.training.recipe import DEFAULT, ON_CPU, PRESETS, Recipe, load_recipe


def run(arguments: list[str]) -> None:
    """Train the recipe (a preset or a recipe.json), with its fields overridden by flags."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, flags = (arguments[0], arguments[1:]) if named else (DEFAULT, arguments)
    if {"-h", "--help"} & set(flags):
        print(f"usage: fibattn train [RECIPE] [flags]\n\nRECIPE is one of {', '.join(PRESETS)}, or a recipe.json;")
        print(f"{DEFAULT} when left out, {ON_CPU} without a GPU. The defaults below are those of {name}.\n")
    elif not named:
        name = _default()
    recipe = parse(Recipe, flags, f"fibattn train {name}", default=load_recipe(name))
    try:  # before torch loads: torchrun says much when a process ends
        recipe.check()
        recipe.split(int(os.environ.get("WORLD_SIZE", "1")))
    except InputError:
        if _first_process():
            raise
        raise SystemExit(2) from None  # one process says it
    from accelerate import PartialState  # these take seconds to import

    from fibattn.training.run import train

    # Of several processes of one training the first holds the lock for all.
    with locked(recipe.out) if _first_process() else nullcontext(True) as free:
        if not free:
            raise InputError(f"another process is training in {recipe.out}; wait for it, or give another --out")
        model = train(recipe)
    state = PartialState()
    command = shlex.join(["fibattn", "eval", str(model), "--data", str(recipe.data)])
    state.print(f"\nthe model is in {model}\nevaluate it: {command}")
    state.destroy_process_group()


def _default() -> str:
    """The recipe of who names none."""
    import torch

    if torch.cuda.is_available():
        return DEFAULT
    if _first_process():
        print(f"no GPU here: the recipe is {ON_CPU}, a toy; for the full size name it: fibattn train {DEFAULT} …")
    return ON_CPU


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
