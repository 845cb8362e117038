"""lm-eval on tasks of our own: its numbers against plain passes and against our perplexity."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from fibattn import FibAttnForCausalLM
from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import held_out_sequences
from fibattn.data.shards import write_shard
from fibattn.data.tokenizer import token_bytes
from fibattn.errors import InputError
from fibattn.evaluation.loss import token_losses
from study.probes.harness import harness, language_model
from study.probes.settings import Harness

CHOICE = """
task: fibattn_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: fibattn_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
LENGTH = 32


@pytest.fixture
def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `evaluation`)")


@pytest.fixture
def whole_windows(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of a multiple of 32 tokens: there rolling windows and disjoint ones are the same."""
    texts = (" ".join(f"aaa {number} follows b{number * number % 97};" for number in range(n)) for n in range(9, 500))
    return next(text for text in texts if len(tokenizer.encode(text)) % LENGTH == 0)


@pytest.mark.usefixtures("installed")
def test_rolling_perplexity_is_ours(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, whole_windows: str, tmp_path: Path
) -> None:
    sizes = token_bytes(tokenizer)  # pyright: ignore
    tokens = np.array([tokenizer.bos_token_id, *tokenizer.encode(whole_windows)])
    write_shard(tmp_path / "one.bin", [tokens], sizes, np.dtype("uint16"), len(tokens), None)
    losses = token_losses(model, held_out_sequences(TokenStream([tmp_path / "one.bin"]), LENGTH))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": whole_windows}) + "\n")
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(rows=tmp_path / "rows.jsonl"))
    row = harness(model, tokenizer, Harness(("fibattn_rolling",), include=tmp_path, length=LENGTH))["rows"][0]
    bits_per_byte = losses.sum() / math.log(2) / len(whole_windows.encode())
    assert row["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    per_word = losses.sum() / len(whole_windows.split())
    assert math.log(row["word_perplexity"]) == pytest.approx(per_word, rel=0.01)


@pytest.mark.usefixtures("installed")
def test_rolling_likelihood_of_any_text_fills_up_its_last_window(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, whole_windows: str
) -> None:
    from lm_eval.api.instance import Instance

    text = whole_windows + "and nine more."
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    rest = (len(ids) - 1) % LENGTH
    assert rest
    expected = 0.0
    starts = [*range(0, len(ids) - 1 - rest, LENGTH), len(ids) - 1 - LENGTH]
    for start in starts:
        with torch.no_grad():
            logs = model(torch.tensor([ids[start : start + LENGTH]])).logits[0].log_softmax(dim=-1)
        scored = range(LENGTH - rest if start == starts[-1] else 0, LENGTH)
        expected += sum(logs[at, ids[start + at + 1]].item() for at in scored)
    wrapped = language_model(model, tokenizer, length=LENGTH)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    assert wrapped.loglikelihood_rolling([request], disable_tqdm=True) == pytest.approx([expected], rel=1e-5)


@pytest.mark.usefixtures("installed")
def test_choices_against_plain_passes(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    choices = [" a1", " b22", " c3;"]
    rows = [{"prompt": f"line {number} follows", "choices": choices, "answer": number % 3} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(rows=tmp_path / "rows.jsonl"))
    right = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        scores = []
        for choice in choices:
            ids = tokenizer.encode(f"{row['prompt']} {choice.strip()}")
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            scores.append(sum(logs[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
        right.append(scores.index(max(scores)) == row["answer"])
    # lm-eval puts a blank between prompt and choice by itself, so the choices come without theirs.
    stripped = [{**row, "choices": [choice.strip() for choice in choices]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stripped))
    result = harness(model, tokenizer, Harness(("fibattn_choice",), include=tmp_path, limit=4))
    assert result["rows"][0]["acc"] == pytest.approx(sum(right[:4]) / 4)
    assert result["length"] == 64
    assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("installed")
def test_unknown_task_and_missing_data_are_said(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "choice.yaml").write_text(CHOICE.format(rows=tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=r"no task 'fibattn_chioce': did you mean 'fibattn_choice'"):
        harness(model, tokenizer, Harness(("fibattn_chioce",), include=tmp_path))
    with pytest.raises(InputError, match=r"data of fibattn_choice cannot be had .*nowhere\.jsonl"):
        harness(model, tokenizer, Harness(("fibattn_choice",), include=tmp_path))


def test_without_lm_eval_the_extra_is_named(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match=r"the harness needs lm-eval .*install it: pip install"):
        harness(model, tokenizer, Harness())


@pytest.mark.usefixtures("installed")
def test_lm_evals_own_command_on_a_saved_model(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase, whole_windows: str, tmp_path: Path
) -> None:
    """It never heard of this package, and finds the perplexity that `harness` finds."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": whole_windows + "and nine more."}) + "\n")
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(rows=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,max_length={LENGTH}"]
    command += ["--tasks", str(tmp_path / "rolling.yaml"), "--output_path", str(tmp_path / "out.json")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(tmp_path.glob("out*.json")).read_text())["results"]["fibattn_rolling"]
    row = harness(model, tokenizer, Harness(("fibattn_rolling",), include=tmp_path, length=LENGTH))["rows"][0]
    assert found["bits_per_byte,none"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
