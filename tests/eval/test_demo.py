"""The demo: its arithmetic by hand, its report in a browser, and the whole of it end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="the demo needs the extra `demo`")

import torch
from PIL import Image

from tests.eval.browser import CHROMIUM, browse
from tokenprune.budget import tokens_kept
from tokenprune.cli import main
from tokenprune.errors import TokensError
from tokenprune.registry import build
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.demo import runner
from tokenprune_eval.demo.answering import Answers
from tokenprune_eval.demo.baselines import RandomPerImage
from tokenprune_eval.demo.costs import Cost, peak_bytes
from tokenprune_eval.demo.evidence import Oracle, evidence_mask
from tokenprune_eval.demo.output import OutputError, write_whole
from tokenprune_eval.demo.questionsets import choose, load_sets
from tokenprune_eval.demo.report import render
from tokenprune_eval.demo.results import Results, Row, make_row, wilson
from tokenprune_eval.demo.runner import KEEPS, METHODS, Example, Panel

# Arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "count"), [(0, 7), (7, 7), (102, 102), (1, 3), (480, 1000), (996, 1003)]
)
def test_wilson_solves_its_equation(correct: int, count: int) -> None:
    """The ends are the shares p whose score (x/n - p) / sqrt(p (1 - p) / n) is +-1.96."""

    def crossing(low: float, high: float) -> float:
        def excess(share: float) -> float:
            return (correct / count - share) ** 2 - 1.959963984540054**2 * share * (
                1 - share
            ) / count

        # The excess changes its sign once between the observed share and the edge.
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return (low + high) / 2

    observed = correct / count
    low, high = wilson(correct, count)
    assert low <= observed <= high
    # Searched from the edge, where the excess is positive, towards the observed share.
    assert low == pytest.approx(0.0 if correct == 0 else crossing(0.0, observed), abs=1e-9)
    mirrored = 1.0 if correct == count else crossing(1.0, observed)
    assert high == pytest.approx(mirrored, abs=1e-9)


def _cells(mask: torch.Tensor, rows: int, columns: int) -> list[list[int]]:
    return mask.view(rows, columns).nonzero().tolist()


def test_evidence_is_what_boxes_cover() -> None:
    # Cells of 10 x 20 pixels: 4 rows, 5 columns.
    def marked(*boxes: tuple[int, int, int, int]) -> list[list[int]]:
        return _cells(evidence_mask(boxes, (50, 80), (4, 5)), 4, 5)

    assert marked((10, 20, 20, 40)) == [[1, 1]]
    # A quarter of each of four cells is enough; a row of pixels less in two of them is not.
    assert marked((5, 10, 15, 30)) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert marked((5, 11, 15, 30)) == [[1, 0], [1, 1]]
    # Too small for a quarter of any cell: the cell it covers most.
    assert marked((18, 22, 21, 24)) == [[1, 1]]
    # Several boxes, one reaching over the edge.
    assert marked((0, 0, 10, 20), (40, 60, 60, 90)) == [[0, 0], [3, 4]]
    assert marked() == []
    everything = evidence_mask([(0, 0, 50, 80)], (50, 80), (4, 5))
    assert bool(everything.all())


def test_oracle_keeps_the_evidence_and_nothing_else() -> None:
    evidence = torch.tensor([[1, 5], [0, 3]])
    batch = TokenBatch(grid=(1, 2, 3), labels=("a", "b"), device=torch.device("cpu"))
    oracle: Selector = Oracle(evidence)
    assert torch.equal(oracle.select(batch, 2).kept, evidence)
    with pytest.raises(TokensError, match="Make one for each batch"):
        oracle.select(batch, 3)


def test_random_draws_anew_for_every_image() -> None:
    batch = TokenBatch(grid=(1, 8, 8), labels=("a", "b", "c"), device=torch.device("cpu"))
    picks = RandomPerImage((5, 0, 5)).select(batch, 16).kept
    one = TokenBatch(grid=(1, 8, 8), labels=("a",), device=torch.device("cpu"))
    for row, seed in zip(picks, (5, 0, 5), strict=True):
        assert torch.equal(row, build("random", {"seed": seed}).select(one, 16).kept[0])
    assert not torch.equal(picks[0], picks[1])
    with pytest.raises(TokensError, match="Give one for each"):
        RandomPerImage((1, 2)).select(batch, 16)


def test_rows_count_answers_and_evidence() -> None:
    questions = [
        Question(str(number), Path("x.png"), "?", answer, kind, ((0, 0, 1, 1),))
        for number, (answer, kind) in enumerate(
            [("red", "color"), ("top-left", "place"), ("blue", "color"), ("Yes", "exists")]
        )
    ]
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    evidence = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    answers = Answers(["red", "top", "red", "yes"], kept)
    row = make_row("s", "m", "original", questions, answers, evidence, Cost(1.0, 2.0, 3.0))
    assert (row.correct, row.questions, row.accuracy) == (2, 4, 0.5)
    assert row.by_type == {
        "color": {"accuracy": 0.5, "questions": 2},
        "place": {"accuracy": 0.0, "questions": 1},
        "exists": {"accuracy": 1.0, "questions": 1},
    }
    assert row.evidence_kept == (1 + 0 + 1 + 0.5) / 4
    assert (row.visual_tokens, row.of_visual_tokens, row.keep) == (2, 4, 0.5)
    without = make_row("s", "m", "original", questions, answers, None, Cost(1.0, 2.0, 3.0))
    assert without.evidence_kept is None


def test_choice_takes_whole_images_and_is_reproducible() -> None:
    questions = [
        Question(f"{image}-{number}", Path(f"{image}.png"), "?", "a", "t", ())
        for number in range(3)
        for image in range(50)
    ]
    chosen = choose("s", questions, 20, seed=3)
    assert len(chosen.questions) == 21
    assert len(chosen.images) == 7
    assert chosen.of_questions == 150
    assert chosen.questions == choose("s", questions, 20, seed=3).questions
    assert chosen.questions != choose("s", questions, 20, seed=4).questions
    # A larger sample holds the smaller one, and more than there is means all.
    assert set(chosen.questions) < set(choose("s", questions, 60, seed=3).questions)
    assert len(choose("s", questions, 10_000, seed=3).questions) == 150
    assert len(choose("s", questions, None, seed=3).questions) == 150


def test_peak_memory_is_counted_to_the_byte() -> None:
    weight = torch.ones(100, 100)

    def call() -> None:
        first = torch.zeros(100, 100)  # 40,000 bytes
        second = first @ weight  # 80,000; the weight was there before
        del first  # 40,000
        third = second.view(-1).add_(1)[:5000].view(50, 100)  # views: 40,000
        fourth = third.t().contiguous()  # 60,000
        del second, third  # 20,000
        torch.stack([fourth, fourth])  # 60,000

    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert peak_bytes(call) == 80_000


# Files ------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    write_whole(file, "old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{file}"], "is a file"),
        (["--out", "{file}/below"], "Not a directory"),
        (["--out", "/proc/nowhere"], "nothing can be written"),
        (["--questions", "0"], "Give at least 1"),
        (["--methods", "zeroth-odor"], "Did you mean 'zeroth-order'"),
    ],
)
def test_wrong_arguments_stop_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    arguments = [argument.format(file=file) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    assert main(["demo", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert file.read_text() == "x"


# The report -------------------------------------------------------------------------------------


class _References(HTMLParser):
    """Collects everything that a browser would load or follow, and all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.found += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster")
        ]


