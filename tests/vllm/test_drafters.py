"""Speculative decoding: the answers are those without a drafter, and what the drafter is told.

In float32 the answers are also those of transformers. What vLLM runs in bfloat16 alone is compared
with the same engine without a drafter, which reads tokens one by one and rounds otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenprune_vllm
from tests.vllm import checkpoints, drafters
from tests.vllm.checkpoints import WORDS
from tests.vllm.drafters import DRAFTED
from tests.vllm.engines import answer, engine, greedy
from tests.vllm.processes import in_a_process
from tests.vllm.test_by_hand import start_here
from tests.vllm.test_families import KEEP, Case, reference, request
from tokenprune.config import Positions, PruningConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune_vllm.carrying import carry, taken
from tokenprune_vllm.drafting import _tell_places, places
from tokenprune_vllm.refusals import check_engine
from tokenprune_vllm.settings import MARK, ServerSettings

TOKENS = 12
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "block_size": 32}
"""Steps that cut images, with room for what is drafted."""
NEAR = 0.1  # between the two best logits, which bfloat16 rounds to 1/32 here

CASES = [
    Case("it", (0,), {"method": "uniform"}),
    Case("titi", (1, 2), {"method": "uniform", "keep": 0.4}),
    Case("tit", (3,), {"off": True}),
    Case("ttt", ()),
]


def accepted(llm: Any) -> tuple[int, int]:
    """Return how many tokens were accepted, and how many drafted."""
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("accepted_tokens", "draft_tokens")
    return tuple(int(counted[f"vllm:spec_decode_num_{name}"]) for name in names)  # type: ignore[return-value]


def check_places(drafts: dict[str, list[Any]], length: int, axes: int) -> None:
    """Check that one request's drafter counts places, and never writes where another token is.

    Parameters
    ----------
    drafts
        See `Recording.noted_drafts`.
    length
        Of the pruned prompt.
    axes
        Of the drafter's positions.
    """
    slots: dict[int, int] = {}
    seen = 0
    for positions, of_call in zip(drafts["positions"], drafts["slots"], strict=True):
        assert len(positions) == axes
        assert all(axis == positions[0] for axis in positions)
        for place, slot in zip(positions[0], of_call, strict=False):
            if slot >= 0:  # of a token that is none
                assert slots.setdefault(place, slot) == slot, "a place has one slot"
        seen = max(seen, positions[0][0])
    assert sorted(slots) == list(range(max(slots) + 1)), "no place is left out"
    assert len(set(slots.values())) == len(slots), "and no two share one"
    assert seen >= length, "an answer was drafted"
    assert max(slots) <= length + TOKENS + DRAFTED


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    ("family", "save"),
    [
        ("llava", drafters.save_eagle),
        ("llava", drafters.save_draft_model),
        ("qwen2_5_vl", drafters.save_eagle3),
    ],
)
def test_answers_are_those_of_transformers(
    family: str,
    save: Callable[[Path, Path], dict[str, Any]],
    positions: Positions,
    tmp_path: Path,
) -> None:
    folder = checkpoints.save(family, tmp_path / "model")
    speculative = save(folder, tmp_path / "drafter")
    hf = reference(family, folder)
    hf.positions = positions
    asked = list(CASES)
    if family in checkpoints.VIDEOS:
        asked.append(Case("tvt", (4,), {"method": "uniform"}))
    with engine(
        folder,
        "uniform",
        KEEP,
        positions=positions,
        speculative_config=speculative,
        disable_log_stats=False,
        **CHUNKS,
    ) as llm:
        expected = [hf.ask(case)[0] for case in asked]
        requests = [request(family, case) for case in asked]
        for _ in range(2):  # the second time the caches know the images and the prompts
            assert answer(llm, requests, greedy(len(expected[0]), words=WORDS)) == expected
        right, drafted = accepted(llm)
        assert drafted > 0
        if save is not drafters.save_eagle3:  # which is random
            assert right > 0
        llm.reset_prefix_cache()
        llm.collective_rpc("start_noting_drafts")
        llm.generate(requests[:1], greedy(TOKENS, words=WORDS), use_tqdm=False)
        (drafts,) = llm.collective_rpc("noted_drafts")
        length = len(drafts["model"][0])
        assert length > KEEP, "the prompt is read in one step"
        check_places(drafts, length, axes=1)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_qwen_with_its_own_head(positions: Positions, tmp_path: Path) -> None:
    folder = checkpoints.save("qwen3_5", tmp_path / "model")
    speculative = drafters.add_mtp_head(folder)
    cases = [*CASES, Case("tvt", (4,), {"method": "uniform"}), Case("titvt", (5, 6))]
    requests = [request("qwen3_5", case) for case in cases]
    settings: dict[str, Any] = {
        "positions": positions,
        "dtype": "bfloat16",
        # vLLM keeps states of linear attention for it in Triton kernels alone.
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "max_num_seqs": 4,
    }
    sampling = greedy(TOKENS, logprobs=2)
    with engine(folder, "uniform", KEEP, **settings) as llm:
        plain = llm.generate(requests, sampling, use_tqdm=False)
    settings |= {**CHUNKS, "speculative_config": speculative}
    with engine(folder, "uniform", KEEP, **settings) as llm:
        for _ in range(2):
            check_alike(llm.generate(requests, sampling, use_tqdm=False), plain)
        right, drafted = accepted(llm)
        assert drafted > right > 0
        for case in cases[:1]:
            llm.collective_rpc("start_noting_drafts")
            llm.generate([request("qwen3_5", case)], greedy(TOKENS), use_tqdm=False)
            (drafts,) = llm.collective_rpc("noted_drafts")
            # What the drafter reads is what the model reads, one token on.
            given = torch.tensor(drafts["model"][0])
            read = torch.tensor(drafts["rows"][0])
            assert len(given) > KEEP
            assert torch.equal(read[:-1], given[1:])
            check_places(drafts, len(given), axes=3)


def check_alike(outputs: list[Any], plain: list[Any]) -> None:
    """Check that tokens are the same up to where the two best are as good in bfloat16."""
    same = 0
    for output, other in zip(outputs, plain, strict=True):
        told, expected = output.outputs[0], other.outputs[0]
        pairs = list(zip(told.token_ids, expected.token_ids, strict=True))
        first = next((at for at, (one, two) in enumerate(pairs) if one != two), None)
        same += first is None
        if first is not None:
            gaps = []
            for answered in (told, expected):
                best, second = sorted(
                    (one.logprob for one in answered.logprobs[first].values()), reverse=True
                )[:2]
                gaps.append(best - second)
            assert min(gaps) < NEAR, (first, gaps)
    assert same >= len(plain) - 2


def test_a_head_of_a_model_of_no_family(tmp_path: Path) -> None:
    """EXAONE 4.5's head reads rows; ids of text travel with them, too."""
    folder = checkpoints.save_without_weights("exaone4_5", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    # vLLM looks for these beside the text's.
    config |= {"num_nextn_predict_layers": 1, "vocab_size": config["text_config"]["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    in_a_process(_with_a_head, folder)


def _with_a_head(folder: Path) -> None:
    speculative = {"method": "mtp", "num_speculative_tokens": DRAFTED}
    asked = [Case("tit", (0,), {"method": "random"}), Case("titi", (1, 2), {"keep": 0.3})]
    requests = [request("exaone4_5", case) for case in asked]
    with start_here("exaone4_5", folder, "random") as llm:
        expected = answer(llm, requests, greedy(TOKENS, words=WORDS))
    with start_here("exaone4_5", folder, "random", speculative_config=speculative) as llm:
        assert answer(llm, requests, greedy(TOKENS, words=WORDS)) == expected
        llm.reset_prefix_cache()
        llm.collective_rpc("start_noting_drafts")
        answer(llm, requests[:1], greedy(TOKENS, words=WORDS))
        (drafts,) = llm.collective_rpc("noted_drafts")
        given, read = torch.tensor(drafts["model"][0]), torch.tensor(drafts["rows"][0])
        assert len(given) > KEEP
        assert torch.equal(read[:-1], given[1:])
        check_places(drafts, len(given), axes=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5])
def test_columns_stand_behind_every_piece_of_rows(dtype: torch.dtype, count: int) -> None:
    rows = torch.randn(count, 8).to(dtype)
    columns = torch.arange(count * 3).reshape(count, 3).to(dtype)
    carried = carry(rows, columns)
    assert carried.shape == rows.shape
    for start in range(count):
        for end in range(start + 1, count + 1):
            own, behind = taken(carried[start:end], 3)
            assert torch.equal(own, rows[start:end])
            assert torch.equal(behind, columns[start:end])
    for lost in (carried.clone(), carried.contiguous().clone(), carried.to(torch.float64)):
        with pytest.raises(UnsupportedModelError, match="have lost the positions"):
            taken(lost, 3)
    with pytest.raises(UnsupportedModelError, match="have lost the positions"):
        taken(rows, 3)


def test_rows_that_are_copied_are_wider() -> None:
    rows, columns = torch.randn(4, 8), torch.arange(12.0).reshape(4, 3)
    sent = carry(rows, columns, copied=True).clone()
    assert sent.shape == (4, 11)
    own, behind = taken(sent[1:3], 3, copied=True)
    assert torch.equal(own, rows[1:3])
    assert torch.equal(behind, columns[1:3])


def test_places_of_a_batch() -> None:
    # A prompt from its beginning, a piece of one, a step with drafted tokens.
    batch = SimpleNamespace(
        num_reqs=3,
        query_start_loc=torch.tensor([0, 4, 6, 9, 9], dtype=torch.int32),
        seq_lens=torch.tensor([4, 12, 33, 0], dtype=torch.int32),
    )
    expected = [0, 1, 2, 3, 10, 11, 30, 31, 32]
    assert places(batch, 9).tolist() == expected


def test_a_vllm_that_tells_positions_otherwise_is_noticed() -> None:
    class Proposer:
        def propose(self, positions: Any) -> None: ...

    with pytest.raises(UnsupportedModelError, match=r"does not know .Proposer.propose takes"):
        _tell_places(Proposer)


def test_drafters_that_are_refused(tmp_path: Path) -> None:
    from vllm import EngineArgs
    from vllm.config import ECTransferConfig

    folder = checkpoints.save("qwen3_5", tmp_path / "model")
    speculative = drafters.add_mtp_head(folder)
    given: dict[str, Any] = {"dtype": "bfloat16", "speculative_config": speculative}
    arguments = tokenprune_vllm.engine_args(folder, "uniform", 4, **given)
    config = EngineArgs(**arguments).create_engine_config()
    original = ServerSettings.build(PruningConfig("uniform", 4))
    compact = ServerSettings.build(PruningConfig("uniform", 4, "compact"))
    check_engine(config, original)
    sent = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_consumer")
    config.ec_transfer_config = sent
    with pytest.raises(UnsupportedModelError, match="--ec-transfer-config"):
        check_engine(config, original)
    check_engine(config, compact)
    with pytest.raises(UnsupportedModelError, match="--ec-transfer-config"):
        check_engine(config, compact, known=False)
    config.ec_transfer_config = None
    head = config.speculative_config.draft_model_config.hf_config
    head.mrope_section = list(MARK)
    with pytest.raises(UnsupportedModelError, match="inside an exported checkpoint"):
        check_engine(config, original)
    del head.mrope_section
    head.model_type = "gemma4_mtp"
    with pytest.raises(UnsupportedModelError, match="Gemma 4's own drafter"):
        check_engine(config, original)
    check_engine(config, compact)
