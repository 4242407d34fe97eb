"""A task's chat messages, with their images and videos, as a model's inputs.

`tokenprune_hf.ask` lays out one image or video and one question; tasks of lmms-eval also have
several of them, in any order, and more than one message.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.errors import PromptError
from tokenprune.media.images import load_image
from tokenprune.media.video import Video, read_video
from tokenprune_hf.encoder_inputs import VIDEO_FRAMES
from tokenprune_hf.loading import frames_and_metadata
from tokenprune_lmms_eval.arguments import Arguments

Message = Mapping[str, Any]
"""``{"role", "content"}``; content is a list of ``{"type": "text", "text"}`` and ``{"type":
"image" or "video", "url"}``, where an image's url may be a PIL image."""


def lay_out(processor: Any, messages: Sequence[Message], arguments: Arguments) -> Any:
    """Return what the processor makes of a conversation that ends where the answer begins.

    Parameters
    ----------
    processor
        Of the model.
    messages
        As lmms-eval's tasks return them.
    arguments
        Say how videos are sampled.

    Returns
    -------
    transformers.BatchFeature
        A batch of one prompt. As in `tokenprune_hf.ask` it may hold ``video_frames`` besides.

    Raises
    ------
    PromptError
        For sound, for parts of a video, and for messages that the model cannot be given.
    InputFileError
        If an image or a video cannot be read.
    """
    turns: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    videos: list[Video] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                content.append({"type": "text", "text": part["text"]})
                continue
            if kind == "image":
                images.append(_image(part["url"]))
            elif kind == "video":
                videos.append(_video(part, arguments))
            else:
                raise PromptError(
                    f"the task has content of the type {kind!r}, and only text, images and videos "
                    "can be asked about. Choose another task."
                )
            content.append({"type": kind})
        turns.append({"role": message["role"], "content": content})

    inputs: dict[str, Any] = {"text": [_text(processor, turns)], "return_tensors": "pt"}
    if images:
        inputs["images"] = images
    if videos:
        inputs["videos"] = [video.frames for video in videos]
        inputs["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [frames_and_metadata(video)[1] for video in videos],
        }
    batch = processor(**inputs)
    if videos and not any(name.startswith("pixel_values_videos") for name in batch):
        if images:
            raise PromptError(
                "one prompt holds images and videos, and this model is given both as pictures: "
                "which of them make a video is not known. Choose a task with one of the two."
            )
        batch[VIDEO_FRAMES] = [len(video.frames) for video in videos]
    return batch


def _text(processor: Any, turns: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt's text, with one placeholder for each image or video."""
    if getattr(processor, "chat_template", None):
        text: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text
    if len(turns) != 1:
        raise PromptError(
            f"the task has {len(turns)} messages and the model has no chat template to join them. "
            "Add one to its processor, or choose a task of one message."
        )
    pieces = []
    for part in turns[0]["content"]:
        kind = part["type"]
        pieces.append(
            part["text"] if kind == "text" else f"{getattr(processor, f'{kind}_token')}\n"
        )
    return "".join(pieces)


def _image(given: Any) -> Image.Image:
    """Return an RGB image, given as one or as a file."""
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, str | os.PathLike):
        return load_image(given)
    raise PromptError(
        f"the task gives an image as {type(given).__name__}. It must be a PIL image or a path."
    )


def _video(part: Mapping[str, Any], arguments: Arguments) -> Video:
    """Return a video's sampled frames."""
    given = part["url"]
    if part.get("start_time") is not None or part.get("end_time") is not None:
        raise PromptError(
            f"the task asks about a part of {given}, and videos are read whole. Cut the file, or "
            "choose another task."
        )
    if not isinstance(given, str | os.PathLike):
        raise PromptError(
            f"the task gives a video as {type(given).__name__}, and only the path of a file can be "
            "read. Choose another task."
        )
    return read_video(
        Path(given), arguments.max_frames_num, fps=arguments.fps, max_side=arguments.max_side
    )
