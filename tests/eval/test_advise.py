"""`tokenprune advise`: its arithmetic by hand, its parts under a told clock, and the command.

The clock is told what a call costs by hooks on the tower and the language model, so that what is
measured has to come out as counted: so many seconds for each token that the language model reads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="advising needs the extra `demo`")

import tokenprune_hf
from tests.hf.models import TINY
from tests.vllm import checkpoints as tiny
from tokenprune.cli import main
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.registry import build
from tokenprune_eval.advise import measure as measuring
from tokenprune_eval.advise.command import METHODS
from tokenprune_eval.advise.costs import Chosen, Costs, Parts, Read, Smaller
from tokenprune_eval.advise.measure import Measured, in_turn, measure
from tokenprune_eval.advise.memory import BLOCK, held_by
from tokenprune_eval.advise.report import About, as_json, cells
from tokenprune_eval.advise.request import Media, media_of, question_of_length
from tokenprune_eval.advise.words import advice, caveats, in_vllm
from tokenprune_eval.shared.asking import laid_out
from tokenprune_hf.any_model import vision_model_of_any_type
from tokenprune_hf.attached import attached
from tokenprune_hf.engine import cache_of
from tokenprune_hf.layout import decoder_of

FAMILIES = ("llava_next", "qwen2_5_vl", "gemma3")

# Arithmetic -------------------------------------------------------------------------------------


def parts(
    encode: float = 1.0,
    prefill: float = 4.0,
    step: float = 0.05,
    select: float = 0.2,
    **more: Any,
) -> Parts:
    """Return a request of 600 visual and 40 other tokens whose prefill goes with its length."""

    def read(visual: int) -> Read:
        length = visual + 40
        return Read(visual, length, prefill * length / 640, step * (1 + length / 6400))

    given: dict[str, Any] = {
        "encode": encode,
        "full": read(600),
        "least": read(1),
        "budgets": {0.5: read(300), 0.1: read(60)},
        "chosen": [
            Chosen("information", 0.5, encode + 0.1, select),
            Chosen("information", 0.1, encode + 0.1, select / 2),
        ],
        "new_tokens": 21,
        "noise": 0.01,
    }
    return Parts(**(given | more))


def test_the_table_adds_up_by_hand() -> None:
    smaller = Smaller(0.1, 0.25, Read(50, 90, 0.5, 0.04))
    costs = Costs(parts(smaller=[smaller]))
    # Twenty steps of 0.05 s, a tenth more with 640 tokens in the cache.
    total = 1.0 + 4.0 + 20 * 0.05 * 1.1
    half = 4.0 * 340 / 640 + 20 * 0.05 * (1 + 340 / 6400)
    tenth = 4.0 * 100 / 640 + 20 * 0.05 * (1 + 100 / 6400)
    least = 4.0 * 41 / 640 + 20 * 0.05 * (1 + 41 / 6400)
    unpruned, first, second, resized = costs.rows
    assert unpruned.total == pytest.approx(total)
    assert (unpruned.saved, unpruned.at_most, unpruned.select) == (0.0, None, 0.0)
    assert first.total == pytest.approx(1.1 + 0.2 + half)
    assert first.at_most == pytest.approx(1 - (1.0 + half) / total)
    assert first.saved == pytest.approx(1 - (1.3 + half) / total)
    assert first.first_token == pytest.approx(1.3 + 4.0 * 340 / 640)
    assert second.at_most == pytest.approx(1 - (1.0 + tenth) / total)
    assert second.saved == pytest.approx(1 - (1.2 + tenth) / total)
    assert second.speed_up == pytest.approx(total / (1.2 + tenth))
    assert (resized.method, resized.tokens, resized.at_most) == ("resize", 50, None)
    assert resized.total == pytest.approx(0.25 + 0.5 + 20 * 0.04)
    assert costs.limit.saved == pytest.approx(1 - (1.0 + least) / total)
    assert costs.first_token_limit == pytest.approx(1 - (1.0 + 4.0 * 41 / 640) / 5.0)
    assert costs.best == second
    assert costs.best_resized == resized
    assert costs.shares == pytest.approx(
        {"encoding": 1 / total, "prefill": 4 / total, "decoding": 1.1 / total}
    )
    # No method at any budget saves more than it could, nor than the limit.
    for row in costs.pruned:
        assert row.at_most is not None
        assert row.saved < row.at_most < costs.limit.saved
    assert cells(first) == [
        *("information", "0.5", "300", "1.10", "0.200", "2.12", "1.05"),
        *(f"{first.total:.2f}", f"{100 * (1 - (1.0 + half) / total):.1f}"),
        f"+{100 * first.saved:.1f}",
    ]


def test_one_new_token_is_not_decoded() -> None:
    costs = Costs(parts(new_tokens=1))
    assert costs.unpruned.decode == 0
    assert costs.unpruned.total == pytest.approx(5.0)
    assert costs.first_token_limit == pytest.approx(costs.limit.saved)


# Sentences --------------------------------------------------------------------------------------


def said(given: Parts) -> str:
    return " ".join(advice(Costs(given)))


def test_where_prefill_rules_pruning_pays() -> None:
    given = parts()
    text = said(given)
    assert "The largest part is prefill. It is what pruning shortens." in text
    assert "cannot pay" not in text
    least = 1.0 + 4.0 * 41 / 640 + 20 * 0.05 * (1 + 41 / 6400)
    assert f"{100 * (1 - least / 6.1):.0f} % of the time is saved (x{6.1 / least:.2f})" in text
    assert "information at keep 0.1" in text
    assert "slower" not in text


def test_where_the_tower_rules_it_cannot_pay() -> None:
    given = parts(encode=60.0)
    assert Costs(given).reasons == ["tower"]
    text = said(given)
    assert "The largest part is encoding." in text
    assert "Pruning cannot pay here: the vision tower takes 92 % of the time." in text
    assert "a smaller picture does" in text
    smaller = said(parts(encode=60.0, smaller=[Smaller(0.1, 6.0, Read(60, 100, 0.6, 0.05))]))
    assert "Making the picture smaller saves more: 88 % with resize at keep 0.1" in smaller


def test_where_decoding_rules_it_cannot_pay() -> None:
    given = parts(encode=0.1, prefill=0.2, step=0.2, new_tokens=101)
    costs = Costs(given)
    assert not costs.can_pay
    assert costs.reasons == ["decoding"]
    text = said(given)
    assert "The largest part is decoding." in text
    assert "cannot pay here: decoding 101 tokens takes 99 % of it." in text
    # Prefill is two thirds of the first token's time, nearly all of which can go.
    assert "It can shorten the time to the first token" in text
    assert f"to the first token {100 * costs.first_token_limit:.0f} %" in text


def test_where_the_prompt_is_short_it_cannot_pay() -> None:
    full, less = Read(16, 36, 1.0, 0.01), Read(1, 21, 0.96, 0.01)
    given = parts(full=full, least=less, budgets={0.5: less, 0.1: less}, new_tokens=2)
    costs = Costs(given)
    assert costs.reasons == ["short"]
    assert "the prompt is short, and reading 36 tokens takes x1.04 as long as reading 21" in said(
        given
    )
    few = Read(16, 640, 4.0, 0.05)
    less = Read(1, 625, 3.9, 0.05)
    given = parts(full=few, least=less, budgets={0.5: less, 0.1: less}, new_tokens=2)
    assert Costs(given).reasons == ["few", "short"]
    assert "only 16 of the prompt's 640 tokens are visual" in said(given)


def test_every_verdict_has_a_reason() -> None:
    """Also where no part rules: here encoding and decoding are two fifths each."""
    given = parts(encode=40.0, prefill=4.0, step=1.8)
    costs = Costs(given)
    assert not costs.can_pay
    assert costs.reasons == []
    assert "cannot pay here: prefill is 5 % of the time." in said(given)


def test_a_method_that_is_slower_is_named() -> None:
    slow = parts(select=3.0)
    text = said(slow)
    half = 4.0 * (1 - 340 / 640) + 20 * 0.05 * (0.1 - 340 / 6400)
    assert (
        "information is slower than not pruning at keep 0.5: at 0.5 gathering and selecting take "
        f"3.10 s, and prefill and decoding get {half:.2f} s shorter." in text
    )
    assert "The largest saving measured" in text  # at 0.1, where it takes half as long
    slower = said(parts(select=20.0))
    assert "at keep 0.5, 0.1" in slower
    assert "No method and budget measured saves time beyond the noise" in slower


def test_what_is_within_the_noise_is_not_claimed() -> None:
    # Slower by 3 % at a half, and it saves 26 % at a tenth.
    slow = parts(select=2.0)
    row = Costs(slow).rows[1]
    assert -0.05 < row.saved < -0.01
    assert "slower" in said(slow)
    assert "slower" not in said(parts(select=2.0, noise=0.1))
    # Of one or two turns nothing is known, and 10 % are taken for noise.
    once = parts(select=2.0, noise=None)
    assert "slower" not in said(once)
    assert "too few to tell the noise" in caveats(Costs(once))[0]
    assert "less than 10 %" in caveats(Costs(once))[0]
    assert "differences of less than 1.0 % mean" in caveats(Costs(slow))[0]


def test_times_that_contradict_each_other_say_nothing() -> None:
    """As on a busy machine: a tenth of the tokens would save more than one of them does."""
    given = parts(least=Read(1, 41, 4.5, 0.05))
    row = Costs(given).contradiction
    assert row is not None
    assert row.keep == 0.1
    text = said(given)
    assert "contradict each other: with 60 visual tokens 57 % would be saved at most" in text
    assert "nothing follows from the table" in text
    for claim in ("largest saving", "cannot pay", "The limit"):
        assert claim not in text
    # Within the noise it is none.
    assert Costs(parts(least=Read(1, 41, 0.7, 0.05), noise=0.1)).contradiction is None
    assert Costs(parts()).contradiction is None


def test_noise_is_that_of_the_length_that_varied_most() -> None:
    still, restless = [10.0] * 5, [4.0, 5.0, 6.0, 7.0, 8.0]
    # By the notches of a box plot.
    expected = 1.57 * (7.0 - 5.0) / math.sqrt(5) / 10.0
    assert measuring._noise([still, restless]) == pytest.approx(expected)
    unsure = said(parts(encode=60.0, noise=0.3))
    assert "As far as times tell that vary so much, pruning cannot pay here" in unsure
    assert measuring._noise([[10.0] * 2, [1.0, 2.0]]) is None


def test_without_a_method_there_is_still_a_limit() -> None:
    text = said(parts(chosen=[], smaller=[Smaller(0.1, 0.25, Read(50, 90, 0.5, 0.04))]))
    assert "The limit" in text
    assert "largest saving measured" not in text
    assert "Making the picture smaller saves more" in text


def test_nothing_to_save_is_said() -> None:
    full = Read(16, 36, 1.0, 0.01)
    given = parts(full=full, least=full, budgets={0.5: full, 0.1: full})
    assert "Nothing can be saved." in said(given)


# Turns ------------------------------------------------------------------------------------------


class Clock:
    """Seconds that only pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def turns(until: float, costs: Sequence[float], most: int = 5) -> tuple[list[int], bool, Clock]:
    """Return what counted of a part that takes these seconds, turn by turn."""
    clock, number = Clock(), iter(range(99))

    def run() -> int:
        turn = next(number)
        clock.now += costs[min(turn, len(costs) - 1)]
        return turn

    found, warmed_up = in_turn({"a": run, "b": lambda: -1}, until, clock, most)
    assert found["b"] == [-1] * len(found["a"])
    return found["a"], warmed_up, clock


