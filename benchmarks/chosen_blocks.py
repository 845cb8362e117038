"""`python -m benchmarks chosen-blocks`: blocks that queries choose, beside fixed distances and dense attention."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """Check and time attention to chosen blocks on an NVIDIA GPU: window of 32, four blocks of 16 within 1,024.

    8 query heads and 2 KV heads of 64, bfloat16; beside it the hybrid's distances (W = 64) and dense attention.
    Choices are those of random queries, of which each differs from its neighbour's, and of queries that change slowly.
    """

    lengths: tuple[int, ...] = (1024, 8192)
    """Tokens of a sequence."""
    tokens: int = 32_768
    """Tokens of all sequences together."""
    out: Path = Path("bench/chosen-blocks.json")
    """Where the JSON goes."""


def run(arguments: list[str]) -> None:
    """Check against the reference, time, print a line for each row, write the JSON."""
    chosen = parse(Arguments, arguments, "python -m benchmarks chosen-blocks")
    if min(chosen.lengths, default=0) < 1 or chosen.tokens < 1:
        raise InputError(f"lengths {chosen.lengths}, tokens {chosen.tokens}: both must be at least 1")

    from benchmarks.environment import environment, heading, need_gpu

    need_gpu()
    print(heading(), flush=True)
    result: dict[str, Any] = {"environment": environment(), "errors": _errors(), "rows": []}
    print("relative errors, float32:", ", ".join(f"{name} {x:.1e}" for name, x in result["errors"].items()), flush=True)
    for length in chosen.lengths:
        for name, work in _works(length, max(chosen.tokens // length, 1)):
            row = {"what": name, "length": length, **_timed(work)}
            result["rows"].append(row)
            times = ", ".join(f"{one.replace('_', ' + ')} {row[one]['median']:,.1f} µs" for one in work)
            print(f"{length:,}: {name}: {times}", flush=True)
            files.write_json(chosen.out, result)
    if max(result["errors"].values()) > 1e-4:
        raise SystemExit("python -m benchmarks chosen-blocks: wrong numbers; see the errors above")


Work = Callable[[], object]


def _timed(work: dict[str, Work]) -> dict[str, Any]:
    from benchmarks import timing

    return {name: asdict(timing.measure(one, "cuda")) for name, one in work.items()}


def _errors() -> dict[str, float]:
    """Relative errors (Euclidean norms) of the kernels in float32 against the float64 reference."""
    import torch

    from fibattn.attention import attend_chosen
    from fibattn.pattern import ChosenPattern

    torch.manual_seed(0)
    shapes = ((8, 64), (2, 64), (2, 64), (8, 64), (2, 64))
    found = {}
    inputs = [torch.randn(1, 1300, *shape, device="cuda", requires_grad=True) for shape in shapes]
    trust = torch.rand(2, device="cuda", requires_grad=True)
    for backend in ("reference", "triton"):
        q, k, v, *far = inputs
        out, lse = attend_chosen(q, k, v, ChosenPattern(), far=tuple(far), trust=trust, backend=backend)  # pyright: ignore
        torch.manual_seed(1)
        upstream = (torch.randn_like(out), torch.randn_like(lse))
        found[backend] = [out, lse, *torch.autograd.grad((out, lse), [*inputs, trust], upstream)]
    names = ("out", "lse", "dq", "dk", "dv", "far dq", "far dk", "trust")
    pairs = zip(found["triton"], found["reference"], strict=True)
    return {name: float((x - y).norm() / y.norm()) for name, (x, y) in zip(names, pairs, strict=True)}


def _works(length: int, batch: int) -> list[tuple[str, dict[str, Work]]]:
    """What is timed at a length."""
    import torch
    from torch.nn.functional import avg_pool1d

    from benchmarks.operator.cases import Case
    from benchmarks.operator.providers import PROVIDERS
    from fibattn.attention import attend_chosen
    from fibattn.attention.blocks import block_means
    from fibattn.attention.chosen import numbers_of
    from fibattn.attention.triton.chosen import Numbers, choose
    from fibattn.pattern import ChosenPattern

    case, pattern = Case("small", 64, length, batch, "bfloat16", "cuda"), ChosenPattern()
    q, k, v = case.inputs()
    smooth = avg_pool1d(q.flatten(2).transpose(1, 2).float(), 33, 1, 16, count_include_pad=False) * 33**0.5
    smooth = smooth.transpose(1, 2).unflatten(2, q.shape[2:]).to(q.dtype).contiguous()
    found = []
    for name, far_q in (("chosen, random", q), ("chosen, alike", smooth)):
        means, numbers = block_means(k, pattern.block), Numbers(*numbers_of(pattern, q.shape[-1] ** -0.5))

        def choosing(far_q: torch.Tensor = far_q, means: torch.Tensor = means, numbers: Any = numbers) -> Any:
            return choose(far_q, means, k.shape[1], None, None, numbers)

        listed = float(choosing()[1][..., 0].float().mean())
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, far_q, k)]

        def attending(q: Any, k: Any, v: Any, *far: Any) -> torch.Tensor:
            return attend_chosen(q, k, v, pattern, far=far)[0]  # pyright: ignore

        works = {"choice": choosing, **_passes(attending, leaves)}
        found.append((f"{name} ({listed:.1f} blocks a tile)", works))
    for name in ("fibattn", "dense-flash", "dense-cudnn"):
        if PROVIDERS[name].obstacle(case, True) is None:
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            found.append((name, _passes(PROVIDERS[name].setup(case).function, leaves)))
    return found


def _passes(function: Callable[..., Any], leaves: list[Any]) -> dict[str, Work]:
    import torch

    upstream = torch.randn_like(leaves[0])

    def forward() -> object:
        with torch.no_grad():
            return function(*leaves)

    return {
        "forward": forward,
        "forward_backward": lambda: torch.autograd.grad(function(*leaves), leaves, upstream),
    }