def _check_self_contained(html: str) -> None:
    references = _References()
    references.feed(html)
    assert references.found
    assert all(reference.startswith(("data:image/", "#")) for reference in references.found)
    assert not {"script", "link", "iframe", "object", "embed"} & set(references.elements)
    assert "@import" not in html
    assert "url(" not in html


EVIL = "<script>document.title = 'owned'</script> & \"quoted\" {{ 7 * 7 }}"


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[Results, list[Example]]:
    """Results and examples as a run makes them, with a question that tries to be code."""
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 224, 3), dtype=np.uint8)).save(
        picture
    )
    rows = []
    for place, dataset in enumerate(("scenes", "easy-vqa")):
        plain = Row(
            dataset=dataset,
            method="none",
            keep=1.0,
            accuracy=0.95,
            ci_low=0.93,
            ci_high=0.97,
            questions=1000,
            correct=950,
            visual_tokens=64,
            of_visual_tokens=64,
            prefill_ms=12.0,
            selection_ms=0.0,
            peak_memory_mib=2.0,
            evidence_kept=None if place else 1.0,
            positions="original",
            by_type={EVIL: {"accuracy": 0.9, "questions": 1000}},
            unpruned=True,
        )
        rows += [plain, *(dataclasses.replace(plain, method=method) for method in METHODS)]
        rows += [
            dataclasses.replace(
                plain,
                method=method,
                keep=keep,
                visual_tokens=64 * keep,
                accuracy=0.9 * keep**0.3,
                ci_low=0.9 * keep**0.3 - 0.03,
                ci_high=0.9 * keep**0.3 + 0.03,
                unpruned=False,
            )
            for method in METHODS
            for keep in KEEPS
        ]
        rows.append(dataclasses.replace(plain, method="oracle", keep=0.1, unpruned=False))
    about = {
        "settings": {"seed": 0, "positions": "original", "evidence": EVIL},
        "model": {"name": EVIL, "architecture": "X", "parameters": 25e6, "dtype": "float32"},
        "versions": {"python": "3"},
        "machine": {"processor": EVIL, "cores": 2, "threads": 2, "system": "Linux"},
        "subsets": {
            EVIL: {"questions": 1, "of_questions": 1, "images": 1, "of_images": 1, "ids": []}
        },
        "same_as_plain_model": {"scenes": {"questions": 8, "same": 8}},
        "seconds": 100.0,
    }
    compact = dataclasses.replace(rows[10], positions="compact", accuracy=0.4)
    question = Question("q", picture, EVIL, "seven", EVIL, ((30, 20, 90, 70),))
    kept = torch.zeros(64, dtype=torch.bool)
    kept[[9, 10, 63]] = True
    panels = (Panel("none", "seven", ~torch.zeros_like(kept)), Panel("random", EVIL, kept))
    results = Results(tmp_path / "results.json", about, rows, [compact], complete=True)
    return results, [Example("scenes", question, (8, 8), panels)]


