"""Every type of model of transformers, pruned without a family, against a calculation by hand.

The calculation takes the kept rows out of what the model's own encoder returned, and their columns
out of the prompt and of the positions of the unpruned prompt, and reads all of it again for each
new token. Which rows stay it asks `tokenprune.select` of each image by itself.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokenprune
import tokenprune_hf
from tests.every_model import ONE_OF_EACH_KIND
from tests.hf import types
from tests.hf.media import noise
from tests.hf.models import IMAGE, VIDEO
from tests.hf.small_configs import NOT_TO_SAY, small_config
from tests.hf.type_table import (
    CACHE_FAULTS,
    GEMMA4_TOWER,
    OWN_FAULTS,
    TIMM,
    TYPES,
    VIDEO_FAULTS,
    VIDEOS,
)
from tests.hf.types import ARCHITECTURES
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import FAMILIES
from tokenprune_hf import any_model
from tokenprune_hf.engine import cache_argument, cache_of

STEPS = 3
METHOD = "divprune"
"""It looks at embeddings alone, whatever their grid."""
TOKENS = {"image": IMAGE, "video": VIDEO}
SIDES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


@pytest.fixture(autouse=True)
def no_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that have a family of their own are pruned without it here."""
    monkeypatch.setattr(any_model, "supported_models", dict)


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> None:
    """Transformers itself calls some types in a deprecated way, which is no concern here."""


@contextmanager
def reading_at(model: Any, places: Tensor) -> Iterator[None]:
    """Have the decoder read its tokens at these positions, whatever it is told."""

    def put(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": places}

    hook = model.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def positions_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the positions at which the decoder reads the unpruned prompt, [..., 1, L]."""
    seen: list[Tensor | None] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    return torch.arange(length)[None] if seen[0] is None else seen[0]


def structure_of(kind: str, model: Any, images: list[int]) -> list[int]:
    """Return which of the rows of some images are structure."""
    own, start, found = TYPES[kind], 0, []
    for number in images:
        found += [start + row for row in own.structure(number)]
        start += sum(map(len, types.encoded(model, own.media(model.config, [[number]]))[1]))
    return found


def kept_rows(
    kind: str, model: Any, inputs: dict[str, Any], structural: list[int], modality: str = "image"
) -> Tensor:
    """Return BoolTensor [R]: structure, and that half of each entry's other rows that is kept."""
    own = TYPES[kind]
    _, entries = types.encoded(model, inputs, modality)
    rows = torch.cat(entries)
    inner = getattr(model, "model", model)
    read = rows if own.projector is None else getattr(inner, own.projector)(rows)
    counts = [len(entry) for entry in entries]
    if set(counts) == {1}:
        # The encoder does not say which rows are an image's, the prompt does.
        is_image = (inputs["input_ids"][0] == IMAGE).tolist()
        counts = [len(list(run)) for one, run in itertools.groupby(is_image) if one]
    structure = torch.zeros(len(rows), dtype=torch.bool)
    structure[structural] = True
    kept = structure.clone()
    start = 0
    for count in counts:
        pixels = [row for row in range(start, start + count) if not structure[row]]
        tokens = tokenprune.VisualTokens((1, 1, len(pixels)), embeddings=read[pixels].detach())
        chosen = tokenprune.select(tokens, method=METHOD, keep=0.5).kept.tolist()
        kept[[pixels[index] for index in chosen]] = True
        start += count
    return kept


def cut(value: Any, keep: Tensor) -> Any:
    """Return what holds the encoder's rows with some of them, as a forward takes it."""
    rows = torch.cat(types.entries(value))[keep]
    return rows[None] if isinstance(value, Tensor) else [rows]


def short_output(output: Any, keep: Tensor) -> Any:
    """Return the encoder's output with some rows alone."""
    short = copy.copy(output)
    deep = getattr(output, "deepstack_features", None)
    if getattr(output, "pooler_output", None) is not None:
        short.pooler_output = cut(output.pooler_output, keep)
        if deep is not None:
            short.deepstack_features = [cut(layer, keep) for layer in deep]
    elif deep is not None:
        short.deepstack_features = [(number, cut(layer, keep)) for number, layer in deep]
    else:
        short.last_hidden_state = cut(output.last_hidden_state, keep)
    return short


def by_hand(
    kind: str, model: Any, inputs: dict[str, Any], keep: dict[str, Tensor], positions: str
) -> tuple[Tensor, list[int]]:
    """Return the short prompt's logits [S, V] and the next tokens."""
    ids = inputs["input_ids"]
    column = torch.ones(ids.shape[1], dtype=torch.bool)
    for modality, rows in keep.items():
        column[ids[0] == TOKENS[modality]] = rows
    places = positions_of(model, inputs)
    if positions == "compact":
        places = torch.arange(int(column.sum())).expand(*places.shape[:-1], -1)
    following = places[..., -1:] + 1
    ids, places = ids[:, column], places if positions == "compact" else places[..., column]
    kinds = {name: inputs[name][:, column] for name in SIDES if name in inputs}
    outputs = {
        modality: short_output(types.encoded(model, inputs, modality)[0], rows)
        for modality, rows in keep.items()
    }
    first, said = None, []
    for _ in range(STEPS):
        with torch.no_grad(), reading_at(model, places):
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=places,
                mm_encoder_outputs={name: copy.copy(output) for name, output in outputs.items()},
                use_cache=False,
                **kinds,
            ).logits[0]
        first = logits if first is None else first
        said.append(likeliest(logits[-1]))
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], dim=1)
        places = torch.cat([places, following], dim=-1)
        following = following + 1
        new = int(TYPES[kind].prefix)
        kinds = {n: torch.cat([v, torch.full_like(v[:, :1], new)], dim=1) for n, v in kinds.items()}
    assert first is not None
    return first, said


