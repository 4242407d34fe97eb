"""Left: which columns of a batch of prompts the layers behind each stage still hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.merging import Merge
from tokenprune_hf.prompt import ShortPrompt


@dataclass(frozen=True, eq=False)
class Merged:
    """Tokens of one item that are merged when a stage is passed.

    Attributes
    ----------
    prompt
        Its number.
    before, after
        LongTensors [n] and [k]: columns of the item's tokens in front of the stage, and of those
        that stay behind it.
    kept
        LongTensor [k], which of the n these are.
    merge
        What is added to them.
    """

    prompt: int
    before: Tensor
    after: Tensor
    kept: Tensor
    merge: Merge


@dataclass(frozen=True, eq=False)
class Behind:
    """What is left of B prompts behind a stage.

    Attributes
    ----------
    layer
        The first layer that reads no more than this.
    columns
        LongTensor [B, S], the columns that are left, counted in the prompt as it was read first;
        ascending among the valid ones.
    valid
        BoolTensor [B, S], False where a prompt is filled up.
    padded
        Whether any is.
    step
        How the columns in front of the stage became these; None in a cache, which reads no prompt.
    merged
        What is merged on the way; empty in a cache.
    """

    layer: int
    columns: Tensor
    valid: Tensor
    padded: bool
    step: ShortPrompt | None = None
    merged: tuple[Merged, ...] = ()

    def passed(self, states: Tensor, repeats: int) -> Tensor:
        """Return the hidden states behind the stage, [R, S + n, D].

        Parameters
        ----------
        states
            [R, L + n, D] in front of it: R / `repeats` prompts of L columns, and n tokens more.
        repeats
            How many rows each prompt has, one behind the other.
        """
        if self.step is None:
            raise RuntimeError("what a cache holds is read by no stage")
        places = with_new(self.step.columns, self.step.full_length, repeats, states.shape[1])
        index = places.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        result = states.gather(1, index)
        for one in self.merged:
            before, after = one.before.to(states.device), one.after.to(states.device)
            for row in range(one.prompt * repeats, (one.prompt + 1) * repeats):
                sums = one.merge.sums(states[row, before], one.kept.to(states.device))
                result[row, after] = sums.to(states.dtype)
        return result


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of B prompts behind every stage.

    Attributes
    ----------
    stages
        In order of their layers.
    length
        L, columns of the prompts as they were read first.
    """

    stages: tuple[Behind, ...]
    length: int

    def at(self, layer: int) -> Behind | None:
        """Return what a layer holds; None for layers in front of the first stage."""
        behind = [stage for stage in self.stages if stage.layer <= layer]
        return behind[-1] if behind else None

    def in_cache(self) -> Left:
        """Return the same without what only a call needs that reads the prompts again."""
        return replace(
            self, stages=tuple(replace(one, step=None, merged=()) for one in self.stages)
        )

    def of_rows(self, rows: Tensor) -> Left:
        """Return what is left of some of the prompts, LongTensor [C], in any order."""
        stages = tuple(
            replace(
                one,
                columns=one.columns[rows.to(one.columns.device)],
                valid=one.valid[rows.to(one.valid.device)],
            )
            for one in self.in_cache().stages
        )
        return replace(self, stages=stages)

    def cut_to(self, length: int) -> Left:
        """Return what is left of the prompts without their ends, which are text in all of them."""
        removed = self.length - length
        stages = tuple(
            replace(one, columns=one.columns[:, :-removed], valid=one.valid[:, :-removed])
            for one in self.in_cache().stages
        )
        return Left(stages, length)


def with_new(columns: Tensor, length: int, repeats: int, total: int) -> Tensor:
    """Return columns [R, S + n] of each row, with those of tokens behind the prompt.

    Parameters
    ----------
    columns
        LongTensor [B, S], counted in prompts of `length`.
    length
        L.
    repeats
        Rows of each prompt.
    total
        L + n.
    """
    rows = columns.repeat_interleave(repeats, dim=0)
    new = torch.arange(length, total, device=columns.device)
    return torch.cat([rows, new.expand(len(rows), -1)], dim=1)


def rows_with_new(behind: Behind, length: int, repeats: int, total: int) -> tuple[Tensor, Tensor]:
    """Return `with_new` of what is left behind a stage, and BoolTensor [R, S + n], which count.

    All tokens behind the prompt do.
    """
    valid = behind.valid.repeat_interleave(repeats, dim=0)
    valid = torch.nn.functional.pad(valid, (0, total - length), value=True)
    return with_new(behind.columns, length, repeats, total), valid
