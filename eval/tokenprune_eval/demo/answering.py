"""The model at work: images are encoded once, questions answered in batches, pruned or not.

Batches are shared out among a few threads, each with one core and a copy of the model: a model
this small gains nothing from several cores for one product. Which questions make a batch does not
depend on the number of threads, so neither do the answers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenprune_hf
from tokenprune.budget import Keep
from tokenprune.config import Positions
from tokenprune.selectors.base import Selector
from tokenprune_eval.bundled.questions import Question
from tokenprune_hf.images import load_image

IMAGES_AT_ONCE = 32
QUESTIONS_AT_ONCE = 64
MAX_NEW_TOKENS = 6
"""Answers are one word; the longest of both sets is one token and the end."""


@dataclass(frozen=True)
class Chunk:
    """Some images, encoded, and the questions about them.

    Attributes
    ----------
    encoded
        The images.
    numbers
        Positions of the questions in their set.
    image_of
        For each of these questions, its image's position in `encoded`.
    """

    encoded: tokenprune_hf.Encoded
    numbers: list[int]
    image_of: list[int]


@dataclass(frozen=True)
class Answers:
    """What the model said and what it saw, for all questions of a set.

    Attributes
    ----------
    texts
        One answer a question.
    kept
        BoolTensor [Q, N], the visual tokens that were kept.
    """

    texts: list[str]
    kept: Tensor


class Answerer:
    """A loaded model and its processor.

    Attributes
    ----------
    model, processor
        As transformers made them.
    models
        The model and its copies, one for each thread.
    grid
        Rows and columns of an image's visual tokens; known after `encode`.

    Parameters
    ----------
    checkpoint
        The folder of the model and its processor.
    threads
        How many batches are at work at a time, at least 1.
    """

    def __init__(self, checkpoint: Path, threads: int = 1) -> None:
        import transformers

        hf: Any = transformers  # much of it is not typed
        hf.utils.logging.disable_progress_bar()
        self.model: Any = hf.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        self.processor: Any = hf.AutoProcessor.from_pretrained(checkpoint)
        self.models = [self.model, *(copy.deepcopy(self.model) for _ in range(threads - 1))]
        self.grid = (0, 0)
        self._prompts: dict[str, list[int]] = {}
        self._blank: Any = None

    def encode(
        self,
        questions: Sequence[Question],
        needs: Sequence[str],
        advance: Callable[[int], None],
    ) -> list[Chunk]:
        """Encode every image once.

        Parameters
        ----------
        questions
            Grouped by image.
        needs
            What the methods look at, see `tokenprune_hf.encode`.
        advance
            Told how many images were done since it was last called.

        Returns
        -------
        list of Chunk
            All questions, a few images at a time.

        Raises
        ------
        InputFileError
            If an image cannot be read.
        """
        by_image: dict[Path, list[int]] = {}
        for number, question in enumerate(questions):
            by_image.setdefault(question.image, []).append(number)
        images = list(by_image)
        parts = [
            images[start : start + IMAGES_AT_ONCE]
            for start in range(0, len(images), IMAGES_AT_ONCE)
        ]
        encoded: dict[int, tokenprune_hf.Encoded] = {}

        def encode(place: int, worker: int) -> None:
            pixels = self.processor.image_processor(
                images=[load_image(image) for image in parts[place]], return_tensors="pt"
            )
            encoded[place] = tokenprune_hf.encode(self.models[worker], needs=needs, **pixels)
            advance(len(parts[place]))

        self._share_out([partial(encode, place) for place in range(len(parts))])
        _, rows, columns = encoded[0].modalities["image"].items[0].tokens.grid
        self.grid = (rows, columns)
        chunks = []
        for place, part in enumerate(parts):
            pairs = [(number, at) for at, image in enumerate(part) for number in by_image[image]]
            chunks.append(Chunk(encoded[place], [one for one, _ in pairs], [at for _, at in pairs]))
        return chunks

    def prompt(self, question: str) -> list[int]:
        """Return the token ids of a question about one image, as the processor lays them out."""
        if question not in self._prompts:
            self._prompts[question] = self.inputs(question, self._blank_image())["input_ids"][
                0
            ].tolist()
        return self._prompts[question]

    def inputs(self, question: str, image: Any) -> dict[str, Any]:
        """Return what the processor makes of a question about an image."""
        message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": question}],
        }
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        return dict(self.processor(text=[text], images=[image], return_tensors="pt"))

    def _blank_image(self) -> Any:
        """Return an image: all have as many placeholders, so any will do for the prompt."""
        if self._blank is None:
            from PIL import Image

            self._blank = Image.new("RGB", (64, 64))
        return self._blank

    def batch(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, LongTensors [B, L], padded on the left."""
        rows = [self.prompt(question) for question in questions]
        length = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (length - len(row)) + [1] * len(row) for row in rows]
            ),
        }

    def answer(
        self,
        questions: Sequence[Question],
        chunks: Sequence[Chunk],
        method: str | Selector,
        keep: Keep,
        positions: Positions,
        advance: Callable[[int], None],
    ) -> Answers:
        """Answer every question with `keep` of the visual tokens.

        Parameters
        ----------
        questions
            The set.
        chunks
            What `encode` made of it.
        method, keep, positions
            As for `tokenprune_hf.prune`.
        advance
            Told how many questions were answered since it was last called.
        """
        texts = [""] * len(questions)
        kept = torch.zeros(len(questions), self.grid[0] * self.grid[1], dtype=torch.bool)
        with ExitStack() as stack:
            prunings = [
                stack.enter_context(tokenprune_hf.prune(model, method, keep, positions))
                for model in self.models
            ]

            def answer(chunk: Chunk, places: list[int], worker: int) -> None:
                self._answer_batch(questions, chunk, places, prunings[worker], texts, kept)
                advance(len(places))

            self._share_out(
                [
                    partial(answer, chunk, places)
                    for chunk in chunks
                    for places in self._batches(questions, chunk, range(len(chunk.numbers)))
                ]
            )
        return Answers(texts, kept)

    def answer_each(
        self,
        questions: Sequence[Question],
        chunks: Sequence[Chunk],
        selector_for: Callable[[list[int]], Selector],
        keeps: Sequence[int],
        positions: Positions,
        advance: Callable[[int], None],
    ) -> Answers:
        """Answer every question with a selector made for its batch and a budget of its own.

        Parameters
        ----------
        questions, chunks, positions, advance
            As for `answer`.
        selector_for
            Makes the selector of a batch, given the positions of its questions in the set.
        keeps
            Tokens to keep, one number a question; questions of one number share batches.
        """
        texts = [""] * len(questions)
        kept = torch.zeros(len(questions), self.grid[0] * self.grid[1], dtype=torch.bool)

        def answer(chunk: Chunk, places: list[int], keep: int, worker: int) -> None:
            selector = selector_for([chunk.numbers[place] for place in places])
            with tokenprune_hf.prune(self.models[worker], selector, keep, positions) as pruning:
                self._answer_batch(questions, chunk, places, pruning, texts, kept)
            advance(len(places))

        tasks: list[Callable[[int], None]] = []
        for chunk in chunks:
            by_keep: dict[int, list[int]] = {}
            for place, number in enumerate(chunk.numbers):
                by_keep.setdefault(keeps[number], []).append(place)
            tasks += [
                partial(answer, chunk, places, keep)
                for keep, members in sorted(by_keep.items())
                for places in self._batches(questions, chunk, members)
            ]
        self._share_out(tasks)
        return Answers(texts, kept)

    def plain_answer(self, question: Question) -> str:
        """Answer one question by the model alone, without anything of tokenprune."""
        inputs = self.inputs(question.question, load_image(question.image))
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self._decode(output[:, inputs["input_ids"].shape[1] :])[0]

    def _share_out(self, tasks: Sequence[Callable[[int], None]]) -> None:
        """Do all tasks, each told which of the models is its own; the first error ends it."""
        waiting = iter(tasks)
        lock = threading.Lock()
        failed = False

        def work(worker: int) -> None:
            while not failed:
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                task(worker)

        with ThreadPoolExecutor(len(self.models)) as pool:
            try:
                for future in [pool.submit(work, worker) for worker in range(len(self.models))]:
                    future.result()
            except BaseException:
                # Also when interrupted: the others stop after the task they are at.
                failed = True
                raise

    def _batches(
        self, questions: Sequence[Question], chunk: Chunk, places: Sequence[int]
    ) -> Iterator[list[int]]:
        """Cut places of a chunk into batches of prompts of about one length."""
        ordered = sorted(
            places, key=lambda place: len(self.prompt(questions[chunk.numbers[place]].question))
        )
        for start in range(0, len(ordered), QUESTIONS_AT_ONCE):
            yield ordered[start : start + QUESTIONS_AT_ONCE]

    def _answer_batch(
        self,
        questions: Sequence[Question],
        chunk: Chunk,
        places: Sequence[int],
        pruning: tokenprune_hf.Pruning,
        texts: list[str],
        kept: Tensor,
    ) -> None:
        """Answer one batch; `texts` and `kept` are filled in."""
        numbers = [chunk.numbers[place] for place in places]
        inputs = self.batch([questions[number].question for number in numbers])
        with torch.inference_mode():
            output = pruning.model.generate(
                **inputs,
                encoded=chunk.encoded.take([chunk.image_of[place] for place in places]),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        answers = self._decode(output[:, inputs["input_ids"].shape[1] :])
        for number, text, selection in zip(numbers, answers, pruning.selections, strict=True):
            texts[number] = text
            kept[number] = selection.mask

    def _decode(self, tokens: Tensor) -> list[str]:
        """Return answers up to the end of turn, in lower case."""
        decoded = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.lower().split()) for text in decoded]
