"""ID-Selection against its formula, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import tokenprune
from tests.core.zoo.images import Case, array, cosines, image, on_all_cases
from tokenprune import VisualTokens
from tokenprune.errors import OptionError


def straight(tokens: VisualTokens, keep: int, sharpness: float) -> list[int]:
    """Take the highest score, and lower those of tokens like it."""
    similar = cosines(array(tokens.features))
    scores = array(tokens.cls_attention).mean(0)
    left = [float(score - scores.min()) / float(scores.max() - scores.min()) for score in scores]
    kept: list[int] = []
    for _ in range(keep):
        pick = max((i for i in range(len(left)) if i not in kept), key=lambda i: (left[i], -i))
        kept.append(pick)
        own = left[pick]
        for token in range(len(left)):
            share = math.exp(-sharpness * (1.0 - similar[pick, token]) ** 2)
            left[token] = max(0.0, left[token] - share * own)
    return sorted(kept)


@on_all_cases
@pytest.mark.parametrize("sharpness", [20.0, 3.5])
def test_the_formula(case: Case, sharpness: float) -> None:
    selection = tokenprune.select(case.tokens, "id-selection", case.keep, sharpness=sharpness)
    assert selection.kept.tolist() == straight(case.tokens, case.keep, sharpness)


def test_a_copy_of_what_was_taken_has_nothing_left() -> None:
    features = torch.eye(4)[[0, 0, 1, 2]]
    tokens = VisualTokens((1, 2, 2), features=features, cls_attention=torch.tensor([3.0, 4, 2, 1]))
    for keep, kept in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        assert tokenprune.select(tokens, "id-selection", keep).kept.tolist() == kept


def test_sharpness_is_checked() -> None:
    with pytest.raises(OptionError, match="above 0; the paper has 20"):
        tokenprune.select(image((1, 7, 7), 0), "id-selection", 5, sharpness=0.0)
