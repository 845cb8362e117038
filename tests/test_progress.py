"""Progress: what the lines say of speed and time left."""

import re
import time

import pytest

from fibattn.progress import Meter


def test_the_first_update_does_not_count_into_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("work", 103, "steps", every=0) as meter:
        meter.resume(3)
        time.sleep(1)  # stands for compilation
        for _ in range(3):
            meter.update(1)
    first, _, third, end = capsys.readouterr().err.splitlines()
    assert first.startswith("work: 4/103 steps, ")
    assert "left" not in first
    left = re.search(r"6/103 steps, .*, (\d+)s left", third)
    assert left is not None
    assert int(left[1]) < 16, "97 steps of a third of a second, were the first in it"
    assert float(re.search(r"\(([\d.]+) steps/s\)", end)[1]) < 4, "of all the time, at the end"  # pyright: ignore
