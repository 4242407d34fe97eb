"""The run: the preset through the evaluation, and what the demo adds to it, set by set."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenprune_hf
from tokenprune.errors import ConfigError, InputFileError
from tokenprune.media.images import load_image
from tokenprune.selectors.base import Selector
from tokenprune_eval.data.question import Question
from tokenprune_eval.demo.costs import Cost, measure
from tokenprune_eval.demo.evidence import COVERED, Oracle, evidence_mask
from tokenprune_eval.demo.preset import (
    ORACLE,
    TIMED,
    DemoSet,
    Preset,
    choosers,
    image_size,
    oracle_condition,
)
from tokenprune_eval.demo.results import Results, Row, kept, make_row, said
from tokenprune_eval.evaluation.checks import check_before_model
from tokenprune_eval.evaluation.engines.base import Engine
from tokenprune_eval.evaluation.engines.transformers import TransformersEngine
from tokenprune_eval.evaluation.runner import Planned, answer_all
from tokenprune_eval.evaluation.store import Store
from tokenprune_eval.results.files import ITEMS, RECORDS, RUN, read_run
from tokenprune_eval.results.records import UNPRUNED, Condition, Record
from tokenprune_eval.shared.asking import answer, laid_out
from tokenprune_eval.shared.machine import cores, processor, versions
from tokenprune_eval.shared.progress import RunProgress

RESULTS, REPORT = "results.json", "report.html"
EXAMPLE_KEEP = 0.125
INTERVALS = (
    "95 % Wilson intervals of the number of independent questions that those asked are worth: "
    "questions about one image tend to be right or wrong together"
)
EXAMPLES = {True: 9, False: 3}
"""How many questions are shown of a set with evidence, and of one without."""

PLAIN_CHECKS = 8
"""Questions of each set that the model also answers without anything of tokenprune."""

_PRESET = "demo"
"""Under this name a run's ``run.json`` has what was asked of the demo."""

Records = Mapping[str, Sequence[Record]]
"""Of one set: key of a condition -> a record for each question, in order."""


