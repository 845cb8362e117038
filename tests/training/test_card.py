"""A finished model folder as others meet it: its card, and what a program that never heard of the package can do."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forked import Server
from huggingface_hub import ModelCard

from fibattn import FibAttnConfig, files, sealed
from fibattn.cli.main import main
from fibattn.data.prepared import PreparedData
from fibattn.pattern import hybrid_layers
from fibattn.training.card import add_results, write_card
from fibattn.training.recipe import Recipe
from fibattn.training.run import model_config, train

CHAT = """
import sys
from transformers import pipeline

write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
assert type(write.model).__name__ == "FibAttnForCausalLM"
text = write("line 3 follows", max_new_tokens=80, do_sample=False)[0]["generated_text"]
answer = write([{"role": "user", "content": "line 3 follows"}], max_new_tokens=5, do_sample=False)[0]["generated_text"]
assert text.startswith("line 3 follows") and answer[-1]["role"] == "assistant", (text, answer)
"""


@pytest.fixture
def model(recipe: Recipe) -> Path:
    return train(replace(recipe, steps=2))


def table(card: str, heading: str) -> list[str]:
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|") and "---" not in line and "--:" not in line]


def test_card_says_what_the_model_is_and_was_trained_on(model: Path, recipe: Recipe) -> None:
    card = ModelCard.load(model / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    config, data = FibAttnConfig.from_pretrained(model), PreparedData.open(recipe.data)
    rows = table(card.text, "Attention")[1:]
    assert len(rows) == 3
    for layer, row in enumerate(rows):
        offsets = ", ".join(map(str, config.layer_patterns(layer)[0].offsets))
        assert row == f"| {layer} | window and distances | yes | {offsets} |"
    training = "\n".join(table(card.text, "Training"))
    assert data.fingerprint in training
    assert "256: 2 steps of 4 sequences of 32" in training
    assert all(source["name"] in training for source in data.sources)
    assert "Not evaluated yet" in card.text
    assert str(recipe.data) not in card.text


def test_card_says_how_long_the_rate_is_held(tmp_path: Path, recipe: Recipe) -> None:
    optimizer = replace(recipe.optimizer, warmup_steps=1, decay="linear", decay_fraction=0.25, final_fraction=0.0)
    chosen = replace(recipe, optimizer=optimizer)
    write_card(tmp_path, model_config(chosen, 512, 0), 1234, chosen, PreparedData.open(recipe.data))
    over_time = "1 steps of warm-up, then the highest, and in the last 25% of the rest linear to 0 of the highest"
    assert f"| learning rate over time | {over_time} |" in (tmp_path / "README.md").read_text()


def test_equal_layers_share_a_row(tmp_path: Path, recipe: Recipe) -> None:
    data = PreparedData.open(recipe.data)
    shape = replace(recipe.model, num_hidden_layers=6, schedule="fixed", **hybrid_layers(6, full=(2,)))
    chosen = replace(recipe, model=shape)
    write_card(tmp_path, model_config(chosen, 512, 0), 1234, chosen, data)
    rows = table((tmp_path / "README.md").read_text(), "Attention")[1:]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| 0–1", "window and distances", "yes"],
        ["| 2", "full", "no"],
        ["| 3–5", "window and distances", "yes"],
    ]


def test_evaluation_goes_into_the_card_and_edits_stay(model: Path, recipe: Recipe) -> None:
    path = model / "README.md"
    path.write_text(path.read_text().replace("# run\n", "# My model\n"))
    for _ in range(2):
        main(["eval", str(model), "--data", str(recipe.data)])
    result = files.read_json(recipe.out / "evaluation.json")
    card = ModelCard.load(path)
    (rows,) = result["sets"].values()
    found = [re.findall(r"[\d.]+", row.replace("×", "")) for row in table(card.text, "Results")[1:]]
    assert found == [
        [length, str(int(length) // 32), f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}"]
        for length, row in rows.items()
    ]
    assert "# My model\n" in card.text
    assert "## How to load" in card.text
    sealed.verify(model)
    assert {path.stat().st_mode & 0o444 for path in model.iterdir()} == {model.stat().st_mode & 0o444}


def test_a_card_without_a_place_for_results_is_left_alone(tmp_path: Path) -> None:
    assert not add_results(tmp_path, {"convention": "", "data_fingerprint": "", "sets": {}})
    (tmp_path / "README.md").write_text("# Mine\n")
    assert not add_results(tmp_path, {"convention": "", "data_fingerprint": "", "sets": {}})
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_foreign_program_writes_and_chats(model: Path, foreign: Server, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CHAT, str(model)]
    foreign.run(command, env=environment, check=True)
