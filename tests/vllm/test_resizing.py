"""`resize` for one request to vLLM: the most tokens that are allowed, answers, caches, refusals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from vllm import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache

import tokenprune_vllm
from tests.hf.test_resizing import qwen_tokens, shrunk
from tests.vllm import checkpoints
from tests.vllm.servers import COMMON, TOKENPRUNE, Server, serve
from tokenprune.arguments import Parser
from tokenprune.budget import tokens_kept
from tokenprune.config import PruningConfig
from tokenprune.errors import ConfigError
from tokenprune_vllm import serve as serving
from tokenprune_vllm.settings import RequestError, ServerSettings

SIZES = [(96, 64), (70, 150), (64, 64)]
KEEPS: list[int | float] = [0.8, 0.5, 0.25, 0.1, 20]
FAMILIES = ("qwen2_5_vl", "llava_next", "mistral3")
FIXED = ("llava", "gemma3", "internvl")

DEFAULT = PruningConfig("uniform", 0.5)


# What a request may ask for ---------------------------------------------------------------------


def asked(**values: Any) -> dict[str, Any]:
    """Return the settings of a request for the processor."""
    return {"tokenprune": values}


def test_a_request_names_it_alone_or_with_a_method() -> None:
    server = ServerSettings.build(DEFAULT, {"divprune": {}, "resize": {}})
    assert server.methods == {"uniform": {}, "divprune": {}}
    assert ServerSettings.from_config(argparse.Namespace(tokenprune=server.to_dict())) == server
    alone = server.request(asked(method="resize", keep=0.25))
    assert (alone.config, alone.resized_to, alone.method) == (None, 0.25, "resize")
    assert alone.resizes
    assert not alone.prunes
    assert not alone.reads_prompt
    default = server.request(asked(method="resize"))
    assert default.resized_to == 0.5
    both = server.request(asked(method="resize+divprune", keep=16))
    assert both.config == PruningConfig("divprune", 16)
    assert (both.resized_to, both.method) == (16, "resize+divprune")
    whole = server.request(asked(method="resize", keep=1.0))
    assert not whole.resizes
    assert whole.fingerprint() == "off" == whole.method
    marks = [
        server.request(asked(**values)).fingerprint()
        for values in (
            {"method": "resize", "keep": 0.25},
            {"method": "resize", "keep": 0.5},
            {"method": "resize", "keep": 16},
            {"method": "resize+divprune", "keep": 16},
            {"method": "resize+uniform", "keep": 16},
            {"method": "divprune", "keep": 16},
            {"off": True},
        )
    ]
    assert len(set(marks)) == len(marks)


def test_what_is_not_offered_is_refused() -> None:
    server = ServerSettings.build(DEFAULT, {"resize": {}})
    for method in ("resize+divprune", "resize+resize", "resized", "resize+"):
        with pytest.raises(RequestError, match="not loaded by this server"):
            server.request(asked(method=method))
    with pytest.raises(RequestError, match="keeps nothing"):
        server.request(asked(method="resize", keep=0))
    closed = ServerSettings.build(DEFAULT, {"divprune": {}})
    for method in ("resize", "resize+divprune"):
        with pytest.raises(RequestError, match=r"not loaded by this server.*Allowed: divprune, u"):
            closed.request(asked(method=method))


@pytest.mark.parametrize(
    ("default", "methods", "message"),
    [
        (DEFAULT, {"resize+divprune": {}}, "name resize and divprune there by themselves"),
        (DEFAULT, {"resize": {"size": 3}}, "has no options"),
        (PruningConfig("uniform", 0.5, scope="image"), {"resize": {}}, "leave out resize, or sco"),
    ],
)
def test_a_server_is_told_of_it_in_one_way(
    default: PruningConfig, methods: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings.build(default, methods)


def test_the_command_line_takes_it_for_requests_and_not_as_the_default(tmp_path: Path) -> None:
    parser = Parser()
    serving.configure(parser)
    words = ["m", "--method", "uniform", "--keep", "4", "--allow-request-keep"]
    arguments = parser.parse_args([*words, "--request-method", "resize", "divprune"])
    assert serving.pruning_of(arguments) == (
        PruningConfig("uniform", 4),
        {"resize": {}, "divprune": {}},
    )
    written = tmp_path / "pruning.json"
    written.write_text(DEFAULT.to_json())
    arguments = parser.parse_args(["m", "--pruning", str(written), "--request-method", "resize"])
    assert serving.pruning_of(arguments) == (DEFAULT, {"resize": {}})
    for method in ("resize", "resize+uniform"):
        arguments = parser.parse_args(["m", "--method", method, "--keep", "4"])
        with pytest.raises(ConfigError, match="cannot be a server's default"):
            serving.pruning_of(arguments)
        with pytest.raises(ConfigError, match="cannot be a server's default"):
            tokenprune_vllm.engine_args("m", method, 4)


# How small --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoints.save(name, root / name) for name in (*FAMILIES, *FIXED)}


def config_of(folder: Path) -> Any:
    """Return vLLM's config of a pruned model whose requests may resize."""
    arguments = tokenprune_vllm.engine_args(
        folder, "uniform", 0.5, request_methods=["divprune", "resize"], max_model_len=1024
    )
    return EngineArgs(**arguments, dtype="float32").create_model_config()


