"""JSON files that cannot be read are named in one line, whatever is wrong with them."""

from pathlib import Path

import pytest

from fibattn import files
from fibattn.errors import InputError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps":', "is not valid JSON"),
        (b"[]", "is a list, expected an object with keys; restore it or make it anew"),
        (b"null", "is a NoneType, expected an object with keys"),
        (b'{"steps": "caf\xe9"}', "is not valid JSON"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "has a number of thousands of digits, or brackets nested as deeply"),
        (b'{"model": {"window": 8, "rungs": 3, "window": 9}}', "names 'window' twice; leave one out"),
        (b"[" * 100_000, "has a number of thousands of digits, or brackets nested as deeply"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(InputError, match=f"recipe.json {message}"):
        files.read_json(tmp_path / "recipe.json")
    with pytest.raises(InputError, match=r"none.json does not exist; check the path"):
        files.read_json(tmp_path / "none.json")


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes(b"\xef\xbb\xbf" + b'{"steps": 3}')
    assert files.read_json(tmp_path / "recipe.json") == {"steps": 3}


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no /sys, where even root may write nothing")
def test_a_place_is_tried_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (Path("/sys/kernel/result.json"), Path("/sys/kernel/new/result.json"), tmp_path / "file" / "r.json"):
        with pytest.raises(InputError, match=r"cannot be written: .* is no folder that may be written to"):
            files.check_writable(path)
    files.check_writable(tmp_path / "new" / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_its_place_once_it_is_whole_without_what_a_broken_attempt_left(tmp_path: Path) -> None:
    out = tmp_path / "made" / "model"

    def write(name: str) -> None:
        with files.replacing_folder(out) as staged:
            staged.mkdir()
            (staged / name).write_text("")
            if name == "broken":
                raise ValueError(name)

    with pytest.raises(ValueError, match="broken"):
        write("broken")
    assert not out.exists()
    write("whole")
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert [path.name for path in out.iterdir()] == ["whole"]
