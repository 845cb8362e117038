"""The package as a whole: what importing it needs, and which rooms may know of which."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from forked import Server

import benchmarks.__main__
import fibattn
import study.__main__
from fibattn.cli.main import PROGRAM
from fibattn.errors import how_to_install

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fibattn"
HEAVY = {"numpy", "torch", "transformers", "triton", "pyarrow", "tokenizers", "matplotlib", "rich", "tyro"}
# From the ground up: a room may import those before it. The files of no room are below all of them.
ROOMS = ["pattern", "attention", "model", "parallel", "data", "training", "evaluation", "serving", "cli"]
# Beside the library; each may import the library and those before it.
BESIDE = ["study", "benchmarks", "examples"]


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    code = "import sys; sys.modules['triton'] = None; import fibattn; fibattn.FibAttnConfig(); fibattn.attend; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}import torch; assert not torch.cuda.is_initialized()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


IMPORTS = [
    "import fibattn, transformers",
    "import importlib, fibattn; importlib.reload(fibattn); import transformers, accelerate",
    "import sys, fibattn; del sys.modules['fibattn']; import fibattn, transformers, accelerate",
    "import transformers, fibattn",
    "import fibattn; from transformers import AutoConfig",
    "import fibattn, importlib.util; importlib.util.find_spec('transformers')",
    "import fibattn.model.configuration",
    "from fibattn import attend",
]


THEN = """
import fibattn, torch, transformers
config = transformers.AutoConfig.for_model('fibattn', vocab_size=8, hidden_size=16, num_attention_heads=2)
assert isinstance(transformers.AutoModelForCausalLM.from_config(config), fibattn.FibAttnForCausalLM)
assert callable(fibattn.attend)
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("first", IMPORTS)
def test_importing_means_the_same_in_every_order(first: str, foreign: Server) -> None:
    foreign.run([sys.executable, "-c", first + THEN], check=True)


def test_a_program_with_the_name_of_the_command_imports_the_package(foreign: Server, tmp_path: Path) -> None:
    (tmp_path / "fibattn").write_text(THEN)
    foreign.run([sys.executable, tmp_path / "fibattn"], check=True)


def test_public_names_exist() -> None:
    assert all(hasattr(fibattn, name) for name in fibattn.__all__)
    assert set(fibattn.__all__) <= set(dir(fibattn))
    assert not hasattr(fibattn, "atend")
    assert fibattn.__version__ == version("fibattn")


def imported(*words: str, program: str = "fibattn") -> set[str]:
    """The top-level modules that a command imports."""
    command = [sys.executable, "-m", program, *words]
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name.split(".")[0] for name in re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize("program", ["fibattn", "study", "benchmarks"])
def test_help_imports_nothing_heavy(program: str) -> None:
    found = imported("--help", program=program)
    assert "fibattn" in found
    assert not found & HEAVY


@pytest.mark.parametrize(
    ("program", "verb"),
    [
        (one.name.split()[-1], verb)
        for one in (PROGRAM, study.__main__.PROGRAM, benchmarks.__main__.PROGRAM)
        for verb in one.verbs
    ],
)
def test_help_of_a_verb_imports_no_torch(program: str, verb: str) -> None:
    assert not imported(verb, "--help", program=program) & {"torch", "transformers", "triton"}


@pytest.mark.parametrize("command", [["fibattn", "--version"], ["study", "--help"], ["examples.demo", "--help"]])
def test_threads_of_a_command_sleep_while_they_wait(command: list[str]) -> None:
    """On a busy machine threads that spin take the cores from each other: OpenMP says what it was told at its start."""
    code = f"import runpy, sys; sys.argv = {command!r}\ntry: runpy.run_module({command[0]!r}, run_name='__main__')\n"
    code += "except SystemExit: import torch; print(torch.ones(10**6).sum())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP than GNU's, which shows how often it looks before it sleeps")
    # Left alone it says PASSIVE of its policy too, and looks 300,000 times.
    assert "GOMP_SPINCOUNT = '0'" in done.stderr


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


