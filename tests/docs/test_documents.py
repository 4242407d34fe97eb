"""What the documents show works: Python runs, commands parse, files and links are there."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("statsmodels", reason="the documents need the extra `eval`")

import torch
import yaml

import tokenprune_hf
from tests.docs.blocks import BLOCKS, DOCUMENTS, ROOT, Block
from tests.docs.setups import SETUPS, Setup, bundled
from tokenprune import VisualTokens
from tokenprune.baselines import RESIZE
from tokenprune.cli import GROUP, main
from tokenprune.registry import find
from tokenprune.selecting import select_many
from tokenprune_eval.data.jsonl import load as load_jsonl

PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "bash"]

MOST_SKIPPED = 0
"""How many blocks of Python may say that no test runs them."""


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert len(DOCUMENTS) > 12
    assert {block.language for block in BLOCKS} <= {
        "python",
        "bash",
        "json",
        "yaml",
        "toml",
        "text",
        "mermaid",
    }
    for block in BLOCKS:
        assert block.is_understood(), f"{block.place}: {block.how}"
        assert not block.how or block.language == "python", block.place
        assert not (setup := block.said("setup")) or setup in SETUPS, block.place
    # Every fence has been found, and every comment is in front of one.
    for document in DOCUMENTS:
        own = [block for block in BLOCKS if block.document == document]
        text = document.read_text("utf-8")
        assert len(re.findall(r"^```", text, flags=re.M)) == 2 * len(own), document
        comments = re.findall(r"^<!-- test:", text, flags=re.M)
        assert len(comments) == sum(bool(block.how) for block in own), document
    used = {block.said("setup") for block in PYTHON}
    assert set(SETUPS) <= used, "a setup that no block names"


def test_few_blocks_are_skipped() -> None:
    skipped = [block.place for block in PYTHON if block.said("skip")]
    assert len(skipped) <= MOST_SKIPPED, skipped


# Python -----------------------------------------------------------------------------------------


def _with_those_before(block: Block) -> list[Block]:
    """Return a block behind those of its document that it continues."""
    blocks = [block]
    before = [one for one in PYTHON if one.document == block.document and one.line < block.line]
    while blocks[0].said("continues"):
        blocks.insert(0, before.pop())
    return blocks


def _run(blocks: list[Block], folder: Path) -> tuple[dict[str, Any], str]:
    """Run blocks in a folder, one behind the other; return their variables and what they print."""
    name = blocks[0].said("setup")
    setup = SETUPS[name](folder) if name else Setup()
    names = {"__name__": "__main__", **setup.names}
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with setup.around(), redirect_stdout(printed):
            for block in blocks:
                code = block.code
                for public, path in setup.stand_ins.items():
                    code = code.replace(f'"{public}"', repr(str(path)))
                # Lines are counted as in the document.
                code = "\n" * block.line + code
                exec(compile(code, str(block.document), "exec", dont_inherit=True), names)
    finally:
        os.chdir(before)
    return names, printed.getvalue()


@pytest.mark.parametrize(
    "block",
    [block for block in PYTHON if not block.said("skip")],
    ids=lambda block: block.place,
)
# transformers calls its own Llama-3.2-Vision by the old name.
@pytest.mark.filterwarnings(
    "ignore:`hidden_state` is deprecated.*MllamaVisionEncoderLayer:FutureWarning"
)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _run(_with_those_before(block), tmp_path)


def test_first_example_prints_what_it_says(tmp_path: Path) -> None:
    """The first one of the README runs as pasted, and what stands behind its `print`s is true."""
    first = next(block for block in PYTHON if block.document.name == "README.md")
    assert not first.how
    _, printed = _run([first], tmp_path)
    said = re.findall(r"^print\(.*\)  # (.+)$", first.code, flags=re.M)
    assert len(said) == 2
    assert printed.splitlines() == said


def test_selector_in_ten_lines_selects(tmp_path: Path) -> None:
    """CONTRIBUTING's class, used as the page says, keeps the longest projected tokens."""
    block = next(block for block in PYTHON if block.document.name == "CONTRIBUTING.md")
    names, _ = _run([block], tmp_path)
    selector = names["EmbeddingNorm"]()
    torch.manual_seed(0)
    embeddings = torch.randn(64, 32)
    tokens = VisualTokens(grid=(1, 8, 8), embeddings=embeddings)
    (selection,) = select_many([tokens], selector, keep=16)
    longest = embeddings.double().pow(2).sum(dim=1).argsort(descending=True)[:16]
    assert selection.kept.tolist() == sorted(longest.tolist())
    known = bundled(tmp_path).names
    with tokenprune_hf.prune(known["model"], selector, keep=0.25) as pruning:
        known["model"].generate(**known["inputs"], max_new_tokens=1)
    assert [len(one.kept) for one in pruning.selections] == [16]


# Shell ------------------------------------------------------------------------------------------


def _lines(code: str) -> Iterator[list[str]]:
    """Split commands into words; lines that end in a backslash go on, comments are left out."""
    text = ""
    for line in code.replace("\\\n", " ").splitlines():
        text += line
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            text += "\n"
            continue
        text = ""
        if words:
            yield words