def test_report_is_one_file_and_escapes_what_it_shows(
    made_up: tuple[Results, list[Example]],
) -> None:
    html = render(*made_up)
    _check_self_contained(html)
    assert "&lt;script&gt;document.title" in html
    assert "{{ 7 * 7 }}" in html
    assert "no public VLM" in html
    # What is kept is left out of the veil: 61 of 64 cells of 28 x 14 pixels are under it.
    paths = re.findall(r'<path d="([^"]*)"', html)
    areas = [
        sum(int(width) * int(height) for width, height in re.findall(r"h(\d+)v(\d+)", path))
        for path in paths
    ]
    assert areas == [0, 61 * 28 * 14]
    assert html.count("\u2713") == 1
    assert html.count("\u2717") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_report_in_a_browser(made_up: tuple[Results, list[Example]], tmp_path: Path) -> None:
    """Nothing that came from data runs, nothing sticks out on a telephone, and there is ink."""
    probe = """<script>addEventListener('load', () => {
      const broken = [...document.images].filter(image => !image.naturalWidth).length;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      const state = [document.title, broken, wide, document.images.length].join('|');
      document.body.setAttribute('data-state', state);
    })</script>"""
    page = tmp_path / "report.html"
    page.write_text(render(*made_up).replace("</body>", probe + "</body>"), encoding="utf-8")
    for width in (1280, 390):
        shown = browse(page, "--dump-dom", f"--window-size={width},2000").stdout
        found = re.search(r'data-state="([^"]*)"', shown)
        assert found
        title, broken, overflow, images = found[1].split("|")
        assert title.startswith("tokenprune demo")
        assert (int(broken), int(images)) == (0, 2)
        assert int(overflow) == 0, f"{overflow} pixels too wide at {width}"
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1280,2600")
    pixels = np.asarray(Image.open(picture).convert("L")).astype(float)
    assert pixels.shape == (2600, 1280)
    # Ink in every quarter of the page, and paper around it.
    assert all(quarter.std() > 8 for quarter in np.split(pixels, 4))
    assert (pixels > 250).mean() > 0.4


