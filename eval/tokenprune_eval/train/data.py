"""What a selector is trained on: questions about videos and images, and how the teacher ranks them.

The teacher's ranking is worked out once and kept on disk, one file for what the encoder made of a
video and one for each question, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ConfigError, InputFileError
from tokenprune.files import read_json_lines, replacing, unwritable
from tokenprune.media.images import load_image
from tokenprune.media.video import read_video
from tokenprune.question.attention import question_scores
from tokenprune.selectors.flexselect import FlexSelect
from tokenprune.selectors.frame_sets import frame_sets
from tokenprune_eval.shared.left_out import LeftOut, around
from tokenprune_hf.encoding import encode_media
from tokenprune_hf.loading import ask
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.vision import vision_model


@dataclass(frozen=True)
class Asked:
    """One question about one file.

    Attributes
    ----------
    kind
        ``"image"`` or ``"video"``.
    file
        The image or video.
    question
        The text.
    """

    kind: str
    file: Path
    question: str


@dataclass(frozen=True)
class Example:
    """One item with a question and the teacher's scores; tensors are read when they are used.

    Attributes
    ----------
    media
        The file in which the item's features lie.
    ranking
        The file in which question and scores lie.
    item
        Which item of the image or video it is.
    """

    media: Path
    ranking: Path
    item: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return features float32 [N, C], question LongTensor [Q] and scores float32 [N]."""
        from safetensors import safe_open

        with safe_open(self.media, "pt") as media, safe_open(self.ranking, "pt") as ranking:
            return (
                media.get_tensor(f"features.{self.item}").float(),
                ranking.get_tensor("question"),
                ranking.get_tensor(f"scores.{self.item}"),
            )


def read_data(file: Path) -> list[Asked]:
    """Read a JSON Lines file of ``{"video": path, "question": text}`` or ``{"image": ...}``.

    Parameters
    ----------
    file
        Paths in it are relative to its folder.

    Raises
    ------
    InputFileError
        If it cannot be read, a line is not as above, or a file is missing; the line is named.
    """
    found = []
    advice = "Give a JSON Lines file of questions about images or videos."
    for line in read_json_lines(file, "data", advice):
        kinds = [kind for kind in ("image", "video") if kind in line.fields]
        question = line.fields.get("question")
        if len(kinds) != 1 or not isinstance(question, str) or not question.strip():
            raise InputFileError(
                f'{line.place}: a line is {{"video": PATH, "question": TEXT}} or '
                f'{{"image": PATH, "question": TEXT}}, not {line.text[:120]}.'
            )
        path = file.parent / str(line.fields[kinds[0]])
        if not path.is_file():
            raise InputFileError(f"{line.place}: there is no file {path}. Correct the path.")
        found.append(Asked(kinds[0], path, question))
    if not found:
        raise InputFileError(f"the data file {file} holds no questions.")
    return found


def rank(
    model: Any,
    processor: Any,
    asked: Sequence[Asked],
    folder: Path,
    teacher: FlexSelect,
    frames: int,
    done: Callable[[], None],
    left_out: LeftOut | None = None,
) -> list[list[Example]]:
    """Have the teacher rank every question's tokens; what is in the folder already is kept.

    Parameters
    ----------
    model, processor
        The large model.
    asked
        The questions.
    folder
        Where rankings are kept.
    teacher
        Layer and reduction of the ranking.
    frames
        Frames of each video, at most those of one set.
    done
        Called after each question.
    left_out
        Notes questions that fail, by file and question; None: the first one is an error.

    Returns
    -------
    list of list of Example
        One list for each file that has an example, in the order in which they first come.

    Raises
    ------
    ConfigError
        If a video has more frames than are ranked as one set.
    InputFileError
        If an image or a video cannot be read; what was ranked before it stays on disk.
    NothingLeftError
        If no question is left.
    """
    if frames > teacher.frames_per_set:
        raise ConfigError(
            f"--frames {frames} is more than the {teacher.frames_per_set} frames that are ranked "
            "together. Train on at most that many; longer videos are scored in sets of them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    by_file: dict[tuple[str, Path], list[str]] = {}
    for one in asked:
        by_file.setdefault((one.kind, one.file), []).append(one.question)
    found = []
    for (kind, file), questions in by_file.items():
        ranking = _FileRanking(model, processor, kind, file, folder, teacher, frames)
        examples: list[Example] = []
        for question in questions:
            with around(left_out, f"{file}, {question!r}"):
                examples += ranking.examples(question)
            done()
        if examples:
            found.append(examples)
    if left_out is not None:
        left_out.check("question", len(found))
    return found


class _FileRanking:
    """What the teacher makes of the questions about one image or video; it is read once."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        kind: str,
        file: Path,
        folder: Path,
        teacher: FlexSelect,
        frames: int,
    ) -> None:
        stat = file.stat()
        name = getattr(model, "name_or_path", "")
        self._key = _key(name, file.resolve(), stat.st_size, stat.st_mtime_ns, frames)
        self._media_file = folder / f"{self._key}.safetensors"
        self._model, self._processor, self._vision = model, processor, vision_model(model)
        self._kind, self._file, self._folder = kind, file, folder
        self._teacher, self._frames = teacher, frames
        self._content: Any = None
        self._encoded: Any = None

    def examples(self, question: str) -> list[Example]:
        """Return an example for each item, ranked now or in an earlier run."""
        from safetensors import safe_open

        key = _key(self._key, question, repr(self._teacher))
        ranking_file = self._folder / f"{self._key}-{key}.safetensors"
        if not (self._media_file.is_file() and ranking_file.is_file()):
            self._rank(question, ranking_file)
        with safe_open(ranking_file, "pt") as ranking:
            names = [key for key in ranking.keys() if key.startswith("scores.")]  # noqa: SIM118
        return [Example(self._media_file, ranking_file, index) for index in range(len(names))]

    def _rank(self, question: str, ranking_file: Path) -> None:
        """Have the teacher rank the tokens for one question, and keep what comes of it."""
        if self._content is None:
            self._content = (
                load_image(self._file)
                if self._kind == "image"
                else read_video(self._file, self._frames)
            )
        inputs = ask(self._processor, question, **{self._kind: self._content})
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            if self._encoded is None:
                self._encoded = encode_media(self._vision, dict(inputs), ("features",))
                features = {
                    f"features.{index}": _small(item.tokens.features)
                    for media in self._encoded.modalities.values()
                    for index, item in enumerate(media.items)
                }
                _save(self._media_file, features)
            needs = ("question", "query_attention")
            items = prompt_items(self._vision, inputs, self._encoded, needs)
            rows = [tokens for own in items.values() for tokens in own]
            found = {"question": rows[0].question}
            for index, tokens in enumerate(rows):
                (whole,) = frame_sets(tokens.grid, self._teacher.frames_per_set)
                reader: Any = tokens.query_attention
                (seen,) = reader.read([whole], self._teacher.layer, values=False, hidden=False)
                found[f"scores.{index}"] = question_scores(seen, self._teacher.reduction)
            _save(ranking_file, found)


def _small(features: Any) -> Tensor:
    """Return features in float16, which is half the disk, where they fit into it."""
    fits = features.abs().max() < torch.finfo(torch.float16).max
    small: Tensor = features.half() if fits else features.float()
    return small


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _save(file: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.contiguous().cpu() for name, value in tensors.items()}
    try:
        with replacing(file) as part:
            save_file(plain, part)
    except (OSError, SafetensorError) as error:
        advice = "Make room and run the same command again: it goes on where it was."
        raise unwritable(file, error, advice) from None
