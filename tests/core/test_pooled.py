"""Blocks chosen from the data, against the rule written out row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenprune.errors import LayoutError, OptionError, TokensError
from tokenprune.masks import (
    Causal,
    ImageSpan,
    Mask,
    PooledBlocks,
    PromptLayout,
    Window,
    attend,
    heads_mask,
)

BLOCK, LENGTH, HEADS, GROUPS = 16, 300, 4, 2
LAYOUT = PromptLayout(LENGTH, (ImageSpan(5, 130), ImageSpan(132, 290)), sinks=(0, 5, 140))
TEXT = [place for place in range(LENGTH) if not (5 <= place < 130 or 132 <= place < 290)]
BLOCKS = math.ceil(LENGTH / BLOCK)


def states(seed: int = 0, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return q and k that change slowly from token to token, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(HEADS + GROUPS, BLOCKS, 8, generator=generator) * sharpness
    fine = coarse.repeat_interleave(BLOCK, dim=1)[:, :LENGTH]
    fine = fine + torch.randn(fine.shape, generator=generator)
    return fine[:HEADS], fine[HEADS:]


def pooled_rows(query: Tensor, key: Tensor, scale: float) -> list[list[list[float]]]:
    """Return [head][row], the probabilities of the blocks up to the row's own."""
    result: list[list[list[float]]] = []
    for head in range(HEADS):
        mine, theirs = query[head].double(), key[head // (HEADS // GROUPS)].double()
        starts = range(0, LENGTH, BLOCK)
        means = [[one[at : at + BLOCK].mean(dim=0) for at in starts] for one in (mine, theirs)]
        rows = []
        for row in range(BLOCKS):
            powers = [
                math.exp(float(means[0][row] @ means[1][at]) * scale) for at in range(row + 1)
            ]
            rows.append([one / sum(powers) for one in powers])
        result.append(rows)
    return result


def written_out(
    rows: list[list[list[float]]], keep: float | None, mass: float | None
) -> tuple[Tensor, list[list[list[int]]]]:
    """Return the mask [H, L, L] and the chosen blocks [head][row]."""
    matrix = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.bool)
    seen_by_all = [*TEXT, *LAYOUT.sinks]
    chosen: list[list[list[int]]] = []
    for head in range(HEADS):
        chosen.append([])
        for row, shares in enumerate(rows[head]):
            best = sorted(range(row + 1), key=lambda at: -shares[at])
            number = 0 if keep is None else max(1, math.floor(keep * (row + 1) + 0.5))
            if mass is not None:
                while sum(shares[at] for at in best[:number]) < mass:
                    number += 1
            chosen[-1].append(sorted(best[:number]))
            first, end = row * BLOCK, min(row * BLOCK + BLOCK, LENGTH)
            for at in {*chosen[-1][-1], row}:
                matrix[head, first:end, at * BLOCK : at * BLOCK + BLOCK] = True
    matrix[:, :, seen_by_all] = True
    matrix[:, TEXT] = True
    return matrix.tril(), chosen


