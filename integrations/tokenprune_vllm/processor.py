"""Where vLLM makes prompts: every image gets fewer placeholders, and its pruning goes with it.

`PruningProcessor` is mixed into the engine's own processor of each family. It takes a request's
settings out of ``mm_processor_kwargs``, shrinks the placeholders that the engine laid out, tells
the caches apart, and gives each image or video two more fields for the worker (see `Ticket`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItems,
    MultiModalSharedField,
)
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdateDetails

from tokenprune.budget import keeps_all, tokens_kept
from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError
from tokenprune.media.sizes import Counted, Plan, patch_side
from tokenprune.remembered import Remembered
from tokenprune.scope import count_together
from tokenprune.tower.layouts import Medium, Segment
from tokenprune_vllm import metrics
from tokenprune_vllm.architectures import reads_prompt
from tokenprune_vllm.encoder_inputs import SOUND, Fields, family_of, medium_of
from tokenprune_vllm.positions import known_positions, rotary_length
from tokenprune_vllm.regions import Region
from tokenprune_vllm.resizing import PictureSizes, plans_of, resized
from tokenprune_vllm.settings import KEY, RequestError, RequestSettings, ServerSettings

TICKET, REGION = "tokenprune_ticket", "tokenprune_region"
"""The fields that travel to the worker with each image or video."""

PROMPT = "tokenprune_prompt"
"""The field with the text around it, where the server loads methods that choose by it."""

_DUMMY_QUESTION = [0] * 64

_MOST_SETTINGS = 8
"""Settings of the engine's processor for each of which it is remembered what a size comes to."""


@dataclass(frozen=True)
class Ticket:
    """What the worker has to know about one image or video.

    Attributes
    ----------
    modality
        ``"image"``, ``"video"``, or what else vLLM calls it.
    pruning
        Method, budget and options, or None where every row stays.
    region
        Its part of the unpruned prompt.
    medium
        What the processor made of it; None for the caller's own embeddings.
    entries
        How many entries of each tensor that holds all items end to end are its own.
    shared
        The names of values that all items share.
    layout
        Tells apart how rows may lie, where no family says it: a digest of all that the processor
        made of it but the pixels' values.
    masked
        Whether its prompt is read under the server's sparse masks.
    hides
        Whether rows that are not selected stay in the prompt, and are hidden.
    counted
        Whether rows count as often as there are rows that they stand for.
    """

    modality: str
    pruning: PruningConfig | None
    region: Region
    medium: Medium | None = None
    entries: Mapping[str, int] = field(default_factory=dict)
    shared: Sequence[str] = ()
    layout: str = ""
    masked: bool = False
    hides: bool = False
    counted: bool = False

    @property
    def visual(self) -> bool:
        """Whether it is something to see; sound is left as it is."""
        return self.modality not in SOUND

    def pack(self) -> dict[str, Tensor]:
        """Return the fields `TICKET` and `REGION`."""
        text = json.dumps(
            {
                "modality": self.modality,
                "pruning": None if self.pruning is None else self.pruning.to_dict(),
                "grids": [segment.grid for segment in self.region.segments],
                "labels": [segment.label for segment in self.region.segments],
                "medium": None if self.medium is None else asdict(self.medium),
                "entries": dict(self.entries),
                "shared": list(self.shared),
                "layout": self.layout,
                "masked": self.masked,
                "hides": self.hides,
                "counted": self.counted,
            }
        )
        return {
            TICKET: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
            REGION: self.region.pack(),
        }

    @classmethod
    def unpack(cls, ticket: Tensor, region: Tensor) -> Ticket:
        """Return what `pack` packed."""
        values = json.loads(bytes(ticket.tolist()))
        pruning = values["pruning"]
        return cls(
            values["modality"],
            None if pruning is None else PruningConfig.from_dict(pruning),
            Region.unpack(region, values["grids"], values["labels"]),
            None if values["medium"] is None else Medium(**values["medium"]),
            values["entries"],
            values["shared"],
            values["layout"],
            values["masked"],
            values["hides"],
            values["counted"],
        )

    @property
    def text_moves(self) -> bool:
        """Whether the text inside travels with the rows: where they move against it."""
        return self.pruning is not None and not self.hides and self.region.rows_move()

    def shrunk(self) -> tuple[Tensor, Tensor | None]:
        """Return token ids and row mask as they stand in the prompt, see `Region.shrink`."""
        if self.pruning is None or self.hides:
            return self.region.token_ids, self.region.is_row
        return self.region.shrink(self.pruning.keep)


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """The engine's description of one region's tokens, with what was there before.

    Attributes
    ----------
    before, after
        Rows of the encoder before and after; of a picture made smaller, before that.
    length_before
        Prompt tokens before pruning, text included.
    method
        What chose or resized, ``"off"`` where nothing did.
    pruning
        With which budget and options, or None where nothing did.
    region
        What was there before.
    """

    before: int = 0
    after: int = 0
    length_before: int = 0
    method: str = "off"
    pruning: PruningConfig | None = None
    region: Region | None = None