def test_the_first_turn_warms_up_and_time_ends_the_others() -> None:
    assert turns(1000, [1.0])[:2] == ([1, 2, 3, 4, 5], True)
    # Turns of one second: the fourth would end behind 4.5.
    found, warmed_up, clock = turns(4.5, [1.0])
    assert (found, warmed_up, clock.now) == ([1, 2, 3], True, 4.0)
    # No time for a second one: the first has to count.
    assert turns(1.5, [1.0])[:2] == ([0], False)
    assert turns(0.5, [1.0])[:2] == ([0], False)
    # A first turn that takes longer than the others, as compiling does.
    assert turns(10.0, [4.0, 1.0], most=3)[:2] == ([1, 2, 3], True)


def test_a_first_turn_that_takes_too_long_leaves_parts_out() -> None:
    clock, ran = Clock(), []

    def part(name: str) -> Callable[[], str]:
        def run() -> str:
            clock.now += 1.0
            ran.append(name)
            return name

        return run

    parts = {name: part(name) for name in "abcde"}
    # After a and b there is time for c and d; e would begin at 4, behind 3.5.
    found, warmed_up = in_turn(parts, 3.5, clock, needed=["a", "b"])
    assert (list(found), warmed_up) == (["a", "b", "c", "d"], False)
    found, warmed_up = in_turn(parts, clock.now - 1.0, clock, needed=["a", "b"])
    assert list(found) == ["a", "b"]
    # Turns that follow run what the first one ran.
    ran.clear()
    found, warmed_up = in_turn(parts, clock.now + 9.0, clock, needed=[])
    assert (ran, warmed_up) == ([*"abcde"], False)