@pytest.mark.parametrize(
    ("keep", "mass"), [(0.25, None), (0.01, None), (None, 0.95), (0.3, 0.5), (0.1, 0.9)]
)
@pytest.mark.parametrize(("scale", "together"), [(None, False), (0.1, False), (None, True)])
def test_the_mask_is_the_one_written_out(
    keep: float | None, mass: float | None, scale: float | None, together: bool
) -> None:
    query, key = states()
    settings = PooledBlocks(keep, mass, BLOCK, together)
    mask = settings.mask(query, key, LAYOUT, scale=scale)
    rows = pooled_rows(query, key, 8**-0.5 if scale is None else scale)
    if together:
        for first in range(0, HEADS, HEADS // GROUPS):
            mean = [
                [(one + other) / 2 for one, other in zip(*pair, strict=True)]
                for pair in zip(*rows[first : first + 2], strict=True)
            ]
            rows[first : first + 2] = [mean, mean]
    matrix, chosen = written_out(rows, keep, mass)
    assert torch.equal(mask.matrix(), matrix)
    assert len({str(one) for one in chosen}) == (GROUPS if together else HEADS)
    if mass is not None:
        for head, row in itertools.product(range(HEADS), range(BLOCKS)):
            assert sum(rows[head][row][at] for at in chosen[head][row]) >= mass


@pytest.mark.parametrize("settings", [PooledBlocks(1.0, None, BLOCK), PooledBlocks(None, 1, BLOCK)])
def test_everything_kept_is_the_models_own_mask(settings: PooledBlocks) -> None:
    query, key = states(sharpness=60.0)  # so that most probabilities are 0
    window = Causal(LENGTH) & Window(LENGTH, 70)
    per_head = heads_mask(LAYOUT, ["intra", "dense", "sink", "intra"])
    owns: list[Mask | None] = [None, window, per_head]
    for own in owns:
        mask = settings.mask(query, key, LAYOUT, model=own)
        wanted = (Causal(LENGTH) if own is None else own).matrix()
        assert torch.equal(mask.matrix(), wanted.expand(HEADS, -1, -1))


def test_what_the_model_hides_is_not_chosen_and_not_counted() -> None:
    query, key = states()
    window = Causal(LENGTH) & Window(LENGTH, 4 * BLOCK + 1)
    mask = PooledBlocks(0.5, None, BLOCK).mask(query, key, LAYOUT, model=window)
    assert not bool((mask.matrix() & ~window.matrix()).any())
    # Tokens 240 to 255 can see their own block and 4 before: 3 are kept (2.5 rounded up), of which
    # one may be the diagonal's, or that comes on top.
    row = mask.matrix()[:, 255].view(HEADS, -1)
    seen = [{int(key) // BLOCK for key in head.nonzero()} for head in row]
    assert all(len(one) in (3, 4) and 15 in one for one in seen)


def test_density_falls_with_keep_and_kernels_agree_on_every_mask() -> None:
    query, key = states(3)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(4))
    densities = []
    for keep in (1.0, 0.5, 0.25, 0.1):
        mask = PooledBlocks(keep, None, BLOCK).mask(query, key, LAYOUT)
        densities.append(mask.density(BLOCK))
        gathered = attend(query, key, value, mask, kernel="gathered", block=BLOCK)
        dense = attend(query, key, value, mask, kernel="dense")
        torch.testing.assert_close(gathered, dense)
    assert densities[0] == 1.0
    assert densities == sorted(set(densities), reverse=True)


def test_a_prompt_is_masked_alike_beside_others_and_twice() -> None:
    settings = PooledBlocks(0.3, 0.6, BLOCK)
    queries, keys = zip(*[states(seed) for seed in range(3)], strict=True)
    batch = torch.stack(queries), torch.stack(keys)
    for row, (query, key) in enumerate(zip(queries, keys, strict=True)):
        alone = settings.mask(query, key, LAYOUT).matrix()
        assert torch.equal(alone, settings.mask(batch[0][row], batch[1][row], LAYOUT).matrix())
        strided = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (query, key)]
        assert torch.equal(alone, settings.mask(strided[0], strided[1], LAYOUT).matrix())


def test_text_alone_stays_whole() -> None:
    query, key = states()
    own = PooledBlocks(0.1, None, BLOCK).mask(query, key, PromptLayout(LENGTH))
    assert torch.equal(own.matrix(), Causal(LENGTH).matrix())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is no share"),
        ({"keep": 1.5}, r"keep=1\.5 is no share"),
        ({"keep": True}, "keep=True is no share"),
        ({"keep": math.nan}, "keep=nan is no share"),
        ({"mass": -1}, "mass=-1 is no share"),
        ({"keep": None}, "keep and mass are both None"),
        ({"block": 0}, "block=0 is no number of tokens"),
        ({"block": 12.5}, r"block=12\.5 is no number of tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PooledBlocks(**settings)  # type: ignore[arg-type]


def test_states_that_do_not_fit_are_refused() -> None:
    query, key = states()
    settings = PooledBlocks(block=BLOCK)
    with pytest.raises(LayoutError, match="do not fit a prompt of 299 tokens"):
        settings.mask(query, key, PromptLayout(299, (ImageSpan(0, 9),)))
    with pytest.raises(LayoutError, match="do not fit"):
        settings.mask(query[:3], key, LAYOUT)
    with pytest.raises(LayoutError, match="mask of 1 heads and 299 tokens"):
        settings.mask(query, key, LAYOUT, model=Causal(299))
    query[0, 7, 3] = math.inf
    with pytest.raises(TokensError, match="NaN or infinite"):
        settings.mask(query, key, LAYOUT)