@pytest.fixture(scope="module")
def processors(folders: dict[str, Path]) -> dict[str, Any]:
    """vLLM's own processors of the tiny models, pruned."""
    registry: Any = MULTIMODAL_REGISTRY
    return {name: registry.create_processor(config_of(path)) for name, path in folders.items()}


def rows(
    processor: Any, family: str, pictures: list[Image.Image], cache: Any = None, **values: Any
) -> tuple[list[int], Any]:
    """Return the rows of each picture in a prompt, and what vLLM's processor made of it."""
    items = processor.info.parse_mm_data({"image": pictures})
    made = processor(
        checkpoints.prompt(family, "i" * len(pictures) + "t"),
        items,
        hf_processor_mm_kwargs=asked(**values),
        cache=cache,
    )
    places = made["mm_placeholders"]["image"]
    return [
        place.length if place.is_embed is None else int(place.is_embed.sum()) for place in places
    ], made


def counts(processor: Any, family: str, size: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Return every smaller size of a picture -> what it comes to when it is sent like that."""
    return {
        one: rows(processor, family, [Image.new("RGB", one)], off=True)[0][0]
        for one in shrunk(size)
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEEPS)
def test_qwen_has_the_most_tokens_that_are_allowed(
    processors: dict[str, Any], size: tuple[int, int], keep: int | float
) -> None:
    """Against the formula of its resizing, for every smaller picture."""
    processor = processors["qwen2_5_vl"]
    vision = processor.info.get_hf_config().vision_config
    patch, side = vision.patch_size, vision.patch_size * vision.spatial_merge_size
    least, most = 4 * side**2, 512 * side**2
    known = {one: qwen_tokens(one, most, least, side) for one in shrunk(size)}
    full = known[size]
    allowed = tokens_kept(keep, full)
    # What its processor would enlarge is not counted: it reads other pixels than there are.
    fitting = [n for one, n in known.items() if n <= allowed and 4 * math.prod(one) >= patch**2 * n]
    image = checkpoints.image(0, size)
    (found,), _ = rows(processor, "qwen2_5_vl", [image], method="resize", keep=keep)
    assert found == max(fitting)


@pytest.mark.parametrize(
    ("family", "keeps", "refused"),
    [
        ("qwen2_5_vl", (0.9, 0.5, 0.2), (1,)),
        # Crops are cut to the picture, so tokens do not rise with every pixel.
        ("llava_next", (0.9, 0.73, 0.6), (1,)),
        ("mistral3", (0.9, 0.5, 0.2), ()),
    ],
)
def test_a_picture_is_as_if_it_had_been_sent_smaller(
    processors: dict[str, Any],
    family: str,
    keeps: tuple[float, ...],
    refused: tuple[float, ...],
) -> None:
    processor, size = processors[family], (160, 96)
    image = checkpoints.image(1, size)
    known = counts(processor, family, size)
    full = known[size]
    for keep in refused:
        with pytest.raises(RequestError, match="at least"):
            rows(processor, family, [image], method="resize", keep=keep)
        assert min(known.values()) > tokens_kept(keep, full)
    for keep in keeps:
        (found,), made = rows(processor, family, [image], method="resize", keep=keep)
        # Rows that are no tokens, such as newlines, are counted here and not in the budget.
        assert found < full
        assert found in known.values()
        if family == "qwen2_5_vl":
            assert found <= tokens_kept(keep, full)
        sent = [one for one, n in known.items() if n == found]
        pixels = made["mm_kwargs"]["image"][0].get_data()["pixel_values"]
        alike = [
            rows(processor, family, [image.resize(one, Image.Resampling.BICUBIC)], off=True)[1]
            for one in sent
        ]
        own = [one["mm_kwargs"]["image"][0].get_data()["pixel_values"] for one in alike]
        assert any(one.shape == pixels.shape and bool((one == pixels).all()) for one in own)


def test_a_method_prunes_what_is_left_of_a_smaller_picture(processors: dict[str, Any]) -> None:
    processor = processors["qwen2_5_vl"]
    pictures = [checkpoints.image(2, (224, 160)), checkpoints.image(3, (96, 160))]
    full, _ = rows(processor, "qwen2_5_vl", pictures, off=True)
    kept, made = rows(processor, "qwen2_5_vl", pictures, method="resize+divprune", keep=0.2)
    assert kept == [tokens_kept(0.2, one) for one in full]
    for item, whole, few in zip(made["mm_kwargs"]["image"], full, kept, strict=True):
        grid = item.get_data()["image_grid_thw"].tolist()
        tokens = math.prod(grid) // 4
        assert few < tokens < whole
        assert tokens <= math.sqrt(few * whole) + 1


@pytest.mark.parametrize("family", FIXED)
def test_a_picture_that_is_cut_alike_at_every_size_says_so(
    processors: dict[str, Any], family: str
) -> None:
    image = checkpoints.image(0, (160, 96))
    with pytest.raises(RequestError, match=r"whatever its size, so resize cannot.*that prunes"):
        rows(processors[family], family, [image], method="resize", keep=0.5)


def test_what_is_too_few_says_how_few_there_can_be(processors: dict[str, Any]) -> None:
    image = checkpoints.image(0, (96, 64))
    with pytest.raises(RequestError, match=r"at least (\d+) of \d+ .* 1 are to be kept. Ask for"):
        rows(processors["qwen2_5_vl"], "qwen2_5_vl", [image], method="resize", keep=1)


def test_what_is_no_picture_is_refused(processors: dict[str, Any]) -> None:
    processor = processors["qwen2_5_vl"]
    array: Any = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(RequestError, match=r"takes pictures \(PIL.Image\), and was given a ndar"):
        rows(processor, "qwen2_5_vl", [array], method="resize", keep=0.5)
    request = checkpoints.vllm_request("qwen2_5_vl", "vt", videos=[np.zeros((4, 64, 64, 3), "u1")])
    items = processor.info.parse_mm_data(request["multi_modal_data"])
    with pytest.raises(RequestError, match=r"has 1 of another kind \(video\). Send pictures alone"):
        processor(request["prompt"], items, hf_processor_mm_kwargs=asked(method="resize"))


# Caches -----------------------------------------------------------------------------------------


def test_caches_never_mix_sizes(folders: dict[str, Path], processors: dict[str, Any]) -> None:
    family = "qwen2_5_vl"
    processor = processors[family]
    cache = MultiModalProcessorOnlyCache(config_of(folders[family]))
    image, other = checkpoints.image(4, (160, 96)), checkpoints.image(5, (160, 96))
    asking: list[dict[str, Any]] = [
        {"off": True},
        {"method": "uniform", "keep": 0.3},
        *({"method": "resize", "keep": keep} for keep in (0.3, 0.6, 10)),
        {"method": "resize+divprune", "keep": 0.3},
        {"method": "resize+uniform", "keep": 0.3},
    ]
    alone = [rows(processor, family, [image], **values) for values in asking]
    hashes = [made["mm_hashes"]["image"][0] for _, made in alone]
    assert len(set(hashes)) == len(hashes)
    for _ in range(2):  # what is there is what was put there, however it is asked for
        for values, (wanted, made) in zip(asking, alone, strict=True):
            found, again = rows(processor, family, [image], cache, **values)
            assert found == wanted
            assert again["mm_hashes"] == made["mm_hashes"]
            assert again["prompt_token_ids"] == made["prompt_token_ids"]
    # One that is there beside one that is not: each has its own size.
    tall = checkpoints.image(6, (64, 200))
    for pictures in ([tall, image], [image, tall], [other, tall, image]):
        values = {"method": "resize", "keep": 0.3}
        wanted = [rows(processor, family, [one], **values)[0][0] for one in pictures]
        assert rows(processor, family, pictures, cache, **values)[0] == wanted
        values = {"method": "resize+divprune", "keep": 0.3}
        wanted = [rows(processor, family, [one], **values)[0][0] for one in pictures]
        assert rows(processor, family, pictures, cache, **values)[0] == wanted


def test_sizes_are_counted_once(processors: dict[str, Any], folders: dict[str, Path]) -> None:
    registry: Any = MULTIMODAL_REGISTRY
    processor = registry.create_processor(config_of(folders["qwen2_5_vl"]))
    laid_out = 0
    own = processor._counted

    def counting(*arguments: Any) -> Any:
        nonlocal laid_out
        laid_out += 1
        return own(*arguments)

    processor._counted = counting
    for number in (0, 1):
        rows(processor, "qwen2_5_vl", [checkpoints.image(number, (160, 96))], method="resize")
        if number == 0:
            first = laid_out
    assert 1 < first == laid_out < 40


# Over HTTP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [
        *(*TOKENPRUNE, "serve", str(folders["qwen2_5_vl"]), "--method=uniform", "--keep=0.5"),
        *("--allow-request-keep", "--request-method", "resize", "divprune", *COMMON),
        # Random weights may say what has no text.
        "--max-logprobs=20",
    ]
    with serve(command, tmp_path_factory.mktemp("serve"), forked=True) as running:
        yield running


def ask(server: Server, image: Image.Image, **values: Any) -> tuple[int, list[float]]:
    """Return the tokens of the prompt, and the log-probabilities of the likeliest answers."""
    response = server.ask(
        image,
        "w7 w8 w9",
        logprobs=True,
        top_logprobs=20,
        mm_processor_kwargs=asked(**values),
    )
    assert response.status_code == 200, response.text
    body = response.json()
    first = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return int(body["usage"]["prompt_tokens"]), [float(one["logprob"]) for one in first]


def test_a_server_answers_as_if_the_smaller_picture_had_been_sent(
    server: Server, processors: dict[str, Any]
) -> None:
    image, size = checkpoints.image(7, (224, 160)), (224, 160)
    known = counts(processors["qwen2_5_vl"], "qwen2_5_vl", size)
    text = ask(server, image, off=True)[0] - known[size]
    for keep in (0.6, 0.3, 0.6):  # the second time out of the cache
        tokens, answer = ask(server, image, method="resize", keep=keep)
        allowed = tokens_kept(keep, known[size])
        assert tokens - text == max(n for n in known.values() if n <= allowed)
        smaller = [
            ask(server, image.resize(one, Image.Resampling.BICUBIC), off=True)[1]
            for one in [one for one, n in known.items() if n == tokens - text][-3:]
        ]
        assert any(answer == pytest.approx(one, abs=1e-4) for one in smaller)
        assert answer != pytest.approx(ask(server, image, off=True)[1], abs=1e-4)
        assert answer != pytest.approx(ask(server, image, keep=keep)[1], abs=1e-4)
    both, _ = ask(server, image, method="resize+divprune", keep=0.2)
    assert both - text == tokens_kept(0.2, known[size])
    page = server.metrics()
    for method, kept in (("resize", None), ("resize+divprune", both - text)):
        labels = f'{{method="{method}",modality="image"}}'
        seen = page[f"tokenprune_visual_tokens_seen_total{labels}"]
        stayed = page[f"tokenprune_visual_tokens_kept_total{labels}"]
        assert seen == known[size] * (3 if kept is None else 1)
        assert stayed < seen if kept is None else stayed == kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "resize", "keep": 0}, "keeps nothing"),
        ({"method": "resize", "keep": 1}, "1 are to be kept. Ask for a keep of"),
        ({"method": "resize+information"}, "is not loaded by this server"),
        ({"method": "resize+flexselect"}, "is not loaded by this server"),
        ({"resize": True}, "has no key 'resize'"),
    ],
)
def test_a_bad_request_is_a_400_and_the_server_lives(
    server: Server, values: dict[str, Any], message: str
) -> None:
    image = checkpoints.image(8, (96, 64))
    response: httpx.Response = server.ask(image, "w7", mm_processor_kwargs=asked(**values))
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert ask(server, image, method="resize", keep=0.5)
