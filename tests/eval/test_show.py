"""`tokenprune show`: a picture with the right tokens in it, and clear errors for bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenprune.cli import main
from tokenprune_eval.bundled.scenes import load_scenes


def test_show_draws_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = next(one for one in load_scenes() if one.type == "color")
    out = tmp_path / "kept.png"
    command = ["show", str(question.image), "--question", question.question, "--keep", "16"]
    methods = ["--method", "cls-attention", "uniform", "--option", "seed=3"]
    # An option that none of the methods has is no silent no-op.
    assert main([*command, *methods, "-o", str(out)]) == 2
    assert "seed" in capsys.readouterr().err
    assert main([*command, *methods[:-2], "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"unpruned: {question.answer}" in printed
    assert "cls-attention, 16 of 64 tokens" in printed
    assert "uniform, 16 of 64 tokens" in printed
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # not blank


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n truncated"])
def test_show_refuses_bad_files_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    assert main(["show", str(file), "-o", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "divprun"], "Did you mean 'divprune'"),
        (["--keep", "0"], "keep"),
        (["--keep", "lots"], "keep"),
        (["--keep", "nan"], "keep"),
        (["--option", "estimator=jpv", "--method", "zeroth-order"], "estimator"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_show_refuses_bad_settings(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(load_scenes()[0].image)
    assert main(["show", image, *arguments, "-o", str(tmp_path / "out.png")]) == 2
    assert says in capsys.readouterr().err
