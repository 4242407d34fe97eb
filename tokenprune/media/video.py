"""`read_video`: sampled frames of a video file, as uint8 RGB and with their times.

PyAV lists the frames of a file by reading its packets, without decoding them; the sample is chosen
from this list, so that both backends take the same frames. decord or PyAV then decodes these.

In some files decord counts or seeks wrongly without saying so: open GOPs, edit lists, fragments,
transport streams, AVI, mirrored videos. It is given the others only, and its first frame is
compared with PyAV's. Every frame that PyAV returns is checked against the list, by its time stamp;
where they disagree, the list is made anew by decoding the whole file, of which nothing is kept.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import ConfigError, InputFileError, MissingPackageError, did_you_mean
from tokenprune.media.files import check_file

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Backend = Literal["auto", "decord", "pyav"]

LARGEST = 8 * 2**30
"""Bytes of sampled frames above which a call is refused: `max_side` makes them smaller."""

_FASTEST = 1_000_000

_BACKENDS = ("auto", "decord", "pyav")

_TIMED = ("mov", "matroska", "mpegts", "flv")
"""Containers that store when each frame is shown. Others are decoded to find out."""

_DECORD_CONTAINERS = ("mov", "matroska")
_DECORD_CODECS = ("h264", "hevc", "vp9")
_DECORD_BYTES = 64 * 2**20
"""decord's frames lie in memory twice while they are copied, so it is asked for a few at a time."""

_ALIKE = 4
"""Mean difference of two decoders' pixels: none at full size, up to 2 on edges when shrunk."""

_DECORD_PREFIX = re.compile(r"^(\[[\d:]+\] \S+:\d+: )+")
"""The time and the line of its source that decord puts before what it has to say."""

_TAIL = 1.0
"""Seconds by which a Matroska file may end before the duration it states."""


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
    decord = _import_decord() if backend == "decord" else None
    if backend == "auto":
        try:
            decord = _import_decord()
        except MissingPackageError:
            decord = None

    note = ""
    try:
        try:
            listing = _list_packets(file)
            _check_whole(file, listing, allow_truncated)
            video = _sized(file, listing, frames, fps, times, max_side)
            if decord is not None:
                reason = listing.unfit or _decode_with_decord(decord, video, listing)
                if reason is None:
                    return replace(video, backend="decord")
                if backend == "decord":
                    raise _not_for_decord(file, reason)
                note = f" (decord: {reason})"
            _decode_by_seeking(video, listing)
        except _UnlistedError as doubt:
            if backend == "decord":
                raise _not_for_decord(file, str(doubt)) from None
            listing = _list_frames(file, note)
            _check_whole(file, listing, allow_truncated)
            video = _sized(file, listing, frames, fps, times, max_side)
            _decode_in_order(video, listing, note)
    except MemoryError:
        raise InputFileError(
            f"{file}: there is not enough memory for its frames. Give a smaller max_side, or fewer "
            "frames."
        ) from None
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
            f"reading videos needs PyAV, which cannot be imported ({_reason(error)}). Install it "
            "with: pip install av"
        ) from None


def _import_decord() -> ModuleType:
    try:
        return importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:
        # Its library is loaded as it is imported, and may not run on this machine.
        raise MissingPackageError(
            f"backend='decord' needs decord, which cannot be imported ({_reason(error)}). Install "
            "it with: pip install decord, or use backend='pyav'."
        ) from None


