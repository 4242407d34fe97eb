"""Pictures and videos made smaller: the number of tokens against counts of every size there is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune_hf
from tests.hf.models import tf
from tests.vllm import checkpoints
from tokenprune.budget import tokens_kept
from tokenprune.errors import BudgetError, PromptError, UnsupportedModelError
from tokenprune.media.sizes import keep_of_items
from tokenprune_hf.resizing import Resizer

FAMILIES = ("qwen2_5_vl", "internvl", "llava_next", "idefics3", "smolvlm", "mistral3", "lfm2_vl")
FIXED = ("llava", "gemma3")

SIZES = [(96, 64), (70, 150), (64, 64)]
KEEPS: list[int | float] = [0.8, 0.5, 0.25, 0.1, 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoints.save(name, root / name) for name in (*FAMILIES, *FIXED)}


def parts(folders: dict[str, Path], name: str) -> tuple[Any, Any]:
    """Return the config and the processor of a tiny checkpoint."""
    config = tf.AutoConfig.from_pretrained(folders[name])
    return config, checkpoints.hf_processor(name, folders[name])


def placeholders(config: Any, processor: Any, medium: Any, kind: str = "image") -> int:
    """Return how many placeholders a prompt has."""
    inputs = tokenprune_hf.ask(processor, "what", **{kind: medium})
    if config.model_type == "internvl":  # its videos have an image's
        kind = "image"
    token = getattr(config, f"{kind}_token_id", None) or config.image_token_index
    return int((inputs["input_ids"] == token).sum())


# Every size there is, by hand -------------------------------------------------------------------


def shrunk(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield every smaller size of one aspect ratio whose sides have 4 pixels and more."""
    for longest in range(1, max(size) + 1):
        width, height = (max(1, round(side * longest / max(size))) for side in size)
        if min(size) * longest >= 4 * max(size):
            yield width, height


def qwen_tokens(size: tuple[int, int], most: int, least: int, side: int) -> int:
    """Return the tokens of Qwen2-VL's resizing, for tokens of `side` x `side` pixels."""
    width, height = size
    across, down = round(width / side), round(height / side)
    if across * down * side**2 > most:
        scale = math.sqrt(width * height / most)
        across, down = (max(1, math.floor(one / scale / side)) for one in (width, height))
    elif across * down * side**2 < least:
        scale = math.sqrt(least / (width * height))
        across, down = (math.ceil(one * scale / side) for one in (width, height))
    return across * down


def qwen_counts(size: tuple[int, int], side: int) -> set[int]:
    least, most = 4 * side**2, 512 * side**2
    by_limit = {
        qwen_tokens(size, limit, min(least, limit), side) for limit in range(1, most + 1, 1)
    }
    return by_limit | {qwen_tokens(one, most, least, side) for one in shrunk(size)}


