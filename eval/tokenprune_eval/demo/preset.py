"""What the demo asks: two data sets, some methods and budgets, as settings of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenprune.config import Positions
from tokenprune.media.images import load_image
from tokenprune.providers import BUNDLED, BUNDLED_SMOLLM2
from tokenprune.selecting import select
from tokenprune.selection import Selection
from tokenprune.tokens import VisualTokens
from tokenprune_eval.data.choose import choose_media
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.demo.evidence import Oracle, evidence_mask
from tokenprune_eval.evaluation.choosing import random_draws
from tokenprune_eval.evaluation.engines.transformers import ChooseTokens
from tokenprune_eval.evaluation.runner import Planned
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.records import UNPRUNED, Condition
from tokenprune_eval.shared.machine import cores

SCENES, EASY_VQA = "scenes", "easy-vqa"
ORACLE = "oracle"
"""What the condition that keeps the evidence alone has for a method."""

POSITION_METHODS = ("zeroth-order", "cls-attention", "random")
POSITION_KEEPS = (0.5, 0.25, 0.125)
"""What is also run with the other way to count positions, on the scenes."""

TIMED = BUNDLED_SMOLLM2
"""The model whose time is measured. Beside the encoder the small one's prefill takes no time, and
nothing that is saved of it could be seen."""

MAX_NEW_TOKENS = 6
"""Answers are one word; the longest of both sets is one token and the end."""

MOST_THREADS = 8
QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class DemoSet:
    """The questions of one set that a run asks.

    Attributes
    ----------
    data
        They, grouped by image.
    of_questions, of_images
        How many the whole set has.
    """

    data: DataSet
    of_questions: int
    of_images: int

    @property
    def name(self) -> str:
        """``"scenes"`` or ``"easy-vqa"``."""
        return self.data.name

    @property
    def images(self) -> list[Path]:
        """The images, in the order of the questions."""
        return list(dict.fromkeys(question.path for question in self.data.questions))

    @property
    def has_evidence(self) -> bool:
        """Whether the set says where each answer is to be seen."""
        return all(question.evidence for question in self.data.questions)


@dataclass(frozen=True)
class Preset:
    """What to run.

    Attributes
    ----------
    methods
        Names out of `tokenprune.methods()`.
    keeps
        Budgets besides 1.0, which is the unpruned model. The report's `EXAMPLE_KEEP` and
        `HEADLINE_KEEP` are among them.
    questions
        At least so many of each set; None for all.
    positions
        How positions are counted.
    both_positions
        Whether some conditions also run with the other way to count positions.
    rounds
        How often each time is measured.
    seed
        Seed of the choice of questions and of those that are shown.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    questions: int | None
    positions: Positions = "original"
    both_positions: bool = False
    rounds: int = 3
    seed: int = 0

    @property
    def name(self) -> str:
        """``"quick"`` or ``"full"``, or ``"custom"`` where anything differs from both."""
        return {QUICK: "quick", FULL: "full"}.get(self, "custom")

    @property
    def other_positions(self) -> Positions:
        """The other way to count positions."""
        return "compact" if self.positions == "original" else "original"

    def settings(self, out: Path) -> Settings:
        """Return the settings of the evaluation; data and conditions are `sets` and `conditions`.

        Parameters
        ----------
        out
            The folder that it writes to.
        """
        return Settings(
            model=BUNDLED,
            data=[SCENES, EASY_VQA],
            method=list(self.methods),
            keep=list(self.keeps),
            positions=self.positions,
            seed=self.seed,
            out=out,
            max_new_tokens=MAX_NEW_TOKENS,
            batch=QUESTIONS_AT_ONCE,
            workers=min(cores(), MOST_THREADS),
            memory=0,  # measured together with the time, methods taking turns
            note_kept=True,
            strict=True,
        )

    def sets(self) -> list[DemoSet]:
        """Return scenes and easy-VQA's test split, or as much of each as is asked.

        Raises
        ------
        MissingPackageError, BundledModelError
            If a set is not there; the message says what to install.
        """
        wholes = [load_data(SCENES), load_data(EASY_VQA)]
        return [
            DemoSet(
                choose_media(whole, self.questions, self.seed),
                of_questions=len(whole.questions),
                of_images=len({question.path for question in whole.questions}),
            )
            for whole in wholes
        ]

    def budgets(self) -> list[Condition]:
        """Return every method with every budget."""
        return [
            Condition(method=method, keep=keep, positions=self.positions)
            for method in self.methods
            for keep in self.keeps
        ]

    def conditions(self, asked: DemoSet) -> list[Condition]:
        """Return the conditions of a set: unpruned, budgets, oracle, and other positions."""
        oracle = [oracle_condition(self.positions)] if asked.has_evidence else []
        unpruned = Condition(method=UNPRUNED, keep=1.0)
        return [unpruned, *self.budgets(), *oracle, *self.others(asked)]

    def others(self, asked: DemoSet) -> list[Condition]:
        """Return what is run of a set with the other way to count positions."""
        if not self.both_positions or asked.name != SCENES:
            return []
        known = [name for name in POSITION_METHODS if name in self.methods]
        oracle = [oracle_condition(self.other_positions)] if asked.has_evidence else []
        return [
            *(
                Condition(method=method, keep=keep, positions=self.other_positions)
                for method in known or self.methods[:2]
                for keep in POSITION_KEEPS
                if keep in self.keeps
            ),
            *oracle,
        ]

    def plan(self, sets: Sequence[DemoSet]) -> list[Planned]:
        """Return what is asked, in order."""
        return [Planned(one.data, self.conditions(one)) for one in sets]


QUICK = Preset(
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

FULL = Preset(
    methods=(*QUICK.methods, "feature-norm"),
    keeps=(0.5, 0.25, 0.125, 0.0625, 0.03125),
    questions=1000,
    both_positions=True,
    rounds=5,
)
"""What the README's numbers come from."""


def oracle_condition(positions: Positions) -> Condition:
    """Return the condition that keeps the evidence alone, whose budget each question has."""
    return Condition(method=ORACLE, keep=0.0, positions=positions)


def choosers(plan: Sequence[Planned]) -> dict[str, ChooseTokens]:
    """Return what chooses tokens where no method by itself can, by the key of the condition."""
    oracle = {
        condition.key: keep_evidence
        for one in plan
        for condition in one.conditions
        if condition.method == ORACLE
    }
    return {**random_draws(plan), **oracle}


def keep_evidence(question: Question, number: int, tokens: VisualTokens) -> Selection:
    """Return the tokens that show the answer."""
    _, rows, columns = tokens.grid
    mask = evidence_mask(question.evidence, image_size(question.path), (rows, columns))
    evidence = mask.nonzero()[:, 0]
    return select(tokens, Oracle(evidence[None]), len(evidence))


@cache
def image_size(path: Path) -> tuple[int, int]:
    """Return an image's width and height in pixels."""
    size: tuple[int, int] = load_image(path).size
    return size
