"""The attention that tokens receive in a tower that nobody described, and the check of it.

What a scoring layer was seen with (q, k, and which tokens see each other) is right if the layer's
own output can be calculated from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.tower.attention import cls_row, packed_pictures, received
from tokenprune.tower.tracing import NotFoundError

_QUERIES = 64
"""So many tokens are calculated again in each run."""

_SHARE = 0.1
"""How far a calculation may be off, as a share of how far plain averaging is."""


@dataclass(frozen=True)
class Pictures:
    """Which tokens [B, P] of a run see each other.

    Attributes
    ----------
    lengths
        Tokens of each picture, where all stand in one sequence and see those of their own; or None.
    real
        BoolTensor [B, P], which tokens are no padding, where others see them; or None for all.
    """

    lengths: tuple[int, ...] | None = None
    real: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, edges: Tensor | None, shape: Sequence[int]) -> Pictures:
        """Return what an attention was told.

        Parameters
        ----------
        mask
            Bool (True may be seen), additive, or [B, P] of zeros and ones; or None.
        edges
            LongTensor, where pictures start and end in one sequence; or None.
        shape
            B and P.

        Raises
        ------
        NotFoundError
            If some tokens see others than those of their own picture.
        """
        batch, tokens = shape
        if edges is not None:
            if batch != 1 or int(edges[-1]) != tokens:
                raise NotFoundError("its tower packs pictures in a way of its own")
            return cls(lengths=tuple(edges.diff().tolist()))
        if mask is None:
            return cls()
        if mask.dtype != torch.bool:
            mask = mask > 0 if mask.ndim == 2 else mask >= 0
        if mask.ndim == 4:
            if bool((mask != mask[:, :1]).any()):
                raise NotFoundError("the heads of its tower see different tokens")
            mask = mask[:, 0]
        elif mask.ndim == 2:
            mask = mask[:, None]
        mask = mask.expand(batch, -1, tokens)
        if mask.shape[1] == 1 or not bool((mask != mask[:, :1]).any()):
            real = mask[:, 0]
            return cls() if bool(real.all()) else cls(real=real)
        start = mask.int().argmax(dim=-1)
        same_picture = start[:, :, None] == start[:, None, :]
        if batch != 1 or not torch.equal(mask, same_picture):
            raise NotFoundError("tokens of its tower see others than those of their own picture")
        _, lengths = torch.unique_consecutive(start[0], return_counts=True)
        return cls(lengths=tuple(lengths.tolist()))

    def lengths_of(self, shape: Sequence[int]) -> Tensor:
        """Return LongTensor [B * P], how many tokens see each token; 0 for padding."""
        batch, tokens = shape
        if self.lengths is not None:
            counts = torch.tensor(self.lengths)
            return counts.repeat_interleave(counts)
        if self.real is not None:
            real = self.real.cpu()
            return (real * real.sum(dim=1, keepdim=True)).flatten()
        return torch.full((batch * tokens,), tokens)

    def visible(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return BoolTensor [B, 1, P, P], which token sees which."""
        batch, tokens = shape
        if self.lengths is not None:
            counts = torch.tensor(self.lengths, device=device)
            own = torch.arange(len(counts), device=device).repeat_interleave(counts)
            return (own[:, None] == own)[None, None]
        if self.real is not None:
            return self.real[:, None, None].to(device).expand(-1, 1, tokens, -1)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(
            batch, 1, tokens, tokens
        )


