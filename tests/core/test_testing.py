"""check_selector finds what is broken, and passes what CONTRIBUTING shows."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tokenprune import Picks, Selector, TokenBatch
from tokenprune.errors import SelectorError
from tokenprune.registry import build
from tokenprune.testing import check_selector

ROOT = Path(__file__).parents[2]


def made(score: Callable[[TokenBatch], Tensor], *needs: str) -> Selector:
    """Return a selector that scores by a function."""

    class Made(Selector):
        name, summary = "made", "a function's scores"

        def score(self, tokens: TokenBatch) -> Tensor:
            return score(tokens)

    Made.needs = needs or ("embeddings",)
    return Made()


class Shrinking(Selector):
    """Reads its budget off the first item it ever saw."""

    name, summary, needs = "shrinking", "the state of an earlier call", ()
    seen: ClassVar[list[int]] = []

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        self.seen.append(keep)
        index = torch.arange(keep, device=tokens.device) + len(self.seen) % (
            1 + tokens.total - keep
        )
        return Picks(index.expand(tokens.size, -1))


def embeddings(tokens: TokenBatch) -> Tensor:
    return tokens.require("embeddings").float()


def by_place_in_batch(tokens: TokenBatch) -> Tensor:
    flip = torch.tensor([1.0, -1.0]).repeat(tokens.size)[: tokens.size]
    return embeddings(tokens)[..., 0] * flip[:, None]


def drawn(tokens: TokenBatch) -> Tensor:
    return embeddings(tokens)[..., 0] + 0.0 * torch.rand((), device="cpu")


def last_of_a_tie(tokens: TokenBatch) -> Tensor:
    index = torch.arange(tokens.total, device=tokens.device, dtype=torch.float32)
    return embeddings(tokens)[..., 0] + 1e-6 * index


def overwritten(tokens: TokenBatch) -> Tensor:
    given = tokens.require("embeddings")
    result = given[..., 0].float()
    given.zero_()
    return result


def all_pairs(tokens: TokenBatch) -> Tensor:
    rows = embeddings(tokens)[..., :1]
    return (rows - rows.mT).square().amax(dim=-1)


def default_dtype(tokens: TokenBatch) -> Tensor:
    return embeddings(tokens)[..., 0] * (torch.ones(()).dtype == torch.float32)


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (Shrinking(), "exactly_keep.*twice in a row"),
        (made(by_place_in_batch), "same_in_any_batch.*in a batch and alone"),
        (made(last_of_a_tie), "first_of_equal_tokens.*lowest index"),
        (made(drawn), "leaves_all_alone.*global generator"),
        (made(overwritten), "(twice in a row|embeddings was changed)"),
        (made(all_pairs), "no_matrix_of_all_pairs: with 5000 tokens"),
        (made(default_dtype), "same_in_any_surroundings.*under (float64|another default device)"),
    ],
)
def test_what_is_broken_is_named(selector: Selector, says: str) -> None:
    with pytest.raises(SelectorError, match=says):
        check_selector(selector)


def test_a_check_can_be_skipped_by_name() -> None:
    check_selector(made(last_of_a_tie), skip=["first_of_equal_tokens", *IN_TIME])
    with pytest.raises(SelectorError, match=r"no check 'ties' to skip.*Allowed: exactly_keep"):
        check_selector(made(last_of_a_tie), skip=["ties"])


IN_TIME = ("first_of_equal_tokens_in_time",)


@pytest.mark.parametrize("estimator", ["frobenius", "jvp", "finite-difference"])
def test_every_estimator_keeps_the_promises(estimator: str) -> None:
    check_selector(build("zeroth-order", {"estimator": estimator, "directions": 8}))


def test_the_example_of_contributing_keeps_the_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## A method in ten lines")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(code) == 3
    (tmp_path / "example_of_contributing.py").write_text("\n".join(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("example_of_contributing")
    check_selector(module.EmbeddingNorm(shortest=True))
    check_selector(module.Unlike())
