"""The demo: its arithmetic by hand, its report in a browser, and the whole of it end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pty
import re
import signal
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
from rich.console import Console

import tokenprune_hf
from tests.eval.browser import CHROMIUM, browse
from tokenprune.budget import tokens_kept
from tokenprune.cli import main
from tokenprune.errors import TokensError
from tokenprune.registry import build
from tokenprune.selectors.base import Selector
from tokenprune.tokens import TokenBatch, VisualTokens
from tokenprune_eval.data.choose import choose_media
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.demo.costs import Cost, measure
from tokenprune_eval.demo.evidence import Oracle, evidence_mask
from tokenprune_eval.demo.preset import FULL, QUICK, choosers
from tokenprune_eval.demo.report import render
from tokenprune_eval.demo.results import Results, Row, make_row
from tokenprune_eval.demo.runner import Example, Panel
from tokenprune_eval.evaluation.engines.peak_memory import peak_bytes
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Record
from tokenprune_eval.results.statistics import independent, wilson
from tokenprune_eval.shared.output import OutputError, write_whole
from tokenprune_eval.shared.progress import TerminalProgress, progress_console

ROOT = Path(__file__).parents[2]

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


def test_questions_about_one_image_count_less() -> None:
    """The effective number of questions, by Rao and Scott's ratio estimator written out."""
    right = [True, True, True, False, True, False, False, False, True]
    images = ["a", "a", "a", "b", "b", "c", "c", "c", "d"]
    share = 5 / 9
    residuals = [3 - 3 * share, 1 - 2 * share, 0 - 3 * share, 1 - 1 * share]
    variance = 4 / 3 * sum(value * value for value in residuals) / 9**2
    effect = variance / (share * (1 - share) / 9)
    assert effect > 1.5
    assert independent(right, images) == pytest.approx(9 / effect)
    # One question an image: all count, less the degree of freedom. Answers that differ within
    # each image are not worth more than independent ones.
    assert independent(right, range(9)) == pytest.approx(8)
    assert independent([True, False] * 4, [0, 0, 1, 1, 2, 2, 3, 3]) == 8
    # Wholly alike within four images: four questions, less the degree of freedom.
    assert independent([True] * 6 + [False] * 6, [n // 3 for n in range(12)]) == pytest.approx(3)
    assert independent([True] * 5, ["a"] * 5) == 5
    assert independent([True, False], ["a", "a"]) == 1


def _question(id_: str, image: str, answer: str, kind: str = "t") -> Question:
    return Question(id_, "image", Path(image), "?", answer, type=kind)


def _record(right: bool, kept: list[int]) -> Record:
    return Record(item="i", condition="c", correct=right, of_visual_tokens=4, kept=kept)


def test_intervals_are_of_the_independent_questions() -> None:
    questions = [_question(str(number), f"{number // 10}.png", "yes") for number in range(60)]
    records = [_record(number < 40, [0, 1, 2, 3]) for number in range(60)]
    row = make_row("s", "m", "original", questions, records, None, Cost(1.0, 2.0, 3.0, 4.0))
    assert row.correct == 40
    # Six images, each wholly right or wrong: five questions, of which two thirds are right.
    low, high = wilson(10 / 3, 5)
    assert (row.ci_low, row.ci_high) == pytest.approx((low, high))
    assert high - low > 2 * (wilson(40, 60)[1] - wilson(40, 60)[0])


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
    preset = dataclasses.replace(QUICK, methods=("random",), keeps=(0.25,), questions=20)
    scenes, easy = preset.sets()
    draw = choosers(preset.plan([scenes, easy]))["random@0.25"]
    tokens = VisualTokens(grid=(1, 8, 8))
    batch = TokenBatch(grid=(1, 8, 8), labels=("a",), device=torch.device("cpu"))
    drawn = {}
    for asked in (scenes, easy):
        for place, image in enumerate(asked.images):
            about = [question for question in asked.data.questions if question.path == image]
            (kept,) = {tuple(draw(question, 0, tokens).kept.tolist()) for question in about}
            picks = build("random", {"seed": place}).select(batch, 16)
            assert kept == tuple(picks.kept[0].tolist())
            drawn[image] = kept
    assert len(set(drawn.values())) == max(len(scenes.images), len(easy.images))


def test_rows_count_answers_and_evidence() -> None:
    kinds = ("color", "place", "color", "exists")
    questions = [_question(str(number), "x.png", "a", kind) for number, kind in enumerate(kinds)]
    kept = [[0, 1], [0, 2], [1, 2], [2, 3]]
    evidence = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    records = [
        _record(right, of_question)
        for right, of_question in zip((True, False, False, True), kept, strict=True)
    ]
    # Cut off before it named anything: neither right nor wrong to an evaluation, wrong here.
    records[2].correct, records[2].cut = None, True
    row = make_row("s", "m", "original", questions, records, evidence, Cost(1.0, 2.0, 3.0, 4.0))
    assert (row.correct, row.questions, row.accuracy) == (2, 4, 0.5)
    assert row.by_type == {
        "color": {"accuracy": 0.5, "questions": 2},
        "place": {"accuracy": 0.0, "questions": 1},
        "exists": {"accuracy": 1.0, "questions": 1},
    }
    assert row.evidence_kept == (1 + 0 + 1 + 0.5) / 4
    assert (row.visual_tokens, row.of_visual_tokens, row.keep) == (2, 4, 0.5)
    without = make_row("s", "m", "original", questions, records, None, Cost(1.0, 2.0, 3.0, 4.0))
    assert without.evidence_kept is None


def test_choice_takes_whole_images_and_is_reproducible() -> None:
    whole = DataSet(
        "s",
        [
            _question(f"{image}-{number}", f"{image}.png", "a")
            for number in range(3)
            for image in range(50)
        ],
    )
    chosen = choose_media(whole, 20, seed=3)
    paths = [question.path for question in chosen.questions]
    assert len(paths) == 21
    assert paths == [path for path in dict.fromkeys(paths) for _ in range(3)]
    assert chosen.drawn_from == 150
    assert chosen == choose_media(whole, 20, seed=3)
    assert chosen.questions != choose_media(whole, 20, seed=4).questions
    # A larger sample holds the smaller one, and more than there is means all.
    assert set(chosen.questions) < set(choose_media(whole, 60, seed=3).questions)
    assert len(choose_media(whole, 10_000, seed=3).questions) == 150
    assert choose_media(whole, None, seed=3).drawn_from is None


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


def test_one_token_and_all_of_them_are_timed_apart() -> None:
    model, processor = tokenprune_hf.load("bundled")
    inputs = tokenprune_hf.ask(processor, "what is it?", image=Image.new("RGB", (224, 224)))
    every, one = measure(model, inputs, (), [("uniform", 1.0), ("uniform", 1)], rounds=1)
    assert every.selection_ms == 0 < one.selection_ms
    assert every.prefill_ms != one.prefill_ms
    assert every.encode_ms == one.encode_ms > 0


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
        (["--questions", "0"], "Give at least 1, or all"),
        (["--full", "--questions", "-3"], "Give at least 1, or all"),
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
            method=UNPRUNED,
            keep=1.0,
            accuracy=0.95,
            ci_low=0.93,
            ci_high=0.97,
            questions=1000,
            correct=950,
            visual_tokens=64,
            of_visual_tokens=64,
            encode_ms=130.0,
            selection_ms=0.0,
            prefill_ms=120.0,
            peak_memory_mib=2.0,
            evidence_kept=None if place else 1.0,
            positions="original",
            by_type={EVIL: {"accuracy": 0.9, "questions": 1000}},
            unpruned=True,
        )
        rows += [plain, *(dataclasses.replace(plain, method=method) for method in FULL.methods)]
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
            for method in FULL.methods
            for keep in FULL.keeps
        ]
        rows.append(dataclasses.replace(plain, method="oracle", keep=0.1, unpruned=False))
    about = {
        "run": EVIL,
        "settings": {"seed": 0, "positions": "original", "evidence": EVIL, "intervals": EVIL},
        "model": {"name": EVIL, "architecture": "X", "parameters": 25e6, "dtype": "float32"},
        "timed": {"name": EVIL, "parameters": 145e6},
        "versions": {"python": "3"},
        "machine": {"processor": EVIL, "cores": 2, "threads": 2, "system": "Linux"},
        "subsets": {
            EVIL: {"questions": 1, "of_questions": 1, "images": 1, "of_images": 1, "ids": []}
        },
        "same_as_plain_model": {"scenes": {"questions": 8, "same": 8}},
        "seconds": 100.0,
    }
    compact = dataclasses.replace(rows[10], positions="compact", accuracy=0.4)
    question = Question(
        "q", "image", picture, EVIL, "seven", type=EVIL, evidence=((30, 20, 90, 70),)
    )
    kept = torch.zeros(64, dtype=torch.bool)
    kept[[9, 10, 63]] = True
    panels = (Panel(UNPRUNED, "seven", ~torch.zeros_like(kept)), Panel("random", EVIL, kept))
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


