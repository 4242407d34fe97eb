"""What would stop a run, looked for before its first question.

`check_before_model` is what every run does before it loads the model's weights. `problems_of` is
`tokenprune eval validate`: it gathers everything, also what a run finds out by itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.baselines import resizes
from tokenprune.errors import (
    ConfigError,
    InputFileError,
    TokenPruneError,
    reason_of,
)
from tokenprune.families.base import MIDDLE, SCORING
from tokenprune.media.packages import VIDEO
from tokenprune.packages import check_packages
from tokenprune_eval.data.choose import missing_media
from tokenprune_eval.data.question import DataSet
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.evaluation.store import run_before
from tokenprune_eval.shared.output import OutputError

_BYTES_OF_ANSWER = 1024
"""Of records.jsonl, rounded up: 400 to 700 for answers of a few words."""

_BYTES_OF_REPORT = 8 * 2**20
"""Of report.html with its pictures, rounded up."""

_GIB = 2**30


def check_before_model(settings: Settings, sets: Sequence[DataSet]) -> None:
    """Check what needs no weights; the engine checks the rest when it is made.

    Parameters
    ----------
    settings
        Of the run.
    sets
        Its data, drawn.

    Raises
    ------
    TokenPruneError
        For the first thing that would stop the run later.
    """
    _check_packages(sets)
    _check_several_images(settings, sets)
    _check_box_unit(settings, sets)
    _check_resizing(settings, sets)
    check_folder(settings.out)
    _check_room(settings, sets)
    if settings.engine == "hf":  # the others are asked when they start
        _check_for_transformers(settings)
    _check_letters(settings, sets)


def problems_of(settings: Settings, sets: Sequence[DataSet]) -> list[str]:
    """Return everything that would stop a run, or make questions fail, as far as it can be known.

    Nothing is run and nothing is written.

    Parameters
    ----------
    settings
        Of the run; its methods are known to be there.
    sets
        Its data, drawn.
    """
    checks: list[Callable[[], None]] = [
        partial(_check_packages, sets),
        partial(_check_several_images, settings, sets),
        partial(_check_box_unit, settings, sets),
        partial(_check_resizing, settings, sets),
        partial(_check_media, sets),
        partial(check_folder, settings.out),
        partial(_check_room, settings, sets),
        partial(_check_same_run, settings),
        partial(_check_model, settings),
        partial(_check_letters, settings, sets),
    ]
    if settings.cache is not None:
        checks.append(partial(check_folder, settings.cache, "--cache"))
    if settings.engine == "vllm":
        checks.append(partial(_check_vllm_memory, settings))
    problems = []
    for check in checks:
        try:
            check()
        except TokenPruneError as error:
            problems.append(str(error))
    # A model that cannot be read is found by more than one of them.
    return list(dict.fromkeys(problems))


# Data -------------------------------------------------------------------------------------------


def _check_packages(sets: Sequence[DataSet]) -> None:
    if any(question.kind == "video" for one in sets for question in one.questions):
        check_packages(VIDEO, "eval", "the data holds videos; reading them")


def _check_several_images(settings: Settings, sets: Sequence[DataSet]) -> None:
    if settings.engine == "hf" and not any(map(resizes, settings.method)):
        return
    for one in sets:
        if several := [question.id for question in one.questions if question.further]:
            reason = "need the engine hf. Leave out --engine"
            if settings.engine == "hf":
                reason = "resize makes one image smaller. Leave out resize"
            raise ConfigError(
                f"{len(several)} questions of {one.name} are about several images, for example "
                f"{several[0]}, and {reason}, or these questions."
            )


def _check_media(sets: Sequence[DataSet]) -> None:
    missing = [path for one in sets for path in missing_media(one)]
    if missing:
        shown = ", ".join(map(str, missing[:3]))
        raise ConfigError(
            f"{len(missing)} images or videos are not there, for example {shown}. Put them there, "
            "or say where they lie with --media; a run records questions about them as errors."
        )


def _check_box_unit(settings: Settings, sets: Sequence[DataSet]) -> None:
    """Raise where a box is asked for in pixels, and not every condition shows the same pixels."""
    if settings.box_unit != "pixel" or not any(map(resizes, settings.method)):
        return
    for one in sets:
        if any(question.scoring == "box" for question in one.questions):
            raise ConfigError(
                f"{one.name} asks for boxes, in pixels (--box-unit pixel), and resize makes the "
                "picture smaller: its pixels are others. Leave out resize, or give --box-unit "
                "fraction or thousandth."
            )


def _check_resizing(settings: Settings, sets: Sequence[DataSet]) -> None:
    """Raise where a picture's number of tokens is fixed, or no size is within a budget.

    The first picture of each data set is tried; of a video frames can be left out.
    """
    conditions = [one for one in settings.conditions() if one.resizes]
    if not conditions:
        return
    from transformers import AutoConfig

    from tokenprune.media.images import load_image
    from tokenprune.providers import model_path
    from tokenprune_hf.resizing import Resizer

    processor = _processor(settings.model)
    config = AutoConfig.from_pretrained(model_path(settings.model))
    resizer = Resizer(config, processor, in_vllm=settings.engine == "vllm")
    for one in sets:
        first = next((each for each in one.questions if each.kind == "image"), None)
        if first is None or not first.path.is_file():
            continue  # a picture that is not there is recorded as such
        image = load_image(first.path)
        for condition in conditions:
            resizer(image, condition.keep, halfway=condition.pruned_by is not None)


# The folder -------------------------------------------------------------------------------------


def check_folder(folder: Path, argument: str = "--out") -> None:
    """Make sure that files can be written into a folder, which need not be there; none is made.

    Parameters
    ----------
    folder
        It, or else the lowest folder above it that is there, gets a file that is gone again.
    argument
        Which names another folder.

    Raises
    ------
    OutputError
        If it is a file, or nothing can be written.
    """
    there = _lowest_there(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        where = folder if there == folder else f"{folder}, which would be made in {there}"
        raise OutputError(
            f"nothing can be written to {where}: {reason_of(error)}. Give another folder with "
            f"{argument}."
        ) from None


def _lowest_there(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    return next(one for one in (folder, *folder.parents) if one.exists())


def _check_room(settings: Settings, sets: Sequence[DataSet]) -> None:
    """Raise if the disk has less room than the answers will take, roughly."""
    answers = sum(len(one.questions) for one in sets) * len(settings.conditions())
    needed = answers * _BYTES_OF_ANSWER + _BYTES_OF_REPORT
    there = _lowest_there(settings.out)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{settings.out} has {free / 2**20:,.0f} MiB of room, and {answers:,} answers with "
            f"their report take about {needed / 2**20:,.0f} MiB. Make room, or give another folder "
            "with --out."
        )


def _check_same_run(settings: Settings) -> None:
    run_before(settings.out, settings)


# The model --------------------------------------------------------------------------------------


def _check_letters(settings: Settings, sets: Sequence[DataSet]) -> None:
    """Raise if likelihoods are counted and letters of the data's choices are no tokens."""
    from tokenprune_eval.evaluation.engines.letters import Letters

    choices = [question for one in sets for question in one.questions if question.choices]
    if not choices or settings.engine == "openai" or settings.choose_by != "likelihood":
        return
    letters = Letters(_processor(settings.model).tokenizer, required=True)
    letters.of(max(choices, key=lambda question: len(question.choices)))


