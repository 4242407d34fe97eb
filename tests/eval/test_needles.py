"""Needle videos: the same every time, one answer to every question, nothing shared by the splits.

One test sends a few files through the bundled model, as a check that it reads videos at all; how
many answers are right is measured by ``scripts/train_demo_model.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenprune_hf
from tokenprune.errors import MissingPackageError
from tokenprune.media.video import read_video
from tokenprune_eval.bundled import needles, scenes
from tokenprune_eval.bundled.errors import BundledModelError
from tokenprune_eval.bundled.model import WEIGHTS, bundled_model_path

FASHION = scenes.FASHION_FOLDER if scenes.FASHION_FOLDER.is_dir() else None
BUNDLED: dict[str, Any] = {"path": "bundled"}
SPLITS: tuple[scenes.Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def videos() -> list[needles.NeedleVideo]:
    return [needles.render_video("test", i, 40, show=4, fashion=FASHION) for i in range(12)]


# --- videos -------------------------------------------------------------------------------------


def test_the_same_number_gives_the_same_video(videos: list[needles.NeedleVideo]) -> None:
    for number in (0, 5):
        again = needles.render_video("test", number, 40, show=4, fashion=FASHION)
        assert np.array_equal(again.frames, videos[number].frames)
        assert again.cards == videos[number].cards
        assert again.haystack == videos[number].haystack
    assert not np.array_equal(videos[0].frames, videos[2].frames)


def test_cards_take_their_frames_and_no_others(videos: list[needles.NeedleVideo]) -> None:
    for video in videos:
        assert video.frames.shape == (40, 224, 224, 3)
        assert 1 <= len(video.cards) <= needles.MAX_CARDS
        last = -1
        for card in video.cards:
            assert last < card.first
            assert card.last == card.first + 3
            assert card.last < 40
            last = card.last
            shown = video.frames[card.first : card.last + 1]
            assert (shown == shown[0]).all()
        footage = [i for i in range(40) if not any(c.first <= i <= c.last for c in video.cards)]
        (reel,) = [r for r in needles.reels("test") if r.name == video.haystack]
        every = {reel.frame(i).tobytes() for i in range(reel.length)}
        assert all(video.frames[i].tobytes() in every for i in footage)


def test_an_item_is_where_its_card_says(videos: list[needles.NeedleVideo]) -> None:
    for video in videos:
        for card in video.cards:
            left, top, right, bottom = card.box
            assert 0 <= left < right <= 224
            assert 0 <= top < bottom <= 224
            # Pictures are not quite centred in their squares, hence the small allowance.
            column = min(2, max(0, round((left + right) / 2 / (224 / 3) - 0.5)))
            row = min(2, max(0, round((top + bottom) / 2 / (224 / 3) - 0.5)))
            cell = scenes.PLACES.index(card.place)
            assert (abs(row - cell // 3), abs(column - cell % 3)) in ((0, 0), (0, 1), (1, 0))
            patch = video.frames[card.first][top:bottom, left:right].astype(float)
            wanted = np.array(scenes.COLORS[card.color], float)
            near = np.abs(patch - wanted).max(axis=2) < 130
            assert near.mean() > 0.1


def test_clips_and_photographs_take_turns(videos: list[needles.NeedleVideo]) -> None:
    for number, video in enumerate(videos):
        assert (video.haystack.split("/")[0] in needles.CLIPS) == (number % 2 == 0)
    moving = needles.render_video("test", 1, 60, show=1, cards=1, fashion=FASHION)
    assert len({frame.tobytes() for frame in moving.frames}) > 10


def test_spans_fill_a_video_that_is_just_long_enough() -> None:
    rng = np.random.default_rng(0)
    assert needles.spread(10, [3, 4, 3], rng) == [0, 3, 7]
    with pytest.raises(BundledModelError, match="do not fit"):
        needles.spread(9, [3, 4, 3], rng)
    with pytest.raises(BundledModelError, match="1 to 4 cards"):
        needles.render_video("test", 0, 64, cards=5)


def test_every_place_in_the_video_is_used() -> None:
    rng = np.random.default_rng(0)
    firsts = [needles.spread(128, [8] * 2, rng)[0] for _ in range(300)]
    lasts = [needles.spread(128, [8] * 2, rng)[1] for _ in range(300)]
    assert min(firsts) < 5
    assert max(lasts) > 115


def test_splits_share_nothing() -> None:
    clip_frames: dict[str, list[set[bytes]]] = {name: [] for name in needles.CLIPS}
    for split in SPLITS:
        for reel in needles.reels(split):
            source, _, variant = reel.name.partition("/")
            if source in needles.CLIPS:
                if not variant:
                    frames = {reel.frame(i).tobytes() for i in range(reel.length)}
                    clip_frames[source].append(frames)
                continue
            left, top, right, bottom = scenes.photograph_region(source, split)
            for x, y, side in needles._pan(split, source, int(variant)):
                assert left - 1e-6 <= x
                assert top - 1e-6 <= y
                assert x + side <= right + 1e-6
                assert y + side <= bottom + 1e-6
    for train, validation, test in clip_frames.values():
        assert train
        assert validation
        assert test
        assert not train & validation
        assert not train & test
        assert not validation & test
    with pytest.raises(BundledModelError, match="unknown split"):
        needles.reels("dev")  # type: ignore[arg-type]


def test_cards_use_their_splits_pictures(videos: list[needles.NeedleVideo]) -> None:
    allowed = {p.source for bank in scenes.pictures("test", FASHION).values() for p in bank}
    assert all(card.source in allowed for video in videos for card in video.cards)


# --- questions ----------------------------------------------------------------------------------


def test_every_question_has_one_answer(videos: list[needles.NeedleVideo]) -> None:
    """Recompute every answer from the cards with nothing but the question's words."""
    rng = np.random.default_rng(0)
    answers: set[str] = set()
    for video in videos:
        assert len({c.kind for c in video.cards}) == len(video.cards)
        assert len({c.color for c in video.cards}) == len(video.cards)
        for asked in needles.questions(video, rng, needles.TYPES * 3):
            words = set(asked.question.rstrip("?").split())
            meant = tuple(c for c in video.cards if words & {c.kind, c.color})
            answers.add(asked.answer)
            if asked.type == "exists":
                assert asked.answer == ("yes" if meant else "no")
                assert asked.cards == (meant or video.cards)
            else:
                assert len(meant) == 1
                assert asked.cards == meant
                assert asked.answer == getattr(meant[0], asked.type)
    assert {"yes", "no"} < answers


