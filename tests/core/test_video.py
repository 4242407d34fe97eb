from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray

from tokenprune.errors import ConfigError, InputFileError, MissingPackageError
from tokenprune.media import decode, frame_list
from tokenprune.media import video as module
from tokenprune.media.video import Video, read_video

COUNT = 48
WIDTH, HEIGHT = 96, 64
TICK = 1000
BASE = Fraction(1, 30 * TICK)

HAS_DECORD = importlib.util.find_spec("decord") is not None
BACKENDS = [
    "pyav",
    pytest.param("decord", marks=pytest.mark.skipif(not HAS_DECORD, reason="decord is missing")),
]
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord is missing")

# Encoded videos whose frames say which they are -------------------------------------------------


def _picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """Eight bars, black or white, that spell `number`; a grey top, and a white corner on its left.

    Turned or mirrored, it is another picture.
    """
    picture = np.full((height, width, 3), 60 + number, np.uint8)
    picture[: height // 4, : width // 4] = 255
    for bit, bar in enumerate(np.array_split(np.arange(width), 8)):
        picture[height // 2 :, bar] = 255 * (number >> bit & 1)
    return picture


def _number(picture: NDArray[np.uint8]) -> int:
    """Read the bars again."""
    height, width, _ = picture.shape
    assert picture[height // 8, width // 8].min() > 200, "the corner is not at the top left"
    assert picture[height // 8, width * 3 // 4].max() < 200
    bars = np.array_split(picture[height * 3 // 4].mean(axis=1), 8)
    return sum((bar[len(bar) // 2] > 128) << bit for bit, bar in enumerate(bars))


def _encode(
    file: Path,
    numbers: Sequence[int] = range(COUNT),
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    stamps: Sequence[int] | None = None,
    base: Fraction = BASE,
    rate: int = 30,
    gop: int = 12,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixels: str = "yuv420p",
    rotation: int | None = None,
    mirrored: bool = False,
    muxer: dict[str, str] | None = None,
    draw: Callable[[int], NDArray[np.uint8]] | None = None,
) -> Path:
    with av.open(file, "w", options=muxer or {}) as container:
        stream = cast(Any, container.add_stream(cast(Any, codec), rate=rate))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = stream.time_base = base
        stream.codec_context.gop_size = gop
        stream.options = options if options is not None else {"preset": "veryfast"}
        if rotation is not None or mirrored:
            stream.set_display_rotation(rotation or 0, hflip=mirrored)
        for at, number in enumerate(numbers):
            picture = draw(number) if draw is not None else _picture(number, *size)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = stamps[at] if stamps is not None else round(at / rate / base)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


CLOSED = {"x264-params": "keyint=12:scenecut=0:bframes=2:b-adapt=0"}
UNEVEN = np.cumsum(np.random.default_rng(1).integers(300, 4000, COUNT)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, made once."""
    made = tmp_path_factory.mktemp("videos")
    numbered = range(COUNT)
    frames = {"base": Fraction(1, 30), "stamps": numbered}
    _encode(made / "plain.mp4")
    _encode(made / "b-frames.mp4", options=CLOSED)
    _encode(made / "b-frames.mkv", options=CLOSED)
    _encode(made / "uneven.mp4", stamps=UNEVEN)
    _encode(made / "uneven.mkv", stamps=UNEVEN)
    _encode(made / "late.mp4", stamps=[(at + 90) * TICK for at in numbered])
    _encode(made / "late.mkv", stamps=[(at + 90) * TICK for at in numbered])
    _encode(made / "odd.mp4", size=(177, 145), pixels="yuv444p")
    _encode(
        made / "vp9.webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}
    )
    _encode(made / "one.mp4", [5])
    _encode(made / "fragments.mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    # Those that decord gets wrong.
    open_gop = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}
    _encode(made / "open-gop.mp4", options=open_gop)
    _encode(made / "edited.mp4", stamps=[(at - 7) * TICK for at in numbered])
    _encode(made / "stream.ts")
    _encode(made / "h264.avi", **frames)  # type: ignore[arg-type]
    _encode(made / "mpeg4.avi", codec="mpeg4", options={"bf": "2"}, **frames)  # type: ignore[arg-type]
    vp8 = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}
    _encode(made / "vp8.webm", codec="libvpx", options=vp8)
    return made


def _numbers(video: Video) -> list[int]:
    return [_number(picture) for picture in video.frames]


def _read(file: Path, *arguments: Any, **options: Any) -> Video:
    """`read_video`, and what holds of every result."""
    video = read_video(file, *arguments, **options)
    count = len(video.frames)
    assert video.frames.dtype == np.uint8
    assert video.frames.shape[3] == 3
    assert video.times.shape == video.indices.shape == (count,)
    assert video.times.dtype == np.float64
    assert video.indices.dtype == np.int64
    assert (np.diff(video.indices) > 0).all()
    assert (np.diff(video.times) > 0).all()
    assert 0 <= video.indices[0] <= video.indices[-1] < video.total
    assert 0 <= video.times[0] <= video.times[-1] <= video.duration
    assert video.path == Path(file)
    return video


# The right frames -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "plain.mp4",
        "b-frames.mp4",
        "b-frames.mkv",
        "uneven.mp4",
        "uneven.mkv",
        "late.mp4",
        "late.mkv",
        "odd.mp4",
        "vp9.webm",
    ],
)
def test_frames_are_those_of_their_indices(
    folder: Path, name: str, backend: module.Backend
) -> None:
    for frames in (1, 2, 13, COUNT + 1):
        video = _read(folder / name, frames, backend=backend)
        assert (video.backend, video.total) == (backend, COUNT)
        assert len(video.indices) == min(frames, COUNT)
        assert _numbers(video) == video.indices.tolist()
        if backend == "pyav":
            continue
        # Both backends take the same frames, and see the same in them.
        other = _read(folder / name, frames, backend="pyav")
        assert np.array_equal(video.indices, other.indices)
        assert np.array_equal(video.times, other.times)
        assert video.duration == other.duration
        assert np.abs(video.frames.astype(int) - other.frames).max() <= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("open-gop.mp4", "key frames are not in the order"),
        ("edited.mp4", "edit list"),
        ("fragments.mp4", "fragments"),
        ("stream.ts", "mpegts"),
        ("h264.avi", "no time stamps"),
        ("mpeg4.avi", "no time stamps"),
        ("vp8.webm", "VP8"),
    ],
)
def test_what_decord_gets_wrong_is_left_to_pyav(folder: Path, name: str, reason: str) -> None:
    cut = 7 if name == "edited.mp4" else 0
    for frames in (1, 4, 13, COUNT):
        video = _read(folder / name, frames)
        assert (video.backend, video.total) == ("pyav", COUNT - cut)
        assert _numbers(video) == (video.indices + cut).tolist()
        assert np.allclose(video.times, video.indices / 30, atol=1e-3)
        assert video.duration == pytest.approx((COUNT - cut) / 30, abs=2e-3)
    if HAS_DECORD:
        with pytest.raises(InputFileError, match=f"decord cannot be relied on.*{reason}"):
            read_video(folder / name, backend="decord")


def test_seeking_and_decoding_in_order_agree(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix == ".avi" or file.name == "vp8.webm":
            continue
        listing = frame_list.list_frames(file, "")
        for frames in (3, 10):
            video = _read(file, frames, backend="pyav")
            assert np.allclose(listing.times[video.indices], video.times)
            again = module._sized(file, listing, frames, None, None, None)
            decode.fill_in_order(file, listing, again.indices, again.frames, "")
            assert np.array_equal(again.frames, video.frames), file


@needs_decord
def test_auto_prefers_decord(folder: Path) -> None:
    assert read_video(folder / "plain.mp4", 2).backend == "decord"
    assert read_video(str(folder / "plain.mp4"), 2).path == folder / "plain.mp4"


def test_times_are_those_of_the_file(folder: Path) -> None:
    video = _read(folder / "uneven.mp4", COUNT)
    expected = (np.array(UNEVEN) - UNEVEN[0]) * float(BASE)
    assert np.allclose(video.times, expected, atol=1e-6)
    plain = _read(folder / "late.mp4", COUNT)
    assert np.allclose(plain.times, np.arange(COUNT) / 30)
    assert plain.duration == pytest.approx(COUNT / 30)
    one = _read(folder / "one.mp4", 32)
    assert (one.total, one.times.tolist(), one.indices.tolist()) == (1, [0.0], [0])
    assert _numbers(one) == [5]
    assert one.duration == pytest.approx(1 / 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int, backend: module.Backend) -> None:
    # What PyAV calls a rotation turns the stored picture counterclockwise.
    turns = rotation // 90
    upright = (64, 96) if turns % 2 else (96, 64)
    file = _encode(
        tmp_path / "turned.mp4",
        range(20),
        rotation=rotation,
        draw=lambda number: np.rot90(_picture(number, *upright), -turns),
    )
    video = _read(file, 6, backend=backend)
    assert video.frames.shape == (6, upright[1], upright[0], 3)
    assert _numbers(video) == video.indices.tolist()
    other = _read(file, 6, backend="pyav")
    assert np.abs(video.frames.astype(int) - other.frames).max() <= 1


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_mirrored_videos_are_made_upright(tmp_path: Path, rotation: int) -> None:
    """Mirroring and a turn are stored in the display matrix, and decord drops the first."""
    turns = rotation // 90
    size = (64, 96) if turns % 2 else (96, 64)
    upright = _picture(9, *size)
    # Turned the other way and mirrored; which of the two comes first makes half a turn.
    candidates = (np.rot90(upright, -turns)[:, ::-1], np.rot90(upright[:, ::-1], -turns))
    right = []
    for number, stored in enumerate(candidates):
        file = _encode(
            tmp_path / f"{number}.mp4",
            range(3),
            size=(96, 64),
            rotation=rotation,
            mirrored=True,
            draw=lambda _, stored=stored: stored,  # type: ignore[misc]
        )
        video = _read(file, 3)
        assert video.backend == "pyav"
        assert video.frames.shape[1:] == upright.shape
        with av.open(file) as container:
            matrix = cast(Any, next(container.decode(video=0))).side_data["DISPLAYMATRIX"]
            a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        # Where the matrix puts every pixel of the stored picture, one by one.
        rows, columns = np.indices(stored.shape[:2])
        across = np.sign(a) * columns + np.sign(c) * rows
        down = np.sign(b) * columns + np.sign(d) * rows
        expected = np.empty_like(upright)
        expected[down - down.min(), across - across.min()] = stored
        assert np.abs(video.frames[1].astype(int) - expected).mean() < 8
        right.append(bool(np.array_equal(expected, upright)))
    assert any(right)


def test_display_matrix_by_hand() -> None:
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, axis=2)
    turned = frame_list.Orientation(True, flip_rows=True).upright(picture)
    assert np.array_equal(turned, np.rot90(picture))
    assert not frame_list.Orientation(True, flip_rows=True).mirrored
    assert not frame_list.Orientation(False, flip_rows=True, flip_columns=True).mirrored
    assert frame_list.Orientation(False, flip_columns=True).mirrored
    assert frame_list.Orientation(True).mirrored


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_side_shrinks_and_keeps_the_shape(
    folder: Path, tmp_path: Path, backend: module.Backend
) -> None:
    for side, shape in ((1000, (145, 177)), (177, (145, 177)), (100, (82, 100)), (64, (52, 64))):
        video = _read(folder / "odd.mp4", 5, max_side=side, backend=backend)
        assert video.frames.shape == (5, *shape, 3)
        assert _numbers(video) == video.indices.tolist()

    def smooth(number: int) -> NDArray[np.uint8]:
        rows, columns = np.mgrid[0:96, 0:160]
        return np.stack([rows * 2, columns, rows + number], axis=-1).astype(np.uint8)

    file = _encode(tmp_path / "turned.mp4", range(12), size=(160, 96), rotation=90, draw=smooth)
    video = _read(file, 5, max_side=110, backend=backend)
    assert video.frames.shape == (5, 110, 66, 3)
    # A ramp of two a row differs by that much where the samples lie half a row apart.
    other = _read(file, 5, max_side=110, backend="pyav")
    assert np.abs(video.frames.astype(int) - other.frames).max() <= 6
    assert np.abs(video.frames.astype(int) - other.frames).mean() <= 1
    assert read_video(folder / "odd.mp4", 2, max_side=1).frames.shape == (2, 1, 1, 3)


# Which frames -----------------------------------------------------------------------------------


def test_even_rate_is_sampled_like_linspace(folder: Path) -> None:
    for frames in (2, 3, 7, 16, 47):
        exact = np.linspace(0, COUNT - 1, frames)
        indices = _read(folder / "plain.mp4", frames).indices
        assert np.abs(indices - exact).max() <= 0.5 + 1e-6
        assert (indices[0], indices[-1]) == (0, COUNT - 1)
    assert _read(folder / "plain.mp4", 1).indices.tolist() == [0]
    assert len(read_video(folder / "plain.mp4").frames) == 32


def test_uneven_rate_is_sampled_in_time(folder: Path) -> None:
    video = _read(folder / "uneven.mp4", 6)
    every = _read(folder / "uneven.mp4", COUNT).times
    targets = np.linspace(0, every[-1], 6)
    assert video.indices.tolist() == [int(np.abs(every - t).argmin()) for t in targets]


def test_times_take_the_frame_nearest_to_each(folder: Path) -> None:
    uneven = _read(folder / "uneven.mp4", None, fps=1e6)
    wanted = [0.0, 0.31, 0.32, 1.05]
    video = _read(folder / "uneven.mp4", times=wanted)
    nearest = {int(np.abs(uneven.times - time).argmin()) for time in wanted}
    assert video.indices.tolist() == sorted(nearest)
    assert np.array_equal(video.frames, uneven.frames[video.indices])


def test_fps_takes_the_frame_nearest_to_each_tick(folder: Path) -> None:
    plain = folder / "plain.mp4"  # 48 frames, the last at 1.567 s
    assert _read(plain, None, fps=2).indices.tolist() == [0, 15, 30, 45]
    assert _read(plain, 4, fps=2).indices.tolist() == [0, 15, 30, 45]
    # More ticks than frames wanted: these are spread over the whole video.
    assert _read(plain, 3, fps=2).indices.tolist() == [0, 23, 47]
    for fps in (30, 1000, 1e6):
        assert _read(plain, None, fps=fps).indices.tolist() == list(range(COUNT))
    assert _read(plain, None, fps=0.1).indices.tolist() == [0]
    every = _read(folder / "uneven.mp4", COUNT).times
    nearest = [int(np.abs(every - t).argmin()) for t in np.arange(0, every[-1], 1 / 7)]
    assert _read(folder / "uneven.mp4", None, fps=7).indices.tolist() == sorted(set(nearest))


def test_samples_of_any_times() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        total = int(rng.integers(1, 60))
        times = np.cumsum(rng.choice([0.001, 0.04, 0.5, 20.0], total))
        times -= times[0]
        frames = int(rng.integers(1, 70))
        indices = module._sample(times, frames, None)
        assert len(indices) == min(frames, total)
        assert (np.diff(indices) > 0).all()
        assert indices[0] == 0
        assert indices[-1] == (total - 1 if frames > 1 else 0)
        fps = float(rng.choice([0.01, 1, 7, 25]))
        ticks = np.arange(np.floor(times[-1] * fps + 1e-6) + 1) / fps
        indices = module._sample(times, None, fps)
        assert len(indices) <= len(ticks)
        distance = np.abs(times[indices][:, None] - ticks).min(axis=0)
        assert np.allclose(distance, np.abs(times[:, None] - ticks).min(axis=0), atol=1e-5)
    # A gap of 60 s: the frames before and after it, each once.
    times = np.array([0, 0.1, 0.2, 0.3, 60.3, 60.4])
    assert module._sample(times, 4, None).tolist() == [0, 3, 4, 5]
    assert module._sample(times, None, 1).tolist() == [0, 3, 4]


# Memory and files -------------------------------------------------------------------------------


def test_only_the_sampled_frames_fill_memory(tmp_path: Path) -> None:
    """In a process of its own, whose highest memory use is then the reader's."""
    still = np.full((720, 1280, 3), 90, np.uint8)
    fast = {"preset": "ultrafast"}
    size = (1280, 720)
    file = _encode(
        tmp_path / "hd.mp4", range(150), size=size, gop=60, options=fast, draw=lambda _: still
    )
    code = (
        "import resource, sys\n"
        "import av\n"
        "from tokenprune.media.video import read_video\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "few = read_video(sys.argv[1], 8, backend=sys.argv[2])\n"
        "small = read_video(sys.argv[1], 150, max_side=96, backend=sys.argv[2])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(few.frames), len(small.frames), after - before)\n"
    )
    for backend in ["pyav"] + ["decord"] * HAS_DECORD:
        done = subprocess.run(
            [sys.executable, "-c", code, str(file), backend],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        few, small, kilobytes = map(int, done.stdout.split())
        assert (few, small) == (8, 150)
        # All frames would be 415 MB.
        assert kilobytes < 180_000, backend


def test_too_much_for_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 100_000)
    with pytest.raises(ConfigError, match=r"32 frames of 96 x 64 .* Give max_side=(\d+)") as caught:
        read_video(folder / "plain.mp4")
    side = int(str(caught.value).split("max_side=")[1].split()[0])
    assert 32 * 3 * side * side * 2 / 3 == pytest.approx(100_000, rel=0.1)
    read_video(folder / "plain.mp4", max_side=side)


def test_result_outlives_the_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gone.mp4"
    file.write_bytes((folder / "plain.mp4").read_bytes())
    video = read_video(file, 4)
    file.unlink()
    assert _numbers(video) == video.indices.tolist()
    video.frames[:] = 0
    assert repr(video).startswith("Video(4 of 48 frames, 96 x 64, 1.60 s, ")


def test_names_are_paths_and_never_protocols(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("take:1.mp4", "100%.mp4", "größe 1.mp4", "-i.mp4"):
        Path(name).write_bytes((folder / "plain.mp4").read_bytes())
        assert _numbers(_read(Path(name), 2)) == [0, 47]
    # A playlist is no video: FFmpeg would open what it names.
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{folder / 'plain.mp4'}'\n")
    with pytest.raises(InputFileError):
        read_video(playlist)


def test_nothing_is_printed_and_no_file_left_open(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(folder.iterdir())
    read_video(files[0])
    listing = Path("/proc/self/fd")
    before = len(os.listdir(listing)) if listing.exists() else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            read_video(file, 5)
        for file, _ in _bad_files(folder, tmp_path).values():
            with pytest.raises(InputFileError):
                read_video(file)
    assert (len(os.listdir(listing)) if listing.exists() else 0) == before
    assert capfd.readouterr() == ("", "")


# What is wrong ----------------------------------------------------------------------------------


def _moov_first(source: Path, file: Path) -> bytes:
    """The file with its index at the beginning, so that it opens where it is cut off."""
    with av.open(source) as given, av.open(file, "w", options={"movflags": "faststart"}) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return file.read_bytes()


def _sound(file: Path, cover: bool = False) -> Path:
    with av.open(file, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        if cover:
            picture = cast(Any, container.add_stream("mjpeg", rate=1))
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            still = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(still))
            container.mux(picture.encode())
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def _bad_files(folder: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, what its error has to say)."""
    plain = (folder / "plain.mp4").read_bytes()
    front = _moov_first(folder / "plain.mp4", tmp_path / "front.mp4")
    webm = (folder / "b-frames.mkv").read_bytes()
    contents = {
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"hello, this is text\n" * 40, "no video that can be read"),
        "no-index.mp4": (plain[: len(plain) // 2], "its beginning or its index is missing"),
        "start.mp4": (plain[:40], "no video that can be read|there is no video"),
        "cut.mp4": (
            front[: len(front) * 3 // 4],
            r"cut off or damaged: \d\d of 48 frames can be read.*allow_truncated=True",
        ),
        "cut.mkv": (webm[: len(webm) // 2], r"cut off or damaged: \d+ frames, \d\.\d of 1\.6 sec"),
    }
    files = {}
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        files[name] = (tmp_path / name, message)
    (tmp_path / "directory.mp4").mkdir(exist_ok=True)
    if not (tmp_path / "pipe.mp4").exists():
        os.mkfifo(tmp_path / "pipe.mp4")
    files["directory"] = (tmp_path / "directory.mp4", "this is a directory")
    files["pipe"] = (tmp_path / "pipe.mp4", "no regular file")
    files["missing"] = (tmp_path / "missing.mp4", "no such file")
    files["long name"] = (tmp_path / ("x" * 400), "no such file|cannot be read")
    files["sound"] = (_sound(tmp_path / "sound.mp4"), "no video in this file, only: audio")
    files["cover"] = (_sound(tmp_path / "cover.mp4", cover=True), "no video in this file")
    return files


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_bad_files_are_errors_of_one_line_that_name_the_file(
    folder: Path, tmp_path: Path, backend: module.Backend
) -> None:
    for name, (file, message) in _bad_files(folder, tmp_path).items():
        with pytest.raises(InputFileError, match=message) as caught:
            read_video(file, backend=backend)
        text = str(caught.value)
        assert text.startswith(f"{file}: "), name
        assert "\n" not in text, name
        assert text.endswith("."), name
        assert caught.value.__suppress_context__ or caught.value.__context__ is None, name


def test_truncated_files_can_be_read_as_far_as_they_go(folder: Path, tmp_path: Path) -> None:
    front = _moov_first(folder / "b-frames.mp4", tmp_path / "front.mp4")
    cut = tmp_path / "cut.mp4"
    data = front.index(b"mdat")
    for share in (0.5, 0.7, 0.9):
        cut.write_bytes(front[: data + int((len(front) - data) * share)])
        with pytest.raises(InputFileError, match="of 48 frames can be read") as caught:
            read_video(cut)
        said = int(str(caught.value).split("damaged: ")[1].split()[0])
        video = _read(cut, 100, allow_truncated=True)
        assert (video.backend, video.total) == ("pyav", len(video.frames))
        # The decoder may want a packet more for the last frames.
        assert said - 3 <= video.total <= said
        # Near the end, frames are missing between those that are there.
        numbers = _numbers(video)
        assert numbers[: said - 6] == list(range(said - 6))
        assert np.allclose(video.times, np.array(numbers) / 30)
        few = _read(cut, 4, allow_truncated=True)
        assert _numbers(few) == [numbers[index] for index in few.indices]
    # A whole file is the same with and without.
    assert read_video(folder / "plain.mp4", allow_truncated=True).total == COUNT


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_damage_is_an_error_that_has_every_reason(
    folder: Path, tmp_path: Path, backend: module.Backend
) -> None:
    content = bytearray(_moov_first(folder / "b-frames.mp4", tmp_path / "front.mp4"))
    middle = (content.index(b"mdat") + len(content)) // 2
    content[middle : middle + 400] = bytes(400)
    file = tmp_path / "damaged.mp4"
    file.write_bytes(content)
    with pytest.raises(InputFileError) as caught:
        read_video(file, backend=backend)
    text = str(caught.value)
    assert "\n" not in text
    assert str(Path(sys.prefix)) not in text
    assert "/src/video" not in text  # decord's own source
    if backend == "decord":
        assert "decord cannot be relied on for this video (Check failed" in text
    else:
        assert "frames can be decoded" in text
        assert ("decord: Check failed" in text) == (backend == "auto" and HAS_DECORD)
        video = _read(file, 100, backend=backend, allow_truncated=True)
        numbers = _numbers(video)
        # What comes before the damage, and after the next key frame.
        assert numbers[:12] == list(range(12))
        assert numbers[-12:] == list(range(36, COUNT))
        assert len(numbers) < COUNT


def test_any_cut_of_a_file_is_a_video_or_an_input_error(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    for name in ("b-frames.mp4", "vp9.webm", "stream.ts", "mpeg4.avi"):
        whole = (folder / name).read_bytes()
        if name == "b-frames.mp4":
            whole = _moov_first(folder / name, tmp_path / "front.mp4")
        for length in range(1, len(whole), max(1, len(whole) // 16)):
            cut.write_bytes(whole[:length])
            try:
                video = _read(cut, 5, allow_truncated=True)
            except InputFileError:
                continue
            assert _numbers(video)[0] == 0, (name, length)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames=0 must be a whole number of at least 1"),
        ({"frames": -3}, "frames=-3"),
        ({"frames": 2.5}, "frames=2.5"),
        ({"frames": True}, "frames=True"),
        ({"frames": None}, "Give one"),
        ({"times": []}, "must be rising seconds"),
        ({"times": [1.0, 1.0]}, "must be rising seconds"),
        ({"times": [-1.0]}, "must be rising seconds"),
        ({"times": [1.0], "fps": 2}, "Give one of them"),
        ({"times": [1.0, 1000.0]}, "there is no frame at 1000.0 s"),
        ({"fps": 0}, "fps=0 must be a number above 0"),
        ({"fps": -1.0}, "fps=-1.0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"fps": "2"}, "fps='2'"),
        ({"max_side": 0}, "max_side=0"),
        ({"backend": "pyaw"}, "Did you mean 'pyav'"),
    ],
)
def test_wrong_arguments_are_config_errors(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_video(folder / "plain.mp4", **arguments)


def test_missing_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    assert read_video(folder / "plain.mp4", 3).backend == "pyav"
    with pytest.raises(MissingPackageError, match="pip install decord"):
        read_video(folder / "plain.mp4", 3, backend="decord")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match="pip install av"):
        read_video(folder / "plain.mp4", 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_title_that_is_no_utf_8_does_not_matter(tmp_path: Path, backend: Any) -> None:
    """Cameras write others; PyAV before its release 19 has to be told."""
    plain, file = _encode(tmp_path / "plain.mkv"), tmp_path / "titled.mkv"
    with av.open(str(plain)) as source, av.open(str(file), "w") as target:
        target.metadata["title"] = "a title of bytes"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    file.write_bytes(
        file.read_bytes().replace(b"a title of bytes", b"a title of \xff\xfe\xe4\xf6!")
    )
    assert len(read_video(file, 4, backend=backend).frames) == 4


def test_importing_the_room_imports_no_decoder() -> None:
    code = (
        "import sys\n"
        "import tokenprune.media\n"
        "assert tokenprune.media.__all__ == ['Video', 'load_image', 'read_video']\n"
        "assert not {'av', 'decord', 'PIL', 'numpy'} & set(sys.modules)\n"
        "tokenprune.media.read_video\n"
        "tokenprune.media.load_image\n"
        "assert not {'av', 'decord', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
