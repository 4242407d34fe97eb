"""The parts of a request, run in turn on a real model and timed.

Encoding, selecting, and the language model at each length are timed apart, as the engine `hf` of
`tokenprune eval` times them: `generate` on a pruned prompt, with the moment of each token noted.
The tokens of each budget are chosen beforehand there, so that prefill and decoding are those of the
length alone. Whatever slows the machine down meets all parts, for they take turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

import tokenprune_hf
from tokenprune.errors import ConfigError, TokenPruneError, UnsupportedModelError
from tokenprune.registry import build
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune_eval.advise.costs import Budget, Chosen, Parts, Read, Smaller
from tokenprune_eval.advise.request import Media
from tokenprune_eval.shared.asking import (
    GREEDY,
    batched,
    laid_out,
    on_device,
    padding_of,
    selected,
    without_pixels,
)
from tokenprune_eval.shared.left_out import free_memory
from tokenprune_eval.shared.timing import Clock, StepTimes, moment, seconds
from tokenprune_hf.any_model import check_method, vision_model_of_any_type
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.resizing import Resizer
from tokenprune_hf.vision import ENCODED

MOST_TURNS = 15
"""Turns after which more would change no median worth telling."""

_FEWEST_TURNS = 3
"""Turns from which on quartiles say something."""

_STEPS = 4
"""Decoding steps of which the median is taken, in each run."""

LEAST = 1
"""The budget of the limit: one token of each item."""

FULL = 1.0

_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Times:
    """What one run of the language model took, for all requests of the batch together.

    Attributes
    ----------
    prefill
        Seconds until the first answer token.
    step
        Median seconds of a further one; 0 where none was wanted.
    """

    prefill: float
    step: float


@dataclass
class Asked:
    """A batch of equal requests, laid out and encoded.

    Attributes
    ----------
    model
        The model.
    prompt
        One request as the processor makes it, pixels included, on the model's device.
    batch
        How many there are.
    padding
        The token that prompts are filled up with.
    encoded
        What the encoder made of one, with all that any method looks at.
    """

    model: Any
    prompt: dict[str, Any]
    batch: int
    padding: int
    encoded: Encoded

    @classmethod
    def of(
        cls,
        model: Any,
        processor: Any,
        question: str,
        content: Any,
        batch: int,
        needs: Sequence[str],
    ) -> Asked:
        """Lay a request out and encode it; see `laid_out`."""
        prompt = on_device(model, laid_out(model, processor, question, content))
        encoded = _encoded(model, prompt, needs)
        return cls(model, prompt, batch, padding_of(processor), encoded)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All requests of the batch, without pixels."""
        return batched([without_pixels(self.prompt)] * self.batch, self.padding)

    @cached_property
    def together(self) -> Encoded:
        """What the encoder made of all of them."""
        return tokenprune_hf.join([self.encoded] * self.batch)

    @property
    def visual(self) -> int:
        """Visual tokens of one request."""
        return sum(
            item.tokens.total for one in self.encoded.modalities.values() for item in one.items
        )

    @property
    def length(self) -> int:
        """Tokens of one request's prompt."""
        return int(self.prompt["input_ids"].shape[1])


@dataclass
class Reading:
    """The language model on the prompts of one budget.

    Attributes
    ----------
    asked
        The requests.
    keep
        The budget of each item.
    new_tokens
        Of an answer.
    clock
        What times are taken with.
    known
        What is kept of each item, once it was chosen.
    """

    asked: Asked
    keep: Budget
    new_tokens: int
    clock: Clock = time.perf_counter
    known: list[Selection] | None = None

    def run(self) -> Times:
        """Generate some tokens, and return how long they took."""
        model, steps = self.asked.model, StepTimes(self.clock)
        wanted = 1 if self.new_tokens == 1 else 1 + _STEPS
        with torch.inference_mode(), tokenprune_hf.prune(model, "uniform", self.keep) as pruning:
            started = moment(model.device, self.clock)
            model.generate(
                **self.asked.inputs,
                encoded=self.asked.together,
                known=self.known,
                # An end token would end the run early.
                min_new_tokens=wanted,
                max_new_tokens=wanted,
                logits_processor=[steps],
                **GREEDY,
            )
            selecting = pruning.selecting_seconds
            self.known = list(pruning.selections)
        between = [later - sooner for sooner, later in zip(steps.at, steps.at[1:], strict=False)]
        return Times(
            prefill=steps.at[0] - started - selecting,
            step=statistics.median(between) if between else 0.0,
        )

    def read(self, times: Sequence[Times]) -> Read:
        """Return the medians of several runs, for each request."""
        if self.known is None:
            raise RuntimeError("run comes before read")
        batch = self.asked.batch
        kept = sum(map(len, self.known)) / batch
        return Read(
            visual=kept,
            prompt=self.asked.length - self.asked.visual + kept,
            prefill=statistics.median(one.prefill for one in times) / batch,
            step=statistics.median(one.step for one in times) / batch,
        )