@dataclass(frozen=True)
class Panel:
    """What one method kept for one question, and what the model then said.

    Attributes
    ----------
    method
        Its name; ``"unpruned"`` and ``"oracle"`` as in `Row`.
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


def run(
    preset: Preset,
    out: Path,
    progress: RunProgress,
    finished: Callable[[DemoSet, Results], None],
) -> tuple[Results, list[Example]]:
    """Run everything; ``results.json`` is written as sets finish.

    A run that was interrupted continues in its folder; a finished one is begun anew.

    Parameters
    ----------
    preset
        What to run.
    out
        A folder that can be written to.
    progress
        Is told how far the run is.
    finished
        Is given each question set as soon as all of its rows are in the results.

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
    ConfigError
        If the folder holds another evaluation.
    OutputError
        If the results cannot be written.
    """
    started = time.perf_counter()
    settings = preset.settings(out)
    settings.check_methods()
    sets = {one.name: one for one in preset.sets()}
    check_before_model(settings, [one.data for one in sets.values()])
    for one in sets.values():
        progress.say(_asked(preset, one))
    plan = preset.plan(list(sets.values()))
    conditions = list({each.key: each for one in plan for each in one.conditions}.values())
    results = Results(out / RESULTS, {})
    examples: list[Example] = []
    timed = Timed(TIMED)

    def answered(planned: Planned, engine: Engine) -> None:
        if not isinstance(engine, TransformersEngine):
            raise TypeError(f"the demo runs transformers, not {type(engine).__name__}")
        of_set = _AnsweredSet(preset, sets[planned.data.name], engine, timed, out)
        progress.at(f"{of_set.name}: timing on {TIMED}, methods taking turns")
        results.about = results.about or _about(preset, list(sets.values()), engine, timed)
        rows, others = of_set.rows()
        results.rows += rows
        results.other_positions += others
        progress.at(f"{of_set.name}: comparing with the plain model")
        results.about["same_as_plain_model"][of_set.name] = of_set.compare_with_plain()
        results.save()
        examples.extend(of_set.examples())
        finished(sets[of_set.name], results)

    with _one_core_each(), Store(out) as store:
        _begin(out, preset)
        known = answer_all(
            store,
            settings,
            plan,
            progress,
            lambda: TransformersEngine(settings, conditions, choosers(plan)),
            answered,
            about={_PRESET: asdict(preset)},
        )
        results.about["seconds"] = round(time.perf_counter() - started, 1)
        results.complete = True
        results.save()
        store.write_about({**known.about, "seconds": results.about["seconds"], "complete": True})
    return results, examples


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Give each thread of torch one core: batches are shared out, and no core waits for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _asked(preset: Preset, asked: DemoSet) -> str:
    """Say how much of a set is asked."""
    return (
        f"{asked.name}: {len(asked.data.questions):,} of {asked.of_questions:,} questions, about "
        f"{len(asked.images):,} of {asked.of_images:,} images "
        + ("(all)" if preset.questions is None else f"(drawn with seed {preset.seed})")
    )


def _begin(out: Path, preset: Preset) -> None:
    """Take what an earlier run of the demo left out of its folder, unless it can be continued.

    Raises
    ------
    ConfigError
        If the folder holds an evaluation that is not the demo's.
    """
    if not (out / RUN).is_file():
        return
    try:
        before = read_run(out).about
    except InputFileError:
        before = {_PRESET: None}
    if _PRESET not in before:
        raise ConfigError(
            f"{out} holds a run of `tokenprune eval`, and the demo would overwrite it. Give "
            "another folder with --out."
        )
    # As JSON has it: with lists for tuples.
    same = before[_PRESET] == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(preset).items()
    }
    if same and not before.get("complete") and before.get("versions") == versions():
        return
    for name in (RUN, RECORDS, ITEMS, RESULTS, REPORT):
        (out / name).unlink(missing_ok=True)


class Timed:
    """The model that is timed, loaded when it is first asked for.

    Parameters
    ----------
    name
        A name that `tokenprune_hf.load` takes.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and processor."""
        return tokenprune_hf.load(self.name)

    def inputs(self, question: Question) -> dict[str, Any]:
        """Return a question as its processor lays it out."""
        return laid_out(*self.loaded, question.question, load_image(question.path))

    def about(self) -> dict[str, Any]:
        """Return what the results say of it."""
        model, _ = self.loaded
        return {"name": self.name, "parameters": sum(one.numel() for one in model.parameters())}


class _AnsweredSet:
    """One question set, answered under every condition.

    Parameters
    ----------
    preset
        What is run.
    asked
        The set.
    engine
        What answered, with nothing to do.
    timed
        What is timed.
    out
        The run's folder, which has the answers.
    """

    def __init__(
        self,
        preset: Preset,
        asked: DemoSet,
        engine: TransformersEngine,
        timed: Timed,
        out: Path,
    ) -> None:
        self.preset = preset
        self.name = asked.name
        self.questions = asked.data.questions
        self.engine = engine
        self.timed = timed
        self._asked = asked
        ids = [f"{self.name}/{question.id}" for question in self.questions]
        found = {(one.condition, one.item): one for one in read_run(out).records}
        self.records: Records = {
            condition.key: [found[condition.key, id_] for id_ in ids]
            for condition in preset.conditions(asked)
        }
        _, rows, columns = self.records[UNPRUNED][0].grid or (1, 1, 1)
        self.grid = (rows, columns)
        self.evidence = self._evidence() if asked.has_evidence else None

    def _evidence(self) -> Tensor:
        """Return BoolTensor [Q, N]."""
        return torch.stack(
            [
                evidence_mask(question.evidence, image_size(question.path), self.grid)
                for question in self.questions
            ]
        )

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Return the main rows, and those with the other way to count positions."""
        costs = self._costs()
        unpruned = replace(self._row(Condition(method=UNPRUNED, keep=1.0), costs), unpruned=True)
        others = self.preset.others(self._asked)
        pruned = [
            condition
            for condition in self.preset.conditions(self._asked)[1:]
            if condition not in others
        ]
        main = [
            unpruned,
            *(replace(unpruned, method=method) for method in self.preset.methods),
            *(self._row(condition, costs) for condition in pruned),
        ]
        return main, [self._row(condition, costs) for condition in others]

    def _row(self, condition: Condition, costs: Mapping[tuple[str, int | float], Cost]) -> Row:
        positions = self.preset.positions if condition.method == UNPRUNED else condition.positions
        row = make_row(
            self.name,
            condition.method,
            positions,
            self.questions,
            self.records[condition.key],
            self.evidence,
            costs[condition.method, condition.keep],
        )
        return row if condition.method == ORACLE else replace(row, keep=float(condition.keep))

    def _costs(self) -> dict[tuple[str, int | float], Cost]:
        """Measure every condition on one question: its evidence is of a typical size."""
        typical = 0
        keys = [(UNPRUNED, 1.0), *((one.method, one.keep) for one in self.preset.budgets())]
        conditions: list[tuple[str | Selector, int | float]] = [("uniform", 1.0), *keys[1:]]
        if self.evidence is not None:
            counts = self.evidence.sum(dim=1).double()
            typical = int((counts - counts.mean()).abs().argmin())
            places = self.evidence[typical].nonzero()[:, 0]
            oracle = oracle_condition(self.preset.positions)
            keys.append((ORACLE, oracle.keep))
            conditions.append((Oracle(places[None]), len(places)))
        model, _ = self.timed.loaded
        inputs = self.timed.inputs(self.questions[typical])
        costs = measure(model, inputs, self.engine.needs, conditions, self.preset.rounds)
        return dict(zip(keys, costs, strict=True))

    def _inputs(self, question: Question) -> dict[str, Any]:
        image = load_image(question.path)
        return dict(tokenprune_hf.ask(self.engine.processor, question.question, image=image))

    def compare_with_plain(self) -> dict[str, int]:
        """Return of how many answers the unpruned model's are what it says without tokenprune."""
        count = min(PLAIN_CHECKS, len(self.questions))
        numbers = random.Random(self.preset.seed).sample(range(len(self.questions)), count)
        same = 0
        for number in numbers:
            with torch.inference_mode():
                plain = answer(
                    self.engine.model,
                    self.engine.processor,
                    self._inputs(self.questions[number]),
                    max_new_tokens=self.engine.settings.max_new_tokens,
                )
            same += plain.lower() == said(self.records[UNPRUNED][number])
        return {"questions": count, "same": same}

    def examples(self) -> list[Example]:
        """Return the questions to show, with what was kept for each."""
        conditions = {
            one.method: one.key
            for one in self.preset.conditions(self._asked)
            if (one.method in (UNPRUNED, ORACLE) or one.keep == EXAMPLE_KEEP)
            and one not in self.preset.others(self._asked)
        }
        return [
            Example(
                self.name,
                self.questions[number],
                self.grid,
                tuple(
                    Panel(method, said(self.records[key][number]), kept(self.records[key][number]))
                    for method, key in conditions.items()
                ),
            )
            for number in self._shown()
        ]

    def _shown(self) -> list[int]:
        """Draw the questions to show: types take turns, and so do images."""
        questions = self.questions
        order = random.Random(self.preset.seed + 1).sample(range(len(questions)), len(questions))
        wanted = EXAMPLES[self.evidence is not None]
        chosen: list[int] = []
        seen: set[Path] = set()
        while order and len(chosen) < wanted:
            if seen.issuperset(questions[number].path for number in order):
                seen.clear()
            types: set[str] = set()
            for number in list(order):
                question = questions[number]
                if question.type not in types and question.path not in seen:
                    types.add(question.type)
                    seen.add(question.path)
                    chosen.append(number)
                    order.remove(number)
        return chosen[:wanted]


