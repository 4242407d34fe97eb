"""Which frames a video file has: when each is shown, where to seek for it, and which way is up.

`list_packets` reads the packets of a file and decodes one frame alone; it is quick, and for some
files it cannot tell. `list_frames` decodes the whole file and keeps one frame; it always tells.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputFileError, reason_of

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_TIMED = ("mov", "matroska", "mpegts", "flv")
"""Containers that store when each frame is shown. Others are decoded to find out."""

_DECORD_CONTAINERS = ("mov", "matroska")
_DECORD_CODECS = ("h264", "hevc", "vp9")

_TAIL = 1.0
"""Seconds by which a Matroska file may end before the duration it states."""

_TIME_BASE = Fraction(1, 90000)
"""Seconds of a time stamp's unit where a file does not say: that of MPEG."""


@dataclass(frozen=True)
class Doubt:
    """Why the packets of a file cannot be relied on.

    Attributes
    ----------
    reason
        To stand in brackets in a message.
    """

    reason: str


@dataclass(frozen=True, eq=False)
class Orientation:
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
class FrameList:
    """The N frames of a file in the order they are shown.

    Attributes
    ----------
    stamps
        int64 [N], time stamps in units of the container.
    times
        float64 [N], seconds from the first frame.
    duration
        Seconds from the first frame to the end of the last.
    keys
        int64 [K, 2], of each key frame its time stamp and where to seek for it; empty where the
        file was decoded to list its frames.
    first
        The first frame, decoded.
    orientation
        How the frames are laid on the screen.
    missing
        What is known of frames that cannot be read, None where none is missing.
    unfit
        Why decord would be wrong about this file, None where it is not.
    """

    stamps: NDArray[np.int64]
    times: NDArray[np.float64]
    duration: float
    keys: NDArray[np.int64]
    first: VideoFrame
    orientation: Orientation
    missing: str | None
    unfit: str | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored."""
        return self.first.width, self.first.height


# Opening ----------------------------------------------------------------------------------------


def open_video(file: Path) -> InputContainer:
    """Open a video file, never anything that the file names.

    Raises
    ------
    InputFileError
        If there is no permission, or it is no video.
    """
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
            f"{file}: this is no video that can be read ({text or reason_of(error)}). If it is "
            "one, its beginning or its index is missing: copy or download it again."
        ) from None
    return container


@functools.cache
def _lenient() -> dict[str, Any]:
    """Return what has PyAV read titles that are no UTF-8; from 19 on it does by itself."""
    import av

    # A compiled function without a signature: its documentation says what it takes.
    known = "metadata_errors" in (av.open.__doc__ or "")
    return {"metadata_errors": "replace"} if known else {}


def video_stream(file: Path, container: InputContainer) -> VideoStream:
    """Return the video stream that players show.

    Raises
    ------
    InputFileError
        If there is none, or PyAV has no decoder for it.
    """
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


def _kind(container: InputContainer) -> str:
    """Return the container's own name, the first of those of its format."""
    return container.format.name.split(",")[0]


# From the packets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packet:
    stamp: int
    decoding: int  # decoding time stamp: what containers are searched by
    duration: int
    key: bool
    hidden: bool  # decoded, but cut away by an edit list


@dataclass(frozen=True)
class _Packets:
    whole: list[_Packet]
    damaged: int
    end: float  # seconds at which the data of all streams end
    untimed: bool = False  # a packet had no time stamp; reading stopped there

    @property
    def received(self) -> int:
        return len(self.whole) + self.damaged


