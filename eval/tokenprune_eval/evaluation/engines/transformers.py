"""The engine ``hf``: a model of transformers, pruned by `tokenprune_hf`.

Every image and video is encoded once, whatever the number of questions and conditions, and once
more at each other size that a condition resizes it to. Questions
are answered in batches, and batches may be shared out among copies of the model, each on one core:
a small model gains nothing from several cores for one product.

With a cache folder, what the encoder made is kept in files and read by later runs. Images and
videos are decoded and preprocessed all the same, since the prompt's layout depends on it. So that
any later method finds what it needs, all that selectors may look at is gathered then.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import torch
from torch import Tensor

import tokenprune_hf
from tokenprune.budget import Keep
from tokenprune.config import Positions
from tokenprune.errors import (
    ConfigError,
    PromptError,
    TokenPruneError,
    UnsupportedModelError,
    reason_of,
)
from tokenprune.inside.base import InsideMethod, reads_text
from tokenprune.scope import Scope
from tokenprune.selection import Selection
from tokenprune.selectors.base import Picks, Selector
from tokenprune.tokens import TokenBatch, VisualTokens
from tokenprune_eval.data.question import Question
from tokenprune_eval.dominance import depth_layers, measure_dominance
from tokenprune_eval.evaluation.engines.base import Done, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.engines.letters import Letters
from tokenprune_eval.evaluation.engines.peak_memory import peak_bytes
from tokenprune_eval.evaluation.engines.sizes import Sizes
from tokenprune_eval.evaluation.failures import failure_of
from tokenprune_eval.evaluation.scoring import letters_of
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.records import Condition, Depth, ModalityIndices, Seconds
from tokenprune_eval.shared.asking import (
    GREEDY,
    batched,
    laid_out,
    on_device,
    padding_of,
    without_pixels,
)
from tokenprune_eval.shared.left_out import free_memory
from tokenprune_eval.shared.output import OutputError
from tokenprune_eval.shared.timing import moment
from tokenprune_hf.any_model import check_method, vision_model_of_any_type
from tokenprune_hf.crops import check_scope_of
from tokenprune_hf.encoded_file import (
    encoded_key,
    encoder_fingerprint,
    encoding_seconds,
    load_encoded,
    save_encoded,
)
from tokenprune_hf.encoder_inputs import EncoderInputs
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.engine import cache_of
from tokenprune_hf.loading import load
from tokenprune_hf.proportional import ProportionalAttention
from tokenprune_hf.resized import Resized
from tokenprune_hf.resizing import Resizer
from tokenprune_hf.vision import USUAL

_LONG = 512
"""Tokens of a prompt from which on padding costs more than it saves."""

ChooseTokens = Callable[[Question, int, VisualTokens], Selection]
"""Chooses the tokens of a question's image or video of that number by what no method may know."""

_Budgets = dict[str, tuple[list[Selection], float]]
"""Of one method, by budget: the selections, and how many seconds they took."""


@dataclass(frozen=True)
class _Pruning:
    """How a condition prunes, see `tokenprune_hf.prune`."""

    selector: Selector | InsideMethod
    keep: Keep
    positions: Positions
    proportional_attention: bool
    scope: Scope = "item"


@dataclass(frozen=True)
class _Given(Selector):
    """Stands where `ChooseTokens` has chosen beforehand, and chooses nothing itself."""

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = "what was chosen beforehand (no method)"
    needs: ClassVar[tuple[str, ...]] = ()
    # Questions about one image may have been given different tokens of it.
    of_place: ClassVar[bool] = True

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        """Raise: nothing is left to choose."""
        raise RuntimeError("tokens are chosen before the question is asked")