# --- files --------------------------------------------------------------------------------------


def test_sampling_is_that_of_transformers() -> None:
    from transformers import InternVLVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor = InternVLVideoProcessor()
    for total, count in ((128, 32), (512, 16), (512, 256), (100, 7), (5, 5)):
        metadata = VideoMetadata(total_num_frames=total, fps=25.0)
        given = processor.sample_frames(metadata, num_frames=count)
        assert needles.sample(total, count) == [int(i) for i in given]
    with pytest.raises(BundledModelError, match="cannot sample"):
        needles.sample(4, 5)


def test_a_written_set_is_read_back(tmp_path: Path) -> None:
    written = needles.needle_set(tmp_path, videos=2, frames=64, show=4, fashion=None)
    (folder,) = tmp_path.iterdir()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert needles.needle_set(tmp_path, videos=2, frames=64, show=4, fashion=None) == written
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert len(written) == 2 * len(needles.TYPES)
    assert len({q.id for q in written}) == len(written)
    for number in range(2):
        video = needles.render_video("test", number, 64, show=4, fashion=None)
        mine = [q for q in written if q.video.name == f"{number:04d}.mp4"]
        assert [q.type for q in mine] == list(needles.TYPES)
        frames = needles.read_frames(mine[0].video)
        assert frames.shape == video.frames.shape
        # The colours of saturated edges suffer from 4:2:0, little else does.
        error = np.abs(frames.astype(float) - video.frames)
        assert error.mean() < 4
        assert error.mean(axis=(1, 2, 3)).max() < 8
        few = needles.read_frames(mine[0].video, 16)
        assert np.array_equal(few, frames[needles.sample(64, 16)])
        for q in mine:
            assert set(q.cards) <= set(video.cards)
            assert (q.depth is None) == (len(q.cards) > 1)
            # Every fourth frame is sampled, and each card is shown in four.
            assert q.seen(16) == len(q.cards)
    (folder / "questions.jsonl").write_text(json.dumps({"id": "x"}) + "\n", "utf-8")
    with pytest.raises(BundledModelError, match="line 1"):
        needles.needle_set(tmp_path, videos=2, frames=64, show=4, fashion=None)


