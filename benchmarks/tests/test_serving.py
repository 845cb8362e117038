"""`python -m benchmarks paged-decode` and `batching`: what is timed; not how fast it is."""

import json
from pathlib import Path

import torch

from benchmarks.__main__ import main
from benchmarks.pages import PATTERNS, mix
from fibattn import Pattern, attend
from fibattn.attention.paged import attend_paged


def test_pages_and_rings_are_timed_for_every_pattern(tmp_path: Path) -> None:
    words = ["--requests", "3", "--longest", "200", "--chunk", "32", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["paged-decode", *words]) == 0
    rows = json.loads((tmp_path / "paged-decode.json").read_text())["rows"]
    assert [row["pattern"] for row in rows] == list(PATTERNS)
    assert all(row[one] > 0 for row in rows for one in ("paged", "ring", "chunk", "chunk_by_itself"))


def test_the_mix_is_what_the_kernel_takes() -> None:
    lengths, new = torch.tensor([40, 7]), torch.tensor([3, 7])
    k, v, batch = mix(lengths, new, 16, {"dtype": torch.float32, "device": "cpu"})
    q, pattern = torch.randn(10, 8, 64), Pattern(3, (5, 30))
    assert batch.table is not None
    found = attend_paged(q, k, v, pattern, batch)
    for one, own in ((0, slice(0, 3)), (1, slice(3, 10))):
        keys, values = (x[batch.table[one].long()].flatten(0, 1)[None, : lengths[one]] for x in (k, v))
        torch.testing.assert_close(found[None, own], attend(q[None, own], keys, values, pattern), rtol=1e-4, atol=1e-5)


def test_requests_write_as_from_the_middle_of_their_texts(tmp_path: Path) -> None:
    words = ["--requests", "2", "--contexts", "50", "--steps", "12", "--models", "stagger", "dense", "--device", "cpu"]
    assert main(["batching", *words, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "batching.json").read_text())["rows"]
    assert [(row["model"], row["context"], row["requests"]) for row in rows] == [("stagger", 50, 2), ("dense", 50, 2)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