def scores_of(
    query: Tensor, key: Tensor, scale: float, pictures: Pictures, has_cls: bool
) -> Tensor:
    """Return how much attention each token of a run receives.

    Parameters
    ----------
    query, key
        [B, H, P, d].
    scale
        The factor on q kᵀ.
    pictures
        Which of them see each other.
    has_cls
        Whether the first token of each picture is a CLS token, whose attention it is then.

    Returns
    -------
    Tensor
        float32 [H, B * P].
    """
    if pictures.lengths is not None:
        return packed_pictures(query, key, scale, pictures.lengths)
    if pictures.real is None:
        score = cls_row if has_cls else received
        return score(query, key, scale).transpose(0, 1).flatten(1)
    scores = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for number, real in enumerate(pictures.real):
        own = real.nonzero()[:, 0]
        one = slice(number, number + 1)
        scores[one][:, :, own] = received(query[one][:, :, own], key[one][:, :, own], scale)
    return scores.transpose(0, 1).flatten(1)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, pictures: Pictures
) -> None:
    """Raise unless a layer's output is what q, k and v make of each other.

    Parameters
    ----------
    query, key, value
        [B, H, P, d].
    output
        [..., H * d], B * P tokens, before the layer's last projection.
    scale, pictures
        See `scores_of`.

    Raises
    ------
    NotFoundError
        If it is not.
    """
    batch, heads, tokens, width = query.shape
    own = output.reshape(batch, tokens, heads, width).transpose(1, 2).float()
    if key.shape != query.shape or value.shape != query.shape:
        raise NotFoundError("the heads of its tower share keys, or see other tokens")
    chosen = torch.linspace(0, tokens - 1, min(tokens, _QUERIES), device=query.device).long()
    visible = pictures.visible((batch, tokens), query.device)[:, :, chosen]
    logits = query[:, :, chosen].float() @ key.float().mT * scale
    shares = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    evenly = visible / visible.sum(dim=-1, keepdim=True)
    # Padding may be given anything.
    counts = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    if pictures.real is not None:
        counts = pictures.real.to(query.device)
    told = counts[:, None, chosen, None]
    expected = own[:, :, chosen]
    off = ((shares @ value.float() - expected) * told).abs().max()
    plain = ((evenly @ value.float() - expected) * told).abs().max()
    if not bool(off <= _SHARE * plain):
        raise NotFoundError("its tower attends otherwise than what was seen of its q and k says")


def check_scored(
    runs: Sequence[tuple[Sequence[int], Pictures]],
    returned: Sequence[Tensor],
    tokens: Tensor,
    has_cls: bool,
) -> None:
    """Raise unless a scoring layer scores the tokens that stand behind the rows.

    Parameters
    ----------
    runs
        B and P of each of its runs, and which tokens see each other.
    returned
        [..., C], what the layer returned in each.
    tokens
        LongTensor [R, t], those behind the rows; of structure, -1.
    has_cls
        Whether the first token of each picture is a CLS token.

    Raises
    ------
    NotFoundError
        If it scores others, or a CLS token is not where `scores_of` looks for it.
    """
    if not runs:
        raise NotFoundError("its tower's attention did not run")
    sizes = [math.prod(shape) for shape, _ in runs]
    if sizes != [one.numel() // one.shape[-1] for one in returned]:
        raise NotFoundError("its tower's last layer scores other tokens than it returns")
    if not has_cls:
        return
    start = 0
    for (batch, length), pictures in runs:
        if pictures.lengths is not None or pictures.real is not None:
            raise NotFoundError("its tower packs or pads pictures that have a CLS token")
        firsts = start + length * torch.arange(batch, device=tokens.device)
        if bool(torch.isin(firsts, tokens).any()):
            raise NotFoundError("its tower's CLS token is among the rows")
        start += batch * length


def check_lengths(lengths: Tensor, tokens: Tensor) -> None:
    """Raise unless the tokens of one item all stand in pictures of one size.

    A token of a smaller picture receives a larger share of its attention, whatever it shows.

    Parameters
    ----------
    lengths
        See `Pictures.lengths_of`.
    tokens
        LongTensor [R, t], those behind the item's rows.

    Raises
    ------
    NotFoundError
        If they do not.
    """
    if len(lengths[tokens.cpu()].unique()) > 1:
        raise NotFoundError(
            "its tower attends inside windows or pictures of different sizes, whose tokens cannot "
            "be compared"
        )


def mean_of_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return float32 [H, R] of scores [H, n]: of each row the mean over its tokens [R, t]."""
    of_rows: Tensor = scores[:, tokens.clamp(min=0)].mean(dim=-1)
    return of_rows


def has_cls(model: nn.Module, stack: str) -> bool:
    """Say whether the tower with this stack of layers puts a CLS token in front of its patches.

    Parameters
    ----------
    model
        The module that holds the tower.
    stack
        Where the tower keeps its layers.
    """
    parts = stack.split(".")
    for end in range(len(parts), 0, -1):
        part = model.get_submodule(".".join(parts[:end]))
        names = {name.rpartition(".")[2] for name, _ in part.named_parameters()}
        if names & {"class_embedding", "cls_token"}:
            return True
    return False
