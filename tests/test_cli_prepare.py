import json

import pytest

from fibattn.cli.main import main
from fibattn.errors import InputError
from fibattn.progress import count, quantity


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"body": f"book {i} " * 30}) + "\n" for i in range(20)))
    return path


def test_prepare_prints_a_table_and_a_finished_folder(books, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prepare", str(out), str(books), "--text", "books=body", "--vocab-size", "280", "--tokens", "1k"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "books" in printed
    assert "1,000" in printed
    assert (out / "data.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "boks=1"], "did you mean 'books'?"),
        (["--weights", "books"], "--weights was given 'books'; expected NAME=NUMBER"),
        (["--weights", "books=much"], "--weights was given 'books=much'; expected NAME=NUMBER"),
        (["--val", "boks=no.jsonl"], "no.jsonl does not exist; expected a file, folder, glob, hf:owner/name"),
        (
            ["--key", "boks=id"],
            "a --key field is given for 'boks', which is no source: did you mean 'books'?",
        ),
        (["--tokens", "many"], "'many' is not a count; expected a number such as 1048577, 426M or 1.5G"),
        ([], "has no field 'text'; it has 'body'"),
        (["paper"], "paper has its own proportions, and 1 further sources have none; give --weights NAME=NUMBER"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(books, tmp_path, capsys, words, message):
    assert main(["prepare", str(tmp_path / "out"), str(books), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_counts():
    assert [count(text) for text in ("7", "1_000", "1,048,577", "426M", "1.5G", "2k")] == [
        7,
        1000,
        1_048_577,
        426_000_000,
        1_500_000_000,
        2000,
    ]
    for text in ("-1", "1,5G", "1,50"):
        with pytest.raises(InputError):
            count(text)


def test_quantities():
    found = [quantity(value) for value in (0.1234, 949.6, 999.4, 999.6, 12_345, 999_400, 999_700, 999_999_999, 1.2e9)]
    assert found == ["0.123", "950", "999", "1k", "12.3k", "999k", "1M", "1G", "1.2G"]
