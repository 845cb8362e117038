"""TRL and peft on own and converted models, `make hf-tests`: rows that are packed, chats, adapters, the example."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

import fibattn
from fibattn.data.tokenizer import load_tokenizer
from fibattn.training import run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "model"))
import foreign_decoders  # noqa: E402

KINDS = ["own", "llama", "gemma3_text"]
TEXTS = [{"text": f"line {number} follows n7; so says" + " line" * (number % 5)} for number in range(40)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What follows {number}?"},
            {"role": "assistant", "content": f"{number + 1} follows."},
        ]
    }
    for number in range(40)
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of our own, a converted one that is written as one, and one that is not, with the chat template."""
    tokenizer, out = load_tokenizer(prepared / "tokenizer"), tmp_path_factory.mktemp(request.param)
    kind = "fibattn" if request.param == "own" else request.param
    given: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    given |= {"layer_types": ["full_attention", *["fibonacci_attention"] * 3], "window": 3} if kind == "fibattn" else {}
    made = foreign_decoders.model(kind, vocab_size=len(tokenizer), **given)
    if kind != "fibattn":
        fibattn.convert(made, window=3, rungs=7, keep_layers=[1])
    made.save_pretrained(out)
    tokenizer.chat_template = run._CHAT.read_text(encoding="utf-8")
    tokenizer.save_pretrained(out)
    return out


def trainer(folder: Path, rows: list[dict[str, Any]], out: Path, **how: Any) -> Any:
    args = SFTConfig(output_dir=str(out), report_to="none", use_cpu=True, bf16=False, **{"max_length": 64, **how})
    return SFTTrainer(model=str(folder), args=args, train_dataset=Dataset.from_list(rows))


def alone(model: Any, documents: list[Tensor]) -> Tensor:
    """The mean loss of documents (tokens,), each computed by itself."""
    losses = [
        functional.cross_entropy(model(ids[None, :-1], use_cache=False).logits[0], ids[1:], reduction="none")
        for ids in documents
    ]
    return torch.cat(losses).mean()


@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True, "max_length": None}, {}], ids=str)
def test_the_loss_of_a_batch_is_that_of_its_documents(how: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, TEXTS, tmp_path, per_device_train_batch_size=4, **how)
    batch = next(iter(made.get_train_dataloader()))
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        documents = list(ids.flatten().tensor_split(starts[1:]))
    else:
        documents = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    assert len(documents) >= 4
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(made.compute_loss(made.model, batch), alone(model, documents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_of_a_chat_the_answers_alone_are_learnt(packing: bool, folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, CHATS[:2], tmp_path, assistant_only_loss=True, packing=packing, max_length=128)
    batch, tokenizer = next(iter(made.get_train_dataloader())), AutoTokenizer.from_pretrained(folder)
    learnt = batch["input_ids"][batch["labels"] != -100]
    end = tokenizer.eos_token
    assert sorted(tokenizer.decode(learnt).split(end)) == sorted(["", "1 follows.", "2 follows."])


def run_example(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_with_trl.py", *map(str, words)])
    exec(compile((ROOT / "examples" / "tune_with_trl.py").read_text(), "tune_with_trl.py", "exec"), {})


ELSEWHERE = ["--chat-template", str(Path(run.__file__).with_name("chat.jinja"))]


@pytest.mark.parametrize(
    ("rows", "words"), [(TEXTS, []), (CHATS, ["--lora", "4"]), (CHATS, ["--no-packing"]), (CHATS, ELSEWHERE)]
)
def test_the_example_trains_what_it_is_given(
    rows: list[dict[str, Any]], words: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if words == ELSEWHERE:
        folder = shutil.copytree(folder, tmp_path / "bare")
        (folder / "chat_template.jinja").unlink()
    run_example(monkeypatch, folder, data, out, "--steps", "3", "--rate", "1e-2", *words)
    before = AutoModelForCausalLM.from_pretrained(folder).eval()
    auto: Any = AutoPeftModelForCausalLM if "--lora" in words else AutoModelForCausalLM
    after = auto.from_pretrained(out).eval()
    ids = torch.arange(3, 60)[None]
    assert (after(ids).logits - before(ids).logits).abs().max() > 1e-3
    inner = after.get_base_model() if "--lora" in words else after
    assert type(inner) is type(before)


def test_chats_without_a_template_are_refused_with_the_flag_that_names_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, bare = tmp_path / "data.jsonl", shutil.copytree(folder, tmp_path / "bare")
    data.write_text(json.dumps(CHATS[0]) + "\n")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit):
        run_example(monkeypatch, bare, data, tmp_path / "out")
    assert f"{bare} has no chat template; give --chat-template" in capsys.readouterr().err