@dataclass(frozen=True)
class Measured:
    """What was measured, and how often.

    Attributes
    ----------
    parts
        The medians.
    prepare
        Seconds of the processor for one request.
    turns
        How often each part was run, the turn that warmed up not counted.
    warmed_up
        Whether there was such a turn; False where the first one took all the time there was.
    left_out
        What could not be measured, and why.
    runs
        Name of each part -> its seconds, turn by turn, for the whole batch.
    """

    parts: Parts
    prepare: float
    turns: int
    warmed_up: bool
    left_out: list[str]
    runs: dict[str, list[float]]


def in_turn(
    parts: Mapping[_Key, Callable[[], _Found]],
    until: float,
    clock: Clock = time.perf_counter,
    most: int = MOST_TURNS,
    on_part: Callable[[], None] = lambda: None,
    needed: Collection[_Key] | None = None,
) -> tuple[dict[_Key, list[_Found]], bool]:
    """Run all parts, turn by turn; the first turn warms up and does not count.

    Parameters
    ----------
    parts
        What is run, by name.
    until
        A time of `clock`. No turn begins that would end after it, judged by the one before. Where
        the first turn leaves no time for another, it is what counts; parts that it would only come
        to later are left out.
    clock
        What the time is told by.
    most
        Turns that count, at most.
    on_part
        Called after each part.
    needed
        Parts that are run whatever time it is; None for all.

    Returns
    -------
    tuple
        What each part that was run returned, turn by turn; and whether a turn warmed up.
    """
    found: dict[_Key, list[_Found]] = {}
    for turn in range(most + 1):
        started = clock()
        made: dict[_Key, _Found] = {}
        for name, run in parts.items():
            if turn and name not in found:
                continue
            if not turn and needed is not None and name not in needed and clock() > until:
                continue
            made[name] = run()
            on_part()
        if turn <= 1:
            found = {name: [one] for name, one in made.items()}
        else:
            for name, one in made.items():
                found[name].append(one)
        ended = clock()
        if ended + (ended - started) > until:
            return found, turn > 0
    return found, True