def likeliest(logits: Tensor) -> int:
    """Return the likeliest token of those that `generate` may say."""
    logits = logits.clone()
    logits[NOT_TO_SAY] = -torch.inf
    return int(logits.argmax())


def generated(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Return the new tokens of each prompt."""
    length = inputs["input_ids"].shape[1]
    how = {"max_new_tokens": STEPS, "do_sample": False}
    found: list[list[int]] = model.generate(**inputs, **how)[:, length:].tolist()
    return found


def read(model: Any, inputs: dict[str, Any], output: Any, places: Tensor) -> Tensor:
    """Return the logits [L, V] of a prompt whose images are these rows, at these places."""
    text = {
        name: inputs[name] for name in ("input_ids", "attention_mask", *SIDES) if name in inputs
    }
    rows = {"image": copy.copy(output)}
    with torch.no_grad(), reading_at(model, places):
        logits: Tensor = model(
            **text, position_ids=places, mm_encoder_outputs=rows, use_cache=False
        ).logits[0]
    return logits


def kind_of_positions(kind: str, model: Any, inputs: dict[str, Any]) -> str:
    """Return in words how the decoder's positions of a prompt are counted."""
    if TYPES[kind].positions == "compact":
        return "compact alone"
    positions = positions_of(model, inputs)
    output, _ = types.encoded(model, inputs)
    if torch.allclose(
        read(model, inputs, output, positions), read(model, inputs, output, 2 * positions)
    ):
        return "not read"
    if positions.ndim == 3:
        return f"{len(positions)} axes"
    return f"1 axis, from {int(positions.min())}"


def attention_of(kind: str, model: Any, inputs: dict[str, Any]) -> str:
    """Return in words what layers do but attend to every token before."""
    text = model.config.get_text_config()
    named = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    plain = {"full_attention", "attention", "mlp", "moe"}
    found = sorted({name.replace("_", " ") for name in named if name not in plain})
    # Whether the first token of an image changes with the last one.
    output, entries = types.encoded(model, inputs)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    length = sum(map(len, types.encoded(model, TYPES[kind].media(model.config, [[0]]))[1]))
    order = torch.arange(sum(map(len, entries)))
    order[length - 1] = length // 2
    places = positions_of(model, inputs)
    changed = read(model, inputs, short_output(output, order), places)
    if not torch.allclose(changed[first], read(model, inputs, output, places)[first], atol=1e-6):
        found.append("images seen both ways")
    return ", ".join(found)


def every_type(
    faults: Collection[tuple[str, str]] = (), only: Collection[str] = TYPES
) -> list[Any]:
    """Return the types that are here, see `marked`.

    Parameters
    ----------
    faults
        Types and releases of transformers in which the engine itself fails.
    only
        Which types.
    """
    kinds = [
        kind
        for kind in types.present()
        if kind in only and (kind, transformers.__version__) not in faults
    ]
    return marked(kinds)


def marked(kinds: list[str]) -> list[Any]:
    """Return types, of which those that show nothing new are run with all others alone."""
    mark = pytest.mark.every_model
    return [kind if kind in ONE_OF_EACH_KIND else pytest.param(kind, marks=mark) for kind in kinds]


@pytest.mark.parametrize("kind", every_type())
def test_a_pruned_prompt_is_read_as_calculated_by_hand(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    positions = TYPES[kind].positions
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0, 1]])
    record_property("transformers", kind)
    record_property("release", transformers.__version__)
    record_property("positions", kind_of_positions(kind, model, inputs))
    record_property("attention", attention_of(kind, model, inputs))
    if TYPES[kind].structure(0):
        record_property("stays", "newlines or separators stay")
    with torch.no_grad():
        plain = model(**inputs).logits
    said_plain = generated(model, inputs)
    keep = kept_rows(kind, model, inputs, structure_of(kind, model, [0, 1]))
    expected, said = by_hand(kind, model, inputs, {"image": keep}, positions)
    with tokenprune_hf.prune(model, METHOD, 0.5, positions):
        with torch.no_grad():
            pruned = model(**inputs).logits[0]
        assert generated(model, inputs) == [said]
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pruned[-1], plain[0, -1], atol=1e-3)
    if TYPES[kind].hides:
        mask = torch.ones_like(inputs["input_ids"])
        mask[inputs["input_ids"] == IMAGE] = keep.long()
        places = positions_of(model, inputs)
        with torch.no_grad(), reading_at(model, places):
            hidden = model(**{**inputs, "attention_mask": mask, "position_ids": places}).logits[
                0, -1
            ]
        torch.testing.assert_close(pruned[-1], hidden, rtol=1e-3, atol=1e-4)
    # With all tokens, and outside the block, the model is the plain one.
    with tokenprune_hf.prune(model, "uniform", 1.0, positions), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-5)
        assert generated(model, inputs) == said_plain
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain)


