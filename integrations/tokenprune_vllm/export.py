"""`tokenprune export`: a checkpoint that says itself how it is to be pruned.

``vllm serve OUT`` serves it pruned with no further flag, wherever the plugin is installed, and
refuses to start where it is not. transformers loads it as before, unpruned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.config import Application, PruningConfig
from tokenprune.errors import InputFileError, reason_of
from tokenprune.files import making_folder
from tokenprune.providers import model_path
from tokenprune_vllm.engine import pruning_overrides, read_config
from tokenprune_vllm.settings import source_of

if TYPE_CHECKING:
    from tokenprune.masks import PooledBlocks

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5"})


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    pruning: PruningConfig,
    *,
    request_methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    masks: str | os.PathLike[str] | PooledBlocks | None = None,
    apply: Application = "drop",
    proportional_attention: bool = False,
    copy: bool = False,
) -> Path:
    """Write a checkpoint that vLLM serves pruned.

    Parameters
    ----------
    model
        A folder, a name on the model hub that is downloaded if need be, or ``"bundled"``.
    out
        The folder to make; it must not be there yet, or be empty.
    pruning
        How to prune; `tokenprune_vllm.settings.UNPRUNED` where there are `masks` alone.
    request_methods
        Methods that a request may name, beside the default's; a mapping gives their options.
    masks
        As for `engine_args`. What is in a heads file becomes a part of the checkpoint's config.
    apply, proportional_attention
        As for `engine_args`.
    copy
        Copy all files. Otherwise files are hard-linked where the file system can, so that
        weights are on the disk once.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    InputFileError
        If there is no checkpoint with safetensors, or `out` is in the way.
    UnsupportedModelError, ConfigError and others
        As for `engine_args`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputFileError(f"{out} is there already. Name a folder that is not, or is empty.")
    source = _folder(model)
    config = read_config(source)
    config.update(
        pruning_overrides(
            config,
            str(model),
            pruning,
            request_methods,
            masks=source_of(masks, inside=True),
            application=apply,
            proportional=proportional_attention,
        )
    )
    if not any(source.glob("*.safetensors")):
        raise InputFileError(
            f"{source} has no *.safetensors in it, and no other weights are read. Save the model "
            "with safetensors first."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with making_folder(out) as made:
        for file in sorted(source.rglob("*")):
            inside = file.relative_to(source)
            if file.is_dir() or file.suffix in _PICKLES or inside == Path("config.json"):
                continue
            if any(part.startswith(".") for part in inside.parts):
                continue
            (made / inside).parent.mkdir(parents=True, exist_ok=True)
            _place(file.resolve(), made / inside, copy)
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
    return out


def _folder(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint, downloading it where a name was given."""
    folder = Path(model_path(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(os.fspath(model), ignore_patterns=sorted(f"*{s}" for s in _PICKLES))
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise InputFileError(
            f"{model} is neither a folder nor a model that can be fetched: {reason_of(error)}."
        ) from error


def _place(source: Path, target: Path, copy: bool) -> None:
    """Link or copy one file."""
    if not copy:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copy2(source, target)
