"""Decoding the frames of a video that were chosen: with decord, by seeking, or one after another.

Each function fills an array with frames of a file; `None` says that all of them are right, a text
why they are not. decord counts and seeks wrongly in some files without saying so, so what it says
of a file is compared with what the packets say, and its first frame with PyAV's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputFileError, reason_of
from tokenprune.media.frame_list import FrameList, decoded_frames, open_video, video_stream

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_DECORD_BYTES = 64 * 2**20
"""decord's frames lie in memory twice while they are copied, so it is asked for a few at a time."""

_ALIKE = 4
"""Mean difference of two decoders' pixels: none at full size, up to 2 on edges when shrunk."""

_DECORD_PREFIX = re.compile(r"^(\[[\d:]+\] \S+:\d+: )+")
"""The time and the line of its source that decord puts before what it has to say."""


def decord_says(error: BaseException) -> str:
    """Return what an exception of decord says on one line, or its kind where it says nothing."""
    return _DECORD_PREFIX.sub("", reason_of(error)).strip() or type(error).__name__


def fill_with_decord(
    decord: ModuleType,
    file: Path,
    listing: FrameList,
    indices: NDArray[np.int64],
    frames: NDArray[np.uint8],
) -> str | None:
    """Fill in frames with decord.

    Parameters
    ----------
    decord
        The module.
    file
        The video.
    listing
        Its frames.
    indices
        int64 [T], those to decode.
    frames
        uint8 [T, H, W, 3], where to; H and W say how large.

    Returns
    -------
    str or None
        Why decord cannot be relied on for this file; None where it can, and `frames` is full.
    """
    count, height, width, _ = frames.shape
    padded = -(-width // 32) * 32
    if padded != width and padded * 3 % width == 0:
        # Its check whether there is padding after a row tests for this.
        return f"frames {width} pixels wide come out wrong"
    stored = (height, width) if listing.orientation.transpose else (width, height)
    size = {} if stored == listing.size else {"width": width, "height": height}
    # What its FFmpeg logs of a file is in the exception; nothing tells the level set before.
    decord.logging.set_level(decord.logging.FATAL)
    reader = None
    try:
        # Without fault_tol, frames that cannot be decoded are copies of those before them.
        reader = decord.VideoReader(os.path.abspath(file), fault_tol=1e-6, **size)
        total = len(listing.times)
        if len(reader) != total:
            return f"it counts {len(reader)} frames where there are {total}"
        # float32 seconds, from the stream's start and not from its first frame.
        stated = reader.get_frame_timestamp(range(total))[:, 0].astype(np.float64)
        allowed = 1e-3 + 1e-6 * listing.duration
        if np.abs(stated - stated[0] - listing.times).max() > allowed:
            return "it takes the frames for others"
        at_once = max(1, _DECORD_BYTES // (height * width * 3))
        for start in range(0, count, at_once):
            some = indices[start : start + at_once]
            pixels = reader.get_batch(some.tolist()).asnumpy()
            if pixels.shape != (len(some), height, width, 3):
                return f"it returns frames of {pixels.shape[2]} x {pixels.shape[1]} pixels"
            frames[start : start + at_once] = pixels
        # Every sample begins with the first frame, and that one is known.
        known = _picture(listing.first, listing, frames)
        if np.abs(frames[0].astype(np.int16) - known).mean() > _ALIKE:
            return "its first frame is not the first"
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, AssertionError and kinds of its own
        return decord_says(error)
    finally:
        reader = None  # stops its threads, which may still have something to log
        decord.logging.set_level(decord.logging.ERROR)
    return None


class _Seeker:
    """Decodes frames of a file in rising order, skipping what no wanted frame is made from."""

    def __init__(self, container: InputContainer, stream: VideoStream, listing: FrameList) -> None:
        self._container, self._stream, self._listing = container, stream, listing
        self._decoding: Iterator[VideoFrame] = container.decode(stream)
        self._current: VideoFrame | None = None
        self._group = 0

    def first_from(self, stamp: int) -> VideoFrame:
        """Return the first decoded frame with this time stamp or a later one.

        Raises
        ------
        StopIteration
            If there is none.
        av.FFmpegError
            If the data are damaged.
        """
        # Frames are made from the key frame before them, so a jump pays where that is another one.
        group = int(np.searchsorted(self._listing.keys[:, 0], stamp, side="right")) - 1
        if group > self._group:
            self._jump(group, stamp)
        current = self._current
        while current is None or current.pts is None or current.pts < stamp:
            self._current = current = next(self._decoding)
        return current

    def _jump(self, group: int, stamp: int) -> None:
        # Containers search by decoding time, some roughly: one key frame earlier will do where the
        # first one found is already too late.
        for key in (group, group - 1):
            self._container.seek(int(self._listing.keys[key, 1]), stream=self._stream)
            self._decoding = self._container.decode(self._stream)
            self._current = next(self._decoding, None)
            if self._current is not None and (self._current.pts or 0) <= stamp:
                break
        self._group = group


def fill_by_seeking(
    file: Path, listing: FrameList, indices: NDArray[np.int64], frames: NDArray[np.uint8]
) -> str | None:
    """Fill in frames with PyAV, starting from the key frame before each where that is nearer.

    Returns
    -------
    str or None
        Why the listing cannot be relied on: a frame is not under its time stamp. None where all
        are.
    """
    import av

    with open_video(file) as container:
        seeker = _Seeker(container, video_stream(file, container), listing)
        try:
            for slot, stamp in enumerate(listing.stamps[indices].tolist()):
                frame = seeker.first_from(stamp)
                if frame.pts != stamp or frame.is_corrupt:
                    return "a frame is not where its packet says"
                frames[slot] = _picture(frame, listing, frames)
        except (av.FFmpegError, StopIteration, IndexError):
            return "a frame that is listed cannot be decoded"
    return None


def fill_in_order(
    file: Path,
    listing: FrameList,
    indices: NDArray[np.int64],
    frames: NDArray[np.uint8],
    note: str,
) -> None:
    """Fill in frames with PyAV, decoding all from the first on.

    Raises
    ------
    InputFileError
        If there are fewer than were listed: the file has changed. `note` stands in the message.
    """
    slots = {index: slot for slot, index in enumerate(indices.tolist())}
    left = len(slots)
    whole = (frame for frame in decoded_frames(file) if frame is not None)
    for index, frame in enumerate(whole):
        if index in slots:
            frames[slots[index]] = _picture(frame, listing, frames)
            left -= 1
            if not left:
                return
    raise InputFileError(f"{file}: the video has changed while it was read{note}. Read it again.")


def _picture(frame: VideoFrame, listing: FrameList, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a decoded frame in the size of `frames`, upright."""
    height, width = frames.shape[1:3]
    if listing.orientation.transpose:
        height, width = width, height
    # What decord's FFmpeg scales with.
    rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR")
    pixels: NDArray[Any] = rgb.to_ndarray()
    return listing.orientation.upright(pixels)
