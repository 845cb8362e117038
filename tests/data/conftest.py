"""A small corpus that is the same on every run."""

import random
from pathlib import Path

import pytest
from corpus_files import write_jsonl

WORDS = ["the", "of", "and", "in", "to", "a", "is", "was", "he", "for", "it", "with", "had", "not", "but"]


def make_text(rng: random.Random, words: int) -> str:
    parts = []
    for _ in range(words):
        word = rng.choice(WORDS) if rng.random() < 0.6 else "".join(rng.choices("aeioutnrsl", k=rng.randint(2, 8)))
        parts.append(word + rng.choice(["", "", "", ",", ".", "\n"]))
    return " ".join(parts) + f" naïve café {rng.randint(0, 10**6)} 東京"


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    rng = random.Random(7)
    return {
        "books": [make_text(rng, rng.randint(50, 400)) for _ in range(120)],
        "docs": [make_text(rng, rng.randint(20, 200)) for _ in range(200)],
    }


@pytest.fixture(scope="session")
def corpus(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, documents in texts.items():
        write_jsonl(folder / f"{name}.jsonl", documents)
    return folder
