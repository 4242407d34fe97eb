"""Architectures of no family on vLLM's real engine, against transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import save_file
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
from vllm.model_executor.models import registry
from vllm.v1.engine.exceptions import EngineDeadError

import tokenprune_vllm
from tests.vllm import checkpoints
from tests.vllm.checkpoints import LIKE, OTHERS, WORDS
from tests.vllm.engines import answer, greedy, kept
from tests.vllm.other_types import ONE_IMAGE, OTHER_TYPES
from tests.vllm.processes import in_a_process
from tests.vllm.test_families import Case, Pair, Reference, reference, start
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.registry import FAMILIES
from tokenprune_vllm.architectures import ARCHITECTURES

METHODS = ("divprune", "uniform", "random", "information")
_ALL = ("feature-norm", "cls-attention", "zeroth-order")
LOOKING = {
    **dict.fromkeys(("own_llava", "skywork_chat", "cosmos3_omni"), _ALL),
    # Of a class of transformers, q and k do not pass where vLLM's own towers have them.
    **dict.fromkeys(("lighton_ocr", "glmga"), ("feature-norm", "zeroth-order")),
}
"""Types with towers of known kinds (CLIP, InternViT, Qwen3-VL's, Pixtral's, GLM's) -> methods that
look at what has to be found in them: features, attention, projector."""
READERS = dict.fromkeys(
    ("own_llava", "cosmos3_omni", "ernie4_5_vl_moe"),
    ("flexselect", "relevant-information"),
)
"""Types read with the question; all but the first count positions on three axes."""
PLUGIN = Path(__file__).parent / "plugin"

NEWLINES = ("own_llava_next", "granite4_vision")
"""Types that have rows which are the same whatever the pixels are."""
FOUR_AXES = ("hunyuan_vl",)
SERVED = [name for name in OTHERS if name not in (*NEWLINES, *FOUR_AXES)]
PLUGINS = [name for name in SERVED if name.startswith("own_") or name == "vipllava"]
"""Served by an engine's own processes, as users serve models."""
NATIVE = [name for name in SERVED if name not in PLUGINS]


def cases(name: str) -> list[Case]:
    """Return requests whose media are all different, so that no cache knows them."""
    found = [
        Case("it", (0,), {"method": "divprune"}),
        Case("titi", (1, 2), {"method": "divprune", "keep": 0.3}),
        Case("tit", (5,), {"method": "uniform"}),
        Case("tit", (6,), {"method": "random", "keep": 11}),
        Case("titit", (15, 16), {"method": "information"}),
        Case("tit", (7,), {"off": True}),
        Case("tit", (8,), {"method": "divprune", "keep": 1.0}),
        Case("ttt", ()),
    ]
    looking = {
        "feature-norm": Case("tit", (17,), {"method": "feature-norm"}),
        "cls-attention": Case("titi", (18, 3), {"method": "cls-attention"}),
        "zeroth-order": Case("tit", (4,), {"method": "zeroth-order", "keep": 0.3}),
    }
    found += [looking[method] for method in LOOKING.get(name, ())]
    if name in READERS:
        found += [
            Case("titit", (11, 12), {"method": "flexselect", "keep": 7}),
            Case("tit", (14,), {"method": "relevant-information"}),
        ]
    if name == "paligemma":  # whose prompts have an image, and no other
        return [case for case in found if len(case.pictures) == 1]
    if name in ONE_IMAGE:
        return [case for case in found if len(case.pictures) < 2]
    if name == "own_vl":
        found += [
            Case("vt", (0,), {"method": "divprune"}),
            Case("tivtvt", (13, 10, 12), {"method": "information", "keep": 0.3}),
            Case("vt", (4,), {"off": True}),
        ]
    return found


@contextmanager
def plugin_installed() -> Iterator[None]:
    """Let Python find the plugin, here and in the engine's processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGIN))
        patch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
        yield


def in_transformers(name: str, folder: Path) -> Reference:
    """Load the model in transformers, where the plugin's types have the weights of known ones."""
    if name not in LIKE:
        return reference(name, folder)
    known = LIKE[name][0]
    hf = reference(known, checkpoints.save(known, folder.with_name("known")))
    hf.model.config.model_type = name
    if "internvl" in known:  # in transformers every tile is an item of its own
        hf.processor.image_processor.max_patches = 1
        hf.family = name
    return hf


def start_here(name: str, folder: Path, method: str, methods: Sequence[str], **options: Any) -> Any:
    """Start the engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    registry._run_in_subprocess = lambda function: function()
    # On a CPU vLLM hands the rotary embedding of ERNIE-4.5-VL an argument too many.
    rotary: Any = Ernie4_5_VLRotaryEmbedding
    rotary.forward_cpu = rotary.forward_cuda
    return start(
        name,
        folder,
        method,
        request_methods=methods,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 2, "video": 0, "audio": 0},
        max_model_len=512,
        num_gpu_blocks_override=64,  # sliding layers have blocks of their own
        **options,
    )


@pytest.fixture(scope="module", params=PLUGINS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name = request.param
    folder = checkpoints.save(name, tmp_path_factory.mktemp(name) / "model")
    methods = METHODS[1:] + READERS.get(name, ()) + LOOKING.get(name, ())
    with plugin_installed():
        videos = {"limit_mm_per_prompt": {"image": 2, "video": 2}} if name == "own_vl" else {}
        with start(name, folder, METHODS[0], request_methods=methods, **videos) as llm:
            yield Pair(name, llm, in_transformers(name, folder))


def architecture_in(folder: Path) -> str:
    """Return vLLM's name of a folder's model."""
    return str(json.loads((folder / "config.json").read_text())["architectures"][0])


def record(record_property: Callable[[str, object], None], architecture: str, **more: str) -> None:
    """Say what a test checks, for docs/models.md."""
    record_property("vllm", architecture)
    record_property("release", vllm.__version__)
    for name, value in more.items():
        record_property(name, value)


def test_the_same_tokens_are_kept_and_generated(
    pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    if pair.family == "vipllava":  # the others' names are made up
        record(record_property, "VipLlavaForConditionalGeneration")
    check(pair, answers_of(pair.hf, pair.family))


@pytest.mark.every_model
@pytest.mark.parametrize("name", NATIVE)
def test_architectures_of_vllm(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = checkpoints.save(name, tmp_path / "model")
    record(record_property, architecture_in(folder))
    in_a_process(serve_and_check, name, folder)


def serve_and_check(name: str, folder: Path) -> None:
    """Compare the two engines in this process."""
    FAMILIES.pop(name, None)  # vLLM has no class of its own for Aya Vision, whose family is known
    hf = in_transformers(name, folder)
    expected = answers_of(hf, name)  # before vLLM changes the model's class
    options = OTHER_TYPES[name].served_with if name in OTHER_TYPES else {}
    methods = METHODS[1:] + READERS.get(name, ()) + LOOKING.get(name, ())
    with start_here(name, folder, METHODS[0], methods, **options) as llm:
        check(Pair(name, llm, hf), expected)


Answers = list[tuple[Case, list[int], list[list[int]]]]


def answers_of(hf: Reference, name: str) -> Answers:
    """Return what transformers generates, and keeps, for each of `cases`."""
    return [(case, *hf.ask(case)) for case in cases(name)]


def check(pair: Pair, answers: Answers) -> None:
    """Compare the requests of `cases`, one after the other and together."""
    kept(pair.llm)
    expected = []
    for case, tokens, indices in answers:
        (answered,) = answer(pair.llm, [pair.request(case)], greedy(words=WORDS))
        chosen = [segment for item in kept(pair.llm) for segment in item]
        assert chosen == ([] if case.whole else indices), case
        assert answered == tokens, case
        expected.append(tokens)
    pair.llm.reset_prefix_cache()
    pair.llm.llm_engine.reset_encoder_cache()
    together = answer(
        pair.llm, [pair.request(case) for case in cases(pair.family)], greedy(words=WORDS)
    )
    assert together == expected


REMOTE = """
from transformers import VipLlavaConfig, VipLlavaModel


class RemoteConfig(VipLlavaConfig):
    model_type = "remote"


class RemoteModel(VipLlavaModel):
    config_class = RemoteConfig
"""


@pytest.mark.every_model
def test_a_model_whose_code_is_in_its_checkpoint(tmp_path: Path) -> None:
    folder = checkpoints.save("vipllava", tmp_path / "model")
    hf = reference("vipllava", folder)
    # With the names of tensors that the code has; transformers renames those of its own types.
    tensors = {name: tensor.contiguous() for name, tensor in hf.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "remote.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "remote",
        "architectures": ["RemoteForConditionalGeneration"],
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModel": "remote.RemoteModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    in_a_process(serve_remote_code, folder, answers_of(hf, "vipllava"))


def serve_remote_code(folder: Path, expected: Answers) -> None:
    """Compare the engine, which is told to trust the checkpoint's code, with transformers."""
    trusting = {"trust_remote_code": True}
    with start_here("vipllava", folder, METHODS[0], METHODS[1:], **trusting) as llm:
        check(Pair("vipllava", llm, Reference("vipllava", None, None)), expected)


def test_rows_that_are_newlines_are_found_and_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.save("own_llava_next", tmp_path / "model")
    with (
        plugin_installed(),
        start("own_llava_next", folder, "uniform", request_methods=(), forked=False) as llm,
    ):
        pair = Pair("own_llava_next", llm, Reference("own_llava_next", None, None))
        with pytest.raises(EngineDeadError):
            answer(llm, [pair.request(Case("it", (0,)))], greedy())
    assert "are the same whatever the pixels are" in capfd.readouterr().out


@pytest.mark.every_model
def test_an_architecture_with_newlines_is_refused(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = checkpoints.save("granite4_vision", tmp_path / "model")
    why = "its newlines among rows must stay, and where they stand is not known"
    record(record_property, architecture_in(folder), refused=why)
    with pytest.raises(UnsupportedModelError, match="are the same whatever the pixels are"):
        in_a_process(ask_once, "granite4_vision", folder)


@pytest.mark.every_model
def test_features_that_are_not_found_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = checkpoints.save("aria", tmp_path / "model")  # its rows are made of queries
    with pytest.raises(UnsupportedModelError, match="not put together of the tokens"):
        in_a_process(ask_once, "aria", folder, "feature-norm")


def ask_once(name: str, folder: Path, method: str = "uniform") -> None:
    """Ask about one image in this process."""
    with start_here(name, folder, method, ()) as llm:
        pair = Pair(name, llm, Reference(name, None, None))
        answer(llm, [pair.request(Case("it", (0,)))], greedy())


def test_positions_with_four_axes_are_refused_before_the_server_starts(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = checkpoints.save("hunyuan_vl", tmp_path / "model")
    record(record_property, architecture_in(folder), refused="its positions have four axes")
    with pytest.raises(UnsupportedModelError, match="positions have 4 axes"):
        tokenprune_vllm.engine_args(folder, "uniform", 5)


@pytest.mark.every_model
def test_text_among_rows_is_embedded_by_the_model_itself(tmp_path: Path) -> None:
    """Nobody knows before the choice where it will stand; an image of three tiles, by hand."""
    folder = checkpoints.save("cohere2_vision", tmp_path / "model")
    in_a_process(compare_tiles, folder)


def compare_tiles(folder: Path) -> None:
    """Compare the engine's answers about several tiles with `by_hand`."""
    name = "cohere2_vision"
    del ARCHITECTURES["Cohere2VisionForConditionalGeneration"]  # as if its family was not known
    hf = reference(name, folder)
    hf.processor.image_processor.max_patches = 2
    hf.processor.save_pretrained(folder)
    with start_here(name, folder, "divprune", ()) as llm:
        pair = Pair(name, llm, hf)
        kept(llm)
        for case in (Case("tit", (0,)), Case("tit", (3,), {"keep": 0.4})):
            (answered,) = answer(llm, [pair.request(case)], greedy(words=WORDS))
            ((chosen,),) = kept(llm)
            inputs = checkpoints.hf_inputs(name, hf.processor, case.kinds, case.media()[0])
            assert answered == by_hand(hf.model, inputs, chosen), case


def by_hand(model: Any, inputs: Any, chosen: list[int]) -> list[int]:
    """Return the greedy tokens after a prompt of which only these rows are read."""
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        rows = model.model.get_image_features(pixels, return_dict=True).pooler_output
        rows = torch.cat([one.flatten(0, -2) for one in rows])
        embedded = model.get_input_embeddings()(ids)
        is_row = ids == model.config.image_token_id
        embedded[is_row] = rows
        stays = ~is_row
        columns = is_row[0].nonzero()[:, 0]
        assert columns[-1] - columns[0] + 1 > len(columns), "no text stands among the rows"
        stays[0, columns[chosen]] = True
        embedded, positions = embedded[stays][None], stays[0].nonzero()[:, 0][None]
        words = []
        for _ in range(8):
            scores = model(inputs_embeds=embedded, position_ids=positions).logits[0, -1]
            words.append(max(WORDS, key=lambda word: float(scores[word])))
            behind = ids.shape[1] + len(words) - 1
            embedded = torch.cat(
                [embedded, model.get_input_embeddings()(torch.tensor([words[-1:]]))], 1
            )
            positions = torch.cat([positions, torch.tensor([[behind]])], 1)
    return words
