"""The run: every question under every condition, each answer on disk as soon as it is there."""

from __future__ import annotations

import datetime
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from tokenprune.errors import ConfigError, TokenPruneError, UnsupportedModelError
from tokenprune.providers import BUNDLED
from tokenprune_eval.data.item import DataSet, Item
from tokenprune_eval.data.load import choose, load_data
from tokenprune_eval.evaluation.checks import check_before_model
from tokenprune_eval.evaluation.engines.base import Asked, Engine, MeasuresDominance, Said
from tokenprune_eval.evaluation.failures import alike, failure_of
from tokenprune_eval.evaluation.reading import by_media, read_ahead
from tokenprune_eval.evaluation.scoring import prompt_of, score
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Depth, ModalityIndices, Record
from tokenprune_eval.results.summary import ItemInfo, Results, summarise
from tokenprune_eval.shared.machine import cores, processor

LOSSES_SHOWN = 20
"""Lost questions of each data set and condition whose kept tokens are noted, for the report."""

_PACKAGES = ("tokenprune-vlm", "torch", "transformers", "vllm", "openai", "numpy", "av", "decord")


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
        found.append(choose(whole, settings.limit, settings.seed, settings.shard))
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
    infos = [ItemInfo.of(one.name, item) for one in sets for item in one.items]
    sets = [
        replace(one, items=[replace(item, id=f"{one.name}/{item.id}") for item in one.items])
        for one in sets
    ]
    started = time.perf_counter()
    with Store(settings.out) as store:
        known = store.begin(
            settings,
            {
                "data": [{"name": one.name, "of": one.drawn_from} for one in sets],
                "bundled": settings.model == BUNDLED,
                "versions": _versions(),
                "machine": _machine(),
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": None,
                "complete": False,
            },
            infos,
            conditions,
        )
        wanted = {(one.key, info.id) for one in conditions for info in infos}
        progress.plan(len(wanted), len(wanted & store.done))
        if wanted - store.done:
            progress.at("loading the model")
            engine = build_engine(settings)
            try:
                known.about["model"] = engine.about()
                store.write_about(known.about)
                work = _Run(settings, engine, store, progress, known.records)
                for data_set in sets:
                    work.run(data_set)
                work.finish()
            finally:
                engine.close()
        progress.at("working out the results")
        known.about["seconds"] = round(time.perf_counter() - started, 1)
        everything = {(one.key, info.id) for one in known.conditions for info in known.items}
        known.about["complete"] = everything <= store.done
        store.write_about(known.about)
        results = results_of(settings.out)
        write_results(settings.out, results)
    return results


def results_of(folder: Path) -> Results:
    """Return what the records of a run's folder come to.

    Raises
    ------
    InputFileError
        If it is no such folder, or damaged.
    """
    known = read_run(folder)
    return summarise(known.about, known.items, known.conditions, known.records)


class _Run:
    """The run of one data set after the other through one engine.

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
        self.conditions = settings.conditions()
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

    def run(self, data_set: DataSet) -> None:
        """Answer what is not answered yet of one data set."""
        groups = [
            [item for item in group if self._pending(item)] for group in by_media(data_set.items)
        ]
        self._losses.clear()
        # By name and not by count: a run that goes on looks at the same ones.
        self._looked_at = {item.id for item in data_set.items[: self.settings.dominance]}
        measured: Counter[str] = Counter()
        reading = read_ahead(
            [group for group in groups if group],
            self.settings,
            partial(prompt_of, instruction=self.settings.instruction),
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

    def _check_systematic(self, chunk: Sequence[Asked]) -> None:
        """End the run if the first images or videos all failed alike, whatever the condition.

        Files that cannot be read are left to `finish`: each has a reason of its own.
        """
        if self._answered or self._answers_before:
            return
        for one in chunk:
            reason = self._reasons.get(one.items[0].id)
            if reason is not None and not one.unread:
                self._failing[alike(reason)] += 1
        if any(count >= GIVE_UP for count in self._failing.values()):
            raise self._none_answered(
                f"no question about the first {sum(self._failing.values())} images or videos"
            )

    def _none_answered(self, which: str) -> EvaluationError:
        item, reason = next(iter(self._reasons.items()))
        return EvaluationError(
            f"{which} could be answered, for example {item}: {_sentence(reason)} Nothing of it is "
            "recorded. Correct the settings, the data or the server, and run the same command "
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

    def _pending(self, item: Item) -> bool:
        return any((one.key, item.id) not in self.store.done for one in self.conditions)

    def _answer(
        self, media: Sequence[Asked], condition: Condition, measured: Counter[str], name: str
    ) -> None:
        wanted = [
            item
            for one in media
            for item in one.items
            if (condition.key, item.id) not in self.store.done
        ]
        if not wanted:
            return
        self.progress.at(f"{name}: {condition.key}")
        peaks: dict[str, int | None] = {}
        while measured[condition.key] < self.settings.memory and len(peaks) < len(wanted):
            item = wanted[len(peaks)]
            try:
                peaks[item.id] = self.engine.peak_bytes(media, item, condition)
            except Exception as error:  # the answer's record will say why
                failure_of(error)
                peaks[item.id] = None
            measured[condition.key] += 1
        dominances: dict[str, dict[Depth, ModalityIndices] | None] = {}
        if isinstance(self.engine, MeasuresDominance):
            for item in wanted:
                if item.id in self._looked_at:
                    dominances[item.id] = self._dominance(self.engine, media, item, condition)

        def done(item: Item, said: Said) -> None:
            record = score(item, condition, said, self.settings.choose_by)
            record.peak_bytes = peaks.get(item.id)
            record.dominance = dominances.get(item.id)
            with self._lock:
                lost = record.correct is False and item.id in self._right_unpruned
                if lost and said.kept is not None and self._losses[condition.key] < LOSSES_SHOWN:
                    record.kept, record.grid = said.kept.tolist(), said.grid
                self._note(record)
                self._keep([record])
            if self.settings.strict and record.error is not None:
                raise EvaluationError(
                    f"{item.id}, {condition.key}: {_sentence(record.error)} Run without --strict "
                    "to record such questions and go on."
                )

        self.engine.answer(media, wanted, condition, done)

    def _dominance(
        self, engine: MeasuresDominance, media: Sequence[Asked], item: Item, condition: Condition
    ) -> dict[Depth, ModalityIndices] | None:
        try:
            return engine.dominance(media, item, condition)
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

    def _fail(self, asked: Asked) -> None:
        """Record an image or video that cannot be put to the model, under every condition."""
        error = asked.error or ""
        records = [
            Record(item=item.id, condition=one.key, error=error)
            for item in asked.items
            for one in self.conditions
            if (one.key, item.id) not in self.store.done
        ]
        with self._lock:
            self._keep(records)
        if self.settings.strict:
            raise EvaluationError(
                f"{asked.items[0].path}: {_sentence(error)} Run without --strict to record such "
                "files and go on."
            )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _chunks(reading: Iterator[Asked], at_once: dict[str, int]) -> Iterator[list[Asked]]:
    """Yield images, or videos, a few at a time."""
    for kind, run_of_kind in groupby(reading, key=lambda one: one.items[0].kind):
        chunk: list[Asked] = []
        for one in run_of_kind:
            chunk.append(one)
            if len(chunk) == at_once[kind]:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(),
        "cores": cores(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }
