"""Real weights and real H.264 files: what transformers keeps of a long video, vLLM keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tokenprune_hf
from tests.vllm.checkpoints import metadata
from tests.vllm.engines import answer, engine, greedy, kept
from tokenprune.media.video import Video, read_video
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.bundled.needles import VideoQuestion, needle_set

KEEP = 1 / 16
FRAMES = 32


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[VideoQuestion]:
    return needle_set(
        tmp_path_factory.mktemp("needles"), videos=2, types=("kind", "place"), fashion=None
    )


def request(processor: Any, question: VideoQuestion, video: Video) -> dict[str, Any]:
    content = [{"type": "video"}, {"type": "text", "text": question.question}]
    message = {"role": "user", "content": content}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    frames = (video.frames, metadata(len(video.frames)))
    return {"prompt": text, "multi_modal_data": {"video": frames}}


def test_flexselect_in_both_engines(questions: list[VideoQuestion]) -> None:
    checkpoint: Path = bundled_model_path()
    model, processor = tokenprune_hf.load(str(checkpoint))
    videos = {one.video: read_video(one.video, FRAMES) for one in questions}
    with engine(
        checkpoint,
        "flexselect",
        KEEP,
        options={"layer": 2},
        max_model_len=4096,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 0, "video": 1},
    ) as llm:
        for question in questions:
            video = videos[question.video]
            inputs = tokenprune_hf.ask(processor, question.question, video=video)
            with tokenprune_hf.prune(model, "flexselect", KEEP, layer=2) as pruning:
                output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            (answered,) = answer(llm, [request(processor, question, video)], greedy(2))
            (selection,) = pruning.selections
            assert selection.grid == (FRAMES, 8, 8)
            (chosen,) = kept(llm)
            # Sums are added up in another order there: a token at the edge may change places.
            assert len(set(chosen[0]) & set(selection.kept.tolist())) >= 127
            assert answered == output[0, inputs["input_ids"].shape[1] :].tolist()
