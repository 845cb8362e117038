"""The run: every provider on every case, checked before it is timed, written down as it goes."""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import timing
from benchmarks.environment import environment
from benchmarks.operator import check, memory
from benchmarks.operator.cases import Case, Grid
from benchmarks.operator.providers import PROVIDERS, Call, Provider
from fibattn.errors import InputError

PASSES = ("forward", "forward_backward")

Row = dict[str, Any]
Result = dict[str, Any]


def plan(grids: Sequence[Grid], device: str, dtype: str, providers: Sequence[str] = ()) -> list[tuple[Case, list[str]]]:
    """Every case with the names of the providers to run on it.

    Raises:
        InputError: for an unknown provider, or a case that is none.
    """
    unknown = [name for name in providers if name not in PROVIDERS]
    if unknown:
        raise InputError(f"there is no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    chosen = []
    for grid in grids:
        names = [name for name in PROVIDERS if name in (grid.providers or PROVIDERS)]
        names = [name for name in names if not providers or name in providers]
        chosen += [(case, names) for case in grid.cases(device, dtype) if names]
    return chosen


def obstacles(cases: Iterable[tuple[Case, list[str]]]) -> list[tuple[Case, str, dict[str, str | None]]]:
    """For every case and provider, why each pass cannot be run here, or None where it can."""
    return [
        (case, name, {one: PROVIDERS[name].obstacle(case, one == "forward_backward") for one in PASSES})
        for case, names in cases
        for name in names
    ]


def run(
    cases: Sequence[tuple[Case, list[str]]], device: str, save: Callable[[Result], None], say: Callable[[str], None]
) -> Result:
    """Check and time all cases; `save` is given the result so far after each, `say` a line for each row.

    The result is plain JSON values: `environment`, `copy_bytes_per_second` and `rows`. A row has the case,
    its `floor_us` (the bytes of q, k, v and the output once, over the copy bandwidth), and for each pass
    the times in microseconds, useful gigabytes a second, and the relative `errors`; or why there are none.
    """
    bandwidth = timing.copy_bandwidth(device)
    result: Result = {"environment": environment(), "copy_bytes_per_second": bandwidth, "rows": []}
    say(f"{result['environment']['device']}: copies {bandwidth / 1e9:,.0f} GB/s, read and written")
    for case, names in cases:
        for name in names:
            row = {"provider": name, **asdict(case), "floor_us": case.forward_bytes / bandwidth * 1e6}
            row["tensor_bytes"] = case.tensor_bytes
            _fill(row, PROVIDERS[name], name, case)
            result["rows"].append(row)
            say(_line(row, case))
            save(result)
            _clean(device)
    return result


def _fill(row: Row, provider: Provider, name: str, case: Case) -> None:
    """Put into the row whatever of the provider's measurements works here."""
    why = {one: provider.obstacle(case, one == "forward_backward") for one in PASSES}
    row["not_run"] = {one: reason for one, reason in why.items() if reason}
    if all(why.values()):
        return
    trains = why["forward_backward"] is None
    try:
        call = provider.setup(case)
        row["errors"] = check.errors(call, case, provider.computes(case), trains)
        row["right"] = max(row["errors"].values()) <= check.TOLERANCE[case.dtype]
        if not row["right"]:
            return
        _clean(case.device)
        for one in PASSES if trains else PASSES[:1]:
            row[one] = _timed(call, case, one)
        if trains:
            _clean(case.device)
            row["peak_bytes"] = memory.peak_bytes(name, call, case)
    except Exception as error:  # whatever stops one provider (memory, its compiler) must not stop the others
        row["not_run"]["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def _timed(call: Call, case: Case, one: str) -> dict[str, Any]:
    inputs = case.inputs()
    work: timing.Work
    if one == "forward":

        def work() -> object:
            with torch.no_grad():
                return call.function(*inputs)

    else:
        leaves = [x.requires_grad_() for x in inputs]
        upstream = torch.randn_like(inputs[0])

        def work() -> object:
            return torch.autograd.grad(call.function(*leaves), [*leaves, *call.parameters], upstream)

    times = timing.measure(work, case.device)
    traffic = case.forward_bytes if one == "forward" else case.training_bytes
    return {**asdict(times), "useful_gb_per_second": traffic / times.median / 1e3}


def _line(row: Row, case: Case) -> str:
    start = f"{case.label} {row['provider']}:"
    times = [f"{one.replace('_', ' + ')} {row[one]['median']:,.1f} µs" for one in PASSES if one in row]
    if row.get("right") is False:
        times.append(f"WRONG, not timed: relative errors {row['errors']}")
    reasons = dict.fromkeys(row["not_run"].values())
    return " ".join([start, ", ".join([*times, *reasons])])


def _clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
