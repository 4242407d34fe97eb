from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tokenprune
from tokenprune import cli, environment, releases
from tokenprune.documentation import find_pages

COMMAND = Path(sys.executable).with_name("tokenprune")
ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenprune", "tokenprune_vlm", "integrations", "eval")


def run(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_methods_prints_every_method_with_its_options() -> None:
    done = run(str(COMMAND), "methods")
    assert done.returncode == 0, done.stderr
    for name, selector in tokenprune.methods().items():
        assert f"\n{name} " in f"\n{done.stdout}"
        assert selector.summary in done.stdout
    before, beside = done.stdout.split("\nIn cross-attention: ")
    assert before.startswith("Before the language model: ")
    places = [
        before.index(f"\n{one}")
        for one in (
            *("Baselines: ", "uniform ", "Blind: ", "divprune "),
            *("Reading the question: ", "cdpruner ", "For videos: ", "evs "),
        )
    ]
    assert places == sorted(places)
    assert "call:   tokenprune.select(tokens, 'cdpruner', keep)\n" in before
    inside = before[before.index("\nInside the language model: ") :]
    assert places[-1] < len(before) - len(inside)
    assert "\nfastv " in inside
    assert "call:   tokenprune_hf.prune(model, 'pyramid-drop', keep)\n" in inside
    assert "option: layers='0.25,0.5,0.75'\n" in inside
    assert "\ntrimmed-attention " in beside
    assert "call:   tokenprune_hf.trim_cross_attention(model, keep)\n" in beside
    assert "estimator='auto'" in done.stdout


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["methods"]) == list(tokenprune.methods())
    for name, about in printed["methods"].items():
        selector = tokenprune.methods()[name]
        assert about["summary"] == selector.summary
        assert about["needs"] == list(selector.needs)
        if name != "flexselect-lite":  # which cannot be made without a path
            assert selector.from_options(about["options"]) == selector()
        assert about["kind"] == "before"
    assert printed["other_methods"]["trimmed-attention"]["kind"] == "cross-attention"
    assert "trimmed-attention" in printed["no_selectors"]


def test_help_and_a_mistyped_subcommand() -> None:
    done = run(str(COMMAND), "--help")
    assert done.returncode == 0, done.stderr
    assert "methods" in done.stdout
    wrong = run(str(COMMAND), "metods")
    assert wrong.returncode == 2
    assert "Did you mean methods?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("words", ["--help", "env", "docs serving", "eval --help"])
