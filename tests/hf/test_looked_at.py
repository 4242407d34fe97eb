"""What selectors look at beyond features and CLS attention, against full maps and plain q and k."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokenprune_hf
from tests.hf.by_hand import encode, full_attention_maps
from tests.hf.models import TINY, UNATTENDING, prompt
from tests.hf.test_families import scores_by_hand
from tokenprune import Merge, Picks, Selector, TokenBatch, VisualTokens
from tokenprune.errors import UnsupportedModelError
from tokenprune.question.prompt import Marks
from tokenprune_hf.vision import vision_model

NEEDS = ("received_attention", "middle_attention", "wide_attention", "keys", "embeddings")
ATTENDING = [name for name in TINY if name not in UNATTENDING and TINY[name].image is not None]
WITH_CLS = (
    *("llava", "llava_next", "llava_next_video", "video_llava"),
    *("internvl", "perception_lm", "llama4"),
)


def looked_at(model: Any, inputs: dict[str, Any]) -> list[VisualTokens]:
    encoded = tokenprune_hf.encode(model, needs=NEEDS, **inputs)
    return [item.tokens for item in encoded.modalities["image"].items]


@pytest.mark.parametrize("name", ATTENDING)
def test_every_family_has_them_for_every_token(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    items = looked_at(model, inputs)
    for tokens in items:
        for attention in (tokens.received_attention, tokens.middle_attention):
            assert attention is not None
            assert attention.shape[-1] == tokens.total
            assert bool((attention > 0).all())
        assert tokens.wide_attention is not None
        assert tokens.wide_attention.shape == (tokens.total,)
        assert tokens.keys is not None
        assert tokens.keys.shape[:2] == (len(tokens.received_attention), tokens.total)  # type: ignore[arg-type]
    if name not in (*WITH_CLS, "llava_onevision"):  # whose second image is resampled
        # Without a CLS token the scoring layer's attention is what each token receives.
        found = [tokens.received_attention.mean(dim=0) for tokens in items]  # type: ignore[union-attr]
        torch.testing.assert_close(found, scores_by_hand(name, model, inputs))


@pytest.mark.parametrize("name", ["llava", "video_llava"])
def test_a_tower_with_a_cls_token_equals_its_full_maps(name: str) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    tower: Any = vision_model(model).tower("image")
    layers = tower.encoder.layers
    projected: list[Tensor] = []
    hooks = [
        getattr(layers[1].self_attn, f"{part}_proj").register_forward_hook(
            lambda _module, _args, output: projected.append(output)
        )
        for part in "qk"
    ]
    with torch.no_grad(), full_attention_maps(tower) as maps:
        encode(model, inputs, "image")
    for hook in hooks:
        hook.remove()
    query, key = projected
    logits = query[:, :1] @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    wide = logits.softmax(dim=-1)[:, 0, 1:]
    # The layer before the last is the feature's; 3/8 of three layers end in the second.
    for index, tokens in enumerate(looked_at(model, inputs)):
        of_image = maps[1][index, :, :, 1:].mean(dim=1)
        torch.testing.assert_close(tokens.received_attention, of_image)
        torch.testing.assert_close(tokens.middle_attention, of_image)
        torch.testing.assert_close(tokens.wide_attention, wide[index])
        heads = key[index, 1:].unflatten(-1, (4, -1)).transpose(0, 1)
        torch.testing.assert_close(tokens.keys, heads)


def test_the_middle_of_a_tower_is_where_hiprune_has_it() -> None:
    family = vision_model(TINY["llava"].model()).family
    family.config.vision_config.num_hidden_layers = 24
    assert family.middle_layer(has_cls=True) == 8  # the 9th
    windows = vision_model(TINY["qwen2_5_vl"].model()).family
    windows.config.vision_config.depth = 32
    windows.config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    assert windows.middle_layer(has_cls=False) == 15  # the 16th


# The question ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([60, 11, 12, 3, 13, 14], [11, 12]),  # a mark, words, the turn's end, the template
        ([11, 12, 3, 13, 3, 13, 15, 16, 3, 14], [13, 15, 16]),  # the last turn that is over
        ([11, 12, 13], [11, 12, 13]),  # templates whose marks are words
        ([60, 11], [11]),
        ([60, 3, 14], [60, 3, 14]),  # nothing is said
    ],
)
def test_the_question_ends_with_the_users_turn(ids: list[int], expected: list[int]) -> None:
    marks = Marks(ends=frozenset({3}), others=frozenset({60}))
    assert marks.users_text(torch.tensor(ids)).tolist() == expected


def test_question_embeddings_are_those_of_the_users_words() -> None:
    tiny = TINY["qwen2_5_vl"]
    model, inputs = tiny.model(), prompt(tiny, ["titt"])
    seen: list[Tensor] = []

    class Reads(Selector):
        name: ClassVar[str] = "reads"
        summary: ClassVar[str] = ""
        needs: ClassVar[tuple[str, ...]] = ("question_embeddings", "question")

        def select(self, tokens: TokenBatch, keep: int) -> Picks:
            seen.extend([tokens.require("question_embeddings")[0], tokens.require("question")[0]])
            return Picks(torch.arange(keep).expand(tokens.size, -1))

    after = inputs["input_ids"][0, -2:].tolist()
    model.generation_config.eos_token_id = [after[1]]
    with torch.no_grad(), tokenprune_hf.prune(model, Reads(), 5):
        model(**inputs)
    embedded, question = seen
    marks = {getattr(model.config, f"vision_{which}_token_id", None) for which in ("start", "end")}
    words = [one for one in question.tolist()[:-1] if one not in marks]
    assert after[1] not in words
    assert torch.equal(embedded, model.get_input_embeddings()(torch.tensor(words)))


# Merging -----------------------------------------------------------------------------------------


class Merges(Selector):
    """Keeps the first tokens, and adds to each second of them the two that stand at the end."""

    name: ClassVar[str] = "merges"
    summary: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("features", "embeddings", "projector")
    merges: ClassVar[Any] = "embeddings"

    def select(self, tokens: TokenBatch, keep: int) -> Picks:
        into = torch.arange(0, keep, 2).repeat_interleave(3)
        of = torch.stack([into, *(torch.full_like(into, tokens.total - n) for n in (1, 2))])
        entry = torch.arange(3).repeat(len(into) // 3)
        weights = torch.tensor([0.5, 0.3, 0.4])[entry]
        merge = Merge(into, of[entry, torch.arange(len(into))], weights, self.merges)
        return Picks(torch.arange(keep).expand(tokens.size, -1), merges=[merge] * tokens.size)


class MergesFeatures(Merges):
    merges: ClassVar[Any] = "features"


@pytest.mark.parametrize("apply", ["drop", "mask"])
@pytest.mark.parametrize("selector", [Merges(), MergesFeatures()])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
def test_merged_rows_are_read(name: str, selector: Selector, apply: Any) -> None:
    tiny = TINY[name]
    model, inputs = tiny.model(), prompt(tiny, ["titit"])
    with torch.no_grad():
        encoded = tokenprune_hf.encode(model, **inputs)
        with tokenprune_hf.prune(model, selector, 5, apply=apply):
            found = model(**inputs).logits[:, -1]
        media = encoded.modalities["image"]
        rows, deep = media.rows.clone(), [layer.clone() for layer in media.deepstack]
        for item in media.items:
            tokens: Any = item.tokens
            for token in (0, 2, 4):
                into = item.rows[token]

                def added(values: Tensor, token: int = token) -> Tensor:
                    return 0.5 * values[token] + 0.3 * values[-1] + 0.4 * values[-2]

                if selector.merges == "features":
                    rows[into] = tokens.projector(added(tokens.features)[None])[0]
                else:
                    rows[into] = added(media.rows[item.rows])
                for layer, before in zip(deep, media.deepstack, strict=True):
                    layer[into] = added(before[item.rows])
        object.__setattr__(media, "rows", rows)  # frozen, and the test's own
        object.__setattr__(media, "deepstack", deep)

        class Plain(Merges):
            name: ClassVar[str] = "plain"
            merges: ClassVar[Any] = ""

            def select(self, tokens: TokenBatch, keep: int) -> Picks:
                return Picks(torch.arange(keep).expand(tokens.size, -1))

        with tokenprune_hf.prune(model, Plain(), 5, apply=apply):
            expected = model(**inputs, encoded=encoded).logits[:, -1]
        plain = tokenprune_hf.encode(model, **inputs)
        with tokenprune_hf.prune(model, Plain(), 5, apply=apply):
            unmerged = model(**inputs, encoded=plain).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - unmerged).abs().max() > 1e-3


def test_nothing_is_merged_where_everything_stays() -> None:
    tiny = TINY["llava"]
    model, inputs = tiny.model(), prompt(tiny, ["tit"])
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        with tokenprune_hf.prune(model, Merges(), 1.0):
            found = model(**inputs).logits[:, -1]
    torch.testing.assert_close(found, expected)


def test_inputs_that_models_do_not_compute_are_refused() -> None:
    class Joint(Merges):
        name: ClassVar[str] = "joint"
        needs: ClassVar[tuple[str, ...]] = ("image_embeddings", "text_embeddings")

    with pytest.raises(UnsupportedModelError, match="image_embeddings, text_embeddings, which"):
        tokenprune_hf.prune(TINY["llava"].model(), Joint(), 5)
