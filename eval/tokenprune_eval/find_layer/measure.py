"""`find_layer`: which decoder layer of a model finds a needle in a video.

FlexSelect ranks a video's tokens by the question's attention at one layer. Which one that should
be is measured: one frame is replaced by a picture, the needle, the model is asked about it, and a
layer is as good as the share of its top K tokens that lie in that frame, K being the tokens of one
frame. Source: FlexSelect (arXiv 2506.00993) and the needle scripts of its released code.

The released scripts reduce heads and question tokens by the mean for LLaVA and InternVL and by the
maximum for Qwen, and then run with the maximum everywhere. Here the reduction that is measured is
the one that is written into the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tokenprune.errors import (
    ConfigError,
    MissingPackageError,
    TokensError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.families.registry import attending_layers
from tokenprune.media.video import Video
from tokenprune.question.attention import Reduction, question_scores
from tokenprune.question.reader import PromptReader
from tokenprune.selectors.base import top_k
from tokenprune.selectors.frame_sets import frame_sets
from tokenprune_eval.find_layer.needles import Needle
from tokenprune_eval.shared.left_out import LeftOut, around
from tokenprune_hf.encoding import encode_media
from tokenprune_hf.loading import ask
from tokenprune_hf.prefix import sliding_window
from tokenprune_hf.reading import prompt_items
from tokenprune_hf.vision import VisionModel, vision_model

FRAMES_PER_SET = 64
"""The most frames that are ranked together: FlexSelect's own default."""

_BORDER = 5
"""Frames at either end of a video that are never replaced, as published."""


@dataclass(frozen=True)
class Run:
    """One needle in one video at one depth, seen by every layer.

    Attributes
    ----------
    video, needle
        Which of the videos, which of the needles.
    frames
        The frames that were replaced: those of one step of the grid, two in Qwen-VL.
    grid
        (T, R, W) of the video's tokens.
    tokens
        K, the tokens of one step: R * W.
    ranked
        The tokens they were ranked among: those of all steps, or of the needle's set of 64.
    found
        For each layer, how many of its top K tokens are the needle's.
    """

    video: int
    needle: int
    frames: tuple[int, ...]
    grid: tuple[int, int, int]
    tokens: int
    ranked: int
    found: tuple[int, ...]

    @property
    def recall(self) -> tuple[float, ...]:
        """The share of each layer's top K tokens that are the needle's."""
        return tuple(found / self.tokens for found in self.found)


@dataclass(frozen=True, eq=False)
class LayerRecall:
    """What `find_layer` measured.

    Attributes
    ----------
    layers
        The layers that were measured, rising, from 0: those of full attention.
    runs
        One for each video, needle and repeat, in this order.
    planned
        How many runs there were to be; in a finished result ``len(runs)`` and those left out.
    reduction
        How heads and question tokens became one score per token.
    seed
        Of the depths.
    """

    layers: tuple[int, ...]
    runs: tuple[Run, ...]
    planned: int
    reduction: Reduction
    seed: int

    @property
    def recall(self) -> tuple[float, ...]:
        """The mean recall of each of `layers`."""
        # fsum: layers with the same recalls in another order tie to the last bit.
        columns = zip(*(run.recall for run in self.runs), strict=True)
        return tuple(math.fsum(column) / len(self.runs) for column in columns)

    @property
    def best(self) -> int:
        """The layer with the highest recall, the lowest of those that share it."""
        recall = self.recall
        return self.layers[recall.index(max(recall))]

    @property
    def chance(self) -> float:
        """The recall of a random ranking."""
        return math.fsum(run.tokens / run.ranked for run in self.runs) / len(self.runs)

    def intervals(self, level: float = 0.95) -> tuple[tuple[float, float] | None, ...]:
        """Return a t interval of each layer's mean recall, cut off at 0 and 1.

        Runs are taken to be independent of each other, also those in the same video.

        Parameters
        ----------
        level
            How sure the interval is.

        Returns
        -------
        tuple
            (low, high) of each of `layers`; None where there is a single run.

        Raises
        ------
        MissingPackageError
            If scipy is not installed.
        """
        if len(self.runs) < 2:
            return (None,) * len(self.layers)
        try:
            from scipy import stats
        except ImportError:
            raise MissingPackageError(
                "the intervals need scipy. Install it with: pip install scipy"
            ) from None
        values = np.array([run.recall for run in self.runs])  # [runs, layers]
        reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values, axis=0)
        return tuple(
            (max(0.0, mean - float(by)), min(1.0, mean + float(by)))
            for mean, by in zip(self.recall, reach, strict=True)
        )

    @property
    def found(self) -> bool:
        """Whether the best layer's interval, or single recall, lies above chance."""
        place = self.layers.index(self.best)
        bounds = self.intervals()[place]
        return (self.recall[place] if bounds is None else bounds[0]) > self.chance


