"""`tokenprune eval` end to end on the bundled model: runs that are killed, shared, merged, refused.

Accuracy is worked out again here from what transformers itself says.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

import tokenprune_hf
from tokenprune.cli import main
from tokenprune.media.images import load_image
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_eval.data.load import choose, load_data
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.summary import read_results

COMMAND = (sys.executable, "-m", "tokenprune.cli", "eval")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def evaluate(out: Path, *more: str) -> list[str]:
    """Return the arguments of a small run."""
    return [
        *("--model", "bundled", "--data", "scenes", "--limit", "24", "--batch", "8"),
        *("--method", "cls-attention", "--keep", "0.25", "--out", str(out), *more),
    ]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported what takes it seconds."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        code = main(["eval", *arguments])
    return subprocess.CompletedProcess(arguments, code, printed.getvalue(), errors.getvalue())


def run_alone(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "run"
    done = run_alone(*evaluate(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "no public VLM" in done.stdout
    return out


def answers(folder: Path) -> dict[tuple[str, str], str | None]:
    """Return (condition, item) -> text; a record that comes twice fails."""
    records = read_run(folder).records
    found = {(record.condition, record.item): record.text for record in records}
    assert len(found) == len(records)
    return found


def test_a_draw_says_of_how_many_questions(ran: Path) -> None:
    whole = len(load_data("scenes").questions)
    said = f"24 of {whole:,} questions"
    assert f"## scenes: {said}, 64 visual tokens unpruned" in (ran / "table.md").read_text("utf-8")
    report = (ran / "report.html").read_text("utf-8")
    assert f"{said} of scenes" in report
    assert f"{said}." in report
    (data,) = json.loads((ran / "results.json").read_text("utf-8"))["data"]
    assert (data["questions"], data["of_questions"]) == (24, whole)


def test_accuracy_is_what_transformers_says(ran: Path) -> None:
    items = choose(load_data("scenes"), 24, 0).questions
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    right: Counter[str] = Counter()
    for item in items:
        inputs = tokenprune_hf.ask(processor, item.question, image=load_image(item.path))
        length = inputs["input_ids"].shape[1]
        said = {"unpruned": model.generate(**inputs, max_new_tokens=16, do_sample=False)}
        with tokenprune_hf.prune(model, "cls-attention", 0.25):
            said["cls-attention@0.25"] = model.generate(
                **inputs, max_new_tokens=16, do_sample=False
            )
        for key, output in said.items():
            text = processor.decode(output[0, length:], skip_special_tokens=True).strip()
            assert answers(ran)[key, f"scenes/{item.id}"] == text
            right[key] += text == item.answer
    rows = {row.condition: row for row in read_results(ran).rows}
    assert set(rows) == set(right)
    for key, row in rows.items():
        assert row.accuracy is not None
        assert (row.accuracy.correct, row.answered) == (right[key], 24)
    pruned = rows["cls-attention@0.25"]
    assert (pruned.visual_tokens, pruned.of_visual_tokens) == (16, 64)
    assert pruned.prompt_tokens == pytest.approx((rows["unpruned"].prompt_tokens or 0) - 48)
    assert pruned.peak_bytes is not None
    assert rows["unpruned"].peak_bytes is not None
    assert pruned.peak_bytes < rows["unpruned"].peak_bytes
    assert 0 < (pruned.mass_kept or 0) < 1


def test_one_question_at_a_time_is_asked_under_all_conditions_before_the_next_picture_is(
    tmp_path: Path,
) -> None:
    done = run(*evaluate(tmp_path, "--limit", "30", "--batch", "1"))
    assert done.returncode == 0, done.stderr
    picture_of = {question.id: question.path for question in read_run(tmp_path).questions}
    stretches = [
        (picture, condition)
        for (picture, condition), _ in groupby(
            (picture_of[record.item], record.condition) for record in read_run(tmp_path).records
        )
    ]
    pictures = list(dict.fromkeys(picture for picture, _ in stretches))
    assert len(pictures) > 1
    assert stretches == [
        (picture, condition)
        for picture in pictures
        for condition in ("unpruned", "cls-attention@0.25")
    ]


def test_proportional_attention_is_added_to_a_run_from_before_it_was_a_setting(
    ran: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(ran, out)
    about = json.loads((out / "run.json").read_text("utf-8"))
    for one in (about["settings"], *about["conditions"]):
        del one["proportional_attention"]
    (out / "run.json").write_text(json.dumps(about), "utf-8")
    done = run(*evaluate(out, "--proportional-attention", "both"))
    assert done.returncode == 0, done.stderr
    assert "72 answers, 48 of them known" in done.stdout
    added = "cls-attention@0.25,proportional"
    known = answers(out)
    assert answers(ran).items() <= known.items()
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    right = 0
    for item in choose(load_data("scenes"), 24, 0).questions:
        inputs = tokenprune_hf.ask(processor, item.question, image=load_image(item.path))
        with tokenprune_hf.prune(model, "cls-attention", 0.25, proportional_attention=True):
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = output[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(said, skip_special_tokens=True).strip()
        assert known[added, f"scenes/{item.id}"] == text
        right += text == item.answer
    # Were attention plain, some answers would not be these.
    assert any(
        text != known["cls-attention@0.25", item]
        for (key, item), text in known.items()
        if key == added
    )
    plain, proportional = (
        next(row for row in read_results(out).rows if row.condition == key)
        for key in ("cls-attention@0.25", added)
    )
    assert proportional.accuracy is not None
    assert (proportional.accuracy.correct, proportional.variant) == (right, "proportional")
    assert (plain.variant, plain.visual_tokens) == ("", proportional.visual_tokens)
    assert "| cls-attention, proportional |" in (out / "table.md").read_text("utf-8")
    assert "cls-attention, proportional" in (out / "report.html").read_text("utf-8")
    # Without it the folder goes on as it is.
    done = run(*evaluate(out))
    assert done.returncode == 0, done.stderr
    assert "48 answers, 48 of them known" in done.stdout
    assert answers(out) == known


def test_a_finished_run_asks_nothing_again(ran: Path) -> None:
    before = (ran / "records.jsonl").read_bytes()
    done = run(*evaluate(ran))
    assert done.returncode == 0, done.stderr
    assert "48 answers, 48 of them known" in done.stdout
    assert (ran / "records.jsonl").read_bytes() == before


def test_a_killed_run_loses_and_repeats_nothing(ran: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    kills = 0
    for wanted in (5, 20):
        process = subprocess.Popen(
            [*COMMAND, *evaluate(out, "--batch", "2")],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        records = out / "records.jsonl"
        while process.poll() is None:
            if records.is_file() and records.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait(60)
    assert kills == 2
    kept = records.read_bytes()
    lines = kept.count(b"\n")
    assert 20 <= lines < 48
    # As if the second kill had come in the middle of a line.
    records.write_bytes(kept[: kept.rindex(b"\n") + 1] + b'{"item": "scenes/')
    done = run(*evaluate(out, "--batch", "2"))
    assert done.returncode == 0, done.stderr
    assert f"48 answers, {lines} of them known" in done.stdout
    assert records.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert answers(out) == answers(ran)
    assert read_results(out).complete


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "both"
    asked = evaluate(out, "--limit", "1000")  # so many that the second one starts meanwhile
    first = subprocess.Popen(
        [*COMMAND, *asked],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (out / "run.json").is_file():
            assert first.poll() is None
            time.sleep(0.01)
        second = run(*asked)
        assert first.poll() is None, "the first was to be at work still"
    finally:
        first.kill()
        first.wait(60)
    assert second.returncode == 2
    assert "another run is writing" in second.stderr


def test_a_folder_with_other_settings_is_left_alone(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in ran.iterdir()}
    assert main(["eval", *evaluate(ran, "--max-new-tokens", "3")]) == 2
    assert "other settings (max_new_tokens=16)" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in ran.iterdir()} == before


def test_shards_make_the_whole(ran: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "1", tmp_path / "2"]
    for number, shard in enumerate(shards, 1):
        assert run(*evaluate(shard, "--shard", f"{number}/2")).returncode == 0
    parts = [answers(shard) for shard in shards]
    assert not set(parts[0]) & set(parts[1])
    whole = tmp_path / "whole"
    merged = run("merge", str(whole), *map(str, shards))
    assert merged.returncode == 0, merged.stderr
    assert f"scenes: 24 of {len(load_data('scenes').questions):,} questions" in merged.stdout
    assert answers(whole) == answers(ran)
    of = {row.condition: row.accuracy for row in read_results(ran).rows}
    assert {row.condition: row.accuracy for row in read_results(whole).rows} == of
    twice = run("merge", str(tmp_path / "again"), str(shards[0]), str(shards[0]))
    assert twice.returncode == 2
    assert "Give each part once" in twice.stderr
    assert not (tmp_path / "again").exists()


def test_a_full_disk_ends_the_run_and_loses_nothing(ran: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))

    full = run_alone(*evaluate(out), preexec_fn=small_files)
    assert full.returncode == 2
    assert "cannot be written" in full.stderr
    assert "Make room and run the same command again" in full.stderr
    assert 0 < len(answers(out)) < 48
    done = run(*evaluate(out))
    assert done.returncode == 0, done.stderr
    assert answers(out) == answers(ran)


def own_data(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A data set with a good picture, a missing one, a torn one and a broken video."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    (tmp_path / "no.mp4").write_bytes(b"this is no video")
    question = {"question": "what color is the shape?", "answer": "red"}
    return own_data(
        tmp_path,
        [
            {"video": "no.mp4", **question},
            {"image": "torn.png", **question},
            {"image": "gone.png", **question},
            {"image": "red.png", **question},
            {
                "image": "red.png",
                "question": "what color is the shape? <script>alert(1)</script>",
                "choices": ["<b>red</b>", "blue"],
                "answer": "A",
            },
        ],
    )


def test_what_cannot_be_read_is_recorded_and_ends_nothing(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "bundled", "--data", str(broken), "--out", str(out)]
    arguments += ["--method", "uniform", "--keep", "0.25", "--choose-by", "text"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "6 answers are missing because of errors" in done.stdout
    found = {(record.condition, record.item): record for record in read_run(out).records}
    assert len(found) == 10
    for condition in ("unpruned", "uniform@0.25"):
        errors = [found[condition, f"own/own-{line}"].error for line in (1, 2, 3)]
        for error, name in zip(errors, ("no.mp4", "torn.png", "gone.png"), strict=True):
            assert error is not None
            assert name in error
        assert found[condition, "own/own-4"].text is not None
        assert found[condition, "own/own-5"].text is not None
    (row, _) = read_results(out).rows
    assert (row.questions, row.answered, row.errors) == (5, 2, 3)
    assert "<script>alert" not in (out / "report.html").read_text("utf-8")
    # They count as done, unless they are to be tried again.
    assert "10 answers, 10 of them known" in run(*arguments).stdout
    Image.new("RGB", (64, 64), "red").save(tmp_path / "gone.png")
    again = run(*arguments, "--retry-errors")
    assert "10 answers, 4 of them known" in again.stdout
    assert "4 answers are missing because of errors" in again.stdout


def test_strict_ends_at_the_first_error(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "bundled", "--data", str(broken), "--choose-by", "text"]
    done = run(*arguments, "--out", str(out), "--strict")
    assert done.returncode == 2
    assert "no.mp4" in done.stderr
    assert "--strict" in done.stderr
    assert not (out / "report.html").exists()


def test_validate_says_what_is_missing_and_writes_nothing(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "bundled", "--data", str(broken), "--out", str(out)]
    assert main(["eval", "validate", *arguments]) == 2
    seen = capsys.readouterr()
    assert "gone.png" in seen.err
    assert "5 questions" in seen.out
    assert not out.exists()
    scenes = ["--model", "bundled", "--data", "scenes", "--out", str(out)]
    assert main(["eval", "validate", *scenes, "--method", "divprune"]) == 0
    assert "everything is there" in capsys.readouterr().out


def test_validate_gathers_all_that_is_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "own.jsonl"
    question = '"question": "?", "choices": ["a", "b"], "answer": "B"'
    data.write_text(f'{{"image": "gone.png", {question}}}\n')
    (tmp_path / "file").write_text("no folder")
    arguments = ["--data", str(data), "--method", "cls-attention", "--out", str(tmp_path / "file")]
    cache = ["--cache", str(tmp_path / "file" / "cache")]
    assert main(["eval", "validate", "--model", "bundled", *arguments, *cache]) == 2
    said = capsys.readouterr().err
    assert "4 things are in the way" in said
    assert "gone.png" in said
    assert said.count("nothing can be written to") == 2
    assert "Give another folder with --cache." in said
    assert "no token for the letter B" in said
    assert "--choose-by text" in said
    # What the run itself finds before it loads the weights.
    Image.new("RGB", (20, 20)).save(tmp_path / "gone.png")
    letters = ["--model", "bundled", *arguments[:-1], str(tmp_path / "out")]
    assert main(["eval", *letters]) == 2
    assert "no token for the letter B" in capsys.readouterr().err
    assert main(["eval", "validate", *letters, "--choose-by", "text"]) == 0
    assert not (tmp_path / "out").exists()


def test_validate_finds_a_method_that_the_model_has_nothing_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are not looked at: there are none."""
    from transformers import AutoConfig

    folder = tmp_path / "model"
    shutil.copytree(bundled_model_path(), folder)
    (folder / "model.safetensors").unlink()
    base = ["eval", "validate", "--model", str(folder), "--data", "scenes"]
    base += ["--out", str(tmp_path / "out")]
    assert main([*base, "--method", "divprune"]) == 0
    capsys.readouterr()
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 2
    config.save_pretrained(folder)
    assert main([*base, "--method", "flexselect", "--option", "flexselect.layer=7"]) == 2
    assert "layer" in capsys.readouterr().err
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").unlink()
    assert main([*base, "--method", "divprune"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_validate_refuses_a_folder_of_another_run(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "validate", *evaluate(ran)]) == 0
    assert main(["eval", "validate", *evaluate(ran, "--max-new-tokens", "3")]) == 2
    assert "holds a run with other settings (max_new_tokens=16)" in capsys.readouterr().err


def test_a_disk_without_room_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
    assert main(["eval", *evaluate(tmp_path / "out")]) == 2
    assert "has 3 MiB of room, and 48 answers with their report take" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "0"], "keeps nothing"),
        (["--keep", "many"], "is no number"),
        (["--method", "cls-atention"], "Did you mean 'cls-attention'"),
        (["--option", "layer=3"], "has no option 'layer'"),
        (["--option", "flexselect.layer=3"], "not among the methods"),
        (["--option", "cls-attention.layer=3"], "layer"),
        (["--shard", "3/2"], "i from 1 to n"),
        (["--shard", "half"], "is not I/N"),
        (["--engine", "openai"], "base_url"),
        (["--engine", "openai", "--base-url", "x", "--cache", "y"], "cache needs the engine hf"),
        (
            ["--engine", "openai", "--base-url", "x", "--proportional-attention"],
            "proportional_attention needs the engine hf",
        ),
        (["--proportional-attention", "both", "--dominance", "1"], "that of plain attention"),
        (["--data", "easy-vka"], "easy-vqa"),
        (["--data", "scenes", "scenes"], "two data sets are called 'scenes'"),
        (["--model", "/nowhere"], "cannot be loaded"),
        (["--config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_wrong_arguments_stop_before_the_work(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *evaluate(tmp_path / "out", *more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "records.jsonl").exists() or not answers(tmp_path / "out")


def test_settings_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    text = "model: bundled\ndata: [scenes]\nmethod: [uniform]\nkeep: [50%, 8]\nlimit: 7\nout: out\n"
    file.write_text(text, "utf-8")
    assert main(["eval", "validate", "--config", str(file), "--limit", "5"]) == 0
    seen = capsys.readouterr().out
    assert "5 questions under 3 conditions: unpruned, uniform@0.5, uniform@8" in seen
    file.write_text(text + "proportional_attention: both\n", "utf-8")
    assert main(["eval", "validate", "--config", str(file)]) == 0
    seen = " ".join(capsys.readouterr().out.split())
    assert "uniform@0.5, uniform@0.5,proportional, uniform@8, uniform@8,proportional" in seen
    each = text.replace("[scenes]", "[scenes, easy-vqa]").replace("7", "{easy-vqa: 9}")
    file.write_text(each, "utf-8")
    assert main(["eval", "validate", "--config", str(file)]) == 0
    seen = capsys.readouterr().out
    assert "scenes: 2,600 questions" in seen
    assert "easy-vqa: 9 questions" in seen
    for wrong, reason in (
        ("{easy-vqas: 9}", "limit names the data set 'easy-vqas', which is not among those"),
        ("{easy-vqa: 0}", "a limit is a number of questions, at least 1"),
        ("0", "a limit is a number of questions, at least 1"),
    ):
        file.write_text(each.replace("{easy-vqa: 9}", wrong), "utf-8")
        assert main(["eval", "validate", "--config", str(file)]) == 2
        assert reason in capsys.readouterr().err
    file.write_text(text + "metod: [uniform]\n", "utf-8")
    assert main(["eval", "validate", "--config", str(file)]) == 2
    assert "metod is no setting. Did you mean 'method'?" in capsys.readouterr().err


def test_a_model_without_letters_says_so_before_any_answer(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    data = own_data(
        tmp_path,
        [{"image": "red.png", "question": "which?", "choices": ["red", "blue"], "answer": "A"}],
    )
    out = tmp_path / "out"
    done = run("--model", "bundled", "--data", str(data), "--out", str(out))
    assert done.returncode == 2
    assert "no token for the letter" in done.stderr
    assert "--choose-by text" in done.stderr
    assert not (out / "run.json").exists()  # nothing was begun


def test_questions_about_several_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = list(dict.fromkeys(one.path for one in load_data("scenes").questions))[:3]
    for number, picture in enumerate(pictures):
        load_image(picture).save(tmp_path / f"{number}.png")
    asked = [
        {
            "images": [f"{a}.png", f"{b}.png"],
            "question": "what color is the digit?",
            "answer": "red",
        }
        for a, b in ((0, 1), (1, 0), (2, 1))
    ]
    data = own_data(tmp_path, asked)
    out = tmp_path / "out"
    methods = ("divprune", "flexselect")
    more = ("--model", "bundled", "--data", str(data), "--batch", "2", "--keep", "0.125")
    assert main(["eval", *more, "--method", *methods, "--out", str(out)]) == 0
    known = answers(out)
    assert len(known) == 9
    model, processor = tokenprune_hf.load(str(bundled_model_path()))
    for number, one in enumerate(asked, 1):
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": one["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [load_image(tmp_path / name) for name in one["images"]]
        inputs = dict(processor(text=[text], images=images, return_tensors="pt"))
        for method in methods:
            with tokenprune_hf.prune(model, method, 0.125) as pruning:
                output = model.generate(
                    **inputs, video_frames=[1, 1], max_new_tokens=16, do_sample=False
                )
            assert [len(kept) for kept in pruning.selections] == [8, 8]
            said = output[0, inputs["input_ids"].shape[1] :]
            said = processor.decode(said, skip_special_tokens=True).strip()
            assert known[f"{method}@0.125", f"{data.stem}/{data.stem}-{number}"] == said
    rows = read_results(out).rows
    assert {(row.visual_tokens, row.of_visual_tokens) for row in rows} == {(128, 128), (16, 128)}
    server = ("--engine", "openai", "--base-url", "http://127.0.0.1:1/v1")
    assert main(["eval", *more, *server, "--out", str(tmp_path / "other")]) == 2
    refused = capsys.readouterr().err
    assert "3 questions of own are about several images, for example own-1" in refused