@dataclass
class _EncodedMedium:
    """One image or video, encoded, and the prompts about it.

    Attributes
    ----------
    prompts
        What the processor made of each question, pixels taken out of all but the first.
    encoded
        What the encoder made of the pixels; None until `begin`.
    encode_seconds
        How long that took; where it is read from the cache, how long it took then.
    file
        Where it is in the cache, or will be; None without a cache.
    chosen
        What was selected, by method and question ("" for methods that do not read it).
    resized
        Its size, where it is smaller than it was.
    smaller
        The same at the sizes that conditions ask for, where any does.
    """

    prompts: list[dict[str, Any]]
    encoded: Encoded | None = None
    encode_seconds: float = 0.0
    file: Path | None = None
    chosen: dict[tuple[Selector | InsideMethod, str], _Budgets] = field(default_factory=dict)
    resized: Resized | None = None
    smaller: Sizes[_EncodedMedium] | None = None

    def reason(self, condition: Condition) -> str | None:
        """Return why it cannot be had as a condition wants it; None where it can."""
        if not condition.resizes or self.smaller is None:
            return None
        return self.smaller.reasons.get(condition.key)

    def at(self, condition: Condition) -> _EncodedMedium:
        """Return it at the size that a condition asks for."""
        if not condition.resizes or self.smaller is None:
            return self
        return self.smaller.at(condition) or self

    def keep(self, condition: Condition) -> Keep:
        """Return what a condition keeps of each of its items at that size."""
        if not condition.resizes or self.smaller is None:
            return condition.keep
        return self.smaller.resized(condition).keep

    def known(self) -> Encoded:
        """Return what was encoded."""
        if self.encoded is None:
            raise RuntimeError("begin comes before answer")
        return self.encoded


@dataclass(frozen=True)
class _AskedQuestion:
    """A question of a batch.

    Attributes
    ----------
    question, prompt, prepared
        The question, what the processor made of it, and what it is about.
    keep
        What stays of each item.
    choose
        What chooses its tokens in place of a method, if anything.
    """

    question: Question
    prompt: dict[str, Any]
    prepared: _EncodedMedium
    keep: Keep
    choose: ChooseTokens | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.prompt["input_ids"].shape[1])

    @property
    def items(self) -> int:
        """Images, videos or crops that are pruned."""
        return sum(len(one.items) for one in self.prepared.known().modalities.values())

    @cached_property
    def given(self) -> list[Selection] | None:
        """The tokens that `choose` chose, of each item; None without it."""
        if self.choose is None:
            return None
        (modality,) = self.prepared.known().modalities.values()
        return [
            self.choose(self.question, number, item.tokens)
            for number, item in zip(range(len(self.question.paths)), modality.items, strict=True)
        ]