def measure(
    model: Any,
    processor: Any,
    media: Media,
    question: str,
    selectors: Mapping[str, Selector],
    keeps: Sequence[Budget],
    *,
    new_tokens: int = 64,
    batch: int = 1,
    resize: bool = True,
    required: bool = True,
    limit: float = 60.0,
    turns: int = MOST_TURNS,
    clock: Clock = time.perf_counter,
    on_part: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure where the time of a request goes, unpruned and under each method and budget.

    Parameters
    ----------
    model, processor
        As `tokenprune_hf.loading.load` returns them; the model is not pruned, and stays so.
    media, question
        What is asked.
    selectors
        Name of a method -> the method.
    keeps
        Budgets of each item, besides all tokens.
    new_tokens
        Of an answer.
    batch
        Equal requests that the language model reads together; each is encoded alone.
    resize
        Whether pictures made smaller to the budgets are measured, too.
    required
        Whether each method was asked for by name: one that cannot choose of this request is then an
        error, and else is left out.
    limit
        Seconds after which no further turn begins, and of the first one no further part but those
        that the limit of pruning is told by.
    turns
        Turns at most, the one that warms up not counted.
    clock
        What times are taken with.
    on_part
        Called after each run of a part.

    Raises
    ------
    ConfigError
        If the requests do not fit into memory.
    TokenPruneError
        If the model cannot be pruned, or not by a required method.
    """
    until = clock() + limit
    try:
        asked, able, left_out = _able(
            model, processor, media, question, selectors, keeps[0], batch, required
        )
        return _measure(
            *(asked, processor, media, question, able, keeps, left_out),
            new_tokens=new_tokens,
            resize=resize,
            until=until,
            turns=turns,
            clock=clock,
            on_part=on_part,
        )
    except torch.OutOfMemoryError:
        pass
    free_memory()
    raise ConfigError(
        f"{media.name} in a batch of {batch} does not fit into this device's memory. Give a "
        "smaller --image, fewer --images or --frames, or a smaller --batch."
    )


def _able(
    model: Any,
    processor: Any,
    media: Media,
    question: str,
    selectors: Mapping[str, Selector],
    keep: Budget,
    batch: int,
    required: bool,
) -> tuple[Asked, dict[str, Selector], list[str]]:
    """Return the requests, the methods that choose of them, and why others do not.

    Raises
    ------
    TokenPruneError
        If a required one does not.
    """
    check_method(build("uniform", {}), model)
    able: dict[str, Selector] = {}
    left_out = []

    def leave_out(name: str, error: TokenPruneError) -> None:
        if required:
            raise error
        left_out.append(f"{name} is left out: {error}")

    for name, selector in selectors.items():
        try:
            check_method(selector, model)
        except TokenPruneError as error:
            leave_out(name, error)
        else:
            able[name] = selector
    every = sorted({need for one in able.values() for need in one.gathers})
    asked = Asked.of(model, processor, question, media.content, batch, every)
    vision = vision_model_of_any_type(model)
    for name, selector in list(able.items()):
        try:
            # Some models show only when it reads them that a method cannot.
            _select(vision, asked.inputs, asked.together, selector, keep)
        except TokenPruneError as error:
            leave_out(name, error)
            del able[name]
    return asked, able, left_out


def _measure(
    asked: Asked,
    processor: Any,
    media: Media,
    question: str,
    selectors: Mapping[str, Selector],
    keeps: Sequence[Budget],
    left_out: list[str],
    *,
    new_tokens: int,
    resize: bool,
    until: float,
    turns: int,
    clock: Clock,
    on_part: Callable[[], None],
) -> Measured:
    """Do what `measure` says with methods that are known to choose of the requests."""
    model, batch = asked.model, asked.batch
    device = model.device
    reading = {keep: Reading(asked, keep, new_tokens, clock) for keep in keeps}
    full, least = (Reading(asked, keep, new_tokens, clock) for keep in (FULL, LEAST))
    gathered = {name: _from_encoder(one) for name, one in selectors.items()}
    smaller = {}
    if resize:
        smaller = _smaller(model, processor, media, question, keeps, batch, left_out)
    small_reading = {keep: Reading(one, FULL, new_tokens, clock) for keep, one in smaller.items()}

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        return partial(seconds, run, device, clock)

    # Seconds of a part, and of the language model; both kinds take turns.
    runs: dict[tuple[object, ...], Callable[[], float | Times]] = {
        ("prepare",): partial(
            seconds, lambda: laid_out(model, processor, question, media.content), clock=clock
        )
    }
    # What the limit is told by comes first: of the rest, what there is time for.
    runs["encode", ()] = timed(partial(_encoded, model, asked.prompt, ()))
    runs["read", "full"] = full.run
    runs["read", "least"] = least.run
    needed = list(runs)
    for needs in gathered.values():
        runs["encode", needs] = timed(partial(_encoded, model, asked.prompt, needs))
    vision, inputs, together = vision_model_of_any_type(model), asked.inputs, asked.together
    for keep in keeps:
        runs["read", keep] = reading[keep].run
        for name, selector in selectors.items():
            run = partial(_select, vision, inputs, together, selector, keep)
            runs["select", name, keep] = timed(run)
    for keep, small in smaller.items():
        runs["encode", "resize", keep] = timed(partial(_encoded, model, small.prompt, ()))
        runs["read", "resize", keep] = small_reading[keep].run
    found, warmed_up = in_turn(runs, until, clock, turns, on_part, needed)
    if missed := len(runs) - len(found):
        left_out.append(
            f"The time was over before {missed} of {len(runs)} parts were run, and their rows are "
            "left out. Give more --seconds, fewer --keep or --method, or a smaller request."
        )

    def middle(*name: object) -> float:
        return statistics.median(_seconds_of(found[name]))

    def times(*name: object) -> list[Times]:
        return [one for one in found[name] if isinstance(one, Times)]

    parts = Parts(
        encode=middle("encode", ()),
        full=full.read(times("read", "full")),
        least=least.read(times("read", "least")),
        budgets={
            keep: reading[keep].read(times("read", keep))
            for keep in keeps
            if ("read", keep) in found
        },
        chosen=[
            Chosen(
                name,
                keep,
                encode=middle("encode", gathered[name]),
                select=middle("select", name, keep) / batch,
            )
            for name in selectors
            for keep in keeps
            if {("encode", gathered[name]), ("select", name, keep), ("read", keep)} <= set(found)
        ],
        smaller=[
            Smaller(
                keep,
                encode=middle("encode", "resize", keep),
                read=small_reading[keep].read(times("read", "resize", keep)),
            )
            for keep in smaller
            if ("read", "resize", keep) in found
        ],
        new_tokens=new_tokens,
        noise=_noise(
            [
                [
                    encode + (one.prefill + (new_tokens - 1) * one.step) / batch
                    for encode, one in zip(_seconds_of(found["encode", ()]), of, strict=True)
                ]
                for of in (
                    times("read", "full"),
                    times("read", "least"),
                    *(times("read", keep) for keep in keeps if ("read", keep) in found),
                )
            ]
        ),
    )
    return Measured(
        parts=parts,
        prepare=middle("prepare"),
        turns=len(found["prepare",]),
        warmed_up=warmed_up,
        left_out=left_out,
        runs=_named(found),
    )


def _encoded(model: Any, prompt: Mapping[str, Any], needs: Sequence[str]) -> Encoded:
    """Encode one request's images or video, gathering what is needed."""
    with torch.inference_mode():
        return tokenprune_hf.encode(model, needs=needs, **prompt)


def _from_encoder(selector: Selector) -> tuple[str, ...]:
    """Return what the encoder gathers for a method."""
    return tuple(sorted(set(selector.gathers) & set(ENCODED)))


def _select(
    vision: Any, inputs: Mapping[str, Any], together: Encoded, selector: Selector, keep: Budget
) -> None:
    with torch.inference_mode():
        selected(vision, inputs, together, selector, keep)


def _smaller(
    model: Any,
    processor: Any,
    media: Media,
    question: str,
    keeps: Sequence[Budget],
    batch: int,
    left_out: list[str],
) -> dict[Budget, Asked]:
    """Return the requests whose picture is made smaller, by budget; reasons go to `left_out`."""
    if media.single is None:
        left_out.append("resize is left out: it makes one picture smaller, and there are several.")
        return {}
    resizer = Resizer(model, processor)
    found: dict[Budget, Asked] = {}
    for keep in keeps:
        try:
            resized = resizer(media.single, keep)
            if resized.is_full:
                raise UnsupportedModelError("no smaller picture makes fewer tokens.")
            found[keep] = Asked.of(model, processor, question, resized, batch, ())
        except TokenPruneError as error:
            left_out.append(f"resize is left out at keep {keep}: {error}")
    return found


def _seconds_of(values: Sequence[float | Times]) -> list[float]:
    return [value for value in values if isinstance(value, float)]


def _noise(totals: Sequence[Sequence[float]]) -> float | None:
    """Return how far a median may be off, over the median of the first: of the most restless.

    Medians differ where they lie further apart than 1.57 times the distance between the quartiles
    over the root of the number of turns (McGill, Tukey and Larsen, "Variations of box plots", The
    American Statistician 32, 1978).

    Parameters
    ----------
    totals
        Seconds of a request at each length, turn by turn; the unpruned one comes first.

    Returns
    -------
    float or None
        None of fewer than three turns.
    """
    if len(totals[0]) < _FEWEST_TURNS:
        return None
    quartiles = [statistics.quantiles(of, n=4, method="inclusive") for of in totals]
    distance = max(high - low for low, _, high in quartiles)
    return 1.57 * distance / math.sqrt(len(totals[0])) / quartiles[0][1]


def _named(found: Mapping[tuple[object, ...], Sequence[float | Times]]) -> dict[str, list[float]]:
    """Return every part's runs under a name for a file."""
    named: dict[str, list[float]] = {}
    for key, values in found.items():
        # What was gathered is a tuple of names.
        words = [" ".join(part) if isinstance(part, tuple) else str(part) for part in key]
        name = " ".join(word for word in words if word)
        if any(isinstance(value, Times) for value in values):
            language = [value for value in values if isinstance(value, Times)]
            named[f"{name} prefill"] = [one.prefill for one in language]
            named[f"{name} step"] = [one.step for one in language]
        else:
            named[name] = _seconds_of(values)
    return named
