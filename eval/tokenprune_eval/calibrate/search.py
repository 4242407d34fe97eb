"""The search: bisection over budgets, each tested on the same questions until it is decided.

All methods go over the images and videos side by side, so that one encoding serves them all, and
the unpruned model answers each question once.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune_eval.calibrate.sequential import MeanTest
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.evaluation.engines.base import Engine, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.read_ahead import by_media, read_ahead
from tokenprune_eval.evaluation.scoring import prompts_of, score
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.records import UNPRUNED, Condition, Record

CUT = "the answer was cut off before it named anything; give more --max-new-tokens."
"""Why there is no answer to a question whose answer is longer than allowed."""

GIVE_UP = 10
"""Questions without an answer, and none with one, after which the search ends."""

Outcome = Literal["accepted", "too lossy", "undecided", "unanswered"]


class CalibrationError(TokenPruneError, RuntimeError):
    """The model gives no answers to calibrate with."""


class Progress(Protocol):
    """What the search tells of its progress."""

    def round(self, text: str, media: int) -> None:
        """Say what is tested now, and on how many images or videos at most."""

    def advance(self, media: int) -> None:
        """Count images or videos."""


class Bisection:
    """Which budget to try next, if loss does not fall when fewer tokens are kept.

    Parameters
    ----------
    count
        Budgets, from the largest to the smallest, numbered from 1; number 0 keeps everything.

    Attributes
    ----------
    best
        The last one accepted.
    """

    def __init__(self, count: int) -> None:
        self.best = 0
        self._refused = count + 1

    @property
    def next(self) -> int | None:
        """The budget to try; None where none is left."""
        middle = (self.best + self._refused) // 2
        return middle if middle > self.best else None

    def tell(self, accepted: bool) -> None:
        """Say what came of `next`."""
        tried = self.next
        if tried is None:
            raise ConfigError("no budget is left to try.")
        if accepted:
            self.best = tried
        else:
            self._refused = tried


def steps(count: int) -> int:
    """Return how many of `count` budgets a bisection tries at most: ``ceil(log2(count + 1))``."""
    return count.bit_length()


@dataclass(frozen=True)
class Bounds:
    """What is to be shown, and how surely.

    Attributes
    ----------
    max_drop
        Share of questions, above 0 and below 1.
    confidence
        Likewise.
    grid
        Budgets from the largest to the smallest, without 1.0.
    """

    max_drop: float
    confidence: float
    grid: tuple[int | float, ...]

    @property
    def accept_at(self) -> float:
        """Wealth at which a budget is accepted.

        As many bad budgets can be the first one to be accepted wrongly as the bisection has steps:
        until then every bad one was refused, and a good one that is refused leads to good ones
        only. So they are fixed by where the good ones end, and each gets its share of the error.
        """
        return steps(len(self.grid)) * self.reject_at

    @property
    def reject_at(self) -> float:
        """Wealth at which a budget is refused; being wrong there costs tokens and no accuracy."""
        return 1 / (1 - self.confidence)


@dataclass(frozen=True)
class Decision:
    """What came of one budget of one method.

    Attributes
    ----------
    method, keep
        The budget.
    outcome
        ``"accepted"``, ``"too lossy"``, ``"undecided"`` where the questions left do not suffice, or
        ``"unanswered"`` where the pruned model had an answer to none.
    media, questions
        Images or videos that the test looked at, and questions about them.
    calls
        Questions put to the pruned model; those asked in one batch with the last are among them.
    errors
        Of `questions`, those without an answer, and why; they count as wrong.
    drop
        Mean loss of accuracy over these images or videos.
    at_least, at_most
        Bounds of the true loss that hold at any moment, each by itself: with the confidence asked
        for, and with the one that acceptance needs.
    wealth
        Evidence that the loss is below the bound, see `MeanTest`.
    lost, gained
        Questions that only the unpruned, or only the pruned model got right.
    """

    method: str
    keep: int | float
    outcome: Outcome
    media: int
    questions: int
    calls: int
    errors: dict[str, str]
    drop: float
    at_least: float
    at_most: float
    wealth: float
    lost: tuple[str, ...]
    gained: tuple[str, ...]


def draw(
    sets: Sequence[DataSet], per_media: int | None, limit: int | None, seed: int
) -> list[list[Question]]:
    """Return images and videos in random order, each with some of its questions.

    Parameters
    ----------
    sets
        Questions; those about one file belong together. Their ids get the set's name in front.
    per_media
        Questions of each file at most, drawn; None for all.
    limit
        Questions in all; None for all that were drawn.
    seed
        Of both draws.
    """
    generator = random.Random(seed)
    of_path: dict[Path, list[Question]] = {}
    for one in sets:
        for question in one.questions:
            named = replace(question, id=f"{one.name}/{question.id}")
            of_path.setdefault(question.path, []).append(named)
    drawn: list[list[Question]] = []
    left = sum(map(len, of_path.values())) if limit is None else limit
    for questions in generator.sample(list(of_path.values()), len(of_path)):
        own = generator.sample(questions, len(questions))[:per_media][:left]
        if own:
            drawn.append(own)
        left -= len(own)
    return drawn


class Answers:
    """Every answer so far, each on disk as soon as it is there.

    Parameters
    ----------
    store
        The folder of the answers; it has begun.
    earlier
        What an interrupted search left in it. These are not taken as answered: the search comes to
        each of them as before, and gets it from here in place of the model, so that it goes the
        same way.
    settings
        How answers are read.

    Attributes
    ----------
    right
        Condition's key -> id of a question -> whether its answer is right; None: no answer.
    calls
        Condition's key -> questions put to the model, also in an interrupted search.
    errors
        Condition's key -> id of a question -> why there is no answer.
    """

    def __init__(self, store: Store, earlier: Iterable[Record], settings: Settings) -> None:
        self._store = store
        self._earlier = {(one.condition, one.item): one for one in earlier}
        self._settings = settings
        self._lock = threading.Lock()
        self.right: dict[str, dict[str, bool | None]] = {}
        self.calls: Counter[str] = Counter()
        self.errors: dict[str, dict[str, str]] = {}

    def of(self, condition: Condition) -> dict[str, bool | None]:
        """Return the answers under one condition."""
        return self.right.setdefault(condition.key, {})

    def errors_of(self, condition: Condition) -> dict[str, str]:
        """Return why questions have no answer under one condition."""
        return self.errors.setdefault(condition.key, {})

    def knows(self, question: Question, conditions: Iterable[Condition]) -> bool:
        """Say whether an interrupted search has asked a question under all these conditions."""
        return all((one.key, question.id) in self._earlier for one in conditions)

    def recall(self, question: Question, condition: Condition) -> bool:
        """Note what an interrupted search was told; say whether it was told anything."""
        record = self._earlier.get((condition.key, question.id))
        if record is not None:
            self._note(record, condition)
        return record is not None

    def note(self, question: Question, condition: Condition, said: EngineAnswer) -> None:
        """Note what the model said and put it on disk; answers may come from several threads."""
        record = score(question, condition, said, self._settings.choose_by, self._settings.box_unit)
        with self._lock:
            self._store.append([record])
            self._note(record, condition)

    def _note(self, record: Record, condition: Condition) -> None:
        self.of(condition)[record.item] = record.correct
        if record.correct is None:
            # No loss can be measured against an answer that names nothing.
            self.errors_of(condition)[record.item] = record.error or CUT


class _Trial:
    """One budget of one method under test."""

    def __init__(
        self, condition: Condition, bounds: Bounds, media: Sequence[Sequence[Question]]
    ) -> None:
        self.condition = condition
        self.test = MeanTest(bounds.max_drop, bounds.accept_at, bounds.reject_at)
        self.outcome: Outcome | None = None
        self.questions = 0
        self.errors: dict[str, str] = {}
        self.lost: list[str] = []
        self.gained: list[str] = []
        self._media = media
        self._at = 0

    def advance(self, answers: Answers) -> None:
        """Look at all images or videos whose answers are there, in order, until it is decided."""
        unpruned = answers.of(_FULL)
        pruned = answers.of(self.condition)
        while self.outcome is None and self._at < len(self._media):
            questions = self._media[self._at]
            if any(question.id not in unpruned for question in questions):
                return
            asked = [question.id for question in questions if unpruned[question.id] is not None]
            if any(one not in pruned for one in asked):
                return
            self._at += 1
            if asked:
                self._look(asked, unpruned, pruned)
                reasons = answers.errors_of(self.condition)
                self.errors |= {one: reasons[one] for one in asked if pruned[one] is None}
            self._decide()

    def _look(
        self, asked: list[str], unpruned: dict[str, bool | None], pruned: dict[str, bool | None]
    ) -> None:
        lost = [one for one in asked if unpruned[one] and not pruned[one]]
        gained = [one for one in asked if pruned[one] and not unpruned[one]]
        self.lost += lost
        self.gained += gained
        self.questions += len(asked)
        self.test.add((len(lost) - len(gained)) / len(asked))

    def _decide(self) -> None:
        silent = len(self.errors) == self.questions > 0
        if silent and (self.questions >= GIVE_UP or self.test.rejected):
            # It counts as loss, and yet is none: the method does not run on these questions.
            self.outcome = "unanswered"
        elif self.test.accepted:
            self.outcome = "accepted"
        elif self.test.rejected:
            self.outcome = "too lossy"
        elif not self.test.can_accept_within(len(self._media) - self._at):
            self.outcome = "undecided"

    def decision(self, calls: int) -> Decision:
        """Return what came of it."""
        if self.outcome is None:
            raise RuntimeError("the test is not decided")
        return Decision(
            method=self.condition.method,
            keep=self.condition.keep,
            outcome=self.outcome,
            media=self.test.count,
            questions=self.questions,
            calls=calls,
            errors=self.errors,
            drop=self.test.mean,
            at_least=self.test.at_least,
            at_most=self.test.at_most,
            wealth=self.test.wealth,
            lost=tuple(self.lost),
            gained=tuple(self.gained),
        )


_FULL = Condition(method=UNPRUNED, keep=1.0)


class Search:
    """The search for all methods.

    Parameters
    ----------
    settings
        Model, methods, and how questions are asked. The engine was built from them, with every
        budget of the grid.
    bounds
        What is to be shown.
    media
        Images and videos with their questions, see `draw`.
    engine
        Answers.
    answers
        Where they go, and those of an interrupted search.
    progress
        Is told how far the search is.
    """

    def __init__(
        self,
        settings: Settings,
        bounds: Bounds,
        media: Sequence[Sequence[Question]],
        engine: Engine,
        answers: Answers,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.bounds = bounds
        self.media = media
        self.engine = engine
        self.progress = progress
        self.answers = answers
        self._searches = {
            method: Bisection(len(bounds.grid)) for method in dict.fromkeys(settings.method)
        }

    def best(self, method: str) -> int | float | None:
        """Return the smallest budget accepted so far; None where there is none."""
        number = self._searches[method].best
        return self.bounds.grid[number - 1] if number else None

    def finished(self, method: str) -> bool:
        """Say whether no budget of a method is left to try."""
        return self._searches[method].next is None

    def decisions(self) -> Iterator[Decision]:
        """Search, and yield what came of each budget.

        Raises
        ------
        CalibrationError
            If the unpruned model answers nothing.
        """
        while trials := self._trials():
            self.progress.round(", ".join(one.condition.key for one in trials), len(self.media))
            for trial in self._round(trials):
                self._searches[trial.condition.method].tell(trial.outcome == "accepted")
                yield trial.decision(self.answers.calls[trial.condition.key])

    def _trials(self) -> list[_Trial]:
        conditions = {(one.method, one.keep): one for one in self.settings.conditions()}
        return [
            _Trial(conditions[method, self.bounds.grid[search.next - 1]], self.bounds, self.media)
            for method, search in self._searches.items()
            if search.next is not None
        ]

    def _round(self, trials: list[_Trial]) -> Iterator[_Trial]:
        """Ask about one image or video after the other until every trial is decided."""
        left = trials
        unpruned = self.answers.of(_FULL)
        groups = [
            group
            for questions in self.media
            for group in by_media(
                [one for one in questions if unpruned.get(one.id, True) is not None]
            )
        ]
        reading = self._read(groups, [_FULL, *(one.condition for one in left)])
        with closing(reading):
            for chunk in _chunks(reading, self.engine.media_at_once, self.settings.batch):
                self._ask(chunk, [one.condition for one in left])
                for trial in left:
                    trial.advance(self.answers)
                decided = [one for one in left if one.outcome is not None]
                if decided:
                    self._check_answers(1)
                yield from decided
                left = [one for one in left if one.outcome is None]
                self.progress.advance(len(chunk))
                if not left:
                    return
        self._check_answers(1)
        # Only images and videos that cannot be read came behind the last one that was looked at.
        for trial in left:
            trial.advance(self.answers)
            yield trial

    def _read(
        self, groups: Sequence[Sequence[Question]], conditions: Sequence[Condition]
    ) -> Generator[MediaQuestions, None, None]:
        """Yield every group, read and prepared, in order.

        Those about which nothing is left to ask have neither content nor prompts.
        """
        known = [all(self.answers.knows(one, conditions) for one in group) for group in groups]
        reading = cast(
            Generator[MediaQuestions, None, None],
            read_ahead(
                [group for group, is_known in zip(groups, known, strict=True) if not is_known],
                self.settings,
                prompts_of(self.settings),
                self.engine.prepare,
            ),
        )
        with closing(reading):
            for group, is_known in zip(groups, known, strict=True):
                if is_known:
                    yield MediaQuestions(group, ())
                    continue
                left = len(group)
                while left:  # a group may come in parts
                    part = next(reading)
                    left -= len(part.questions)
                    yield part

    def _ask(self, chunk: Sequence[MediaQuestions], conditions: Sequence[Condition]) -> None:
        if to_encode := [one for one in chunk if one.error is None and one.prompts]:
            self.engine.begin(to_encode)
        # What cannot be read, prepared or encoded has no answer under any condition.
        for asked in chunk:
            if asked.error is not None:
                for question in asked.questions:
                    if not self.answers.recall(question, _FULL):
                        self.answers.note(question, _FULL, EngineAnswer(error=asked.error))
        if good := [one for one in chunk if one.error is None]:
            for condition in (_FULL, *conditions):
                self._answer(good, condition)
        self._check_answers(GIVE_UP)

    def _answer(self, media: Sequence[MediaQuestions], condition: Condition) -> None:
        known = self.answers.of(condition)
        unpruned = self.answers.of(_FULL)
        wanted = [
            question
            for one in media
            for question in one.questions
            if question.id not in known and unpruned.get(question.id, True) is not None
        ]
        self.answers.calls[condition.key] += len(wanted)
        new = [question for question in wanted if not self.answers.recall(question, condition)]
        if new:
            self.engine.answer(
                [one for one in media if one.prompts],
                new,
                condition,
                lambda question, said: self.answers.note(question, condition, said),
            )

    def _check_answers(self, errors: int) -> None:
        """Raise if there were that many errors and no answer."""
        unpruned = self.answers.of(_FULL)
        if len(unpruned) >= errors and all(right is None for right in unpruned.values()):
            question, error = next(iter(self.answers.errors_of(_FULL).items()))
            raise CalibrationError(
                f"the unpruned model answered none of {len(unpruned)} questions, for example "
                f"{question}: {error} See to that first; `tokenprune eval validate` helps to find "
                "it."
            )


def _chunks(
    reading: Iterator[MediaQuestions], at_once: dict[str, int], batch: int
) -> Iterator[list[MediaQuestions]]:
    """Yield a few images, or videos, at a time: as many as their questions fill a batch.

    More would be questions that a test, decided by then, has no use for.
    """
    chunk: list[MediaQuestions] = []
    for one in reading:
        kind = one.questions[0].kind
        full = chunk and (
            kind != chunk[0].questions[0].kind
            or len(chunk) >= at_once[kind]
            or sum(len(other.questions) for other in (*chunk, one)) > batch
        )
        if full:
            yield chunk
            chunk = []
        chunk.append(one)
    if chunk:
        yield chunk
