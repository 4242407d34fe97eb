"""FlexSelect's parts that know no engine: sets, shares, reductions, set prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import tokenprune
from tokenprune import VisualTokens
from tokenprune.errors import (
    BudgetError,
    OptionError,
    PromptError,
    TokensError,
    UnsupportedModelError,
)
from tokenprune.families.registry import attending_layers, reference_layer
from tokenprune.question.attention import QueryKeys, Reduction, question_scores
from tokenprune.question.prompt import ItemPrompt, positions_on_axes
from tokenprune.question.reader import PromptReader, SetPrompts
from tokenprune.selectors.frame_sets import frame_sets, shares


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(attention: Tensor, grid: tuple[int, int, int], per_set: int, keep: int) -> list[int]:
    """Rank a video's tokens as the released code does it, in loops."""
    frames, rows, columns = grid
    count = math.ceil(frames / per_set)
    kept: set[int] = set()
    for number in range(count):
        tokens = [
            frame * rows * columns + cell
            for frame in range(number, frames, count)
            for cell in range(rows * columns)
        ]
        ranks = {token: float(attention[:, :, token].max()) for token in tokens}
        budget = keep // count + (number < keep % count)
        kept |= set(sorted(tokens, key=lambda token: (-ranks[token], token))[:budget])
    return sorted(kept)


@pytest.mark.parametrize(("frames", "per_set"), [(1, 64), (7, 3), (8, 4), (65, 64), (130, 64)])
def test_the_released_code_in_loops(frames: int, per_set: int) -> None:
    grid = (frames, 2, 3)
    attention = noise(4, 5, frames * 6).softmax(dim=-1)
    for keep in (3, frames * 2, frames * 3):
        selection = tokenprune.select(
            VisualTokens(grid, query_attention=attention),
            "flexselect",
            keep,
            frames_per_set=per_set,
        )
        assert selection.kept.tolist() == by_hand(attention, grid, per_set, keep)


def test_the_mean() -> None:
    attention = noise(4, 5, 30).softmax(dim=-1)
    tokens = VisualTokens((1, 5, 6), query_attention=attention)
    selection = tokenprune.select(tokens, "flexselect", 7, reduction="mean")
    assert selection.scores is not None
    torch.testing.assert_close(selection.scores, attention.mean(dim=(0, 1)))


