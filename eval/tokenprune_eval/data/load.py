"""`load_data`: a data set by its name, or by the path of a file in one of five formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenprune.errors import did_you_mean
from tokenprune_eval.data import jsonl, longvideobench, lvbench, mlvu, video_mme
from tokenprune_eval.data.choose import choose, missing_media
from tokenprune_eval.data.errors import DataSetError, Problems
from tokenprune_eval.data.files import (
    Record,
    columns_of,
    read_json,
    read_jsonl,
    read_parquet,
)
from tokenprune_eval.data.question import DataSet

__all__ = ["choose", "data_sets", "load_data", "missing_media"]

BUNDLED = {
    "easy-vqa": "easy-VQA: shapes and colours in small images, 9,673 questions (package easy-vqa)",
    "scenes": "scenes: items on photographs, 2,600 questions, comes with tokenprune",
    "needles": "needles: cards in videos of 128 frames, 400 questions, rendered the first time",
}
"""Names that stand for themselves."""


@dataclass(frozen=True)
class _Format:
    """A kind of file.

    Attributes
    ----------
    suffix
        Of its files.
    columns
        Keys by which a file is recognised; of `either`, one must be there too.
    description
        One line.
    load
        Reads (file, media, answers).
    takes_answers
        Whether it can read answers from a second file.
    """

    suffix: str
    columns: frozenset[str]
    description: str
    load: Callable[[Path, Path | None, Path | None], DataSet]
    takes_answers: bool = False
    either: frozenset[str] = frozenset()


FORMATS = {
    jsonl.NAME: _Format(
        ".jsonl",
        jsonl.COLUMNS,
        "tokenprune's own format, one question a line (`tokenprune docs data`)",
        lambda file, media, answers: jsonl.load(file, media),
        either=frozenset({"image", "images", "video"}),
    ),
    video_mme.NAME: _Format(
        ".parquet",
        video_mme.COLUMNS,
        "Video-MME, test-00000-of-00001.parquet",
        lambda file, media, answers: video_mme.load(file, media),
    ),
    mlvu.NAME: _Format(
        ".json",
        mlvu.COLUMNS,
        "MLVU, a task's JSON file or the folder json",
        mlvu.load,
        takes_answers=True,
    ),
    longvideobench.NAME: _Format(
        ".json",
        longvideobench.COLUMNS,
        "LongVideoBench, lvb_val.json",
        longvideobench.load,
        takes_answers=True,
    ),
    lvbench.NAME: _Format(
        ".jsonl",
        lvbench.COLUMNS,
        "LVBench, video_info.meta.jsonl",
        lambda file, media, answers: lvbench.load(file, media),
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
        Of a named data set. Published splits of the others are files of their own.
    answers
        JSON file with the answers that a test split lacks (MLVU, LongVideoBench).
    work
        Folder for rendered needle videos; by default in tokenprune's cache.
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
    if split != "test":
        raise DataSetError(
            f"{file} is one file and has no split {split!r}. Give the file of the split you want."
        )
    if name is None:
        name = _recognise(file)
    form = FORMATS[name]
    if file.is_dir() and name != mlvu.NAME:
        raise DataSetError(f"{file} is a folder, and {name} needs a file: {form.description}.")
    if answers is not None and not form.takes_answers:
        taking = sorted(one for one, other in FORMATS.items() if other.takes_answers)
        raise DataSetError(
            f"{name} has its answers in the file itself; a file with answers is for "
            f"{' and '.join(taking)}."
        )
    return form.load(file, media, answers)


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
    if os.sep in spec or file.suffix in {form.suffix for form in FORMATS.values()}:
        raise DataSetError(f"{file} does not exist. Check the path.")
    raise DataSetError(
        f"there is no data set {spec!r} and no file of that name. {did_you_mean(spec, data_sets())}"
    )


def _recognise(file: Path) -> str:
    """Return the one format whose columns the file has."""
    records = _records(file)
    found = columns_of(records)
    names = [
        name
        for name, form in FORMATS.items()
        if form.suffix == _suffix(file)
        and form.columns <= found
        and (not form.either or form.either & found)
    ]
    if len(names) == 1:
        return names[0]
    known = "".join(
        f"\n  {name}: a {form.suffix} file with "
        + ", ".join(sorted(form.columns))
        + (f", and {' or '.join(sorted(form.either))}" if form.either else "")
        for name, form in FORMATS.items()
    )
    why = f"could be {' or '.join(names)}" if names else "is in none of the known formats"
    raise DataSetError(
        f"{file} {why}; the columns in it are: {', '.join(sorted(found)) or '(none)'}. Name the "
        f"format (FORMAT:PATH). Formats:{known}"
    )


def _suffix(file: Path) -> str:
    return ".json" if file.is_dir() else file.suffix.lower()


def _records(file: Path) -> list[Record]:
    """Read what there is, to see its columns; what is wrong with it is said by its format."""
    ignored = Problems(file)
    if file.is_dir():
        first = min(file.glob("*.json"), default=None)
        return [] if first is None else read_json(first, ignored)
    match _suffix(file):
        case ".parquet":
            return read_parquet(file)
        case ".json":
            return read_json(file, ignored)
        case ".jsonl":
            records = read_jsonl(file, ignored)
            if not records:
                ignored.check()
            return records
    return []
