"""`fibattn train [RECIPE]`: train a model, or go on where the run was."""

import os
import shlex
from contextlib import nullcontext

from fibattn.cli.door import is_first_process
from fibattn.cli.flags import parse
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.training.presets import DEFAULT, ON_CPU, PRESETS
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe


def run(arguments: list[str]) -> None:
    """Train the recipe (a preset or a recipe.json), with its fields overridden by flags."""
    recipe = _recipe(arguments)
    import torch  # these take seconds to import
    from accelerate import PartialState

    from fibattn.training.run import train

    started = "torchrun started no processes (torchrun --nproc-per-node N -m fibattn …)"
    for missing, there in ((started, "LOCAL_RANK" in os.environ), ("PyTorch finds no GPU", torch.cuda.is_available())):
        for name, alone in (("context_parallel", 1), ("parallel", "ddp")):
            if (value := getattr(recipe, name)) != alone and not there:
                raise InputError(f"{name} is {value}, and {missing} here, over which to cut what it says; leave it out")
    # Of several processes of one training the first holds the lock for all.
    with locked(recipe.out) if is_first_process() else nullcontext(True) as free:
        if not free:
            raise InputError(f"another process is training in {recipe.out}; wait for it, or give another --out")
        model = train(recipe)
    state = PartialState()
    state.print(f"\nthe model is in {model}")
    if PreparedData.open(recipe.data, verify=False).validation:
        state.print("evaluate it:", shlex.join(["fibattn", "eval", str(model), "--data", str(recipe.data)]))
    state.destroy_process_group()


def _recipe(arguments: list[str]) -> Recipe:
    """The recipe of the command line, checked as far as can be before torch is loaded, which takes seconds."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, flags = (arguments[0], arguments[1:]) if named else (DEFAULT, arguments)
    if {"-h", "--help"} & set(flags) and is_first_process():
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
    if is_first_process():
        print(f"no GPU here: the recipe is {ON_CPU}, a toy; for the full size name it: fibattn train {DEFAULT} …")
    return ON_CPU