def find_layer(
    model: Any,
    processor: Any,
    videos: Sequence[Video | NDArray[np.uint8]],
    needles: Sequence[Needle],
    *,
    reduction: Reduction = "max",
    repeats: int = 1,
    seed: int = 0,
    on_run: Callable[[LayerRecall], None] | None = None,
    left_out: LeftOut | None = None,
) -> LayerRecall:
    """Measure Recall@K of needles at every decoder layer of a model.

    For each video, needle and repeat, a frame at a random depth is replaced by the needle, the
    video is encoded and read once, and every layer's top K tokens are counted. Up to 64 steps of
    the grid are ranked together; of longer videos it is FlexSelect's set of every G-th step that
    holds the needle, because sets are ranked apart.

    Parameters
    ----------
    model
        A vision-language model of transformers that takes videos.
    processor
        Its processor.
    videos
        What `read_video` returned, or frames uint8 [T, H, W, 3].
    needles
        What to hide; see `drawn_needles` and `read_needles`.
    reduction
        ``"max"`` or ``"mean"`` over heads and question tokens.
    repeats
        At how many depths each needle is hidden in each video.
    seed
        Of the depths; nothing else is drawn.
    on_run
        Called after each run with all that is measured until then.
    left_out
        Notes videos and runs that fail; a run that fails is left out for all layers. None: the
        first one that fails is an error.

    Returns
    -------
    LayerRecall

    Raises
    ------
    ConfigError
        If an argument has a value it cannot take, or a video is too short; before anything is run.
    UnsupportedModelError
        If the model takes no videos or its layers cannot be read.
    TokensError
        If the model's attention is not finite.
    NothingLeftError
        If no run is left.
    """
    _check_arguments(videos, needles, reduction, repeats, seed)
    vision = vision_model(model)
    layers = _full_attention_layers(vision)
    if getattr(processor, "video_processor", None) is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} takes no videos, and needles are hidden in videos. Name a "
            "model that takes them; images alone need no reference layer of their own."
        )
    tower = getattr(model.config, "vision_config", None)
    per_step = int(getattr(tower, "temporal_patch_size", None) or 1)
    places: dict[int, range] = {}
    for number, video in enumerate(videos):
        with around(left_out, _name(video, number)):
            places[number] = _places(video, number, per_step)
    planned = len(videos) * len(needles) * repeats
    runs: list[Run] = []

    def measure(number: int, which: int, step: int) -> Run:
        video, needle = videos[number], needles[which]
        total = len(_frames(video))
        frames = tuple(range(step * per_step, min((step + 1) * per_step, total)))
        hidden = _hide(video, frames, needle.image)
        inputs = ask(processor, needle.question, video=hidden).to(model.device)
        grid, ranked, found = _read(vision, inputs, total, per_step, step, layers, reduction)
        return Run(number, which, frames, grid, grid[1] * grid[2], ranked, found)

    for number, within in places.items():
        for which, needle in enumerate(needles):
            order = np.random.default_rng([seed, number, which]).permutation(within)
            for repeat in range(repeats):
                step = int(order[repeat % len(order)])
                before = len(runs)
                name = f"{_name(videos[number], number)}, {needle.name} in step {step}"
                with around(left_out, name):
                    runs.append(measure(number, which, step))
                if on_run is not None and len(runs) > before:
                    on_run(LayerRecall(layers, tuple(runs), planned, reduction, seed))
    if left_out is not None:
        left_out.check("run", len(runs))
    return LayerRecall(layers, tuple(runs), planned, reduction, seed)


