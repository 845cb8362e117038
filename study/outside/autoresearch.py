"""Five minutes of karpathy/autoresearch's `train.py` (https://github.com/karpathy/autoresearch) on the study's text."""

import os
import runpy
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from study import measure
from study.same_bytes import check_same_sets

_STAND_INS = Path(__file__).parent / "stand_ins"


def run_outside(code: Path, data: Path, like: Path, *, seconds: float, targets: int) -> dict[str, Any]:
    """Run the program in the folder `code`, as it is; what came of it as JSON values.

    Args:
        code: holds `train.py`.
        data: the text, prepared with a vocabulary of 8,192, the program's own size.
        like: the same text as the study has it; evaluated are the bytes of its first `targets` tokens of each set.
        seconds: how long to train, compilation and evaluation apart.

    Raises:
        InputError: for a folder without the program, or texts that are not the same.
    """
    if not (code / "train.py").is_file():
        raise InputError(f"{code} has no train.py; give a checkout of karpathy/autoresearch")
    own, study = PreparedData.open(data), PreparedData.open(like)
    check_same_sets(own, study)
    # By the names that the program imports, and the stand-ins read.
    sys.path.insert(0, str(_STAND_INS))
    import prepare  # pyright: ignore[reportMissingImports]

    given = {prepare.DATA: data, prepare.LIKE: like, prepare.SECONDS: seconds, prepare.TARGETS: targets}
    os.environ.update({name: str(value) for name, value in given.items()})
    prepare.TIME_BUDGET = seconds
    began = time.monotonic()
    left = runpy.run_path(str(code / "train.py"), run_name="__main__")
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "program_sha256": files.sha256(code / "train.py"),
        "data_fingerprints": [own.fingerprint, study.fingerprint],
        "hardware": measure.machine(),
        "versions": measure.versions(),
        "parameters": left["num_params"],
        "tokens": left["total_tokens"],
        "training_seconds": left["total_training_time"],
        "seconds": time.monotonic() - began,
        "targets": targets,
        "order": "epochs",
        "bits_per_byte": dict(prepare.FOUND),
    }
