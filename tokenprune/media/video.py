"""`read_video`: sampled frames of a video file, as uint8 RGB and with their times.

PyAV lists the frames of a file by reading its packets, without decoding them; the sample is chosen
from this list, so that both backends take the same frames. decord or PyAV then decodes these.

In some files decord counts or seeks wrongly without saying so: open GOPs, edit lists, fragments,
transport streams, AVI, mirrored videos. It is given the others only, and its first frame is
compared with PyAV's. Every frame that PyAV returns is checked against the list, by its time stamp;
where they disagree, the list is made anew by decoding the whole file, of which nothing is kept.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import (
    ConfigError,
    InputFileError,
    MissingPackageError,
    did_you_mean,
    reason_of,
)
from tokenprune.media.decode import decord_says, fill_by_seeking, fill_in_order, fill_with_decord
from tokenprune.media.files import check_file
from tokenprune.media.frame_list import Doubt, FrameList, list_frames, list_packets

Backend = Literal["auto", "decord", "pyav"]

LARGEST = 8 * 2**30
"""Bytes of sampled frames above which a call is refused: `max_side` makes them smaller."""

_FASTEST = 1_000_000

_BACKENDS = ("auto", "decord", "pyav")


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of a video.

    Attributes
    ----------
    frames
        uint8 [T, H, W, 3], RGB, upright.
    times
        float64 [T], seconds from the first frame of the file, rising.
    indices
        int64 [T], which frames of the file these are, counted in the order they are shown.
    total
        How many frames the file has.
    duration
        Seconds from the first frame to the end of the last.
    path
        The file.
    backend
        ``"decord"`` or ``"pyav"``, whichever decoded the frames.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    indices: NDArray[np.int64]
    total: int
    duration: float
    path: Path
    backend: str

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return (
            f"Video({count} of {self.total} frames, {width} x {height}, {self.duration:.2f} s, "
            f"{str(self.path)!r}, {self.backend})"
        )


def read_video(
    path: str | os.PathLike[str],
    frames: int | None = 32,
    *,
    fps: float | None = None,
    times: Sequence[float] | None = None,
    max_side: int | None = None,
    backend: Backend = "auto",
    allow_truncated: bool = False,
) -> Video:
    """Read frames of a video, sampled evenly in time or at given times.

    `frames` are spread from the first to the last frame of the file like ``np.linspace``, by their
    times: with a variable frame rate too, the steps between them are as even as the file allows.
    No frame comes twice; of a file with fewer frames than that, each comes once. `fps` takes the
    frame nearest to each tick, from the first frame on; where that makes more than `frames`, these
    are spread over the whole video instead.

    Parameters
    ----------
    path
        A video file of any container and codec that FFmpeg reads.
    frames
        How many frames, at least 1, or with `fps` the most there may be. None is no bound.
    fps
        Frames per second of video, above 0.
    times
        Seconds from the first frame, rising, in place of `frames` and `fps`: the frame nearest to
        each is taken, once.
    max_side
        Frames are shrunk as they are decoded until neither side is longer. None keeps their size.
        Pixels are taken for square, as they are stored.
    backend
        ``"pyav"``, ``"decord"``, or ``"auto"``: decord for the files that it reads right where it
        is installed, PyAV otherwise. Both return the same frames. PyAV is needed in any case.
    allow_truncated
        Use what can be decoded of a file that is cut off or damaged, in place of an error.

    Returns
    -------
    Video

    Raises
    ------
    ConfigError
        If an argument has a value it cannot take, `times` lie behind the file's end, or the frames
        would fill more than `LARGEST` bytes.
    InputFileError
        If the file is missing, a directory, empty, no video, without frames, cut off or damaged,
        or, with ``backend="decord"``, one that decord cannot be trusted with. The message names
        the file.
    MissingPackageError
        If PyAV is not installed, or decord is not and was asked for.
    """
    _check_arguments(frames, fps, times, max_side, backend)
    file = Path(path)
    check_file(file, "video")
    _import_av()
    decord = _decord_for(backend)

    def sampled(listing: FrameList) -> Video:
        _check_whole(file, listing, allow_truncated)
        return _sized(file, listing, frames, fps, times, max_side)

    try:
        return _read(file, sampled, decord, decord_only=backend == "decord")
    except MemoryError:
        raise InputFileError(
            f"{file}: there is not enough memory for its frames. Give a smaller max_side, or fewer "
            "frames."
        ) from None


def _read(
    file: Path,
    sampled: Callable[[FrameList], Video],
    decord: ModuleType | None,
    decord_only: bool,
) -> Video:
    """Read a video in the quickest way that can be relied on.

    Parameters
    ----------
    file
        The video.
    sampled
        Returns the video with its frames chosen and their pixels still to be filled in.
    decord
        The module, or None to leave it out.
    decord_only
        Whether a video that decord cannot be relied on for is an error.
    """
    note = ""
    listing = list_packets(file)
    if isinstance(listing, Doubt):
        doubt: str | None = listing.reason
    else:
        video = sampled(listing)
        if decord is not None:
            doubt = listing.unfit or fill_with_decord(
                decord, file, listing, video.indices, video.frames
            )
            if doubt is None:
                return replace(video, backend="decord")
            note = f" (decord: {doubt})"
        if not decord_only:
            doubt = fill_by_seeking(file, listing, video.indices, video.frames)
            if doubt is None:
                return video
    if decord_only:
        raise InputFileError(
            f"{file}: decord cannot be relied on for this video ({doubt}). Use backend='auto' or "
            "backend='pyav'."
        )
    # Nothing but the frames themselves tells which there are.
    listing = list_frames(file, note)
    video = sampled(listing)
    fill_in_order(file, listing, video.indices, video.frames, note)
    return video


# Arguments and file -----------------------------------------------------------------------------


def _check_arguments(
    frames: int | None,
    fps: float | None,
    times: Sequence[float] | None,
    max_side: int | None,
    backend: str,
) -> None:
    if times is not None:
        given = np.asarray(times, np.float64)
        rising = given.ndim == 1 and len(given) > 0 and bool((np.diff(given) > 0).all())
        if not rising or not np.isfinite(given).all() or given[0] < 0:
            raise ConfigError(f"times={times!r} must be rising seconds from 0, at least one.")
        if fps is not None:
            raise ConfigError("times and fps both say which frames to read. Give one of them.")
    elif frames is None and fps is None:
        raise ConfigError("frames=None and fps=None leave open how many frames to read. Give one.")
    for name, value in (("frames", frames), ("max_side", max_side)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1, or None.")
    if fps is not None and (
        isinstance(fps, bool)
        or not isinstance(fps, int | float | np.number)
        or not 0 < fps <= _FASTEST
    ):
        raise ConfigError(f"fps={fps!r} must be a number above 0, {_FASTEST} at most, or None.")
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown. {did_you_mean(backend, _BACKENDS)}")


def _import_av() -> ModuleType:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise MissingPackageError(
            f"reading videos needs PyAV, which cannot be imported ({reason_of(error)}). Install it "
            "with: pip install av"
        ) from None


def _decord_for(backend: str) -> ModuleType | None:
    """Return decord where it is to be used.

    Raises
    ------
    MissingPackageError
        If it was asked for by name and cannot be imported.
    """
    if backend == "pyav":
        return None
    try:
        return importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:
        # Its library is loaded as it is imported, and may not run on this machine.
        if backend == "auto":
            return None
        raise MissingPackageError(
            f"backend='decord' needs decord, which cannot be imported ({decord_says(error)}). "
            "Install it with: pip install decord, or use backend='pyav'."
        ) from None


def _check_whole(file: Path, listing: FrameList, allow_truncated: bool) -> None:
    if listing.missing is not None and not allow_truncated:
        raise InputFileError(
            f"{file}: the video is cut off or damaged: {listing.missing}. Copy or download it "
            "again, or pass allow_truncated=True (`--allow-truncated` of tokenprune eval) to use "
            "what there is."
        )


# Which frames -----------------------------------------------------------------------------------


def _sample(times: NDArray[np.float64], frames: int | None, fps: float | None) -> NDArray[np.int64]:
    """Return which of the frames shown at `times` to read, ascending."""
    total = len(times)
    if fps is not None:
        # How many ticks there are until halfway to the next frame, and to the end for the last; a
        # tick on the last frame itself is not lost to rounding.
        middles = np.append((times[1:] + times[:-1]) / 2, times[-1])
        ticks = np.floor(middles * fps + 1e-6).astype(np.int64) + 1
        if frames is None or ticks[-1] <= frames:
            return np.flatnonzero(np.diff(ticks, prepend=0))
    if frames is None or frames >= total:
        return np.arange(total)
    nearest = _nearest(times, np.linspace(0.0, times[-1], frames))
    # Where the file has a gap, several targets share a frame: the later ones move on to the next.
    steps = np.arange(frames)
    moved: NDArray[np.int64] = np.maximum.accumulate(nearest - steps) + steps
    return moved.clip(max=total - frames + steps)


def _nearest(times: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the frame nearest to each target, the earlier of two as near."""
    after = np.searchsorted(times, targets).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    return np.where(targets - times[before] <= times[after] - targets + 1e-9, before, after)


