import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fibattn.data.sources import PAPER_WEIGHTS, PRESETS, Source, parse_source, resolve
from fibattn.errors import InputError

ROWS = b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(["one", "zwei ü", " "]))
WHOLE = zstandard.ZstdCompressor().compress(ROWS * 10_000)
CUT = WHOLE[: len(WHOLE) // 2]


def texts(what: Path | str) -> list[str]:
    return [text for _, text in parse_source(str(what)).documents()]


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.ZstdCompressor().compress])
def test_plain_and_rows_read_alike_whatever_the_compression(tmp_path, compress):
    ending = {None: "", gzip.compress: ".gz"}.get(compress, ".zst")
    for name, data, expected in (
        ("a.txt", "a\r\nb ü\n".encode(), ["a\r\nb ü\n"]),
        ("b.jsonl", ROWS, ["one", "zwei ü"]),
    ):
        path = tmp_path / (name + ending)
        path.write_bytes(compress(data) if compress else data)
        assert texts(path) == expected


def test_parquet_and_joined_fields_with_a_key(tmp_path):
    table = pa.table({"problem": ["p", "q"], "solution": ["s", "t"], "other": [1, 2]})
    pq.write_table(table, tmp_path / "m.parquet")
    source = Source("m", (tmp_path / "m.parquet",), text=("problem", "solution"), key="problem")
    assert list(source.documents()) == [("p", "p\n\ns"), ("q", "q\n\nt")]


def test_of_parquet_only_the_columns_that_are_asked_for_matter(tmp_path):
    """Columns of other types, unknown features in the metadata among them, are nobody's business."""
    uuids = pa.array([bytes(range(16))] * 3, pa.binary(16)).cast(pa.binary(16))
    columns = {
        "text": pa.array(["one", "zwei ü", " "]).dictionary_encode(),
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "id": pa.ExtensionArray.from_storage(pa.uuid(), uuids),
        "audio": pa.array([{"bytes": b"RIFF", "path": None}] * 3),
        "dot.ted": pa.array(["a", "b", "c"], pa.large_string()),
        "nested": pa.array([[{"deep": [1.5]}]] * 3),
    }
    features = {"audio": {"_type": "Audio"}, "map": {"_type": "NoSuchFeature"}, "text": {"_type": "AlsoNone"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "m.parquet")
    assert texts(tmp_path / "m.parquet") == ["one", "zwei ü"]
    dotted = Source("m", (tmp_path / "m.parquet",), text=("dot.ted",))
    assert [text for _, text in dotted.documents()] == ["a", "b", "c"]
    for fields, message in (
        (
            ("body",),
            "has no field 'body'; it has 'text', 'map', 'id', 'audio', 'dot.ted', 'nested': name the right one to "
            r"`fibattn prepare` \(--text, --key\); other commands read 'text' alone",
        ),
        (("map",), "field 'map' in row 1 of .* is list, text was expected"),
    ):
        with pytest.raises(InputError, match=message):
            list(Source("m", (tmp_path / "m.parquet",), text=fields).documents())


def test_parquet_of_many_row_groups_and_files_without_rows(tmp_path):
    many = [f"text {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": many}), tmp_path / "m.parquet", row_group_size=70)
    assert texts(tmp_path / "m.parquet") == many
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"none.parquet has no rows"):
        texts(tmp_path / "none.parquet")