def _commands() -> list[tuple[str, tuple[str, ...]]]:
    """Return every command of the documents as its place and its words."""
    return [(block.place, tuple(words)) for block in SHELL for words in _lines(block.code)]


COMMANDS = _commands()


def _extras(requirement: str) -> set[str]:
    """Return the extras in a requirement such as ``.[hf,video]``."""
    match = re.search(r"\[([\w,-]+)\]", requirement)
    return set(match[1].split(",")) if match else set()


@pytest.mark.parametrize(
    ("place", "words"),
    [pair for pair in COMMANDS if Path(pair[1][0]).name == "tokenprune"],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:3]),
)
def test_tokenprune_lines_are_understood(
    place: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command reads them, and is stopped before it does anything."""
    entry = next(entry for entry in entry_points(group=GROUP) if entry.name == words[1])
    seen = []

    def run(arguments: Any) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr(entry.load(), "run", run)
    assert main(words[1:]) == 0, place
    (arguments,) = seen
    method = getattr(arguments, "method", None) or []
    for name in [method] if isinstance(method, str) else method:
        if name != RESIZE:
            find(name.removeprefix(f"{RESIZE}+"))
    if arguments.more:
        _check_vllm_arguments(arguments.more)


def _check_vllm_arguments(words: list[str]) -> None:
    """Let vLLM's own parser read what goes to it."""
    arguments = pytest.importorskip("vllm.engine.arg_utils")
    parsing = pytest.importorskip("vllm.utils.argparse_utils")
    parser = arguments.AsyncEngineArgs.add_cli_args(parsing.FlexibleArgumentParser())
    parser.add_argument("--port", type=int)
    parser.add_argument("--host")
    parser.add_argument("--lora-modules", nargs="+")
    parser.parse_args(words)


def test_other_lines_name_what_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    seen = set()
    for place, words in COMMANDS:
        while "=" in words[0]:  # a variable before the command
            words = words[1:]
        program = Path(words[0]).name
        seen.add(program)
        if program == "tokenprune":
            continue
        if words[0].startswith(("scripts/", "examples/")):
            assert os.access(ROOT / words[0], os.X_OK), f"{place}: {words[0]} cannot be run"
        elif program == "python" and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), f"{place}: {words[1]}"
        elif program == "pip" or words[:3] == (words[0], "-m", "pip"):
            for word in words:
                assert _extras(word) <= set(extras), f"{place}: {word}"
                assert not word.startswith(project["name"]), f"{place}: it is on no registry"
                if word.startswith("dist/"):  # as `pip wheel` names it
                    assert f"-{project['version']}-py3-none-any.whl" in word, place
            for option, value in pairwise(words):
                if option in ("-r", "--requirement", "-c", "--constraint"):
                    assert (ROOT / value).is_file(), f"{place}: {value}"
        elif program == "curl":
            body = words[words.index("-d") + 1]
            json.loads(body.replace("[...]", '["..."]'))
        else:
            assert program in {"lmms-eval", "export", "vllm", "cd", "python"}, f"{place}: {program}"
    assert {"demo", "pip", "curl", "tokenprune"} <= seen


def test_scripts_that_are_named_are_there_and_run() -> None:
    """Whatever says `scripts/x` in text or code names a file; one with a first line runs."""
    for document in DOCUMENTS:
        for name in set(
            re.findall(r"\b(?:scripts|examples)/[\w./-]*\w", document.read_text("utf-8"))
        ):
            path = ROOT / name
            assert path.exists(), f"{document.name}: {name}"
            if path.is_file() and path.read_bytes()[:2] == b"#!":
                assert os.access(path, os.X_OK), f"{name} has no run bit"


def test_subcommands_in_the_text_are_there() -> None:
    known = {entry.name for entry in entry_points(group=GROUP)}
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        named = set(re.findall(r"`tokenprune ([a-z][\w-]*)", text))
        assert named <= known, f"{document.name}: {named - known}"


# Data, settings, links ---------------------------------------------------------------------------


def test_json_is_json() -> None:
    for block in BLOCKS:
        if block.language == "json":
            # Part of a request stands without its braces; others are one object a line.
            part = block.code.startswith('"')
            for text in [f"{{{block.code}}}"] if part else block.code.splitlines():
                assert isinstance(json.loads(text), dict), block.place


def test_questions_of_ones_own_are_read(tmp_path: Path) -> None:
    block = next(one for one in BLOCKS if one.language == "json" and one.document.name == "data.md")
    file = tmp_path / "questions.jsonl"
    file.write_text(block.code)
    for line in block.code.splitlines():
        (tmp_path / json.loads(line).get("image", "talk.mp4")).touch()
    assert len(load_jsonl(file).questions) == len(block.code.splitlines())


def test_settings_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if block.language == "yaml")
    from tokenprune_eval.evaluation.settings import Settings

    Settings.model_validate(yaml.safe_load(block.code))


def test_entry_points_are_of_real_groups() -> None:
    blocks = [block for block in BLOCKS if block.language == "toml"]
    assert blocks
    for block in blocks:
        (group,) = tomllib.loads(block.code)["project"]["entry-points"]
        assert list(entry_points(group=group)), block.place


def _anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives to a document's headings."""
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    checked = 0
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in _anchors(target), f"{document.name}: {link}"
            checked += 1
    assert checked > 30
