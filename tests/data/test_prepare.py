"""The whole way from files to a prepared folder, also killed, cut short and damaged."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_files import SMALL, documents, fingerprints, make, write_jsonl
from forked import Server

from fibattn import files
from fibattn.data import prepare as preparation
from fibattn.data import tokenizer as tokenization
from fibattn.data.prepared import PreparedData
from fibattn.data.sources import Source, parse_source
from fibattn.data.tokenizer import load_tokenizer
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.model import FibAttnConfig, FibAttnForCausalLM


@pytest.fixture(scope="module")
def sources(corpus) -> list[Source]:
    return [parse_source(str(corpus / f"{name}.jsonl")) for name in ("books", "docs")]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "data"
    make(out, sources)
    return out


def test_no_document_is_in_training_and_held_out(whole, texts):
    data = PreparedData.open(whole)
    assert len(list((whole / "shards" / "books").glob("train-*.bin"))) > 3
    for name, all_texts in texts.items():
        train, held_out = documents(data, name, "train"), documents(data, name, "val")
        position = {text: i for i, text in enumerate(all_texts)}
        places = [position[text] for text in train]
        assert places == sorted(places)  # whole documents in the order of the source
        assert not set(train) & set(held_out)
        assert all(text in position for text in held_out[:-1])
        assert any(text.startswith(held_out[-1]) for text in all_texts)  # cut at held_out_tokens
        assert len(data.validation[name]) == SMALL["held_out_tokens"]
    assert len(data.train) == sum(source["train"]["tokens"] for source in data.sources)


@pytest.mark.parametrize(
    ("texts", "length", "fewest", "most"),
    [(1, 100_000, 1, 1), (10, 50_000, 10, 10), (150, 9_000, 20, 20), (2000, 400, 50, 50)],
)
def test_a_tokenizer_has_its_share_of_few_long_documents_and_of_many(
    texts, length, fewest, most, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparation, "TOKENIZER_CHARACTERS", 20_000)
    monkeypatch.setattr(preparation, "DOCUMENT_CHARACTERS", 1000)
    seen: list[str] = []
    real = tokenization.train_tokenizer
    monkeypatch.setattr(tokenization, "train_tokenizer", lambda found, size: real(_kept(found, seen), size))
    held_out = write_jsonl(tmp_path / "val.jsonl", ["some held-out words"])
    path = write_jsonl(tmp_path / "long.jsonl", [f"{number:07d}\n" * (length // 8) for number in range(texts)])
    make(tmp_path / "out", [parse_source(f"long={path}")], validation={"long": parse_source(f"long={held_out}")})
    assert fewest <= len(seen) <= most
    assert sum(map(len, seen)) == pytest.approx(20_000, rel=0.4)


def _kept(found, seen):
    for text in found:
        seen.append(text)
        yield text


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_name_that_is_no_text_is_kept_by_its_escape(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("some words " * 200)
    data = make(tmp_path / "out", [parse_source(f"old={path}")], held_out=0.0)
    assert data.sources[0]["from"] == str(path)


def test_counts_in_the_record_are_right(whole):
    data = PreparedData.open(whole)
    for source in data.sources:
        train = documents(data, source["name"], "train")
        assert source["train"]["documents"] == len(train)
        assert source["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert data.token_bytes[data.train.sequence(0, len(data.train))].sum() == sum(
        source["train"]["bytes"] for source in data.sources
    )
    assert data.vocab_size == 300


def test_again_does_nothing_and_elsewhere_gives_the_same_bytes(whole, sources, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    make(whole, sources)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    make(tmp_path / "other", sources)
    assert fingerprints(tmp_path / "other") == fingerprints(whole)


def kill_when(forked: Server, out: Path, sources: list[Source], ready) -> None:
    """Run the real command line in its own process and SIGKILL it once `ready()`."""
    words = [f"{source.name}={source.paths[0]}" for source in sources]
    flags = [
        "--vocab-size",
        "300",
        "--shard-tokens",
        "3000",
        "--held-out",
        "0.2",
        "--held-out-tokens",
        "2500",
    ]
    command = [sys.executable, "-m", "fibattn", "prepare", str(out), *words, *flags]
    process = forked.start(command)
    while not ready():
        assert process.poll() is None, process.said("stderr")
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_and_resumed_gives_the_bytes_of_an_uninterrupted_run(whole, sources, forked, tmp_path):
    out = tmp_path / "data"
    kill_when(forked, out, sources, (out / "unfinished.json").exists)
    kill_when(forked, out, sources, (out / "shards/docs/train-00001.bin").exists)
    assert (out / "unfinished.json").exists()
    with pytest.raises(InputError, match="is not finished; run the same `fibattn prepare` again"):
        PreparedData.open(out)
    done = out / "shards/books/train-00000.bin"
    before = done.stat().st_mtime_ns
    make(out, sources)
    assert done.stat().st_mtime_ns == before  # a finished shard is not made again
    assert fingerprints(out) == fingerprints(whole)


def test_a_write_that_fails_keeps_what_was_finished(whole, sources, forked, tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails in the middle of a shard."""
    code = """
import resource, sys
from pathlib import Path
from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.sources import parse_source
resource.setrlimit(resource.RLIMIT_FSIZE, (6500, 6500))
sources = tuple(parse_source(path) for path in sys.argv[2:])
plan = Plan(sources, vocab_size=300, shard_tokens=3000, held_out=0.2, held_out_tokens=2500)
try:
    prepare(Path(sys.argv[1]), plan, quiet=True)
except OSError as error:
    sys.exit(str(error))
"""
    out = tmp_path / "data"
    kill_when(forked, out, sources, (out / "token_bytes.npy").exists)
    words = [sys.executable, "-c", code, str(out), *(str(source.paths[0]) for source in sources)]
    assert "File too large" in forked.run(words).stderr
    assert not list(out.rglob(".*.tmp"))
    make(out, sources)
    assert fingerprints(out) == fingerprints(whole)


