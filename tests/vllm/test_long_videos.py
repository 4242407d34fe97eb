"""Videos with more frames than rows and columns, of an even rate and with a gap, in both engines.

Pruned, the engines number a prompt alike and answer alike. Unpruned, they do not: each test of that
says what is to be changed where an engine changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune_hf
from tests.hf.test_positions import by_hand, engine_positions, watch
from tests.vllm import checkpoints
from tests.vllm.checkpoints import WORDS
from tests.vllm.engines import answer, engine, greedy, kept
from tests.vllm.test_families import reference
from tokenprune.media.video import Video
from tokenprune_eval.evaluation.engines.openai import _how_sampled, _video_part
from tokenprune_hf.loading import frames_and_metadata, prompt_text

QUESTION = "w7 w8 w9"
KEEP, TOKENS = 16, 6
FRAMES = 56


def video(number: int, times: Any) -> Video:
    """Return a video whose frames are shown at `times`."""
    frames = checkpoints.video(number, FRAMES, (32, 32))
    shown = np.asarray(times, np.float64)
    return Video(frames, shown, np.arange(FRAMES), FRAMES, shown[-1] + 0.04, Path("v.mp4"), "pyav")


EVEN = video(1, np.arange(FRAMES) / 25)
GAP = video(2, np.arange(FRAMES) / 25 + 7.3 * (np.arange(FRAMES) > 30))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_both_engines_number_and_answer_alike(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder)
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    seen = watch(hf.model)

    def transformers(inputs: Any, keep: Any) -> tuple[list[int], Any]:
        seen.clear()
        with tokenprune_hf.prune(hf.model, "uniform", keep) as pruning:
            output = hf.model.generate(**inputs, **options)
        chosen = [one.kept.tolist() for one in pruning.selections]
        length = inputs["input_ids"].shape[1]
        return output[0, length:].tolist(), (chosen, torch.cat(seen, dim=2)[:, 0])

    with engine(folder, "uniform", KEEP, max_model_len=1024) as llm:

        def vllm(shown: Video, **asked: Any) -> tuple[list[int], Any]:
            frames, metadata = frames_and_metadata(shown)
            request: dict[str, Any] = {
                "prompt": prompt_text(hf.processor, QUESTION, "video"),
                "multi_modal_data": {"video": (frames, {**metadata, "do_sample_frames": False})},
            }
            if asked:
                request["mm_processor_kwargs"] = {"tokenprune": asked}
            llm.collective_rpc("start_noting_positions")
            (tokens,) = answer(llm, [request], greedy(TOKENS, words=WORDS))
            steps = [torch.tensor(step) for step in llm.collective_rpc("noted_positions")[0]]
            chosen = [segment for item in kept(llm) for segment in item]
            return tokens, (chosen, torch.cat(steps, dim=1))

        for shown in (EVEN, GAP):
            inputs = tokenprune_hf.ask(hf.processor, QUESTION, video=shown)
            tokens, (chosen, positions) = transformers(inputs, KEEP)
            answered, (chosen_there, positions_there) = vllm(shown)
            assert chosen == chosen_there
            assert torch.equal(positions, positions_there)
            assert answered == tokens

            # Nothing dropped: each engine answers as its plain model does.
            tokens, (_, positions) = transformers(inputs, 1.0)
            length = inputs["input_ids"].shape[1]
            plain = hf.model.generate(**inputs, **options)[0, length:].tolist()
            assert tokens == plain
            assert torch.equal(positions[:, :length], engine_positions(hf.model, inputs)[:, 0])
            llm.reset_prefix_cache()
            _, (_, positions_there) = vllm(shown, off=True)
            (published,) = by_hand(family, inputs)
            # vLLM counts as the papers do; if this fails, `tokenprune_hf.positions` follows it.
            assert np.array_equal(positions_there[:, :length].numpy(), published)
            # transformers does not; if this fails, the plain engines agree by now, and
            # docs/transformers.md need not name an exception any more.
            apart = not np.array_equal(positions[:, :length].numpy(), published)
            assert apart == (family != "qwen3_vl")


@pytest.mark.parametrize("shown", [EVEN, GAP], ids=["even", "gap"])
def test_a_server_reads_the_times_that_requests_carry(shown: Video) -> None:
    """What the evaluation sends, taken apart by vLLM's own code."""
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    reader: Any = VideoMediaIO(ImageMediaIO(), **_how_sampled(shown))
    url = _video_part(shown)["video_url"]["url"]
    frames, metadata = reader.load_base64("video/jpeg", url.partition(",")[2]).media
    assert np.array_equal(frames, shown.frames)
    told = np.array(metadata["frames_indices"]) / metadata["fps"]
    assert np.allclose(told, shown.times, rtol=0, atol=1e-9)
    assert metadata["do_sample_frames"] is False
    assert metadata["duration"] == shown.duration
