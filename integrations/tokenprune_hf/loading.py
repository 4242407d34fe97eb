"""A checkpoint and a question, ready to be pruned: what the commands share.

`load` opens a model with its processor and says clearly why it cannot; `ask` lays out a question
about an image or a video as the model's own chat template does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.errors import InputFileError, TokenPruneError, UnsupportedModelError, reason_of
from tokenprune.media.video import Video
from tokenprune.providers import model_path
from tokenprune_hf.any_model import check_type
from tokenprune_hf.encoder_inputs import VIDEO_FRAMES
from tokenprune_hf.resized import Resized

if TYPE_CHECKING:
    import torch

_FPS = 2.0
"""Frames per second of frames that come without their times: the rate at which most video models
sample."""

_CLOCKS = [whole / part for part in (1.0, 1.001) for whole in range(1000, 500, -1)]
"""Ticks a second in which times are given: multiples of every rate up to 1000, NTSC's included.
No faster ones: some processors count a tick in whole milliseconds."""


def load(
    name: str, *, device: torch.device | str | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Return a model in eval mode, on the GPU where there is one, and its processor.

    Parameters
    ----------
    name
        Folder of a checkpoint, a name that transformers can find, or one that a package brings
        (see `tokenprune.providers`): ``"bundled"`` is the bundled model.
    device
        Where to put it; None for the GPU or, where there is none, the CPU.
    dtype
        Of its weights, such as ``"bfloat16"``; None for the checkpoint's.

    Raises
    ------
    MissingPackageError
        If what brings a named model is not installed.
    UnsupportedModelError
        If it cannot be pruned; said before weights are read.
    InputFileError
        If it cannot be loaded.
    """
    import torch
    import transformers

    path = model_path(name)
    hf: Any = transformers  # much of it is not typed
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    try:
        check_type(hf.AutoConfig.from_pretrained(path, trust_remote_code=False), name)
        processor = hf.AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model = hf.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or "auto", trust_remote_code=False
        )
    except TokenPruneError:
        raise
    except Exception as error:  # what is wrong with a checkpoint can show in any way
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"the model {name} brings code of its own, which tokenprune does not run. If you "
                "trust it, load the model with transformers and pass it to tokenprune_hf.prune."
            ) from None
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputFileError(
            f"the model {name} cannot be loaded ({reason}). Give the folder of a checkpoint with "
            "its processor, or a name that transformers can find."
        ) from None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), processor


def ask(
    processor: Any,
    question: str,
    *,
    image: Image.Image | Resized | None = None,
    video: Video | NDArray[np.uint8] | Resized | None = None,
) -> Any:
    """Return what the processor makes of a question about one image or one video.

    Parameters
    ----------
    processor
        Of the model.
    question
        The text after the image or video.
    image
        The image, or None. One that `tokenprune_hf.resize` has made smaller is read as such.
    video
        What `read_video` or `tokenprune_hf.resize` returned, or frames uint8 [T, H, W, 3], taken to
        be two a second.

    Returns
    -------
    transformers.BatchFeature
        A batch of one prompt that ends where the answer begins. For models that are given videos
        as images it holds ``video_frames`` besides, which ``model.generate`` takes inside a
        `tokenprune_hf.prune` block only.
    """
    kind = "image" if video is None else "video"
    medium: Any = image if video is None else video
    more: dict[str, Any] = {}
    if isinstance(medium, Resized):
        processor = medium.processor(processor)
        more = {"images_kwargs": dict(medium.arguments)} if medium.arguments else {}
        medium = medium.content
    text = prompt_text(processor, question, kind)
    if kind == "image":
        return processor(text=[text], images=[medium], return_tensors="pt", **more)
    frames, metadata = frames_and_metadata(medium)
    inputs = processor(
        text=[text],
        videos=[frames],
        videos_kwargs={"do_sample_frames": False, "video_metadata": [metadata]},
        return_tensors="pt",
    )
    if not any(name.startswith("pixel_values_videos") for name in inputs):
        inputs[VIDEO_FRAMES] = [len(frames)]
    return inputs


def prompt_text(processor: Any, question: str, kind: str) -> str:
    """Return a question about one ``"image"`` or ``"video"`` in the model's chat template."""
    if getattr(processor, "chat_template", None):
        content = [{"type": kind}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        text: str = processor.apply_chat_template([message], add_generation_prompt=True)
        return text
    return f"{getattr(processor, f'{kind}_token')}\n{question}"


def frames_and_metadata(
    video: Video | NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Return frames uint8 [T, H, W, 3] and what processors want to know of the video they are of.

    Processors and servers work out a frame's time as its index over the rate. No rate of a file
    gives the times of a recording with gaps or of a variable rate. So the indices count ticks of a
    clock here, `fps` is ticks a second, and each frame has its own time. `total_num_frames` makes
    the mean step between frames right, which is all that models with one step for a whole video
    (Qwen2.5-VL) are told.

    Parameters
    ----------
    video
        As for `ask`.
    """
    if isinstance(video, Video):
        frames, times, duration = video.frames, video.times, video.duration
    else:
        frames, times, duration = video, np.arange(len(video)) / _FPS, len(video) / _FPS
    count = len(times)
    clock, ticks = _in_ticks(times)
    step = float(times[-1] - times[0]) / (count - 1) if count > 1 else duration
    return frames, {
        "fps": clock,
        "duration": duration,
        # No video has fewer frames than were taken of it.
        "total_num_frames": max(count, round(count * step * clock)),
        "frames_indices": ticks,
        "video_backend": "pyav",
    }


def _in_ticks(times: NDArray[np.float64]) -> tuple[float, list[int]]:
    """Return a clock, in ticks a second, and float64 times [T] as numbers of its ticks.

    A clock whose ticks hit all times within a microsecond, where there is one: for recordings of
    any usual rate, with gaps or without. Otherwise times are rounded to milliseconds.
    """
    for clock in _CLOCKS:
        ticks = times * clock
        if np.abs(ticks - np.rint(ticks)).max() <= 1e-6 * clock:
            break
    else:
        clock = _CLOCKS[0]
    return clock, np.rint(times * clock).astype(np.int64).tolist()
