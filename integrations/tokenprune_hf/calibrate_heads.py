"""`calibrate_heads`: which of BlindSight's masks each head of a model can do with.

The plain model reads prompts with several images, one at a time. Twice: first to find the sinks,
which two of the masks are made of, then to measure how much of each head's attention every mask
holds. Nothing but these shares is kept, so that thresholds can be tried at no cost afterwards.
Source: BlindSight (arXiv 2507.09071); see `tokenprune.masks.coverage` for what is reconstructed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import (
    ConfigError,
    InputFileError,
    LayoutError,
    UnsupportedModelError,
    reason_of,
)
from tokenprune.masks.coverage import (
    PromptCoverage,
    categories_of,
    coverage,
    densities,
    expected_density,
    received,
    thresholds,
)
from tokenprune.masks.heads import HeadCategories, ModelIdentity, Thresholds, layout_with_sinks
from tokenprune.masks.layout import PromptLayout
from tokenprune.masks.mask import BLOCK
from tokenprune.masks.sinks import Sinks, SinkSearch, massive_activations
from tokenprune.media.images import load_image
from tokenprune_hf.failures import LeftOut, around
from tokenprune_hf.interface import Interception, Plain
from tokenprune_hf.layout import decoder_of, identity_of, image_spans_of, own_mask
from tokenprune_hf.prefix import sliding_window

QUESTION = "What differs between the pictures?"
"""Asked about pictures that come without a question."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
) | {".tga"}
"""What counts as a picture in a folder."""

_FIRST_STATE = 2
"""Massive activations are looked for from this layer's input on, as published: before, words'
embeddings stick out by themselves."""


@dataclass(frozen=True)
class Prompt:
    """Pictures, and the question that comes after them.

    Attributes
    ----------
    images
        Two or more files.
    question
        The text.
    """

    images: tuple[Path, ...]
    question: str

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"the prompt about {', '.join(str(file) for file in self.images)}"


@dataclass(frozen=True, eq=False)
class HeadCoverage:
    """What was measured on a model.

    Attributes
    ----------
    model
        Whose heads they are.
    sinks
        What was found first.
    prompts
        One for each prompt that was measured until then.
    planned
        How many prompts there are in all, with those that were left out.
    block
        Queries, and keys, of a block, for the densities.
    """

    model: ModelIdentity
    sinks: Sinks
    prompts: tuple[PromptCoverage, ...]
    planned: int
    block: int

    def choose(self, limits: Thresholds) -> HeadCategories:
        """Return the heads' categories under these thresholds; nothing is run."""
        categories = categories_of(self.prompts, limits)
        return HeadCategories(
            model=self.model,
            categories=categories,
            sinks=self.sinks.places,
            thresholds=limits,
            density=expected_density(self.prompts, categories),
            block=self.block,
            prompts=len(self.prompts),
        )


def calibrate_heads(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    limits: Thresholds | None = None,
    *,
    block: int = BLOCK,
) -> HeadCategories:
    """Find the sinks, measure the heads and choose their categories.

    Parameters
    ----------
    model
        A vision-language model of transformers that can be given several images.
    processor
        Its processor.
    prompts
        Of two or more images each.
    limits
        What `tokenprune.masks.coverage.thresholds` returned; None for its defaults.
    block
        Queries, and keys, of a block, for the densities.

    Returns
    -------
    HeadCategories
        ``.save("heads.json")`` writes them, ``tokenprune_hf.sparse(model, "heads.json")`` uses
        them.

    Raises
    ------
    ConfigError
        If there is no prompt, or the block is not 1 or more.
    LayoutError
        If a prompt has fewer than two images.
    UnsupportedModelError
        If the model's attention cannot be watched.
    InputFileError
        If a picture cannot be read.
    TokensError
        If the model's attention is not finite.
    """
    sinks = find_sinks(model, processor, prompts)
    measured = measure_heads(model, processor, prompts, sinks, block=block)
    return measured.choose(thresholds(measured.model.layers) if limits is None else limits)


def find_sinks(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    on_prompt: Callable[[], None] | None = None,
    left_out: LeftOut | None = None,
) -> Sinks:
    """Find the places of an image whose tokens are sinks; see `tokenprune.masks.sinks`.

    Parameters
    ----------
    model, processor, prompts
        As for `calibrate_heads`.
    on_prompt
        Called after each prompt.
    left_out
        Notes prompts that fail, by `Prompt.name`; None: the first one is an error.
    """
    _check(prompts)
    decoder = decoder_of(model)
    modules = [layer.self_attn for layer in decoder.layers]
    # Through a window later images see no more than an image's end: that is no sink.
    whole = [number for number, one in enumerate(modules) if sliding_window(one) is None]
    voting = set(whole or range(len(modules)))
    search = SinkSearch(identity_of(model).hidden_size)

    def look_at(prompt: Prompt) -> None:
        inputs, layout = _prepare(model, processor, prompt)
        both_ways = "token_type_ids" in inputs
        attention = torch.zeros(layout.length)
        massive: list[Tensor] = []

        def look(number: int, query: Tensor, key: Tensor, scale: float) -> None:
            if number in voting:
                own = own_mask(model, modules[number], layout, both_ways=both_ways)
                attention.add_(received(query, key, layout, scale=scale, model=own))

        def see(number: int, states: Tensor) -> None:
            if number >= min(_FIRST_STATE, len(modules) - 1):
                massive.append(massive_activations(states))

        _run(model, decoder, inputs, look, see)
        search.add(layout, attention, massive)

    for prompt in prompts:
        with around(left_out, prompt.name):
            look_at(prompt)
        if on_prompt is not None:
            on_prompt()
    return search.result()


