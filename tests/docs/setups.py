"""What the documents' blocks of Python start from: models, inputs and files, all small.

A block says which of `SETUPS` it needs, see `blocks.py`. Where it names a public model, a small one
of the same family stands in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune_hf
from tests.hf.mllamas import prompt as llama_prompt
from tests.hf.mllamas import tiny as tiny_llama
from tests.hf.test_sparse import heads_of
from tests.vllm import checkpoints
from tokenprune import PruningConfig
from tokenprune.masks.patterns import Category
from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import SELECTOR, bundled_model_path
from tokenprune_eval.bundled.scenes import load_scenes
from tokenprune_hf.layout import decoder_of

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass(frozen=True)
class Setup:
    """What a block is run with.

    Attributes
    ----------
    names
        The variables that are there.
    stand_ins
        Name of a public model in the block -> path of the small one that is loaded.
    around
        Makes the context in which it runs.
    """

    names: dict[str, Any] = field(default_factory=dict)
    stand_ins: dict[str, Path] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@cache
def _bundled() -> tuple[Any, Any]:
    return tokenprune_hf.load(str(bundled_model_path()))


def bundled(folder: Path) -> Setup:
    """Return the bundled model and a question about a picture, for any method."""
    model, processor = _bundled()
    question = load_scenes()[0]
    image = load_image(question.image)
    return Setup(
        {
            "tokenprune_hf": tokenprune_hf,
            "model": model,
            "processor": processor,
            "image": image,
            "inputs": tokenprune_hf.ask(processor, question.question, image=image),
            "method": "information",
            "keep": 0.25,
            "options": {},
        }
    )


def talk(folder: Path) -> Setup:
    """Return the bundled model, and a video in the file ``talk.mp4``."""
    import av

    with av.open(folder / "talk.mp4", "w") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 64
        for level in range(0, 240, 40):
            picture = np.full((64, 64, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    known = bundled(folder).names
    video = tokenprune_hf.read_video(folder / "talk.mp4", frames=4)
    inputs = tokenprune_hf.ask(known["processor"], "what colour ?", video=video)
    shutil.copytree(SELECTOR, folder / "selector")
    return Setup({**known, "inputs": inputs}, {QWEN: bundled_model_path()})


def heads(folder: Path) -> Setup:
    """Return the bundled model, and a mask for each of its heads in ``heads.json``."""
    known = bundled(folder).names
    _save_heads(known["model"], folder)
    return Setup(known)


def _save_heads(model: Any, folder: Path) -> None:
    config = decoder_of(model).config
    layer: list[Category] = ["dense"] * config.num_attention_heads
    layer[0] = "intra"
    heads_of(model, [layer] * config.num_hidden_layers).save(folder / "heads.json")


def llava(folder: Path) -> Setup:
    """Return an image and a prompt for LLaVA-1.5; a tiny one is loaded in its place."""
    longer = {"max_position_embeddings": 4096}
    path = checkpoints.save("llava", folder / "llava", text_config=longer)
    prompt = checkpoints.prompt("llava", "i")
    return Setup({"image": checkpoints.image(0), "prompt": prompt}, {LLAVA: path})


def calibrated(folder: Path) -> Setup:
    """Return a tiny LLaVA-1.5 and the budget that a calibration found for it."""
    setup = llava(folder)
    model, _ = tokenprune_hf.load(str(setup.stand_ins[LLAVA]))
    (folder / "calibrated").mkdir()
    config = PruningConfig("divprune", keep=0.25)
    (folder / "calibrated" / "divprune.json").write_text(config.to_json())
    return Setup({"MODEL": setup.stand_ins[LLAVA], "OUT": folder / "out", "model": model})


def tokens(folder: Path) -> Setup:
    """Return the tokens of one picture and the projector of one's own model."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    features = torch.randn(576, 8)
    embeddings = layers(features).detach()
    return Setup({"features": features, "embeddings": embeddings, "projector": layers})


def query_key_value(folder: Path) -> Setup:
    """Return what attention is computed from, for four heads and a prompt of 4,096 tokens."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, 4096, 8) for heads in (4, 2, 2))
    return Setup({"query": query, "key": key, "value": value})


def llama_vision(folder: Path) -> Setup:
    """Return a tiny Llama-3.2-Vision and a prompt with a picture of two tiles."""
    return Setup(
        {"tokenprune_hf": tokenprune_hf, "model": tiny_llama(), "inputs": llama_prompt(["t2t"])}
    )


def no_engine(folder: Path) -> Setup:
    """Return what vLLM is given, with an `LLM` that checks its arguments and starts nothing."""
    vllm = pytest.importorskip("vllm")
    import tokenprune_vllm

    known = llava(folder)

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            self.config = vllm.EngineArgs(**arguments).create_model_config()

        def generate(self, request: dict[str, Any]) -> None:
            assert set(request) == {"prompt", "multi_modal_data", "mm_processor_kwargs"}

    @contextmanager
    def around() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm, "LLM", LLM)
            yield

    names = {**known.names, "MODEL": str(known.stand_ins[LLAVA]), "vllm": vllm}
    names["tokenprune_vllm"] = tokenprune_vllm
    return Setup(names, known.stand_ins, around)


def heads_no_engine(folder: Path) -> Setup:
    """Return what `no_engine` does, and a mask for each of the model's heads in ``heads.json``."""
    setup = no_engine(folder)
    model, _ = tokenprune_hf.load(str(setup.stand_ins[LLAVA]))
    _save_heads(model, folder)
    return setup


SETUPS: dict[str, Callable[[Path], Setup]] = {
    "bundled": bundled,
    "calibrated": calibrated,
    "heads": heads,
    "heads-no-engine": heads_no_engine,
    "llama-vision": llama_vision,
    "llava": llava,
    "no-engine": no_engine,
    "query-key-value": query_key_value,
    "talk": talk,
    "tokens": tokens,
}
