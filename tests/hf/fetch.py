"""Fetch the tests of the installed Transformers version for `causal_lm.py`, from GitHub or else from PyPI.

GitHub's archive of the release has all of them; PyPI's lacks generation and export.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import transformers

HOME = Path(sys.prefix) / "hf-tests" / transformers.__version__
ARCHIVE = f"https://github.com/huggingface/transformers/archive/refs/tags/v{transformers.__version__}.tar.gz"


def fetch() -> Path:
    """The folder that holds `tests`, fetched unless it is there.

    Raises:
        SystemExit: when neither place can be reached.
    """
    if not (HOME / "tests").exists():
        archive = _github() or _pypi()
        if archive is None:
            raise SystemExit(f"the tests of transformers {transformers.__version__} are neither on GitHub nor on PyPI")
        staged = HOME.with_name(".staging")
        shutil.rmtree(staged, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            wanted = [member for member in tar if member.name.split("/")[1:2] == ["tests"] and member.isfile()]
            for member in wanted:
                member.name = member.name.partition("/")[2]
            tar.extractall(staged, members=wanted, filter="data")
        staged.replace(HOME)
    return HOME


def _github() -> bytes | None:
    try:
        with urllib.request.urlopen(ARCHIVE, timeout=60) as answer:
            return answer.read()
    except OSError as error:
        print(f"GitHub cannot be reached ({error}); PyPI instead, where generation and export are missing")
        return None


def _pypi() -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        wanted = ["--no-deps", "--no-binary", ":all:", "--dest", folder, f"transformers=={transformers.__version__}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=False)
        return next((path.read_bytes() for path in Path(folder).glob("*.tar.gz")), None)


if __name__ == "__main__":
    print(f"the tests are in {fetch()}")
