"""The rows computed from q and k against the whole softmax map."""

from __future__ import annotations

import torch

from tokenprune.tower import attention
from tokenprune.tower.attention import cls_row, received


def test_cls_row_and_received_attention_equal_the_whole_map() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 1100, 8, generator=generator) for _ in range(2))
    assert query.shape[2] > 2 * attention._QUERIES_AT_ONCE  # more than one block
    whole = (query.double() @ key.double().transpose(-1, -2) * 0.25).softmax(dim=-1)
    torch.testing.assert_close(cls_row(query, key, 0.25), whole[:, :, 0].float())
    torch.testing.assert_close(received(query, key, 0.25), whole.mean(dim=2).float())


def test_masked_keys_get_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 6, 4, generator=generator) for _ in range(2))
    seen = torch.tensor([True, True, True, True, False, False])
    short = key[:, :, :4]
    for mask in (
        seen[None, None, None, :],
        seen.expand(1, 1, 6, 6),
        torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min),
    ):
        row = cls_row(query, key, 0.5, mask)
        torch.testing.assert_close(row[..., :4], cls_row(query, short, 0.5))
        assert not row[..., 4:].any()
        gets = received(query, key, 0.5, mask)
        torch.testing.assert_close(gets[..., :4], received(query, short, 0.5))


def test_bfloat16_projections_are_scored_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(1, 2, 9, 4, generator=generator).bfloat16() for _ in range(2))
    row = cls_row(query, key, 0.5)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, cls_row(query.float(), key.float(), 0.5))
