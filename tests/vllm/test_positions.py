"""The positions that vLLM's language model is given, number by number against transformers.

In bfloat16, where a number above 256 is no longer exact, and beyond 300; with prompts cut into
chunks, twice, so that the second time most of the prompt comes from the prefix cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tokenprune_hf
from tests.vllm import checkpoints
from tests.vllm.engines import answer, engine, greedy
from tests.vllm.test_families import reference
from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.positions import PositionOffsets, check_tables, from_columns, to_columns

tf: Any = transformers  # its classes are not typed

TOKENS = 5


def media(family: str) -> tuple[str, list[Any], list[Any]]:
    """Return kinds, images and videos of a prompt that is longer than 300 positions."""
    if family == "llava":
        return "t" + 10 * "it", [checkpoints.image(n) for n in range(10)], []
    if family == "internvl":
        return "titvt", [checkpoints.image(0, (160, 32))], [checkpoints.video(0, 16)]
    images = [checkpoints.image(0, (1600, 16)), checkpoints.image(1, (1504, 24))]
    return "tititvt", images, [checkpoints.video(0, 6)]


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_exact_in_bfloat16(family: str, tmp_path: Path) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    hf = reference(family, folder, dtype=torch.bfloat16)
    kinds, images, videos = media(family)
    inputs = checkpoints.hf_inputs(family, hf.processor, kinds, images, videos).to(torch.bfloat16)
    hf.watch_positions()
    with tokenprune_hf.prune(hf.model, "uniform", 0.3):
        hf.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    expected = torch.cat([one.expand(len(hf.seen[0]), -1) for one in hf.seen], dim=1)
    assert expected.max() > 300

    request = checkpoints.vllm_request(family, kinds, images, videos)
    with engine(
        folder,
        "uniform",
        0.3,
        dtype="bfloat16",
        max_num_batched_tokens=48,
        max_num_seqs=4,
        block_size=32,
        limit_mm_per_prompt={"image": 10, "video": 2},
    ) as llm:
        for time in range(2):
            llm.collective_rpc("start_noting_positions")
            answer(llm, [request], greedy(TOKENS, words=checkpoints.WORDS))
            steps = [torch.tensor(step) for step in llm.collective_rpc("noted_positions")[0]]
            given = torch.cat(steps, dim=1)
            if time == 0:
                assert len(steps) > TOKENS, "the prompt was meant to be cut into chunks"
                assert given.shape == expected.shape
            else:
                assert given.shape[1] < expected.shape[1], "nothing came from the prefix cache"
            assert torch.equal(given, expected[:, -given.shape[1] :])


def test_prompts_near_the_end_of_the_context(tmp_path: Path) -> None:
    """Three images fit the context unpruned, and answers go on behind it; four do not fit."""
    folder = checkpoints.save(
        "llava", tmp_path / "model", text_config={"max_position_embeddings": 128}
    )
    hf = reference("llava", folder)
    images = [checkpoints.image(n) for n in range(4)]
    inputs = checkpoints.hf_inputs("llava", hf.processor, "ititit", images[:3])
    length = inputs["input_ids"].shape[1]
    assert 110 < length <= 128
    hf.watch_positions()
    with tokenprune_hf.prune(hf.model, "cls-attention", 5):
        output = hf.model.generate(**inputs, max_new_tokens=90, do_sample=False)
    assert max(int(step.max()) for step in hf.seen) > 200
    with engine(folder, "cls-attention", 5, max_model_len=128) as llm:
        assert llm.collective_rpc("rotary_length") == [256]
        request = checkpoints.vllm_request("llava", "ititit", images[:3])
        (answered,) = answer(llm, [request], greedy(90, words=checkpoints.WORDS))
        assert answered == output[0, length:].tolist()
        long = checkpoints.vllm_request("llava", "itititit", images)
        with pytest.raises(ValueError, match="before pruning this prompt has 157 tokens"):
            answer(llm, [long], greedy(4, words=checkpoints.WORDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_offsets_survive_as_columns_of_any_dtype(dtype: torch.dtype) -> None:
    offsets = torch.tensor([[0, 255, 256, 257], [1203, 65535, 65536, 16777215], [1, 2, 3, 4]])
    columns = to_columns(offsets, dtype)
    assert columns.dtype == dtype
    assert columns.shape == (4, 9)
    assert torch.equal(from_columns(columns), offsets)


def test_a_batch_leaves_nothing_behind() -> None:
    offsets = PositionOffsets(3, 8, torch.device("cpu"))
    positions = torch.arange(6).expand(3, -1)
    is_row = torch.tensor([False, True, True, False, False, True])
    moves = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    offsets.write(moves, is_row, 6)
    expected = positions.clone()
    expected[:, is_row] += moves
    assert torch.equal(offsets.add(positions), expected)
    offsets.write(None, None, 2)
    assert torch.equal(offsets.add(positions), positions)
    # A batch larger than was foreseen
    offsets.write(None, None, 20)
    assert torch.equal(offsets.add(torch.arange(20).expand(3, -1))[0], torch.arange(20))


def test_learned_positions_are_refused() -> None:
    config = tf.OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, vocab_size=64
    )
    with pytest.raises(UnsupportedModelError, match=r"positions are learned .*embed_positions"):
        check_tables(tf.OPTModel(config), config)
    towers = tf.Blip2VisionModel(
        tf.Blip2VisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    check_tables(towers, config)
