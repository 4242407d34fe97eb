"""scripts/compare_selectors.py: an evaluation whose figures become tables; and what was tried."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")
pytest.importorskip("skimage", reason="scenes are on its photographs")
pytest.importorskip("sklearn", reason="scenes are on its photographs")

import tokenprune
import tokenprune_hf
from tokenprune.media.images import load_image
from tokenprune.registry import find
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.demo.evidence import evidence_mask
from tokenprune_eval.results.files import StoredRun, read_run
from tokenprune_eval.results.records import Record

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the runs on two scenes and on one pair of scenes, and what was printed."""
    folder = tmp_path_factory.mktemp("selectors")
    done = _call("--sets", "own", "two-images", "--scenes", "2", "--out", str(folder))
    return folder, done


def _call(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "compare_selectors.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _said(run: StoredRun) -> dict[tuple[str, str], Record]:
    return {(one.condition, one.item): one for one in run.records}


def test_its_answers_are_those_of_the_model(out: tuple[Path, str]) -> None:
    run = read_run(out[0] / "own")
    said = _said(run)
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    images = list(dict.fromkeys(one.path for one in run.questions))
    for question in run.questions:
        inputs = tokenprune_hf.ask(processor, question.question, image=load_image(question.path))
        seed = images.index(question.path)
        for key, method, keep, more in (
            ("random@0.25", "random", 0.25, {"seed": seed}),
            (
                "relevant-information@0.125,proportional",
                "relevant-information",
                0.125,
                {"proportional_attention": True},
            ),
        ):
            with tokenprune_hf.prune(model, method, keep, **more):
                output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            text = processor.decode(new, skip_special_tokens=True).strip()
            assert said[key, question.id].text == text


def test_its_tables_come_from_the_records(out: tuple[Path, str]) -> None:
    folder, printed = out
    assert _call("--tables", str(folder / "own"), str(folder / "two-images")) == printed
    for name in ("own", "two-images"):
        run = read_run(folder / name)
        said = _said(run)
        assert len(said) == len(run.questions) * len(run.conditions)
        right = [said["information@0.25", one.id].correct for one in run.questions]
        line = next(
            line
            for line in printed.splitlines()
            if line.startswith(f"| {name} | `information` | plain |")
        )
        assert line.split(" | ")[4].startswith(f"{100 * sum(map(bool, right)) / len(right):.1f} (")
        # The oracle needs to know where the answer is.
        assert ("oracle@0.25" in {one.key for one in run.conditions}) == (name == "own")
    # With either attention: a line in the table of the set, and one by type for each budget.
    assert printed.count("| oracle |") == 2 * (1 + 3)
    assert "16 of 64" in printed


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("tokenprune.registry._here", {})
    tried = importlib.import_module("tried_selectors")
    tried.register_tried.cache_clear()
    yield tried
    del sys.modules["tried_selectors"]


def test_what_was_tried_keeps_what_it_is_told(tried: ModuleType) -> None:
    names = tried.register_tried(4, 2)
    assert len({*names}) == len(names) > 50
    torch.manual_seed(0)
    tokens = tokenprune.VisualTokens(
        embeddings=torch.randn(24, 8), cls_attention=torch.rand(2, 24), grid=(2, 3, 4)
    )
    blind = [name for name in names if {*find(name).needs} <= {"embeddings", "cls_attention"}]
    assert len(blind) > 25
    for name in blind:
        kept = tokenprune.select(tokens, name, keep=7).kept.tolist()
        assert len(kept) == 7, name
        assert kept == sorted({*kept}), name
        assert kept[-1] < 24, name


def test_the_independent_calculation_is_the_method(tried: ModuleType) -> None:
    torch.manual_seed(1)
    rows = torch.randn(3, 36, 8) + torch.randn(8)
    for keep in (1, 5, 20):
        kept = tried.greedy(tried.unusual_kernel(rows), keep)
        for item, own in zip(rows, kept, strict=True):
            tokens = tokenprune.VisualTokens(embeddings=item, grid=(1, 6, 6))
            chosen = tokenprune.select(tokens, "information", keep=keep)
            assert chosen.kept.tolist() == own.tolist()


def test_evidence_may_be_a_smaller_share_of_a_cell() -> None:
    box = ((0, 0, 12, 10),)  # all of the first cell and a fifth of the second
    assert evidence_mask(box, (20, 20), (2, 2)).tolist() == [True, False, False, False]
    assert evidence_mask(box, (20, 20), (2, 2), covered=0.1).tolist() == [True, True, False, False]
