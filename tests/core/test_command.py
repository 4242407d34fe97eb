from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tokenprune

COMMAND = Path(sys.executable).with_name("tokenprune")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*arguments], capture_output=True, text=True, timeout=120)


def test_methods_prints_every_method_with_its_options() -> None:
    done = run(str(COMMAND), "methods")
    assert done.returncode == 0, done.stderr
    for name, selector in tokenprune.methods().items():
        assert f"\n{name} " in f"\n{done.stdout}"
        assert selector.summary in done.stdout
    assert "estimator='auto'" in done.stdout


def test_help_and_a_mistyped_subcommand() -> None:
    done = run(str(COMMAND), "--help")
    assert done.returncode == 0, done.stderr
    assert "methods" in done.stdout
    wrong = run(str(COMMAND), "metods")
    assert wrong.returncode == 2
    assert "methods" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_help_imports_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys\n"
        "from tokenprune.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