def _processor(model: str) -> Any:
    from transformers import AutoProcessor

    from tokenprune.providers import model_path

    processors: Any = AutoProcessor
    try:
        return processors.from_pretrained(model_path(model))
    except TokenPruneError:
        raise
    except Exception as error:  # what is wrong with a checkpoint can show in any way
        raise _unloadable(model, error) from None


def _unloadable(model: str, error: Exception) -> InputFileError:
    reason = f"{type(error).__name__}: {reason_of(error)}"
    return InputFileError(
        f"the model {model} cannot be loaded ({reason}). Give the folder of a checkpoint with its "
        "processor, or a name that transformers can find."
    )


def _check_model(settings: Settings) -> None:
    """Raise if the engine cannot serve the model or a method; no weights are read."""
    if settings.engine == "openai":
        from tokenprune_eval.evaluation.engines.openai import check_server

        check_server(settings)
    elif settings.engine == "vllm":
        _check_for_vllm(settings)
    else:
        _check_for_transformers(settings)


def _check_for_vllm(settings: Settings) -> None:
    import tokenprune_vllm
    from tokenprune.providers import model_path

    path = model_path(settings.model)
    for condition in settings.conditions():
        if condition.pruned_by is not None:
            pruning = settings.pruning(condition)
            tokenprune_vllm.engine_args(
                path,
                pruning.method,
                pruning.keep,
                positions=pruning.positions,
                options=pruning.options,
                scope=pruning.scope,
            )
    _processor(settings.model)


