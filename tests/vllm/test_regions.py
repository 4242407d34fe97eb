"""How a region of the prompt shrinks, by hand; no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenprune.config import PruningConfig
from tokenprune.families.tiles import InternVLChat
from tokenprune.tower.layouts import Medium, Segment
from tokenprune_vllm.processor import Ticket
from tokenprune_vllm.regions import Region

ROW, NEWLINE, TEXT = 90, 91, 7


def region(ids: list[int], segments: list[Segment]) -> Region:
    token_ids = torch.tensor(ids)
    return Region(token_ids, token_ids != TEXT, tuple(segments))


def test_each_segment_gets_its_budget_and_other_rows_stay() -> None:
    first = Segment(torch.arange(4), (1, 2, 2), "whole")
    # A map of 2 x 3 with a newline behind each of its rows
    second = Segment(torch.tensor([4, 5, 6, 8, 9, 10]), (1, 2, 3), "map")
    one = region([TEXT, *[ROW] * 12, TEXT], [first, second])
    assert one.total == 12
    assert one.kept(3) == 3 + 3 + 2
    assert one.kept(0.5) == 2 + 3 + 2
    assert one.kept(100) == 12
    ids, is_row = one.shrink(3)
    assert ids.tolist() == [TEXT, *[ROW] * 8, TEXT]
    assert is_row is not None
    assert is_row.tolist() == [False, *[True] * 8, False]
    assert not one.rows_move()


def test_frames_apart_keep_their_text_between_them() -> None:
    frames = [Segment(torch.arange(4) + 4 * n, (1, 2, 2), f"frame {n}") for n in range(2)]
    one = region([TEXT, *[ROW] * 4, TEXT, TEXT, *[ROW] * 4], frames)
    ids, is_row = one.shrink(1)
    assert ids.tolist() == [TEXT, ROW, TEXT, TEXT, ROW]
    assert is_row is not None
    assert is_row.tolist() == [False, True, False, False, True]


def test_a_video_over_several_stretches_moves_against_its_text() -> None:
    video = Segment(torch.arange(8), (2, 2, 2))
    one = region([TEXT, *[ROW] * 4, TEXT, *[ROW] * 4, TEXT], [video])
    assert one.rows_move()
    ids, is_row = one.shrink(3)
    assert is_row is None
    assert len(ids) == 3 + 3


def test_a_ticket_comes_back_as_it_was() -> None:
    segments = [
        Segment(torch.arange(4), (1, 2, 2), "crop 0"),
        Segment(torch.tensor([4, 5, 7, 8]), (1, 2, 2), "crop 2"),
    ]
    one = region([TEXT, *[ROW] * 9, TEXT], segments)
    pruning = PruningConfig("zeroth-order", 3, options={"seed": 4})
    medium = Medium("image", 9, 3, (56, 56), (90, 70))
    ticket = Ticket("image", pruning, one, medium, {"pixel_values": 3}, ["image_token_id"])
    again = Ticket.unpack(*ticket.pack().values())
    assert again.modality == "image"
    assert again.pruning == ticket.pruning
    assert torch.equal(again.region.token_ids, one.token_ids)
    assert torch.equal(again.region.is_row, one.is_row)
    for ours, back in zip(segments, again.region.segments, strict=True):
        assert torch.equal(ours.rows, back.rows)
        assert (ours.grid, ours.label) == (back.grid, back.label)
    assert again.medium == medium
    assert again.entries == {"pixel_values": 3}
    assert again.shared == ["image_token_id"]
    off = Ticket.unpack(*Ticket("video", None, one).pack().values())
    assert off.pruning is None
    assert torch.equal(off.shrunk()[0], one.token_ids)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_scores_of_tiles_lie_as_internvl_shuffles_patches(version: str) -> None:
    from vllm.model_executor.models.internvl import InternVLChatModel

    vision = SimpleNamespace(patch_size=14)
    kind: Any = SimpleNamespace(
        model_type="internvl_chat",
        vision_config=vision,
        force_image_size=84,
        downsample_ratio=0.5,
        ps_version=version,
    )
    scores = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0))  # tiles, heads, 6 x 6
    shuffle: Any = InternVLChatModel.pixel_shuffle
    maps = scores.mT.unflatten(1, (6, 6)).contiguous()
    shuffled = shuffle(SimpleNamespace(ps_version=version), maps, scale_factor=0.5)
    expected = shuffled.flatten(1, 2).unflatten(-1, (4, 3)).mean(dim=2)  # [tiles, 9, heads]
    medium = Medium("image", 18, 2, (84, 84))
    ((_, got),) = InternVLChat(kind).rows_of([medium], torch.zeros(2, 9, 5), scores)
    assert got is not None
    torch.testing.assert_close(got, expected.flatten(0, 1).mT)


@pytest.mark.parametrize(
    ("modality", "visual"), [("video", True), ("depth", True), ("audio", False)]
)
def test_sound_alone_is_left_as_it_is(modality: str, visual: bool) -> None:
    """A modality that only a plugin knows is none that passes unpruned."""
    assert Ticket(modality, None, region([ROW], [])).visual is visual
