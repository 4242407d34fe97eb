"""Images that ranks share out among them: what each saw of its own, put together on all.

With ``--mm-encoder-tp-mode data`` the encoder is whole on every rank and runs on some of the images
there; vLLM gathers the rows. What hooks saw meanwhile is gathered here, so that every rank chooses
from the same numbers. Packed images are shared out by their size, and a rank may get none; pictures
of one size in equal parts, the last of which is filled up with empty pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tp_group,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models import vision

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.tower.layouts import Medium
from tokenprune_vllm.scoring import Watched, watch


@dataclass(frozen=True)
class _Shares:
    """Which of some packed images each rank encodes, by their numbers, in the order it does."""

    of_ranks: Sequence[Sequence[int]]

    @classmethod
    def of(cls, order: Sequence[int], counts: Sequence[int]) -> _Shares:
        """Return the shares of ranks that encode so many images each, one rank after another."""
        numbers = iter(order)
        return cls([[next(numbers) for _ in range(count)] for count in counts])


class Sharing:
    """Puts together what ranks saw that share out images.

    Parameters
    ----------
    family
        Of the model.
    in_tower
        Whether the projector's input is seen where each rank has its own images; else, behind
        vLLM's gathering, every rank sees that of all.
    """

    def __init__(self, family: Family, in_tower: bool) -> None:
        self._family = family
        self._in_tower = in_tower
        self._shares: list[_Shares] = []
        self._kinds: dict[str, tuple[int, torch.dtype]] = {}
        self._widths: dict[str, int] = {}

    @contextmanager
    def watching(
        self,
        entrance: nn.Module | None,
        attention: nn.Module | None,
        middle: nn.Module | None = None,
    ) -> Iterator[Watched]:
        """Do as `tokenprune_vllm.scoring.watch`, and note how vLLM shares packed images out."""
        plain: Any = vision.get_load_balance_assignment
        self._shares = []

        def note(sizes: list[int], ranks: int = 2) -> Any:
            assigned = plain(sizes, ranks)
            self._shares.append(_Shares.of(*assigned[:2]))
            return assigned

        vision.get_load_balance_assignment = note
        try:
            with watch(entrance, attention, middle) as watched:
                yield watched
        finally:
            vision.get_load_balance_assignment = plain

    def looked_at(
        self, look: Callable[[Sequence[Medium]], dict[str, Tensor]], media: Sequence[Medium]
    ) -> dict[str, Tensor]:
        """Return `tokenprune.families.base.Family.looked_at` of all images, on every rank.

        Parameters
        ----------
        look
            Returns it of the images that this rank encoded.
        media
            All images.
        """
        if not self._family.packed:
            pictures = sum(medium.pictures for medium in media)
            return {name: _of_all_parts(seen, pictures) for name, seen in look(media).items()}
        shares = self._shares_of(media)
        if shares is None:
            return look(media)
        own = [media[number] for number in shares.of_ranks[get_tensor_model_parallel_rank()]]
        # A tower that had nothing to do was not seen.
        seen = look(own) if own else {}
        lengths = [sum(self._family.packed_lengths(medium)) for medium in media]
        together = torch.cat([one[0].mT for one in seen.values()], dim=1) if seen else None
        if not self._widths:
            # vLLM gives the largest image to the first rank, which therefore always has one.
            widths = {name: one.shape[1] for name, one in seen.items()}
            self._widths = get_tp_group().broadcast_object(widths, src=0)
        of_all = self._together("attention", together, lengths, shares).mT[None]
        return dict(zip(self._widths, of_all.split(list(self._widths.values()), 1), strict=True))

    def features(self, watched: Watched, media: Sequence[Medium]) -> Tensor:
        """Return the projector's input of all images, on every rank."""
        if not self._family.packed:
            return _of_all_parts(watched.features, sum(medium.pictures for medium in media))
        shares = self._shares_of(media)
        if shares is None or not self._in_tower:
            return watched.features
        lengths = [self._family.tokens(medium) for medium in media]
        own = sum(lengths[number] for number in shares.of_ranks[get_tensor_model_parallel_rank()])
        seen = watched.features.reshape(own, -1) if own else None
        return self._together("features", seen, lengths, shares)

    def _shares_of(self, media: Sequence[Medium]) -> _Shares | None:
        """Return how vLLM shared packed images out; None where every rank encoded all of them.

        Raises
        ------
        UnsupportedModelError
            If it shared out something else.
        """
        if not self._shares:
            return None
        shared = [sum(map(len, shares.of_ranks)) for shares in self._shares]
        if shared != [len(media)]:
            raise UnsupportedModelError(
                f"vLLM shared out {shared} pictures among ranks for {len(media)} images, and "
                "tokenprune does not know which of them are which. Serve this model with "
                "--mm-encoder-tp-mode weights."
            )
        return self._shares[0]

    def _together(
        self, kind: str, seen: Tensor | None, lengths: Sequence[int], shares: _Shares
    ) -> Tensor:
        """Return what all ranks saw, in the order of images.

        Parameters
        ----------
        kind
            What it is; all of one kind are alike but for their length.
        seen
            [n, X] of this rank's images; None where it has none.
        lengths
            Of each image.
        shares
            Of the ranks.
        """
        of_ranks = [[lengths[number] for number in own] for own in shares.of_ranks]
        if kind not in self._kinds:
            # vLLM gives the largest image to the first rank, which therefore always has one.
            alike = None if seen is None else (seen.shape[1], seen.dtype)
            self._kinds[kind] = get_tp_group().broadcast_object(alike, src=0)
        width, dtype = self._kinds[kind]
        # Ranks gather tensors of one shape.
        filled = torch.zeros(max(map(sum, of_ranks)), width, dtype=dtype, device=self._device(seen))
        if seen is not None:
            filled[: len(seen)] = seen
        gathered = tensor_model_parallel_all_gather(filled, dim=0).split(len(filled))
        images: dict[int, Tensor] = {}
        for own, of_rank, rows in zip(shares.of_ranks, of_ranks, gathered, strict=True):
            images.update(zip(own, rows[: sum(of_rank)].split(of_rank), strict=True))
        return torch.cat([images[number] for number in range(len(lengths))])

    def _device(self, seen: Tensor | None) -> torch.device:
        return get_tp_group().device if seen is None else seen.device


def _of_all_parts(seen: Tensor, pictures: int) -> Tensor:
    """Return what ranks saw of equal parts of some pictures [n, ...], as [pictures, ...]."""
    if len(seen) == pictures > 1:
        return seen  # all of them were seen here
    of_all: Tensor = tensor_model_parallel_all_gather(seen.contiguous(), dim=0)
    return of_all[:pictures]


def sharing_of(model: Any, family: Family, entrance: nn.Module, vllm_config: Any) -> Sharing | None:
    """Return what puts together what ranks saw; None where they share out no images.

    Parameters
    ----------
    model
        vLLM's.
    family
        Of that model.
    entrance
        Where the projector's input is seen.
    vllm_config
        vLLM's.
    """
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return None
    mode = vllm_config.model_config.get_multimodal_config().mm_encoder_tp_mode
    # Kimi's encoder is whole on every rank, too, where its heads do not divide by the ranks.
    if mode != "data" and not getattr(model, "use_data_parallel", False):
        return None
    tower = family.tower(model, "image")
    return Sharing(family, any(module is entrance for module in tower.modules()))
