"""The kernels compiled for a small GPU, on any machine: they must fit its 99 KB of shared memory.

Compute capability 8.6 stands for the GPUs with the least. The largest tiles of every kind are compiled: wide heads,
many query heads a KV head, dense windows, rungs between two keys (which take two rows where others take one).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fibattn.attention.triton import (  # noqa: E402
    backward,
    chosen,
    chosen_backward,
    chosen_decode,
    chosen_forward,
    decode,
    forward,
    key_gradients,
    paged,
)
from fibattn.attention.triton.columns import Columns  # noqa: E402
from fibattn.attention.triton.launch import FUSED, row_options  # noqa: E402
from fibattn.attention.triton.shape import shape_of  # noqa: E402

SMALL_GPU, SHARED_MEMORY = 86, 101_376
POINTERS = dict.fromkeys(("p_positions", "p_cache_positions", "p_table", "p_rungs"), "i32")
POINTERS |= dict.fromkeys(("p_starts", "p_lengths", "p_first", "p_lists"), "i32")
POINTERS |= {"p_bits": "i64"}
POINTERS |= dict.fromkeys(("p_fractions", "p_factors", "p_grad_lse", "p_trust", "p_part"), "fp32")


def _no_machine_code(*given: Any) -> tuple[str, str] | None:
    """Stop where the shared memory is known, at LLVM's IR: what follows takes a third of the time."""
    if not given:  # Triton asks for a key of its cache, and for that key's hash
        return "no machine code", "no machine code"
    stages: dict[str, Any] = given[1]
    stages["ptx"] = lambda _, metadata: metadata.update(name="none") or ""
    stages["cubin"] = lambda *_: b""
    return None


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_far_as_needed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In a cache of its own, where no program looks for kernels that it would run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _no_machine_code)
        patch.setenv("DISABLE_LLVM_OPT", "1")
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def shared_memory(kernel: Any, sizes: dict[str, Any], dtype: str, absent: set[str]) -> int:
    """Bytes that a kernel compiled for the small GPU asks for."""
    pointers = POINTERS | dict.fromkeys(("p_lse", "p_delta", "p_partial"), "fp64" if dtype == "fp32" else "fp32")
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in absent or name[0].isupper():
            signature[name], constants[name] = "constexpr", None if name in absent else sizes[name]
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name, dtype)
        elif name.startswith("stride_") and not name.endswith(("set", "positions", "shift", "table")):
            signature[name] = ("i32",) * 3
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    places = [(i, signature[name]) for i, name in enumerate(kernel.arg_names)]
    aligned = [(i,) for i, kind in places if isinstance(kind, str) and kind.startswith("*")]
    aligned += [(i, part) for i, kind in places if isinstance(kind, tuple) for part in range(3)]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = FUSED | {name: sizes[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", SMALL_GPU, 32), options=options).metadata.shared


@pytest.mark.parametrize(
    ("dtype", "size", "group", "dense", "learned"),
    [
        (torch.bfloat16, 64, 4, True, False),
        (torch.bfloat16, 128, 4, True, False),
        (torch.bfloat16, 128, 32, True, False),
        (torch.bfloat16, 128, 1, True, True),
        (torch.bfloat16, 256, 1, True, False),
        (torch.bfloat16, 256, 4, True, False),
        (torch.float32, 128, 32, True, False),
        (torch.float32, 256, 4, False, True),
    ],
)
def test_kernels_fit_a_small_gpu(dtype: torch.dtype, size: int, group: int, dense: bool, learned: bool) -> None:
    q, k = (torch.empty(1, 1, heads, size, dtype=dtype, device="meta") for heads in (group, 1))
    shape, word = shape_of(q, k), "fp32" if dtype == torch.float32 else "bf16"
    window = 128 if dense else 12
    table = torch.zeros(1, 1)
    columns = Columns(table, window, 0 if dense else 64, table, table if learned else None)
    delta = backward.GIVEN if shape.exact else backward.FROM_OUTPUT
    others = {"AFTER_RUNGS": True, "DELTA": delta.value}
    absent = {"p_positions", "p_grad_lse"} | (set() if learned else {"p_fractions", "p_factors", "p_partial"})
    for kernel, tiles in (
        (forward.forward_kernel, forward.tiles_for(shape, columns)),
        (backward.query_grad_kernel, backward.query_tiles_for(shape, columns)),
    ):
        sizes = others | row_options(shape, tiles, columns, wide=False)
        assert shared_memory(kernel, sizes, word, absent) <= SHARED_MEMORY
    given = {name: sizes[name] for name in ("GROUP", "GP", "SIZE", "BD", "EXACT", "WIDE")}
    tiles = key_gradients.window_tiles_for(shape, window)
    sizes = given | others | {"BN": tiles.keys, "BR": max(tiles.rows, shape.padded_group)}
    sizes |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    assert shared_memory(key_gradients.window_grad_kernel, sizes, word, absent) <= SHARED_MEMORY
    tiles = key_gradients.rung_tiles_for(shape, learned)
    sizes = given | {"BN": tiles.keys, "BP": tiles.part, "UNROLL": tiles.unroll}
    sizes |= {"num_warps": tiles.warps, "num_stages": 3}
    assert shared_memory(key_gradients.rung_grad_kernel, sizes, word, absent) <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("dtype", "size", "group", "learned"),
    [
        (torch.bfloat16, 64, 4, True),
        (torch.bfloat16, 128, 32, False),
        (torch.bfloat16, 128, 32, True),
        (torch.bfloat16, 256, 32, True),
        (torch.float32, 128, 32, True),
        (torch.float32, 256, 4, True),
    ],
)
def test_decoding_fits_a_small_gpu(dtype: torch.dtype, size: int, group: int, learned: bool) -> None:
    q, k = (torch.empty(1, 1, heads, size, dtype=dtype, device="meta") for heads in (group, 1))
    shape = shape_of(q, k)
    for window in (128, 1023):
        columns, stages = decode.tiles_for(shape, window)
        splits = decode.splits_for(window, programs=1)
        sizes = {"GROUP": group, "SIZE": size, "BD": shape.padded_size, "ROWS": max(16, shape.padded_group)}
        sizes |= {"BN": columns, "SPLITS": splits, "num_warps": 4, "num_stages": stages}
        absent = {"p_positions", *(() if learned else ("p_fractions",)), *(() if splits > 1 else ("p_part",))}
        word = "fp32" if shape.exact else "bf16"
        assert shared_memory(decode.decode_kernel, sizes, word, absent) <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("dtype", "size", "far"),
    [(torch.bfloat16, 64, False), (torch.bfloat16, 64, True), (torch.bfloat16, 256, True), (torch.float32, 128, True)],
)
def test_decoding_by_choice_fits_a_small_gpu(dtype: torch.dtype, size: int, far: bool) -> None:
    q, k = (torch.empty(1, 1, heads, size, dtype=dtype, device="meta") for heads in (8, 1))
    shape = shape_of(q, k)
    columns, stages = decode.tiles_for(shape, window=31)
    sizes = {
        "GROUP": 8,
        "SIZE": size,
        "BD": shape.padded_size,
        "ROWS": 16,
        "BLOCK": 64,
        "COUNT": 4,
        "FAR": far,
        "ANCHORED": True,
    }
    sizes |= {"BN": min(columns, 64), "num_warps": 4, "num_stages": stages}
    word = "fp32" if shape.exact else "bf16"
    assert shared_memory(chosen_decode.chosen_decode_kernel, sizes, word, {"p_positions"}) <= SHARED_MEMORY


