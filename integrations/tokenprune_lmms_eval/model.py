"""`PrunedModel`: the class that lmms-eval makes of ``--model tokenprune_hf``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from lmms_eval.protocol import ChatMessages
from loguru import logger

import tokenprune_hf
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune_hf.loading import load
from tokenprune_lmms_eval.arguments import read_arguments
from tokenprune_lmms_eval.generation import Generation, StopAtText, cut, read_generation
from tokenprune_lmms_eval.prompt import Message, lay_out


class UnsupportedTaskError(TokenPruneError, NotImplementedError):
    """The task asks a model for something other than an answer in one turn."""


class PrunedModel(lmms):
    """A pruned model of transformers behind lmms-eval's chat interface, one question at a time.

    Attributes
    ----------
    arguments
        What was asked for.
    model, processor
        As `tokenprune_hf` loads them.
    pruning
        The model's `tokenprune_hf.Pruning`.

    Parameters
    ----------
    **values
        What stands in ``--model_args``, see `read_arguments`.

    Raises
    ------
    TokenPruneError
        If an argument is wrong, or the model cannot be loaded or pruned that way.
    """

    is_simple = False

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.arguments = arguments = read_arguments(values)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "tokenprune_hf runs in one process, and this one was started as one of several. "
                "Start lmms-eval by itself; --offset and --limit cut a task into parts."
            )
        self.model, self.processor = load(arguments.pretrained)
        if arguments.device is not None:
            try:
                self.model.to(arguments.device)
            except (RuntimeError, AssertionError) as error:  # torch raises both
                reason = str(error).partition("\n")[0]
                raise ConfigError(
                    f"the model cannot run on device={arguments.device} ({reason}). Leave --device "
                    "out to have the GPU where there is one."
                ) from None
        config = arguments.pruning
        self.pruning = tokenprune_hf.apply(
            self.model,
            config.method,
            config.keep,
            config.positions,
            scope=config.scope,
            **config.options,
        )
        self._told: set[str] = set()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return one answer a request, in their order.

        Raises
        ------
        TokenPruneError
            If a request cannot be asked, see `lay_out` and `read_generation`.
        """
        results: list[GenerationResult] = []
        seconds = 0.0
        tokens = visual = of_visual = 0
        progress = make_progress(len(requests), "Model Responding")
        for request in requests:
            _, doc_to_messages, values, doc_id, task, split = request.args
            try:
                chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
                generation = self._generation(values)
                start = time.perf_counter()
                text, length = self._answer(chat.model_dump()["messages"], generation)
            except Exception as error:
                error.add_note(f"This was the task {task}, document {doc_id} of {split}.")
                raise
            seconds += time.perf_counter() - start
            tokens += length
            visual += sum(len(one) for one in self.pruning.selections)
            of_visual += sum(one.total for one in self.pruning.selections)
            results.append(GenerationResult(text, TokenCounts(output_tokens=length)))
            progress.update(1)
        progress.close()
        count = max(1, len(requests))
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds > 0 else 0.0,
            additional_metrics={
                "total_requests": len(requests),
                "visual_tokens": visual / count,
                "of_visual_tokens": of_visual / count,
            },
        )
        return results

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Raise: lmms-eval asks models with the chat interface for generated answers alone."""
        raise UnsupportedTaskError(
            "tokenprune_hf answers by generating, and this task compares likelihoods. Choose a "
            "task of the output_type generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Raise: there is one question and one answer."""
        raise UnsupportedTaskError(
            "tokenprune_hf answers in one turn, and this task has several. Choose a task of the "
            "output_type generate_until."
        )

    def clean(self) -> None:
        """Let the model go, as lmms-eval wants it once all answers are there."""
        self.pruning.remove()
        del self.pruning
        super().clean()

    def _generation(self, values: dict[str, Any]) -> Generation:
        generation = read_generation(values)
        for name in set(generation.unused) - self._told:
            logger.warning(f"generation_kwargs: {name}={values[name]!r} has no effect here.")
        self._told.update(generation.unused)
        return generation

    def _answer(self, messages: Sequence[Message], generation: Generation) -> tuple[str, int]:
        """Return an answer and how many tokens were generated for it."""
        inputs = lay_out(self.processor, messages, self.arguments).to(self.model.device)
        arguments = dict(generation.arguments)
        if generation.until:
            arguments["stopping_criteria"] = [
                StopAtText(self.processor.tokenizer, generation.until)
            ]
        output = self.model.generate(**inputs, **arguments)
        new = output[0, inputs["input_ids"].shape[1] :]
        text: str = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        return cut(text, generation.until), len(new)