# End to end -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one run of the command left."""

    folder: Path
    printed: str
    errors: str
    content: dict[str, Any]

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        return [
            row
            for row in self.content["rows"]
            if all(row[name] == value for name, value in wanted.items())
        ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = subprocess.run(
        [sys.executable, "-m", "tokenprune.cli", "demo", "--questions", "40", "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "results.json").read_text("utf-8"))
    return Ran(folder, done.stdout, done.stderr, content)


def test_demo_has_a_row_for_everything(ran: Ran) -> None:
    assert ran.errors == ""
    assert ran.content["complete"] is True
    budgets = (1.0, *KEEPS)
    keys = [(row["dataset"], row["method"], row["keep"]) for row in ran.content["rows"]]
    assert len(keys) == len(set(keys))
    for dataset in ("scenes", "easy-vqa"):
        assert (dataset, "none", 1.0) in keys
        assert {(dataset, method, keep) for method in METHODS for keep in budgets} <= set(keys)
    assert [row["dataset"] for row in ran.rows(method="oracle")] == ["scenes"]
    subset = ran.content["subsets"]["scenes"]
    assert len(subset["ids"]) == subset["questions"] >= 40
    for row in [*ran.content["rows"], *ran.content["other_positions"]]:
        assert row["questions"] == ran.content["subsets"][row["dataset"]]["questions"]
        assert row["accuracy"] == row["correct"] / row["questions"]
        assert 0.0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1.0
        assert row["ci_high"] - row["ci_low"] < 0.35
        assert row["prefill_ms"] > 0
        assert row["peak_memory_mib"] > 0
        if row["method"] != "oracle":
            assert row["visual_tokens"] == tokens_kept(row["keep"], 64)
        counted = sum(kind["questions"] for kind in row["by_type"].values())
        assert counted == row["questions"]
        right = sum(kind["questions"] * kind["accuracy"] for kind in row["by_type"].values())
        assert math.isclose(right, row["correct"], abs_tol=1e-9)


def test_demo_measures_pruning(ran: Ran) -> None:
    # Unpruned rows are what the model says without tokenprune.
    for check in ran.content["same_as_plain_model"].values():
        assert check["same"] == check["questions"] > 0
    plain = {row["dataset"]: row for row in ran.rows(method="none")}
    assert plain["scenes"]["ci_high"] > 0.95
    assert plain["easy-vqa"]["ci_high"] > 0.98
    assert plain["scenes"]["evidence_kept"] == 1.0
    (oracle,) = ran.rows(method="oracle")
    assert oracle["evidence_kept"] == 1.0
    assert oracle["keep"] == oracle["visual_tokens"] / 64
    assert 1 < oracle["visual_tokens"] < 16
    # Two random tokens of 64 do not show what eight well-placed ones do.
    (blind,) = ran.rows(dataset="scenes", method="random", keep=0.03125)
    assert blind["ci_high"] < oracle["ci_low"]
    for method in METHODS:
        rows = sorted(ran.rows(dataset="scenes", method=method), key=lambda row: row["keep"])
        assert len(rows) == 6
        shares = [row["evidence_kept"] for row in rows]
        # Two tokens a picture that were chosen for the question may well be evidence.
        most = 0.6 if method == "relevant-information" else 0.5
        assert shares[0] < most < shares[-1] == 1.0
        # Fewer tokens are less memory; at 1.0 nothing is selected, which may save some.
        memory = [row["peak_memory_mib"] for row in rows]
        assert memory[:-1] == sorted(memory[:-1])
    assert {row["positions"] for row in ran.content["rows"]} == {"original"}
    assert {row["positions"] for row in ran.content["other_positions"]} == {"compact"}
    assert len({row["method"] for row in ran.content["other_positions"]}) >= 3


def test_demo_says_what_it_did(ran: Ran) -> None:
    # One line a step, and as many steps as the progress bar counts on.
    lines = ran.printed.splitlines()
    steps = [line for line in lines[: lines.index("writing the report") + 1] if ": " in line]
    steps = [line for line in steps if " questions, about " not in line]
    expected = runner._steps(runner.Settings(ran.folder), load_sets(40, 0))
    assert len(steps) == expected - 2  # loading and writing have no set in front
    assert f"scenes: {ran.content['subsets']['scenes']['questions']} of 2,600" in ran.printed
    assert "no public VLM" in ran.printed
    for method in METHODS:
        assert method in ran.printed
    html = (ran.folder / "report.html").read_text("utf-8")
    _check_self_contained(html)
    assert html.count('class="card"') == 12
    assert html.count('class="tile"') == 9 * 11 + 3 * 10
    assert sorted(entry.name for entry in ran.folder.iterdir()) == ["report.html", "results.json"]