@pytest.mark.parametrize("frames", [1, 2, 63, 64, 65, 128, 129, 512])
def test_sets_are_strided_and_together_everything(frames: int) -> None:
    sets = frame_sets((frames, 1, 2), 64)
    assert len(sets) == math.ceil(frames / 64)
    assert max(map(len, sets)) <= 128
    assert sorted(itertools.chain(*(own.tolist() for own in sets))) == list(range(2 * frames))
    for own in sets:  # each spans the whole video
        steps = torch.unique(own // 2).diff().unique().tolist()
        assert steps in ([], [len(sets)])


@pytest.mark.parametrize(
    ("keep", "sizes", "expected"),
    [
        (10, [20, 20, 20], [4, 3, 3]),
        (2, [5, 5, 5], [1, 1, 0]),
        (60, [20, 20, 20], [20, 20, 20]),
        (50, [33, 10, 32], [20, 10, 20]),  # what the second cannot hold goes to the others
        (74, [33, 10, 32], [32, 10, 32]),
    ],
)
def test_shares(keep: int, sizes: list[int], expected: list[int]) -> None:
    assert shares(keep, sizes) == expected


def test_shares_always_add_up() -> None:
    for keep in range(1, 40):
        found = shares(keep, [13, 13, 13])
        assert sum(found) == keep
        assert max(found) - min(found) <= 1


@dataclass
class Reader:
    """Made-up q and k for each token; remembers what was asked."""

    key: Tensor
    query: Tensor
    values: Tensor
    states: Tensor
    asked: list[int] = field(default_factory=list)

    def read(
        self,
        sets: Sequence[Tensor],
        layer: int | None,
        *,
        values: bool,
        hidden: bool,
        among: Sequence[Tensor] | None = None,
    ) -> list[QueryKeys]:
        assert among is None
        self.asked.append(len(sets))
        text = self.query.shape[1]
        return [
            QueryKeys(
                query=self.query,
                # two tokens in front, the set, the question itself
                key=torch.cat([self.key[:, :2], self.key[:, own + 2], self.key[:, -text:]], dim=1),
                visual=torch.arange(2, 2 + len(own)),
                scale=0.5,
                value_norm=self.values[:, own].abs().sum(-1) if values else None,
                hidden=self.states[own] if hidden else None,
            )
            for own in sets
        ]


def reader(tokens: int, heads: int = 4, groups: int = 2, text: int = 3) -> Reader:
    return Reader(
        key=noise(groups, 2 + tokens + text, 8, seed=1),
        query=noise(heads, text, 8, seed=2),
        values=noise(groups, tokens, 8, seed=3),
        states=noise(tokens, 16, seed=4),
    )


def attention_by_hand(made: Reader, tokens: Sequence[int]) -> Tensor:
    """Softmax rows [H, Q, n] of one set, one query at a time."""
    heads, text, _ = made.query.shape
    columns = [0, 1, *[2 + token for token in tokens]]
    per_group = heads // made.key.shape[0]
    rows = torch.zeros(heads, text, len(tokens))
    for head in range(heads):
        key = made.key[head // per_group]
        for number in range(text):
            seen = [*columns, *range(key.shape[0] - text, key.shape[0] - text + number + 1)]
            logits = torch.stack([made.query[head, number] @ key[c] * 0.5 for c in seen])
            rows[head, number] = logits.softmax(0)[2 : 2 + len(tokens)]
    return rows


def test_scores_of_a_reader() -> None:
    made = reader(12)
    tokens = VisualTokens((6, 1, 2), query_attention=made)
    selection = tokenprune.select(
        tokens, "flexselect", 5, frames_per_set=2, sets_per_pass=2, weigh_values=True
    )
    assert made.asked == [2, 1]  # three sets, two at a time
    norms = made.values.abs().sum(-1)
    assert selection.scores is not None
    for number in range(3):
        own = [2 * number, 2 * number + 1, 2 * number + 6, 2 * number + 7]
        attention = attention_by_hand(made, own)
        weighed = torch.stack([attention[head] * norms[head // 2, own] for head in range(4)])
        torch.testing.assert_close(selection.scores[own], weighed.amax((0, 1)))


def test_questions_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = reader(10, text=7)
    (seen,) = made.read([torch.arange(10)], None, values=False, hidden=False)
    for reduction in get_args(Reduction):
        whole = question_scores(seen, reduction)
        monkeypatch.setattr("tokenprune.question.attention._LOGITS_AT_ONCE", 1)
        torch.testing.assert_close(question_scores(seen, reduction), whole)
        monkeypatch.undo()


def test_sinks_come_last() -> None:
    made = reader(8)
    made.states = noise(8, 900, seed=9)
    made.states[2, 700] = 5000.0
    made.key[:, 2 + 2] = made.query[0, 0] * 10  # what everybody looks at
    tokens = VisualTokens((1, 2, 4), query_attention=made)
    assert 2 in tokenprune.select(tokens, "flexselect", 1).kept
    options: dict[str, Any] = {"drop_sinks": True}
    assert 2 not in tokenprune.select(tokens, "flexselect", 7, **options).kept
    assert 2 in tokenprune.select(tokens, "flexselect", 7, sink_dimensions="3,4", **options).kept
    assert len(tokenprune.select(tokens, "flexselect", 8, **options).kept) == 8
    with pytest.raises(OptionError, match="do not have"):
        tokenprune.select(tokens, "flexselect", 7, sink_dimensions="900", **options)


def test_scores_that_are_not_finite_name_the_item() -> None:
    made = reader(8)
    made.key[:, 3] = float("nan")
    with pytest.raises(TokensError, match="video 3: the scores of method 'flexselect'"):
        tokenprune.select(
            VisualTokens((1, 2, 4), query_attention=made, label="video 3"), "flexselect", 2
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": -1}, "counts from 0"),
        ({"layer": 1.5}, "layer=1.5"),
        ({"frames_per_set": 0}, "at least 1"),
        ({"sets_per_pass": 0}, "at least 1"),
        ({"reduction": "median"}, "reduction='median'"),
        ({"sink_dimensions": "12,x"}, "numbers with commas"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tokenprune.select(
            VisualTokens((1, 1, 2), query_attention=torch.ones(1, 1, 2)), "flexselect", 1, **options
        )


def test_values_are_needed_to_weigh_them() -> None:
    tokens = VisualTokens((1, 1, 2), query_attention=torch.ones(1, 1, 2))
    with pytest.raises(TokensError, match="pass a reader"):
        tokenprune.select(tokens, "flexselect", 1, weigh_values=True)


def test_reference_layers() -> None:
    assert reference_layer("llava_onevision", 28, 3584) == 19
    assert reference_layer("qwen2_5_vl", 28, 3584) == 20
    assert reference_layer("internvl", 32, 4096) == 15
    assert reference_layer("internvl", 4, 256) == 2
    assert reference_layer("qwen2_5_vl", 28, 3584, 7) == 7
    assert reference_layer("llava", 1, 8) == 0
    with pytest.raises(UnsupportedModelError, match="0 to 27"):
        reference_layer("qwen2_5_vl", 28, 3584, 28)


def test_the_reference_layer_attends() -> None:
    linear = SimpleNamespace(
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"]
        * 8,
        num_hidden_layers=32,
    )
    attending = attending_layers(linear)
    assert attending == [3, 7, 11, 15, 19, 23, 27, 31]
    assert attending_layers(SimpleNamespace(num_hidden_layers=3)) == [0, 1, 2]
    windows = ["sliding_attention", "full_attention"]
    assert attending_layers(SimpleNamespace(num_hidden_layers=2, layer_types=windows)) == [0, 1]
    assert reference_layer("qwen3_5", 32, 4096, None, attending) == 23  # 22 does not
    assert reference_layer("qwen3_5", 32, 4096, 7, attending) == 7
    assert reference_layer("qwen3_5", 10, 4096, None, [6, 8]) == 8  # as near as 6, and later
    with pytest.raises(UnsupportedModelError, match=r"layer=8 .* does not attend .* 3, 7, 11"):
        reference_layer("qwen3_5", 32, 4096, 8, attending)
    with pytest.raises(UnsupportedModelError, match="none of the 2 layers"):
        reference_layer("qwen3_5", 2, 4096, None, [])


def test_published_budgets() -> None:
    assert tokenprune.budget.tokens_kept("llava-video-7b", 107_520) == 6720
    assert tokenprune.budget.tokens_kept("llava-video-7b", 100) == 100
    with pytest.raises(BudgetError, match=r"Did you mean 'qwen2\.5-vl-7b'"):
        tokenprune.budget.check_keep("qwen2-5-vl-7b")


# Set prompts ------------------------------------------------------------------------------------

# a b | l V V l V V n | c d        a frame has two tokens; l is a label, n a newline of the encoder
IDS = [10, 11, 20, 0, 0, 21, 0, 0, 1, 30, 31]


def item_prompt(after: bool = True) -> ItemPrompt:
    text = [0, 1, 2, 5, *([9, 10] if after else [])]
    return ItemPrompt(
        torch.tensor(IDS),
        torch.tensor(text),
        torch.tensor([3, 4, 6, 7]),
        torch.tensor([8]),
        (2, 1, 2),
        "video 0",
    )


def test_labels_come_with_their_frame() -> None:
    prompt = item_prompt()
    assert prompt.question.tolist() == [30, 31]
    whole = prompt.of_set(torch.arange(4))
    assert whole.ids.tolist() == IDS
    assert whole.visual.tolist() == [3, 4, 6, 7, 8]
    assert whole.sources.tolist() == [0, 1, 2, 3, 4]
    assert whole.asked.tolist() == [3, 4, 6, 7]
    second = prompt.of_set(torch.tensor([2, 3]))
    assert second.ids.tolist() == [10, 11, 20, 21, 0, 0, 1, 30, 31]
    assert second.sources.tolist() == [2, 3, 4]
    assert second.asked.tolist() == [4, 5]
    assert second.questions == 2
    first = prompt.of_set(torch.tensor([0, 1]))
    assert first.ids.tolist() == [10, 11, 20, 0, 0, 1, 30, 31]


@dataclass
class Layers:
    """First layers that remember what they are run on; ids embed to themselves."""

    ran: list[SetPrompts] = field(default_factory=list)

    def reference_layer(self, asked: int | None) -> int:
        return asked or 0

    def embed(self, ids: Tensor) -> Tensor:
        return ids[..., None].float()

    def run(
        self, prompts: SetPrompts, layers: Sequence[int], values: bool, hidden: bool
    ) -> list[dict[int, QueryKeys]]:
        self.ran.append(prompts)
        nothing = torch.zeros(1, 1, 1)
        return [{layers[0]: QueryKeys(nothing, nothing, one, 1.0)} for one in prompts.asked]


@pytest.mark.parametrize("interval", [None, 2])
def test_tokens_that_are_read_keep_their_positions(interval: int | None) -> None:
    layers = Layers()
    rows = torch.arange(100.0, 105.0)[:, None]  # of the item's four tokens, then the newline's
    made = PromptReader(layers, item_prompt(), rows, [-rows], (2, 1, 2), interval)
    options: dict[str, Any] = {"values": False, "hidden": False}
    every = torch.arange(4)
    made.read([every], None, **options)
    made.read([every], None, **options, among=[torch.tensor([1, 2])])
    made.read([every], None, **options, among=[every])
    whole, some, again = layers.ran
    left = [0, 1, 2, 4, 5, 6, 8, 9, 10]  # without the first and the last token of the item
    assert some.states.flatten().tolist() == [10, 11, 20, 101, 21, 102, 104, 30, 31]
    assert some.states.equal(whole.states[:, left])
    assert some.positions.equal(whole.positions[..., left])
    assert some.is_visual.equal(whole.is_visual[:, left])
    assert some.deeper[0].flatten().tolist() == [-101, -102, -104]
    assert some.asked[0].tolist() == [3, 5]
    assert some.questions == 2
    assert (whole.gaps, some.gaps, again.gaps) == (False, True, False)
    assert again.positions.equal(whole.positions)


def test_no_text_behind() -> None:
    with pytest.raises(PromptError, match="video 0: no text comes after it"):
        item_prompt(after=False)


def test_positions_on_axes() -> None:
    is_visual = torch.tensor([False, False, *[True] * 8, False, *[True] * 4, False])
    found = positions_on_axes(is_visual, (3, 2, 2), interval=2).tolist()
    assert found == [
        [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 5, 6, 6, 6, 6, 8],
        [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 5, 6, 6, 7, 7, 8],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 5, 6, 7, 6, 7, 8],
    ]