def test_a_folder_is_every_known_file_sorted_hidden_and_empty_ones_left_out(tmp_path):
    for name in ("b.md", "a/z.py", "a/c.rst", ".git/x.txt", "a/image.png", "a/empty.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert texts(tmp_path) == ["a/c.rst", "a/z.py", "b.md"]
    assert texts(f"{tmp_path}/**/*.py") == ["a/z.py"]


def test_names_that_look_like_globs_are_files_all_the_same(tmp_path):
    folder = tmp_path / "g[1] x*"
    folder.mkdir()
    (folder / "a?.jsonl").write_bytes(ROWS)
    assert texts(folder) == texts(folder / "a?.jsonl") == ["one", "zwei ü"]


def test_specs():
    hub = parse_source("wiki=hf:wikimedia/wikipedia:20231101.en:train@abc123")
    assert (hub.name, hub.hub, hub.config) == ("wiki", "wikimedia/wikipedia", "20231101.en")
    assert (hub.split, hub.revision) == ("train", "abc123")
    split = parse_source("hf:roneneldan/TinyStories::validation")
    assert (split.name, split.config, split.split, split.revision) == (
        "TinyStories",
        None,
        "validation",
        None,
    )
    assert parse_source("stories=tinystories").hub == "roneneldan/TinyStories"
    assert set(PAPER_WEIGHTS) == set(PRESETS)
    assert sum(PAPER_WEIGHTS.values()) == pytest.approx(1)


def test_names(tmp_path):
    path = tmp_path / "my books.train.jsonl"
    path.write_bytes(ROWS)
    assert parse_source(str(path)).name == "mybooks"
    assert parse_source(f"x={path}").name == "x"
    for file, name in (
        ("dätä ☃.txt", "dätä"),
        ("da\u0308ta\u0308.txt", "dätä"),
        ("本の山.txt", "本の山"),
        ("_x y.txt", "xy"),
    ):
        (tmp_path / file).write_text("a")
        assert parse_source(str(tmp_path / file)).name == name
        assert parse_source(f"{name}={tmp_path / file}").name == name
    (tmp_path / "☃.txt").write_text("a")
    with pytest.raises(InputError, match=r"no name can be made from .*☃.txt'; give one: NAME="):
        parse_source(str(tmp_path / "☃.txt"))
    with pytest.raises(InputError, match="names a folder"):
        Source("a/b")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.txt", "café".encode("latin1"), r"latin.txt is not UTF-8: e9 at byte 3 .*convert it"),
        ("latin.jsonl", b'{"text": "caf\xe9 au lait"}\n', r"line 1 of .*latin.jsonl is not UTF-8: e9 at byte 13"),
        ("binary.txt", b"ab\0cd", r"binary.txt is binary or UTF-16 \(byte 0 at 2\)"),
        ("wide.txt", "wide".encode("utf-16"), r"wide.txt is binary or UTF-16"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 of .*broken.jsonl is not valid JSON .*check it"),
        ("list.jsonl", b'[{"text": "a"}]\n', r"line 1 of .*list.jsonl is '\[\{.*; an object with fields was expected"),
        ("half.jsonl", b'{"text": "a\\ud83d"}\n', r"field 'text' in row 1 .* has half a character \('\\ud83d' at 1\)"),
        ("binary.jsonl", b"\0\1\2\xff" * 50, r"line 1 of .*binary.jsonl is not UTF-8"),
        ("empty.jsonl", b"", r"empty.jsonl is empty"),
        # Without the time of day, or two workers that collect in different seconds have different names for these.
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), r"empty.jsonl.gz has no rows"),
        ("cut.jsonl.gz", gzip.compress(ROWS * 100, mtime=0)[:40], r"cut.jsonl.gz cannot be read"),
        ("cut.jsonl.zst", CUT, r"cut.jsonl.zst cannot be read \(Compressed file ended"),
        ("cut.txt.zst", CUT, r"cut.txt.zst cannot be read \(Compressed file ended"),
        ("cut.txt.gz", gzip.compress(ROWS * 100, mtime=0)[:40], r"cut.txt.gz cannot be read"),
        ("not.txt.zst", b"plain text", r"not.txt.zst cannot be read"),
        ("not.parquet", b"PAR1 not really", r"not.parquet is not valid parquet"),
        ("field.jsonl", b'{"content": "a"}\n', r"row 1 of .*has no field 'text'; it has 'content': .*--text"),
        (
            "utf16.jsonl",
            '{"text": "ö"}'.encode("utf-16"),
            r"line 1 of .* is not UTF-8: ff at byte 0 .*iconv -f UTF-16",
        ),
        ("latin.jsonl", '{"text": "ö"}'.encode("latin1"), r"line 1 of .* is not UTF-8: f6 at .*iconv -f LATIN1"),
        ("number.jsonl", b'{"text": 5}\n', r"field 'text' in row 1 .* is int, text was expected"),
        ("x.docx", b"a", r"x.docx is of no known kind; expected .txt"),
    ],
)
def test_bad_files_are_named_with_what_to_do(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / name)


def test_other_fields_may_change_their_type_and_text_may_look_like_a_date(tmp_path):
    rows = [{"text": "2024-03-01", "id": None}, {"text": "2024-03-02", "id": 5}, {"text": "2024-03-03", "id": "x"}]
    lines = [json.dumps(row | ({"meta": {"a": 1}} if number == 2 else {})) for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(lines))
    assert texts(tmp_path / "rows.jsonl") == [row["text"] for row in rows]


def test_byte_order_marks_of_files_that_were_joined_are_no_text(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + mark + b'{"text": "b"}\r\n\n' + mark + b'{"text": "c"}')
    assert texts(tmp_path / "a.jsonl") == ["a", "b", "c"]
    (tmp_path / "a.txt").write_bytes(mark + b"one\n" + mark + "two \ufeff three\n".encode())
    assert texts(tmp_path / "a.txt") == ["one\ntwo \ufeff three\n"]


def test_numbers_of_any_length_may_stand_beside_the_text(tmp_path):
    digits = "7" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "n": {digits}}}\n{{"text": "b", "n": [-{digits}, 1]}}\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "b"]
    for flag, given in (("--text", {"text": ("n",)}), ("--key", {"key": "n"})):
        with pytest.raises(InputError, match=rf"field 'n' in row 1 of .* is float, text was expected: .* with {flag}"):
            list(Source("a", (tmp_path / "a.jsonl",), **given).documents())


@pytest.mark.parametrize("log", [27, 28, 31])
def test_zstandard_with_a_long_window_is_read(tmp_path, log):
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(ROWS) + compressor.flush())
    assert texts(tmp_path / "a.jsonl.zst") == ["one", "zwei ü"]


def test_frames_and_members_are_read_to_the_last(tmp_path):
    wanted = [json.loads(line)["text"] for line in ROWS.splitlines() if line.strip()] * 2
    compress = zstandard.ZstdCompressor().compress
    for name, data in (("a.jsonl.zst", compress(ROWS) + compress(ROWS)), ("a.jsonl.gz", gzip.compress(ROWS) * 2)):
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == [text for text in wanted if text.strip()]


def test_bad_specs(tmp_path):
    for spec, message in (
        ("no/such/file.txt", "no/such/file.txt does not exist; expected a file"),
        ("hf:nothing", "not a data set id; expected hf:owner/name"),
        (str(tmp_path), "holds no file of a known kind"),
        (f"{tmp_path}/*.txt", "holds no file of a known kind"),
    ):
        with pytest.raises(InputError, match=message):
            parse_source(spec)


def test_without_a_network_the_hub_is_refused_politely(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"roneneldan/TinyStories .*cannot be had: .*or give local files instead"):
        resolve(PRESETS["tinystories"])


def test_null_is_no_text(tmp_path):
    rows = [{"title": "a", "body": None}, {"title": None, "body": None}, {"title": None, "body": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source("rows", (path,), text=("title", "body"))
    assert [text for _, text in source.documents()] == ["a", "b"]
    with pytest.raises(InputError, match=r"field 'title' in row 2 of .* is NoneType"):
        list(Source("rows", (path,), text=("title", "body"), key="title").documents())
