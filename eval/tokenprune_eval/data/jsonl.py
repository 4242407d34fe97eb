"""tokenprune's own format: one question a line of a JSON lines file, see docs/data.md."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenprune_eval.data.errors import Problems
from tokenprune_eval.data.files import (
    check_answers,
    check_choices,
    finish,
    inside,
    letter_of,
    media_folder,
    read_jsonl,
)
from tokenprune_eval.data.question import DataSet, Question, Scoring

NAME = "jsonl"
COLUMNS = frozenset({"question", "answer"})
"""What every line has, besides ``image``, ``video`` or ``images``."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Corners = Annotated[list[int], Field(min_length=4, max_length=4)]


class Line(BaseModel):
    """One line of the file.

    Attributes
    ----------
    image, video, images
        The file, or two or more images that stand in this order before the question; exactly one of
        the three.
    question
        Put to the model.
    answer
        Where there are `choices` a letter or the exact text of a choice, else any text.
    answers
        All right answers to an open question, `answer` among them; with `scoring` vqa those of all
        annotators.
    scoring
        How an open answer is read; any but ``"box"``.
    choices
        Texts, all different.
    id
        By default the file's name and the line's number.
    type
        For tables by type.
    times
        Seconds of the frames to look at, each later than the one before; videos only.
    evidence
        Boxes of what the answer depends on: left, top, right, bottom in pixels of the image, right
        and bottom exclusive; for `image` only.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = None
    video: str | None = None
    images: list[str] | None = Field(default=None, min_length=2)
    question: str
    answer: str
    answers: list[str] | None = Field(default=None, min_length=1)
    scoring: Scoring = "exact"
    choices: list[str] | None = None
    id: str | None = None
    type: str = ""
    times: list[Seconds] | None = None
    evidence: list[Corners] | None = None

    @field_validator("answer", mode="before")
    @classmethod
    def _no_index(cls, answer: object) -> object:
        if isinstance(answer, int) and not isinstance(answer, bool):
            raise ValueError(
                f"text is needed, got the number {answer}. Choices count neither from 0 nor from "
                'one here: give the letter of the choice or its text. A number as text is "3"'
            )
        return answer

    @field_validator("question", "answer", "id", "image", "video")
    @classmethod
    def _not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is empty")
        return text

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: list[str] | None) -> list[str] | None:
        if choices is not None:
            check_choices(choices)
            twice = sorted({choice for choice in choices if choices.count(choice) > 1})
            if twice:
                raise ValueError(f"{', '.join(map(repr, twice))} is there more than once")
        return choices

    @field_validator("times")
    @classmethod
    def _rising(cls, times: list[float] | None) -> list[float] | None:
        if times is not None and any(b <= a for a, b in pairwise(times)):
            raise ValueError(f"each must be later than the one before, got {times}")
        return times

    @model_validator(mode="after")
    def _one_medium(self) -> Line:
        media = {"image": self.image, "video": self.video, "images": self.images}
        there = [name for name, value in media.items() if value is not None]
        if len(there) != 1:
            found = f"{' and '.join(there)} are there" if there else "none is there"
            raise ValueError(
                f"one of the keys 'image', 'video' and 'images' is needed, and {found}"
            )
        if self.times and self.video is None:
            raise ValueError("'times' are for videos, and this is an image")
        if self.choices and (self.answers or self.scoring != "exact"):
            raise ValueError("'answers' and 'scoring' are for open questions, and this has choices")
        if self.scoring == "box":
            raise ValueError("the scoring 'box' is for data sets with boxes; leave it out")
        if self.answers and self.answer not in self.answers:
            raise ValueError(f"the answer {self.answer!r} is none of 'answers'")
        if self.evidence and self.image is None:
            raise ValueError("'evidence' is for a single image, given as 'image'")
        return self


def load(file: Path, media: Path | None = None) -> DataSet:
    """Read a file in tokenprune's own format.

    Parameters
    ----------
    file
        Its name without the ending is the data set's name.
    media
        Folder that the paths in it are relative to; by default the file's folder.

    Raises
    ------
    DataSetError
        With everything that is wrong, by line.
    """
    folder = media_folder(media, [file.absolute().parent])
    problems = Problems(file)
    questions: list[tuple[str, Question]] = []
    for place, record in read_jsonl(file, problems):
        try:
            line = Line.model_validate(record)
        except ValidationError as error:
            problems.add_all(place, error, list(Line.model_fields))
            continue
        choices = tuple(line.choices or ())
        try:
            path, *further = (
                inside(folder, name) for name in line.images or [line.image or line.video or ""]
            )
            question = Question(
                id=line.id or f"{file.stem}-{place.removeprefix('line ')}",
                kind="image" if line.video is None else "video",
                path=path,
                question=line.question,
                answer=letter_of(line.answer, choices) if choices else line.answer,
                choices=choices,
                type=line.type,
                times=tuple(line.times or ()),
                evidence=tuple((a, b, c, d) for a, b, c, d in line.evidence or ()),
                further=tuple(further),
                scoring=line.scoring,
                answers=tuple(line.answers or ()),
            )
            check_answers(question)
        except ValueError as error:
            problems.add(place, str(error))
            continue
        questions.append((place, question))
    return finish(file.stem, file, questions, problems)