@pytest.mark.parametrize("kind", every_type(only=[k for k in TYPES if TYPES[k].batched]))
def test_a_batch_is_its_prompts(kind: str) -> None:
    model = types.model_of(kind)
    positions = TYPES[kind].positions
    prompts = [[0], [1, 2]]
    with tokenprune_hf.prune(model, METHOD, 0.5, positions) as pruning:
        together = generated(model, types.prompts_of(kind, model, prompts))
        of_batch = [selection.kept.tolist() for selection in pruning.selections]
        apart, of_each = [], []
        for prompt in prompts:
            apart += generated(model, types.prompts_of(kind, model, [prompt]))
            of_each += [selection.kept.tolist() for selection in pruning.selections]
    assert of_batch == of_each
    assert together == apart


@pytest.mark.parametrize("kind", every_type(VIDEO_FAULTS, only=VIDEOS))
def test_a_video_and_an_image_are_read_as_calculated_by_hand(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    model = types.model_of(kind)
    positions = TYPES[kind].positions
    inputs = types.video_prompt(kind, model)
    record_property("transformers", kind)
    record_property("release", transformers.__version__)
    record_property("videos", "yes")
    image = kept_rows(kind, model, inputs, TYPES[kind].structure(1))
    video = kept_rows(kind, model, inputs, list(VIDEOS[kind].structure), "video")
    expected, said = by_hand(kind, model, inputs, {"image": image, "video": video}, positions)
    with tokenprune_hf.prune(model, METHOD, 0.5, positions) as pruning:
        with torch.no_grad():
            pruned = model(**inputs).logits[0]
        assert generated(model, inputs) == [said]
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)
    assert len(pruning.selections) == 2