DEMO = (sys.executable, "-m", "tokenprune.cli", "demo")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = subprocess.run(
        [*DEMO, "--full", "--questions", "40", "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "results.json").read_text("utf-8"))
    return Ran(folder, done.stdout, done.stderr, content)


def test_demo_has_a_row_for_everything(ran: Ran) -> None:
    assert ran.errors == ""
    assert ran.content["complete"] is True
    assert ran.content["run"] == "custom"  # a full one asks more
    budgets = (1.0, *FULL.keeps)
    keys = [(row["dataset"], row["method"], row["keep"]) for row in ran.content["rows"]]
    assert len(keys) == len(set(keys))
    for dataset in ("scenes", "easy-vqa"):
        assert (dataset, UNPRUNED, 1.0) in keys
        assert {(dataset, method, keep) for method in FULL.methods for keep in budgets} <= set(keys)
    assert [row["dataset"] for row in ran.rows(method="oracle")] == ["scenes"]
    subset = ran.content["subsets"]["scenes"]
    assert len(subset["ids"]) == subset["questions"] >= 40
    for row in [*ran.content["rows"], *ran.content["other_positions"]]:
        assert row["questions"] == ran.content["subsets"][row["dataset"]]["questions"]
        assert row["accuracy"] == row["correct"] / row["questions"]
        assert 0.0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1.0
        # Never narrower than of as many independent questions.
        low, high = wilson(row["correct"], row["questions"])
        assert row["ci_low"] <= low + 1e-9
        assert row["ci_high"] >= high - 1e-9
        assert min(row["encode_ms"], row["prefill_ms"]) > 0
        assert (row["selection_ms"] > 0) == (row["keep"] < 1)
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
    plain = {row["dataset"]: row for row in ran.rows(method=UNPRUNED)}
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
    for method in FULL.methods:
        rows = sorted(ran.rows(dataset="scenes", method=method), key=lambda row: row["keep"])
        assert len(rows) == 6
        shares = [row["evidence_kept"] for row in rows]
        # Two tokens a picture that were chosen for the question may well be evidence.
        most = 0.6 if method == "relevant-information" else 0.5
        assert shares[0] < most < shares[-1] == 1.0
        # Fewer tokens are less memory; at 1.0 nothing is selected, which may save some.
        memory = [row["peak_memory_mib"] for row in rows]
        assert memory[:-1] == sorted(memory[:-1])
        # The language model that is timed reads 2 tokens sooner than 64.
        assert rows[0]["prefill_ms"] < 0.8 * rows[-1]["prefill_ms"]
    assert {row["positions"] for row in ran.content["rows"]} == {"original"}
    assert {row["positions"] for row in ran.content["other_positions"]} == {"compact"}
    assert len({row["method"] for row in ran.content["other_positions"]}) >= 3


def test_demo_says_what_it_did(ran: Ran) -> None:
    subsets = ran.content["subsets"]
    assert f"scenes: {subsets['scenes']['questions']} of 2,600" in ran.printed
    answers = 0
    for name, conditions in (("scenes", 1 + 9 * 5 + 1 + 3 * 3 + 1), ("easy-vqa", 1 + 9 * 5)):
        answers += subsets[name]["questions"] * conditions
    assert f"{answers:,} answers" in ran.printed.splitlines()
    assert ran.printed.index("scenes, custom run") < ran.printed.index("easy-vqa, custom run")
    assert "no public VLM" in ran.printed
    for method in FULL.methods:
        assert method in ran.printed
    html = (ran.folder / "report.html").read_text("utf-8")
    _check_self_contained(html)
    assert "custom run" in html
    assert html.count('class="card"') == 12
    assert html.count('class="tile"') == 9 * 11 + 3 * 10
    known = read_run(ran.folder)
    assert len(known.records) == answers
    assert known.about["complete"] is True


def test_first_table_is_soon_there(tmp_path: Path) -> None:
    """The quick run's first table takes less than two minutes on two cores; we see it and stop."""
    process = subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("oracle"):  # the first table's last line
            process.terminate()
            break
    process.stdout.read()
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == -signal.SIGTERM, errors
    # Seconds of computing and not of waiting, of which two cores offer 240 in two minutes. On quiet
    # cores it takes about 65; beside other work each second does less.
    assert used.ru_utime + used.ru_stime < 240
    printed = "".join(lines)
    assert "scenes, quick run: 503 of 2,600 questions" in " ".join(printed.split())
    for method in QUICK.methods:
        assert len(re.findall(rf"^{method} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ *$", printed, re.M)) == 1
    # What was found stays, in the folder of quick runs, and says that it is not complete.
    content = json.loads((tmp_path / "demo-out" / "quick" / "results.json").read_text("utf-8"))
    assert (content["run"], content["complete"]) == ("quick", False)
    assert [row["dataset"] for row in content["rows"]] == ["scenes"] * (2 + 8 * 4)


def test_bar_in_a_terminal_shows_the_time_left(tmp_path: Path) -> None:
    """The bar goes to the terminal also where the tables go into a file."""
    terminal, other_end = pty.openpty()
    command = [*DEMO, "--questions", "20", "--methods", "information", "random"]
    with (tmp_path / "printed").open("w") as stdout:
        process = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=other_end,
            cwd=tmp_path,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
        )
    os.close(other_end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the process has closed its end
            break
        shown += part
    os.close(terminal)
    assert process.wait() == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode("utf-8"))
    assert re.search(r"scenes: random@0.25 .+ \d+/\d+ .+ 0:\d\d:\d\d 0:\d\d:\d\d left", text)
    printed = (tmp_path / "printed").read_text("utf-8")
    assert " a second" not in printed
    assert "scenes, custom run" in printed
    assert (tmp_path / "demo-out" / "custom" / "report.html").is_file()


def test_no_bar_is_drawn_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes everything for a terminal
    with (tmp_path / "log").open("w") as file:
        console = progress_console(Console(file=file, width=40))
        with TerminalProgress(console) as progress:
            progress.plan(8.0)
            with progress.step("a step with a description longer than the line", 2, 6.0) as advance:
                advance(1)
            with progress.step("another", 1, 2.0):
                pass
            progress.say("said")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "a step with a description longer than the line (0 % done)"
    assert re.fullmatch(r"another \(75 % done, about 0:00:0\d left\)", lines[1])
    assert lines[2:] == ["said"]


def _demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one method on few questions; return what was printed."""
    arguments = ["demo", "--questions", "10", "--methods", "random", "--out", str(folder)]
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_interrupted_run_continues_and_a_finished_one_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _demo(tmp_path, capsys)
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    records = (tmp_path / "records.jsonl").read_text("utf-8").splitlines(keepends=True)
    assert f"{len(records)} answers\n" in _demo(tmp_path, capsys)
    # Killed while it wrote its 41st answer.
    (tmp_path / "records.jsonl").write_text("".join(records[:40]) + records[40][:20], "utf-8")
    about = json.loads((tmp_path / "run.json").read_text("utf-8"))
    (tmp_path / "run.json").write_text(json.dumps({**about, "complete": False}), "utf-8")
    assert f"{len(records)} answers, 40 of them known\n" in _demo(tmp_path, capsys)
    continued = json.loads((tmp_path / "results.json").read_text("utf-8"))
    for before, after in zip(results["rows"], continued["rows"], strict=True):
        for name in ("encode_ms", "selection_ms", "prefill_ms"):
            before.pop(name), after.pop(name)
        assert before == after


def test_an_evaluation_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"settings": {}, "conditions": [], "complete": False}
    (tmp_path / "run.json").write_text(json.dumps(about), "utf-8")
    for name in ("items.jsonl", "records.jsonl"):
        (tmp_path / name).touch()
    assert main(["demo", "--questions", "10", "--out", str(tmp_path)]) == 2
    assert "holds a run of `tokenprune eval`" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text("utf-8")) == about


def test_runs_have_names() -> None:
    assert (QUICK.name, FULL.name) == ("quick", "full")
    for changed in (
        dataclasses.replace(FULL, questions=40),
        dataclasses.replace(QUICK, seed=1),
        dataclasses.replace(FULL, methods=FULL.methods[1:]),
        dataclasses.replace(FULL, positions="compact"),
    ):
        assert changed.name == "custom"
    # Both reports' headlines and pictures need these budgets.
    assert {0.25, 0.125} < set(QUICK.keeps) < set(FULL.keeps)
    assert set(QUICK.methods) < set(FULL.methods)


def test_documents_quote_full_runs_alone(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for content, said in (
        ({"run": "quick", "complete": True}, "a quick run"),
        ({"run": "custom", "complete": True}, "a custom run"),
        ({"complete": True}, "an older version's run"),
        ({"run": "full", "complete": False}, "did not finish"),
    ):
        file.write_text(json.dumps(content))
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "update_docs.py", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert "scripts/demo --full" in done.stderr
        assert done.stdout == ""