def test_weights_and_a_budget_give_exact_shares(sources, tmp_path):
    data = make(tmp_path / "a", sources, weights={"books": 3, "docs": 1}, tokens=10_001)
    assert [source["train"]["tokens"] for source in data.sources] == [7501, 2500]
    assert len(data.train) == 10_001


def test_weights_without_a_budget_take_all_that_fits(whole, sources, tmp_path):
    have = [source["train"]["tokens"] for source in PreparedData.open(whole).sources]
    out = tmp_path / "a"
    data = make(out, sources, weights={"books": 1, "docs": 1}, tokenizer=str(whole / "tokenizer"))
    assert [source["train"]["tokens"] for source in data.sources] == [min(have)] * 2
    budget = make(
        tmp_path / "b",
        sources,
        weights={"books": 1, "docs": 1},
        tokens=2 * min(have),
        tokenizer=str(whole / "tokenizer"),
    )
    assert data.fingerprint == budget.fingerprint
    assert len(list((out / "shards").rglob("*.bin"))) == len(list((tmp_path / "b" / "shards").rglob("*.bin")))


def test_too_large_a_budget_names_both_numbers_and_a_smaller_one_goes_on(whole, sources, tmp_path):
    out, have = tmp_path / "a", PreparedData.open(whole).sources[0]["train"]["tokens"]
    plan = {"weights": {"books": 0.5, "docs": 0.5}, "tokenizer": str(whole / "tokenizer")}
    with pytest.raises(
        InputError,
        match=f"'books' has {have:,} training tokens, fewer than its share of 100,000 .*{2 * have:,}",
    ):
        make(out, sources, tokens=200_000, **plan)
    kept = (out / "shards/books/train-00000.bin").stat().st_mtime_ns
    data = make(out, sources, tokens=15_000, **plan)
    assert (out / "shards/books/train-00000.bin").stat().st_mtime_ns == kept
    make(tmp_path / "fresh", sources, tokens=15_000, **plan)
    assert fingerprints(out) == fingerprints(tmp_path / "fresh")
    assert len(data.train) == 15_000


def test_an_existing_tokenizer_is_used_as_it_is(whole, sources, tmp_path):
    data = make(tmp_path / "out", sources[:1], tokenizer=str(whole / "tokenizer"))
    assert (data.tokenizer_path / "tokenizer.json").read_bytes() == (whole / "tokenizer/tokenizer.json").read_bytes()