def test_starting_the_command_imports_neither_torch_nor_an_engine(words: str) -> None:
    code = (
        "import sys\n"
        "from tokenprune.cli import main\n"
        f"try:\n    assert main({words.split()!r}) == 0\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    # Of help that is written at once argparse itself hides that nobody reads it.
    [
        ("methods", ""),
        ("methods", "1"),
        ("docs selectors", ""),
        ("docs selectors", "1"),
        ("-h", ""),
    ],
)
def test_a_closed_pipe_ends_it_quietly(words: str, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [COMMAND, *words.split()],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_pipe_that_breaks_elsewhere_is_no_quiet_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.selectors import command

    def broken(_: Any) -> int:
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr(command, "run", broken)
    with open(os.devnull, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError, match="to a worker"):
            cli.main(["methods"])


# --- what a report of a bug needs ---------------------------------------------------------------


def test_env(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy
    import torch
    import transformers

    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("VLLM_API_KEY", "very_secret_too")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:very_secret@mirror/hub")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cli.main(["env", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed
    about = json.loads(printed)
    versions, tested = about["versions"], releases.TESTED["transformers"].requirement
    assert versions["torch"].split()[0] == torch.__version__
    assert versions["transformers"].split()[0] == transformers.__version__
    assert versions["numpy"].split()[0] == numpy.__version__
    assert versions["transformers"].endswith(f" (tested: {tested})")
    assert versions["numpy"].endswith(")")
    assert about["machine"]["cores"].startswith(str(len(os.sched_getaffinity(0))))
    assert set(about["selectors"]) == set(tokenprune.methods())
    assert about["extras"]["hf"] == "installed"
    variables = about["environment variables"]
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert variables["HF_ENDPOINT"] == "https://***@mirror/hub"
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    for values in about.values():
        for name, value in values.items():
            assert re.search(rf"^  {re.escape(name)} +{re.escape(value)}$", text, re.M)


def test_env_says_what_of_an_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2", "transformers<6,>=5; extra == 'hf'", "not-there>=1; extra == 'hf'"]
    monkeypatch.setattr(environment, "TESTED", {"transformers": releases.Releases((4, 1), (4, 2))})
    monkeypatch.setattr(environment, "requires", lambda _: asked)
    about = environment.describe()
    assert about["extras"] == {"hf": "missing: not-there"}
    assert about["versions"]["transformers"].endswith(" (untested; tested: >=4.1,<4.3)")
    assert about["versions"]["torch"].endswith(" (asked for: >=2)")


# --- the documentation --------------------------------------------------------------------------


def test_docs_prints_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["docs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(file.stem for file in (ROOT / "docs").glob("*.md"))
    for topic in ("serving", "serving.md"):
        assert cli.main(["docs", topic]) == 0
        assert capsys.readouterr().out == (ROOT / "docs" / "serving.md").read_text("utf-8")
    assert cli.main(["docs", "servin"]) == 2
    assert "Did you mean 'serving'?" in capsys.readouterr().err


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every text in the packages that is no docstring."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text("utf-8"))
            alone = {
                id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
            }  # docstrings
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                    yield file, "".join(map(str, parts))
                elif (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in alone
                ):
                    yield file, node.value


def test_messages_cite_what_an_installed_user_can_reach() -> None:
    cited = []
    for file, text in texts():
        assert not re.search(r"\b(docs/|README|CONTRIBUTING)\S*", text), (file, text)
        cited += re.findall(r"`tokenprune docs ([\w-]+)`", text)
    assert {"serving", "calibrate", "data", "selectors"} <= set(cited)
    assert set(cited) <= set(find_pages())


# --- another project's package of this name -------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Lay out what lies on PyPI under the name tokenprune, on a path of its own."""
    package = tmp_path / "tokenprune"
    package.mkdir()
    (package / "__init__.py").write_text("from .core import prune\n")
    (package / "core.py").write_text("def prune(text):\n    return text\n")
    return tmp_path


@pytest.mark.parametrize(
    "package", ["tokenprune_hf", "tokenprune_vllm", "tokenprune_eval", "tokenprune_lmms_eval"]
)
def test_a_foreign_package_is_named_at_import(package: str, foreign: Path) -> None:
    done = run(sys.executable, "-c", f"import {package}", cwd=foreign)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tokenprune_vlm.ForeignPackageError: the package `tokenprune` in")
    assert str(foreign / "tokenprune" / "__init__.py") in last
    assert "pip uninstall tokenprune" in last


def test_a_foreign_package_is_named_by_the_command(foreign: Path) -> None:
    done = run(str(COMMAND), "methods", PYTHONPATH=str(foreign))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"tokenprune: the package `tokenprune` in {foreign}")
    assert "Traceback" not in done.stderr


def test_what_is_left_when_the_foreign_package_was_uninstalled_over_ours(tmp_path: Path) -> None:
    # Both were installed into one folder: pip removed its __init__.py, which had been ours.
    (tmp_path / "tokenprune").mkdir()
    (tmp_path / "tokenprune" / "cli.py").write_text("")
    (tmp_path / "tokenprune_vlm").symlink_to(ROOT / "tokenprune_vlm")
    code = "import sys, tokenprune_vlm; sys.exit(tokenprune_vlm.main(['methods']))"
    # Without site, the checkout is not on the path.
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 2
    assert done.stderr.startswith(f"tokenprune: the package `tokenprune` in {tmp_path}")
    assert "--force-reinstall" in done.stderr


# --- names that are loaded when they are used -----------------------------------------------------


@pytest.mark.parametrize("package", ["tokenprune", "tokenprune_hf", "tokenprune_vllm"])
def test_dir_lists_the_public_names_before_they_are_loaded(package: str) -> None:
    code = (
        f"import json, {package} as p\n"
        "before = dir(p)\n"
        "missing = [name for name in p.__all__ if name not in before]\n"
        "loaded = [name for name in p.__all__ if getattr(p, name) is None]\n"
        "print(json.dumps([missing, loaded, [n for n in before if n in ('annotations',)]]))\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [], []]
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'prun'"):
        __import__(package).prun  # noqa: B018