class TransformersEngine:
    """A model of transformers; see `tokenprune_eval.evaluation.engines.base.Engine`.

    Parameters
    ----------
    settings
        Of the run.
    conditions
        What it may be asked under; by default those of the settings.
    choose
        Key of a condition -> what chooses its tokens. Such a condition's method and budget are
        names for people alone.

    Raises
    ------
    InputFileError, UnsupportedModelError
        If the model cannot be loaded, or a method cannot serve it or dominance not be measured,
        or its attention cannot be proportional.
    ConfigError
        If dominance is to be measured on answers of one token.
    OutputError
        If nothing can be written into the cache's folder.
    """

    def __init__(
        self,
        settings: Settings,
        conditions: Sequence[Condition] | None = None,
        choose: Mapping[str, ChooseTokens] | None = None,
    ) -> None:
        self.settings = settings
        self._choose = dict(choose or {})
        # All conditions are asked about these before the next are begun. One model is given no more
        # than a batch of them, so that at batch 1 conditions are timed in turn, whatever else the
        # machine does meanwhile. Several copies need enough to share, and share their time anyway.
        images = settings.batch if settings.workers == 1 else max(16, settings.batch)
        self.media_at_once = {"image": images, "video": max(1, settings.batch // 4)}
        self.model, self.processor = load(settings.model)
        conditions = conditions or settings.conditions()
        self._resizing = [one for one in conditions if one.resizes]
        self._resizer = Resizer(self.model, self.processor)
        self._prunings = {
            one.key: _Pruning(
                _Given() if one.key in self._choose else settings.pruning(one).built(),
                one.keep,
                one.positions,
                one.proportional_attention,
                # What was chosen beforehand was so in each item.
                "item" if one.key in self._choose else settings.pruning(one).scope,
            )
            for one in conditions
        }
        self.needs = sorted(
            {need for one in self._prunings.values() for need in one.selector.gathers}
        )
        for pruning in self._prunings.values():
            check_method(pruning.selector, self.model)
            check_scope_of(vision_model_of_any_type(self.model), pruning.scope)
        if any(pruning.proportional_attention for pruning in self._prunings.values()):
            check_proportional_attention(self.model)
        if settings.dominance:
            check_dominance(self.model, settings.max_new_tokens)
        if settings.cache is not None:
            _check_cache(settings.cache)
            self.needs = sorted({*self.needs, *_all_needs(self.model)})
            encoder_fingerprint(self.model)  # takes a moment, so not while others wait for it
        self._letters = Letters(
            self.processor.tokenizer, required=settings.choose_by == "likelihood"
        )
        self._threads = torch.get_num_threads()
        if settings.workers > 1:
            torch.set_num_threads(1)
        copies = (copy.deepcopy(self.model) for _ in range(settings.workers - 1))
        self._pool = ThreadPoolExecutor(settings.workers)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for model in (self.model, *copies):
            self._free.put(model)

    def about(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        return {
            "architecture": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attention": self.model.config._attn_implementation,
        }

    def prepare(self, asked: MediaQuestions) -> None:
        """Have the processor lay out every question, at every size."""
        texts, content = asked.prompts, asked.content
        full = self._medium(texts, content)
        if self._resizing and content is not None:
            if isinstance(content, list):
                raise PromptError(
                    "resize makes one picture smaller, and the question is about several. Leave "
                    "resize out, or these questions."
                )
            make = partial(self._medium, texts)
            full.smaller = Sizes(content, self._resizer, self._resizing, make)
        asked.prepared = full

    def _medium(self, texts: Sequence[str], content: Any) -> _EncodedMedium:
        """Return one size of an image or video as the processor lays it out."""
        prompts: list[dict[str, Any]] = []
        for text in texts:
            prompt = laid_out(self.model, self.processor, text, content)
            prompts.append(without_pixels(prompt) if prompts else prompt)
        medium = _EncodedMedium(prompts, resized=content if isinstance(content, Resized) else None)
        if self.settings.cache is not None:
            name = f"{encoded_key(self.model, self.needs, prompts[0])}.safetensors"
            medium.file = self.settings.cache / name
        return medium

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        """Encode every image and video, or read what an earlier run made of it.

        What cannot be encoded has `MediaQuestions.error` set.

        Raises
        ------
        ConfigError
            If likelihoods are counted and the model's letters are no tokens.
        InputFileError
            If a file of the cache is damaged.
        OutputError
            If none can be written.
        """
        for one in media:
            for question in one.questions:
                self._letters.of(question)

        def encode(one: MediaQuestions, model: Any) -> None:
            one.error = self._encoded(one.prepared, model)

        self._share_out([partial(encode, one) for one in media])

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        """Answer in batches of prompts of about one length, at least one for each worker."""
        ids = {question.id for question in wanted}
        for one in media:
            if one.error is not None:
                for question in one.questions:
                    if question.id in ids:
                        done(question, EngineAnswer(error=one.error))
        choose = self._choose.get(condition.key)
        able = [one for one in media if one.error is None and ids & {q.id for q in one.questions}]
        if condition.resizes:
            self._share_out([partial(self._begin_size, one.prepared, condition) for one in able])
        questions = []
        for one in able:
            reason = one.prepared.reason(condition)
            medium = one.prepared if reason else one.prepared.at(condition)
            for question, prompt in zip(one.questions, medium.prompts, strict=True):
                if question.id in ids and reason is not None:
                    done(question, EngineAnswer(error=reason))
                elif question.id in ids:
                    keep = one.prepared.keep(condition)
                    questions.append(_AskedQuestion(question, prompt, medium, keep, choose))
        pruning = self._prunings[condition.key]
        self._share_out(
            [
                partial(self._answer_batch, batch, pruning, done)
                for batch in self._batches(questions)
            ]
        )
        if condition.resizes:
            for one in able:
                one.prepared.smaller.free(condition)

    def _batches(self, questions: Sequence[_AskedQuestion]) -> list[list[_AskedQuestion]]:
        """Cut questions into batches, at least one for each worker.

        Short prompts of about one length go together, padded. Long ones only with others of the
        same length: with padding the engine computes the attention of all pairs, and without it
        only that to earlier tokens. All of a batch keep as many tokens, or the same share.
        """
        size = min(self.settings.batch, -(-len(questions) // self.settings.workers))
        groups: dict[tuple[int, int, str], list[_AskedQuestion]] = {}
        for one in sorted(questions, key=lambda one: one.length):
            kept = 0 if one.given is None else sum(map(len, one.given))
            length = one.length if one.length >= _LONG else 0
            groups.setdefault((length, kept, repr(one.keep)), []).append(one)
        return [
            group[start : start + size]
            for group in groups.values()
            for start in range(0, len(group), size)
        ]

    def peak_bytes(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> int | None:
        """Return the most bytes held beyond the weights and the encoded image or video."""
        prompt, encoded, pruning = self._alone(media, question, condition)

        def call() -> None:
            with torch.inference_mode():
                self.model(**prompt, encoded=encoded, logits_to_keep=1)

        with _pruned(self.model, pruning):
            if self.model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                return torch.cuda.max_memory_allocated() - before
            return peak_bytes(call)

    def dominance(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> dict[Depth, ModalityIndices] | None:
        """Measure modality dominance while the model answers the question alone once more.

        Raises
        ------
        UnsupportedModelError
            If the model's cache does not keep all keys.
        """
        try:
            prompt, encoded, pruning = self._alone(media, question, condition)
            with (
                torch.inference_mode(),
                _pruned(self.model, pruning),
                measure_dominance(self.model) as measured,
            ):
                self.model.generate(
                    **prompt,
                    encoded=encoded,
                    max_new_tokens=self.settings.max_new_tokens,
                    **GREEDY,
                )
        except UnsupportedModelError:
            raise
        except TokenPruneError:
            return None  # the record says why, for answering it fails alike
        try:
            result = measured.result
        except PromptError:
            return None  # no token of the answer was read again
        found: dict[Depth, ModalityIndices] = {}
        for part in depth_layers(result.depth):
            mean = result.mean(part)
            found[part] = ModalityIndices.of(mean.mdi, mean.aei_text, mean.aei_visual)
        return found

    def close(self) -> None:
        """Free the threads and give torch its cores back."""
        self._pool.shutdown()
        torch.set_num_threads(self._threads)

    def _share_out(self, tasks: Sequence[Callable[[Any], None]]) -> None:
        """Do all tasks, each with a model of its own."""

        def work(task: Callable[[Any], None]) -> None:
            model = self._free.get()
            try:
                task(model)
            finally:
                self._free.put(model)

        futures = [self._pool.submit(work, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _begin_size(self, prepared: _EncodedMedium, condition: Condition, model: Any) -> None:
        """Encode an image or video at the size of a condition, unless that was done before."""
        sizes = prepared.smaller
        if not condition.resizes or sizes is None or condition.key in sizes.reasons:
            return
        medium = sizes.at(condition)
        if medium is not None and medium.encoded is None:
            reason = self._encoded(medium, model) or _miscounted(medium)
            if reason is not None:
                sizes.fail(condition, reason)

    def _encoded(self, prepared: _EncodedMedium, model: Any) -> str | None:
        """Encode an image or video, or read it from the cache; return why that cannot be done."""
        if prepared.file is not None and prepared.file.is_file():
            prepared.encoded = load_encoded(prepared.file, model)
            prepared.encode_seconds = encoding_seconds(prepared.file)
        else:
            reason = None
            try:
                self._encode(prepared, model)
            except Exception as error:  # an encoder may raise anything on odd pixels
                reason = failure_of(error)
            if reason is not None:
                free_memory()
                return reason
        prepared.prompts[0] = without_pixels(prepared.prompts[0])
        return None

    def _encode(self, prepared: _EncodedMedium, model: Any) -> None:
        """Run the encoder, and keep what it made where there is a cache."""
        started = time.perf_counter()
        first = on_device(self.model, prepared.prompts[0])
        with torch.inference_mode():
            prepared.encoded = tokenprune_hf.encode(model, needs=self.needs, **first)
        prepared.encode_seconds = moment(self.model.device) - started
        if prepared.file is None:
            return
        try:
            save_encoded(prepared.file, prepared.encoded, model, seconds=prepared.encode_seconds)
        except OSError as error:
            raise OutputError(
                f"{prepared.file} cannot be written: {reason_of(error)}. Make room, give "
                "another folder with --cache, or leave it out."
            ) from None

    def _alone(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> tuple[dict[str, Any], Encoded, _Pruning]:
        """Return one question's prompt, its encoded image or video, and how that is pruned."""
        one = next(one for one in media if question in one.questions)
        prepared: _EncodedMedium = one.prepared
        self._begin_size(prepared, condition, self.model)
        if reason := prepared.reason(condition):
            raise PromptError(reason)
        medium = prepared.at(condition)
        prompt = medium.prompts[one.questions.index(question)]
        inputs = on_device(self.model, prompt)
        pruning = replace(self._prunings[condition.key], keep=prepared.keep(condition))
        return inputs, medium.known(), pruning

    def _answer_batch(
        self, questions: Sequence[_AskedQuestion], pruning: _Pruning, done: Done, model: Any
    ) -> None:
        said: list[EngineAnswer] = []
        reason = ""
        try:
            said = self.ask(questions, pruning, model)
        except Exception as error:  # a model may raise anything on an odd prompt
            reason = failure_of(error)
        if said:
            for question, one in zip(questions, said, strict=True):
                done(question.question, one)
            return
        free_memory()
        if len(questions) == 1:
            done(questions[0].question, EngineAnswer(error=reason))
            return
        # One of them is the reason, or all together need too much memory.
        for question in questions:
            self._answer_batch([question], pruning, done, model)

    def ask(
        self, questions: Sequence[_AskedQuestion], pruning: _Pruning, model: Any
    ) -> list[EngineAnswer]:
        """Return what a model says to a batch of questions."""
        prompts = batched([one.prompt for one in questions], padding_of(self.processor))
        inputs = on_device(self.model, prompts)
        first = _FirstToken([self._letters.of(one.question) for one in questions])
        given = questions[0].given
        # All of a batch keep the same.
        keep = questions[0].keep if given is None or len(given) > 1 else len(given[0])
        pruning = replace(pruning, keep=keep)
        memory = _SelectionMemory(questions, pruning)
        started = time.perf_counter()
        with torch.inference_mode(), _pruned(model, pruning) as running:
            output = model.generate(
                **inputs,
                encoded=tokenprune_hf.join([one.prepared.known() for one in questions]),
                known=memory.known(),
                max_new_tokens=self.settings.max_new_tokens,
                logits_processor=[first],
                return_dict_in_generate=True,
                **GREEDY,
            )
            selecting, selections = running.selecting_seconds, iter(running.selections)
        ended = time.perf_counter()
        prefill = (first.at - started - selecting) / len(questions)
        decode = (ended - first.at) / len(questions)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        answers = []
        for row, one in enumerate(questions):
            of_question = list(islice(selections, one.items))
            answer_tokens, has_ended = self._answer_tokens(new[row])
            answers.append(
                EngineAnswer(
                    text=str(texts[row]).strip(),
                    cut=not has_ended and answer_tokens >= self.settings.max_new_tokens,
                    likelihoods=first.likelihoods(row, letters_of(one.question)),
                    answer_tokens=answer_tokens,
                    batch=len(questions),
                    seconds=_seconds(
                        encode=one.prepared.encode_seconds,
                        select=memory.note(row, of_question, selecting),
                        prefill=prefill,
                        decode=decode,
                    ),
                    **_tokens(
                        of_question,
                        int(inputs["attention_mask"][row].sum()),
                        output,
                        pruning.selector,
                        one.prepared.resized,
                    ),
                )
            )
        return answers

    def _answer_tokens(self, new: Tensor) -> tuple[int, bool]:
        """Return how many tokens were generated, and whether the end is among them."""
        ends = self.model.generation_config.eos_token_id
        known = torch.tensor([] if ends is None else ends, device=new.device, dtype=new.dtype)
        at = torch.isin(new, known.flatten()).nonzero()
        return (int(at[0]) + 1, True) if len(at) else (len(new), False)


def check_proportional_attention(model: Any) -> None:
    """Raise UnsupportedModelError where a model's attention cannot be proportional."""
    ProportionalAttention(model).remove()


def check_dominance(model: Any, max_new_tokens: int) -> None:
    """Raise where modality dominance cannot be measured."""
    if max_new_tokens < 2:
        raise ConfigError(
            f"dominance is measured from an answer's first token on, once it is read, and "
            f"max_new_tokens={max_new_tokens} ends the answer before. Give --max-new-tokens 2 or "
            "more, or leave out --dominance."
        )
    measure_dominance(model)  # raises for a model whose attention cannot be read


def _check_cache(folder: Path) -> None:
    """Make the folder if need be, and make sure that files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"nothing can be written to {folder}: {reason_of(error)}. Give another folder "
            "with --cache, or leave it out."
        ) from None


def _all_needs(model: Any) -> set[str]:
    """Return what the encoder can give to selectors, on this model."""
    vision = vision_model_of_any_type(model)
    try:
        vision.scoring_layer(EncoderInputs("image"))
    except UnsupportedModelError:
        return {*USUAL} - {"cls_attention"}
    return {*USUAL}


class _FirstToken:
    """A logits processor that changes nothing: it notes when the first token's logits came.

    Attributes
    ----------
    at
        That moment, by `time.perf_counter`.
    """

    def __init__(self, tokens: Sequence[Sequence[Sequence[int]]]) -> None:
        self._tokens = tokens
        self._letters: list[list[float]] = []
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.at:
            self.at = moment(scores.device)
            for row, tokens in enumerate(self._tokens):
                if not tokens:
                    self._letters.append([])
                    continue
                known = scores[row].float().log_softmax(dim=-1)
                self._letters.append([float(known[list(own)].logsumexp(0)) for own in tokens])
        return scores

    def likelihoods(self, row: int, letters: str) -> dict[str, float] | None:
        """Return letter -> log-probability of one prompt; None where it has no choices."""
        known = self._letters[row]
        return dict(zip(letters, known, strict=True)) if known else None


class _SelectionMemory:
    """What was chosen before for the questions of a batch, so that it is not chosen again.

    Questions about one image or video share what a method chose that does not read them. A method
    that reads them chooses for each, and then scores of another budget save reading it again.

    Parameters
    ----------
    questions
        Of the batch. Their `_EncodedMedium.chosen` is read, and filled in by `note`.
    pruning
        Of the batch.
    """

    def __init__(self, questions: Sequence[_AskedQuestion], pruning: _Pruning) -> None:
        selector = pruning.selector
        reads = reads_text(selector)
        self._questions = questions
        self._budget = repr(pruning.keep)
        self._by_budget = [
            one.prepared.chosen.setdefault((selector, one.question.id if reads else ""), {})
            if one.given is None
            else {self._budget: (one.given, 0.0)}
            for one in questions
        ]
        # Of any budget only where the scores are dear: elsewhere choosing takes next to nothing.
        # What is chosen inside the language model is chosen again: it runs in any case.
        self._earlier = [
            None
            if isinstance(selector, InsideMethod)
            else of.get(self._budget) or (next(iter(of.values()), None) if reads else None)
            for of in self._by_budget
        ]
        # Questions that share a dictionary share the time, too.
        self._choosing = len({id(of) for of in self._by_budget if self._budget not in of})

    def known(self) -> list[Selection | None]:
        """Return the earlier selection of every image or video of the batch, or None."""
        return [
            selection
            for one, earlier in zip(self._questions, self._earlier, strict=True)
            for selection in (earlier[0] if earlier else [None] * one.items)
        ]

    def note(self, row: int, selections: list[Selection], seconds: float) -> float:
        """Remember a question's selections, and return the seconds that choosing them took.

        Parameters
        ----------
        row
            Of the question in its batch.
        selections
            Of its images or videos.
        seconds
            That the whole batch spent on choosing.
        """
        of = self._by_budget[row]
        if self._budget not in of:
            earlier = self._earlier[row]
            spent = 0.0 if earlier is None else earlier[1]
            of[self._budget] = selections, spent + seconds / self._choosing
        return of[self._budget][1]


def _pruned(model: Any, pruning: _Pruning) -> tokenprune_hf.Pruning:
    return tokenprune_hf.prune(
        model,
        pruning.selector,
        pruning.keep,
        pruning.positions,
        proportional_attention=pruning.proportional_attention,
        scope=pruning.scope,
    )


def _seconds(*, encode: float, select: float, prefill: float, decode: float) -> Seconds:
    """Return a question's seconds with their sums."""
    first_token = encode + select + prefill
    return Seconds(
        encode=encode,
        select=select,
        prefill=prefill,
        decode=decode,
        first_token=first_token,
        total=first_token + decode,
    )


def _miscounted(medium: _EncodedMedium) -> str | None:
    """Return what is wrong where a resized medium is encoded as other tokens than laid out."""
    (modality,) = medium.known().modalities.values()
    made = sum(item.tokens.total for item in modality.items)
    if medium.resized is None or made == medium.resized.tokens:
        return None
    return (
        f"the encoder made {made} visual tokens of a resized picture that was laid out as "
        f"{medium.resized.tokens}: this model cannot be compared with resize. Leave it out."
    )


def _tokens(
    selections: Sequence[Selection],
    prompt_tokens: int,
    output: Any,
    method: Selector | InsideMethod,
    resized: Resized | None,
) -> dict[str, Any]:
    """Return the fields of an `EngineAnswer` that count tokens.

    Parameters
    ----------
    selections
        Of the question's images or videos.
    prompt_tokens
        Of its prompt before anything was dropped.
    output
        What ``generate`` returned.
    method
        What chose.
    resized
        Its size, where its image or video was made smaller.
    """
    cache = cache_of(output)
    before = sum(one.total for one in selections)
    depth = len(cache.layers)
    after = [sum(len(one) for one in selections)] * depth
    if isinstance(method, InsideMethod):
        of_items = [method.tokens_by_layer(depth, one.total, len(one)) for one in selections]
        after = [sum(of_layer) for of_layer in zip(*of_items, strict=True)]
    read = [prompt_tokens - before + of_layer for of_layer in after]
    only = selections[0] if len(selections) == 1 else None
    return {
        # Of layers that read different numbers the mean: that is what they cost.
        "visual_tokens": round(sum(after) / depth),
        "of_visual_tokens": before if resized is None else resized.of_tokens,
        "prompt_tokens": round(sum(read) / depth),
        "mass_kept": _mass_kept(selections),
        "kv_bytes": _cache_bytes(cache, read),
        "kept": None if only is None else only.kept.cpu().numpy(),
        "grid": None if only is None or not only.is_picture else only.grid,
    }


def _mass_kept(selections: Sequence[Selection]) -> float | None:
    """Return the share of all scores on the tokens that were kept, if scores have one sign."""
    kept = whole = 0.0
    for selection in selections:
        scores = selection.scores
        if scores is None or bool((scores < 0).any()):
            return None
        kept += float(scores[selection.kept].double().sum())
        whole += float(scores.double().sum())
    return kept / whole if whole > 0 else None


def _cache_bytes(cache: Any, prompt_tokens: Sequence[int]) -> int:
    """Return the bytes of keys and values that one prompt takes in the cache.

    Parameters
    ----------
    cache
        What ``generate`` filled.
    prompt_tokens
        Tokens of the prompt that each layer read.
    """
    total = 0.0
    for layer, tokens in zip(cache.layers, prompt_tokens, strict=True):
        keys = getattr(layer, "keys", None)
        if keys is None:  # it keeps a state, which is as large for every prompt
            continue
        batch, _, positions, _ = keys.shape
        held = keys.nbytes + layer.values.nbytes
        total += held / batch / positions * min(positions, tokens)
    return round(total)
