"""`load_data`: a data set by its name, or by the path of a file in one of the known formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenprune.errors import did_you_mean
from tokenprune_eval.data import (
    docvqa,
    jsonl,
    longvideobench,
    lvbench,
    mlvu,
    mmbench,
    mmmu,
    ocrbench,
    pope,
    refcoco,
    tallyqa,
    textvqa,
    video_mme,
)
from tokenprune_eval.data.choose import choose, missing_media
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import columns_of, read_json
from tokenprune_eval.data.pictures import Pictures
from tokenprune_eval.data.question import DataSet
from tokenprune_eval.data.tables import Source, columns_in

__all__ = ["choose", "data_sets", "load_data", "missing_media"]

BUNDLED = {
    "easy-vqa": "easy-VQA: shapes and colours in small images, 9,673 questions (package easy-vqa)",
    "scenes": "scenes: items on photographs, 2,600 questions, comes with tokenprune",
    "needles": "needles: cards in videos of 128 frames, 400 questions, rendered the first time",
}
"""Names that stand for themselves."""


@dataclass(frozen=True)
class _Shape:
    """One kind of file that a format comes in.

    Attributes
    ----------
    suffix
        Of its files.
    columns
        Keys by which a file is recognised; of `either`, one must be there too.
    """

    suffix: str
    columns: frozenset[str]
    either: frozenset[str] = frozenset()

    def fits(self, suffix: str, found: set[str]) -> bool:
        """Say whether a file of that ending and those columns has this shape."""
        either = not self.either or bool(self.either & found)
        return self.suffix == suffix and self.columns <= found and either

    def __str__(self) -> str:
        either = f", and {' or '.join(sorted(self.either))}" if self.either else ""
        return f"a {self.suffix} file with {', '.join(sorted(self.columns))}{either}"


@dataclass(frozen=True)
class _Format:
    """A kind of data set.

    Attributes
    ----------
    shapes
        The kinds of file it comes in.
    description
        One line.
    load
        Reads it.
    takes_answers
        Whether it can read answers from a second file.
    folder
        Whether it can read a folder: one with parts in parquet, of which those of a split are read,
        or MLVU's.
    """

    shapes: tuple[_Shape, ...]
    description: str
    load: Callable[[Source], DataSet]
    takes_answers: bool = False
    folder: bool = False

    @property
    def splits(self) -> bool:
        """Whether a folder of it has splits."""
        return self.folder and any(shape.suffix == ".parquet" for shape in self.shapes)


FORMATS = {
    jsonl.NAME: _Format(
        (_Shape(".jsonl", jsonl.COLUMNS, frozenset({"image", "images", "video"})),),
        "tokenprune's own format, one question a line (`tokenprune docs data`)",
        lambda source: jsonl.load(source.file, source.media),
    ),
    ocrbench.NAME: _Format(
        (
            _Shape(".json", ocrbench.JSON_COLUMNS),
            _Shape(".parquet", ocrbench.PARQUET_COLUMNS),
        ),
        "OCRBench, OCRBench.json or parquet",
        ocrbench.load,
        folder=True,
    ),
    textvqa.NAME: _Format(
        (
            _Shape(".json", textvqa.COLUMNS),
            _Shape(".parquet", textvqa.COLUMNS | {"image"}),
        ),
        "TextVQA, TextVQA_0.5.1_val.json or parquet",
        textvqa.load,
        folder=True,
    ),
    docvqa.NAME: _Format(
        (_Shape(".json", docvqa.COLUMNS), _Shape(".parquet", docvqa.COLUMNS)),
        "DocVQA, val_v1.0.json or parquet",
        docvqa.load,
        folder=True,
    ),
    pope.NAME: _Format(
        (
            _Shape(".json", pope.LINE_COLUMNS),
            _Shape(".jsonl", pope.LINE_COLUMNS),
            _Shape(".parquet", pope.PARQUET_COLUMNS),
        ),
        "POPE, coco_pope_adversarial.json and its like, or parquet",
        pope.load,
        folder=True,
    ),
    refcoco.NAME: _Format(
        (
            _Shape(".jsonl", refcoco.LINE_COLUMNS),
            _Shape(".parquet", refcoco.PARQUET_COLUMNS),
        ),
        "RefCOCO, RefCOCO+ or RefCOCOg, refcoco_val.jsonl and its like, or parquet",
        refcoco.load,
        folder=True,
    ),
    mmmu.NAME: _Format(
        (_Shape(".parquet", mmmu.COLUMNS),),
        "MMMU, parquet",
        mmmu.load,
        folder=True,
    ),
    mmbench.NAME: _Format(
        (_Shape(".tsv", mmbench.COLUMNS), _Shape(".parquet", mmbench.COLUMNS)),
        "MMBench, MMBench_DEV_EN.tsv or parquet",
        mmbench.load,
        folder=True,
    ),
    tallyqa.NAME: _Format(
        (_Shape(".json", tallyqa.COLUMNS),),
        "TallyQA, test.json",
        tallyqa.load,
    ),
    video_mme.NAME: _Format(
        (_Shape(".parquet", video_mme.COLUMNS),),
        "Video-MME, test-00000-of-00001.parquet",
        lambda source: video_mme.load(source.file, source.media),
    ),
    mlvu.NAME: _Format(
        (_Shape(".json", mlvu.COLUMNS),),
        "MLVU, a task's JSON file or the folder json",
        lambda source: mlvu.load(source.file, source.media, source.answers),
        takes_answers=True,
        folder=True,
    ),
    longvideobench.NAME: _Format(
        (_Shape(".json", longvideobench.COLUMNS),),
        "LongVideoBench, lvb_val.json",
        lambda source: longvideobench.load(source.file, source.media, source.answers),
        takes_answers=True,
    ),
    lvbench.NAME: _Format(
        (_Shape(".jsonl", lvbench.COLUMNS),),
        "LVBench, video_info.meta.jsonl",
        lambda source: lvbench.load(source.file, source.media),
    ),
}
"""The formats of files, by the prefix that names them."""


def data_sets() -> dict[str, str]:
    """Return one line about each data set and format, by what one writes to load it."""
    return BUNDLED | {f"{name}:PATH": form.description for name, form in FORMATS.items()}


def load_data(
    spec: str,
    *,
    media: Path | None = None,
    split: str = "test",
    answers: Path | None = None,
    work: Path | None = None,
    needle_videos: int = 100,
) -> DataSet:
    """Load a data set.

    Whether its images and videos are there is not checked; see
    `tokenprune_eval.data.choose.missing_media`.

    Parameters
    ----------
    spec
        A name (``easy-vqa``, ``scenes``, ``needles``), a path, whose format is then told by the
        columns in it, or ``FORMAT:PATH``, see `data_sets`. A file called like a name is
        ``./scenes``.
    media
        Folder with the images or videos of a file; by default the usual place beside it. The
        named data sets have their own and do not look there.
    split
        Of a named data set, or of a folder with parts in parquet (``validation-*.parquet``).
        Published splits of the others are files of their own.
    answers
        JSON file with the answers that a test split lacks (MLVU, LongVideoBench).
    work
        Folder for rendered needle videos and for pictures that a file holds itself; by default
        folders in tokenprune's cache.
    needle_videos
        How many needle videos.

    Returns
    -------
    DataSet
        In the order of the file.

    Raises
    ------
    DataSetError
        If there is no such data set or split, the file is missing, damaged or in none of the
        formats, or something in it cannot be right. Up to 20 problems are listed.
    MissingPackageError, BundledModelError
        If a package that the data set needs is not installed; the message says which.
    """
    if spec in BUNDLED:
        if answers is not None:
            raise DataSetError(f"{spec} comes with its answers; give no file with answers for it.")
        return _load_bundled(spec, split, work, needle_videos)
    name, file = _parse(spec)
    if split != "test" and not file.is_dir():
        raise DataSetError(
            f"{file} is one file and has no split {split!r}. Give the file of the split you want."
        )
    if name is None:
        name = _recognise(file, split)
    form = FORMATS[name]
    if file.is_dir() and not form.folder:
        raise DataSetError(f"{file} is a folder, and {name} needs a file: {form.description}.")
    if file.is_dir() and split != "test" and not form.splits:
        raise DataSetError(f"{name} has no split {split!r}. Leave out --split.")
    if answers is not None and not form.takes_answers:
        taking = sorted(one for one, other in FORMATS.items() if other.takes_answers)
        raise DataSetError(
            f"{name} has its answers in the file itself; a file with answers is for "
            f"{' and '.join(taking)}."
        )
    return form.load(Source(file, media, split, answers, Pictures(work)))


def _load_bundled(name: str, split: str, work: Path | None, needle_videos: int) -> DataSet:
    # Rendering needs packages that reading a file does not.
    from tokenprune_eval.data import bundled

    if name == "easy-vqa":
        return bundled.easy_vqa(split)
    if name == "scenes":
        return bundled.scenes(split)
    return bundled.needles(split, work, needle_videos)


def _parse(spec: str) -> tuple[str | None, Path]:
    """Return the format, where the prefix names it, and the path, which exists."""
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in FORMATS:
        file = Path(rest).expanduser()
        if not rest or not os.path.exists(file):
            raise DataSetError(f"{rest!r} does not exist. Check the path in {spec!r}.")
        return prefix, file
    file = Path(spec).expanduser()
    if spec and os.path.exists(file):  # of a name that is too long: False
        return None, file
    if colon and os.sep not in prefix:
        raise DataSetError(
            f"there is no format {prefix!r} and no file {spec!r}. {did_you_mean(prefix, FORMATS)}"
        )
    if os.sep in spec or file.suffix in {
        shape.suffix for form in FORMATS.values() for shape in form.shapes
    }:
        raise DataSetError(f"{file} does not exist. Check the path.")
    raise DataSetError(
        f"there is no data set {spec!r} and no file of that name. {did_you_mean(spec, data_sets())}"
    )


def _suffixes() -> set[str]:
    return {shape.suffix for form in FORMATS.values() for shape in form.shapes}


def _recognise(file: Path, split: str) -> str:
    """Return the one format whose columns the file has."""
    suffix, found = _columns(file, split)
    names = [
        name
        for name, form in FORMATS.items()
        if any(shape.fits(suffix, found) for shape in form.shapes)
    ]
    if len(names) == 1:
        return names[0]
    known = "".join(
        f"\n  {name}: {'; or '.join(map(str, form.shapes))}" for name, form in FORMATS.items()
    )
    why = f"could be {' or '.join(names)}" if names else "is in none of the known formats"
    raise DataSetError(
        f"{file} {why}; the columns in it are: {', '.join(sorted(found)) or '(none)'}. Name the "
        f"format (FORMAT:PATH). Formats:{known}"
    )


def _columns(file: Path, split: str) -> tuple[str, set[str]]:
    """Return the ending and the columns of a file; what is wrong with it is said by its format."""
    if file.is_dir() and (first := min(file.glob("*.json"), default=None)) is not None:
        return ".json", columns_of(read_json(first, Problems(file)))
    suffix = ".parquet" if file.is_dir() else file.suffix.lower()
    if suffix not in _suffixes():
        return suffix, set()
    return suffix, columns_in(Source(file, split=split))
