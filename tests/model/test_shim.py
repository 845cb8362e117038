"""Saved models are found by programs that never heard of this package."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from forked import Server
from tiny_models import model, tokens
from transformers import AutoModelForCausalLM

import fibattn
from fibattn import FibAttnForCausalLM

FOREIGN = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cli.serving import model_manager

first, second = map(Path, sys.argv[1:])
made = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True).eval()
made.save_pretrained(second)
again = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True).eval()
body = AutoModel.from_pretrained(second, trust_remote_code=True).eval()
ids = torch.arange(1, 60)[None]
assert torch.equal(again(ids).logits, made(ids).logits)
assert torch.equal(again.lm_head(body(ids).last_hidden_state), made(ids).logits)
# `transformers serve` takes the class from the library as it imported it, which later imports replace.
assert getattr(model_manager.transformers, made.config.architectures[0]) is type(made)
print(type(made).__module__, made(ids).logits.double().sum().item())
"""


def test_a_foreign_program_loads_saves_and_loads_again(foreign: Server, tmp_path: Path) -> None:
    made = model("learned mixture")
    made.save_pretrained(tmp_path / "first")
    command = [sys.executable, "-c", FOREIGN, str(tmp_path / "first"), str(tmp_path / "second")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = foreign.run(command, env=environment, check=True)
    module, total = done.stdout.split()
    assert module == "fibattn.model.modeling"
    assert float(total) == pytest.approx(
        float(made(torch.arange(1, 60)[None]).logits.detach().double().sum()), rel=1e-6
    )
    names = [{path.name for path in (tmp_path / which).iterdir()} for which in ("first", "second")]
    assert names[0] == names[1]
    assert "modeling_fibattn.py" in names[0]
    assert len((tmp_path / "first" / "modeling_fibattn.py").read_text().splitlines()) <= 20


def test_where_the_package_is_imported_nothing_is_run_from_the_folder(tmp_path: Path) -> None:
    made, ids = model(), tokens()
    made.save_pretrained(tmp_path)
    (tmp_path / "modeling_fibattn.py").write_text("raise SystemExit('run from the folder')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is FibAttnForCausalLM
    assert torch.equal(loaded(ids).logits, made(ids).logits)


def test_the_map_names_what_the_shim_finds(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert named.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    found = runpy.run_path(str(tmp_path / "modeling_fibattn.py"))
    for where in named.values():
        module, name = where.split(".")
        assert module == "modeling_fibattn"
        assert found[name] is getattr(fibattn, name)
