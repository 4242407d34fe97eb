"""Files that are whole or not there, JSON by the line, and the format that files carry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tokenprune.errors import ConfigError, InputFileError, OutputError
from tokenprune.files import (
    making_folder,
    numbered_lines,
    parse_json,
    read_json_lines,
    replacing,
    write_whole,
)
from tokenprune.formats import check_format


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_whole(file, "old")

    def fail() -> None:
        with replacing(file) as part:
            part.write_text("new, ha")
            assert file.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["results.json"])
    with replacing(file) as part:
        part.write_bytes(b"new")
        part.chmod(0o600)  # as some libraries do
    assert (file.read_text(), os.listdir(tmp_path)) == ("new", ["results.json"])
    other = tmp_path / "other"
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_what_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: No such file .*\. Make room, or"):
        write_whole(tmp_path / "gone" / "a.json", "")
    with pytest.raises(OutputError, match=r"directory\. Give it up\.$"):
        write_whole(tmp_path / "gone" / "a.json", "", "Give it up.")


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def fail() -> None:
        with making_folder(target) as made:
            (made / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []
    with making_folder(target) as made:
        (made / "a").write_text("whole")
        assert not target.exists()
    assert (target / "a").read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o755
    # Another process was faster: its folder stays, if it is whole.
    with making_folder(target, known_by="a") as made:
        (made / "a").write_text("late")
    assert (target / "a").read_text() == "whole"
    for known_by in (None, "b"):
        with pytest.raises(OSError, match="not empty"), making_folder(target, known_by) as made:
            (made / "a").write_text("late")
    assert os.listdir(tmp_path) == ["made"]


def test_lines_end_at_line_feeds_alone() -> None:
    text = '{"a": "x\u2028y"}\r\n\n 3\n'
    assert [(number, parse_json(line)) for number, line in numbered_lines(text)] == [
        (1, {"a": "x\u2028y"}),
        (3, 3),
    ]
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        parse_json('{"a": 1, "b": 2, "a": 3}')


def test_json_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n[2]\n')
    first, second = read_json_lines(file, "data", "Give another.")
    assert (first.place, first.fields, first.text) == (f"{file}, line 1", {"a": 1}, '{"a": 1}')
    assert (second.place, second.fields) == (f"{file}, line 3", {})
    for content, said in (
        (b'{"a": 1}\n{', "line 2: not JSON"),
        (b'{"a": 1, "a": 1}', "line 1: .*'a' stands twice"),
        (b"\xff", r"the data cannot be read \(not UTF-8\)\. Give another\."),
    ):
        file.write_bytes(content)
        with pytest.raises(InputFileError, match=said):
            read_json_lines(file, "data", "Give another.")
    with pytest.raises(InputFileError, match=r"cannot be read \(Is a directory\)"):
        read_json_lines(tmp_path, "data", "Give another.")


def test_formats() -> None:
    for values in ({"a": 1}, {"a": 1, "format": 1}, {"a": 1, "format": 2}):
        assert check_format(values, 2, "x.json", "Make it anew.") == {"a": 1}
    with pytest.raises(InputFileError, match=r"^x\.json has format 3 .*pip install --upgrade"):
        check_format({"format": 3}, 2, "x.json", "Make it anew.")
    others: tuple[Any, ...] = ("2", 0, 1.0, True, None)
    for other in others:
        with pytest.raises(ConfigError, match=r"no whole number.*Make it anew\.$"):
            check_format({"layout": other}, 2, "x", "Make it anew.", key="layout", kind=ConfigError)
