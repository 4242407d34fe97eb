"""`select` with a selector of one's own, and what such a selector may not do."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokenprune
from tokenprune import Picks, PruningConfig, Selector, TokenBatch, VisualTokens
from tokenprune.budget import PUBLISHED, check_keep
from tokenprune.errors import OptionError, SelectorError, TokensError
from tokenprune.selecting import select_many


@dataclass(frozen=True)
class Given(Selector):
    """Scores, or what is kept, as given."""

    what: Any = None

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = "what it was given"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, tokens: TokenBatch) -> Tensor:
        result: Tensor = self.what
        return result


class Kept(Given):
    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        picks: Picks = self.what if isinstance(self.what, Picks) else Picks(self.what)
        return picks


TOKENS = VisualTokens((1, 4, 4), label="image 3")


def test_select_takes_an_object_as_select_many_does() -> None:
    scores = torch.arange(16.0)[None].cos()
    one = tokenprune.select(TOKENS, Given(scores), 5)
    assert torch.equal(one.kept, select_many([TOKENS], Given(scores), 5)[0].kept)
    assert one.kept.tolist() == scores[0].sort(descending=True).indices[:5].sort().values.tolist()
    with pytest.raises(OptionError, match=r"options \['seed'\] came with a Given object"):
        tokenprune.select(TOKENS, Given(scores), 5, seed=1)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (torch.zeros(1, 15), r"shape \[1, 15\]; it must be float32 \[B, N\] = \[1, 16\]"),
        (torch.zeros(16), r"shape \[16\]; it must be float32 \[B, N\] = \[1, 16\]"),
        (torch.zeros(1, 16).double(), r"dtype torch.float64 .* must be float32"),
        (torch.zeros(1, 16, dtype=torch.long), r"dtype torch.int64 .* must be float32"),
        (None, "that are a NoneType; it must be float32"),
        (torch.zeros(1, 16).index_fill(1, torch.tensor(7), torch.nan), "hold NaN"),
    ],
)
def test_scores_that_are_none(scores: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=f"image 3: .*'given'.*{says}.*Correct its `score`"):
        tokenprune.select(TOKENS, Given(scores), 3)
    if isinstance(scores, Tensor):
        with pytest.raises(SelectorError, match=says):
            tokenprune.select(TOKENS, Kept(Picks(torch.tensor([[0, 1, 2]]), scores)), 3)


def test_a_score_may_rule_a_token_out() -> None:
    scores = torch.arange(16.0)[None].masked_fill(torch.arange(16) > 3, -torch.inf)
    assert tokenprune.select(TOKENS, Given(scores), 3).kept.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (torch.tensor([[0, 1]]), r"shape \[1, 2\]; it must be int64 \[B, K\] = \[1, 3\]"),
        (torch.tensor([[0, 1, 2]]).int(), "dtype torch.int32 .* must be int64"),
        (torch.tensor([[0, 1, 16]]), r"\[0, 1, 16\]; they must ascend.*between 0 and 15"),
        (torch.tensor([[-1, 1, 2]]), r"\[-1, 1, 2\]; they must ascend"),
        (torch.tensor([[2, 1, 5]]), r"\[2, 1, 5\]; they must ascend"),
        (torch.tensor([[1, 1, 5]]), r"\[1, 1, 5\]; they must ascend, each once"),
        ([0, 1, 2], "that are a list; it must be int64"),
    ],
)
def test_kept_tokens_that_cannot_be(kept: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=f"image 3: .*'given'.*{says}"):
        tokenprune.select(TOKENS, Kept(kept), 3)


def test_the_item_of_a_batch_is_named() -> None:
    items = [VisualTokens((1, 4, 4), label=f"image {index}") for index in range(2)]
    bad = Kept(torch.tensor([[0, 1, 2], [4, 3, 9]]))
    with pytest.raises(SelectorError, match=r"^image 1: .*\[4, 3, 9\]"):
        select_many(items, bad, 3)


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (("embedding",), r"needs names 'embedding', .*Did you mean 'embeddings'\?"),
        (("features", "cls-attention"), r"Did you mean 'cls_attention'\?"),
        ("features", r"write needs = \('features',\)"),
        (["features"], "is no tuple of names"),
    ],
)
def test_misspelt_needs_are_refused_when_the_class_is_defined(needs: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=f"selector Wrong: .*{says}"):
        type("Wrong", (Selector,), {"name": "wrong", "needs": needs})


class Neighbours(Given):
    needs_picture: ClassVar[bool] = True


def test_tokens_without_places() -> None:
    bag = VisualTokens((1, 1, 16), label="image 3", is_picture=False)
    for method in ("uniform", "random"):
        selection = tokenprune.select(bag, method, 4)
        assert not selection.is_picture
        assert "no picture" in repr(selection)
    assert tokenprune.select(bag, "uniform", 4).kept.tolist() == [2, 6, 10, 14]
    scores = torch.arange(16.0)[None]
    assert tokenprune.select(TOKENS, Neighbours(scores), 2).is_picture
    # In one call with a picture of the same count.
    row = VisualTokens((1, 1, 16))
    assert [one.is_picture for one in select_many([bag, row, bag], Given(scores.repeat(1, 1)), 2)]
    with pytest.raises(TokensError, match=r"^image 3: .*neighbours in a picture, and how the 16"):
        select_many([TOKENS, bag], Neighbours(scores), 2)
    with pytest.raises(TokensError, match=r"is_picture=False.*\(1, 1, 16\)"):
        VisualTokens((1, 4, 4), is_picture=False)


def test_pictures_and_other_tokens_do_not_share_a_batch() -> None:
    sizes: list[int] = []

    class Counting(Given):
        def score(self, tokens: TokenBatch) -> Tensor:
            sizes.append(tokens.size)
            return torch.zeros(tokens.size, tokens.total)

    items = [VisualTokens((1, 1, 9), is_picture=flag) for flag in (True, False, True)]
    selections = select_many(items, Counting(), 2)
    assert sizes == [2, 1]
    assert [one.is_picture for one in selections] == [True, False, True]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_budget_that_prunes_nothing_says_so_once(name: str) -> None:
    short = [VisualTokens((1, 1, size)) for size in (5, 7, PUBLISHED[name])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            selections = select_many(short, PruningConfig("uniform", name).selector(), name)
    assert [len(one) for one in selections] == [5, 7, PUBLISHED[name]]
    (warning,) = caught
    assert f"keep={name!r} is {PUBLISHED[name]} tokens" in str(warning.message)
    assert "nothing of them was pruned" in str(warning.message)


def test_other_budgets_say_nothing() -> None:
    long = VisualTokens((1, 1, 7041))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenprune.select(long, "uniform", "qwen2.5-vl-7b")) == 7040
        assert len(tokenprune.select(TOKENS, "uniform", 7040)) == 16


def test_a_published_budget_is_a_number_that_knows_its_name() -> None:
    keep = check_keep("qwen2.5-vl-7b")
    assert keep == 7040
    assert check_keep(keep) is keep
    assert pickle.loads(pickle.dumps(keep)).name == "qwen2.5-vl-7b"  # noqa: S301
    config = PruningConfig("uniform", "qwen2.5-vl-7b")
    assert config.to_dict()["keep"] == "qwen2.5-vl-7b"
    assert PruningConfig.from_json(config.to_json()) == config
    assert PruningConfig.from_json(config.to_json()).keep == 7040