def _check_arguments(
    videos: Sequence[Any],
    needles: Sequence[Needle],
    reduction: str,
    repeats: int,
    seed: int,
) -> None:
    if reduction not in get_args(Reduction):
        known = did_you_mean(reduction, get_args(Reduction))
        raise ConfigError(f"reduction={reduction!r} is no reduction. {known}")
    if not videos or not needles:
        raise ConfigError("there is nothing to measure: give at least one video and one needle.")
    for name, value, least in (("repeats", repeats, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}.")


def _full_attention_layers(vision: VisionModel) -> tuple[int, ...]:
    """Return the layers whose attention can rank a whole video."""
    layers = list(vision.language_model().layers)
    full = tuple(
        number
        for number in attending_layers(vision.model.config.get_text_config())
        if (attention := getattr(layers[number], "self_attn", None)) is None
        or sliding_window(attention) is None
    )
    if not full:
        raise UnsupportedModelError(
            f"all {len(layers)} decoder layers of {type(vision.model).__name__} have a sliding "
            "window or a state in place of keys, so none of them can rank a video. Use "
            "flexselect-lite, or a method that needs no language model (see `tokenprune methods`)."
        )
    return full


# The needle in the video ------------------------------------------------------------------------


def _name(video: Video | NDArray[np.uint8], number: int) -> str:
    return str(video.path) if isinstance(video, Video) else f"video {number}"


def _frames(video: Video | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [T, H, W, 3]."""
    return video.frames if isinstance(video, Video) else video


def _places(video: Video | NDArray[np.uint8], number: int, per_step: int) -> range:
    """Return the steps of the grid in which a needle may lie.

    As published, frames 5 to T - 6; in a video of fewer than 11 frames, any step but the first and
    the last.
    """
    name = _name(video, number)
    frames = _frames(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ConfigError(
            f"{name}: frames are uint8 [T, H, W, 3], and these are {frames.dtype} "
            f"{list(frames.shape)}."
        )
    total = len(frames)
    steps = -(-total // per_step)
    if steps < 3:
        raise ConfigError(
            f"{name}: a video of {total} frames is too short to hide a needle between its first "
            f"and its last. This model needs {2 * per_step + 1} frames or more."
        )
    if total <= 2 * _BORDER:
        return range(1, steps - 1)
    return range(_BORDER // per_step, (total - _BORDER - 1) // per_step + 1)


def _hide(
    video: Video | NDArray[np.uint8], frames: Sequence[int], needle: Image.Image
) -> Video | NDArray[np.uint8]:
    """Return the video with some of its frames replaced.

    The needle is whole and undistorted; what it leaves free has the colour of its upper left
    corner.
    """
    changed = _frames(video).copy()
    height, width = changed.shape[1:3]
    picture = needle.convert("RGB")
    corner: Any = picture.getpixel((0, 0))
    changed[list(frames)] = np.asarray(ImageOps.pad(picture, (width, height), color=corner))
    return replace(video, frames=changed) if isinstance(video, Video) else changed


# Reading it -------------------------------------------------------------------------------------


def _read(
    vision: VisionModel,
    inputs: Any,
    total: int,
    per_step: int,
    step: int,
    layers: Sequence[int],
    reduction: Reduction,
) -> tuple[tuple[int, int, int], int, tuple[int, ...]]:
    """Encode and read one video with its question, once for all layers.

    Parameters
    ----------
    inputs
        What the processor made of them.
    total, per_step
        Frames of the video, and of one step of the grid.
    step
        Where the needle is.

    Returns
    -------
    grid
        (T, R, W).
    ranked
        How many tokens were ranked together.
    found
        For each layer, how many of its top R * W tokens are in the needle's step.
    """
    arguments = dict(inputs)
    with torch.no_grad():
        encoded = encode_media(vision, arguments, ())
        items = prompt_items(vision, arguments, encoded, ("query_attention",))
        (item, *others) = [one for own in items.values() for one in own]
        if others or item.grid[0] != -(-total // per_step):
            raise UnsupportedModelError(
                f"{type(vision.model).__name__} reads {total} frames of a video as "
                f"{1 + len(others)} items, the first of {item.grid[0]} steps, so a needle's tokens "
                "cannot be told. Name a model that reads a video's frames one by one or in pairs."
            )
        reader = cast(PromptReader, item.query_attention)
        tokens = item.grid[1] * item.grid[2]
        sets = frame_sets(item.grid, FRAMES_PER_SET)
        own = sets[step % len(sets)]
        (seen,) = reader.read_layers([own], layers, False, False)
        found = []
        for layer in layers:
            scores = question_scores(seen[layer], reduction)
            if not bool(scores.isfinite().all()):
                raise TokensError(
                    f"{item.label}: the attention of layer {layer} holds NaN or infinite values. "
                    "Check the model's dtype (float16 overflows; bfloat16 or float32 do not)."
                )
            best = own[top_k(scores[None], tokens)[0].to(own.device)]
            found.append(int((best // tokens == step).sum()))
    return item.grid, len(own), tuple(found)