@pytest.mark.parametrize("kind", every_type(CACHE_FAULTS))
def test_going_on_from_the_cache_is_reading_all_again(kind: str) -> None:
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    media = TYPES[kind].media(model.config, [[0]])
    how = {"do_sample": False, "return_dict_in_generate": True}
    with tokenprune_hf.prune(model, METHOD, 0.5, TYPES[kind].positions):
        first = model.generate(**inputs, max_new_tokens=2, **how)
        more = torch.cat([first.sequences, torch.tensor([[33, 34, 35]])], dim=1)
        added = more.shape[1] - inputs["input_ids"].shape[1]
        longer = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        new = int(TYPES[kind].prefix)
        longer |= {
            name: torch.nn.functional.pad(inputs[name], (0, added), value=new)
            for name in SIDES
            if name in inputs
        }
        again = model.generate(**longer, **media, max_new_tokens=STEPS, **how)
        cache = cache_argument(model, cache_of(first))
        going_on = model.generate(**longer, **cache, max_new_tokens=STEPS, **how)
    assert going_on.sequences.tolist() == again.sequences.tolist()


ROW_BY_ROW = {"paddleocr_vl"}
"""Types whose processor puts patches row by row, and not those of a token one after another."""


def gridded() -> list[str]:
    """Return the types whose inputs and config tell how the rows of an image lie."""
    return [
        kind
        for kind in types.present()
        if "spatial_merge_size"
        in small_config(kind, TYPES[kind].over).to_dict().get("vision_config", {})
        and "image_grid_thw" in TYPES[kind].media(types.model_of(kind).config, [[0]])
    ]


