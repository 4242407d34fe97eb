"""Sparse masks in vLLM together with pruning, against attention that is written out by hand.

What is kept is chosen by transformers. Then its model reads the prompt, or what is left of it, with
the whole map of each head: pairs are allowed by the table of categories, and log counts are added
to keys. That is done once, behind the prompt and all of the answer: words attend to everything.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf.test_sparse import attention_by_hand, by_words, words
from tests.vllm.checkpoints import WORDS
from tests.vllm.test_families import Case
from tests.vllm.test_masks import NEAR, SINKS, WAYS, Both, Said, assert_alike, both, small
from tests.vllm.test_taken import crops_of, rows_of_items
from tokenprune.config import Application
from tokenprune.masks.patterns import Category
from tokenprune.scope import Scope

METHOD, KEEP = "divprune", 9


@dataclass(frozen=True)
class Chosen:
    """What is kept of a prompt.

    Attributes
    ----------
    counts
        LongTensor [L], how many tokens each stands for: 1 for text, 0 for what is not kept.
    of_items
        Kept rows, in the order of the prompt.
    """

    counts: Tensor
    of_items: list[list[int]]


def inputs_of(pair: Both, case: Case, scope: Scope) -> Any:
    inputs = pair.hf.inputs(case)
    inputs.pop("video_frames", None)
    if scope == "image" and pair.family == "idefics3":
        inputs["image_crops"] = [crops_of(pair.hf, image) for image in case.media()[0]]
    return inputs


def choose(pair: Both, case: Case, counted: bool, scope: Scope) -> Chosen:
    """Have transformers choose."""
    inputs = inputs_of(pair, case, scope)
    ids = inputs["input_ids"][0]
    counts = torch.ones_like(ids)
    if not case.pictures:
        return Chosen(counts, [])
    model = pair.hf.model
    more: dict[str, Any] = {"proportional_attention": True} if counted else {}
    with torch.no_grad(), tokenprune_hf.prune(model, METHOD, KEEP, scope=scope, **more) as pruning:
        model(**inputs)
        selections = list(pruning.selections)
    inputs = pair.hf.inputs(case)
    inputs.pop("video_frames", None)
    places = (ids == model.config.image_token_id).nonzero()[:, 0]
    for rows, one in zip(rows_of_items(pair.hf, inputs), selections, strict=True):
        counts[places[rows]] = 0
        times = one.represented if counted else None
        counts[places[rows[one.kept]]] = 1 if times is None else times
    return Chosen(counts, [one.kept.tolist() for one in selections])


@functools.cache
def _pairs(owners: tuple[int, ...], category: Category, window: int | None) -> Tensor:
    return by_words(owners, category, False, window, SINKS)


def by_hand(
    pair: Both,
    case: Case,
    answered: Sequence[int],
    *,
    masked: bool = True,
    application: Application = "drop",
    counted: bool = False,
    scope: Scope = "item",
) -> Tensor:
    """Return log-probabilities [n, V] at each token of an answer, given all before it."""
    model, inputs = pair.hf.model, inputs_of(pair, case, scope)
    chosen = choose(pair, case, counted, scope)
    more = torch.tensor([answered[:-1]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = [inputs["mm_token_type_ids"], torch.zeros_like(more)]
        inputs["mm_token_type_ids"] = torch.cat(kinds, dim=1)
    (owners,) = words(inputs["input_ids"], inputs["attention_mask"])
    owner = torch.tensor(owners)
    counts = torch.cat([chosen.counts, torch.ones_like(more[0])])
    drops = application == "drop" and bool(case.pictures)
    if drops:
        owner, counts = owner[counts > 0], counts[counts > 0]

    def allowed(layer: int, window: int | None) -> Tensor:
        categories = pair.heads.categories[layer]
        owners = tuple(owner.tolist())
        pairs = [_pairs(owners, one if masked else "dense", window) for one in categories]
        return torch.stack(pairs)[None]

    context = tokenprune_hf.prune(model, METHOD, KEEP, scope=scope) if drops else nullcontext()
    with torch.no_grad(), context, attention_by_hand(model, allowed, counts.float().log()):
        logits: Tensor = model(**inputs).logits[0, -len(answered) :]
    return logits.log_softmax(dim=-1)


def scores_of(pair: Both, case: Case, said: Said, **how: Any) -> Tensor:
    """Return the log-probability of each token of an answer, by hand."""
    right = by_hand(pair, case, said[0], **how)
    return right.gather(1, torch.tensor(said[0])[:, None])[:, 0]


def check(pair: Both, case: Case, said: Said, **how: Any) -> float:
    """Raise AssertionError unless an answer is that by hand; return how far off it is."""
    right = by_hand(pair, case, said[0], **how)
    best = torch.tensor(WORDS)[right[:, WORDS].argmax(dim=1)]
    assert said[0] == best.tolist(), (case, how)
    off = float((scores_of(pair, case, said, **how) - torch.tensor(said[1])).abs().max())
    assert off < NEAR, (case, how)
    return off


@pytest.mark.parametrize("family", ["llava_next", "internvl", "idefics3"])
def test_masks_are_over_one_set_of_all_crops(family: str, tmp_path: Path) -> None:
    """Of Idefics3 only the worker knows how many rows stand on which side of the text inside."""
    pair = both(family, tmp_path / "model")
    cases = [Case("titit", (0, 1)), Case("tit", (2,)), Case("ttt", ())]
    every = [replace(case, asked=asked) for asked in ({}, {"masks": False}) for case in cases]
    longest = max(pair.hf.inputs(case)["input_ids"].shape[1] for case in cases)
    with pair.start(method=METHOD, keep=KEEP, scope="image", **small(family, longest)) as llm:
        together = pair.said(llm, every)
        alone = [pair.said(llm, [case])[0] for case in every]
    for said, right, case in zip(together, alone, every, strict=True):
        assert_alike(said, right, case)
    offs, differences = [], []
    for case, said in zip(every, alone, strict=True):
        masked = case.asked != {"masks": False}
        offs.append(check(pair, case, said, masked=masked, scope="image"))
        own, other = (
            scores_of(pair, case, said, masked=under_masks, scope="image")
            for under_masks in (masked, not masked)
        )
        differences.append(float((own - other).abs().max()))
    assert max(differences) > 10 * max(offs), "masks say something"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_tokens_are_hidden_and_counted_under_masks(family: str, tmp_path: Path) -> None:
    """In chunks and one by one; some of Gemma 3's layers see a window, and count no tokens."""
    counts = family != "gemma3"
    pair = both(family, tmp_path / "model")
    cases = [Case("titit", (0, 1)), Case("tit", (2,)), Case("ttt", ())]
    every = [
        (
            replace(case, asked={**asked, **more}),
            {"masked": not more, "application": application, "counted": counted},
        )
        for asked, application, counted in WAYS
        for more in ({}, {"masks": False})
        for case in cases
        if counts or "proportional_attention" in asked
    ]
    longest = max(pair.hf.inputs(case)["input_ids"].shape[1] for case in cases)
    with pair.start(
        method=METHOD,
        keep=KEEP,
        apply="mask",
        proportional_attention=counts,
        **small(family, longest),
    ) as llm:
        together = pair.said(llm, [case for case, _ in every])
        alone = [pair.said(llm, [case])[0] for case, _ in every]
    for said, right, asked_for in zip(together, alone, every, strict=True):
        assert_alike(said, right, asked_for)
    offs, differences = [], []
    for (case, how), said in zip(every, alone, strict=True):
        offs.append(check(pair, case, said, **how))
        if case.kinds == "titit":
            own = scores_of(pair, case, said, **how)
            for name in ("masked", "counted") if counts else ("masked",):
                other = scores_of(pair, case, said, **{**how, name: not how[name]})
                differences.append(float((own - other).abs().max()))
    assert min(differences) > 5 * max(offs), "masks and counts say something"
