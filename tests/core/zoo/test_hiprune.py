"""HiPrune against its formula, in plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokenprune
from tests.core.zoo.images import Case, array, by_score, image, on_all_cases
from tokenprune import VisualTokens
from tokenprune.errors import OptionError, TokensError


def straight(tokens: VisualTokens, keep: int, alpha: float) -> list[int]:
    """Take anchors and what is beside them, then the highest of the scoring layer."""
    middle, last = array(tokens.middle_attention).mean(0), array(tokens.received_attention).mean(0)
    columns, total = tokens.grid[2], tokens.total
    kept: set[int] = set()
    for anchor in by_score(middle)[: min(round(keep * alpha / 5), keep // 5)]:
        for place in (anchor, anchor - 1, anchor + 1, anchor - columns, anchor + columns):
            kept.add(min(max(place, 0), total - 1))
    for token in by_score(last):
        if len(kept) < keep:
            kept.add(token)
    return sorted(kept)


@on_all_cases
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_the_formula(case: Case, alpha: float) -> None:
    selection = tokenprune.select(case.tokens, "hiprune", case.keep, alpha=alpha)
    assert selection.kept.tolist() == straight(case.tokens, case.keep, alpha)


def test_anchors_bring_their_neighbours_also_over_the_ends_of_rows() -> None:
    middle, last = torch.zeros(1, 20), torch.zeros(1, 20)
    middle[0, 5], middle[0, 0] = 3, 2
    last[0, 13] = 1
    tokens = VisualTokens((1, 4, 5), middle_attention=middle, received_attention=last)
    # 5 starts a row: 4 ends the one before. Of token 0 there are 0, 1 and 5 alone.
    kept = tokenprune.select(tokens, "hiprune", 10, alpha=1.0).kept.tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 10, 13]
    assert tokenprune.select(tokens, "hiprune", 1).kept.tolist() == [13]
    # The first of 3 and of 4 would be an anchor with four neighbours: too many.
    assert tokenprune.select(tokens, "hiprune", 3, alpha=1.0).kept.tolist() == [0, 1, 13]


def test_attention_may_be_averaged_already() -> None:
    tokens = image((1, 12, 12), 4)
    assert tokens.middle_attention is not None
    assert tokens.received_attention is not None
    averaged = replace(
        tokens,
        middle_attention=tokens.middle_attention.double().mean(0),
        received_attention=tokens.received_attention.double().mean(0),
    )
    one, other = (tokenprune.select(each, "hiprune", 64) for each in (tokens, averaged))
    assert one.kept.tolist() == other.kept.tolist()


def test_it_needs_a_picture_and_a_share() -> None:
    tokens = replace(image((1, 7, 7), 0), grid=(1, 1, 49), is_picture=False)
    with pytest.raises(TokensError, match="uses neighbours in a picture"):
        tokenprune.select(tokens, "hiprune", 5)
    with pytest.raises(OptionError, match=r"between 0 and 1; the paper has 0\.1"):
        tokenprune.select(image((1, 7, 7), 0), "hiprune", 5, alpha=1.1)
