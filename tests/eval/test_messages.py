"""Messages read as sentences: every reader, given every kind of bad file, and settings gone wrong.

A foreign error inside one of our messages must not bring its own full stop or lines, and one of
ours must not be put inside another.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import tokenprune
from tokenprune.arguments import parse_keep, parse_options, parse_share
from tokenprune.cli import main
from tokenprune.errors import BudgetError, InputFileError, TokenPruneError, reason_of
from tokenprune.masks.heads import HeadCategories
from tokenprune.media.images import load_image
from tokenprune.media.video import read_video
from tokenprune_eval.calibrate_heads import read_prompts
from tokenprune_eval.data.answers import read_answers
from tokenprune_eval.data.load import FORMATS, load_data
from tokenprune_eval.evaluation.settings import read_settings
from tokenprune_eval.find_layer import read_needles
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.summary import read_results
from tokenprune_eval.train.data import read_data
from tokenprune_hf.encoded_file import load_encoded
from tokenprune_hf.lite.model import LiteModel
from tokenprune_hf.loading import load

ROOT = Path(__file__).parents[2]

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n",
    "binary": bytes(range(256)),
    "text": b"this is neither. Nor this.\n",
    "torn": b'{"question": "what',
    "torn-list": b'[{"question": "what"},',
    "twice": b'{"image": "a", "image": "b"}',
    "number": b"17",
    "object": b"{}",
    "list": b"[]",
    "list-of-numbers": b"[1, 2]",
    "other": b'{"format": "other", "schema_version": 99, "conditions": 3, "settings": {}}',
    "question": b'{"image": "../a.png", "question": "", "answer": 3, "choices": ["a"], "x": 1}',
    "video": b'{"video": "gone.mp4", "question": "?", "times": [3, 1], "answer": "a"}',
}

READERS: dict[str, Callable[[Path], Any]] = {
    **{
        f"data-{name}": lambda file, name=name: load_data(f"{name}:{file}")  # type: ignore[misc]
        for name in FORMATS
    },
    "data": lambda file: load_data(str(file)),
    "answers": read_answers,
    "settings": lambda file: read_settings({"model": "m"}, file),
    "heads": HeadCategories.load,
    "needles": read_needles,
    "selector-data": read_data,
    "prompts": lambda file: read_prompts([file]),
    "image": load_image,
    "video": read_video,
    "encoded": lambda file: load_encoded(file, SimpleNamespace(device="cpu")),
    "config": lambda file: tokenprune.PruningConfig.from_json(file.read_text("latin-1")),
    "model": lambda file: load(str(file)),
}

FOLDER_READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "run": ("run.json", read_run),
    "results": ("results.json", read_results),
    "selector": ("selector.json", LiteModel.load),
}


def faults(message: str) -> Iterator[str]:
    """Yield what is wrong with a message as English, if anything is."""
    first, *more = message.split("\n")
    plain = message.replace("...", "")
    if re.search(
        r"\.\.(?!/)|[.!?]\s*[.;,:](?![.\w/])|[:;,]\s*\.(?!\w|\.?/)|\s[.,;](?=\s|$)", plain
    ):
        yield "two signs where one sentence ends"
    if not more and not re.search(r"[.?)\"'`}\]]$|[\w./=-]$", first):
        yield "no end"
    if "no JSON" in message and "cannot be read" in message:
        yield "one error inside another"
    if message.count("Check the path") > 1 or message.count("does not exist") > 1:
        yield "said twice"
    if any(not line.startswith("  ") for line in more):
        yield "a line of somebody else's"
    brackets = message.replace("(0, 1]", "")
    if brackets.count("(") != brackets.count(")"):
        yield "a bracket is left open"
    if "Traceback" in message or "errno" in message.lower():
        yield "not for people"


@pytest.mark.parametrize(
    "message",
    [
        "run.json is no JSON (run.json cannot be read: No such file. Give the folder of a run.).",
        "keep=[0]: keep=0 keeps nothing. Give at least 1 token..",
        "own.json: own.json does not exist. Check the path..",
        "the file cannot be read:.",
        "it is wrong .",
        "it is wrong!. Mend it.",
        "x cannot be read: while scanning\nthe file, line 3",
        "x cannot be read (what. Mend it.",
    ],
)
def test_faults_are_seen(message: str) -> None:
    assert list(faults(message))


@pytest.mark.parametrize(
    "message",
    [
        "there is no data set 'x'. Did you mean 'y'? Allowed: a, b.",
        'a line is {"images": [PATH, PATH, ...], "question": TEXT}, not 3.',
        "keep=2.5 is no fraction: it must lie in (0, 1]. For 2 tokens write keep=2.",
        "the path '../a.png' leads out of ./b. Give another.",
        "x cannot be used, 2 problems:\n  line 1: no JSON (at 3)\n  line 2: a choice is empty",
    ],
)
def test_what_is_right_is_let_pass(message: str) -> None:
    assert not list(faults(message))


def check(error: BaseException) -> None:
    found = list(faults(str(error)))
    assert not found, f"{', '.join(found)}: {error}"
    # One of ours that stands in another was caught by a handler for its builtin base class.
    inner = error.__cause__
    while inner is not None:
        assert not (isinstance(inner, TokenPruneError) and str(inner) in str(error)), str(error)
        inner = inner.__cause__


@pytest.mark.parametrize("reader", READERS)
def test_bad_files(reader: str, tmp_path: Path) -> None:
    read = READERS[reader]
    shapes = {shape.suffix for form in FORMATS.values() for shape in form.shapes}
    suffixes = shapes | {".yaml", ".png", ".mp4"}
    refused = 0
    files = [
        tmp_path / "missing.jsonl",
        tmp_path / "missing.json",
        tmp_path,
        tmp_path / ("x" * 300),
    ]
    for name, content in CONTENTS.items():
        for suffix in sorted(suffixes):
            file = tmp_path / f"{name}{suffix}"
            file.write_bytes(content)
            files.append(file)
    for file in files:
        if reader == "config" and not os.path.isfile(file):
            continue
        try:
            read(file)
        except TokenPruneError as error:
            refused += 1
            check(error)
    assert refused >= len(CONTENTS)


@pytest.mark.parametrize("reader", FOLDER_READERS)
def test_bad_folders(reader: str, tmp_path: Path) -> None:
    name, read = FOLDER_READERS[reader]
    with pytest.raises(InputFileError) as raised:
        read(tmp_path / "missing")
    check(raised.value)
    assert "no JSON" not in str(raised.value)
    for content in CONTENTS.values():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenPruneError) as refused:
            read(tmp_path)
        check(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"keep": [0]},
        {"keep": [2.5]},
        {"keep": ["25% of it"]},
        {"keep": ["x%", "250%", -1]},
        {"keep": "many"},
        {"keep": [True]},
        {"model": 3, "frames": 0, "batch": "many"},
        {"options": {"random": {}}, "shard": [3, 2]},
        {"engine": "hff", "positions": "orig"},
        {"engine": "openai"},
        {"engine": "openai", "base_url": "x", "choose_by": "likelihood"},
        {"engine": "vllm", "cache": "x"},
        {"metod": ["random"], "kep": 1},
        {"data": []},
    ],
)
def test_bad_settings(values: dict[str, Any]) -> None:
    base = {"model": "m", "data": ["scenes"], "out": "out"}
    with pytest.raises(TokenPruneError) as raised:
        read_settings({**base, **values})
    check(raised.value)


@pytest.mark.parametrize("text", ["", "%", "x", "x%", "0", "1", "150%", "nan", "inf", "-1%", "1%%"])
def test_bad_numbers(text: str) -> None:
    for parse in (
        lambda text: parse_share("--max-drop", text),
        parse_keep,
    ):
        try:
            parse(text)
        except TokenPruneError as error:
            check(error)
    with pytest.raises(TokenPruneError) as raised:
        parse_options([text])
    check(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "eval --model m --data own.jsonl --out OUT",
        "eval --model m --data own.nix:x.json --out OUT",
        "eval --model m --data scenes --split nix --out OUT",
        "eval --model /nowhere --data scenes --out OUT",
        "eval --model bundled --data scenes --out FILE",
        "eval --model bundled --data scenes --out /proc/nix",
        "eval --config /nowhere.yaml",
        "eval --config FILE",
        "eval merge OUT /nowhere",
        "eval merge OUT FILE",
        "eval compare /nowhere /nowhere",
        "eval compare FOLDER FOLDER",
        "calibrate --model m --data scenes --method nix --max-drop 1%",
        "calibrate --model m --data scenes --method random --max-drop 1",
        "find-layer bundled --video /nowhere.mp4 --keep x%",
        "show FILE --keep 0",
        "show /nowhere.png",
        "show FILE -o OUT.jpg",
        "train-selector bundled --data /nowhere --out OUT",
        "train-selector bundled --data FILE --out OUT",
        "calibrate-heads bundled --data /nowhere --out OUT",
        "calibrate-heads bundled --data FILE --out OUT",
        "export /nowhere OUT --method random --keep 3",
        "export FOLDER OUT --pruning /nowhere",
        "export FOLDER OUT --pruning FILE",
        "demo --methods nix --out OUT",
    ],
)
def test_what_a_command_says(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("neither JSON: nor [an image\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "run.json").write_text("{")
    places = {"OUT": "out", "FILE": "file", "FOLDER": "folder"}
    given = [
        re.sub(r"^(OUT|FILE|FOLDER)", lambda match: str(tmp_path / places[match[0]]), word)
        for word in arguments.split()
    ]
    assert main(given) == 2
    said = capsys.readouterr().err.rstrip("\n")
    assert said.startswith(f"tokenprune {given[0]}: ")
    assert not list(faults(said)), f"{list(faults(said))}: {said}"


def test_a_reason_is_one_line_without_a_full_stop() -> None:
    assert reason_of(ValueError("it is wrong.\nAnd more.")) == "it is wrong"
    assert reason_of(ValueError("\n  late..  \n")) == "late"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(FileNotFoundError(2, "No such file or directory", "x")) == (
        "No such file or directory"
    )
    assert reason_of(json.JSONDecodeError("Expecting value", "x", 0)).startswith("Expecting value:")


_BASES = {
    base.__name__
    for one in (InputFileError, BudgetError)
    for base in one.__mro__
    if base.__module__ == "builtins"
} - {"object", "BaseException"}


def test_no_handler_of_a_builtin_error_puts_it_into_a_message_with_its_own_words() -> None:
    """Foreign errors go into messages through `reason_of` alone."""
    found = []
    for room in ("tokenprune", "integrations", "eval"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ExceptHandler) and node.name is not None:
                    found += [
                        f"{file.relative_to(ROOT)}:{call.lineno}"
                        for call in _messages(node)
                        if _puts_in(call, node.name)
                    ]
    assert found == []


def _messages(handler: ast.ExceptHandler) -> Iterator[ast.JoinedStr]:
    """Yield the texts of errors that a handler of builtin errors raises."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
    if not names & {"OSError", "ValueError", "Exception"}:
        return
    for node in ast.walk(handler):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for text in ast.walk(node.exc):
                if isinstance(text, ast.JoinedStr):
                    yield text


def _puts_in(text: ast.JoinedStr, name: str) -> bool:
    return any(
        isinstance(part, ast.FormattedValue)
        and part.conversion == -1
        and isinstance(part.value, ast.Name)
        and part.value.id == name
        for part in text.values
    )