@pytest.mark.parametrize("size", [64, 128])
def test_chosen_blocks_fit_a_small_gpu(size: int) -> None:
    q, k = (torch.empty(1, 1, heads, size, dtype=torch.bfloat16, device="meta") for heads in (8, 1))
    shape = shape_of(q, k)
    for kernel, tiles in (
        (chosen.choose_kernel, chosen_forward.Tiles(64, chosen.warps_for(shape), 1)),
        (chosen_forward.chosen_forward_kernel, chosen_forward.tiles_for(shape)),
        (chosen_backward.chosen_query_grad_kernel, chosen_forward.tiles_for(shape)),
        (chosen_backward.chosen_key_grad_kernel, chosen_backward.key_tiles_for(shape, 16)),
    ):
        sizes = chosen_forward.options(shape, tiles, 16, False) | {"COUNT": 4, "ANCHORED": True}
        absent = {"p_positions", "p_shift", "p_grad_lse"}
        assert shared_memory(kernel, sizes, "bf16", absent) <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("window", "learned", "rungs", "pages"),
    [(12, False, True, True), (128, True, True, True), (1023, False, False, True), (1023, False, False, False)],
)
@pytest.mark.parametrize(
    ("dtype", "size", "group", "longest"),
    [
        (torch.bfloat16, 64, 4, 512),
        (torch.bfloat16, 256, 32, 512),
        (torch.float32, 128, 32, 512),
        (torch.float32, 128, 32, 1),
    ],
)
def test_pages_fit_a_small_gpu(
    dtype: torch.dtype, size: int, group: int, window: int, learned: bool, rungs: bool, pages: bool, longest: int
) -> None:
    q, k = (torch.empty(1, 1, heads, size, dtype=dtype, device="meta") for heads in (group, 1))
    shape = shape_of(q, k)
    absent = {"p_first" if pages else "p_table"} | (set() if learned else {"p_fractions"})
    word = "fp32" if shape.exact else "bf16"
    sizes = paged.options_for(shape, window, longest, rungs, pages)
    assert shared_memory(paged.paged_kernel, sizes, word, absent) <= SHARED_MEMORY