def list_packets(file: Path) -> FrameList | Doubt:
    """List the frames from the packets, of which only the first few are decoded.

    Returns
    -------
    FrameList or Doubt
        A doubt where the packets do not say which frames there are.

    Raises
    ------
    InputFileError
        If there is no video in the file.
    """
    with open_video(file) as container:
        stream = video_stream(file, container)
        kind, codec = _kind(container), stream.codec_context.name
        if kind not in _TIMED:
            return Doubt(f"{container.format.name} has no time stamps")
        if codec in ("vp8", "libvpx"):
            return Doubt("VP8 has packets without a frame")
        packets = _read_packets(container, stream)
        if packets.untimed:
            return Doubt("a frame has no time stamp")
        whole = packets.whole
        if not any(packet.key for packet in whole):
            return Doubt("no packet is a key frame")
        keys = np.array(sorted((p.stamp, p.decoding) for p in whole if p.key), np.int64)
        # What is shown before the first key frame lacks the pictures it is made from.
        shown = sorted(
            (p.stamp, p.duration) for p in whole if not p.hidden and p.stamp >= keys[0, 0]
        )
        stamps = np.array([stamp for stamp, _ in shown], np.int64)
        if len(stamps) == 0 or (np.diff(stamps) <= 0).any():
            return Doubt("two frames have one time stamp")
        base = float(stream.time_base or _TIME_BASE)
        times = (stamps - stamps[0]) * base
        missing = _missing(container, stream, packets)
        duration = _duration(times, shown[-1][1] * base, stream)
        videos = len(container.streams.video)
        # The header of a file in fragments counts those in the header itself.
        fragmented = stream.frames < packets.received
    first = next((frame for frame in decoded_frames(file) if frame is not None), None)
    if first is None:
        return Doubt("no frame can be decoded")
    orientation = _orientation(first)
    unfit = _unfit_for_decord(kind, codec, fragmented, videos, missing, whole, orientation)
    return FrameList(stamps, times, duration, keys, first, orientation, missing, unfit)


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    """Read the packets of `stream`, up to the end of the data or to one without a time stamp."""
    import av

    whole: list[_Packet] = []
    damaged = 0
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
                damaged += 1
            elif packet.pts is None:
                return _Packets(whole, damaged, end, untimed=True)
            else:
                whole.append(_told(packet, packet.pts))
    except av.FFmpegError:
        damaged += 1
    except IndexError:
        pass  # PyAV's, at the end of a file whose streams do not all begin with it
    return _Packets(whole, damaged, end)


def _told(packet: Packet[Any], stamp: int) -> _Packet:
    """Return what a packet says of its frame."""
    decoding = stamp if packet.dts is None else min(packet.dts, stamp)
    hidden = packet.is_discard
    return _Packet(stamp, decoding, packet.duration or 0, packet.is_keyframe, hidden)


def _missing(container: InputContainer, stream: VideoStream, packets: _Packets) -> str | None:
    """Return which part of the file is not there, as far as the container says."""
    kind, whole, received = _kind(container), len(packets.whole), packets.received
    if kind == "mov":
        listed = max(len(stream.index_entries), received)
        return f"{whole} of {listed} frames can be read" if listed > whole else None
    stated = (container.duration or 0) / 1e6
    # A file cut within its last second passes: durations are not stated more exactly than that.
    if kind == "matroska" and stated - packets.end > max(_TAIL, 0.05 * stated):
        return f"{whole} frames, {packets.end:.1f} of {stated:.1f} seconds, can be read"
    return f"{whole} of {received} frames can be read" if received > whole else None


def _duration(times: NDArray[np.float64], last: float, stream: VideoStream) -> float:
    """Return the time from the first frame to the end of the last, which lasts `last` if known."""
    if last <= 0 and len(times) > 1:
        last = float(times[-1]) / (len(times) - 1)
    elif last <= 0 and stream.average_rate:
        last = float(1 / stream.average_rate)
    return float(times[-1]) + last


