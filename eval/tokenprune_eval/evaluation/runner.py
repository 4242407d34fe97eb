"""The run: every question under every condition, each answer on disk as soon as it is there."""

from __future__ import annotations

import datetime
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from tokenprune.errors import (
    ConfigError,
    TokenPruneError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.providers import BUNDLED_MODELS
from tokenprune_eval.data.load import choose, load_data
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.evaluation.checks import check_before_model
from tokenprune_eval.evaluation.engines.base import (
    Engine,
    EngineAnswer,
    MeasuresDominance,
    MediaQuestions,
)
from tokenprune_eval.evaluation.failures import alike, failure_of
from tokenprune_eval.evaluation.read_ahead import by_media, read_ahead
from tokenprune_eval.evaluation.scoring import prompts_of, score
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.files import StoredRun, read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Depth, ModalityIndices, Record
from tokenprune_eval.results.summary import QuestionInfo, Results, summarise
from tokenprune_eval.shared.machine import machine, versions

LOSSES_SHOWN = 20
"""Lost questions of each data set and condition whose kept tokens are noted, for the report."""


GIVE_UP = 10
"""Images or videos that fail alike, none answered before, after which a run ends."""


class EvaluationError(TokenPruneError, RuntimeError):
    """No question could be answered, or one could not and the run was asked to be strict."""


class Progress(Protocol):
    """What a run tells of its progress."""

    def plan(self, total: int, done: int) -> None:
        """Say how many answers there will be, and how many there were before."""

    def at(self, text: str) -> None:
        """Say what is at work."""

    def advance(self, answers: int) -> None:
        """Count answers."""


def load_sets(settings: Settings) -> list[DataSet]:
    """Return the data sets of a run, drawn and sharded.

    Raises
    ------
    TokenPruneError
        See `tokenprune_eval.data.load.load_data`.
    """
    found: list[DataSet] = []
    for spec in settings.data:
        whole = load_data(
            spec, media=settings.media, split=settings.split, answers=settings.answers
        )
        if whole.name in {one.name for one in found}:
            raise ConfigError(
                f"two data sets are called {whole.name!r}, and their rows could not be told apart. "
                "Rename one of the files."
            )
        found.append(choose(whole, settings.limit_of(whole.name), settings.seed, settings.shard))
    if isinstance(settings.limit, dict):
        names = {one.name for one in found}
        for name in settings.limit:
            if name not in names:
                raise ConfigError(
                    f"limit names the data set {name!r}, which is not among those that are run. "
                    f"{did_you_mean(name, names)}"
                )
    return found


def build_engine(settings: Settings) -> Engine:
    """Return the engine that the settings name.

    Raises
    ------
    TokenPruneError
        If the model cannot be loaded or served, see the engines.
    """
    if settings.engine == "vllm":
        from tokenprune_eval.evaluation.engines.vllm import VllmEngine

        return VllmEngine(settings)
    if settings.engine == "openai":
        from tokenprune_eval.evaluation.engines.openai import OpenAIEngine

        return OpenAIEngine(settings)
    from tokenprune_eval.evaluation.engines.transformers import TransformersEngine

    return TransformersEngine(settings)


@dataclass(frozen=True)
class Planned:
    """One data set, and the conditions under which it is asked.

    Attributes
    ----------
    data
        The questions; their ids are those of the data set.
    conditions
        The unpruned one first.
    """

    data: DataSet
    conditions: Sequence[Condition]


def run(settings: Settings, progress: Progress) -> Results:
    """Answer what is not answered yet, and write the results.

    Parameters
    ----------
    settings
        What to run.
    progress
        Is told how far the run is.

    Raises
    ------
    TokenPruneError
        For settings, data or a model that cannot be used, for a folder that holds another run or
        cannot be written, where no question can be answered at all or the engine is lost, and with
        `strict` for the first question without an answer. What was answered stays in the folder.
    """
    # Its packages draw and fill in the report, which others who ask questions here do without.
    from tokenprune_eval.results.write import write_results

    settings.check_methods()
    sets = load_sets(settings)
    check_before_model(settings, sets)
    conditions = settings.conditions()
    started = time.perf_counter()
    with Store(settings.out) as store:
        plan = [Planned(one, conditions) for one in sets]
        known = answer_all(store, settings, plan, progress, partial(build_engine, settings))
        progress.at("working out the results")
        everything = {(one.key, info.id) for one in known.conditions for info in known.questions}
        known.about["seconds"] = round(time.perf_counter() - started, 1)
        known.about["complete"] = everything <= store.done
        store.write_about(known.about)
        results = results_of(settings.out)
        write_results(settings.out, results)
    return results


def answer_all(
    store: Store,
    settings: Settings,
    plan: Sequence[Planned],
    progress: Progress,
    engine_of: Callable[[], Engine],
    answered: Callable[[Planned, Engine], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> StoredRun:
    """Put every question of a plan to an engine, unless the folder has its answer.

    This is the one place from which questions are put to a model and their answers kept.

    Parameters
    ----------
    store
        The run's folder, held.
    settings
        Of the run; the plan says which data and which conditions.
    plan
        What is asked, in order.
    progress
        Is told how far the run is.
    engine_of
        Makes the engine, where anything is left to ask.
    answered
        Is given each part of the plan as soon as all of it is answered, and the engine, which has
        nothing to do then. With it the engine is made in any case.
    about
        What ``run.json`` is to say besides.

    Returns
    -------
    StoredRun
        What the folder held before, with the questions and conditions that were added.

    Raises
    ------
    TokenPruneError
        As `run`.
    """
    infos = [QuestionInfo.of(one.data.name, each) for one in plan for each in one.data.questions]
    known = store.begin(
        settings,
        {
            "data": [{"name": one.data.name, "of": one.data.drawn_from} for one in plan],
            "bundled": settings.model in BUNDLED_MODELS,
            "versions": versions(),
            "machine": machine(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": None,
            "complete": False,
            **(about or {}),
        },
        infos,
        list({each.key: each for one in plan for each in one.conditions}.values()),
    )
    wanted = {
        (condition.key, f"{one.data.name}/{question.id}")
        for one in plan
        for condition in one.conditions
        for question in one.data.questions
    }
    progress.plan(len(wanted), len(wanted & store.done))
    if wanted <= store.done and answered is None:
        return known
    progress.at("loading the model")
    engine = engine_of()
    try:
        known.about["model"] = engine.about()
        store.write_about(known.about)
        work = _Answering(settings, engine, store, progress, known.records)
        for one in plan:
            work.run(one)
            if answered is not None:
                answered(one, engine)
        work.finish()
    finally:
        engine.close()
    return known


def results_of(folder: Path) -> Results:
    """Return what the records of a run's folder come to.

    Raises
    ------
    InputFileError
        If it is no such folder, or damaged.
    """
    known = read_run(folder)
    return summarise(known.about, known.questions, known.conditions, known.records)


class _Answering:
    """One data set after the other through one engine.

    One odd question ends nothing: it is recorded as failed. Failures before the first answer are
    held back, for they may be of the run's own making, such as a wrong folder or a server that
    refuses everything. Where no answer comes they are dropped with an error, so that the folder
    holds no empty result, and the same command asks these questions again.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        store: Store,
        progress: Progress,
        records: Sequence[Record],
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.store = store
        self.progress = progress
        self.conditions: Sequence[Condition] = ()
        self._lock = threading.Lock()
        self._right_unpruned: set[str] = set()
        self._losses: Counter[str] = Counter()
        self._looked_at: set[str] = set()
        self._answers_before = any(record.error is None for record in records)
        self._answered = False
        self._held: list[Record] = []
        self._reasons: dict[str, str] = {}  # of questions that failed in this call, the first one
        self._failing: Counter[str] = Counter()
        for record in records:
            self._note(record)

    def run(self, planned: Planned) -> None:
        """Answer what is not answered yet of one data set."""
        self.conditions = planned.conditions
        # In the folder, questions of several data sets lie side by side.
        data_set = replace(
            planned.data,
            questions=[
                replace(one, id=f"{planned.data.name}/{one.id}") for one in planned.data.questions
            ],
        )
        groups = [
            [question for question in group if self._pending(question)]
            for group in by_media(data_set.questions)
        ]
        self._losses.clear()
        # By name and not by count: a run that goes on looks at the same ones.
        self._looked_at = {
            question.id for question in data_set.questions[: self.settings.dominance]
        }
        measured: Counter[str] = Counter()
        reading = read_ahead(
            [group for group in groups if group],
            self.settings,
            prompts_of(self.settings),
            self.engine.prepare,
        )
        for chunk in _chunks(reading, self.engine.media_at_once):
            self.progress.at(data_set.name)
            for one in chunk:
                if one.error is not None:
                    self._fail(one)
            good = [one for one in chunk if one.error is None]
            if good:
                self.engine.begin(good)
            for one in good:
                if one.error is not None:
                    self._fail(one)
            good = [one for one in good if one.error is None]
            for condition in self.conditions if good else ():
                self._answer(good, condition, measured, data_set.name)
            self._check_systematic(chunk)

    def finish(self) -> None:
        """Record what failed, unless nothing was answered.

        Raises
        ------
        EvaluationError
            If there is no answer in the folder.
        """
        if self._reasons and not self._answered and not self._answers_before:
            raise self._none_answered(f"none of the {len(self._reasons):,} questions")
        self._keep([], flush=True)

    def _check_systematic(self, chunk: Sequence[MediaQuestions]) -> None:
        """End the run if the first images or videos all failed alike, whatever the condition.

        Files that cannot be read are left to `finish`: each has a reason of its own.
        """
        if self._answered or self._answers_before:
            return
        for one in chunk:
            reason = self._reasons.get(one.questions[0].id)
            if reason is not None and not one.unread:
                self._failing[alike(reason)] += 1
        if any(count >= GIVE_UP for count in self._failing.values()):
            raise self._none_answered(
                f"no question about the first {sum(self._failing.values())} images or videos"
            )

    def _none_answered(self, which: str) -> EvaluationError:
        question, reason = next(iter(self._reasons.items()))
        return EvaluationError(
            f"{which} could be answered, for example {question}: {_sentence(reason)} Nothing of it "
            "is recorded. Correct the settings, the data or the server, and run the same command "
            "again; `tokenprune eval validate` helps to find the reason."
        )

    def _keep(self, records: Sequence[Record], *, flush: bool = False) -> None:
        """Put records on disk; failures not before there is an answer, or on `flush`."""
        for record in records:
            if record.error is not None:
                self._reasons.setdefault(record.item, record.error)
            else:
                self._answered = True
        self._held += records
        if self._answered or flush or self.settings.strict:
            self.store.append(self._held)
            self._held = []
        self.progress.advance(len(records))

    def _pending(self, question: Question) -> bool:
        return any((one.key, question.id) not in self.store.done for one in self.conditions)

    def _answer(
        self,
        media: Sequence[MediaQuestions],
        condition: Condition,
        measured: Counter[str],
        name: str,
    ) -> None:
        wanted = [
            question
            for one in media
            for question in one.questions
            if (condition.key, question.id) not in self.store.done
        ]
        if not wanted:
            return
        self.progress.at(f"{name}: {condition.key}")
        peaks: dict[str, int | None] = {}
        while measured[condition.key] < self.settings.memory and len(peaks) < len(wanted):
            question = wanted[len(peaks)]
            try:
                peaks[question.id] = self.engine.peak_bytes(media, question, condition)
            except Exception as error:  # the answer's record will say why
                failure_of(error)
                peaks[question.id] = None
            measured[condition.key] += 1
        dominances: dict[str, dict[Depth, ModalityIndices] | None] = {}
        if isinstance(self.engine, MeasuresDominance):
            for question in wanted:
                if question.id in self._looked_at:
                    dominances[question.id] = self._dominance(
                        self.engine, media, question, condition
                    )

        def done(question: Question, said: EngineAnswer) -> None:
            record = score(
                question, condition, said, self.settings.choose_by, self.settings.box_unit
            )
            record.peak_bytes = peaks.get(question.id)
            record.dominance = dominances.get(question.id)
            with self._lock:
                lost = record.correct is False and question.id in self._right_unpruned
                shown = lost and self._losses[condition.key] < LOSSES_SHOWN
                if said.kept is not None and (shown or self.settings.note_kept):
                    record.kept, record.grid = said.kept.tolist(), said.grid
                self._note(record)
                self._keep([record])
            if self.settings.strict and record.error is not None:
                raise EvaluationError(
                    f"{question.id}, {condition.key}: {_sentence(record.error)} Run without "
                    "--strict to record such questions and go on."
                )

        self.engine.answer(media, wanted, condition, done)

    def _dominance(
        self,
        engine: MeasuresDominance,
        media: Sequence[MediaQuestions],
        question: Question,
        condition: Condition,
    ) -> dict[Depth, ModalityIndices] | None:
        try:
            return engine.dominance(media, question, condition)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the answer's record will say why
            failure_of(error)
            return None

    def _note(self, record: Record) -> None:
        if record.condition == UNPRUNED and record.correct:
            self._right_unpruned.add(record.item)
        if record.kept is not None:
            self._losses[record.condition] += 1

    def _fail(self, asked: MediaQuestions) -> None:
        """Record an image or video that cannot be put to the model, under every condition."""
        error = asked.error or ""
        records = [
            Record(item=question.id, condition=one.key, error=error)
            for question in asked.questions
            for one in self.conditions
            if (one.key, question.id) not in self.store.done
        ]
        with self._lock:
            self._keep(records)
        if self.settings.strict:
            raise EvaluationError(
                f"{asked.questions[0].path}: {_sentence(error)} Run without --strict to record "
                "such files and go on."
            )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _chunks(
    reading: Iterator[MediaQuestions], at_once: dict[str, int]
) -> Iterator[list[MediaQuestions]]:
    """Yield images, or videos, a few at a time."""
    for kind, run_of_kind in groupby(reading, key=lambda one: one.questions[0].kind):
        chunk: list[MediaQuestions] = []
        for one in run_of_kind:
            chunk.append(one)
            if len(chunk) == at_once[kind]:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