def test_how_often_a_sampled_video_shows_a_card() -> None:
    rng = np.random.default_rng(0)
    card = needles.Card("bag", "red", "top", (0, 0, 9, 9), "", "")
    counts: dict[tuple[int, int], set[int]] = {}
    for total, sampled in ((128, 32), (512, 16), (512, 64), (512, 256)):
        for first in [0, total - 8, *rng.integers(0, total - 7, size=200).tolist()]:
            shown = needles.Card(**{**card.__dict__, "first": first, "last": first + 7})
            q = needles.VideoQuestion("", Path(), total, "", "", "", "", (shown,))
            counts.setdefault((total, sampled), set()).add(q.seen(sampled))
    assert counts[128, 32] == {2}
    assert counts[512, 16] == {0, 1}
    assert counts[512, 64] == {1}
    assert counts[512, 256] == {4}


def test_the_bundled_model_reads_videos(tmp_path: Path) -> None:
    """From H.264 files, through transformers' own processor and `generate`."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    models: Any = AutoModelForImageTextToText  # untyped in transformers
    processors: Any = AutoProcessor
    path = bundled_model_path(tmp_path)
    model, processor = models.from_pretrained(path).eval(), processors.from_pretrained(path)
    hits: list[bool] = []
    for q in needles.needle_set(
        tmp_path, videos=5, frames=32, types=("kind", "place"), fashion=None
    ):
        # Every fourth frame: each card is seen twice.
        frames = needles.read_frames(q.video, 8)
        content = [{"type": "video", "video": frames}, {"type": "text", "text": q.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False},
        )
        ids = inputs["input_ids"]
        assert int((ids == processor.image_token_id).sum()) == 8 * 64
        assert processor.tokenizer.unk_token_id not in ids
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        hits.append(answer.strip() == q.answer)
    assert np.mean(hits) >= 0.75


def test_the_bundled_selector_ranks_as_its_teacher_does(tmp_path: Path) -> None:
    """On videos of the test split; chance is 1/16."""
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    overlaps = []
    for q in needles.needle_set(tmp_path, videos=3, frames=32, types=("kind",), fashion=None):
        inputs = tokenprune_hf.ask(processor, q.question, video=read_video(q.video, 16))
        kept = []
        for method, options in (("flexselect", {"layer": 3}), ("flexselect-lite", BUNDLED)):
            with tokenprune_hf.prune(model, method, 1 / 16, **options) as pruning:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            kept.append(set(pruning.selections[0].kept.tolist()))
        overlaps.append(len(kept[0] & kept[1]) / len(kept[0]))
    assert np.mean(overlaps) > 0.4, overlaps


def test_a_long_video_fits_the_bundled_model() -> None:
    """Prompts of 256 frames stay below what configuration and tokenizer say they can read."""
    config = json.loads((WEIGHTS / "config.json").read_text("utf-8"))
    tokenizer = json.loads((WEIGHTS / "tokenizer_config.json").read_text("utf-8"))
    assert config["text_config"]["max_position_embeddings"] > 256 * 72
    assert tokenizer["model_max_length"] > 256 * 72


def test_missing_clips_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(MissingPackageError, match="pip install --no-deps"):
        needles._clip.__wrapped__("bikes.mp4")
