"""SCoRe against its formula, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import tokenprune
from tests.core.zoo.images import Case, array, cosines, image, on_all_cases
from tokenprune import VisualTokens
from tokenprune.errors import OptionError


def straight(tokens: VisualTokens, keep: int, alpha: float) -> list[int]:
    """Take always the token of largest distance times score."""
    similar = cosines(array(tokens.features))
    scores = array(tokens.cls_attention).mean(0)
    kept = [int(scores.argmax())]
    while len(kept) < keep:
        best, most = -1, -math.inf
        for token in range(len(scores)):
            apart = min(1.0 - similar[token, other] for other in kept)
            if token not in kept and apart * scores[token] ** alpha > most:
                best, most = token, apart * scores[token] ** alpha
        kept.append(best)
    return sorted(kept)


@on_all_cases
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_the_formula(case: Case, alpha: float) -> None:
    selection = tokenprune.select(case.tokens, "score-k-center", case.keep, alpha=alpha)
    assert selection.kept.tolist() == straight(case.tokens, case.keep, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_tokens_without_attention_come_last(alpha: float) -> None:
    attention = torch.tensor([0.0, 0.0, 3.0, 0.0, 1.0, 0.0])
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features[4] = features[2]
    tokens = VisualTokens((1, 2, 3), features=features, cls_attention=attention)
    for keep, kept in ((1, [2]), (2, [2, 4]), (4, [0, 1, 2, 4])):
        assert tokenprune.select(tokens, "score-k-center", keep, alpha=alpha).kept.tolist() == kept


def test_alpha_is_checked() -> None:
    with pytest.raises(OptionError, match=r"at least 0; the paper has 0\.6 to 1"):
        tokenprune.select(image((1, 7, 7), 0), "score-k-center", 5, alpha=-1)
