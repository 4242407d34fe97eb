"""The run itself: which conditions, in which order, and what is kept for the report."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenprune.budget import tokens_kept
from tokenprune.config import Positions
from tokenprune.registry import find
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.demo.answering import Answerer, Answers, Chunk
from tokenprune_eval.demo.baselines import RandomPerImage
from tokenprune_eval.demo.costs import Cost, measure
from tokenprune_eval.demo.evidence import COVERED, Oracle, evidence_mask
from tokenprune_eval.demo.questionsets import SCENES, QuestionSet, load_sets
from tokenprune_eval.demo.results import ORACLE, UNPRUNED, Results, Row, make_row
from tokenprune_eval.shared.machine import cores, processor
from tokenprune_hf.families.registry import check_method
from tokenprune_hf.images import load_image

EXAMPLE_KEEP = 0.125
INTERVALS = (
    "95 % Wilson intervals of the number of independent questions that those asked are worth: "
    "questions about one image tend to be right or wrong together"
)
EXAMPLES = {True: 9, False: 3}
"""How many questions are shown of a set with evidence, and of one without."""

POSITION_METHODS = ("zeroth-order", "cls-attention", "random")
POSITION_KEEPS = (0.5, 0.25, 0.125)
"""What is also run with the other way to count positions, on the scenes."""

MOST_THREADS = 8

PLAIN_CHECKS = 8
"""Questions of each set that the model also answers without anything of tokenprune."""


# Seconds on one core of the machine where they were measured. Only their proportions matter: they
# weigh the steps for the time that is left.
_LOAD_SECONDS = 5.0
_IMAGE_SECONDS = 0.13
_TIMING_SECONDS = 0.13  # of one condition
_PLAIN_SECONDS = 0.13  # of one question
_QUESTION_SECONDS, _TOKENS_SECONDS, _READING_SECONDS = 0.0015, 0.005, 0.005
"""Of one question: at any budget, in proportion to `keep`, and for a method that reads it."""
_REPORT_SECONDS = 3.0


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes
    ----------
    methods
        Names out of `tokenprune.methods()`.
    keeps
        Budgets besides 1.0, which is the unpruned model. `EXAMPLE_KEEP` and the report's
        `HEADLINE_KEEP` are among them.
    questions
        At least so many of each set; None for all.
    positions
        How positions are counted.
    both_positions
        Whether some conditions also run with the other way to count positions.
    seed
        Seed of the choice of questions and of those that are shown.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    questions: int | None
    positions: Positions = "original"
    both_positions: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """``"quick"`` or ``"full"``, or ``"custom"`` where anything differs from both."""
        return {QUICK: "quick", FULL: "full"}.get(self, "custom")


QUICK = Settings(
    methods=(
        "cls-attention",
        "zeroth-order",
        "flexselect",
        "divprune",
        "information",
        "relevant-information",
        "random",
        "uniform",
    ),
    keeps=(0.25, 0.125, 0.0625),
    questions=500,
)
"""What one would choose between, and two baselines; intervals are up to 9 points wide."""

FULL = Settings(
    methods=(*QUICK.methods, "feature-norm"),
    keeps=(0.5, 0.25, 0.125, 0.0625, 0.03125),
    questions=1000,
    both_positions=True,
)
"""What the README's numbers come from."""


@dataclass(frozen=True)
class Panel:
    """What one method kept for one question, and what the model then said.

    Attributes
    ----------
    method
        Its name; ``"none"`` and ``"oracle"`` as in `Row`.
    answer
        What the model said.
    kept
        BoolTensor [N].
    """

    method: str
    answer: str
    kept: Tensor


@dataclass(frozen=True)
class Example:
    """One question that the report shows.

    Attributes
    ----------
    dataset
        The set it is from.
    question
        With its image, its right answer and its evidence.
    grid
        Rows and columns of visual tokens.
    panels
        One a method.
    """

    dataset: str
    question: Question
    grid: tuple[int, int]
    panels: tuple[Panel, ...]