def test_a_damaged_folder_is_named_and_the_same_command_repairs_it(whole, sources, tmp_path):
    out = tmp_path / "data"
    make(out, sources)
    shard = out / "shards/docs/train-00001.bin"

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-7])

    def alter(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    for path, damage, message in (
        (shard, truncate, r"train-00001.bin has \d+ bytes, expected \d+ for .* tokens; run the same"),
        (shard, alter, r"train-00001.bin was altered: SHA-256 .*, expected"),
        (shard, Path.unlink, r"train-00001.bin is missing"),
        (out / "tokenizer/tokenizer.json", alter, r"tokenizer.json differs: SHA-256"),
        (out / "token_bytes.npy", Path.unlink, r"token_bytes.npy differs: SHA-256 missing"),
    ):
        damage(path)
        with pytest.raises(InputError, match=message):
            PreparedData.open(out)
        make(out, sources)
        assert fingerprints(out) == fingerprints(whole)
    text = (out / "data.json").read_text()
    (out / "data.json").write_text(
        text.replace('"tokens": 2500', '"tokens": 2501').replace('"sha256": "', '"sha256": "0', 1)
    )
    with pytest.raises(InputError, match=r"data.json was altered: its fingerprint is .*restore or prepare it anew"):
        PreparedData.open(out)


@pytest.mark.parametrize("name", ["shards/docs/held-out.npy", "shards/docs/val-00000.bin"])
def test_a_lost_held_out_set_is_made_again(whole, sources, tmp_path, name):
    out = tmp_path / "data"
    make(out, sources)
    (out / name).unlink()
    make(out, sources)
    assert fingerprints(out) == fingerprints(whole)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer/tokenizer_config.json", b""), ("tokenizer/tokenizer_config.json", None), ("held-out.npy", b"")],
)
def test_what_cannot_be_read_any_more_is_made_again(whole, sources, tmp_path, name, content):
    out = shutil.copytree(whole, tmp_path / "data")
    path = next(out.rglob(name.rpartition("/")[2]))
    path.unlink() if content is None else path.write_bytes(content)
    make(out, sources)
    assert fingerprints(out) == fingerprints(whole)


def test_a_share_of_no_tokens_is_told_from_too_much_held_out(sources, tmp_path):
    with pytest.raises(InputError, match=r"the share of source 'docs' in 1,000 tokens rounds to 0; raise --tokens"):
        make(tmp_path / "data", sources, weights={"books": 1.0, "docs": 1e-9}, tokens=1000)
    with pytest.raises(InputError, match=r"the share of source 'docs' rounds to 0; raise its weight, or leave it out"):
        make(tmp_path / "all", sources, weights={"books": 1.0, "docs": 1e-9})


@pytest.mark.parametrize("size", [10, 10**9])
def test_a_vocabulary_that_cannot_be_claims_no_folder(sources, tmp_path, size):
    with pytest.raises(InputError, match=f"vocab_size is {size}; expected at least 258"):
        make(tmp_path / "data", sources, vocab_size=size)
    assert not (tmp_path / "data").exists()


def test_a_file_in_the_place_of_the_folder_is_named(sources, tmp_path):
    (tmp_path / "data").write_text("mine")
    for out in (tmp_path / "data", tmp_path / "data" / "deeper"):
        with pytest.raises(InputError, match=r"data(/deeper)? is no folder, or lies in a file"):
            make(out, sources)


def test_a_tokenizer_that_cannot_be_made_again_has_everything_encoded_again(whole, sources, tmp_path, monkeypatch):
    out = tmp_path / "data"
    make(out, sources)
    (out / "tokenizer/tokenizer.json").unlink()
    monkeypatch.setattr("fibattn.data.prepare.TOKENIZER_CHARACTERS", 5000)  # so that training gives another
    data = make(out, sources)
    assert data.fingerprint != PreparedData.open(whole).fingerprint
    assert not set(documents(data, "docs", "train")) - {text for _, text in sources[1].documents()}


def test_a_finished_folder_is_not_made_into_another(whole, sources, texts, tmp_path):
    before = fingerprints(whole)
    for change, message in (
        ({"seed": 1}, "was prepared with seed = 0, now it is 1; give the same again, choose another folder"),
        ({"tokens": 5000}, "was prepared with tokens = None, now it is 5000"),
    ):
        with pytest.raises(InputError, match=message):
            make(whole, sources, **change)
    changed = write_jsonl(tmp_path / "docs.jsonl", ["new", *texts["docs"]])
    with pytest.raises(InputError, match=r"was prepared from another 'docs'.*documents was 200, is 201"):
        make(whole, [sources[0], parse_source(str(changed))])
    assert fingerprints(whole) == before