def measure_heads(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    sinks: Sinks,
    *,
    block: int = BLOCK,
    on_prompt: Callable[[HeadCoverage], None] | None = None,
    left_out: LeftOut | None = None,
) -> HeadCoverage:
    """Measure how much of every head's attention each mask holds.

    Parameters
    ----------
    model, processor, prompts, block
        As for `calibrate_heads`.
    sinks
        What `find_sinks` returned.
    on_prompt
        Called after each prompt with all that is measured until then.
    left_out
        As for `find_sinks`.

    Raises
    ------
    NothingLeftError
        If no prompt is left.
    """
    _check(prompts)
    if block < 1:
        raise ConfigError(f"block={block} must be at least 1.")
    decoder, identity = decoder_of(model), identity_of(model)
    modules = [layer.self_attn for layer in decoder.layers]
    measured: list[PromptCoverage] = []

    def measure(prompt: Prompt) -> PromptCoverage:
        inputs, plain_layout = _prepare(model, processor, prompt)
        layout = layout_with_sinks(plain_layout.length, plain_layout.images, sinks.places)
        both_ways = "token_type_ids" in inputs
        own = {
            sliding_window(module): own_mask(model, module, layout, both_ways=both_ways)
            for module in modules
        }
        held: dict[int, Tensor] = {}

        def look(number: int, query: Tensor, key: Tensor, scale: float) -> None:
            mine = own[sliding_window(modules[number])]
            held[number] = coverage(query, key, layout, scale=scale, model=mine)

        _run(model, decoder, inputs, look)
        density = {window: densities(layout, mask, block) for window, mask in own.items()}
        return PromptCoverage(
            torch.stack([held[number] for number in range(len(modules))]),
            torch.stack([density[sliding_window(module)] for module in modules]),
        )

    for prompt in prompts:
        before = len(measured)
        with around(left_out, prompt.name):
            measured.append(measure(prompt))
        if on_prompt is not None and len(measured) > before:
            on_prompt(HeadCoverage(identity, sinks, tuple(measured), len(prompts), block))
    if left_out is not None:
        left_out.check("prompt", len(measured))
    return HeadCoverage(identity, sinks, tuple(measured), len(prompts), block)


def _check(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise ConfigError("there is nothing to measure: give at least one prompt.")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt.images) < 2:
            raise LayoutError(
                f"prompt {number} has {len(prompt.images)} image(s) and cannot calibrate heads: "
                "what they do between images does not show. Give two or more."
            )


# Running the model ------------------------------------------------------------------------------

Look = Callable[[int, Tensor, Tensor, float], None]
"""Given a layer's number, its q [H, L, d] and k [G, L, d], and the factor on q kᵀ."""


def _prepare(model: Any, processor: Any, prompt: Prompt) -> tuple[dict[str, Any], PromptLayout]:
    """Return the model's arguments for a prompt, and the prompt's layout."""
    inputs = ask_about(processor, prompt.question, [load_image(one) for one in prompt.images])
    arguments = dict(inputs.to(model.device, model.dtype))
    input_ids = arguments["input_ids"]
    others = {name: value for name, value in arguments.items() if name != "input_ids"}
    (spans,) = image_spans_of(model, input_ids, others)
    if len(spans) != len(prompt.images):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {len(prompt.images)} pictures as {len(spans)} images, "
            "so its prompts' layout is not known. Name a model that keeps every picture's tokens "
            "together."
        )
    return arguments, PromptLayout(input_ids.shape[1], tuple(spans))


