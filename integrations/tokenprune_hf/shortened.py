"""Shortened: one batch of prompts without the dropped tokens, and how to go on from it.

Callers count in tokens of their own, full prompt; the engine sees the short one. Everything that
translates a call from the one to the other is here: arguments, masks, `logits_to_keep`, and calls
that come back with the cache of a pruned prompt. `tokenprune_hf.shortening` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.config import Application as Application
from tokenprune.config import Positions
from tokenprune.errors import PromptError
from tokenprune.transfer import to_device
from tokenprune_hf.encoding import KeptRows
from tokenprune_hf.inside.items import Placed
from tokenprune_hf.inside.left import Left
from tokenprune_hf.prompt import TYPE_IDS, ShortPrompt


@dataclass(frozen=True)
class Shortened:
    """A batch of prompts without the dropped tokens.

    Attributes
    ----------
    input_ids
        The caller's LongTensor [B, L].
    prompt
        How [B, L] became [B, S].
    arguments
        What the engine is given in place of the caller's: input_ids, attention_mask,
        position_ids, and token type ids and labels where there are any; each [..., B, S].
    kept
        The rows that stay, per modality.
    rows_per_sample
        Per modality, how many rows each prompt had.
    following
        LongTensor [..., B], the position of the first token after the prompt, per axis.
    logs
        float32 [B, S], log of how many tokens each column stands for: 0 for text, and wherever
        the selections do not say.
    visual
        BoolTensor [B, S], True where a column is a row of the encoder.
    text_at_end
        How many columns at the end are text, and no padding, in every prompt: they have kept their
        distance to the end.
    items
        Where the items stand, for a method that has their tokens leave inside the language model;
        None for other methods, and where only what is known of a cache is needed.
    left
        What is left of the prompts behind each stage of such a method; None where nothing left.
    """

    input_ids: Tensor
    prompt: ShortPrompt
    arguments: dict[str, Tensor]
    kept: dict[str, KeptRows]
    rows_per_sample: dict[str, list[int]]
    following: Tensor
    logs: Tensor
    visual: Tensor
    text_at_end: int = 0
    items: Placed | None = None
    left: Left | None = None

    def without_media(self) -> Shortened:
        """Return what is needed to go on from the prompt, without the encoder's rows."""
        left = None if self.left is None else self.left.in_cache()
        return replace(self, kept={}, rows_per_sample={}, items=None, left=left)

    def of_rows(self, rows: Tensor) -> Shortened:
        """Return some of the prompts, LongTensor [C], in any order and with repeats; no media."""
        # Whoever goes on from rows of a cache needs no encoder: its rows are in the cache as keys.
        rows = rows.to(self.input_ids.device)
        return replace(
            self.without_media(),
            input_ids=self.input_ids[rows],
            prompt=replace(
                self.prompt, columns=self.prompt.columns[rows], valid=self.prompt.valid[rows]
            ),
            arguments={name: value[..., rows, :] for name, value in self.arguments.items()},
            following=self.following[..., rows],
            logs=self.logs[rows],
            visual=self.visual[rows],
            left=None if self.left is None else self.left.of_rows(rows),
        )

    def cut_to(self, length: int) -> Shortened:
        """Return the prompts without their ends, of which a cache holds `length` tokens; no media.

        Raises
        ------
        PromptError
            If more than text is cut off.
        """
        # What is cut off the short prompt must be cut off the full one, or the caller's next prompt
        # could not be compared with what the cache holds. Only at an end of text, without gaps, the
        # two lose the same tokens.
        removed = self.prompt.length - length
        columns, full = self.prompt.columns[:, length:], self.prompt.full_length
        ends = torch.arange(full - removed, full, device=columns.device)
        text = self.prompt.valid & ~self.visual
        if not bool((columns == ends).all()) or not bool(text[:, length:].all()):
            raise PromptError(
                f"the last {removed} tokens of a pruned prompt were cut off this cache, and not "
                "all of them are text behind the last image. Cut off less, or read the prompt "
                "again without this cache."
            )
        # The last axis of every argument, and of positions, runs over columns.
        return replace(
            self.without_media(),
            input_ids=self.input_ids[:, : full - removed],
            prompt=replace(
                self.prompt,
                columns=self.prompt.columns[:, :length],
                valid=self.prompt.valid[:, :length],
                full_length=full - removed,
            ),
            arguments={name: value[..., :length] for name, value in self.arguments.items()},
            following=self.arguments["position_ids"][..., length],
            logs=self.logs[:, :length],
            visual=self.visual[:, :length],
            text_at_end=0,
            left=None if self.left is None else self.left.cut_to(length),
        )

    def encoder_outputs(self, batch: int) -> dict[str, Any]:
        """Return `mm_encoder_outputs` for a batch of `batch` prompts, a multiple of B."""
        repeats = batch // len(self.input_ids)
        return {
            modality: kept.output(self.rows_per_sample[modality], repeats)
            for modality, kept in self.kept.items()
        }

    def begins(self, input_ids: Tensor) -> Tensor:
        """Say whether [B * repeats, ...], no shorter than the prompt, begins with it: one bool."""
        short = self.arguments["input_ids"]
        prompts = short.repeat_interleave(len(input_ids) // len(short), dim=0)
        return (input_ids[:, : self.prompt.length] == prompts.to(input_ids.device)).all()

    def positions_after(self, since: int, count: int, batch: int) -> Tensor:
        """Return the positions [..., batch, count] of tokens that come after the prompt.

        Parameters
        ----------
        since
            How many tokens stand between the prompt and the first of them.
        count
            How many positions.
        batch
            Prompts of the call, a multiple of B.
        """
        following = self.following.repeat_interleave(batch // len(self.input_ids), dim=-1)
        steps = torch.arange(since, since + count, device=following.device)
        return following[..., None] + steps

    def positions_of(self, past: int, count: int, batch: int) -> Tensor:
        """Return the positions [..., batch, count] of any tokens, of the prompt or after it.

        Parameters
        ----------
        past
            How many tokens of the short prompt, and after it, stand in front of the first of them.
        count, batch
            See `positions_after`.
        """
        own = self.arguments["position_ids"]
        prompts = own.repeat_interleave(batch // own.shape[-2], dim=-2)
        new = max(past + count - self.prompt.length, 0)
        every = torch.cat([prompts, self.positions_after(0, new, batch)], dim=-1)
        return every[..., past : past + count]

    def mask_of(self, length: int, batch: int) -> Tensor:
        """Return the attention mask [batch, length] of the prompts and of tokens behind them."""
        short = self.arguments["attention_mask"]
        rows = short.repeat_interleave(batch // len(short), dim=0)
        return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=1)

    @property
    def ends_with_dropped(self) -> bool:
        """Whether some prompt's last token was dropped, so that its position is not in the end."""
        # Possible where an image ends the prompt. The engine takes the last position it is given
        # and counts on from there: too low by those that were dropped behind it.
        if self.text_at_end:
            return False
        last = self.prompt.new_column(self.prompt.full_length - 1)
        return bool((last < 0).any())

    def call(self, arguments: Mapping[str, Any], encoder_only: set[str]) -> dict[str, Any]:
        """Return a call's arguments with the short prompt and the kept rows in their places."""
        result = {name: value for name, value in arguments.items() if name not in encoder_only}
        result.update(self.arguments)
        result["mm_encoder_outputs"] = self.encoder_outputs(len(self.input_ids))
        if (wanted := arguments.get("logits_to_keep")) is not None:
            result["logits_to_keep"] = _short_logits(wanted, self.prompt, self.text_at_end)
        return result

    def continued_call(
        self, arguments: Mapping[str, Any], past: int, positions: Positions
    ) -> dict[str, Any]:
        """Mend a forward call on this prompt's cache: mask and positions.

        Parameters
        ----------
        arguments
            The call's, by name; masks count the full prompt.
        past
            Tokens in the cache.
        positions
            How this prompt's were counted.

        Raises
        ------
        PromptError
            If the call is of another batch, or its mask or positions do not fit.
        """
        result = dict(arguments)
        tokens = result.get("input_ids")
        tokens = result.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or len(tokens) != len(self.input_ids):
            raise _other_batch(len(self.input_ids))
        new = tokens.shape[1]
        result["attention_mask"] = self._continued_mask(arguments, past + new)
        # Positions that the caller gives count the full prompt, as `original` ones do: they fit.
        if result.get("position_ids") is None:
            after = self.positions_after(past - self.prompt.length, new, len(tokens))
            result["position_ids"] = after
        elif positions == "compact":
            raise PromptError(
                "position_ids count the full prompt, and this cache holds a pruned one with "
                "compact positions. Leave them out: they are worked out from the cache."
            )
        return result

    def continued_prompt(
        self, arguments: Mapping[str, Any], after: Tensor | None
    ) -> dict[str, Any]:
        """Return arguments of `generate` in which the known prompt is replaced by its short form.

        Parameters
        ----------
        arguments
            The call's, by name.
        after
            LongTensor [B, n], what the cache holds after the prompt; None for embeddings.

        Raises
        ------
        PromptError
            If `input_ids` do not begin with the caller's prompt and what came after it, and go on.
        """
        if arguments.get("input_ids") is None:
            raise PromptError(
                "this cache holds a pruned prompt, which is told by its tokens. Pass input_ids "
                "with the whole conversation, and no inputs_embeds."
            )
        input_ids: Tensor = arguments["input_ids"]
        full = self.input_ids.to(input_ids.device)
        if len(input_ids) != len(full):
            raise _other_batch(len(full))
        length = full.shape[1]
        if input_ids.shape[1] <= length or not torch.equal(input_ids[:, :length], full):
            raise PromptError(
                "this cache was filled by another prompt. Pass input_ids that begin with the "
                f"prompt the cache was filled by ({length} tokens) and go on with new ones."
            )
        if after is None:
            raise PromptError(
                "embeddings were read behind this cache's pruned prompt, so that its tokens are "
                "not known. Go on by calls of the model itself, or read the prompt again."
            )
        # The engine reads on from the cache's length. So what the caller passes must have, behind
        # the prompt, exactly the tokens whose keys are there.
        read = input_ids[:, length : length + after.shape[1]]
        if not torch.equal(read, after.to(read.device)):
            raise PromptError(
                f"this cache holds {after.shape[1]} tokens behind its prompt, and they are not "
                "those of input_ids. A pruned prompt is shorter than the one that was passed, so "
                "cut tokens off by their number (cache.crop(-n)) and not by the length that is "
                "to be left."
            )
        # `generate` is given the whole conversation and leaves out of it what the cache holds: by
        # number of tokens, so the prompt in front has to be the short one here too.
        result = dict(arguments)
        for name in ("input_ids", *TYPE_IDS):
            if isinstance(arguments.get(name), Tensor) and name in self.arguments:
                rest = arguments[name][:, length:]
                result[name] = torch.cat([self.arguments[name], rest], dim=1)
        new = input_ids.shape[1] - length
        result["attention_mask"] = self._continued_mask(arguments, self.prompt.length + new)
        result["position_ids"] = torch.cat(
            [self.arguments["position_ids"], self.positions_after(0, new, len(full))], dim=-1
        )
        return result

    def _continued_mask(self, arguments: Mapping[str, Any], length: int) -> Tensor:
        """Return the mask [B, length] of the short prompt and what came after it."""
        short = self.arguments["attention_mask"]
        after, full = length - short.shape[1], self.prompt.full_length
        given = arguments.get("attention_mask")
        if given is None:
            given = short.new_ones(len(short), full + after)
        if given.shape[1] != full + after:
            raise PromptError(
                f"attention_mask has {given.shape[1]} columns; on the cache of a pruned prompt it "
                f"must cover the full prompt ({full}) and what came after it ({after})."
            )
        # Of the prompt the short mask stands, which hides what was hidden when it was read.
        return torch.cat([short, given[:, full:].to(short)], dim=1)


def _short_logits(wanted: int | Tensor, prompt: ShortPrompt, text_at_end: int) -> int | Tensor:
    """Turn `logits_to_keep`, which counts the full prompt, into the short prompt's terms.

    Parameters
    ----------
    wanted
        Of the full prompt.
    prompt
        How it was shortened.
    text_at_end
        See `Shortened`.

    Raises
    ------
    PromptError
        If it asks for a dropped token, or for a token that stands elsewhere in each prompt.
    """
    full = prompt.full_length
    if isinstance(wanted, int):
        if wanted <= text_at_end:
            return wanted
        columns = list(range(max(full - wanted, 0), full))
    else:
        columns = [column % full for column in wanted.tolist()]
        if min(columns, default=0) >= full - text_at_end:
            kept = torch.tensor([column - full + prompt.length for column in columns], device="cpu")
            return to_device(kept, prompt.columns.device)
    # The engine takes one list of columns for the whole batch, so a token must have come to the
    # same column in every prompt. A number of last tokens becomes a list: among them may have been
    # dropped ones, and the short prompt's last tokens would be others.
    moved = torch.stack([prompt.new_column(column) for column in columns]).tolist()
    if any(min(short) != max(short) or short[0] < 0 for short in moved):
        raise PromptError(
            f"logits_to_keep={wanted} asks for logits at a token that was dropped, or that stands "
            "at different places in the batch. Ask for fewer of the last tokens, or for all (0)."
        )
    kept = torch.tensor([short[0] for short in moved], device="cpu")
    return to_device(kept, prompt.columns.device)


def _other_batch(batch: int) -> PromptError:
    return PromptError(
        f"this cache was filled by a batch of {batch} prompts; go on with as many prompts."
    )