def _reason(error: BaseException) -> str:
    """Return what an exception says on one line, or its kind where it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line for line in text.splitlines() if line.strip()), "")
    return _DECORD_PREFIX.sub("", first).strip().rstrip(".") or type(error).__name__


def _not_for_decord(file: Path, reason: str) -> InputFileError:
    return InputFileError(
        f"{file}: decord cannot be relied on for this video ({reason}). Use backend='auto' or "
        "backend='pyav'."
    )


# What is in the file ----------------------------------------------------------------------------


class _UnlistedError(Exception):
    """The packets do not say, or say wrongly, which frames there are."""


@dataclass(frozen=True, eq=False)
class _Orientation:
    """How the stored picture is laid on the screen: transposed first, then mirrored."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether no rotation alone makes it upright."""
        return self.transpose ^ self.flip_rows ^ self.flip_columns

    def upright(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a stored picture [H, W, 3] as it is to be seen."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True, eq=False)
class _Listing:
    """The frames of a file in the order they are shown."""

    stamps: NDArray[np.int64]  # [N], in units of the container
    times: NDArray[np.float64]  # [N], seconds from the first
    duration: float
    keys: NDArray[np.int64]  # [K, 2]: time stamp of a key frame, and where to seek for it
    first: VideoFrame
    orientation: _Orientation
    missing: str | None  # what is known of frames that cannot be read
    unfit: str | None  # why decord would be wrong about this file

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored."""
        return self.first.width, self.first.height


@dataclass(frozen=True)
class _Packet:
    stamp: int
    decoding: int  # decoding time stamp: what containers are searched by
    duration: int
    key: bool
    hidden: bool  # decoded, but cut away by an edit list


def _open(file: Path) -> InputContainer:
    """Open a video file, never anything that the file names."""
    import av

    try:
        container: InputContainer = av.open(
            os.path.abspath(file),  # a colon in a relative path would be taken for a protocol
            "r",
            container_options={"protocol_whitelist": "file"},
            **_lenient(),
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, PermissionError):
            raise InputFileError(
                f"{file}: no permission to read the file. Change its mode."
            ) from None
        text = error.strerror if isinstance(error, av.FFmpegError) else None
        raise InputFileError(
            f"{file}: this is no video that can be read ({text or _reason(error)}). If it is one, "
            "its beginning or its index is missing: copy or download it again."
        ) from None
    return container


@functools.cache
def _lenient() -> dict[str, Any]:
    """Return what has PyAV read titles that are no UTF-8; from 19 on it does by itself."""
    import av

    # A compiled function without a signature: its documentation says what it takes.
    known = "metadata_errors" in (av.open.__doc__ or "")
    return {"metadata_errors": "replace"} if known else {}


def _stream(file: Path, container: InputContainer) -> VideoStream:
    """Return the video stream that players show."""
    from av.stream import Disposition

    # A cover picture is a stream of one frame in a file of music.
    found = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not found:
        kinds = sorted({stream.type for stream in container.streams})
        raise InputFileError(
            f"{file}: there is no video in this file, only: {', '.join(kinds) or 'nothing'}. Give "
            "a file with a video stream."
        )
    best = container.streams.best("video")
    stream = next((one for one in found if best is not None and one.index == best.index), found[0])
    if getattr(stream, "codec_context", None) is None:
        raise InputFileError(
            f"{file}: PyAV has no decoder for this video. Convert it, say to H.264 in an mp4 file."
        )
    stream.thread_type = "AUTO"
    return stream


def _list_packets(file: Path) -> _Listing:
    """List the frames from the packets, of which only the first few are decoded.

    Raises
    ------
    InputFileError
        If there is no video in the file.
    _UnlistedError
        If the packets do not tell.
    """
    with _open(file) as container:
        stream = _stream(file, container)
        if container.format.name.split(",")[0] not in _TIMED:
            raise _UnlistedError(f"{container.format.name} has no time stamps")
        codec = stream.codec_context.name
        if codec in ("vp8", "libvpx"):
            raise _UnlistedError("VP8 has packets without a frame")
        packets, end = _read_packets(container, stream)
        whole = [packet for packet in packets if packet is not None]
        if not any(packet.key for packet in whole):
            raise _UnlistedError("no packet is a key frame")
        keys = np.array(sorted((p.stamp, p.decoding) for p in whole if p.key), np.int64)
        # What is shown before the first key frame lacks the pictures it is made from.
        shown = sorted(
            (p.stamp, p.duration) for p in whole if not p.hidden and p.stamp >= keys[0, 0]
        )
        stamps = np.array([stamp for stamp, _ in shown], np.int64)
        if len(stamps) == 0 or (np.diff(stamps) <= 0).any():
            raise _UnlistedError("two frames have one time stamp")
        base = stream.time_base or Fraction(1, 90000)
        times = (stamps - stamps[0]) * float(base)
        missing = _missing(container, stream, len(packets), len(whole), end)
        duration = _duration(times, shown[-1][1] * float(base), stream)
        videos = len(container.streams.video)
        # The header of a file in fragments counts those in the header itself.
        fragmented = stream.frames < len(packets)
        kind = container.format.name.split(",")[0]
    first = _first_frame(file)
    orientation = _orientation(first)
    unfit = None
    if kind not in _DECORD_CONTAINERS:
        unfit = f"it is made for mp4, mkv and webm, and this is {kind}"
    elif codec not in _DECORD_CODECS:
        unfit = f"it is made for {', '.join(_DECORD_CODECS)}, and this is {codec}"
    elif kind == "mov" and fragmented:
        unfit = "the file is in fragments, in which it seeks wrongly"
    elif videos > 1:
        unfit = "there is more than one video stream"
    elif missing is not None:
        unfit = "frames are missing"
    elif any(packet.hidden for packet in whole) or not whole[0].key:
        unfit = "an edit list cuts frames away, which it counts"
    elif not _closed(whole):
        unfit = "key frames are not in the order they are shown, and it seeks to the wrong ones"
    elif orientation.mirrored:
        unfit = "the video is mirrored, which it does not apply"
    return _Listing(stamps, times, duration, keys, first, orientation, missing, unfit)


def _read_packets(
    container: InputContainer, stream: VideoStream
) -> tuple[list[_Packet | None], float]:
    """Return the packets of `stream`, None for damaged ones, and the time where the data end."""
    import av

    packets: list[_Packet | None] = []
    end = 0.0
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None and packet.time_base:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            if packet.is_corrupt:
                packets.append(None)
            elif packet.pts is None:
                raise _UnlistedError("a frame has no time stamp")
            else:
                decoding = packet.pts if packet.dts is None else min(packet.dts, packet.pts)
                packets.append(
                    _Packet(
                        packet.pts,
                        decoding,
                        packet.duration or 0,
                        packet.is_keyframe,
                        packet.is_discard,
                    )
                )
    except av.FFmpegError:
        packets.append(None)
    except IndexError:
        pass  # PyAV's, at the end of a file whose streams do not all begin with it
    return packets, end


def _missing(
    container: InputContainer, stream: VideoStream, received: int, whole: int, end: float
) -> str | None:
    """Return which part of the file is not there, as far as the container says."""
    kind = container.format.name.split(",")[0]
    if kind == "mov":
        listed = max(len(stream.index_entries), received)
        return f"{whole} of {listed} frames can be read" if listed > whole else None
    stated = container.duration
    # A file cut within its last second passes: durations are not stated more exactly than that.
    if kind == "matroska" and stated and stated / 1e6 - end > max(_TAIL, 0.05 * stated / 1e6):
        return f"{whole} frames, {end:.1f} of {stated / 1e6:.1f} seconds, can be read"
    return f"{whole} of {received} frames can be read" if received > whole else None


def _duration(times: NDArray[np.float64], last: float, stream: VideoStream) -> float:
    """Return the time from the first frame to the end of the last, which lasts `last` if known."""
    if last <= 0 and len(times) > 1:
        last = float(times[-1]) / (len(times) - 1)
    elif last <= 0 and stream.average_rate:
        last = float(1 / stream.average_rate)
    return float(times[-1]) + last


def _closed(packets: list[_Packet]) -> bool:
    """Return whether every key frame has as many packets before it as frames shown before it."""
    order = np.argsort(np.argsort([packet.stamp for packet in packets], kind="stable"))
    return all(order[at] == at for at, packet in enumerate(packets) if packet.key)


def _decoded(file: Path) -> Iterator[VideoFrame | None]:
    """Decode a file from its beginning; None stands for a piece that cannot be decoded.

    Pieces before the first frame are left out: recordings may start between two key frames.
    """
    import av

    with _open(file) as container:
        stream = _stream(file, container)
        # Threads that decode a frame each lose more or fewer of them where data are damaged.
        stream.thread_type = "SLICE"
        begun = False
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                packet = None
                yield None
            except IndexError:
                packet = None  # as in _read_packets
            try:
                # The end of the data brings out what the decoder still holds.
                frames = stream.decode(packet)
            except av.EOFError:
                return
            except av.FFmpegError:
                if begun:
                    yield None
                frames = []
            for frame in frames:
                if frame.is_corrupt:
                    if begun:
                        yield None
                    continue
                begun = True
                yield frame
            if packet is None:
                return


def _first_frame(file: Path) -> VideoFrame:
    for frame in _decoded(file):
        if frame is not None:
            return frame
    raise _UnlistedError("no frame can be decoded")


def _list_frames(file: Path, note: str) -> _Listing:
    """List the frames by decoding all of them.

    Raises
    ------
    InputFileError
        If not one can be decoded.
    """
    stamps: list[int] = []
    damaged = 0
    first: VideoFrame | None = None
    last = 0
    timed = True
    for frame in _decoded(file):
        if frame is None:
            damaged += 1
            continue
        first = first or frame
        stamp = frame.pts if frame.pts is not None else frame.dts
        timed = timed and stamp is not None
        stamps.append(stamp or 0)
        last = frame.duration or 0
    with _open(file) as container:
        stream = _stream(file, container)
        if first is None:
            raise InputFileError(
                f"{file}: not one frame of this video ({stream.codec_context.name}) can be "
                f"decoded{note}. Copy or download it again, or convert it."
            )
        shown = np.array(stamps, np.int64)
        base = float(first.time_base or stream.time_base or Fraction(1, 90000))
        times = (shown - shown[0]) * base
        if not timed or (np.diff(times) <= 0).any():
            # Nothing tells the times apart, so they are even.
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            times = np.arange(len(shown)) / float(rate)
            last = 0
        duration = _duration(times, last * base, stream)
    missing = None
    if damaged:
        missing = f"{len(shown)} frames can be decoded, {damaged} pieces cannot{note}"
    return _Listing(
        shown,
        times,
        duration,
        np.zeros((0, 2), np.int64),
        first,
        _orientation(first),
        missing,
        "its frames are known from decoding only",
    )


def _orientation(frame: VideoFrame) -> _Orientation:
    """Return what the display matrix of a frame says; it is applied by players, not by decoders."""
    side_data: Any = frame.side_data
    data = side_data.get("DISPLAYMATRIX")
    if data is None:
        return _Orientation()
    # Column and row of the stored picture become a * column + c * row, and b and d.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
    return _Orientation(True, flip_rows=b < 0, flip_columns=c < 0)


def _check_whole(file: Path, listing: _Listing, allow_truncated: bool) -> None:
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
    listing: _Listing,
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


# Decoding ---------------------------------------------------------------------------------------


def _decode_with_decord(decord: ModuleType, video: Video, listing: _Listing) -> str | None:
    """Fill in the frames with decord. Returns why that is not possible, None where it was."""
    count, height, width, _ = video.frames.shape
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
        reader = decord.VideoReader(os.path.abspath(video.path), fault_tol=1e-6, **size)
        if len(reader) != video.total:
            return f"it counts {len(reader)} frames where there are {video.total}"
        # float32 seconds, from the stream's start and not from its first frame.
        stated = reader.get_frame_timestamp(range(video.total))[:, 0].astype(np.float64)
        allowed = 1e-3 + 1e-6 * video.duration
        if np.abs(stated - stated[0] - listing.times).max() > allowed:
            return "it takes the frames for others"
        at_once = max(1, _DECORD_BYTES // (height * width * 3))
        for start in range(0, count, at_once):
            part = video.indices[start : start + at_once]
            pixels = reader.get_batch(part.tolist()).asnumpy()
            if pixels.shape != (len(part), height, width, 3):
                return f"it returns frames of {pixels.shape[2]} x {pixels.shape[1]} pixels"
            video.frames[start : start + at_once] = pixels
        # Every sample begins with the first frame, and that one is known.
        known = _picture(listing.first, video, listing)
        if np.abs(video.frames[0].astype(np.int16) - known).mean() > _ALIKE:
            return "its first frame is not the first"
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, AssertionError and kinds of its own
        return _reason(error)
    finally:
        reader = None  # stops its threads, which may still have something to log
        decord.logging.set_level(decord.logging.ERROR)
    return None


def _decode_by_seeking(video: Video, listing: _Listing) -> None:
    """Fill in the frames with PyAV, starting from the key frame before each where that is nearer.

    Raises
    ------
    _UnlistedError
        If a frame does not turn up under its time stamp.
    """
    import av

    wanted = listing.stamps[video.indices]
    # Which key frame each wanted frame follows.
    groups = np.searchsorted(listing.keys[:, 0], wanted, side="right") - 1
    with _open(video.path) as container:
        stream = _stream(video.path, container)
        current: VideoFrame | None = None
        decoding = container.decode(stream)
        group = 0
        try:
            for slot, (stamp, own) in enumerate(zip(wanted.tolist(), groups.tolist(), strict=True)):
                if own > group:
                    # Containers search by decoding time, some roughly: one key frame earlier will
                    # do where the first one found is already too late.
                    for key in (own, own - 1):
                        container.seek(int(listing.keys[key, 1]), stream=stream)
                        decoding = container.decode(stream)
                        current = next(decoding, None)
                        if current is not None and (current.pts or 0) <= stamp:
                            break
                    group = own
                while current is None or current.pts is None or current.pts < stamp:
                    current = next(decoding)
                if current.pts != stamp or current.is_corrupt:
                    raise _UnlistedError("a frame is not where its packet says")
                video.frames[slot] = _picture(current, video, listing)
        except (av.FFmpegError, StopIteration, IndexError):
            raise _UnlistedError("a frame that is listed cannot be decoded") from None


def _decode_in_order(video: Video, listing: _Listing, note: str) -> None:
    """Fill in the frames with PyAV, decoding all from the first on."""
    slots = {index: slot for slot, index in enumerate(video.indices.tolist())}
    left = len(slots)
    frames = (frame for frame in _decoded(video.path) if frame is not None)
    for index, frame in enumerate(frames):
        if index in slots:
            video.frames[slots[index]] = _picture(frame, video, listing)
            left -= 1
            if not left:
                return
    raise InputFileError(
        f"{video.path}: the video has changed while it was read{note}. Read it again."
    )


def _picture(frame: VideoFrame, video: Video, listing: _Listing) -> NDArray[np.uint8]:
    """Return a decoded frame in the size of `video`, upright."""
    height, width = video.frames.shape[1:3]
    if listing.orientation.transpose:
        height, width = width, height
    # What decord's FFmpeg scales with.
    rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR")
    pixels: NDArray[Any] = rgb.to_ndarray()
    return listing.orientation.upright(pixels)