def room(module: str) -> str:
    """The room that a module is in; nothing for what is of no room, or of another project."""
    first, *rest = module.split(".")
    if first in BESIDE:
        return first
    return rest[0] if first == "fibattn" and rest and rest[0] in ROOMS else ""


def module_of(path: Path) -> str:
    inside = path.relative_to(SOURCE.parent if path.is_relative_to(SOURCE) else ROOT)
    return inside.with_suffix("").as_posix().replace("/", ".")


PROGRAMS = [path for folder in (SOURCE, *(ROOT / name for name in BESIDE)) for path in folder.rglob("*.py")]
PROGRAMS = [path for path in PROGRAMS if "tests" not in path.parts[len(ROOT.parts) :]]


@pytest.mark.parametrize("path", sorted(PROGRAMS), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_know_only_those_below(path: Path) -> None:
    """The library imports nothing of the study; a room nothing of those after it, nor another's private names."""
    order, own = [*ROOMS, *BESIDE], room(module_of(path))
    for module, name in imports(path):
        other = room(module) or room(f"{module}.{name}")
        if own and other:
            assert order.index(other) <= order.index(own), f"{own} imports {module}.{name}"
        if other != own and module.split(".")[0] in ("fibattn", *BESIDE):
            assert not name.startswith("_") or name == "__version__", f"{module}.{name} is {other}'s own"
        if not own and other:
            assert path.name in ("__init__.py", "__main__.py"), f"{path.name} is below all rooms, but imports {module}"


def test_the_library_is_small() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py"))
    assert lines <= 16_422


def names(requirements: list[str]) -> set[str]:
    """The projects that requirements ask for."""
    return {re.split(r"[<>=;\[ ]", line, maxsplit=1)[0].lower().replace("-", "_") for line in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def test_constraints_pin_what_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    installed = {
        extra
        for found in re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())
        for extra in found.split(",")
    }
    assert installed >= {"dev", "docs", "study"}
    wanted = names([line for extra in installed - {"triton"} for line in EXTRAS[extra]] + PROJECT["dependencies"])
    assert wanted <= {name.replace("-", "_") for name in pins}


def test_what_draws_or_makes_tables_comes_with_extras() -> None:
    assert not names(PROJECT["dependencies"]) & {"matplotlib", "pandas", "jinja2", "datasets"}
    used = {module.split(".")[0] for path in SOURCE.rglob("*.py") for module, _ in imports(path)}
    assert not used & {"pandas", "jinja2"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_wheel_holds_the_library_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = (path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert found == {path.relative_to(SOURCE.parent).as_posix() for path in tracked}


def test_the_source_distribution_holds_what_the_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    for name in ("Makefile", "constraints.txt", "conftest.py", "README.md", "mkdocs.yml", ".ci/run"):
        assert name in found
    for folder in ("src", "study", "benchmarks", "examples", "tests", "docs"):
        kept = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".json"))
        wanted = {path.relative_to(ROOT).as_posix() for path in kept if not ({"work", "report"} & {*path.parts[-3:-1]})}
        assert wanted <= found


def test_an_extra_is_installed_from_where_the_package_is_from(built: Path, tmp_path: Path) -> None:
    """From the clone by its path, from a wheel by the packages' own names: ours is nobody's on an index."""
    assert how_to_install("plots") == f"pip install --editable {shlex.quote(f'{ROOT}[plots]')}"
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import fibattn.errors as e; print(*map(e.how_to_install, ('plots', 'tracking', 'triton')), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for line, extra in zip(done.stdout.splitlines(), ("plots", "tracking", "triton"), strict=True):
        assert shlex.split(line)[:2] == ["pip", "install"]
        assert names(shlex.split(line)[2:]) == names(EXTRAS[extra])


def test_no_message_asks_an_index_for_our_name() -> None:
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"pip install ['\"]?fibattn\[", path.read_text(encoding="utf-8")), path
