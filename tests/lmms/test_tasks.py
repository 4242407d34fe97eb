"""lmms-eval's own command on tasks of ours: its answers are those of tokenprune_hf, one by one.

scripts/setup-lmms makes the environment that the command runs in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tokenprune_hf
from tokenprune.media.images import load_image
from tokenprune_eval.bundled import needles, scenes
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.bundled.questions import Question

from .there import run_there

SCENES, VIDEOS, FRAMES = 20, 3, 8
NEW_TOKENS = 6


@dataclass
class Work:
    """Where lmms-eval is started, and the questions that lie there."""

    folder: Path
    scenes: list[Question]
    needles: list[needles.VideoQuestion]

    def evaluate(self, model_args: str, out: str) -> dict[str, Any]:
        """Run both tasks and return results.json, with the logged answers under ``"answers"``."""
        said = run_there(
            "lmms-eval",
            *("--model", "tokenprune_hf", "--model_args", model_args),
            *("--include_path", str(Path(__file__).with_name("tasks"))),
            *("--tasks", "tokenprune_scenes,tokenprune_needles"),
            *("--limit", str(SCENES), "--log_samples", "--output_path", out),
            folder=self.folder,
        )
        found = list((self.folder / out).rglob("*_results.json"))
        assert len(found) == 1, said
        results: dict[str, Any] = json.loads(found[0].read_text("utf-8"))
        results["answers"] = {}
        for name in ("tokenprune_scenes", "tokenprune_needles"):
            (file,) = (self.folder / out).rglob(f"*_samples_{name}.jsonl")
            lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            lines.sort(key=lambda line: int(line["doc_id"]))
            results["answers"][name] = [line["filtered_resps"].strip() for line in lines]
        return results


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("lmms")
    asked = scenes.load_scenes()[:: len(scenes.load_scenes()) // SCENES][:SCENES]
    videos = needles.needle_set(
        folder, videos=VIDEOS, frames=32, types=("kind", "color"), fashion=None
    )
    for name, rows in (
        ("scenes", [(q.question, q.answer, {"image": str(q.image)}) for q in asked]),
        ("needles", [(q.question, q.answer, {"video": str(q.video)}) for q in videos]),
    ):
        lines = [json.dumps({"question": q, "answer": a, **media}) for q, a, media in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return Work(folder, asked, videos)


def answer_to(model: Any, processor: Any, question: str, **media: Any) -> str:
    inputs = tokenprune_hf.ask(processor, question, **media)
    if "generate" not in vars(model):
        inputs.pop("video_frames", None)  # a model that is not pruned does not know it
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = processor.decode(new, skip_special_tokens=True)
    return text.strip()


def answers(work: Work, model: Any, processor: Any) -> dict[str, list[str]]:
    return {
        "tokenprune_scenes": [
            answer_to(model, processor, q.question, image=load_image(q.image)) for q in work.scenes
        ],
        "tokenprune_needles": [
            answer_to(model, processor, q.question, video=tokenprune_hf.read_video(q.video, FRAMES))
            for q in work.needles
        ],
    }


def check(work: Work, results: dict[str, Any], expected: dict[str, list[str]]) -> None:
    assert results["answers"] == expected
    truth = {
        "tokenprune_scenes": [q.answer for q in work.scenes],
        "tokenprune_needles": [q.answer for q in work.needles],
    }
    for name, texts in expected.items():
        right = [text == answer for text, answer in zip(texts, truth[name], strict=True)]
        accuracy = results["results"][name]["exact_match,none"]
        assert accuracy == pytest.approx(sum(right) / len(right))


def test_unpruned_is_the_plain_model(work: Work) -> None:
    results = work.evaluate(
        f"pretrained=bundled,method=cls-attention,keep=1.0,max_frames_num={FRAMES}", "plain"
    )
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    expected = answers(work, model, processor)
    check(work, results, expected)
    # Wrong pictures, or another order of them, would hardly give right answers.
    assert results["results"]["tokenprune_scenes"]["exact_match,none"] >= 0.8


def test_pruned_is_tokenprune_hf(work: Work) -> None:
    results = work.evaluate(
        f"pretrained=bundled,method=cls-attention,keep=0.25,max_frames_num={FRAMES},"
        "positions=compact",
        "pruned",
    )
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    with tokenprune_hf.prune(model, "cls-attention", 0.25, "compact"):
        check(work, results, answers(work, model, processor))
    of_visual = (64 * SCENES + 64 * FRAMES * len(work.needles)) / (SCENES + len(work.needles))
    assert results["throughput"]["avg_of_visual_tokens"] == pytest.approx(of_visual)
    assert results["throughput"]["avg_visual_tokens"] == pytest.approx(of_visual / 4)
