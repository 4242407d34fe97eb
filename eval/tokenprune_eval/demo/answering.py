"""The model at work: images are encoded once, questions answered in batches, pruned or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenprune_hf
from tokenprune.budget import Keep
from tokenprune.config import Positions
from tokenprune.selectors.base import Selector
from tokenprune_eval.bundled.questions import Question
from tokenprune_eval.demo.evidence import Oracle
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
    grid
        Rows and columns of an image's visual tokens; known after `encode`.
    """

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        hf: Any = transformers  # much of it is not typed
        hf.utils.logging.disable_progress_bar()
        self.model: Any = hf.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        self.processor: Any = hf.AutoProcessor.from_pretrained(checkpoint)
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
        chunks = []
        images = list(by_image)
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = images[start : start + IMAGES_AT_ONCE]
            pixels = self.processor.image_processor(
                images=[load_image(image) for image in part], return_tensors="pt"
            )
            encoded = tokenprune_hf.encode(self.model, needs=needs, **pixels)
            _, *grid = encoded.modalities["image"].items[0].tokens.grid
            self.grid = (grid[0], grid[1])
            pairs = [(number, at) for at, image in enumerate(part) for number in by_image[image]]
            chunks.append(Chunk(encoded, [one for one, _ in pairs], [at for _, at in pairs]))
            advance(len(part))
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
        with tokenprune_hf.prune(self.model, method, keep, positions) as pruning:
            for chunk in chunks:
                for places in self._batches(questions, chunk, range(len(chunk.numbers))):
                    self._answer_batch(questions, chunk, places, pruning, texts, kept)
                    advance(len(places))
        return Answers(texts, kept)

    def answer_with_evidence(
        self,
        questions: Sequence[Question],
        chunks: Sequence[Chunk],
        evidence: Tensor,
        positions: Positions,
        advance: Callable[[int], None],
    ) -> Answers:
        """Answer every question with just the tokens that show its answer.

        Parameters
        ----------
        questions, chunks, positions, advance
            As for `answer`.
        evidence
            BoolTensor [Q, N].
        """
        texts = [""] * len(questions)
        kept = torch.zeros_like(evidence)
        counts = evidence.sum(dim=1).tolist()
        for chunk in chunks:
            by_count: dict[int, list[int]] = {}
            for place, number in enumerate(chunk.numbers):
                by_count.setdefault(counts[number], []).append(place)
            for count, members in sorted(by_count.items()):
                for places in self._batches(questions, chunk, members):
                    rows = evidence[[chunk.numbers[place] for place in places]]
                    oracle = Oracle(rows.nonzero()[:, 1].view(len(places), count))
                    with tokenprune_hf.prune(self.model, oracle, count, positions) as pruning:
                        self._answer_batch(questions, chunk, places, pruning, texts, kept)
                    advance(len(places))
        return Answers(texts, kept)

    def plain_answer(self, question: Question) -> str:
        """Answer one question by the model alone, without anything of tokenprune."""
        inputs = self.inputs(question.question, load_image(question.image))
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self._decode(output[:, inputs["input_ids"].shape[1] :])[0]

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
            output = self.model.generate(
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