def internvl_tiles(size: tuple[int, int], most: int, tile: int) -> int:
    """Return the tiles of an image, the thumbnail included, as InternVL's authors cut it."""
    grids = [(a, b) for a in range(1, most + 1) for b in range(1, most + 1) if a * b <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, nearest = (1, 1), math.inf
    for across, down in grids:
        off = abs(size[0] / size[1] - across / down)
        roomy = size[0] * size[1] > 0.5 * tile * tile * across * down
        if off < nearest or (off == nearest and roomy):
            best, nearest = (across, down), off
    tiles = best[0] * best[1]
    return tiles if tiles == 1 else tiles + 1


def internvl_counts(size: tuple[int, int], tile: int, side: int) -> set[int]:
    counts = {side**2 * internvl_tiles(size, most, tile) for most in range(1, 5)}
    return counts | {side**2 * internvl_tiles(one, 4, tile) for one in shrunk(size)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEEPS)
def test_qwen_has_the_most_tokens_that_are_allowed(
    folders: dict[str, Path], size: tuple[int, int], keep: int | float
) -> None:
    config, processor = parts(folders, "qwen2_5_vl")
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    image = checkpoints.image(0, size)
    full = placeholders(config, processor, image)
    allowed = tokens_kept(keep, full)
    resized = tokenprune_hf.resize(config, processor, image, keep)
    assert resized.of_tokens == full
    assert resized.tokens == max(n for n in qwen_counts(size, side) if n <= allowed)
    assert placeholders(config, processor, resized) == resized.tokens
    # The aspect ratio is that of the picture, to a token at each side.
    grid = tokenprune_hf.ask(processor, "what", image=resized)["image_grid_thw"][0].tolist()
    rows, columns = (one // config.vision_config.spatial_merge_size for one in grid[1:])
    assert abs(columns - rows * size[0] / size[1]) <= 1 + size[0] / size[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEEPS)
def test_internvl_has_fewer_tiles_and_then_a_smaller_one(
    folders: dict[str, Path], size: tuple[int, int], keep: int | float
) -> None:
    config, processor = parts(folders, "internvl")
    (tile, _), side = config.vision_config.image_size, math.isqrt(config.image_seq_length)
    image = checkpoints.image(0, size)
    tiles = internvl_tiles(size, 4, tile)
    resized = tokenprune_hf.resize(config, processor, image, keep)
    allowed = tiles * tokens_kept(keep, side**2)
    known = {n for n in internvl_counts(size, tile, side) if n <= allowed}
    wanted = max(known or {n * n for n in range(1, side + 1) if n * n <= allowed})
    assert (resized.of_tokens, resized.tokens) == (tiles * side**2, wanted)
    assert placeholders(config, processor, resized) == wanted
    assert processor.image_seq_length == side**2  # the processor is as it was


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_idefics_has_the_most_tiles_that_are_allowed(folders: dict[str, Path], family: str) -> None:
    config, processor = parts(folders, family)
    tile = config.vision_config.image_size
    per_tile = (tile // config.vision_config.patch_size // config.scale_factor) ** 2
    for size in SIZES:
        image = checkpoints.image(0, size)
        full = placeholders(config, processor, image)
        # The picture gets its longest edge, then whole tiles of the longer side, then of the other.
        aspect, counts = max(size) / min(size), set()
        for edge in range(1, 2 * tile + 1):
            along = math.ceil(edge / tile)
            tiles = along * math.ceil(int(along * tile / aspect) / tile)
            counts.add(per_tile * (1 if tiles == 1 else tiles + 1))
        assert full in counts
        for keep in (0.8, 0.5, 0.4):
            resized = tokenprune_hf.resize(config, processor, image, keep)
            allowed = full // per_tile * tokens_kept(keep, per_tile)
            assert resized.tokens == max(n for n in counts if n <= allowed)
            assert placeholders(config, processor, resized) == resized.tokens


def test_llava_next_has_fewer_crops_and_newlines_do_not_count(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "llava_next")
    patches = config.vision_config.image_size // config.vision_config.patch_size
    found: list[float] = []
    for size in SIZES:
        image = checkpoints.image(0, size)

        def tokens(one: Image.Image) -> int:
            inputs = tokenprune_hf.ask(processor, "what", image=one)
            rows = int((inputs["input_ids"] == config.image_token_index).sum())
            # Of the map, R rows of W + 1; R is a number that its crops, cut to the picture, allow.
            height, width = inputs["image_sizes"][0].tolist()
            best = max(
                config.image_grid_pinpoints,
                key=lambda grid: (
                    min(
                        math.prod(int(side * share) for side in (height, width)),
                        height * width,
                    )
                    if (share := min(grid[0] / height, grid[1] / width))
                    else 0,
                    -math.prod(grid),
                ),
            )
            side = config.vision_config.image_size
            down, across = best[0] // side * patches, best[1] // side * patches
            if width / height > across / down:
                kept = round(height * (across / width), 7)
                down -= 2 * ((down - int(kept)) // 2)
            else:
                kept = round(width * (down / height), 7)
                across -= 2 * ((across - int(kept)) // 2)
            assert rows == patches**2 + down * (across + 1)
            return int(patches**2 + down * across)

        full = tokens(image)
        known = {tokens(image.resize(one)) for one in shrunk(size)}
        patch = config.vision_config.patch_size
        for keep in (0.95, 0.6):
            # Each crop rounds its budget for itself.
            allowed = full * keep
            # Smaller ones are enlarged again: such a picture is not what the model reads.
            sound = {
                tokens(image.resize(one))
                for one in shrunk(size)
                if math.prod(one) >= tokens(image.resize(one)) * patch**2 / 4
            }
            assert sound <= known
            if min(sound) > allowed:
                with pytest.raises((BudgetError, UnsupportedModelError), match="resize"):
                    tokenprune_hf.resize(config, processor, image, keep)
                continue
            found.append(keep)
            resized = tokenprune_hf.resize(config, processor, image, keep)
            assert resized.of_tokens == full
            assert resized.tokens == max(n for n in sound if n <= allowed)
            assert isinstance(resized.content, Image.Image)
            assert tokens(resized.content) == resized.tokens
            assert placeholders(config, processor, resized) == resized.placeholders
    assert len(found) > 2


@pytest.mark.parametrize("family", ["mistral3", "lfm2_vl"])
def test_no_family_exceeds_its_budget(folders: dict[str, Path], family: str) -> None:
    processor = checkpoints.hf_processor(family, folders[family])
    model = tokenprune_hf.load(str(folders[family]))[0]
    for size in SIZES:
        image = checkpoints.image(0, size)
        before = 0
        for keep in (0.2, 0.4, 0.7, 1.0):
            resized = tokenprune_hf.resize(model, processor, image, keep)
            inputs = tokenprune_hf.ask(processor, "what", image=resized)
            with torch.inference_mode():
                items = tokenprune_hf.encode(model, needs=(), **inputs).modalities["image"].items
            assert sum(item.tokens.total for item in items) == resized.tokens
            assert before <= resized.tokens <= math.ceil(keep * resized.of_tokens + len(items))
            before = resized.tokens
        assert before == resized.of_tokens


# All families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_are_the_picture_as_it_is(folders: dict[str, Path], family: str) -> None:
    config, processor = parts(folders, family)
    image = checkpoints.image(0, (96, 64))
    plain = tokenprune_hf.ask(processor, "what", image=image)
    for keep in (1.0, 100_000):
        for halfway in (False, True):
            resized = tokenprune_hf.resize(config, processor, image, keep, halfway=halfway)
            assert resized.content is image
            assert resized.processor(processor) is processor
            assert (resized.tokens, resized.keep) == (resized.of_tokens, 1.0)
            inputs = tokenprune_hf.ask(processor, "what", image=resized)
            assert set(inputs) == set(plain)
            for name, value in plain.items():
                assert torch.equal(inputs[name], value), name


@pytest.mark.parametrize("family", FIXED)
def test_a_fixed_number_of_tokens_is_refused(folders: dict[str, Path], family: str) -> None:
    config, processor = parts(folders, family)
    for halfway in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"whatever its size.* Leave resize out"):
            tokenprune_hf.resize(config, processor, checkpoints.image(0), 0.5, halfway=halfway)


def test_too_small_a_budget_says_how_few_there_can_be(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "idefics3")
    image = checkpoints.image(0, (96, 64))
    with pytest.raises(
        BudgetError, match=r"at least 16 of 80 visual tokens.* and 5 are to be kept"
    ):
        tokenprune_hf.resize(config, processor, image, 1)
    assert Resizer(config, processor).fewest(image) == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_halfway_leaves_a_method_what_is_to_be_kept(folders: dict[str, Path], family: str) -> None:
    model, _ = tokenprune_hf.load(str(folders[family]))
    processor = checkpoints.hf_processor(family, folders[family])
    image = checkpoints.image(0, (96, 64))
    for keep in (0.5, 0.25):
        resized = tokenprune_hf.resize(model, processor, image, keep, halfway=True)
        plain = tokenprune_hf.encode(
            model, needs=(), **tokenprune_hf.ask(processor, "what", image=image)
        )
        kept = sum(tokens_kept(keep, one.tokens.total) for one in plain.modalities["image"].items)
        geometric = math.sqrt(kept * resized.of_tokens)
        assert resized.tokens >= kept
        inputs = tokenprune_hf.ask(processor, "what", image=resized)
        with (
            torch.inference_mode(),
            tokenprune_hf.prune(model, "uniform", resized.keep) as pruning,
        ):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        # Of several crops, one keeps a whole token or none.
        total = sum(map(len, pruning.selections))
        assert kept - len(pruning.selections) < total <= kept
        assert sum(one.total for one in pruning.selections) == resized.tokens
        if family in ("qwen2_5_vl", "mistral3"):
            assert 0.75 * geometric < resized.tokens <= geometric + 0.5


def test_the_budget_of_several_items_is_the_largest_share() -> None:
    for items in ([36, 24, 24], [1, 1], [7, 100, 3], [5]):
        for kept in range(len(items), sum(items) + 1):
            keep = keep_of_items(kept, items)
            assert sum(tokens_kept(keep, one) for one in items) <= kept
            if isinstance(keep, float) and keep < 1:
                # One step further some item keeps one more, and then it is too much.
                steps = [(n + 0.5) / one for one in items for n in range(one)]
                above = min((step for step in steps if step > keep), default=1.0)
                assert sum(tokens_kept(above, one) for one in items) > kept
    with pytest.raises(BudgetError, match="at least one"):
        keep_of_items(1, [4, 4])


# Videos -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_video_has_evenly_fewer_frames(folders: dict[str, Path], family: str) -> None:
    config, processor = parts(folders, family)
    frames = checkpoints.video(0, 12, (48, 32))
    full = placeholders(config, processor, frames, "video")
    for keep, wanted in ((0.5, 6), (0.34, 4), (1.0, 12)):
        resized = tokenprune_hf.resize(config, processor, frames, keep)
        assert (resized.of_tokens, resized.tokens) == (full, full * wanted // 12)
        chosen = [round(place) for place in np.linspace(0, 11, wanted)]
        np.testing.assert_array_equal(resized.content, frames[chosen])
        assert placeholders(config, processor, resized, "video") == resized.tokens


def test_one_frame_that_is_too_much_is_made_smaller(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "qwen2_5_vl")
    frames = checkpoints.video(0, 4, (96, 64))
    full = placeholders(config, processor, frames, "video")
    resized = tokenprune_hf.resize(config, processor, frames, 0.1)
    assert len(resized.content) == 1  # type: ignore[arg-type]
    assert 1 <= resized.tokens <= tokens_kept(0.1, full)
    assert placeholders(config, processor, resized, "video") == resized.tokens


def test_a_video_keeps_its_times(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "qwen2_5_vl")
    frames = checkpoints.video(0, 8)
    times = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 4.5, 5.0, 6.0])
    video = tokenprune_hf.Video(frames, times, np.arange(8), 8, 7.0, Path("a.mp4"), "pyav")
    small = tokenprune_hf.resize(config, processor, video, 0.5).content
    assert isinstance(small, tokenprune_hf.Video)
    places: Sequence[int] = [round(place) for place in np.linspace(0, 7, 4)]
    np.testing.assert_array_equal(small.frames, frames[places])
    np.testing.assert_array_equal(small.times, times[places])
    np.testing.assert_array_equal(small.indices, places)


# What is remembered ------------------------------------------------------------------------------


def test_pictures_of_one_size_are_counted_once(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "mistral3")
    calls = []
    kind = type(processor)

    class Counting(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return super().__call__(*args, **kwargs)

    processor.__class__ = Counting
    resizer = Resizer(config, processor)
    first = resizer(checkpoints.image(0, (96, 64)), 0.5)
    known = len(calls)
    assert known > 2
    second = resizer(checkpoints.image(1, (96, 64)), 0.5)
    assert len(calls) == known
    assert (first.tokens, first.key) == (second.tokens, second.key)
    assert first.content is not second.content


def test_of_many_tokens_nearly_all_are_enough(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "qwen2_5_vl")
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    processor.image_processor.size = {"shortest_edge": 256, "longest_edge": 8000 * side**2}
    resizer = Resizer(config, processor)
    image = Image.new("RGB", (50 * side, 60 * side))
    resized = resizer(image, 0.7)
    assert resized.of_tokens == 3000
    assert 0.97 * 2100 <= resized.tokens <= 2100
    assert placeholders(config, processor, resized) == resized.tokens
    assert len(resizer._counts) < 12


@pytest.mark.parametrize("content", ["picture.png", np.zeros((4, 4, 3), np.uint8), None])
def test_what_is_no_picture_is_refused(content: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(PromptError, match=r"cannot be made smaller\. Pass a picture"):
        Resizer(*parts(folders, "internvl"))(content, 0.25)


def test_in_vllm_tiles_keep_their_size(folders: dict[str, Path]) -> None:
    config, processor = parts(folders, "internvl")
    image = checkpoints.image(0, (96, 64))
    resizer = Resizer(config, processor, in_vllm=True)
    for keep in (0.25, 0.6):
        assert resizer(image, keep).key == Resizer(config, processor)(image, keep).key
    with pytest.raises(BudgetError, match="at least 16 of 80"):
        resizer(image, 0.1)
    assert Resizer(config, processor)(image, 0.1).attributes == {"image_seq_length": 9}
