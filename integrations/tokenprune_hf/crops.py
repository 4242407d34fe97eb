"""Which crops are of one image, and one set over all of them: ``scope="image"``.

Items of an image are joined before anything is chosen, so that all that follows (budget, choice,
prompt) knows one item; only the selections that a caller sees are those of crops again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.errors import PromptError, UnsupportedModelError
from tokenprune.scope import Joined, Scope
from tokenprune_hf.encoding import Encoded
from tokenprune_hf.vision import EncodedModality, Item, VisionModel

IMAGE_CROPS = "image_crops"
"""The argument in which a caller says how many crops each image has."""


def check_scope_of(vision: VisionModel, scope: Scope) -> None:
    """Raise if crops of an image cannot be told in a model.

    Raises
    ------
    UnsupportedModelError
        If it is of no family.
    """
    if scope == "image" and not vision.family.known:
        raise UnsupportedModelError(
            f"{type(vision.model).__name__} is of no known family, and which of its tokens are "
            "crops of one image is not known. Use scope='item'."
        )


def join_crops(
    vision: VisionModel, encoded: Encoded, places: Tensor | None, told: Sequence[int] | None
) -> Encoded:
    """Return the same with the crops of each image joined to one item.

    Parameters
    ----------
    vision
        The model's.
    encoded
        What the encoder returned.
    places
        LongTensor [R, 2] on the CPU: prompt and column of each row of the images; None where there
        are none.
    told
        How many crops each image has, in the order of the prompts; None where a caller did not say.

    Raises
    ------
    PromptError
        If nobody says which crops are of one image.
    """
    media = encoded.modalities.get("image")
    if media is None or places is None:
        return encoded
    groups = _images(vision, media, places, told)
    # What comes several times as the same objects stays one, and is chosen from once.
    known: dict[tuple[int, ...], Joined] = {}
    items = [_joined(group, number, known) for number, group in enumerate(groups)]
    return replace(encoded, modalities={**encoded.modalities, "image": replace(media, items=items)})


def _joined(crops: Sequence[Item], number: int, known: dict[tuple[int, ...], Joined]) -> Item:
    """Return one item of all crops of an image, its tokens in the order of the prompt."""
    if len(crops) == 1:
        return crops[0]
    rows, order = torch.cat([crop.rows for crop in crops]).sort()
    tokens = [crop.tokens for crop in crops]
    key = tuple(map(id, tokens))
    if key not in known:
        # Where each of the rows that were laid end to end has come to stand.
        places = order.argsort().split([len(crop.rows) for crop in crops])
        known[key] = Joined.of(tokens, places, f"image {number}")
    joined = known[key]
    return Item(rows, joined.tokens, crops[0].medium, joined)


def _images(
    vision: VisionModel, media: EncodedModality, places: Tensor, told: Sequence[int] | None
) -> list[list[Item]]:
    """Return the crops of each image."""
    items, family = media.items, vision.family
    name = type(vision.model).__name__
    prompt = [int(places[item.rows[0], 0]) for item in items]
    if told is not None:
        counts = [int(count) for count in told]
        if sum(counts) != len(items) or min(counts, default=1) < 1:
            raise PromptError(
                f"{IMAGE_CROPS}={list(told)} adds up to {sum(counts)} crops and {name} was given "
                f"{len(items)}. Give how many each image has, in the order of the prompt."
            )
        left = iter(zip(items, prompt, strict=True))
        told_groups = [list(itertools.islice(left, count)) for count in counts]
        if any(len({of_item for _, of_item in group}) > 1 for group in told_groups):
            raise PromptError(
                f"{IMAGE_CROPS}={list(told)} makes one image of crops of several prompts. Give how "
                "many each image has, in the order of the prompts."
            )
        return [[item for item, _ in group] for group in told_groups]
    if family.tells_images:
        return [list(own) for _, own in itertools.groupby(items, key=lambda item: item.medium)]
    if family.crops_touch:
        groups: list[list[Item]] = []
        for item, before in zip(items, [None, *items[:-1]], strict=True):
            ends = None if before is None else (places[before.rows[-1]] + torch.tensor([0, 1]))
            if ends is not None and torch.equal(ends, places[item.rows[0]]):
                groups[-1].append(item)
            else:
                groups.append([item])
        return groups
    if len(set(prompt)) < len(prompt):
        raise PromptError(
            f"{name} is given the crops of an image as pictures of their own, and scope='image' "
            f"has to know which are of one. Pass {IMAGE_CROPS} along with the processor's inputs: "
            f"how many of the {len(items)} crops each image has; for one image "
            f"{IMAGE_CROPS}=[{len(items)}]. Or use scope='item'."
        )
    return [[item] for item in items]