class Progress(Protocol):
    """What the run tells of its progress."""

    def plan(self, work: float) -> None:
        """Say how much work all steps together are, in any unit."""

    def step(
        self, text: str, total: int, work: float = 1.0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a step of `total` parts; the block gets the function that counts them."""

    def say(self, text: str) -> None:
        """Tell something that stays on the screen."""


def run(
    settings: Settings,
    out: Path,
    progress: Progress,
    finished: Callable[[QuestionSet, Sequence[Row]], None],
) -> tuple[Results, list[Example]]:
    """Run everything; ``results.json`` is written as rows finish.

    Parameters
    ----------
    settings
        What to run.
    out
        A folder that can be written to.
    progress
        Is told how far the run is.
    finished
        Is given each question set and its rows as soon as all of them are there.

    Returns
    -------
    tuple
        The results, and the questions to show.

    Raises
    ------
    UnknownMethodError, UnsupportedModelError
        For a method that is not there, or that the model cannot serve.
    MissingPackageError, BundledModelError
        If the model or a question set cannot be put together.
    OutputError
        If the results cannot be written.
    """
    threads = torch.get_num_threads()
    # Whole batches are shared out among the cores, see `Answerer`; no core waits for another.
    torch.set_num_threads(1)
    try:
        return _run(settings, out, progress, finished)
    finally:
        torch.set_num_threads(threads)


def report_step(progress: Progress) -> AbstractContextManager[Callable[[int], None]]:
    """Begin the last step of a run, which the caller does: writing the report."""
    return progress.step("writing the report", 1, _REPORT_SECONDS * _threads())


def _run(
    settings: Settings,
    out: Path,
    progress: Progress,
    finished: Callable[[QuestionSet, Sequence[Row]], None],
) -> tuple[Results, list[Example]]:
    started = time.perf_counter()
    selectors = [find(method)() for method in settings.methods]
    sets = load_sets(settings.questions, settings.seed)
    progress.plan(_work(settings, sets))
    with progress.step("loading the model", 1, _LOAD_SECONDS * _threads()):
        answerer = Answerer(bundled_model_path(), _threads())
    for selector in selectors:
        check_method(selector, answerer.model)
    about = _about(settings, sets, answerer)
    results = Results(out / "results.json", about)
    results.save()
    examples: list[Example] = []
    needs = sorted({need for selector in selectors for need in selector.needs})
    for questions in sets:
        progress.say(
            f"{questions.name}: {len(questions.questions):,} of {questions.of_questions:,} "
            f"questions, about {len(questions.images):,} of {questions.of_images:,} images "
            + ("(all)" if settings.questions is None else f"(drawn with seed {settings.seed})")
        )
        examples += _SetRun(settings, questions, answerer, results, progress).run(needs)
        finished(questions, [row for row in results.rows if row.dataset == questions.name])
    about["seconds"] = round(time.perf_counter() - started, 1)
    results.complete = True
    results.save()
    return results, examples


def _work(settings: Settings, sets: Sequence[QuestionSet]) -> float:
    """Return the work of a run and its report: seconds of one core.

    A step that keeps one core busy counts once for each thread: the others wait meanwhile.
    """
    work = (_LOAD_SECONDS + _REPORT_SECONDS) * _threads()
    for one in sets:
        conditions = [(UNPRUNED, 1.0), *_budgets(settings)]
        if one.has_evidence:
            conditions.append((ORACLE, 0.0))
        work += _IMAGE_SECONDS * len(one.images) + _timing_work(len(conditions)) + _plain_work(one)
        if settings.both_positions and one.name == SCENES:
            conditions += _position_conditions(settings)
            if one.has_evidence:
                conditions.append((ORACLE, 0.0))
        work += sum(_answer_work(one, method, keep) for method, keep in conditions)
    return work


def _answer_work(questions: QuestionSet, method: str, keep: float) -> float:
    reads = method not in (UNPRUNED, ORACLE) and "query_attention" in find(method).needs
    each = _QUESTION_SECONDS + _TOKENS_SECONDS * keep + _READING_SECONDS * reads
    return each * len(questions.questions)


def _timing_work(conditions: int) -> float:
    return _TIMING_SECONDS * conditions * _threads()


def _plain_work(questions: QuestionSet) -> float:
    return _PLAIN_SECONDS * min(PLAIN_CHECKS, len(questions.questions)) * _threads()


def _budgets(settings: Settings) -> list[tuple[str, float]]:
    return [(method, keep) for method in settings.methods for keep in settings.keeps]


def _position_conditions(settings: Settings) -> list[tuple[str, float]]:
    """Return what is run with both ways to count positions, besides the evidence alone."""
    keeps = [keep for keep in POSITION_KEEPS if keep in settings.keeps]
    return [(method, keep) for method in _position_methods(settings) for keep in keeps]


def _position_methods(settings: Settings) -> Sequence[str]:
    """Return the methods that are run with both ways to count positions."""
    known = [name for name in POSITION_METHODS if name in settings.methods]
    return known or settings.methods[:2]


class _SetRun:
    """The run of one question set."""

    def __init__(
        self,
        settings: Settings,
        questions: QuestionSet,
        answerer: Answerer,
        results: Results,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.set = questions
        self.answerer = answerer
        self.results = results
        self.progress = progress
        self.chunks: list[Chunk] = []
        self.evidence: Tensor | None = None
        self.shown: dict[str, Answers] = {}

    def run(self, needs: Sequence[str]) -> list[Example]:
        """Run all conditions of the set and return the questions to show."""
        questions = self.set.questions
        images = len(self.set.images)
        text = f"{self.set.name}: encoding {images} images"
        with self.progress.step(text, images, _IMAGE_SECONDS * images) as advance:
            self.chunks = self.answerer.encode(questions, needs, advance)
        if self.set.has_evidence:
            self.evidence = self._evidence()
        budgets = _budgets(self.settings)
        costs = self._costs(budgets)

        unpruned = self._row(UNPRUNED, 1.0, costs[UNPRUNED, 1.0])
        self._check_against_plain()
        self._add(unpruned, *(replace(unpruned, method=method) for method in self.settings.methods))
        for method, keep in budgets:
            self._add(self._row(method, keep, costs[method, keep]))
        if self.evidence is not None:
            self._add(self._row(ORACLE, 0.0, costs[ORACLE, 0.0]))
        if self.settings.both_positions and self.set.name == SCENES:
            self._other_positions(costs)
        return self._examples()

    def _add(self, *rows: Row) -> None:
        self.results.rows += rows
        self.results.save()

    def _row(self, method: str, keep: float, cost: Cost, positions: Positions | None = None) -> Row:
        """Answer all questions under one condition."""
        main = positions is None
        positions = positions or self.settings.positions
        name = {UNPRUNED: "all visual tokens", ORACLE: "the evidence alone"}.get(
            method, f"{method}, keep {keep:g}"
        )
        other = "" if main else f", positions {positions}"
        text = f"{self.set.name}: {name}{other}"
        work = _answer_work(self.set, method, keep)
        with self.progress.step(text, len(self.set.questions), work) as advance:
            if method == ORACLE:
                evidence = self._known_evidence()
                answers = self.answerer.answer_each(
                    self.set.questions,
                    self.chunks,
                    lambda numbers: Oracle(
                        evidence[numbers].nonzero()[:, 1].view(len(numbers), -1)
                    ),
                    evidence.sum(dim=1).tolist(),
                    positions,
                    advance,
                )
            elif method == "random":
                images = {image: place for place, image in enumerate(self.set.images)}
                seeds = [images[question.image] for question in self.set.questions]
                rows, columns = self.answerer.grid
                answers = self.answerer.answer_each(
                    self.set.questions,
                    self.chunks,
                    lambda numbers: RandomPerImage(tuple(seeds[number] for number in numbers)),
                    [tokens_kept(keep, rows * columns)] * len(seeds),
                    positions,
                    advance,
                )
            else:
                # At keep 1.0 nothing is scored and nothing is dropped, whatever the method.
                answers = self.answerer.answer(
                    self.set.questions,
                    self.chunks,
                    "uniform" if method == UNPRUNED else method,
                    keep,
                    positions,
                    advance,
                )
        if main and (method in (UNPRUNED, ORACLE) or keep == EXAMPLE_KEEP):
            self.shown[method] = answers
        row = make_row(
            self.set.name, method, positions, self.set.questions, answers, self.evidence, cost
        )
        return replace(
            row,
            unpruned=method == UNPRUNED,
            keep=row.keep if method == ORACLE else keep,
        )

    def _known_evidence(self) -> Tensor:
        if self.evidence is None:
            raise RuntimeError(f"{self.set.name} does not say where its evidence is")
        return self.evidence

    def _evidence(self) -> Tensor:
        """Return BoolTensor [Q, N]."""
        sizes = {image: load_image(image).size for image in self.set.images}
        return torch.stack(
            [
                evidence_mask(question.evidence, sizes[question.image], self.answerer.grid)
                for question in self.set.questions
            ]
        )

    def _costs(self, budgets: Sequence[tuple[str, float]]) -> dict[tuple[str, float], Cost]:
        """Measure every condition on one question: its evidence is of a typical size."""
        typical = 0
        if self.evidence is not None:
            counts = self.evidence.sum(dim=1).double()
            typical = int((counts - counts.mean()).abs().argmin())
        chunk, place = next(
            (chunk, chunk.numbers.index(typical))
            for chunk in self.chunks
            if typical in chunk.numbers
        )
        keys: list[tuple[str, float]] = [(UNPRUNED, 1.0), *budgets]
        conditions: list[tuple[Any, Any]] = [("uniform", 1.0), *budgets]
        if self.evidence is not None:
            places = self.evidence[typical].nonzero()[:, 0]
            keys.append((ORACLE, 0.0))
            conditions.append((Oracle(places[None]), len(places)))
        text = f"{self.set.name}: timing, methods taking turns"
        with self.progress.step(text, 1, _timing_work(len(conditions))):
            costs = measure(
                self.answerer.model,
                self.answerer.batch([self.set.questions[typical].question]),
                chunk.encoded.take([chunk.image_of[place]]),
                conditions,
            )
        return dict(zip(keys, costs, strict=True))

    def _check_against_plain(self) -> None:
        """Note whether the unpruned rows are what the model says without tokenprune."""
        numbers = random.Random(self.settings.seed).sample(
            range(len(self.set.questions)), min(PLAIN_CHECKS, len(self.set.questions))
        )
        same = 0
        text = f"{self.set.name}: comparing with the plain model"
        with self.progress.step(text, 1, _plain_work(self.set)):
            for number in numbers:
                plain = self.answerer.plain_answer(self.set.questions[number])
                same += plain == self.shown[UNPRUNED].texts[number]
        self.results.about["same_as_plain_model"][self.set.name] = {
            "questions": len(numbers),
            "same": same,
        }

    def _other_positions(self, costs: dict[tuple[str, float], Cost]) -> None:
        """Run some conditions with the other way to count positions."""
        other: Positions = "compact" if self.settings.positions == "original" else "original"
        for method, keep in _position_conditions(self.settings):
            row = self._row(method, keep, costs[method, keep], other)
            self.results.other_positions.append(row)
            self.results.save()
        if self.evidence is not None:
            self.results.other_positions.append(self._row(ORACLE, 0.0, costs[ORACLE, 0.0], other))
            self.results.save()

    def _examples(self) -> list[Example]:
        """Draw the questions to show: types take turns, and so do images."""
        questions = self.set.questions
        order = random.Random(self.settings.seed + 1).sample(range(len(questions)), len(questions))
        wanted = EXAMPLES[self.set.has_evidence]
        chosen: list[int] = []
        seen: set[Path] = set()
        while order and len(chosen) < wanted:
            if seen.issuperset(questions[number].image for number in order):
                seen.clear()
            types: set[str] = set()
            for number in list(order):
                question = questions[number]
                if question.type not in types and question.image not in seen:
                    types.add(question.type)
                    seen.add(question.image)
                    chosen.append(number)
                    order.remove(number)
        chosen = chosen[:wanted]
        methods = [UNPRUNED, *self.settings.methods]
        if ORACLE in self.shown:
            methods.append(ORACLE)
        return [
            Example(
                self.set.name,
                questions[number],
                self.answerer.grid,
                tuple(
                    Panel(
                        method,
                        self.shown[method].texts[number],
                        self.shown[method].kept[number],
                    )
                    for method in methods
                ),
            )
            for number in chosen
        ]


def _about(settings: Settings, sets: Sequence[QuestionSet], answerer: Answerer) -> dict[str, Any]:
    """Return everything a reader needs to run the same again."""
    packages = ("tokenprune-vlm", "torch", "transformers", "numpy", "pillow", "statsmodels")
    parameters = sum(parameter.numel() for parameter in answerer.model.parameters())
    return {
        "run": settings.name,
        "settings": {
            "methods": list(settings.methods),
            "keep": [1.0, *settings.keeps],
            "positions": settings.positions,
            "questions": "all" if settings.questions is None else settings.questions,
            "seed": settings.seed,
            "example_keep": EXAMPLE_KEEP,
            "random": "another draw for every image",
            "intervals": INTERVALS,
            "evidence": f"cells of the image covered by a box to at least {100 * COVERED:.0f} %",
        },
        "model": {
            "name": "the bundled model, no public VLM",
            "architecture": type(answerer.model).__name__,
            "parameters": parameters,
            "dtype": str(answerer.model.dtype).removeprefix("torch."),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "machine": {
            "processor": processor(),
            "cores": cores(),
            "threads": len(answerer.models),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "subsets": {
            one.name: {
                "questions": len(one.questions),
                "of_questions": one.of_questions,
                "images": len(one.images),
                "of_images": one.of_images,
                "ids": [question.id for question in one.questions],
            }
            for one in sets
        },
        "same_as_plain_model": {},
        "seconds": None,
    }


def _threads() -> int:
    """Return how many batches are at work at a time."""
    return min(cores(), MOST_THREADS)
