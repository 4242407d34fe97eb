"""A model whose type has no family: loaded, evaluated, and not drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

from tests.vllm import checkpoints
from tokenprune.cli import main
from tokenprune_eval.results.files import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("vipllava", tmp_path_factory.mktemp("vipllava") / "model")


def test_it_is_evaluated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    methods = ["--method", "divprune", "uniform", "--keep", "5"]
    limits = ["--limit", "3", "--max-new-tokens", "4"]
    data = ["--data", "scenes", "--out", str(out)]
    assert main(["eval", str(folder), *methods, *limits, *data]) == 0
    records = list(read_run(out).records)
    assert len(records) == 9
    tokens = {record.condition: record.visual_tokens for record in records}
    assert tokens == {"unpruned": 36, "divprune@5": 5, "uniform@5": 5}


def test_it_is_not_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.png"
    checkpoints.image(0).save(image)
    arguments = ["--model", str(folder), "--method", "uniform", "-o", str(tmp_path / "out.png")]
    assert main(["show", str(image), *arguments]) == 2
    assert "how its 36 tokens lie in the picture is not known" in capsys.readouterr().err
