"""The search: bisection over budgets, each tested on the same questions until it is decided.

All methods go over the images and videos side by side, so that one encoding serves them all, and
the unpruned model answers each question once.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
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

State = Literal["accepted", "too lossy", "undecided", "open"]
"""Of one type of question under test: `Outcome`, or not decided when the budget was."""


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
    types
        Type of question -> the share that may be lost there, for a claim about every type; empty
        for a claim about all questions together.
    """

    max_drop: float
    confidence: float
    grid: tuple[int | float, ...]
    types: Mapping[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> Mapping[str | None, float]:
        """What is tested by itself -> its bound: each type, or None, all questions together."""
        parts: dict[str | None, float] = dict(self.types.items())
        return parts or {None: self.max_drop}

    @property
    def accept_at(self) -> float:
        """Wealth at which a budget is accepted, in each of its `parts`.

        As many bad budgets can be the first one to be accepted wrongly as the bisection has steps:
        until then every bad one was refused, and a good one that is refused leads to good ones
        only. So they are fixed by where the good ones end, and each gets its share of the error.

        Types need no share of their own. A budget is bad if one type loses too much, and it is
        accepted only if that type's own test accepts, too: an intersection-union test, whose parts
        each have the whole level (Berger, "Multiparameter hypothesis testing and acceptance
        sampling", 1982).
        """
        return steps(len(self.grid)) / (1 - self.confidence)

    @property
    def reject_at(self) -> float:
        """Wealth at which a budget is refused; being wrong there costs tokens and no accuracy.

        One type is enough to refuse a budget. That none of them does so wrongly is a claim about
        their union, so the error is divided among them.
        """
        return len(self.parts) / (1 - self.confidence)


@dataclass(frozen=True)
class Part:
    """What the test of one type of question came to, or that of all questions together.

    Attributes
    ----------
    bound
        What may be lost.
    state
        What came of it.
    media, questions
        Images or videos that the test looked at, and questions about them.
    of_media
        Images or videos that there are for it.
    media_least, media_expected
        After how many it would accept if no answer to come changed, and if those to come went like
        these; None where never.
    drop
        Mean loss of accuracy over these images or videos.
    at_least, at_most
        Bounds of the true loss, see `Decision`.
    wealth
        Evidence that the loss is below the bound, see `MeanTest`.
    """

    bound: float
    state: State
    media: int
    questions: int
    of_media: int
    media_least: int
    media_expected: int | None
    drop: float
    at_least: float
    at_most: float
    wealth: float


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
        Images or videos that the test looked at, and questions about them. In a claim about types
        an image counts once for each type that it was looked at for.
    calls
        Questions put to the pruned model; those asked in one batch with the last are among them.
    errors
        Of `questions`, those without an answer, and why; they count as wrong.
    type
        In a claim about types, the one that the numbers below are of: where the budget was not
        accepted, the type that stopped it, and otherwise the one that loses most, measured from its
        bound. None where all questions are taken together.
    stopped_by
        All types that stopped the budget at that moment.
    bound
        What may be lost.
    drop
        Mean loss of accuracy over these images or videos.
    at_least, at_most
        Bounds of the true loss that hold at any moment, each by itself: with the confidence asked
        for, and with the one that acceptance needs.
    wealth
        Evidence that the loss is below the bound, see `MeanTest`.
    of_media, media_least, media_expected
        See `Part`.
    types
        Every type -> what its test came to; empty where all questions are taken together.
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
    type: str | None
    stopped_by: tuple[str, ...]
    bound: float
    drop: float
    at_least: float
    at_most: float
    wealth: float
    of_media: int
    media_least: int
    media_expected: int | None
    types: Mapping[str, Part]
    lost: tuple[str, ...]
    gained: tuple[str, ...]


def draw(
    sets: Sequence[DataSet],
    per_media: int | None,
    limit: int | None,
    seed: int,
    types: Collection[str] = (),
) -> list[list[Question]]:
    """Return images and videos in random order, each with some of its questions.

    Parameters
    ----------
    sets
        Questions; those about one file belong together. Their ids get the set's name in front.
    per_media
        Questions of each file at most, drawn; None for all. With `types`, of each type.
    limit
        Questions in all; None for all that were drawn. With `types`, each type gets as many of
        them as the others, or all that it has, where these are fewer.
    seed
        Of both draws.
    types
        Types of question to draw; where there are none, all questions, whatever their type.
    """
    generator = random.Random(seed)
    of_path: dict[Path, list[Question]] = {}
    for one in sets:
        for question in one.questions:
            if types and question.type not in types:
                continue
            named = replace(question, id=f"{one.name}/{question.id}")
            of_path.setdefault(question.path, []).append(named)
    drawn: list[list[Question]] = []
    for questions in generator.sample(list(of_path.values()), len(of_path)):
        taken: Counter[str] = Counter()
        own = []
        for question in generator.sample(questions, len(questions)):
            part = question.type if types else ""
            if per_media is None or taken[part] < per_media:
                taken[part] += 1
                own.append(question)
        drawn.append(own)
    if limit is None:
        return drawn
    there = Counter(question.type if types else "" for own in drawn for question in own)
    left = Counter(shared_out(there, limit))
    limited = []
    for own in drawn:
        kept = []
        for question in own:
            part = question.type if types else ""
            if left[part] > 0:
                left[part] -= 1
                kept.append(question)
        if kept:
            limited.append(kept)
    return limited


def shared_out(there: Mapping[str, int], limit: int) -> dict[str, int]:
    """Return how many of each are drawn: `limit` in all, evenly as far as there are enough.

    Parameters
    ----------
    there
        How many there are of each.
    limit
        How many are drawn.
    """
    shares, left = {}, limit
    for place, name in enumerate(sorted(there, key=lambda one: (there[one], one))):
        shares[name] = min(there[name], left // (len(there) - place))
        left -= shares[name]
    return shares


def of_part(media: Sequence[Sequence[Question]], part: str | None) -> list[list[Question]]:
    """Return images and videos, in order, with their questions of one type; None: with all."""
    if part is None:
        return [list(questions) for questions in media]
    own = ([one for one in questions if one.type == part] for questions in media)
    return [questions for questions in own if questions]


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


class _PartTest:
    """One type of question under test, or all questions together, for one budget."""

    def __init__(self, bound: float, bounds: Bounds, media: Sequence[Sequence[Question]]) -> None:
        self.test = MeanTest(bound, bounds.accept_at, bounds.reject_at)
        self.state: State = "open"
        self.questions = 0
        self.media = media
        self.at = 0

    def look(self, drop: float | None, questions: int) -> None:
        """Count the next image or video, whose drop is None where it has no answer unpruned."""
        self.at += 1
        if drop is not None:
            self.questions += questions
            self.test.add(drop)
        if self.test.accepted:
            self.state = "accepted"
        elif self.test.rejected:
            self.state = "too lossy"
        elif not self.test.can_accept_within(len(self.media) - self.at):
            self.state = "undecided"

    def part(self) -> Part:
        """Return what came of it."""
        return Part(
            bound=self.test.bound,
            state=self.state,
            media=self.test.count,
            questions=self.questions,
            of_media=len(self.media),
            media_least=self.test.least(),
            media_expected=self.test.expected(),
            drop=self.test.mean,
            at_least=self.test.at_least,
            at_most=self.test.at_most,
            wealth=self.test.wealth,
        )


class _Trial:
    """One budget of one method under test.

    Attributes
    ----------
    open
        Types about which questions are still to be asked; None stands for all together.
    """

    def __init__(
        self,
        condition: Condition,
        bounds: Bounds,
        media: Mapping[str | None, Sequence[Sequence[Question]]],
    ) -> None:
        self.condition = condition
        self.outcome: Outcome | None = None
        self.questions = 0
        self.errors: dict[str, str] = {}
        self.lost: list[str] = []
        self.gained: list[str] = []
        self._parts = {
            part: _PartTest(bound, bounds, media[part]) for part, bound in bounds.parts.items()
        }
        self.open: frozenset[str | None] = frozenset(self._parts)

    def asks(self, question: Question) -> bool:
        """Say whether an answer to a question is of use."""
        return None in self.open or question.type in self.open

    def advance(self, answers: Answers) -> None:
        """Look at all images or videos whose answers are there, in order, until it is decided."""
        for part in self._parts.values():
            while self.outcome is None and part.state == "open" and part.at < len(part.media):
                if not self._look(part, answers):
                    break

    def _look(self, part: _PartTest, answers: Answers) -> bool:
        """Look at a part's next image or video; say whether its answers are there."""
        unpruned, pruned = answers.of(_FULL), answers.of(self.condition)
        questions = part.media[part.at]
        if any(question.id not in unpruned for question in questions):
            return False
        asked = [question.id for question in questions if unpruned[question.id] is not None]
        if any(one not in pruned for one in asked):
            return False
        lost = [one for one in asked if unpruned[one] and not pruned[one]]
        gained = [one for one in asked if pruned[one] and not unpruned[one]]
        reasons = answers.errors_of(self.condition)
        self.errors |= {one: reasons[one] for one in asked if pruned[one] is None}
        self.lost += lost
        self.gained += gained
        self.questions += len(asked)
        part.look((len(lost) - len(gained)) / len(asked) if asked else None, len(asked))
        self._decide()
        return True

    def _decide(self) -> None:
        states = {part.state for part in self._parts.values()}
        silent = len(self.errors) == self.questions > 0
        if silent and (self.questions >= GIVE_UP or "too lossy" in states):
            # It counts as loss, and yet is none: the method does not run on these questions.
            self.outcome = "unanswered"
        elif "too lossy" in states:
            self.outcome = "too lossy"
        elif "undecided" in states:
            self.outcome = "undecided"
        elif states == {"accepted"}:
            self.outcome = "accepted"
        self.open = frozenset(
            part
            for part, one in self._parts.items()
            if self.outcome is None and one.state == "open"
        )

    def decision(self, calls: int) -> Decision:
        """Return what came of it."""
        if self.outcome is None:
            raise RuntimeError("the test is not decided")
        parts = {name: one.part() for name, one in self._parts.items()}
        stopped_by = [
            name for name, one in parts.items() if one.state in ("too lossy", "undecided")
        ]
        shown = (
            min(
                stopped_by, key=lambda name: (parts[name].state != self.outcome, parts[name].wealth)
            )
            if stopped_by
            else max(parts, key=lambda name: (parts[name].media > 0, _over(parts[name])))
        )
        one = parts[shown]
        return Decision(
            method=self.condition.method,
            keep=self.condition.keep,
            outcome=self.outcome,
            media=sum(each.media for each in parts.values()),
            questions=self.questions,
            calls=calls,
            errors=self.errors,
            type=shown,
            stopped_by=tuple(name for name in stopped_by if name is not None),
            bound=one.bound,
            drop=one.drop,
            at_least=one.at_least,
            at_most=one.at_most,
            wealth=one.wealth,
            of_media=one.of_media,
            media_least=one.media_least,
            media_expected=one.media_expected,
            types={name: each for name, each in parts.items() if name is not None},
            lost=tuple(self.lost),
            gained=tuple(self.gained),
        )


def _over(part: Part) -> float:
    """Return by how much the measured drop is above the bound; lowest where nothing was seen."""
    return part.drop - part.bound if part.media else -math.inf


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
        self._of_part = {part: of_part(media, part) for part in bounds.parts}
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
            _Trial(
                conditions[method, self.bounds.grid[search.next - 1]], self.bounds, self._of_part
            )
            for method, search in self._searches.items()
            if search.next is not None
        ]

    def _round(self, trials: list[_Trial]) -> Iterator[_Trial]:
        """Ask about one image or video after the other until every trial is decided."""
        left = trials
        while left:
            asked_for = _open(left)
            groups = [
                group
                for questions in self.media
                for group in by_media([one for one in questions if self._is_missing(one, left)])
            ]
            reading = self._read(groups, left)
            with closing(reading):
                for chunk in _chunks(reading, self.engine.media_at_once, self.settings.batch):
                    self._ask(chunk, left)
                    for trial in left:
                        trial.advance(self.answers)
                    decided = [one for one in left if one.outcome is not None]
                    if decided:
                        self._check_answers(1)
                    yield from decided
                    left = [one for one in left if one.outcome is None]
                    self.progress.advance(len(chunk))
                    if _open(left) != asked_for:
                        # Images or videos with questions of decided types alone are not read.
                        break
                else:
                    break
        self._check_answers(1)
        # Only images and videos that cannot be read came behind the last one that was looked at.
        for trial in left:
            trial.advance(self.answers)
            yield trial

    def _is_missing(self, question: Question, trials: Sequence[_Trial]) -> bool:
        """Say whether a trial needs an answer to a question that is not there."""
        if self.answers.of(_FULL).get(question.id, True) is None:
            return False
        return any(
            one.asks(question) and question.id not in self.answers.of(one.condition)
            for one in trials
        )

    def _read(
        self, groups: Sequence[Sequence[Question]], trials: Sequence[_Trial]
    ) -> Generator[MediaQuestions, None, None]:
        """Yield every group, read and prepared, in order.

        Those about which nothing is left to ask have neither content nor prompts.
        """
        known = [
            all(
                self.answers.knows(
                    question, [_FULL, *(one.condition for one in trials if one.asks(question))]
                )
                for question in group
            )
            for group in groups
        ]
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

    def _ask(self, chunk: Sequence[MediaQuestions], trials: Sequence[_Trial]) -> None:
        if to_encode := [one for one in chunk if one.error is None and one.prompts]:
            self.engine.begin(to_encode)
        # What cannot be read, prepared or encoded has no answer under any condition.
        for asked in chunk:
            if asked.error is not None:
                for question in asked.questions:
                    if not self.answers.recall(question, _FULL):
                        self.answers.note(question, _FULL, EngineAnswer(error=asked.error))
        if good := [one for one in chunk if one.error is None]:
            self._answer(good, _FULL, trials)
            for trial in trials:
                self._answer(good, trial.condition, [trial])
        self._check_answers(GIVE_UP)

    def _answer(
        self, media: Sequence[MediaQuestions], condition: Condition, trials: Sequence[_Trial]
    ) -> None:
        """Have the questions answered that one of these trials is open for."""
        known = self.answers.of(condition)
        unpruned = self.answers.of(_FULL)
        wanted = [
            question
            for one in media
            for question in one.questions
            if question.id not in known
            and unpruned.get(question.id, True) is not None
            and any(one.asks(question) for one in trials)
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


def _open(trials: Sequence[_Trial]) -> frozenset[str | None]:
    """Return the types of question that any of these trials asks about."""
    return frozenset(part for one in trials for part in one.open)


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