class PruningProcessor:
    """Mixed in front of the engine's processor of a family; see the top of this file."""

    overrides: ClassVar[tuple[str, ...]] = (
        "_get_mm_hashes",
        "_get_cache_missing_processor_kwargs",
        "_recompute_cached_prompt_update",
        "_apply_hf_processor_main",
        "_get_mm_fields_config",
        "_get_mm_prompt_updates",
        "_maybe_apply_prompt_updates",
        "get_dummy_mm_inputs",
    )
    """Methods of vLLM's that must be there to be overridden."""

    info: Any

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        # The model's own: some of vLLM's give processors another one, made from parts of it.
        config = info.ctx.get_hf_config()
        self._server = ServerSettings.from_config(config)
        self._family = family_of(config)
        self._sizes: Remembered[str, PictureSizes] = Remembered(_MOST_SETTINGS)
        self._dummies: list[tuple[str, PrunedDetails]] | None = None
        self._text_config = config.get_text_config()
        own: Any = super()._recompute_cached_prompt_update  # type: ignore[misc]
        plain = BaseMultiModalProcessor._recompute_cached_prompt_update
        # MiniCPM-V, Phi-3 and Phi-4 write an item's number in front of it.
        self._numbers_items = own.__func__ is not plain
        # M-RoPE counts an image by its sides: its positions are fewer than its tokens.
        self._counts_tokens = (
            self._server.default.positions == "original" and not self._family.mrope
        )

    # What is taken out of the request's settings, and put into the hashes -----------------------

    def _get_mm_hashes(self, inputs: Any) -> Any:
        request = self._server.request(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(_without_ours(inputs))  # type: ignore[misc]
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        mark = request.fingerprint()
        prompt = ""
        if request.reads_prompt:
            # The text around an item is the prompt's and that of the other items' regions.
            prompt = json.dumps({"prompt": list(inputs.prompt), "items": hashes})
        return {
            modality: [
                MultiModalHasher.hash_kwargs(
                    algorithm,
                    mm_hash=own,
                    tokenprune=mark,
                    **({"prompt": prompt} if prompt else {}),
                    **({"place": place} if prompt or self._numbers_items else {}),
                )
                for place, own in enumerate(hashes_of)
            ]
            for modality, hashes_of in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        missing = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]
            _without_ours(inputs), mm_is_cached
        )
        asked = inputs.hf_processor_mm_kwargs.get(KEY)
        return missing if asked is None else {**missing, KEY: asked}

    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        """Take a cached item's text as it is: where it has a number, the hash says which."""
        return replace(cached_update, item_idx=new_item_idx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        request = self._server.request(hf_kwargs)
        plans = self._plans(mm_items, hf_kwargs, request)
        return super()._apply_hf_processor_main(  # type: ignore[misc]
            resized(self.info, mm_items, plans), _less(hf_kwargs)
        )

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Any:
        return super()._get_mm_fields_config(  # type: ignore[misc]
            hf_inputs, _less(hf_processor_mm_kwargs)
        )

    # Placeholders ------------------------------------------------------------------------------

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        request = self._server.request(hf_processor_mm_kwargs)
        plans = self._plans(mm_items, hf_processor_mm_kwargs, request)
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            resized(self.info, mm_items, plans, blank=True),
            _less(hf_processor_mm_kwargs),
            out_mm_kwargs,
        )
        return {
            modality: [
                self._shrink(modality, of_item, mm_items[modality], item, request, plan)
                for of_item, item, plan in zip(
                    of_modality,
                    out_mm_kwargs[modality],
                    plans if modality == "image" and plans else [None] * len(of_modality),
                    strict=True,
                )
            ]
            for modality, of_modality in updates.items()
            if of_modality
        }

    def _plans(
        self, mm_items: Any, hf_kwargs: Mapping[str, object], request: RequestSettings
    ) -> Sequence[Plan]:
        """Return how small each picture is made; nothing where they stay as they are."""
        if not request.resizes:
            return ()
        less = _less(hf_kwargs)
        config = self.info.ctx.get_hf_config()
        sizes = self._sizes.made(
            repr(sorted(less.items())),
            lambda: PictureSizes(patch_side(config), partial(self._counted, less)),
        )
        return plans_of(mm_items, request, sizes)

    def _counted(self, hf_kwargs: Mapping[str, object], picture: Image.Image) -> Counted:
        """Have the engine's own processor lay out a picture, and count what becomes of it."""
        items = self.info.parse_mm_data({"image": [picture]}, validate=False)
        made = super()._apply_hf_processor_main(items, hf_kwargs)  # type: ignore[misc]
        fields = super()._get_mm_fields_config(made, hf_kwargs)  # type: ignore[misc]
        kwargs = MultiModalKwargsItems.from_hf_inputs(made, fields)
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            items, hf_kwargs, kwargs
        )
        content = self._content("image", updates["image"][0])
        rows = int(_rows_of(content).sum())
        item = {name: element.data for name, element in kwargs["image"][0].items()}
        segments = self._family.segments(medium_of(self._family, "image", rows, item))
        return Counted(rows, tuple(len(segment.rows) for segment in segments))

    def _content(self, modality: str, updates: Sequence[Any]) -> Any:
        """Return how an item is laid out, if that is in one way."""
        content = updates[0].content
        if any(update.content.full != content.full for update in updates):
            raise ConfigError(
                f"the {modality} could be laid out in several ways, which tokenprune does not know "
                "how to prune. Please report the model."
            )
        return content

    def _shrink(
        self,
        modality: str,
        updates: Sequence[Any],
        items: Any,
        item: Any,
        request: RequestSettings,
        plan: Plan | None,
    ) -> list[Any]:
        """Shrink one item's placeholders, and put its ticket beside its pixels."""
        content = self._content(modality, updates)
        ids = torch.tensor(content.full)
        is_row = _rows_of(content)
        pruning = request.config if request.prunes else None
        if pruning is not None and plan is not None:
            # The picture is smaller by now: what is left to keep of it.
            pruning = None if keeps_all(plan.keep) else replace(pruning, keep=plan.keep)
        rows = int(is_row.sum())
        fields: Fields = {name: element.data for name, element in item.items()}
        medium: Medium | None = None
        segments: Sequence[Segment] = ()
        if modality in SOUND or isinstance(items, (EmbeddingItems, DictEmbeddingItems)):
            pruning = None  # sound, or the caller's own embeddings: no encoder to choose by
        else:
            medium = medium_of(self._family, modality, rows, fields)
            segments = self._family.segments(medium)
        region = Region(ids, is_row, tuple(segments))
        if pruning is not None and pruning.scope == "image" and modality == "image":
            pruning, region = self._of_image(pruning, region)
        layout = "" if self._family.known else _layout(modality, fields)
        held = _held_together(item)
        prunes = pruning is not None
        ticket = Ticket(
            *(modality, pruning, region, medium, *held, layout),
            masked=request.masks is not None,
            hides=prunes and request.application == "mask",
            counted=prunes and request.proportional,
        )
        batched = MultiModalBatchedField(keep_on_cpu=True)
        packed = ticket.pack()
        if self._server.reads_prompt:
            packed[PROMPT] = pack_prompt([], _DUMMY_QUESTION)  # until the prompt is laid out
        for name, value in packed.items():
            item[name] = MultiModalFieldElem(data=value, field=batched)
        new_ids, new_is_row = ticket.shrunk()
        details = PrunedDetails(
            full=new_ids.tolist(),
            is_embed=None if new_is_row is None else _Mask(new_is_row),
            before=rows if plan is None else plan.full.placeholders,
            after=rows if pruning is None else ticket.region.kept(pruning.keep),
            length_before=len(ids),
            method="off" if pruning is None and plan is None else request.method,
            pruning=pruning,
            region=ticket.region,
        )
        return [replace(update, content=details) for update in updates]

    def _of_image(self, pruning: PruningConfig, region: Region) -> tuple[PruningConfig, Region]:
        """Return one set for all crops of an image, with the number of tokens that they keep.

        Raises
        ------
        RequestError
            If it has to be known how many stay of each.
        """
        totals = [len(segment.rows) for segment in region.segments]
        if len(totals) < 2:
            return pruning, region
        whole = region.joined()
        if whole.rows_move() and any(map(self._family.images_see_all, (False, True))):
            raise RequestError(
                f"text stands between the {len(totals)} crops of this image, each of which sees "
                "itself both ways, so vLLM has to know where each begins and ends before its "
                "tokens are chosen. Start the server with --scope item, or send images that are "
                "not cut into crops."
            )
        return replace(pruning, keep=count_together(pruning.keep, totals)), whole

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt_ids, placeholders = super()._maybe_apply_prompt_updates(  # type: ignore[misc]
            mm_items, mm_res
        )
        found: list[tuple[str, PrunedDetails]] = [
            (modality, updates[0].content)
            for modality, of_modality in mm_res.prompt_updates.items()
            for updates in of_modality
        ]
        if self._dummies is not None:
            self._dummies += found
            return prompt_ids, placeholders
        dropped = sum(details.length_before - len(details.full) for _, details in found)
        if self._counts_tokens:
            self._check_length(len(prompt_ids), dropped)
        self._hand_over_prompt(prompt_ids, placeholders, mm_res)
        for modality, details in found:
            if modality in SOUND:
                continue
            metrics.count_tokens(modality, details.method, details.before, details.after)
        return prompt_ids, placeholders

    def _hand_over_prompt(self, prompt_ids: list[int], placeholders: Any, mm_res: Any) -> None:
        """Put the text around each image or video beside it, if its method reads that.

        What the worker has in its cache already has it: the prompt is part of the hash.

        Raises
        ------
        RequestError
            If no text comes after it, or too much for the model's positions is read at once.
        """
        found = sorted(
            (
                (place.start_idx, place.length, modality, index)
                for modality, places in placeholders.items()
                for index, place in enumerate(places)
            ),
        )
        regions = {
            (modality, index): updates[0].content
            for modality, of_modality in mm_res.prompt_updates.items()
            for index, updates in enumerate(of_modality)
        }
        # Text before the first item, and behind each; regions keep their own text apart.
        texts: list[list[int]] = []
        end = 0
        for start, length, _, _ in found:
            texts.append(prompt_ids[end:start])
            end = start + length
        texts.append(prompt_ids[end:])
        inside = [
            regions[modality, index].region.text().tolist() for _, _, modality, index in found
        ]
        for number, (_, _, modality, index) in enumerate(found):
            details = regions[modality, index]
            if details.pruning is None or not reads_prompt(details.pruning.method):
                continue
            before = [*texts[0]]
            for own, text in zip(inside[:number], texts[1 : number + 1], strict=True):
                before += own + text
            after = [*texts[number + 1]]
            for own, text in zip(inside[number + 1 :], texts[number + 2 :], strict=True):
                after += own + text
            # Also where it is cached: vLLM takes an item for sent that was refused here before.
            self._check_prompt(modality, details, before, after)
            item = mm_res.kwargs[modality][index]
            if item is None:
                continue
            batched = MultiModalBatchedField(keep_on_cpu=True)
            item[PROMPT] = MultiModalFieldElem(data=pack_prompt(before, after), field=batched)

    def _check_prompt(
        self, modality: str, details: PrunedDetails, before: list[int], after: list[int]
    ) -> None:
        region, pruning = details.region, details.pruning
        if region is None or pruning is None:
            return
        if not after and not region.ends_in_text():
            raise RequestError(
                f"no text comes after the {modality}, and method {pruning.method!r} ranks its "
                "tokens by the text that does. Put the question after it."
            )
        selector: Any = pruning.selector()
        if "query_attention" not in selector.needs or self._family.mrope:
            return
        frames = getattr(selector, "frames_per_set", 1)
        largest = max(_most_at_once(segment, frames) for segment in region.segments)
        tokens = len(before) + len(region.text()) + largest + len(after)
        known = known_positions(self._text_config)
        if self._server.default.positions == "original":
            known = rotary_length(self._text_config)
        if tokens > known:
            raise RequestError(
                f"method {pruning.method!r} would read {tokens} tokens at once, and the model "
                f"knows {known} positions. Start the server with a smaller "
                f"--option frames_per_set={frames}, or send fewer frames."
            )

    def _check_length(self, tokens: int, dropped: int) -> None:
        """Refuse a prompt whose tokens, each at its own position, the model has no positions for.

        Raises
        ------
        RequestError
            Saying how long it is before pruning.
        """
        known = known_positions(self._text_config)
        longest = int(self.info.ctx.model_config.max_model_len)
        # What is generated follows the unpruned prompt's end, up to max_model_len tokens in all.
        if tokens + dropped > known or dropped + longest > rotary_length(self._text_config):
            raise RequestError(
                f"before pruning this prompt has {tokens + dropped} tokens, and every kept token "
                f"stays at its own position: the model knows {known}. Send fewer or smaller "
                "images, or start the server with --positions compact."
            )

    # Start-up ----------------------------------------------------------------------------------

    @contextmanager
    def _watching_dummies(self) -> Iterator[list[tuple[str, PrunedDetails]]]:
        self._dummies = []
        try:
            yield self._dummies
        finally:
            self._dummies = None

    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **options: Any) -> Any:
        """Make the largest inputs, with which vLLM measures memory; they are not counted."""
        with self._watching_dummies():
            return super().get_dummy_mm_inputs(mm_counts, **options)  # type: ignore[misc]

    def largest(self, mm_counts: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
        """Return the rows of the largest image and video before and after the server's pruning.

        Parameters
        ----------
        mm_counts
            Modality -> number of items; by default one of each that the server takes.
        """
        if mm_counts is None:
            limits = self.info.allowed_mm_limits
            mm_counts = {modality: 1 for modality, limit in limits.items() if limit > 0}
        known = self.info.known_limits(mm_counts)
        if known is not None:
            keep = self._server.default.keep
            return {
                modality: (rows, tokens_kept(keep, rows) if modality not in SOUND else rows)
                for modality, rows in known.items()
                if rows
            }
        with self._watching_dummies() as dummies:
            super().get_dummy_mm_inputs(mm_counts)  # type: ignore[misc]
        totals: dict[str, tuple[int, int]] = {}
        for modality, details in dummies:
            before, after = totals.get(modality, (0, 0))
            totals[modality] = (before + details.before, after + details.after)
        return totals


class UnprunedLimits:
    """Mixed in front of the engine's processing info: the size of the largest item, unpruned.

    By it vLLM sizes its cache of encoded images and measures memory; a request may ask for no
    pruning, and the encoder runs on whole images either way.
    """

    overrides: ClassVar[tuple[str, ...]] = ("get_mm_max_tokens_per_item",)
    """Methods of vLLM's that must be there to be overridden."""

    ctx: Any

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the most rows that one item can have, by modality."""
        known = self.known_limits(mm_counts)
        if known is None:
            processor: Any = MULTIMODAL_REGISTRY.create_processor(self.ctx.model_config)
            known = {name: before for name, (before, _) in processor.largest(mm_counts).items()}
        return known

    def known_limits(self, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Return what the engine's own class says about it, which may be nothing."""
        known: Mapping[str, int] | None = super().get_mm_max_tokens_per_item(  # type: ignore[misc]
            self.ctx.model_config.max_model_len, mm_counts
        )
        return known


def pack_prompt(before: list[int], after: list[int]) -> Tensor:
    """Return the text around an item as one int32 tensor; `unpack_prompt` takes it apart."""
    return torch.tensor([len(before), *before, *after], dtype=torch.int32)


def unpack_prompt(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return LongTensors: the ids of the text before an item, and of the text after it."""
    text = packed[1:].long()
    return text[: int(packed[0])], text[int(packed[0]) :]


def largest_items(model_config: Any) -> dict[str, tuple[int, int]]:
    """Return the rows of the largest image and video before and after, see `largest`."""
    processor: Any = MULTIMODAL_REGISTRY.create_processor(model_config)
    found: dict[str, tuple[int, int]] = processor.largest()
    return found


def _rows_of(content: Any) -> Tensor:
    """Return which of a region's ids stand for rows of the encoder: bool [tokens]."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    is_row: Tensor = content.is_embed(content.full)
    return is_row


@dataclass(frozen=True)
class _Mask:
    """Where rows go in a region: what vLLM asks for as a function of the region's ids."""

    is_row: Tensor

    def __call__(self, full: list[int]) -> Tensor:
        return self.is_row


def _most_at_once(segment: Segment, frames: int) -> int:
    """Return how many tokens of a segment are read at once, in sets of so many frames."""
    if segment.grid is None:
        return len(segment.rows)
    return min(segment.grid[0], frames) * segment.grid[1] * segment.grid[2]


def _held_together(item: Any) -> tuple[dict[str, int], list[str]]:
    """Return how many entries of flat tensors are an item's, and the names of what items share.

    vLLM hands the worker all items at once, and does not say there what is whose.
    """
    entries = {
        name: len(element.data)
        for name, element in item.items()
        if isinstance(element.field, MultiModalFlatField)
    }
    shared = [
        name for name, element in item.items() if isinstance(element.field, MultiModalSharedField)
    ]
    return entries, shared


def _layout(modality: str, fields: Fields) -> str:
    """Return what tells apart how the rows of an item lie; see `Ticket.layout`."""
    digest = hashlib.sha256(modality.encode())
    for name, value in sorted(fields.items()):
        if isinstance(value, Tensor):
            seen: object = tuple(value.shape)
            # Pixels are no whole numbers, or bytes.
            if not value.is_floating_point() and value.dtype != torch.uint8:
                seen = seen, value.tolist()
        else:
            shaped = isinstance(value, (list, tuple)) and all(
                isinstance(one, Tensor) for one in value
            )
            seen = [tuple(one.shape) for one in value] if shaped else value
        digest.update(repr((name, seen)).encode())
    return digest.hexdigest()[:32]


def _less(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return a request's settings without ours, which the engine's processor does not know."""
    return {name: value for name, value in kwargs.items() if name != KEY}


def _without_ours(inputs: Any) -> Any:
    return replace(inputs, hf_processor_mm_kwargs=_less(inputs.hf_processor_mm_kwargs))
