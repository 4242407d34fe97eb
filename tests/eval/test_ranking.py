"""Soft ranks in blocks against the full matrix, and the losses made of them."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from tokenprune.testing import Largest
from tokenprune_eval.train import ranking
from tokenprune_eval.train.ranking import hard_rank, l1_loss, soft_rank, spearman_loss


def full(values: Tensor, temperature: float) -> Tensor:
    """The whole matrix at once, as the released trainers build it."""
    return torch.sigmoid((values[:, None] - values[None]) / temperature).sum(dim=1) - 0.5


@pytest.mark.parametrize("count", [1, 2, 37, 64])
@pytest.mark.parametrize("temperature", [1e-4, 0.1, 3.0])
def test_blocks_are_the_full_matrix(
    count: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_PAIRS_AT_ONCE", 10 * count)  # ten rows at a time
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    weights = torch.randn(count, generator=torch.Generator().manual_seed(count + 1))
    one, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    ranks, expected = soft_rank(one, temperature), full(other, temperature)
    torch.testing.assert_close(ranks, expected, rtol=1e-5, atol=1e-5)
    (ranks * weights).sum().backward()
    (expected * weights).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6 / temperature)


def test_the_gradient_against_finite_differences() -> None:
    values = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def ranks(given: Tensor) -> Tensor:
        found: Tensor = ranking._SoftRank.apply(given, 0.7)
        return found

    assert torch.autograd.gradcheck(ranks, values.requires_grad_())


def test_a_video_of_the_papers_size_needs_no_matrix() -> None:
    """13,440 x 13,440 float32 numbers are 720 MB; what is held at once is far below."""
    values = torch.randn(13_440, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Largest() as seen:
        soft_rank(values, 1e-2).square().sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert seen.elements <= ranking._PAIRS_AT_ONCE


def test_cold_ranks_are_hard_ranks() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(soft_rank(values, 1e-7), hard_rank(values), atol=1e-3, rtol=0)
    assert hard_rank(torch.tensor([2.0, 1.0, 2.0])).tolist() == [1, 0, 2]


def test_the_loss_is_spearmans() -> None:
    student = torch.randn(40, generator=torch.Generator().manual_seed(4))
    teacher = student + 0.5 * torch.randn(40, generator=torch.Generator().manual_seed(5))
    expected = 1 - float(spearmanr(student.numpy(), teacher.numpy()).statistic)
    assert float(spearman_loss(student, teacher, 1e-7)) == pytest.approx(expected, abs=1e-5)
    assert float(spearman_loss(teacher, teacher, 1e-7)) == pytest.approx(0, abs=1e-6)
    assert float(spearman_loss(-teacher, teacher, 1e-7)) == pytest.approx(2, abs=1e-6)
    assert float(l1_loss(student, teacher)) == pytest.approx(float((student - teacher).abs().sum()))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="above 0"):
        soft_rank(torch.ones(3), 0.0)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        soft_rank(torch.ones(2, 3), 1.0)
