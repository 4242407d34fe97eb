"""`prune`, `apply`, `remove`: a model of transformers whose `generate` and calls run pruned.

A call with pixels goes this way: encode, select, shorten the prompt, run the model's own forward
on the short prompt and the kept rows. Two things are attached to the model and taken off again: a
forward pre-hook, and a `generate` in front of its own.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import Keep
from tokenprune.config import Positions, PruningConfig
from tokenprune.errors import PromptError, TokenPruneError
from tokenprune.selecting import select_many
from tokenprune.selection import Selection
from tokenprune.selectors.base import Selector
from tokenprune_hf.encoding import Encoded, KeptRows, encode_media
from tokenprune_hf.families.registry import check_method, family_of
from tokenprune_hf.prompt import FILL, ShortPrompt, check_attention_mask, shorten

_REFUSED = {
    "assistant_model": "a draft model would read the unpruned prompt",
    "custom_generate": "its own loop would bypass the pruned prompt",
    "prefill_chunk_size": "chunks would cut images apart from their placeholders",
    "negative_prompt_ids": "the second prompt would need a pruning of its own",
}


@dataclass(frozen=True)
class Shortened:
    """One pruned prompt: everything needed to run it, and to go on from its cache.

    Attributes
    ----------
    input_ids
        The caller's LongTensor [B, L].
    prompt
        How [B, L] became [B, S].
    arguments
        What the language model is given in place of the caller's: each [..., B, S].
    kept
        The rows that stay, per modality.
    rows_per_sample
        Per modality, how many rows each prompt had.
    next_position
        LongTensor [B], the position of the first token after the prompt.
    """

    input_ids: Tensor
    prompt: ShortPrompt
    arguments: dict[str, Tensor]
    kept: dict[str, KeptRows]
    rows_per_sample: dict[str, list[int]]
    next_position: Tensor

    def encoder_outputs(self, batch: int) -> dict[str, Any]:
        """Return `mm_encoder_outputs` for a batch of `batch` prompts, a multiple of B."""
        repeats = batch // len(self.input_ids)
        return {
            modality: kept.output(self.rows_per_sample[modality], repeats)
            for modality, kept in self.kept.items()
        }


class Pruning:
    """A pruned model: made by `prune` or `apply`, undone by leaving the block or by `remove`.

    Attributes
    ----------
    config
        Method, budget, positions and options; None if a selector object was passed.
    selections
        One `Selection` per image, video or crop of the last call, in prompt order.
    """

    def __init__(self, model: Any, selector: Selector, keep: Keep, positions: Positions) -> None:
        self.model = model
        self.keep = keep
        self.positions = positions
        self.selector = selector
        self.selections: list[Selection] = []
        self._family = family_of(model)
        check_method(selector, model)
        self._signature = inspect.signature(type(model).forward)
        self._caches: weakref.WeakKeyDictionary[Any, Shortened] = weakref.WeakKeyDictionary()
        self._generating: Shortened | None = None
        self._in_generate = False
        self._rope_deltas: Any = None
        self._hook: Any = None

    # Attaching and taking off ------------------------------------------------------------------

    def _attach(self) -> None:
        if self.model in _ATTACHED:
            raise TokenPruneError(
                f"this {type(self.model).__name__} is pruned already. Leave that block, or call "
                "tokenprune_hf.remove(model), before pruning it another way."
            )
        plain = self.model.generate

        @functools.wraps(plain)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            return self._generate(plain, inputs, args, kwargs)

        self.model.__dict__["generate"] = generate
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._rope_deltas = getattr(self._family.inner, "rope_deltas", None)
        _ATTACHED[self.model] = self

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if _ATTACHED.get(self.model) is not self:
            return
        del _ATTACHED[self.model]
        del self.model.__dict__["generate"]
        self._hook.remove()
        if self._family.mrope:
            self._family.inner.rope_deltas = self._rope_deltas
        self._caches.clear()

    def __enter__(self) -> Pruning:
        """Return this object; the model is pruned already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the model what it was, also after an exception."""
        self.remove()

    # Calls of the model ------------------------------------------------------------------------

    def _before_forward(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the model's forward: shorten a call with pixels, mend one with our cache."""
        if self._in_generate:
            return self._before_step(args, kwargs)
        named = self._named(args, kwargs)
        cache = named.get("past_key_values")
        shortened = self._shorten(named)
        if shortened is not None:
            if cache is not None and cache.get_seq_length() > 0:
                raise _images_after_cache()
            named = self._short_call(named, shortened)
            if named.get("use_cache") is not False:
                from transformers import DynamicCache

                # Made here, so that this prompt is known again when its cache comes back.
                if cache is None:
                    cache = DynamicCache(config=self.model.config.get_text_config())
                    named["past_key_values"] = cache
                self._caches[cache] = shortened
        elif cache is not None and cache in self._caches:
            named = self._continued_call(named, self._caches[cache], cache)
        else:
            return None
        return (), named

    def _before_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the kept rows to those steps of `generate` that read placeholders."""
        shortened = self._generating
        input_ids = kwargs.get("input_ids")
        if shortened is None or input_ids is None or input_ids.shape[1] == 1:
            return None
        short = shortened.arguments["input_ids"]
        prompts = short.repeat_interleave(len(input_ids) // len(short), dim=0)
        if not torch.equal(input_ids[:, : short.shape[1]], prompts):
            return None  # a step on new tokens only
        kwargs["mm_encoder_outputs"] = shortened.encoder_outputs(len(input_ids))
        if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
            # Without mask and cache transformers takes gaps in the positions for packed prompts.
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        return args, kwargs

    def _generate(
        self, plain: Callable[..., Any], inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in front of the model's own `generate`."""
        if args:
            names = list(inspect.signature(plain).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if inputs is not None:
            kwargs["input_ids"] = inputs
        cache = kwargs.get("past_key_values")
        shortened = self._shorten(kwargs)
        if shortened is None and cache is not None and cache in self._caches:
            return self._generate_on(plain, kwargs, self._caches[cache])
        if shortened is None:
            return self._run(plain, kwargs, None)
        if cache is not None and cache.get_seq_length() > 0:
            raise _images_after_cache()
        for name, reason in _REFUSED.items():
            value = kwargs.get(name)
            if value is None and kwargs.get("generation_config") is not None:
                value = getattr(kwargs["generation_config"], name, None)
            if value is not None:
                raise PromptError(
                    f"generate({name}=...) is not supported with pruned images: {reason}. Leave "
                    "it out, or call it without pruning."
                )
        input_ids = kwargs["input_ids"]
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _FullPromptStreamer(kwargs["streamer"], input_ids)
        kwargs = self._short_call(kwargs, shortened)
        del kwargs["mm_encoder_outputs"]  # the forward hook hands them in, beams and all
        self._shift_lengths(kwargs, input_ids.shape[1] - shortened.prompt.length)
        output = self._run(plain, kwargs, shortened)
        return self._with_full_prompt(output, input_ids, shortened.prompt.length, shortened)

    def _generate_on(
        self, plain: Callable[..., Any], kwargs: dict[str, Any], shortened: Shortened
    ) -> Any:
        """Go on from the cache of a pruned prompt: the caller counts in full-length tokens."""
        input_ids = kwargs["input_ids"]
        kwargs = self._continued_prompt(kwargs, shortened)
        removed = input_ids.shape[1] - kwargs["input_ids"].shape[1]
        short_length = kwargs["input_ids"].shape[1]
        self._shift_lengths(kwargs, removed)
        output = self._run(plain, kwargs, None)
        return self._with_full_prompt(output, input_ids, short_length, shortened)

    def _run(
        self, plain: Callable[..., Any], kwargs: dict[str, Any], shortened: Shortened | None
    ) -> Any:
        self._generating, self._in_generate = shortened, True
        try:
            return plain(**kwargs)
        finally:
            self._generating, self._in_generate = None, False

    def _with_full_prompt(
        self, output: Any, input_ids: Tensor, short_length: int, shortened: Shortened
    ) -> Any:
        """Put the caller's own prompt in front of what was generated."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        repeats = len(sequences) // len(input_ids)
        prompts = input_ids.to(sequences.device).repeat_interleave(repeats, dim=0)
        full = torch.cat([prompts, sequences[:, short_length:]], dim=1)
        if isinstance(output, Tensor):
            return full
        output.sequences = full
        cache = getattr(output, "past_key_values", None)
        if cache is not None and len(sequences) == len(input_ids):
            self._caches[cache] = shortened
        return output

    def _shift_lengths(self, kwargs: dict[str, Any], removed: int) -> None:
        """Let `max_length` and `min_length` count the caller's prompt and not the short one."""
        defaults = kwargs.get("generation_config") or self.model.generation_config
        for name, by_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if kwargs.get(by_new) is None and getattr(defaults, by_new, None) is None:
                length = kwargs.get(name, getattr(defaults, name, None))
                if length:
                    kwargs[name] = max(length - removed, 0)

    # Shortening --------------------------------------------------------------------------------

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a forward call's arguments by name."""
        names = list(self._signature.parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _shorten(self, arguments: dict[str, Any]) -> Shortened | None:
        """Encode, select and shorten a call's prompt; None where it has no image and no video."""
        encoded: Encoded | None = arguments.pop("encoded", None)
        input_ids = arguments.get("input_ids")
        if encoded is None:
            if arguments.get("mm_encoder_outputs"):
                raise PromptError(
                    "mm_encoder_outputs cannot be pruned: they no longer hold what selectors look "
                    "at. Pass the processor's pixel values, or encoded=tokenprune_hf.encode(...)."
                )
            if not self._family.media(arguments):
                self._check_no_placeholders(arguments)
                self.selections = []
                return None
        if input_ids is None or arguments.get("inputs_embeds") is not None:
            raise PromptError(
                "pruning finds visual tokens by their id: pass input_ids, and no inputs_embeds, "
                "together with images or videos."
            )
        with torch.no_grad():
            if encoded is None:
                encoded = encode_media(self._family, arguments, self.selector.needs)
            if encoded is None:
                raise PromptError("there is nothing to encode among the call's arguments.")
            return self._shorten_encoded(arguments, encoded)

    def _check_no_placeholders(self, arguments: dict[str, Any]) -> None:
        """Raise if the prompt asks for images that were not passed."""
        input_ids = arguments.get("input_ids")
        cache = arguments.get("past_key_values")
        if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
            return
        for modality in ("image", "video"):
            count = int((input_ids == self._family.token_id(modality)).sum())
            if count:
                raise PromptError(
                    f"the prompt holds {count} {modality} placeholders and no {modality} was "
                    "passed. Pass the processor's pixel values along with its input_ids."
                )

    def _shorten_encoded(self, arguments: dict[str, Any], encoded: Encoded) -> Shortened:
        config = self.model.config
        input_ids: Tensor = arguments["input_ids"]
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        mask = check_attention_mask(
            input_ids,
            arguments.get("attention_mask"),
            getattr(config.get_text_config(), "pad_token_id", None),
            eos if isinstance(eos, list) else [] if eos is None else [eos],
        )
        missing = [name for name in self.selector.needs if name not in encoded.needs]
        if missing:
            raise PromptError(
                f"encoded was made without {', '.join(missing)}, which method "
                f"{self.selector.name!r} needs. Encode again with needs including them."
            )
        placeholders = {}
        for modality, media in encoded.modalities.items():
            at = (input_ids == self._family.token_id(modality)).nonzero()
            if len(at) != len(media.rows):
                raise PromptError(
                    f"the prompt holds {len(at)} {modality} placeholders and its {modality}s make "
                    f"{len(media.rows)} tokens. Pass input_ids and pixel values of one and the "
                    "same processor call, neither truncated."
                )
            placeholders[modality] = at.to(input_ids.device)

        selections = self._select(encoded, placeholders, input_ids.shape[1])
        staying = torch.ones_like(input_ids, dtype=torch.bool)
        kept, rows_per_sample = {}, {}
        for modality, media in encoded.modalities.items():
            kept[modality] = KeptRows.of(media, selections[modality])
            at = placeholders[modality]
            dropped = at[~kept[modality].staying.to(at.device)]
            staying[dropped[:, 0], dropped[:, 1]] = False
            rows_per_sample[modality] = torch.bincount(at[:, 0], minlength=len(input_ids)).tolist()
        prompt = shorten(staying, mask)

        full_positions = self._full_positions(arguments, input_ids, mask)
        pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
        short = {
            "input_ids": prompt.shorten(input_ids, pad),
            "attention_mask": prompt.shorten(mask, 0),
        }
        for name, fill in FILL.items():
            if isinstance(arguments.get(name), Tensor) and name not in short:
                short[name] = prompt.shorten(arguments[name], fill)
        if self.positions == "original":
            short["position_ids"] = prompt.shorten(full_positions, 0)
            spoken = full_positions.masked_fill(~mask.bool(), -1)
            next_position = spoken.amax(dim=-1).reshape(-1, len(input_ids)).amax(dim=0) + 1
            if full_positions.ndim == 3 and len(full_positions) == 4:
                # Row 0 counts text for the masks: it goes without gaps.
                next_position = spoken[1:].amax(dim=(0, -1)) + 1
                short["position_ids"][0] = _count(short["attention_mask"])
        else:
            counted = _count(short["attention_mask"])
            short["position_ids"] = counted.expand(*full_positions.shape[:-2], -1, -1).clone()
            next_position = short["attention_mask"].sum(dim=1)
        if self._family.mrope:
            spoken_length = short["attention_mask"].sum(dim=1)
            self._family.inner.rope_deltas = (next_position - spoken_length)[:, None]
        return Shortened(input_ids, prompt, short, kept, rows_per_sample, next_position)

    def _select(
        self, encoded: Encoded, placeholders: dict[str, Tensor], length: int
    ) -> dict[str, list[Selection]]:
        """Choose the tokens of every item; `self.selections` gets them in prompt order."""
        result: dict[str, list[Selection]] = {}
        in_prompt: list[tuple[int, Selection]] = []
        for modality, media in encoded.modalities.items():
            items = [item.tokens for item in media.items]
            result[modality] = select_many(items, self.selector, self.keep)
            for item, selection in zip(media.items, result[modality], strict=True):
                sample, column = placeholders[modality][int(item.rows[0])].tolist()
                in_prompt.append((sample * length + column, selection))
        self.selections = [
            selection for _, selection in sorted(in_prompt, key=lambda pair: pair[0])
        ]
        return result

    def _full_positions(self, arguments: dict[str, Any], input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the engine's own positions of the unpruned prompt, [B, L] or [3 or 4, B, L]."""
        given = arguments.get("position_ids")
        if given is not None:
            shape = given.shape[:-2] + input_ids.shape
            positions: Tensor = given.expand(shape) if given.shape != shape else given
            return positions
        # Everything the processor returned, whatever rope arguments a family reads from it.
        known = {
            name: value
            for name, value in arguments.items()
            if name not in ("input_ids", "past_key_values", "attention_mask")
        }
        names = {"image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"}
        known = {name: value for name, value in known.items() if name in names}
        computed: Tensor = self.model._prepare_position_ids_for_generation(
            input_ids, {"input_ids": input_ids, "attention_mask": mask, **known}
        )
        return computed

    def _short_call(self, arguments: dict[str, Any], shortened: Shortened) -> dict[str, Any]:
        """Return a call's arguments with the short prompt and the kept rows in their places."""
        encoder_only = self._family.encoder_arguments()
        result = {name: value for name, value in arguments.items() if name not in encoder_only}
        result.update(shortened.arguments)
        result["mm_encoder_outputs"] = shortened.encoder_outputs(len(shortened.input_ids))
        if (wanted := arguments.get("logits_to_keep")) is not None:
            result["logits_to_keep"] = _short_logits(wanted, shortened.prompt)
        return result

    # Going on from a cache ---------------------------------------------------------------------

    def _continued_call(
        self, named: dict[str, Any], shortened: Shortened, cache: Any
    ) -> dict[str, Any]:
        """Mend a forward call on a pruned cache: mask and positions of the short prompt."""
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or len(tokens) != len(shortened.input_ids):
            raise _other_batch(len(shortened.input_ids))
        new, past = tokens.shape[1], cache.get_seq_length()
        named["attention_mask"] = self._continued_mask(named, shortened, past + new)
        if named.get("position_ids") is None:
            since = past - shortened.prompt.length
            positions = (
                shortened.next_position[:, None]
                + since
                + torch.arange(new, device=shortened.next_position.device)
            )
            named["position_ids"] = positions.expand(3, -1, -1) if self._family.mrope else positions
        elif self.positions == "compact":
            raise PromptError(
                "position_ids count the full prompt, and this cache holds a pruned one with "
                "compact positions. Leave them out: they are worked out from the cache."
            )
        return named

    def _continued_prompt(self, kwargs: dict[str, Any], shortened: Shortened) -> dict[str, Any]:
        """Return `generate` arguments in which the known prompt is replaced by its short form."""
        input_ids: Tensor = kwargs["input_ids"]
        full = shortened.input_ids.to(input_ids.device)
        if len(input_ids) != len(full):
            raise _other_batch(len(full))
        length = full.shape[1]
        if input_ids.shape[1] <= length or not torch.equal(input_ids[:, :length], full):
            raise PromptError(
                "this cache was filled by another prompt. Pass input_ids that begin with the "
                f"prompt the cache was filled by ({length} tokens) and go on with new ones."
            )
        ids = torch.cat([shortened.arguments["input_ids"], input_ids[:, length:]], dim=1)
        new = input_ids.shape[1] - length
        steps = torch.arange(new, device=input_ids.device)
        positions = shortened.next_position[:, None] + steps
        short_positions = shortened.arguments["position_ids"]
        result = {**kwargs, "input_ids": ids}
        result["attention_mask"] = self._continued_mask(kwargs, shortened, ids.shape[1])
        result["position_ids"] = torch.cat(
            [short_positions, positions.expand(*short_positions.shape[:-1], -1)], dim=-1
        )
        for name in ("token_type_ids", "mm_token_type_ids"):
            if isinstance(kwargs.get(name), Tensor):
                result[name] = torch.cat(
                    [shortened.arguments[name], kwargs[name][:, length:]], dim=1
                )
        return result

    def _continued_mask(
        self, arguments: dict[str, Any], shortened: Shortened, length: int
    ) -> Tensor:
        """Return the mask [B, length] of a short prompt and what came after it."""
        short = shortened.arguments["attention_mask"]
        after, full = length - short.shape[1], shortened.prompt.full_length
        given = arguments.get("attention_mask")
        if given is None:
            given = short.new_ones(len(short), full + after)
        if given.shape[1] != full + after:
            raise PromptError(
                f"attention_mask has {given.shape[1]} columns; on the cache of a pruned prompt it "
                f"must cover the full prompt ({full}) and what came after it ({after})."
            )
        return torch.cat([short, given[:, full:].to(short)], dim=1)


class _FullPromptStreamer:
    """Passes a streamer the caller's prompt in place of the short one, then every new token."""

    def __init__(self, streamer: Any, input_ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = input_ids

    def put(self, value: Tensor) -> None:
        """Pass on what was generated; the first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        self._streamer.end()


_ATTACHED: weakref.WeakKeyDictionary[Any, Pruning] = weakref.WeakKeyDictionary()


def apply(
    model: Any,
    method: str | Selector,
    keep: Keep,
    positions: Positions = "original",
    **options: Any,
) -> Pruning:
    """Make a model's `generate` and calls run pruned until `remove`.

    Parameters
    ----------
    model
        A vision-language model of transformers of a family in `tokenprune_hf.supported_models()`.
    method
        A name out of `tokenprune.methods()`, or a `tokenprune.Selector` of your own.
    keep
        Budget of each image, video or crop: an int of tokens or a fraction.
    positions
        ``"original"``: kept tokens, and the text after them, have the positions of the full
        prompt. ``"compact"``: the short prompt is numbered without gaps, as the published code of
        FasterVLM and ZOO-Prune does (on models with M-RoPE all three axes count alike then).
    **options
        The method's own options.

    Returns
    -------
    Pruning
        With `selections` of the last call and `remove`.

    Raises
    ------
    UnknownMethodError, OptionError, BudgetError, ConfigError
        For a wrong method, option, budget or way to count positions.
    UnsupportedModelError
        If the model, or the method on this model, is not supported.
    TokenPruneError
        If the model is pruned already.
    """
    if isinstance(method, Selector):
        if options:
            raise TokenPruneError(
                f"options {sorted(options)} came with a {type(method).__name__} object, which has "
                "its options already. Set them there."
            )
        PruningConfig("random", keep, positions)  # checks keep and positions
        pruning = Pruning(model, method, keep, positions)
    else:
        config = PruningConfig(method, keep, positions, options)
        pruning = Pruning(model, config.selector(), config.keep, positions)
    pruning._attach()
    return pruning


def prune(
    model: Any,
    method: str | Selector,
    keep: Keep,
    positions: Positions = "original",
    **options: Any,
) -> Pruning:
    """Prune a model inside a ``with`` block; parameters, result and errors as `apply`.

    After the block the model is exactly as it was, also after an exception.
    """
    return apply(model, method, keep, positions, **options)


def remove(model: Any) -> None:
    """Undo `apply`; a model that is not pruned stays as it is."""
    pruning = _ATTACHED.get(model)
    if pruning is not None:
        pruning.remove()


def _count(mask: Tensor) -> Tensor:
    """Return positions without gaps: 0, 1, 2 … where the mask is 1, and 0 at padding."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0).masked_fill(mask == 0, 0)


def _short_logits(wanted: int | Tensor, prompt: ShortPrompt) -> int | Tensor:
    """Turn `logits_to_keep`, which counts the full prompt, into the short prompt's terms.

    Raises
    ------
    PromptError
        If it asks for a dropped token, or for a token that stands elsewhere in each prompt.
    """
    full = prompt.full_length
    if isinstance(wanted, int):
        if wanted == 0:
            return 0
        columns = list(range(max(full - wanted, 0), full))
    else:
        columns = [int(column) % full for column in wanted]
    moved = [prompt.new_column(column) for column in columns]
    if any(bool((places != places[0]).any()) or int(places[0]) < 0 for places in moved):
        raise PromptError(
            f"logits_to_keep={wanted} asks for logits at a token that was dropped, or that stands "
            "at different places in the batch. Ask for fewer of the last tokens, or for all (0)."
        )
    return torch.tensor([int(places[0]) for places in moved], device=prompt.columns.device)


def _images_after_cache() -> PromptError:
    return PromptError(
        "images or videos cannot be added to a cache that is already filled. Leave out the pixel "
        "values if the cache holds them, or call without past_key_values."
    )


def _other_batch(batch: int) -> PromptError:
    return PromptError(
        f"this cache was filled by a batch of {batch} prompts; go on with as many prompts."
    )
