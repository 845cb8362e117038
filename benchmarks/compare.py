"""`python -m benchmarks compare OLD NEW`: is a source tree as fast as another, and does it compute the same?

A process for each tree, both on one device, takes turns with the other case by case and round by round, so that what
else goes on in the machine meets both alike. `compare_cases.py` has the cases.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import tyro

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arguments:
    """Time the operator, a training step and a decoding step of two source trees side by side, and compare the results.

    A tree is a checkout: the folder that holds `src/fibattn`.
    """

    old: Annotated[Path, tyro.conf.Positional]
    new: Annotated[Path, tyro.conf.Positional]
    only: tuple[str, ...] = ()
    """Cases whose name has one of these words in it; all when left out."""
    rounds: int = 3
    """How often each tree is timed on each case; the median counts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; the GPU when there is one."""
    cases: Path = _HERE / "compare_cases.py"
    """The file with the cases, for both trees."""
    out: Path = Path("bench/compare.json")
    """Where the JSON goes."""


class Tree:
    """The process of one source tree."""

    def __init__(self, root: Path, cases: Path, device: str, caches: Path):
        self.root = root
        environment = {
            **os.environ,
            "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
            # Compiled code of one tree must not serve the other.
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        command = [sys.executable, "-P", str(_HERE / "compare_worker.py"), str(cases.resolve()), device]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, **request: Any) -> None:
        """Ask, without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest request.

        Raises:
            InputError: when the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the process of {self.root} ended with status {self.process.wait()}; it says why above")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(arguments: list[str]) -> None:
    """Compare, print a line for each case, write the JSON."""
    chosen = parse(Arguments, arguments, "python -m benchmarks compare")
    for root in (chosen.old, chosen.new):
        if not (root / "src" / "fibattn").is_dir():
            raise InputError(f"{root} is no source tree: it has no src/fibattn; give the folder of a checkout")
    if chosen.rounds < 1:
        raise InputError(f"rounds is {chosen.rounds}; it must be at least 1")
    from benchmarks.environment import device_of, environment, heading

    device = device_of(chosen.device)
    print(heading(), flush=True)
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("old", "new")]
        roots = (chosen.old.resolve(), chosen.new.resolve())
        trees = [Tree(root, chosen.cases, device, folder) for root, folder in zip(roots, folders, strict=True)]
        try:
            result = {"environment": environment(), "old": str(chosen.old), "new": str(chosen.new), "rows": []}
            for name in _names(trees, chosen.only):
                row = {"case": name, **compare(trees, name, chosen.rounds, Path(scratch))}
                result["rows"].append(row)
                print(line_of(row), flush=True)
                files.write_json(chosen.out, result)
        finally:
            for tree in trees:
                tree.close()
    print(f"written to {chosen.out}")


def compare(trees: Sequence[Tree], name: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """One case in both trees: medians in microseconds, their ratio, and how the outputs differ."""
    saved = [scratch / "old.safetensors", scratch / "new.safetensors"]
    for tree, path in zip(trees, saved, strict=True):
        tree.send(do="build", case=name, outputs=str(path))
    built = [tree.receive() for tree in trees]
    try:
        errors = {which: one["error"] for which, one in zip(("old", "new"), built, strict=True) if "error" in one}
        if errors:
            return {"errors": errors}
        times: list[list[float]] = [[], []]
        how = ""
        for number in range(rounds):
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                found = trees[index].ask(do="time")
                if "error" in found:
                    return {"errors": {("old", "new")[index]: found["error"]}}
                times[index].append(found["median"])
                how = found["how"]
        old, new = (statistics.median(one) for one in times)
        rows = {"old": old, "new": new, "ratio": new / old, "how": how, "rounds": times}
        return {**rows, "peak_bytes": [one["peak_bytes"] for one in built], "differences": differences(*saved)}
    finally:
        for tree in trees:
            tree.ask(do="drop")


def differences(old: Path, new: Path) -> dict[str, float | str]:
    """What differs between two files of tensors: the norm of the difference over that of the old, by name.

    Empty where every tensor is the same, bit by bit.
    """
    import torch
    from safetensors.torch import load_file

    before, after = load_file(old), load_file(new)
    found: dict[str, float | str] = dict.fromkeys(before.keys() ^ after.keys(), "in one tree only")
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            found[name] = f"{one.dtype} {tuple(one.shape)} was, {other.dtype} {tuple(other.shape)} is"
        elif not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other))):
            found[name] = float((other.double() - one.double()).norm() / one.double().norm().clamp(min=1e-30))
    return dict(sorted(found.items()))


def line_of(row: dict[str, Any]) -> str:
    """A case in a line."""
    if "errors" in row:
        return f"{row['case']}: " + "; ".join(f"{which}: {error}" for which, error in row["errors"].items())
    low, high = (f"{1 - max(one) / min(one):.1%}".lstrip("-") for one in row["rounds"])
    different = row["differences"]
    same = (
        "the same bits"
        if not different
        else f"{len(different)} outputs differ: "
        + ", ".join(
            f"{name} {by:.1e}" if isinstance(by, float) else f"{name} {by}" for name, by in list(different.items())[:4]
        )
    )
    return (
        f"{row['case']}: {row['old']:,.1f} µs was (rounds within {low}), {row['new']:,.1f} is ({high}), "
        f"{row['ratio']:.3f} times; {same}"
    )


def _names(trees: Sequence[Tree], only: Sequence[str]) -> list[str]:
    """The cases that both trees know and that are asked for.

    Raises:
        InputError: when there is none.
    """
    both = [tree.ask(do="list")["cases"] for tree in trees]
    names = [name for name in both[0] if name in both[1] and (not only or any(word in name for word in only))]
    if not names:
        raise InputError(f"no case has {' or '.join(only)} in its name; there are: {', '.join(both[0])}")
    return names