def test_a_folder_with_other_files_is_left_alone(sources, tmp_path):
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(InputError, match="holds other files; expected a new, an empty"):
        make(tmp_path, sources)
    with pytest.raises(InputError, match=r"holds no prepared data \(data.json is missing\)"):
        PreparedData.open(tmp_path)


def test_nothing_but_blank_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"source 'a' \(.*a.txt\) holds no text; expected at least one document"):
        make(tmp_path / "out", [parse_source(str(tmp_path / "a.txt"))])


def test_training_needs_no_datasets_package(whole):
    code = """
import sys
sys.modules["datasets"] = None
from fibattn.data import prepared as stream
from fibattn.data import sequences as sequences
from fibattn.data import order
data = stream.PreparedData.open(sys.argv[1])
assert len(sequences.held_out_sequences(data.validation["books"], 64)) > 1
"""
    subprocess.run([sys.executable, "-c", code, str(whole)], check=True)


def test_a_folder_of_someone_else_is_refused_untouched(sources, tmp_path):
    out = tmp_path / "home"
    drafts = [out / ".note.tmp", out / "deeper" / ".draft.tmp", out / "shards" / "x" / ".cut.tmp"]
    for path in (*drafts, out / "letter.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        make(out, sources)
    assert all(path.exists() for path in drafts)


def test_a_preparation_killed_at_its_first_write_can_begin_again(sources, whole, tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / f".unfinished.json.{os.getpid()}.tmp").write_text("{")
    make(out, sources)
    assert fingerprints(out) == fingerprints(whole)
    assert not list(out.rglob(".*.tmp"))


def test_a_full_disk_at_the_beginning_of_a_repair_leaves_the_folder_ours(whole, sources, tmp_path, monkeypatch):
    out = tmp_path / "data"
    shutil.copytree(whole, out)
    next((out / "shards" / "books").glob("train-*.bin")).write_bytes(b"damaged")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as now:
        now.setattr(files, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            make(out, sources)
    make(out, sources)
    assert fingerprints(out) == fingerprints(whole)


def test_two_at_once_do_not_write_into_one_folder(sources, tmp_path):
    out = tmp_path / "data"
    with locked(out) as free:
        assert free
        with pytest.raises(InputError, match=f"another process is preparing {out}"):
            make(out, sources)
    assert not out.exists(), "an empty folder that was only held is removed"
    make(out, sources)


@pytest.mark.parametrize("name", ["data.json", "unfinished.json"])
@pytest.mark.parametrize(
    ("content", "of_record", "of_data"),
    [
        ("{}", "not what `fibattn prepare` wrote", "format None, expected 1"),
        ('{"shards": 3}', "not what `fibattn prepare` wrote", "format None, expected 1"),
        ("[]", "a list, expected an object with keys", "a list, expected an object with keys"),
    ],
)
def test_a_record_of_another_make_is_refused(sources, tmp_path, name, content, of_record, of_data):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name} is {of_record}"):
        make(tmp_path, sources)
    with pytest.raises(InputError, match=of_data if name == "data.json" else "is not finished"):
        PreparedData.open(tmp_path)


def test_text_can_be_prepared_with_the_tokenizer_of_a_trained_model(whole, sources, foreign, tmp_path):
    """As a program that never imported the model, and with nobody to answer a question."""
    model = tmp_path / "model"
    config = FibAttnConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    FibAttnForCausalLM(config).save_pretrained(model)
    load_tokenizer(whole / "tokenizer").save_pretrained(model)
    words = [sys.executable, "-m", "fibattn", "prepare", str(tmp_path / "data"), str(sources[0].paths[0])]
    flags = ["--held-out", "0.2", "--tokenizer", str(model)]
    foreign.run([*words, *flags], check=True)
    data = PreparedData.open(tmp_path / "data")
    assert load_tokenizer(data.tokenizer_path).get_vocab() == load_tokenizer(whole / "tokenizer").get_vocab()
