"""Models unlike the others: of no family, and with layers that keep a state; evaluated, drawn."""

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


def test_layers_that_keep_a_state_hold_no_keys(tmp_path: Path) -> None:
    folder, out = checkpoints.save("lfm2_vl", tmp_path / "model"), tmp_path / "run"
    asked = ["--method", "uniform", "--keep", "5", "--limit", "2", "--max-new-tokens", "4"]
    assert main(["eval", str(folder), *asked, "--data", "scenes", "--out", str(out)]) == 0
    records = list(read_run(out).records)
    assert not [record.error for record in records if record.error]
    for record in records:
        assert record.prompt_tokens
        # One of three layers attends, with keys and values of one head of width 32 in float32.
        assert record.kv_bytes == record.prompt_tokens * 2 * 32 * 4


def test_it_is_not_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.png"
    checkpoints.image(0).save(image)
    arguments = ["--model", str(folder), "--method", "uniform", "-o", str(tmp_path / "out.png")]
    assert main(["show", str(image), *arguments]) == 2
    assert "how its 36 tokens lie in the picture is not known" in capsys.readouterr().err