def _about(
    preset: Preset, sets: Sequence[DemoSet], engine: TransformersEngine, timed: Timed
) -> dict[str, Any]:
    """Return everything a reader needs to run the same again."""
    packages = ("tokenprune-vlm", "torch", "transformers", "numpy", "pillow", "statsmodels")
    about = engine.about()
    return {
        "run": preset.name,
        "settings": {
            "methods": list(preset.methods),
            "keep": [1.0, *preset.keeps],
            "positions": preset.positions,
            "questions": "all" if preset.questions is None else preset.questions,
            "seed": preset.seed,
            "example_keep": EXAMPLE_KEEP,
            "random": "another draw for every image",
            "intervals": INTERVALS,
            "evidence": f"cells of the image covered by a box to at least {100 * COVERED:.0f} %",
        },
        "model": {
            "name": "the bundled model, no public VLM",
            **{name: about[name] for name in ("architecture", "parameters", "dtype")},
        },
        "timed": timed.about(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "machine": {
            "processor": processor(),
            "cores": cores(),
            "threads": engine.settings.workers,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "subsets": {
            one.name: {
                "questions": len(one.data.questions),
                "of_questions": one.of_questions,
                "images": len(one.images),
                "of_images": one.of_images,
                "ids": [question.id for question in one.data.questions],
            }
            for one in sets
        },
        "same_as_plain_model": {},
        "seconds": None,
    }
