"""Encoded: what the vision encoder made of a batch's images and videos, before any is dropped.

Encoding once and pruning it many times is how several methods are compared at the cost of one
run of the encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError
from tokenprune.selection import Selection
from tokenprune_hf.any_model import vision_model_of_any_type
from tokenprune_hf.vision import ENCODED, EncodedModality, Item, VisionModel


@dataclass(frozen=True)
class Encoded:
    """All images and videos of a batch of prompts, encoded and not yet pruned.

    Attributes
    ----------
    modalities
        ``"image"`` and ``"video"``, where the batch has them.
    needs
        What was gathered for selectors; a method that needs more has to encode again.
    """

    modalities: dict[str, EncodedModality]
    needs: tuple[str, ...]

    def take(self, indices: Sequence[int]) -> Encoded:
        """Return a batch of some images of this one, in any order, with repeats.

        For batches with one image (a single tensor of rows) per prompt, and no video.

        Parameters
        ----------
        indices
            Positions of images in this batch.

        Raises
        ------
        PromptError
            If the batch holds videos, or images of several items.
        """
        image = self.modalities.get("image")
        if (
            set(self.modalities) != {"image"}
            or image is None
            or len(image.items) != len(image.sizes)
        ):
            raise PromptError("take works on batches of images of one item each, without videos.")
        rows = image.rows.split(image.sizes)
        starts = torch.tensor([0, *image.sizes]).cumsum(0).tolist()
        sizes = [image.sizes[index] for index in indices]
        new_starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        # Items count the rows of the whole batch, so they move with their image.
        items = [
            Item(image.items[index].rows - starts[index] + new_start, image.items[index].tokens)
            for index, new_start in zip(indices, new_starts[:-1], strict=True)
        ]
        deepstack = [
            torch.cat([layer.split(image.sizes)[index] for index in indices])
            for layer in image.deepstack
        ]
        taken = replace(
            image,
            rows=torch.cat([rows[index] for index in indices]),
            sizes=sizes,
            deepstack=deepstack,
            items=items,
        )
        return Encoded({"image": taken}, self.needs)


def join(parts: Sequence[Encoded]) -> Encoded:
    """Return one batch made of several, for prompts in the same order.

    Parameters
    ----------
    parts
        At least one. The same one may come several times: images encoded once, asked about often.

    Raises
    ------
    PromptError
        If they were made with different needs, or a modality is there in some of them only: it
        would no longer be known which prompt an image belongs to.
    """
    first = parts[0]
    for part in parts:
        if set(part.modalities) != set(first.modalities) or part.needs != first.needs:
            raise PromptError(
                "only batches with the same modalities and needs can be joined, not "
                f"{sorted(first.modalities)} with {first.needs} and {sorted(part.modalities)} "
                f"with {part.needs}. Encode them alike, or ask about them apart."
            )
    joined: dict[str, EncodedModality] = {}
    for modality in first.modalities:
        batches = [part.modalities[modality] for part in parts]
        starts = itertools.accumulate((len(media.rows) for media in batches), initial=0)
        layers = zip(*(media.deepstack for media in batches), strict=True)
        joined[modality] = replace(
            batches[0],
            rows=torch.cat([media.rows for media in batches]),
            sizes=[size for media in batches for size in media.sizes],
            deepstack=[torch.cat(layer) for layer in layers],
            items=[
                Item(item.rows + start, item.tokens)
                for media, start in zip(batches, starts, strict=False)  # the last start is the end
                for item in media.items
            ],
            videos_told=all(media.videos_told for media in batches),
        )
    return Encoded(joined, first.needs)


def encode(model: Any, *, needs: Sequence[str] | None = None, **inputs: Any) -> Encoded:
    """Run a model's vision encoder on what its processor returned, without pruning.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    needs
        What to gather, out of features, embeddings, cls_attention and projector; None: all that
        the model has.
    **inputs
        What the processor returned; arguments the encoder does not read are left alone.

    Returns
    -------
    Encoded
        Pass it as ``model.generate(..., encoded=...)`` inside a `prune` block, in place of the
        pixels.

    Raises
    ------
    UnsupportedModelError, PromptError
        If the model cannot be pruned, or there is no image or video among the inputs.
    """
    with torch.no_grad():
        vision = vision_model_of_any_type(model)
        if needs is None:
            has_none = set() if vision.family.attends else {"cls_attention"}
            needs = [need for need in ENCODED if need not in has_none]
        return encode_media(vision, inputs, needs)


def encode_media(vision: VisionModel, arguments: dict[str, Any], needs: Sequence[str]) -> Encoded:
    """Encode whatever pixels a call's arguments hold.

    Raises
    ------
    PromptError
        If they hold none.
    """
    of_modalities = vision.encoder_inputs(arguments)
    needs = tuple(need for need in needs if need in ENCODED)
    if not of_modalities:
        raise PromptError("there are no pixel values among the inputs: nothing to encode.")
    return Encoded({given.modality: vision.encode(given, needs) for given in of_modalities}, needs)


@dataclass(frozen=True)
class KeptRows:
    """The rows of one modality that stay, ready to be handed to the language model.

    Attributes
    ----------
    staying
        BoolTensor [R] over all rows the encoder returned.
    """

    encoded: EncodedModality
    staying: Tensor

    @classmethod
    def of(cls, encoded: EncodedModality, selections: Sequence[Selection]) -> KeptRows:
        """Mark the rows that stay: those selected, and those that belong to no item."""
        staying = cls.all_of(encoded).staying
        for item, selection in zip(encoded.items, selections, strict=True):
            staying[item.rows] = False
            staying[item.rows[selection.kept]] = True
        return cls(encoded, staying)

    @classmethod
    def all_of(cls, encoded: EncodedModality) -> KeptRows:
        """Mark every row as staying."""
        staying = torch.ones(len(encoded.rows), dtype=torch.bool, device=encoded.rows.device)
        return cls(encoded, staying)

    def output(self, per_sample: Sequence[int], repeats: int) -> Any:
        """Return the encoder's output with the kept rows only, as the model's forward expects it.

        Parameters
        ----------
        per_sample
            Rows, before pruning, of each prompt of the batch.
        repeats
            How often `generate` repeats each prompt (beams, returned sequences).
        """
        pictures = self._pictures(self.encoded.rows, per_sample, repeats)
        pooled: Any = pictures
        if self.encoded.stacked:
            # Pictures that keep different numbers of rows make no tensor [n, K, D]. Forwards lay
            # rows one after another anyway, so one picture of all rows serves as well.
            same = len({len(picture) for picture in pictures}) == 1
            pooled = torch.stack(pictures) if same else torch.cat(pictures)[None]
        deepstack = [self._pictures(layer, per_sample, repeats) for layer in self.encoded.deepstack]
        return self.encoded.container.output(pooled, deepstack)

    def _pictures(self, rows: Tensor, per_sample: Sequence[int], repeats: int) -> list[Tensor]:
        """Return what stays of rows [R, D], one tensor a picture; each prompt's repeated in a row.

        A picture of which nothing stays (a frame of a pruned video) is left out.
        """
        ends_of_prompts = set(itertools.accumulate(per_sample))
        edges = sorted({0, *ends_of_prompts, *itertools.accumulate(self.encoded.sizes)})
        # How many rows stay in front of each edge, so that the device is waited for once.
        staying_before = torch.nn.functional.pad(self.staying.cumsum(0), (1, 0))
        kept = staying_before[edges].diff().tolist()
        # Rows come in the order of prompts, so a prompt's pictures are those up to its end; as
        # `generate` lays out batches, repeats of a prompt follow each other.
        result: list[Tensor] = []
        of_prompt: list[Tensor] = []
        for end, picture in zip(edges[1:], rows[self.staying].split(kept), strict=True):
            of_prompt += [picture] if len(picture) else []
            if end in ends_of_prompts:
                result += of_prompt * repeats
                of_prompt = []
        return result