def _unfit_for_decord(
    kind: str,
    codec: str,
    fragmented: bool,
    videos: int,
    missing: str | None,
    packets: Sequence[_Packet],
    orientation: Orientation,
) -> str | None:
    """Return why decord would count or seek wrongly in a file, without saying so; None if not."""
    reasons = (
        (
            kind not in _DECORD_CONTAINERS,
            f"it is made for mp4, mkv and webm, and this is {kind}",
        ),
        (
            codec not in _DECORD_CODECS,
            f"it is made for {', '.join(_DECORD_CODECS)}, and this is {codec}",
        ),
        (
            kind == "mov" and fragmented,
            "the file is in fragments, in which it seeks wrongly",
        ),
        (videos > 1, "there is more than one video stream"),
        (missing is not None, "frames are missing"),
        (
            any(packet.hidden for packet in packets) or not packets[0].key,
            "an edit list cuts frames away, which it counts",
        ),
        (
            not _closed(packets),
            "key frames are not in the order they are shown, and it seeks to the wrong ones",
        ),
        (orientation.mirrored, "the video is mirrored, which it does not apply"),
    )
    return next((reason for unfit, reason in reasons if unfit), None)


def _closed(packets: Sequence[_Packet]) -> bool:
    """Return whether every key frame has as many packets before it as frames shown before it.

    Where a group of pictures is open, frames that are stored behind a key frame are shown before
    it.
    """
    order = np.argsort(np.argsort([packet.stamp for packet in packets], kind="stable"))
    return all(order[at] == at for at, packet in enumerate(packets) if packet.key)


# From decoding ----------------------------------------------------------------------------------


def decoded_frames(file: Path) -> Iterator[VideoFrame | None]:
    """Decode a file from its beginning; None stands for a piece that cannot be decoded.

    Pieces before the first frame are left out: recordings may start between two key frames.
    """
    with open_video(file) as container:
        stream = video_stream(file, container)
        # Threads that decode a frame each lose more or fewer of them where data are damaged.
        stream.thread_type = "SLICE"
        begun = False
        packets = container.demux(stream)
        while True:
            packet, broken = _next_packet(packets)
            if broken:
                yield None
            frames = _frames_in(stream, packet)
            if frames is None:
                return
            for frame in frames:
                begun = begun or frame is not None
                if begun:
                    yield frame
            if packet is None:
                return


def _next_packet(packets: Iterator[Packet[VideoStream]]) -> tuple[Packet[VideoStream] | None, bool]:
    """Return the next packet, None at the end of the data, and whether they end in damage."""
    import av

    try:
        return next(packets, None), False
    except av.FFmpegError:
        return None, True
    except IndexError:
        return None, False  # as in _read_packets


def _frames_in(
    stream: VideoStream, packet: Packet[VideoStream] | None
) -> list[VideoFrame | None] | None:
    """Return the frames that a packet completes, None for a damaged one; None at the very end.

    The end of the data, which is no packet, brings out what the decoder still holds.
    """
    import av

    try:
        frames = stream.decode(packet)
    except av.EOFError:
        return None
    except av.FFmpegError:
        return [None]
    return [None if frame.is_corrupt else frame for frame in frames]


def list_frames(file: Path, note: str) -> FrameList:
    """List the frames by decoding all of them.

    Parameters
    ----------
    file
        The video.
    note
        What went wrong before, to be put into a message.

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
    for frame in decoded_frames(file):
        if frame is None:
            damaged += 1
            continue
        first = first or frame
        stamp = frame.pts if frame.pts is not None else frame.dts
        timed = timed and stamp is not None
        stamps.append(stamp or 0)
        last = frame.duration or 0
    with open_video(file) as container:
        stream = video_stream(file, container)
        if first is None:
            raise InputFileError(
                f"{file}: not one frame of this video ({stream.codec_context.name}) can be "
                f"decoded{note}. Copy or download it again, or convert it."
            )
        shown = np.array(stamps, np.int64)
        base = float(first.time_base or stream.time_base or _TIME_BASE)
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
    return FrameList(
        stamps=shown,
        times=times,
        duration=duration,
        keys=np.zeros((0, 2), np.int64),
        first=first,
        orientation=_orientation(first),
        missing=missing,
        unfit="its frames are known from decoding only",
    )


def _orientation(frame: VideoFrame) -> Orientation:
    """Return what the display matrix of a frame says; it is applied by players, not by decoders."""
    side_data: Any = frame.side_data
    data = side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    # Column and row of the stored picture become a * column + c * row, and b and d.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