def ask_about(processor: Any, question: str, images: Sequence[Any]) -> Any:
    """Return what the processor makes of a question about several images: a batch of one prompt."""
    if getattr(processor, "chat_template", None):
        pictures = [{"type": "image"} for _ in images]
        content = [*pictures, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
    else:
        text = f"{processor.image_token}\n" * len(images) + question
    text = _apart(text, getattr(processor, "image_token", None))
    # A list per prompt: from it some processors see that the images share one.
    return processor(text=[text], images=[list(images)], return_tensors="pt")


def _apart(text: str, image: str | None) -> str:
    """Put line breaks between images that touch, as most chat templates do."""
    return re.sub(f"(?<={re.escape(image)})(?={re.escape(image)})", "\n", text) if image else text


def _run(
    model: Any,
    decoder: Any,
    arguments: dict[str, Any],
    look: Look,
    see: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Have the plain model read one prompt, and show what its layers do.

    Parameters
    ----------
    look
        Called in every layer with q and k.
    see
        Called before every layer with its hidden states [L, D].
    """
    layers = list(decoder.layers)
    number_of = {id(layer.self_attn): number for number, layer in enumerate(layers)}

    def handler(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, plain: Plain
    ) -> tuple[Tensor, Tensor | None]:
        look(number_of[id(module)], query[0], key[0], scale)
        return plain()

    def watch(number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if see is not None:
                see(number, (args[0] if args else kwargs["hidden_states"])[0])

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(watch(number), with_kwargs=True)
            stack.callback(handle.remove)
        interception = Interception([layer.self_attn for layer in layers], handler)
        stack.callback(interception.remove)
        stack.enter_context(torch.no_grad())
        model(**arguments, use_cache=False, logits_to_keep=1)


# Prompts ----------------------------------------------------------------------------------------


def read_prompts(
    data: Sequence[Path],
    images: int = 4,
    prompts: int = 32,
    *,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Prompt]:
    """Read prompts from files, and make prompts of the pictures in folders.

    Parameters
    ----------
    data
        JSON Lines files of ``{"images": [path, ...], "question": text}``, paths relative to the
        file; and folders, whose pictures are drawn without replacement.
    images
        How many pictures a prompt gets that is made.
    prompts
        The most prompts; of more than these some are drawn.
    question
        Asked about drawn pictures.
    seed
        Of both draws.

    Returns
    -------
    list of Prompt
        At least one. Pictures are not opened here: see `check_pictures`.

    Raises
    ------
    ConfigError
        If a number is too small.
    InputFileError
        If a file, or a line of it, cannot be read, or a folder has too few pictures.
    """
    for name, value, least in (("images", images, 2), ("prompts", prompts, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} is too small. Give at least {least}.")
    generator = np.random.default_rng(seed)
    found: list[Prompt] = []
    for path in data:
        if os.path.isdir(path):  # of a name that is too long: False
            files = _pictures(path, images)
            order = generator.permutation(len(files)).tolist()
            for start in range(0, len(files) - images + 1, images):
                chosen = tuple(files[place] for place in order[start : start + images])
                found.append(Prompt(chosen, question))
        else:
            found += _read_lines(path)
    if len(found) > prompts:
        kept = sorted(generator.choice(len(found), prompts, replace=False).tolist())
        found = [found[place] for place in kept]
    return found


def _pictures(folder: Path, images: int) -> list[Path]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if len(files) < images:
        raise InputFileError(
            f"{folder}: there are {len(files)} pictures in it, and a prompt needs {images}. Give a "
            f"folder with more of them, or fewer --images (2 or more)."
        )
    return files


def _read_lines(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "not UTF-8"
        raise InputFileError(
            f"{file}: the data cannot be read ({reason}). Give a JSON Lines file of prompts, or a "
            "folder of pictures."
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputFileError(f"{file}, line {number}: not JSON ({reason_of(error)}).") from None
        fields = values if isinstance(values, dict) else {}
        images, question = fields.get("images"), fields.get("question")
        if not (
            isinstance(images, list)
            and len(images) >= 2
            and all(isinstance(one, str) and one for one in images)
            and isinstance(question, str)
            and question.strip()
        ):
            raise InputFileError(
                f'{file}, line {number}: a line is {{"images": [PATH, PATH, ...], "question": '
                f"TEXT}} with two or more images, not {line[:120]}."
            )
        found.append(Prompt(tuple(file.parent / one for one in images), question))
    if not found:
        raise InputFileError(f"{file}: there is no prompt in it. Write one a line.")
    return found


def check_pictures(
    prompts: Sequence[Prompt],
    on_picture: Callable[[], None] | None = None,
    left_out: LeftOut | None = None,
) -> list[Prompt]:
    """Open every picture once, so that a broken one is found before anything is measured.

    Parameters
    ----------
    prompts
        Whose pictures.
    on_picture
        Called after each picture.
    left_out
        Notes pictures that cannot be read; None: the first one is an error.

    Returns
    -------
    list of Prompt
        Those all of whose pictures can be read.

    Raises
    ------
    InputFileError
        Naming the first that cannot be read.
    """
    good: set[Path] = set()
    for file in dict.fromkeys(file for prompt in prompts for file in prompt.images):
        with around(left_out, str(file)):
            load_image(file)
            good.add(file)
        if on_picture is not None:
            on_picture()
    return [prompt for prompt in prompts if good.issuperset(prompt.images)]
