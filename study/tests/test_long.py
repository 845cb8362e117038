"""The table of the long stage."""

import math
from typing import Any

from study.report.long_table import long_tables

LENGTHS = ("1024", "8192", "32768")


def sets(first: float, lengths: tuple[str, ...] = LENGTHS) -> dict[str, Any]:
    """Losses from `first` on, a tenth more for each length; a fall of a hundredth over the parts of a sequence."""
    return {
        name: {
            length: {
                "nll": first + number / 10,
                "targets": 4096,
                "bins": [first + number / 10 - part / 100 for part in range(8)],
            }
            for number, length in enumerate(lengths)
        }
        for name in ("books", "docs")
    }


def recipe(rate: float, **steps: int) -> dict[str, Any]:
    return {"optimizer": {"learning_rate": rate}, **steps}


RECORD = {
    "run": "dense",
    "seed": 42,
    "recipe": recipe(0.006),
    "inputs": {"data_fingerprint": "some"},
    "tokens": 106_000_000,
    "trained_at": 1024,
    "hardware": {"device": "GPU", "processes_a_gpu": 2},
    "versions": {"torch": "2"},
    "evaluation": sets(3.0),
    "bounded": {"1024": sets(2.9, LENGTHS[1:])},
    "training": {"tokens_per_second": 800_000.0, "alone": True},
    "lengthened": {"8192": sets(2.8)},
    "lengthened_bounded": {"8192": sets(2.7, LENGTHS[2:])},
    "lengthened_training": {"tokens_per_second": 400_000.0, "alone": True},
    "lengthened_recipe": recipe(0.006, steps=10, sequences_per_step=16, sequence_length=8192),
}


def test_a_model_before_and_after_its_long_stage_bounded_and_not() -> None:
    [table] = long_tables([RECORD, RECORD | {"lengthened": {}}])
    cells = [dict(zip(table.frame.columns, row, strict=True)) for row in table.rows]
    assert [row["trained"] for row in cells] == [
        "in 1,024",
        "in 1,024, bounded to 1,024",
        "then in 8,192",
        "then in 8,192, bounded to 8,192",
    ]
    losses = [(3.0, 3.1, 3.2), (3.0, 2.9, 3.0), (2.8, 2.9, 3.0), (2.8, 2.9, 2.7)]
    for row, expected in zip(cells, losses, strict=True):
        assert [row[length] for length in ("1,024", "8,192", "32,768")] == [f"{math.exp(one):.2f}" for one in expected]
    assert (cells[2]["1/8"], cells[2]["8/8"]) == (f"{math.exp(3.0):.2f}", f"{math.exp(2.93):.2f}")
    assert [row["tokens/s"] for row in cells] == ["800 k", "800 k", "400 k", "400 k"]
    assert [row["tokens"] for row in cells] == ["106 M", "106 M", "1 M", "1 M"]
    assert long_tables([]) == []


def test_a_model_without_full_layers_has_no_row_for_a_bound() -> None:
    [table] = long_tables([RECORD | {"run": "window-w127-none", "bounded": {}}])  # the first such results have one
    assert [row[1] for row in table.rows] == ["in 1,024", "then in 8,192"]


def test_a_model_that_several_stages_went_on_from_stands_once() -> None:
    gentle = recipe(0.0015, steps=20, sequences_per_step=16, sequence_length=8192)
    other = RECORD | {"run": "dense-stage0.25", "lengthened_recipe": gentle}
    seed = {"seed": 43, "recipe": recipe(0.006, init_seed=43), "run": "dense-stage0.25-seed43"}
    disturbed = {"lengthened_training": {"tokens_per_second": 1.0, "alone": False}}
    [table] = long_tables([RECORD, other, other | seed | disturbed])
    bound = {"then in 8,192": "8,192", "in 1,024": "1,024"}

    def rows(model: str, trained: str, tokens: str) -> list[tuple[str, ...]]:
        bounded = f"{trained}, bounded to {bound[trained.split(' at ')[0]]}"
        return [(model, one, tokens) for one in (trained, bounded)]

    assert [row[:3] for row in table.rows] == [
        *rows("dense", "in 1,024", "106 M"),
        *rows("dense", "then in 8,192", "1 M"),
        *rows("dense-stage0.25", "then in 8,192 at 0.25 of the rates", "3 M"),
        *rows("dense-seed43", "in 1,024", "106 M"),
        *rows("dense-stage0.25-seed43", "then in 8,192 at 0.25 of the rates", "3 M"),
    ]
    assert [row[-1] for row in table.rows[::2]] == ["800 k", "400 k", "400 k", "800 k", "–"]