def _sized(
    file: Path,
    listing: FrameList,
    frames: int | None,
    fps: float | None,
    times: Sequence[float] | None,
    max_side: int | None,
) -> Video:
    """Return the video with its frames chosen and their pixels still to be filled in."""
    if times is None:
        chosen = _sample(listing.times, frames, fps)
    else:
        if times[-1] > listing.duration:
            raise ConfigError(
                f"{file}: there is no frame at {times[-1]} s, it ends at {listing.duration:.2f} s. "
                "Correct times."
            )
        chosen = np.unique(_nearest(listing.times, np.asarray(times, np.float64)))
    longest = max(listing.size)
    shrink = min(1.0, max_side / longest) if max_side is not None else 1.0
    width, height = (max(1, round(side * shrink)) for side in listing.size)
    if listing.orientation.transpose:
        width, height = height, width
    size = len(chosen) * height * width * 3
    if size > LARGEST:
        fitting = int(longest * shrink * math.sqrt(LARGEST / size))
        raise ConfigError(
            f"{file}: {len(chosen)} frames of {width} x {height} pixels would take "
            f"{size / 2**30:.1f} GiB. Give max_side={fitting} or less, or fewer frames."
        )
    return Video(
        np.empty((len(chosen), height, width, 3), np.uint8),
        listing.times[chosen],
        chosen.astype(np.int64),
        len(listing.times),
        listing.duration,
        file,
        "pyav",
    )