def _check_for_transformers(settings: Settings) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tokenprune.providers import model_path
    from tokenprune_eval.evaluation.engines.transformers import (
        check_dominance,
        check_proportional_attention,
    )
    from tokenprune_hf.any_model import check_method, check_type, vision_model_of_any_type
    from tokenprune_hf.crops import check_scope_of
    from tokenprune_hf.encoder_inputs import EncoderInputs

    name = model_path(settings.model)
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # what is wrong with a checkpoint can show in any way
        raise _unloadable(settings.model, error) from None
    check_type(config, settings.model)
    models: Any = AutoModelForImageTextToText
    with torch.device("meta"):  # the modules without their weights
        model = models.from_config(config)
    for condition in settings.conditions():
        pruning = settings.pruning(condition)
        method = pruning.built()
        check_method(method, model)
        check_scope_of(vision_model_of_any_type(model), pruning.scope)
        if {*SCORING, *MIDDLE} & set(method.needs):
            vision_model_of_any_type(model).scoring_layer(EncoderInputs("image"))
    if settings.proportional_attention:
        check_proportional_attention(model)
    if settings.dominance:
        check_dominance(model, settings.max_new_tokens)
    _processor(settings.model)


def _check_vllm_memory(settings: Settings) -> None:
    """Raise if vLLM's engine for the CPU would find too little free memory.

    What it takes is worked out as vLLM does: where nothing is said, a share of all memory; else
    the room for keys and values that was asked for, beside the weights.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from tokenprune.providers import model_path

    total, free = _memory()
    given = settings.engine_args
    cache = given.get("kv_cache_memory_bytes")
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        if not space.isdecimal():
            raise ConfigError(
                f"VLLM_CPU_KVCACHE_SPACE={space} is no whole number of GiB. Set it to 4, for "
                "example."
            )
        cache = int(space) * _GIB
    weights = sum(file.stat().st_size for file in Path(model_path(settings.model)).glob("*.safet*"))
    if cache:
        needed = int(cache) + weights
        what = f"{cache / _GIB:.3g} GiB of keys and values and {weights / _GIB:.3g} GiB of weights"
    else:
        from vllm.config import CacheConfig

        share = given.get("gpu_memory_utilization", CacheConfig.gpu_memory_utilization)
        needed = int(total * float(share))
        what = f"{share:g} of all memory, {needed / _GIB:.3g} GiB"
    if needed > free:
        raise ConfigError(
            f"vLLM would take {what}, and {free / _GIB:.3g} GiB are free. Set the environment "
            "variable VLLM_CPU_KVCACHE_SPACE to a few GiB for keys and values, for example 4, or "
            "free memory."
        )


def _memory() -> tuple[int, int]:
    """Return all memory and what is free of it, in bytes."""
    import psutil  # a requirement of vLLM

    memory = psutil.virtual_memory()
    return memory.total, memory.available
