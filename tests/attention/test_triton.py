"""The GPU's kernels on the CPU: `triton_interpreted.py` in a process of its own, under Triton's interpreter.

A process of its own, because Triton decides when it is imported whether it interprets, and a test before
this one (or a GPU test after it) may need it compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fibattn.attention import attend
from fibattn.errors import InputError
from fibattn.pattern import Pattern


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (the extra triton)")
    checks = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(checks)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_kernels_refuse_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        attend(q, q, q, Pattern(2), backend="triton")


def test_missing_triton_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fibattn.attention import attend; from fibattn.pattern import Pattern\n"
        "q = torch.randn(1, 4, 2, 16); attend(q, q, q, Pattern(2))\n"
        "try: attend(q, q, q, Pattern(2), backend='triton')\n"
        "except ImportError as error: assert 'needs Triton, which is not installed; install it: pip' in str(error)\n"
        "else: raise SystemExit('no ImportError')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
