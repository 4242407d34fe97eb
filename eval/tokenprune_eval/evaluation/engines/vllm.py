"""The engine ``vllm``: `vllm.LLM` in this process, pruned by the plugin request by request.

One engine serves every condition: a request names its method and budget. vLLM encodes for each of
them anew, since what it caches is what was kept. A condition that resizes sends a smaller picture,
or says in its request how vLLM's processor is to make it smaller.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

import tokenprune_vllm
from tokenprune.errors import ConfigError, TokenPruneError, reason_of
from tokenprune.media.sizes import Content
from tokenprune.media.video import Video
from tokenprune.providers import model_path
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import Done, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.engines.letters import Letters
from tokenprune_eval.evaluation.engines.sizes import Sizes
from tokenprune_eval.evaluation.failures import EngineLostError, failure_of
from tokenprune_eval.evaluation.scoring import letters_of
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.records import Condition, Seconds
from tokenprune_hf.loading import frames_and_metadata, prompt_text
from tokenprune_hf.resized import Resized
from tokenprune_hf.resizing import Resizer
from tokenprune_vllm.engine import read_config
from tokenprune_vllm.settings import KEY


@dataclass(frozen=True)
class _Prepared:
    """Prompts about one image or video, and the data that goes along with each.

    Attributes
    ----------
    prompts
        One for each question.
    media
        What ``multi_modal_data`` is.
    sizes
        What it is at other sizes, where conditions ask for such.
    """

    prompts: list[str]
    media: dict[str, Any]
    sizes: Sizes[dict[str, Any]] | None = None

    def at(self, condition: Condition) -> dict[str, Any]:
        """Return the data at the size that a condition asks for."""
        if self.sizes is None or not condition.resizes:
            return self.media
        return self.sizes.at(condition) or self.media

    def resized(self, condition: Condition) -> Resized | None:
        """Return what is known of that size, None at full size."""
        if self.sizes is None or not condition.resizes:
            return None
        return self.sizes.resized(condition)


_Asked = tuple[Question, str, _Prepared]
"""A question, its prompt, and what it is about."""


class VllmEngine:
    """vLLM in this process; see `tokenprune_eval.evaluation.engines.base.Engine`.

    Parameters
    ----------
    settings
        Of the run; `engine_args` go to `vllm.LLM`.

    Raises
    ------
    TokenPruneError
        If the model or a method cannot be served pruned.
    ConfigError
        If vLLM cannot start with these arguments.
    """

    def __init__(self, settings: Settings) -> None:
        import vllm

        self.settings = settings
        self.media_at_once = {"image": max(1, settings.batch), "video": max(1, settings.batch // 4)}
        model = model_path(settings.model)
        options: dict[str, Any] = {
            "limit_mm_per_prompt": {"image": 1, "video": 1},
            "disable_log_stats": False,
            "seed": settings.seed,
            **settings.engine_args,
        }
        of_conditions = (one.pruned_by for one in settings.conditions())
        methods = list(dict.fromkeys(method for method in of_conditions if method is not None))
        # An exported checkpoint prunes by itself: there the unpruned condition has to be asked for.
        self._pruned = bool(methods) or KEY in read_config(model)
        if methods:
            arguments = tokenprune_vllm.engine_args(
                model,
                methods[0],
                # Every request names its own budget.
                0.5,
                positions=settings.positions,
                options=settings.options.get(methods[0], {}),
                scope=settings.scope,
                request_methods={name: settings.options.get(name, {}) for name in methods[1:]},
                **options,
            )
        else:
            arguments = {"model": model, **options}
        try:
            self._llm = vllm.LLM(**arguments)
        except TokenPruneError:
            raise
        except Exception as error:  # what keeps an engine from starting can be anything
            raise ConfigError(
                f"vLLM does not start with {model} ({type(error).__name__}: {reason_of(error)}). "
                "Its log above has the reason; --engine-arg NAME=VALUE changes its arguments."
            ) from error
        self._letters = Letters(
            self._llm.get_tokenizer(), required=settings.choose_by == "likelihood"
        )
        from transformers import AutoProcessor

        processors: Any = AutoProcessor
        self._processor = processors.from_pretrained(model)
        self._resizing = [one for one in settings.conditions() if one.resizes]
        self._resizer: Resizer | None = None
        if self._resizing:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(model)
            self._resizer = Resizer(config, self._processor, in_vllm=True)
        # InternVL's videos have a placeholder of their own here, which its config does not name.
        names = [
            getattr(self._processor, name)
            for name in ("image_token", "video_token")
            if hasattr(self._processor, name)
        ]
        self._placeholders = set(self._llm.get_tokenizer().convert_tokens_to_ids(names))

    def about(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        config = self._llm.llm_engine.vllm_config
        return {
            "architecture": config.model_config.architectures[0],
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "engine_args": self.settings.engine_args,
        }

    def prepare(self, asked: MediaQuestions) -> None:
        """Lay the prompts out."""
        content = asked.content
        if not isinstance(content, Image.Image | Video):
            raise TypeError(f"neither image nor video: {content!r}")
        media = _data(content)
        (kind,) = media
        prompts = [prompt_text(self._processor, text, kind) for text in asked.prompts]
        sizes = None
        if self._resizer is not None:
            sizes = Sizes(
                content, self._resizer, self._resizing, lambda resized: _data(resized.content)
            )
        asked.prepared = _Prepared(prompts, media, sizes)

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        """Check the letters; vLLM encodes as it answers.

        Raises
        ------
        ConfigError
            If likelihoods are counted and the model's letters are no tokens.
        """
        for one in media:
            for question in one.questions:
                self._letters.of(question)

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        """Hand over `Settings.batch` questions at a time."""
        ids = {question.id for question in wanted}
        questions: list[_Asked] = []
        for one in media:
            prepared: _Prepared = one.prepared
            reason = None
            if condition.resizes and prepared.sizes is not None:
                reason = prepared.sizes.reasons.get(condition.key)
            for question, prompt in zip(one.questions, prepared.prompts, strict=True):
                if question.id in ids and reason is not None:
                    done(question, EngineAnswer(error=reason))
                elif question.id in ids:
                    questions.append((question, prompt, prepared))
        for start in range(0, len(questions), self.settings.batch):
            self._answer_batch(questions[start : start + self.settings.batch], condition, done)

    def peak_bytes(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> int | None:
        """Return None: vLLM takes its memory beforehand."""
        return None

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def _answer_batch(
        self,
        questions: Sequence[_Asked],
        condition: Condition,
        done: Done,
    ) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        requests = [self._request(prompt, media, condition) for _, prompt, media in questions]
        sizes = [media.resized(condition) for _, _, media in questions]
        tokens = [self._letters.of(question) for question, _, _ in questions]
        try:
            outputs = self._llm.generate(
                requests, [self._sampling(own) for own in tokens], use_tqdm=False
            )
        except EngineDeadError as error:
            raise EngineLostError(
                f"vLLM has stopped ({error}). Its log above has the reason. The answers so far are "
                "on disk: run the same command to continue."
            ) from error
        except Exception as error:  # too long a prompt, a processor that refuses, …
            reason = failure_of(error)
            if len(questions) == 1:
                if sizes[0] is not None and sizes[0].arguments:
                    reason += (
                        " The request asked vLLM's processor for a smaller picture, which it may "
                        "not be able to make of this model's: run resize with --engine hf."
                    )
                done(questions[0][0], EngineAnswer(error=reason))
                return
            # One of them is the reason; the others have an answer.
            for alone in questions:
                self._answer_batch([alone], condition, done)
            return
        for (question, _, _), own, output, size in zip(
            questions, tokens, outputs, sizes, strict=True
        ):
            answer = _said(question, own, output, len(questions), self._placeholders)
            done(question, answer if size is None else _checked(answer, size, condition))

    def _request(self, prompt: str, media: _Prepared, condition: Condition) -> dict[str, Any]:
        request = {"prompt": prompt, "multi_modal_data": media.at(condition)}
        size = media.resized(condition)
        more: dict[str, Any] = {}
        if size is not None and size.arguments:
            more["images_kwargs"] = dict(size.arguments)
        if self._pruned:
            keep = condition.keep if size is None else size.keep
            asked: dict[str, Any] = {"method": condition.pruned_by, "keep": keep}
            if condition.pruned_by is None:
                asked = {"off": True}
            more[KEY] = asked
        return {**request, "mm_processor_kwargs": more} if more else request

    def _sampling(self, letters: Sequence[Sequence[int]]) -> Any:
        import vllm

        wanted = [token for tokens in letters for token in tokens]
        more: dict[str, Any] = {}
        if wanted:
            more = {"logprobs": len(wanted), "logprob_token_ids": wanted}
        return vllm.SamplingParams(temperature=0.0, max_tokens=self.settings.max_new_tokens, **more)


def _data(content: Content) -> dict[str, Any]:
    """Return ``multi_modal_data`` of an image or a video."""
    if isinstance(content, Image.Image):
        return {"image": content}
    frames, metadata = frames_and_metadata(content)
    # vLLM's own key: these are the frames, none are to be drawn from them.
    return {"video": (frames, {**metadata, "do_sample_frames": False})}


def _checked(answer: EngineAnswer, size: Resized, condition: Condition) -> EngineAnswer:
    """Return an answer about a resized medium, an error where vLLM has made it another size."""
    if condition.pruned_by is None and answer.visual_tokens != size.placeholders:
        return EngineAnswer(
            error=f"vLLM made {answer.visual_tokens} visual tokens of a resized picture that "
            f"transformers makes {size.placeholders} of: its processor takes no other sizes. Leave "
            "resize out, or run it with --engine hf."
        )
    return answer


def _said(
    question: Question,
    letters: Sequence[Sequence[int]],
    output: Any,
    batch: int,
    placeholders: set[int],
) -> EngineAnswer:
    (answer,) = output.outputs
    stats = output.metrics
    likelihoods = None
    if letters:
        first = answer.logprobs[0]
        likelihoods = {
            letter: _logsumexp([first[token].logprob for token in tokens])
            for letter, tokens in zip(letters_of(question), letters, strict=True)
        }
    seconds = Seconds()
    if stats is not None:
        decode = stats.last_token_ts - stats.first_token_ts
        seconds = Seconds(
            decode=decode,
            first_token=stats.first_token_latency,
            total=stats.first_token_latency + decode,
        )
    return EngineAnswer(
        text=answer.text.strip(),
        cut=answer.finish_reason == "length",
        likelihoods=likelihoods,
        visual_tokens=sum(token in placeholders for token in output.prompt_token_ids),
        prompt_tokens=len(output.prompt_token_ids),
        answer_tokens=len(answer.token_ids),
        batch=batch,
        seconds=seconds,
    )


def _logsumexp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))
