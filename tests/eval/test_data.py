"""Data sets read from small files in the schemas of the published ones, and what is refused.

The files are written here in the columns and words of the authors' files; what is expected is
written out by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]
import pytest
from PIL import Image

from tokenprune.media.video import read_video
from tokenprune_eval.bundled import scenes
from tokenprune_eval.data.choose import choose, missing_media
from tokenprune_eval.data.errors import DataSetError
from tokenprune_eval.data.load import data_sets, load_data
from tokenprune_eval.data.question import DataSet, Question


def _video(file: Path, level: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(file, "w") as container:
        stream = cast(Any, container.add_stream("libx264", rate=5))
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            picture = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file


def _lines(file: Path, rows: Iterable[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in text), "utf-8")
    return file


def _json(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


def _refused(spec: object, **more: Any) -> str:
    with pytest.raises(DataSetError) as caught:
        load_data(str(spec), **more)
    return str(caught.value)


# --- the published sets -------------------------------------------------------------------------


def _mme(number: int = 1, **changed: Any) -> dict[str, Any]:
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=-gZ4q",
        "videoID": "-gZ4q",
        "question_id": f"001-{number}",
        "task_type": "Counting Problem",
        "question": "Which of these is on the tree most often?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. A. Three kinds."],
        "answer": "C",
    }
    return row | changed


def _mme_file(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file = folder / "videomme" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def test_video_mme(tmp_path: Path) -> None:
    second = _mme(2, answer="A", options=["A. 4.", "B.9", "C. 5.", "Thirteen"], videoID="abc")
    file = _mme_file(tmp_path, [_mme(), second])
    here = _video(tmp_path / "data" / "-gZ4q.mkv")
    read = load_data(str(file))
    assert read.name == "video-mme"
    assert read.questions == (
        Question(
            id="001-1",
            kind="video",
            path=here,
            question="Which of these is on the tree most often?",
            answer="C",
            choices=("Apples.", "Candles.", "Berries.", "A. Three kinds."),
            type="Counting Problem",
        ),
        Question(
            id="001-2",
            kind="video",
            path=tmp_path / "data" / "abc.mp4",
            question="Which of these is on the tree most often?",
            answer="A",
            choices=("4.", "9", "5.", "Thirteen"),
            type="Counting Problem",
        ),
    )
    assert missing_media(read) == [tmp_path / "data" / "abc.mp4"]
    assert load_data(f"video-mme:{file}") == read
    other = tmp_path / "elsewhere"
    _video(other / "abc.mp4")
    assert load_data(str(file), media=other).questions[1].path == other / "abc.mp4"


def test_video_mme_refused(tmp_path: Path) -> None:
    rows = [
        _mme(1, answer="E"),
        _mme(2, options=["A. a", "C. b", "B. c", "D. d"]),
        _mme(3, videoID="../../etc/passwd"),
        _mme(4),
        _mme(4),
        _mme(6, answer=None),
    ]
    message = _refused(_mme_file(tmp_path / "bad", rows))
    assert "5 problems" in message
    assert "row 1 (001-1): the answer 'E' is no letter from A to D" in message
    assert "row 2 (001-2): option B is lettered C" in message
    assert "row 3 (001-3)" in message
    assert "leads out of the media folder" in message
    assert "row 5: the id '001-4' is that of row 4 too" in message
    assert "row 6 (001-6): the answer '' is no letter" in message

    message = _refused(_mme_file(tmp_path / "test", [_mme(answer=None)]))
    assert "holds no answers" in message

    lacking = _mme_file(tmp_path / "lacking", [{"videoID": "a", "question": "?", "extra": 1}])
    message = _refused(f"video-mme:{lacking}")
    assert "answer, options, question_id, task_type missing" in message
    assert "extra, question, videoID found" in message
    message = _refused(lacking)
    assert "in none of the known formats" in message
    assert "extra, question, videoID" in message
    assert all(f"\n  {name.removesuffix(':PATH')}: " in message for name in list(data_sets())[3:])

    fake = tmp_path / "fake.parquet"
    fake.write_text("PAR1 this is not")
    assert "no parquet file" in _refused(fake)


def _mlvu(video: str, **changed: Any) -> dict[str, Any]:
    row = {
        "video": video,
        "duration": 665.3,
        "question": "How often does the scene 'playing trombone' occur?",
        "candidates": ["2", "1", "5", "4"],
        "answer": "1",
        "question_type": "count",
    }
    return row | changed


def test_mlvu(tmp_path: Path) -> None:
    folder = tmp_path / "MLVU" / "json"
    videos = tmp_path / "MLVU" / "video"
    order = _mlvu(
        "order_1.mp4",
        question="In which order?",
        candidates=["1->2", "2->1"],
        answer="2->1",
        question_type="order",
    )
    summary = _mlvu("9.mp4", answer="A man walks.", question_type="summary")
    del summary["candidates"]
    _json(folder / "5_order.json", [order])
    _json(folder / "4_count.json", [_mlvu("count_2.mp4"), _mlvu("count_1.mp4", answer="4")])
    _json(folder / "9_summary.json", [summary])
    _video(videos / "4_count" / "count_1.mp4")
    (videos / "order").mkdir()

    read = load_data(str(folder))
    assert read.name == "mlvu"
    told = [
        (item.id, item.path.relative_to(videos), item.answer, item.type) for item in read.questions
    ]
    assert told == [
        ("4_count-1", Path("4_count/count_2.mp4"), "B", "count"),
        ("4_count-2", Path("4_count/count_1.mp4"), "D", "count"),
        ("5_order-1", Path("order/order_1.mp4"), "B", "order"),
    ]
    assert read.questions[0].choices == ("2", "1", "5", "4")
    assert missing_media(read) == [read.questions[0].path, read.questions[2].path]

    # Of equal candidates the authors' scripts take the last.
    equal = _mlvu("a.mp4", candidates=["1", "2", "1", "3"])
    assert load_data(str(_json(tmp_path / "4_count.json", [equal]))).questions[0].answer == "C"

    (asked,) = load_data(str(folder / "9_summary.json")).questions
    assert (asked.choices, asked.answer) == ((), "A man walks.")


def test_mlvu_test_split(tmp_path: Path) -> None:
    questions = [_mlvu("t1.mp4", question_id="AC_0"), _mlvu("t2.mp4", question_id="AC_1")]
    for entry in questions:
        del entry["answer"]
    file = _json(tmp_path / "test_multi_choice_tasks.json", questions)
    message = _refused(file)
    assert "holds no answers" in message
    assert "test_mcq_gt.json" in message

    truth = [
        _mlvu("t2.mp4", question_id="AC_1", answer="5"),
        {"question_id": "AC_0", "answer": "2"},
    ]
    answers = _json(tmp_path / "test-ground-truth" / "test_mcq_gt.json", truth)
    (tmp_path / "MLVU_Test" / "video").mkdir(parents=True)
    read = load_data(str(file), answers=answers)
    assert [(item.id, item.answer) for item in read.questions] == [("AC_0", "A"), ("AC_1", "C")]
    assert read.questions[0].path == tmp_path / "MLVU_Test" / "video" / "t1.mp4"
    alone = _json(tmp_path / "test-ground-truth" / "mcq.json", truth[:1])
    assert load_data(str(alone)).questions[0].path == read.questions[1].path

    half = _json(tmp_path / "half.json", {"AC_1": "5"})
    assert "entry 1: the question 'AC_0' has no answer" in _refused(file, answers=half)
    twice = _json(tmp_path / "twice.json", [truth[1], truth[1], {"answer": "2"}])
    message = _refused(file, answers=twice)
    assert "entry 2: the id 'AC_0' is there twice" in message
    assert "entry 3: an id" in message


def test_mlvu_refused(tmp_path: Path) -> None:
    entries = [
        _mlvu("a.mp4", answer="3"),
        _mlvu("/etc/passwd"),
        _mlvu("a.mp4", candidates=["1"]),
        {"video": "a.mp4", "question_type": "count", "answer": "1"},
    ]
    message = _refused(_json(tmp_path / "4_count.json", entries))
    assert "4 problems" in message
    assert "entry 1: the answer '3' is none of the candidates ['2', '1', '5', '4']" in message
    assert "entry 2: the path '/etc/passwd' leads out of the media folder" in message
    assert "entry 3: 2 to 26 choices are needed, got 1" in message
    assert "entry 4: the key 'question' is missing" in message
    assert "JSON dict" in _refused(f"mlvu:{_json(tmp_path / 'object.json', {})}")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"video": "a.mp4",]')
    assert "no JSON" in _refused(broken)
    (tmp_path / "empty").mkdir()
    assert "no JSON files" in _refused(f"mlvu:{tmp_path / 'empty'}")


def _lvb(number: int = 0, **changed: Any) -> dict[str, Any]:
    entry = {
        "video_id": "86CxyhFV9MI",
        "question": "What is the woman wearing?",
        "question_wo_referring_query": "What is she wearing?",
        "candidates": ["yellow", "green", "blue", "red", "black"],
        "correct_choice": 4,
        "position": [854, 948],
        "topic_category": "NP-News-Programs",
        "question_category": "T2A",
        "level": "L1-Perception",
        "id": f"86CxyhFV9MI_{number}",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration_group": 600,
        "starting_timestamp_for_subtitles": 0,
        "duration": 190.16,
        "view_count": 259852,
    }
    return entry | changed


def test_longvideobench(tmp_path: Path) -> None:
    first, second = _lvb(0), _lvb(1, candidates=["a", "b", "c", "d"], correct_choice=0)
    file = _json(tmp_path / "lvb_val.json", [first, second])
    video = _video(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    read = load_data(str(file))
    assert read.name == "longvideobench"
    assert read.questions[0] == Question(
        id="86CxyhFV9MI_0",
        kind="video",
        path=video,
        question="What is the woman wearing?",
        answer="E",
        choices=("yellow", "green", "blue", "red", "black"),
        type="T2A",
    )
    assert (read.questions[1].answer, len(read.questions[1].choices)) == ("A", 4)
    assert missing_media(read) == []

    for entry in (first, second):
        del entry["correct_choice"]
    test = _json(tmp_path / "lvb_test_wo_gt.json", [first, second])
    message = _refused(test)
    assert "correct_choice" in message
    assert "lvb_val.json" in message
    answers = _json(tmp_path / "mine.json", {"86CxyhFV9MI_0": "green", "86CxyhFV9MI_1": "D"})
    read = load_data(str(test), answers=answers)
    assert [item.answer for item in read.questions] == ["B", "D"]

    bad = [_lvb(0, correct_choice=5), _lvb(1, correct_choice=True), _lvb(2), _lvb(2)]
    message = _refused(_json(tmp_path / "bad.json", bad))
    assert "entry 1 (86CxyhFV9MI_0): correct_choice must be 0 to 4, got 5" in message
    assert "entry 2: correct_choice" in message
    assert "entry 4: the id '86CxyhFV9MI_2' is that of entry 3 too" in message


def _lvbench(key: str, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"key": key, "type": "cartoon", "video_info": {"fps": 25}, "qa": list(questions)}


def _qa(uid: str, **changed: Any) -> dict[str, Any]:
    asked = {
        "uid": uid,
        "question": "What year appears?\n(A) 1636\n(B) 1366 (B) or\nso\n(C) 1363\n(D) 1633",
        "answer": "D",
        "question_type": ["key information retrieval"],
        "time_reference": "00:15-00:19",
    }
    return asked | changed


def test_lvbench(tmp_path: Path) -> None:
    types = ["reasoning", "event understanding"]
    rows = [
        _lvbench("Cm73", [_qa("55"), _qa("56", question_type=types)]),
        _lvbench("x", [_qa("7")]),
    ]
    file = _lines(tmp_path / "video_info.meta.jsonl", [*rows, ""])
    video = _video(tmp_path / "videos" / "Cm73.mp4")
    read = load_data(str(file))
    assert read.name == "lvbench"
    assert read.questions[0] == Question(
        id="55",
        kind="video",
        path=video,
        question="What year appears?",
        answer="D",
        choices=("1636", "1366 (B) or\nso", "1363", "1633"),
        type="key information retrieval",
    )
    assert read.questions[1].type == "event understanding, reasoning"
    assert missing_media(read) == [tmp_path / "videos" / "x.mp4"]

    bad = [
        _qa("1", question="What?\n(A) a\n(C) b"),
        _qa("2", question="What?"),
        _qa("3", answer="E"),
        _qa("4", question="(A) a\n(B) b", answer="A"),
        _qa("5"),
        _qa("5"),
    ]
    message = _refused(_lines(tmp_path / "bad.jsonl", [_lvbench("Cm73", bad)]))
    assert "question 1 (uid 1): lines with (A), (B), ... in this order" in message
    assert "got A, C" in message
    assert "question 2 (uid 2)" in message
    assert "question 3 (uid 3): the answer 'E' is no letter from A to D" in message
    assert "question 4 (uid 4): there is no question" in message
    assert "question 6 (uid 5): the id '5' is that of line 1, question 5 (uid 5) too" in message

    asked = _qa("1")
    del asked["answer"]
    hidden = _lines(tmp_path / "hidden.jsonl", [_lvbench("Cm73", [asked])])
    assert "holds no answers" in _refused(hidden)


# --- tokenprune's own format --------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "media" / "a.png")
    _video(tmp_path / "media" / "b.mp4", 200)
    rows = [
        {"image": "media/a.png", "question": "Colour?", "answer": "black"},
        "",
        {
            "video": "media/../media/b.mp4",
            "question": "Colour?",
            "choices": ["black", "grey", "white"],
            "answer": "B",
            "type": "colour",
            "id": "the second",
            "times": [0, 0.5],
        },
        {"video": "b.mp4", "question": "Line\u2028break?", "choices": ["A", "B"], "answer": "B"},
        {"video": "b.mp4", "question": "?", "choices": ["yes", "no"], "answer": "no"},
        {"images": ["media/a.png", "c.png"], "question": "Colours?", "answer": "black"},
        {"image": "media/a.png", "question": "?", "answer": "x", "evidence": [[0, 1, 4, 8]]},
    ]
    file = _lines(tmp_path / "own.jsonl", rows)
    # A byte order mark, and characters that are not escaped.
    file.write_text("\ufeff" + file.read_text().replace("\\u2028", "\u2028"), "utf-8")
    read = load_data(str(file))
    assert read.name == "own"
    assert read.questions[0] == Question(
        "own-1", "image", tmp_path / "media" / "a.png", "Colour?", "black"
    )
    assert read.questions[1] == Question(
        id="the second",
        kind="video",
        path=tmp_path / "media" / "b.mp4",
        question="Colour?",
        answer="B",
        choices=("black", "grey", "white"),
        type="colour",
        times=(0.0, 0.5),
    )
    assert [item.answer for item in read.questions] == ["black", "B", "B", "B", "black", "x"]
    several, boxes = read.questions[4:]
    assert several.kind == "image"
    assert several.paths == (tmp_path / "media" / "a.png", tmp_path / "c.png")
    assert boxes.evidence == ((0, 1, 4, 8),)
    assert read.questions[2].question == "Line\u2028break?"
    assert missing_media(read) == [tmp_path / "b.mp4", tmp_path / "c.png"]
    assert len(read_video(read.questions[1].path, frames=2).frames) == 2
    moved = _lines(tmp_path / "x" / "own.jsonl", rows[3:5])
    assert missing_media(load_data(str(moved), media=tmp_path / "media")) == []


def test_every_wrong_line_is_told(tmp_path: Path) -> None:
    good = {"video": "a.mp4", "question": "?", "answer": "x"}
    choice = good | {"choices": ["one", "two"]}
    rows: list[object] = [
        good,
        '{"video": "a.mp4", "question"',
        "[1]",
        good | {"anwser": "y"},
        {"video": "a.mp4", "answer": "x"},
        good | {"image": "a.png"},
        {"question": "?", "answer": "x"},
        choice | {"answer": "three"},
        choice | {"answer": "C"},
        choice | {"answer": 1},
        good | {"choices": ["B", "A"], "answer": "A"},
        choice | {"choices": ["one", "one"], "answer": "A"},
        good | {"times": [2, 1]},
        good | {"times": [-1]},
        {"image": "a.png", "question": "?", "answer": "x", "times": [1]},
        good | {"video": "../a.mp4"},
        good | {"video": "/etc/passwd"},
        good | {"id": "own-1"},
        '{"video": "a.mp4", "question": "?", "answer": "x", "answer": "y"}',
        good | {"question": " "},
        good | {"evidence": [[0, 0, 1, 1]]},
    ]
    wanted = {
        2: "no JSON",
        3: "a JSON object is needed, got list",
        4: "unknown key 'anwser'. Did you mean 'answer'?",
        5: "the key 'question' is missing",
        6: "one of the keys 'image', 'video' and 'images' is needed, and image and video are there",
        7: "one of the keys 'image', 'video' and 'images' is needed, and none is there",
        8: "the answer 'three' is none of the choices. Give a letter, A to B",
        9: "the answer 'C' is none of the choices",
        10: "answer: text is needed, got the number 1",
        11: "the answer 'A' could be A ('B') and B ('A')",
        12: "choices: 'one' is there more than once",
        13: "times: each must be later than the one before",
        14: "times.0: input should be greater than or equal to 0",
        15: "'times' are for videos",
        16: f"the path '../a.mp4' leads out of the media folder {tmp_path}",
        17: "the path '/etc/passwd' leads out of the media folder",
        18: "the id 'own-1' is that of line 1 too",
        19: "the key 'answer' stands twice in one object",
        20: "question: is empty",
        21: "'evidence' is for a single image",
    }
    message = _refused(_lines(tmp_path / "own.jsonl", rows))
    assert message.startswith(f"{tmp_path / 'own.jsonl'} cannot be used, 20 problems:")
    told = dict(re.findall(r"\n  line (\d+): (.*)", message))
    assert sorted(map(int, told)) == sorted(wanted)
    for line, text in wanted.items():
        assert text in told[str(line)], line


def test_twenty_problems_are_shown(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "question": "?", "answer": "x", "choices": ["one", "two"]}
    message = _refused(_lines(tmp_path / "own.jsonl", [row] * 33))
    assert message.count("\n  line ") == 20
    assert message.endswith("and 13 more")


def test_paths_in_the_media_folder(tmp_path: Path) -> None:
    # An absolute path into the folder is one of its files; a link in it may lead elsewhere; and a
    # folder whose name only begins the same is another one.
    media = tmp_path / "media"
    media.mkdir()
    elsewhere = _video(tmp_path / "disk" / "b.mp4")
    (media / "link").symlink_to(elsewhere.parent)
    row = {"question": "?", "answer": "x"}
    names = [str(media / "a.mp4"), "link/b.mp4", "sub/../c.mp4"]
    good = _lines(tmp_path / "good.jsonl", [row | {"video": name} for name in names])
    read = load_data(str(good), media=media)
    assert [item.path for item in read.questions] == [
        media / "a.mp4",
        media / "link" / "b.mp4",
        media / "c.mp4",
    ]
    assert missing_media(read) == [media / "a.mp4", media / "c.mp4"]
    names = [f"{media}-2/a.mp4", "sub/../../a.mp4", ".", "a\0.mp4"]
    bad = _lines(tmp_path / "bad.jsonl", [row | {"video": name} for name in names])
    assert "4 problems" in _refused(bad, media=media)


# --- what is asked for --------------------------------------------------------------------------


def test_unknown_and_ambiguous(tmp_path: Path) -> None:
    assert "Did you mean 'scenes'?" in _refused("scense")
    assert "Did you mean 'video-mme'?" in _refused("videomme:test.parquet")
    assert "does not exist" in _refused(tmp_path / "missing.jsonl")
    assert "does not exist" in _refused("missing.jsonl")
    assert "'missing.json' does not exist" in _refused("mlvu:missing.json")
    assert "does not exist" in _refused("mlvu:")
    assert "is a folder, and lvbench needs a file" in _refused(f"lvbench:{tmp_path}")
    assert "in none of the known formats" in _refused(tmp_path)
    assert "in none of the known formats" in _refused(_lines(tmp_path / "a.txt", ["x"]))
    row = {"video": "a.mp4", "question": "?", "answer": "x"}
    both = _lines(tmp_path / "both.jsonl", [row | {"key": "a", "qa": []}])
    assert "could be jsonl or lvbench" in _refused(both)
    mixed = _mlvu("a.mp4") | _lvb()
    assert "could be mlvu or longvideobench" in _refused(_json(tmp_path / "both.json", [mixed]))
    own = _lines(tmp_path / "own.jsonl", [row])
    assert "has no split 'train'" in _refused(own, split="train")
    assert "for longvideobench and mlvu" in _refused(own, answers=own)
    assert "media folder" in _refused(own, media=tmp_path / "nowhere")
    assert "in none of the known formats" in _refused(_lines(tmp_path / "empty.jsonl", []))
    assert "holds no questions" in _refused(f"jsonl:{tmp_path / 'empty.jsonl'}")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"question": "\xe4"}')
    assert "no UTF-8" in _refused(latin)


def test_bundled_sets(tmp_path: Path) -> None:
    read = load_data("scenes", media=tmp_path)
    source = scenes.load_scenes()
    assert len(read.questions) == len(source) == 2600
    assert {item.type for item in read.questions} == set(scenes.TYPES)
    assert (read.questions[7].question, read.questions[7].answer) == (
        source[7].question,
        source[7].answer,
    )
    assert missing_media(read) == []
    assert "no split 'train'" in _refused("scenes", split="train")
    easy = load_data("easy-vqa")
    assert len(easy.questions) == 9673
    assert {item.type for item in easy.questions} == {"yes/no", "shape", "color"}
    assert load_data("easy-vqa", split="train").name == "easy-vqa-train"
    assert "Did you mean 'test'?" in _refused("easy-vqa", split="tests")
    assert "comes with its answers" in _refused("scenes", answers=tmp_path)


@pytest.mark.skipif(not scenes.FASHION_FOLDER.is_dir(), reason="Fashion-MNIST is missing")
def test_needles(tmp_path: Path) -> None:
    read = load_data("needles", work=tmp_path, needle_videos=1)
    assert [item.type for item in read.questions] == ["kind", "color", "place", "exists"]
    assert all(item.kind == "video" and not item.choices for item in read.questions)
    assert missing_media(read) == []
    assert tmp_path in read.questions[0].path.parents


def test_listing_needs_no_heavy_package() -> None:
    code = (
        "import sys; from tokenprune_eval.data.load import data_sets; print(*data_sets());"
        "print(sorted({'torch', 'pyarrow', 'PIL', 'av'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    names, heavy = output.decode().splitlines()
    assert names.split()[:3] == ["easy-vqa", "scenes", "needles"]
    assert {name.removesuffix(":PATH") for name in names.split()[3:]} == {
        "jsonl",
        "ocrbench",
        "textvqa",
        "docvqa",
        "pope",
        "refcoco",
        "mmmu",
        "mmbench",
        "tallyqa",
        "video-mme",
        "mlvu",
        "longvideobench",
        "lvbench",
    }
    assert heavy == "[]"


# --- choosing -----------------------------------------------------------------------------------


def _set() -> DataSet:
    """Thirty files with one to four questions each, not lying together."""
    counts = [1 + (7 * number) % 4 for number in range(30)]
    asked = [(turn, number) for turn in range(4) for number in range(30) if turn < counts[number]]
    items = [
        Question(f"{number}-{turn}", "video", Path(f"/v/{number}.mp4"), "?", "x")
        for turn, number in asked
    ]
    return DataSet("thirty", tuple(items))


def test_a_draw() -> None:
    whole = _set()
    position = {item.id: number for number, item in enumerate(whole.questions)}
    assert choose(whole, None, 0).questions == whole.questions
    assert choose(whole, 10**6, 0).questions == whole.questions
    drawn_before: set[str] = set()
    for limit in (1, 2, 7, 20, 40):
        drawn = choose(whole, limit, 3)
        assert drawn.name == "thirty"
        assert len(drawn.questions) == limit
        places = [position[item.id] for item in drawn.questions]
        assert places == sorted(places)
        ids = {item.id for item in drawn.questions}
        assert drawn_before <= ids
        drawn_before = ids
        # At most one file is not there whole, and of that one the first questions are.
        cut = 0
        for path in {item.path for item in drawn.questions}:
            own = [item for item in whole.questions if item.path == path]
            taken = [item for item in drawn.questions if item.path == path]
            assert taken == own[: len(taken)]
            cut += len(taken) < len(own)
        assert cut <= 1
        assert choose(whole, limit, 3) == drawn
    assert choose(whole, 20, 3).questions != choose(whole, 20, 4).questions


def test_every_file_is_drawn_as_often() -> None:
    whole = _set()
    first = [choose(whole, 1, seed).questions[0].path for seed in range(3000)]
    counts = [first.count(Path(f"/v/{number}.mp4")) for number in range(30)]
    # Binomial, 3000 draws at 1/30: mean 100, standard deviation 9.8.
    assert min(counts) > 60
    assert max(counts) < 140


@pytest.mark.parametrize("limit", [None, 25])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_shards(limit: int | None, parts: int) -> None:
    whole = _set()
    drawn = choose(whole, limit, 5)
    shards = [choose(whole, limit, 5, (part, parts)).questions for part in range(1, parts + 1)]
    together = [item for shard in shards for item in shard]
    assert sorted(item.id for item in together) == sorted(item.id for item in drawn.questions)
    files = [{item.path for item in shard} for shard in shards]
    assert sum(map(len, files)) == len({item.path for item in drawn.questions})
    assert max(map(len, files)) - min(map(len, files)) <= 1
    for shard in shards:
        assert list(shard) == [item for item in drawn.questions if item in shard]


def test_what_cannot_be_chosen() -> None:
    whole = _set()
    with pytest.raises(DataSetError, match="at least 1, got 0"):
        choose(whole, 0, 0)
    for shard in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(DataSetError, match="i from 1 to n"):
            choose(whole, None, 0, shard)
