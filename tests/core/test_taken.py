"""Where a method takes its tokens' vectors: before the projector, after it, at a deepstack tap."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.core.test_methods import array, highest, spread_out
from tokenprune import VisualTokens
from tokenprune.errors import OptionError, TokensError
from tokenprune.registry import build, find
from tokenprune.selecting import select_many
from tokenprune.selectors.base import Selector
from tokenprune.testing import check_selector, make_item

DEFAULTS: dict[str, str] = {
    name: str({option.name: option.default for option in dataclasses.fields(method)}["taken"])
    for name, method in tokenprune.methods().items()
    if "taken" in {option.name for option in dataclasses.fields(method)}
}
PLACES = ("before", "after", "deepstack-0", "deepstack-1")


def options_of(method: str) -> dict[str, Any]:
    """Return the options without which vectors cannot be taken elsewhere."""
    return {"text_pivots": 0} if method == "dart" else {}


def vectors_at(tokens: VisualTokens, place: str) -> Tensor:
    """Return the vectors [N, X] that are to be taken at a place."""
    vectors: Tensor
    if place in ("before", "after"):
        vectors = getattr(tokens, {"before": "features", "after": "embeddings"}[place])
    else:
        vectors = tokens.deepstack[int(place[-1])]  # type: ignore[index]
    return vectors


def test_the_methods_that_compare_or_measure_vectors_have_the_option() -> None:
    before = {
        *("feature-norm", "id-selection", "mmtok", "prunesid", "scope", "score-k-center"),
        "vispruner",
    }
    after = {
        *("cdpruner", "cdpruner-llm", "dart", "divprune", "evs", "fastvid", "holov"),
        *("information", "relevant-information", "vidcom2", "zeroth-order"),
    }
    assert {name for name, default in DEFAULTS.items() if default == "before"} == before
    assert {name for name, default in DEFAULTS.items() if default == "after"} == after
    for name in DEFAULTS:
        assert build(name, {}).needs == find(name).needs
        assert build(name, {"taken": DEFAULTS[name]}).needs == find(name).needs


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", DEFAULTS)
def test_what_is_taken_elsewhere_is_chosen_as_if_it_was_there(method: str, place: str) -> None:
    tokens, options = make_item((3, 4, 6), seed=2), options_of(method)
    usual = {"before": "features", "after": "embeddings"}[DEFAULTS[method]]
    instead: dict[str, Any] = {usual: vectors_at(tokens, place)}
    if usual == "embeddings":
        instead["question_embeddings"] = None  # of another width
    for keep in (1, 31, 72):
        found = tokenprune.select(tokens, method, keep, taken=place, **options)
        if method in ("mmtok", "zeroth-order", "cdpruner-llm", "dart", "fastvid"):
            expected = _straight(method, tokens, place, keep)
        else:
            elsewhere = dataclasses.replace(tokens, **instead)
            expected = tokenprune.select(elsewhere, method, keep, **options)
        assert torch.equal(found.kept, expected.kept)
        assert (found.scores is None) == (expected.scores is None)
        if found.scores is not None and expected.scores is not None:
            assert torch.equal(found.scores, expected.scores)


def _straight(method: str, tokens: VisualTokens, place: str, keep: int) -> tokenprune.Selection:
    """Choose by a method whose other inputs stay where they are, with the parts that it names."""
    from tokenprune.greedy import engine
    from tokenprune.greedy.covering import Targets, cover
    from tokenprune.selectors.cdpruner import cosines_to_text, pick_conditional
    from tokenprune.selectors.divprune import pick_diverse

    vectors, embeddings = vectors_at(tokens, place)[None], vectors_at(tokens, "after")[None]
    question = tokens.question_embeddings[None]  # type: ignore[index]
    scores = None
    if method == "mmtok":
        asked = Targets(question, embeddings, 0.02, 1 / question.shape[1])
        seen = Targets(vectors, vectors, 0.2, 0.5 / vectors.shape[1])
        kept = cover([asked, seen], keep)
    elif method == "zeroth-order":
        scores = build("zeroth-order", {}).score(_batch(tokens))
        kept = pick_diverse(vectors, keep, *engine.scaled(scores))
    elif method == "cdpruner-llm":
        cosines = engine.folded_sum(cosines_to_text(embeddings, question), 1)
        picks = pick_conditional(vectors, cosines, question.shape[1], keep)
        kept, scores = picks.kept, picks.scores
    elif method == "dart":
        # Without the question's pivots, embeddings may be of any width.
        plain = VisualTokens(tokens.grid, embeddings=vectors[0], question_embeddings=vectors[0, :1])
        return tokenprune.select(plain, method, keep, text_pivots=0)
    else:
        plain = dataclasses.replace(tokens, embeddings=vectors[0], question_embeddings=None)
        return tokenprune.select(plain, method, keep)
    return tokenprune.Selection(
        kept[0], tokens.total, tokens.grid, None if scores is None else scores[0]
    )


def _batch(tokens: VisualTokens) -> Any:
    from tokenprune.tokens import stack

    return stack([tokens], ("features", "projector"))


@pytest.mark.parametrize("keep", [1, 7, 20])
def test_divprune_and_a_norm_by_hand(keep: int) -> None:
    tokens = make_item((1, 4, 6), seed=5)
    kept = {}
    for place in ("before", "after", "deepstack-1"):
        rows = array(vectors_at(tokens, place))
        kept[place] = tokenprune.select(tokens, "divprune", keep, taken=place).kept.tolist()
        assert kept[place] == spread_out(rows, keep)
        norms = (rows**2).sum(axis=1) ** 0.5
        longest = tokenprune.select(tokens, "feature-norm", keep, taken=place).kept.tolist()
        assert longest == highest(norms, keep)
    if keep == 7:  # the places differ
        assert len({tuple(one) for one in kept.values()}) == 3


@pytest.mark.parametrize("place", ["before", "deepstack-1"])
@pytest.mark.parametrize("method", ["divprune", "information"])
def test_selectors_keep_their_promises_wherever_they_look(method: str, place: str) -> None:
    selector = build(method, {"taken": place})
    skip = {"no_matrix_of_all_pairs"}  # which takes long, and is the same everywhere
    if selector.by_place:
        skip.add("first_of_equal_tokens_in_time")
    check_selector(selector, skip=skip)


def test_only_what_is_looked_at_is_asked_for() -> None:
    needs = {
        ("divprune", "before"): ("features",),
        ("divprune", "deepstack-2"): ("deepstack",),
        ("mmtok", "after"): ("question_embeddings", "embeddings"),
        ("cdpruner-llm", "before"): ("question_embeddings", "features", "embeddings"),
        ("zeroth-order", "before"): ("features", "projector"),
        ("fastvid", "deepstack-0"): ("deepstack", "features", "cls_attention"),
        ("relevant-information", "before"): ("query_attention", "features"),
    }
    for (method, place), expected in needs.items():
        assert build(method, {"taken": place}).needs == expected
    tokens = VisualTokens((1, 2, 3), features=torch.randn(6, 4), label="image 3")
    assert len(tokenprune.select(tokens, "divprune", 2, taken="before")) == 2
    with pytest.raises(TokensError, match="image 3: this method needs deepstack"):
        tokenprune.select(tokens, "divprune", 2, taken="deepstack-0")


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("divprune", {"taken": "befor"}, "Did you mean 'before'.*after the projector"),
        ("divprune", {"taken": "deepstack"}, "Did you mean 'deepstack-0'"),
        ("divprune", {"taken": "deepstack-01"}, "no place to take tokens"),
        ("divprune", {"taken": None}, "must be str"),
        ("dart", {"taken": "before"}, "text_pivots=0"),
        ("uniform", {"taken": "before"}, "no option 'taken'"),
    ],
)
def test_places_that_there_are_not(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        build(method, options)


def test_taps_that_there_are_not() -> None:
    tokens = make_item((1, 2, 3), label="image 5")
    with pytest.raises(OptionError, match=r"image 5: .*there are 2.*deepstack-1"):
        tokenprune.select(tokens, "divprune", 2, taken="deepstack-2")
    with pytest.raises(TokensError, match=r"deepstack has shape \[6, 4\].*\[L, N, D\]"):
        VisualTokens((1, 2, 3), deepstack=torch.randn(6, 4))


def test_two_places_side_by_side_share_no_batch_and_no_result() -> None:
    items = [make_item((1, 3, 5), seed=seed) for seed in range(3)]
    selectors: list[Selector] = [build("divprune", {"taken": place}) for place in PLACES]
    assert len(set(selectors)) == 4
    together = {one: select_many(items, one, 4) for one in selectors}
    for one, selections in together.items():
        for item, selection in zip(items, selections, strict=True):
            assert torch.equal(select_many([item], one, 4)[0].kept, selection.kept)
