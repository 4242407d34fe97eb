"""When a frame was shown: from the file, through processors, to what a model is told.

Recordings are made here with PyAV, frame by frame with their time stamps: an even rate, a variable
one as phones make it, and a gap as a dropped connection leaves it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tokenprune_hf
from tests.core.test_video import BACKENDS, _encode, _numbers
from tests.vllm import checkpoints
from tokenprune.media.video import Backend, Video, read_video
from tokenprune_hf.loading import frames_and_metadata

_COUNT = 24

_STEPS = np.random.default_rng(3).integers(900, 9000, _COUNT - 1)
RECORDINGS: dict[str, tuple[Fraction, list[int]]] = {
    # Ticks a second, and the time stamps.
    "even": (Fraction(1, 30), list(range(_COUNT))),
    "ntsc": (Fraction(1, 30000), [1001 * at for at in range(_COUNT)]),
    "variable": (Fraction(1, 90000), [0, *np.cumsum(_STEPS).tolist()]),
    "gap": (Fraction(1, 25), [at + (1500 if at > 9 else 0) for at in range(_COUNT)]),
    "half the rate": (Fraction(1, 25), [at if at < 12 else 2 * at - 12 for at in range(_COUNT)]),
    "late": (Fraction(1, 1000), [5000 + 40 * at * at for at in range(_COUNT)]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every recording, as H.264 with B-frames."""
    folder = tmp_path_factory.mktemp("recordings")
    return {
        name: _encode(folder / f"{name}.mp4", range(_COUNT), stamps=stamps, base=base)
        for name, (base, stamps) in RECORDINGS.items()
    }


def true_times(name: str) -> NDArray[np.float64]:
    """Return when each frame of a recording is shown, from its first on."""
    base, stamps = RECORDINGS[name]
    return np.array([float((stamp - stamps[0]) * base) for stamp in stamps])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDINGS)
def test_frames_have_their_own_times(name: str, backend: Backend, files: dict[str, Path]) -> None:
    expected = true_times(name)
    for count in (1, 5, _COUNT):
        video = read_video(files[name], count, backend=backend)
        assert video.backend == backend
        assert _numbers(video) == video.indices.tolist()
        assert np.allclose(video.times, expected[video.indices], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, _COUNT])
@pytest.mark.parametrize("name", RECORDINGS)
def test_index_over_rate_is_a_frames_time(name: str, count: int, files: dict[str, Path]) -> None:
    video = read_video(files[name], count)
    frames, metadata = frames_and_metadata(video)
    indices = metadata["frames_indices"]
    assert frames is video.frames
    assert all(type(index) is int for index in indices)
    told = np.array(indices) / metadata["fps"]
    # Only a clock of 90 kHz has times between the ticks.
    exact = 5e-4 if name == "variable" else 1e-9
    assert np.abs(told - true_times(name)[video.indices]).max() <= exact
    assert metadata["duration"] == video.duration
    assert metadata["total_num_frames"] >= len(video.times)
    # Servers check both, and some take a tick for whole milliseconds.
    assert 500 < metadata["fps"] <= 1000


def test_frames_without_times_are_two_a_second() -> None:
    frames = np.zeros((5, 2, 2, 3), np.uint8)
    _, metadata = frames_and_metadata(frames)
    told = [index / metadata["fps"] for index in metadata["frames_indices"]]
    assert told == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert metadata["duration"] == 2.5
    assert 5 / metadata["total_num_frames"] * metadata["fps"] == 2.0


def test_frames_closer_than_a_tick() -> None:
    times = np.arange(8) / 5000
    video = Video(
        np.zeros((8, 2, 2, 3), np.uint8), times, np.arange(8), 8, 8 / 5000, Path(), "pyav"
    )
    _, metadata = frames_and_metadata(video)
    told = np.array(metadata["frames_indices"]) / metadata["fps"]
    assert np.abs(told - times).max() <= 5e-4
    assert metadata["total_num_frames"] >= 8


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The processors of the families that read times."""
    return {
        family: checkpoints.hf_processor(
            family, checkpoints.save(family, tmp_path_factory.mktemp(family))
        )
        for family in ("qwen2_5_vl", "qwen3_vl")
    }


@pytest.mark.parametrize("count", [2, 7, 16, _COUNT])
@pytest.mark.parametrize("name", RECORDINGS)
def test_qwen3_vl_reads_the_seconds_of_every_pair(
    name: str, count: int, files: dict[str, Path], processors: dict[str, Any]
) -> None:
    processor = processors["qwen3_vl"]
    video = read_video(files[name], count)
    inputs = tokenprune_hf.ask(processor, "w7", video=video)
    prompt = processor.decode(inputs["input_ids"][0]).replace(" ", "")
    told = [float(one) for one in re.findall(r"<(\d+\.\d)seconds>", prompt)]
    times = true_times(name)[video.indices].tolist()
    times += times[-1:] * (len(times) % 2)
    means = [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]
    assert len(told) == len(means) == int(inputs["video_grid_thw"][0, 0])
    if name == "variable":
        assert np.abs(np.array(told) - means).max() <= 0.05 + 5e-4
    else:
        assert told == [float(f"{mean:.1f}") for mean in means]


@pytest.mark.parametrize("count", [2, 7, 16, _COUNT])
@pytest.mark.parametrize("name", RECORDINGS)
def test_qwen2_5_vl_is_told_the_mean_step(
    name: str, count: int, files: dict[str, Path], processors: dict[str, Any]
) -> None:
    video = read_video(files[name], count)
    inputs = tokenprune_hf.ask(processors["qwen2_5_vl"], "w7", video=video)
    steps = np.diff(true_times(name)[video.indices])
    # A temporal patch holds two frames; one tick in all the time of the video is lost at most.
    error = 2 * 0.5e-3 * 2 / count
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * steps.mean(), abs=error)


def test_a_part_of_a_video_has_the_steps_of_its_frames(
    files: dict[str, Path], processors: dict[str, Any]
) -> None:
    """Frames asked for by their times say nothing of the rest of the file."""
    video = read_video(files["gap"], times=[60.4, 60.6, 60.8, 61.0 - 0.04])
    inputs = tokenprune_hf.ask(processors["qwen2_5_vl"], "w7", video=video)
    steps = np.diff(video.times)
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * steps.mean(), rel=1e-3)
