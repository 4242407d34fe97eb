from __future__ import annotations

import math

import pytest
import torch

from tokenprune.greedy.rows import IntegerRows
from tokenprune.numerics import first_equal_row, folded_sum, full_precision


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 25, 1023])
def test_folded_sum(length: int) -> None:
    values = torch.randn(7, length, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = [[math.fsum(values[i, :, j].tolist()) for j in range(3)] for i in range(7)]
    torch.testing.assert_close(folded_sum(values, 1), torch.tensor(expected, dtype=torch.float64))
    assert folded_sum(torch.rand(1, length, 1).expand(1, length, 577), 1).unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_first_equal_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(0, 40, (300,), generator=generator)
    rows = torch.randn(40, 5, generator=generator).to(dtype)[source]
    rows[7], rows[9], rows[250] = 0.0, -0.0, 0.0
    expected = [next(j for j in range(300) if torch.equal(rows[j], rows[i])) for i in range(300)]
    assert first_equal_row(rows).tolist() == expected
    assert first_equal_row(rows.T.contiguous().T).tolist() == expected


def test_dot_products_of_integer_rows_are_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = (
        torch.randn(1, 6, 4097, generator=generator)
        * torch.tensor([1e-30, 1, 1e30]).repeat(2)[None, :, None]
    )
    rows[0, 5] = 1.0  # the largest sum that entries of this size can have
    whole = IntegerRows.from_embeddings(rows)
    exact = [[int(value) for value in row] for row in whole.rows[0].tolist()]
    for i in range(6):
        for j in range(6):
            product = sum(a * b for a, b in zip(exact[i], exact[j], strict=True))
            assert int(whole.rows[0, i] @ whole.rows[0, j]) == product
            assert abs(product) < 2**53
    unit = rows[0].double() / rows[0].double().norm(dim=-1, keepdim=True)
    cosine = unit @ unit.T
    got = torch.stack([whole.cosines_to(torch.tensor([i]))[0] for i in range(6)])
    torch.testing.assert_close(got.double(), cosine, rtol=0.0, atol=1e-6)


def test_full_precision_gives_back_what_was_set() -> None:
    left, right = torch.randn(2, 64, 64).unbind()
    exact = left @ right
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert torch.equal(left @ right, exact)
        assert (left @ right).dtype == torch.bfloat16
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.device("cpu")):
            assert torch.equal(left @ right, exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