@pytest.mark.parametrize("kind", every_type(only=gridded()))
def test_a_grid_that_is_told_is_where_pixels_are(kind: str) -> None:
    """Where a picture changes in one place, the row of that place changes most."""
    model = types.model_of(kind)
    own = TYPES[kind]
    inputs = types.prompts_of(kind, model, [[0]])
    with tokenprune_hf.prune(model, "uniform", 0.5, own.positions) as pruning, torch.no_grad():
        model(**inputs)
    (selection,) = pruning.selections
    merged = (
        int(inputs["image_grid_thw"].prod()) // model.config.vision_config.spatial_merge_size**2
    )
    if own.structure(0) or merged != selection.total:  # other rows than the grid's
        assert not selection.is_picture
        return
    assert selection.is_picture
    assert selection.grid == (1, 2, 3)
    before = torch.cat(types.encoded(model, inputs)[1])
    most = []
    for cell in range(6):
        pixels = inputs["pixel_values"].clone()
        if kind in ROW_BY_ROW:
            row, column = 2 * (cell // 3), 2 * (cell % 3)
            pixels.view(4, 6, -1)[row : row + 2, column : column + 2] *= -1
        else:
            pixels.view(6, -1)[cell] *= -1
        after = torch.cat(types.encoded(model, {**inputs, "pixel_values": pixels})[1])
        most.append(int((after - before).abs().sum(dim=1).argmax()))
    assert most == [*range(6)]


@pytest.mark.parametrize("kind", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_audio_in_the_prompt_is_untouched(kind: str) -> None:
    """Against the plain model, from which the same tokens of the image are hidden."""
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    mels = model.config.audio_config.num_mel_bins
    audio = {
        "input_features": noise(3, 1, mels, 40),
        "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
    }
    with torch.no_grad():
        heard = model.get_audio_features(**audio, return_dict=True).last_hidden_state
    token, start = model.config.audio_token_id, model.config.audio_start_token_id
    end = getattr(model.config, "audio_end_token_id", None) or token + 1
    ids = inputs["input_ids"][0].tolist()
    ids = [*ids[:3], start, *[token] * len(heard), end, *ids[3:]]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= audio
    with tokenprune_hf.prune(model, METHOD, keep=0.5) as pruning:
        with torch.no_grad():
            pruned = model(**inputs).logits[0, -1]
        (selection,) = pruning.selections
        said = generated(model, inputs)
        again = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=False)
    assert len(selection.kept) == 3
    mask = inputs["attention_mask"].clone()
    mask[inputs["input_ids"] == IMAGE] = selection.mask.long()
    places = positions_of(model, inputs)
    with torch.no_grad(), reading_at(model, places):
        how = {"attention_mask": mask, "position_ids": places}
        hidden = model(**{**inputs, **how}).logits[0, -1]
        silent = {**inputs, **how, "input_features": 0 * audio["input_features"]}
        assert not torch.allclose(model(**silent).logits[0, -1], hidden, atol=1e-3)
    torch.testing.assert_close(pruned, hidden, rtol=1e-3, atol=1e-4)
    assert said[0][0] == likeliest(hidden)
    assert again[:, len(ids) :].tolist() == said


ELSEWHERE = {"mllama", *TIMM, *(kind for kind, _ in OWN_FAULTS)}
"""Types that are tested in another file, or cannot be run here."""


def config_of(kind: str) -> Any:
    """Return a config of a type, of its usual size where it has one."""
    if kind == "vision-encoder-decoder":
        configs = transformers.ViTConfig(), transformers.BertConfig()
        return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    if kind == "diffusion_gemma":
        experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
        tower = {"model_type": "gemma4_vision", **GEMMA4_TOWER}
        return small_config(kind, {"text_config": experts, "vision_config": tower})
    if kind == "qwen3_omni_moe":
        talker = {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}}
        return small_config(kind, {"talker_config": talker})
    return CONFIG_MAPPING[kind]()


def other_types() -> list[str]:
    """Return the types of models of images and text that cannot be handed rows, or not so."""
    kinds = {config.model_type for config in ARCHITECTURES}
    return sorted(kinds - set(types.present()) - FAMILIES.keys() - ELSEWHERE)


@pytest.mark.parametrize("kind", marked(other_types()))
def test_other_types_are_refused_with_the_reason(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    with torch.device("meta"):
        model = types.architecture_of(kind)(config_of(kind))
    with pytest.raises(UnsupportedModelError) as refused:
        tokenprune_hf.prune(model, "uniform", keep=0.5)
    message = str(refused.value)
    reason = re.search(r"cannot be pruned: (.+?)\. Supported:|is no .+ with `generate`", message)
    assert reason is not None, message
    record_property("transformers", kind)
    record_property("release", transformers.__version__)
    record_property("refused", reason[1] or "it has no `generate`")


@pytest.mark.parametrize(("kind", "release"), OWN_FAULTS)
def test_types_that_transformers_itself_cannot_run(
    kind: str, release: str, record_property: Callable[[str, object], None]
) -> None:
    """What a release cannot run is no fault of pruning, and others run it."""
    model = types.model_of(kind)
    inputs = types.prompts_of(kind, model, [[0]])
    if release != transformers.__version__:
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        return
    with pytest.raises(AttributeError):
        model(**inputs)
    record_property("transformers", kind)
    record_property("release", release)
    record_property("fault", OWN_FAULTS[kind, release])
