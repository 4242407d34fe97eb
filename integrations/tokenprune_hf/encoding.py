"""Encoded: what the vision encoder made of a batch's images and videos, before any is dropped.

Encoding once and pruning it many times is how several methods are compared at the cost of one
run of the encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PromptError
from tokenprune.selection import Selection
from tokenprune.transfer import to_device
from tokenprune_hf.any_model import vision_model_of_any_type
from tokenprune_hf.encoder_inputs import arguments_on_host
from tokenprune_hf.vision import ENCODED, USUAL, EncodedModality, VisionModel


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
            replace(
                image.items[index],
                rows=image.items[index].rows - starts[index] + new_start,
                medium=number,
            )
            for number, (index, new_start) in enumerate(zip(indices, new_starts[:-1], strict=True))
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


def merged(encoded: Encoded, selections: Mapping[str, Sequence[Selection]]) -> Encoded:
    """Return the same with the rows of kept tokens to which a method adds others.

    Parameters
    ----------
    encoded
        What the encoder returned.
    selections
        Per modality, one for each of its items.
    """
    modalities = dict(encoded.modalities)
    for modality, media in encoded.modalities.items():
        chosen = zip(media.items, selections[modality], strict=True)
        merging = [(item, one, one.merge) for item, one in chosen if one.merge is not None]
        if not merging:
            continue
        rows, deepstack = media.rows.clone(), [layer.clone() for layer in media.deepstack]
        for item, selection, merge in merging:
            tokens, kept = item.tokens, selection.kept
            own = to_device(item.rows, rows.device)
            places = own[kept.to(rows.device)]
            rows[places] = selection.rows(media.rows[own], tokens.features, tokens.projector)
            for layer, before in zip(deepstack, media.deepstack, strict=True):
                layer[places] = merge.sums(before[own], kept.to(rows.device)).to(layer.dtype)
        modalities[modality] = replace(media, rows=rows, deepstack=deepstack)
    return replace(encoded, modalities=modalities)


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
        media_before = itertools.accumulate(
            (max((item.medium + 1 for item in media.items), default=0) for media in batches),
            initial=0,
        )
        joined[modality] = replace(
            batches[0],
            rows=torch.cat([media.rows for media in batches]),
            sizes=[size for media in batches for size in media.sizes],
            deepstack=[torch.cat(layer) for layer in layers],
            items=[
                replace(item, rows=item.rows + start, medium=item.medium + first_medium)
                # The last start is the end.
                for media, start, first_medium in zip(batches, starts, media_before, strict=False)
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
        What to gather, out of `tokenprune.tokens.INPUTS`; None: features, embeddings,
        cls_attention and projector, as far as the model has them.
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
            needs = [need for need in USUAL if need not in has_none]
        return encode_media(vision, inputs, needs)


def encode_media(
    vision: VisionModel,
    arguments: dict[str, Any],
    needs: Sequence[str],
    on_host: dict[str, Any] | None = None,
) -> Encoded:
    """Encode whatever pixels a call's arguments hold.

    Parameters
    ----------
    vision
        The model's.
    arguments
        The call's, by name.
    needs
        What to gather.
    on_host
        What `arguments_on_host` returned for them, where that was called before.

    Raises
    ------
    PromptError
        If they hold none.
    """
    of_modalities = vision.encoder_inputs(arguments)
    needs = tuple(need for need in needs if need in ENCODED)
    if not of_modalities:
        raise PromptError("there are no pixel values among the inputs: nothing to encode.")
    known = arguments_on_host(arguments) if on_host is None else on_host
    for given, same in zip(of_modalities, vision.encoder_inputs(known), strict=True):
        given.on_host, given.placeholders = same.arguments, same.placeholders
    return Encoded({given.modality: vision.encode(given, needs) for given in of_modalities}, needs)


@dataclass(frozen=True)
class KeptRows:
    """The rows of one modality that stay, ready to be handed to the language model.

    Attributes
    ----------
    encoded
        What the encoder returned.
    staying
        BoolTensor [R] over all its rows, where they are.
    counts
        How many rows of each item stay; None where every row does.
    """

    encoded: EncodedModality
    staying: Tensor
    counts: Sequence[int] | None = None

    @classmethod
    def of(cls, encoded: EncodedModality, selections: Sequence[Selection]) -> KeptRows:
        """Mark the rows that stay: those selected, and those that belong to no item."""
        device = encoded.rows.device
        staying = torch.ones(len(encoded.rows), dtype=torch.bool, device="cpu")
        own = [item.rows for item in encoded.items]
        if not own:
            return cls(encoded, to_device(staying, device), ())
        in_items = torch.cat(own)
        staying[in_items] = False
        # All items in a few launches: kept tokens count from each one's first, which is known.
        counts = list(map(len, selections))
        starts = torch.tensor([0, *map(len, own[:-1])], device="cpu").cumsum(0)
        before = starts.repeat_interleave(torch.tensor(counts, device="cpu"))
        kept = torch.cat([selection.kept.to(device) for selection in selections])
        rows = to_device(in_items, device)[kept + to_device(before, device)]
        return cls(encoded, to_device(staying, device).index_fill(0, rows, True), counts)

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
        ends_of_prompts = set(itertools.accumulate(per_sample))
        edges = sorted({0, *ends_of_prompts, *itertools.accumulate(self.encoded.sizes)})
        edges, kept = self._kept_between(edges, ends_of_prompts)
        # How many there are is known, so they are sorted to the front: `nonzero` would wait.
        order = torch.sort(self.staying.to(torch.uint8), stable=True, descending=True).indices
        indices = order[: sum(kept)]
        ends = [end in ends_of_prompts for end in edges[1:]]

        def pictures_of(rows: Tensor) -> list[Tensor]:
            return _pictures(rows[indices.to(rows.device)].split(kept), ends, repeats)

        pictures = pictures_of(self.encoded.rows)
        pooled: Any = pictures
        if self.encoded.stacked:
            # Pictures that keep different numbers of rows make no tensor [n, K, D]. Forwards lay
            # rows one after another anyway, so one picture of all rows serves as well.
            same = len({len(picture) for picture in pictures}) == 1
            pooled = torch.stack(pictures) if same else torch.cat(pictures)[None]
        deepstack = list(map(pictures_of, self.encoded.deepstack))
        return self.encoded.container.output(pooled, deepstack)

    def _kept_between(
        self, edges: Sequence[int], ends_of_prompts: Collection[int]
    ) -> tuple[list[int], list[int]]:
        """Return edges, and how many rows stay between each and the next.

        How many of an item stay is known, and not which: edges inside of items are left out, so
        that the device is not asked. Forwards lay the rows of pictures one after another anyway.

        Parameters
        ----------
        edges
            Of pictures and prompts, in rows.
        ends_of_prompts
            Those of them that may not be left out.
        """
        if self.counts is None:
            return list(edges), [stop - start for start, stop in itertools.pairwise(edges)]
        spans = [(int(item.rows[0]), int(item.rows[-1])) for item in self.encoded.items]
        inside = {edge for edge in edges for first, last in spans if first < edge <= last}
        if inside & set(ends_of_prompts):  # an item of two prompts
            staying_before = torch.nn.functional.pad(self.staying.cumsum(0), (1, 0))
            places = to_device(torch.tensor(edges, device="cpu"), self.staying.device)
            counted: list[int] = staying_before[places].diff().tolist()
            return list(edges), counted
        left = [edge for edge in edges if edge not in inside]
        kept = [stop - start for start, stop in itertools.pairwise(left)]
        place = 0
        for item, (first, _), count in zip(self.encoded.items, spans, self.counts, strict=True):
            place = 0 if left[place] > first else place  # crops may stand among each other
            while left[place + 1] <= first:
                place += 1
            kept[place] -= len(item.rows) - count
        return left, kept


def _pictures(kept: Sequence[Tensor], ends: Sequence[bool], repeats: int) -> list[Tensor]:
    """Return what stays of each picture, each prompt's repeated in a row.

    A picture of which nothing stays (a frame of a pruned video) is left out.

    Parameters
    ----------
    kept
        [n, D] of each picture, or of the part of it that one prompt has.
    ends
        Whether a prompt's pictures end with it.
    repeats
        How often each prompt comes.
    """
    # Rows come in the order of prompts, so a prompt's pictures are those up to its end; as
    # `generate` lays out batches, repeats of a prompt follow each other.
    result: list[Tensor] = []
    of_prompt: list[Tensor] = []
    for picture, is_end in zip(kept, ends, strict=True):
        of_prompt += [picture] if len(picture) else []
        if is_end:
            result += of_prompt * repeats
            of_prompt = []
    return result
