"""What stands in ``--model_args``: read, checked and explained before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.arguments import parse_options
from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError, did_you_mean

FRAMES = 32
"""Frames read of a video where nothing is said, as in lmms-eval's own models."""

_OPTION = "option_"
_REQUIRED = ("pretrained", "method", "keep")
_KNOWN = (
    *_REQUIRED,
    "positions",
    "scope",
    "options",
    "max_frames_num",
    "fps",
    "max_side",
    "device",
    "batch_size",
)


@dataclass(frozen=True)
class Arguments:
    """What was asked for.

    Attributes
    ----------
    pretrained
        Folder of a checkpoint, a name that transformers can find, or ``"bundled"``.
    pruning
        Method, budget, positions, scope and options.
    max_frames_num
        Frames read of a video, spread evenly; with `fps`, the most there may be.
    fps
        Frames read per second of video, or None.
    max_side
        Pixels that a frame's longer side is shrunk to, or None.
    device
        Where the model runs; None is the GPU where there is one.
    """

    pretrained: str
    pruning: PruningConfig
    max_frames_num: int = FRAMES
    fps: float | None = None
    max_side: int | None = None
    device: str | None = None


def read_arguments(values: Mapping[str, Any]) -> Arguments:
    """Read the arguments as lmms-eval parsed them.

    Parameters
    ----------
    values
        Name -> bool, int, float or text. A method's options come one by one as ``option_NAME`` or
        together as ``options``, an object in JSON.

    Returns
    -------
    Arguments

    Raises
    ------
    ConfigError
        For a missing or an unknown argument, or a value that it cannot take.
    UnknownMethodError, OptionError, BudgetError
        As `tokenprune.PruningConfig`.
    """
    for name in values:
        if name not in _KNOWN and not name.startswith(_OPTION):
            raise ConfigError(
                f"model_args has no {name!r}. {did_you_mean(name, (*_KNOWN, f'{_OPTION}NAME'))}"
            )
    for name in _REQUIRED:
        if values.get(name) in (None, ""):
            raise ConfigError(
                f"model_args lacks {name}. Give all of pretrained, method and keep, for example "
                "pretrained=bundled,method=cls-attention,keep=0.25; keep=1.0 prunes nothing."
            )
    if str(values.get("batch_size", 1)) != "1":
        raise ConfigError(
            f"batch_size={values['batch_size']}: questions are asked one by one. Leave "
            "--batch_size out, or give 1."
        )
    fps = values.get("fps")
    if fps is not None and (isinstance(fps, bool | str) or not 0 < fps < float("inf")):
        raise ConfigError(f"fps={fps!r} is no number of frames a second. Give one above 0.")
    frames = _count(values, "max_frames_num")
    device = values.get("device")
    return Arguments(
        pretrained=str(values["pretrained"]),
        pruning=PruningConfig(
            str(values["method"]),
            values["keep"],
            values.get("positions", "original"),
            _options(values),
            values.get("scope", "item"),
        ),
        max_frames_num=FRAMES if frames is None else frames,
        fps=None if fps is None else float(fps),
        max_side=_count(values, "max_side"),
        device=None if device is None else str(device),
    )


def _count(values: Mapping[str, Any], name: str) -> int | None:
    """Return a whole number of at least 1, or None where the argument was left out."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is no whole number of at least 1.")
    return value


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's options, whichever way they were given."""
    given = values.get("options", {})
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"options={given} is not JSON ({error}). Write for example "
                'options={"estimator": "jvp"}, or option_estimator=jvp.'
            ) from None
    if not isinstance(given, Mapping):
        raise ConfigError(f"options={given!r} is not an object of names and values.")
    options = dict(given)
    for name, value in values.items():
        if not name.startswith(_OPTION):
            continue
        # Text that lmms-eval left as text may still be JSON: null, a list.
        read = parse_options([f"{name.removeprefix(_OPTION)}={value}"])
        ((option, parsed),) = read.items()
        if option in options:
            raise ConfigError(f"the option {option} came twice, in options and as {name}.")
        options[option] = parsed if isinstance(value, str) else value
    return options