# Measuring --------------------------------------------------------------------------------------


@contextmanager
def told(model: Any, clock: Clock, encode: float, token: float) -> Iterator[None]:
    """Have a clock go on by what the tower's calls and the language model's tokens cost."""

    def tower(*_: Any) -> None:
        clock.now += encode

    def language(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs["inputs_embeds"]
        clock.now += token * states.shape[0] * states.shape[1]

    inner = model.model
    module = inner.visual if hasattr(inner, "visual") else inner.vision_tower
    hooks = [
        module.register_forward_pre_hook(tower),
        decoder_of(model).register_forward_pre_hook(language, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> Callable[[str], tuple[Any, Any]]:
    known: dict[str, tuple[Any, Any]] = {}

    def load(family: str) -> tuple[Any, Any]:
        if family not in known:
            known[family] = tokenprune_hf.load(str(checkpoints[family]), device="cpu")
        return known[family]

    return load


def measured(
    model: Any,
    processor: Any,
    clock: Clock,
    *,
    media: Media | None = None,
    methods: Sequence[str] = ("information",),
    keeps: Sequence[int | float] = (0.5, 2),
    **more: Any,
) -> Measured:
    # A turn that warms up and one that counts.
    given: dict[str, Any] = {"new_tokens": 11, "limit": 1e9, "turns": 1, "resize": False}
    return measure(
        model,
        processor,
        Media(tiny.image(0), "1 image") if media is None else media,
        "w9 w10",
        {name: build(name, {}) for name in methods},
        keeps,
        clock=clock,
        **(given | more),
    )


def counted(model: Any, processor: Any, content: Any) -> tuple[int, list[int]]:
    """Return the length of a prompt, and the tokens of each item, by the plain adapter."""
    inputs = laid_out(model, processor, "w9 w10", content)
    with tokenprune_hf.prune(model, "uniform", 1.0) as pruning:
        model.generate(**inputs, max_new_tokens=1)
    return int(inputs["input_ids"].shape[1]), [one.total for one in pruning.selections]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_each_part_is_what_it_costs(
    loaded: Callable[[str], tuple[Any, Any]], family: str, batch: int
) -> None:
    model, processor = loaded(family)
    length, items = counted(model, processor, tiny.image(0))
    clock = Clock()
    with told(model, clock, encode=100.0, token=1.0):
        found = measured(
            model, processor, clock, methods=["information", "flexselect"], batch=batch
        ).parts
    kept = {0.5: sum(max(1, int(0.5 * n + 0.5)) for n in items), 2: 2 * len(items)}
    assert found.encode == 100.0
    assert (found.full.visual, found.full.prompt) == (sum(items), length)
    text = length - sum(items)
    assert (found.least.visual, found.least.prompt) == (len(items), text + len(items))
    for keep, read in found.budgets.items():
        assert (read.visual, read.prompt) == (kept[keep], text + kept[keep])
    for read in (found.full, found.least, *found.budgets.values()):
        # A second a token; selecting, which is told by the real clock, takes a moment.
        assert read.prefill == pytest.approx(read.prompt, abs=0.5)
        assert read.step == 1.0
    by_name = {(one.method, one.keep): one for one in found.chosen}
    assert all(one.encode == 100.0 for one in found.chosen)
    for keep in (0.5, 2):
        assert by_name["information", keep].select == 0.0
        # It reads every item with the text, once, whatever is kept.
        assert 0 < by_name["flexselect", keep].select <= len(items) * length
    assert by_name["flexselect", 0.5].select == by_name["flexselect", 2].select
    assert Costs(found).unpruned.total == pytest.approx(100 + length + 10, abs=0.5)


def test_a_smaller_picture_is_a_row_of_its_own(
    loaded: Callable[[str], tuple[Any, Any]],
) -> None:
    model, processor = loaded("qwen2_5_vl")
    media = Media(tiny.image(0, (112, 112)), "1 image")
    clock = Clock()
    with told(model, clock, encode=7.0, token=1.0):
        found = measured(model, processor, clock, media=media, keeps=[0.5, 0.25], resize=True)
    assert [one.keep for one in found.parts.smaller] == [0.5, 0.25]
    assert not found.left_out
    full = found.parts.full
    for one in found.parts.smaller:
        assert isinstance(one.keep, float)
        assert 1 <= one.read.visual <= one.keep * full.visual
        assert one.read.prompt - one.read.visual == full.prompt - full.visual
        assert one.read.prefill == pytest.approx(one.read.prompt, abs=0.5)
        assert one.encode == 7.0


def test_several_images_and_what_cannot_be_resized(
    loaded: Callable[[str], tuple[Any, Any]],
) -> None:
    model, processor = loaded("qwen2_5_vl")
    media = media_of(["56x84"], 3, None, 1)
    assert media.name == "3 images, 56x84"
    clock = Clock()
    with told(model, clock, encode=1.0, token=1.0):
        found = measured(model, processor, clock, media=media, keeps=[2], resize=True)
    _, items = counted(model, processor, media.content)
    assert len(items) == 3
    assert found.parts.full.visual == sum(items)
    assert found.parts.budgets[2].visual == 6
    assert not found.parts.smaller
    assert "there are several" in found.left_out[0]


def test_the_model_is_as_it_was_also_after_an_error(
    loaded: Callable[[str], tuple[Any, Any]],
) -> None:
    model, processor = loaded("qwen2_5_vl")
    inputs = laid_out(model, processor, "w9 w10", tiny.image(0))
    before = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    names = set(vars(model)) | {name for name, _ in model.named_modules()}
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, processor, Clock(), on_part=fail)
    measured(model, processor, Clock())
    assert attached(model) is None
    assert set(vars(model)) | {name for name, _ in model.named_modules()} == names
    after = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(before, after)


def test_too_little_memory_says_what_to_make_smaller(
    loaded: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded("qwen2_5_vl")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measuring.Reading, "run", full)
    with pytest.raises(ConfigError, match=r"in a batch of 2 does not fit.*--batch"):
        measured(model, processor, Clock(), batch=2)


def test_methods_that_do_not_serve_a_model(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    """Gemma 3 shows when its layers are read that they see a few tokens only."""
    model, processor = loaded("gemma3")
    methods = ("information", "flexselect", "cdpruner")
    found = measured(model, processor, Clock(), methods=methods, keeps=[2], required=False)
    assert {one.method for one in found.parts.chosen} == {"information"}
    for name in ("flexselect", "cdpruner"):
        assert any(text.startswith(f"{name} is left out: ") for text in found.left_out)
    with pytest.raises(TokenPruneError):
        measured(model, processor, Clock(), methods=methods)
    assert attached(model) is None


def test_what_there_was_no_time_for_is_left_out(
    loaded: Callable[[str], tuple[Any, Any]],
) -> None:
    model, processor = loaded("qwen2_5_vl")
    clock = Clock()
    with told(model, clock, encode=5.0, token=1.0):
        found = measured(model, processor, clock, keeps=[0.5, 2], limit=0.0)
    assert not found.warmed_up
    assert found.parts.full.prefill > found.parts.least.prefill > 0
    assert (dict(found.parts.budgets), list(found.parts.chosen)) == ({}, [])
    assert "The time was over before" in found.left_out[0]
    costs = Costs(found.parts)
    assert [row.method for row in costs.rows] == ["unpruned"]
    assert costs.best is None
    assert "The limit" in " ".join(advice(costs))


def test_the_default_methods_are_those_that_readme_recommends() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    recommended = re.search(r"Begin with `([\w-]+)`.*?and with `([\w-]+)`", text, flags=re.S)
    assert recommended is not None
    assert set(METHODS) == {*recommended.groups(), "resize"}


# The request ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("wanted", [40, 41, 200])
def test_a_prompt_of_a_length(
    loaded: Callable[[str], tuple[Any, Any]], wanted: int, count: int
) -> None:
    model, processor = loaded("qwen2_5_vl")
    content = media_of(["56x84"], count, None, 1).content
    question = question_of_length(model, processor, content, wanted)
    ids = laid_out(model, processor, question, content)["input_ids"]
    placeholders = ids == vision_model_of_any_type(model).token_id("image")
    text = int((~placeholders).sum())
    # Its vocabulary spells the word out, so that a prompt comes to whole words.
    assert wanted - 6 < text <= wanted


def test_a_prompt_shorter_than_its_template(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, processor = loaded("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"--prompt-tokens 1 is too few.*Give at least"):
        question_of_length(model, processor, tiny.image(0), 1)


def test_pictures_of_a_size_and_files(tmp_path: Path) -> None:
    one = media_of(["20x10"], None, None, 1)
    assert (one.name, one.single) == ("1 image, 20x10", one.content)
    tiny.image(0, (48, 32)).save(tmp_path / "a.png")
    two = media_of([str(tmp_path / "a.png"), "16"], None, None, 1)
    assert (two.name, two.single) == ("2 images, 48x32 and 16x16", None)
    with pytest.raises(ConfigError, match="no size of a picture"):
        media_of(["0x5"], None, None, 1)
    with pytest.raises(ConfigError, match="--images 3 does not fit the 2"):
        media_of(["5", "6"], 3, None, 1)


# Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl"])
def test_keys_and_values_are_those_that_the_model_keeps(family: str) -> None:
    """The config's bytes a token against the tensors in a cache that a text was read into."""
    model = TINY[family].model()
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.arange(5, 5 + 2 * BLOCK)[None],
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = cache_of(output)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert layers
    bytes_ = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    held = held_by(model.config, 4, "float32")
    assert held is not None
    assert held.bytes_of(2 * BLOCK) == bytes_
    assert held.bytes_of(2 * BLOCK + 1) == bytes_ * 3 // 2
    assert held.bytes_of(2 * BLOCK + 1, block=1) == held.per_token * (2 * BLOCK + 1)


class Config:
    """A config with the attributes that it is given."""

    def __init__(self, **more: Any) -> None:
        vars(self).update(
            {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, **more}
        )

    def get_text_config(self) -> Config:
        return self


@pytest.mark.parametrize(
    ("config", "tokens", "numbers"),
    [
        (Config(), 32, 4 * 32 * 2 * 8 * 8),
        (Config(num_key_value_heads=2, head_dim=5), 32, 4 * 32 * 2 * 2 * 5),
        # A latent and the rotated part in place of keys and values.
        (Config(kv_lora_rank=12, qk_rope_head_dim=4), 32, 4 * 32 * 16),
        # Every second layer sees 16 tokens only.
        (
            Config(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2),
            64,
            2 * (16 + 64) * 128,
        ),
        (Config(sliding_window=16), 64, 4 * 16 * 128),
        (Config(sliding_window=16, use_sliding_window=False), 64, 4 * 64 * 128),
        # States are as large for every prompt, and the last layer reads the third's keys.
        (Config(layer_types=["linear_attention", *["full_attention"] * 3]), 32, 3 * 32 * 128),
        (Config(num_kv_shared_layers=1), 32, 3 * 32 * 128),
    ],
)
def test_bytes_of_configs_by_hand(config: Any, tokens: int, numbers: int) -> None:
    held = held_by(config, 2, "bfloat16")
    assert held is not None
    assert held.bytes_of(tokens) == 2 * numbers


def test_vllm_is_told_of_computed_room_and_of_what_is_not_known() -> None:
    costs = Costs(parts())
    held = held_by(Config(), 2, "bfloat16")
    text = " ".join(in_vllm(costs, held, [0.5, 0.1]))
    # 640 + 21 tokens are 42 blocks, 340 + 21 are 23 and 100 + 21 are 8.
    assert "Computed from the config, not measured" in text
    assert f"(x{42 / 23:.2f})" in text
    assert f"(x{42 / 8:.2f})" in text
    assert "batching" in text
    assert held_by(Config(num_attention_heads=None), 2, "bfloat16") is None
    assert "not known from this model's config" in in_vllm(costs, None, [0.5])[-1]
    states = held_by(Config(layer_types=["linear_attention"] * 4), 2, "bfloat16")
    assert "keeps no keys and values" in in_vllm(costs, states, [0.5])[-1]


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def two_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command stop after two turns, however fast they are."""
    monkeypatch.setattr(measuring, "measure", partial(measure, turns=2))


@pytest.mark.usefixtures("two_turns")
def test_the_command_measures_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "advice.json"
    status = main(
        [
            *("advise", "bundled", "--image", "128", "--keep", "0.25", "4", "--new-tokens", "3"),
            *("--method", "divprune", "resize", "--json", str(file)),
        ]
    )
    assert status == 0
    shown = capsys.readouterr().out
    for text in ("64 visual and", "3 new tokens", "divprune", "resize", "limit", "The limit:"):
        assert text in shown
    found = json.loads(file.read_text("utf-8"))
    assert found["format"] == 1
    assert found["request"]["visual_tokens"] == 64
    rows = {(row["method"], row["keep"]): row for row in found["rows"]}
    assert next(iter(rows)) == ("unpruned", 1.0)
    assert rows["divprune", 0.25]["tokens"] == 16
    assert rows["divprune", 4]["tokens"] == 4
    total = rows["unpruned", 1.0]["total"]
    for row in found["rows"]:
        seconds = row["encode"] + row["select"] + row["prefill"] + row["decode"]
        assert row["total"] == pytest.approx(seconds)
        assert row["saved"] == pytest.approx(1 - seconds / total)
    assert len(found["runs"]["read full prefill"]) == found["turns"] == 2
    assert found["model"]["parameters"] > 1e6
    assert all(line in " ".join(shown.split()) for line in found["advice"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "fastv"], "has tokens leave inside the language model.*tokenprune eval"),
        (["--keep", "1.0"], "keeps every token, which is the unpruned model"),
        (["--keep", "0"], "keep"),
        (["--video", "a.mp4", "--images", "2"], "Give --video, or --image"),
        (["--frames", "4"], "Add --video FILE"),
        (["--new-tokens", "0"], "--new-tokens 0 is too small. Give at least 1."),
        (["--batch", "0"], "--batch 0 is too small"),
        (["--seconds", "0"], "--seconds 0 is too small"),
        (["--device", "nowhere"], "--device nowhere cannot be used here.*Give cpu"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--method", "no-such"], "no-such"),
        (["--option", "information.nothing=1"], "nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "bundled", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    text = " ".join(err.split())
    assert text.startswith("tokenprune advise: ")
    assert re.search(message, text), text


@pytest.mark.usefixtures("two_turns")
def test_a_video_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    with av.open(tmp_path / "v.mp4", "w") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 56
        for level in range(0, 240, 30):
            picture = np.full((56, 56, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    words = ["--video", str(tmp_path / "v.mp4"), "--frames", "4", "--keep", "0.5"]
    words += ["--new-tokens", "2", "--question", "w9"]
    assert main(["advise", str(checkpoints["qwen2_5_vl"]), *words]) == 0
    shown = capsys.readouterr().out
    assert "a video of 4 frames, 56x56" in shown
    assert "relevant-information" in shown


def test_json_holds_what_is_shown() -> None:
    found = Measured(parts(noise=None), 0.5, 1, False, ["left"], {"encode": [1.0]})
    about = About({"name": "m"}, {}, {}, {"batch": 1}, 2)
    costs = Costs(found.parts)
    content = json.loads(as_json(about, found, costs, None, {}))
    assert content["kv_cache"] is None
    assert content["reasons"] == []
    assert content["can_pay"] is True
    assert content["contradicts_itself"] is False
    assert [budget["keep"] for budget in content["parts"]["budgets"]] == [0.5, 0.1]
    assert content["rows"][1]["at_most"] == pytest.approx(costs.rows[1].at_most)
