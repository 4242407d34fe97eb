"""Small rendered files in the formats of published image sets: read, refused, and run to the end.

Pictures are drawn here, with the text that is asked about; columns are those of published files.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]
import pytest

pytest.importorskip("statsmodels", reason="the results need the extra `eval`")

from PIL import Image, ImageDraw

from tests.eval.test_openai import Quiet
from tokenprune import cli
from tokenprune.errors import ConfigError
from tokenprune_eval.data.errors import DataSetError
from tokenprune_eval.data.load import load_data
from tokenprune_eval.data.pictures import Pictures
from tokenprune_eval.data.question import DataSet, Question
from tokenprune_eval.evaluation import runner
from tokenprune_eval.evaluation.checks import check_before_model
from tokenprune_eval.evaluation.engines.base import Done, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.runner import run
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.compare import compare, comparison_markdown
from tokenprune_eval.results.files import read_run
from tokenprune_eval.results.records import UNPRUNED, Condition
from tokenprune_eval.results.summary import Results, Row, read_results

SHORT = "Answer the question using a single word or phrase."


# Files ------------------------------------------------------------------------------------------


def drawn(text: str, color: str = "white", size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a PNG with a text."""
    picture = Image.new("RGB", size, color)
    ImageDraw.Draw(picture).text((4, 16), text, fill="black")
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def embedded(text: str, **more: Any) -> dict[str, Any]:
    """Return a picture as parquet files of the hub hold it."""
    return {"bytes": drawn(text, **more), "path": ""}


def saved(file: Path, text: str, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(drawn(text, **more))
    return file


def as_parquet(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def as_json(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


def as_lines(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def as_tsv(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return file


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have pictures out of files written into a folder of the test."""
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(spec: object, **more: Any) -> str:
    with pytest.raises(DataSetError) as caught:
        load_data(str(spec), **more)
    return str(caught.value)


def ocr(number: int = 1, **changed: Any) -> dict[str, Any]:
    entry = {
        "dataset_name": "IIIT5K",
        "id": 2843,
        "image_path": f"IIIT5K/test/{number}.png",
        "question": "what is written in the image?",
        "answers": "CENTRE",
        "type": "Regular Text Recognition",
    }
    return entry | changed


def ocr_row(text: str, **changed: Any) -> dict[str, Any]:
    row = {
        "dataset": "IIIT5K",
        "question": "what is written in the image?",
        "question_type": "Regular Text Recognition",
        "answer": [text],
        "image": embedded(text),
    }
    return row | changed


FORMULA = {
    "dataset": "HME100k",
    "question_type": "Handwritten Mathematical Expression Recognition",
    "answer": ["\\frac { a } { 2 }"],
}


def text_vqa(number: int, answers: Sequence[str] | None, **changed: Any) -> dict[str, Any]:
    entry = {
        "question": "what brand is this?",
        "image_id": f"00{number}",
        "image_classes": ["Phone"],
        "flickr_original_url": "https://farm.example/1.jpg",
        "flickr_300k_url": "https://farm.example/2.jpg",
        "image_width": 64,
        "image_height": 48,
        "question_id": 34600 + number,
        "set_name": "val",
    }
    return entry | ({} if answers is None else {"answers": list(answers)}) | changed


def doc(number: int, answers: Sequence[str] | None, **changed: Any) -> dict[str, Any]:
    entry = {
        "questionId": 49150 + number,
        "question": "What is the date?",
        "question_types": ["form", "handwritten"],
        "image": f"documents/page_{number}.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": None if answers is None else list(answers),
        "data_split": "val",
    }
    return entry | changed


def pope_line(number: int, label: str | None, **changed: Any) -> dict[str, Any]:
    line = {
        "question_id": number,
        "image": f"COCO_val2014_{number // 2}.png",
        "text": "Is there a dog in the image?",
        "label": label,
    }
    return line | changed


def pope_row(number: int, answer: str, category: str, text: str) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": str(number % 2 + 1),
        "question": "Is there a dog in the image?",
        "answer": answer,
        "image_source": f"COCO_val2014_{number}",
        "image": embedded(text),
        "category": category,
    }


def ref_row(number: int, phrases: Sequence[str], bbox: Sequence[float] | None) -> dict[str, Any]:
    return {
        "question_id": str(number),
        "image": embedded(f"ref {number}", size=(80, 50)),
        "question": "Please carefully observe the area circled in the image.",
        "answer": list(phrases),
        "segmentation": [1.0, 2.0],
        "bbox": bbox,
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{number}.jpg",
    }


def college(name: str, pictures: Sequence[str], **changed: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "question": "<image 1> What is shown?",
        "options": "['a cell', \"a cat's eye\", 'both']",
        "explanation": "",
        **{f"image_{number}": None for number in range(1, 8)},
        **{f"image_{number}": embedded(text) for number, text in enumerate(pictures, start=1)},
        "img_type": "['Photographs']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Cell Biology",
    }
    return row | changed


def bench(index: int, answer: str, image: Any, **changed: Any) -> dict[str, Any]:
    row = {
        "index": index,
        "question": "Which color is it?",
        "hint": "",
        "A": "red",
        "B": "blue",
        "C": "",
        "D": "",
        "answer": answer,
        "category": "attribute_recognition",
        "image": image,
        "source": "made",
        "l2-category": "finegrained_perception",
        "comment": "",
        "split": "dev",
    }
    return row | changed


def tally(number: int, answer: Any, **changed: Any) -> dict[str, Any]:
    entry = {
        "answer": answer,
        "data_source": "amt",
        "image": f"VG_100K_2/{number}.png",
        "image_id": 90000 + number,
        "issimple": number % 2 == 0,
        "question": "How many dots are there?",
        "question_id": 30000 + number,
    }
    return entry | changed


# Reading ----------------------------------------------------------------------------------------


def test_ocrbench_json(tmp_path: Path) -> None:
    rows = [
        ocr(),
        ocr(2, answers=["12 kg", "12kg"], type="Key Information Extraction"),
        ocr(
            3,
            dataset_name="HME100k",
            answers=FORMULA["answer"],
            type=FORMULA["question_type"],
        ),
    ]
    file = as_json(tmp_path / "OCRBench.json", rows)
    (tmp_path / "OCRBench_Images").mkdir()
    read = load_data(str(file))
    assert read.name == "ocrbench"
    assert read.questions[0] == Question(
        id="ocrbench-1",
        kind="image",
        path=tmp_path / "OCRBench_Images" / "IIIT5K" / "test" / "1.png",
        question="what is written in the image?",
        answer="CENTRE",
        answers=("CENTRE",),
        scoring="contains",
        type="Regular Text Recognition",
    )
    assert read.questions[1].answers == ("12 kg", "12kg")
    assert [one.scoring for one in read.questions] == ["contains", "contains", "formula"]
    assert load_data(f"ocrbench:{file}", media=tmp_path).questions[0].path == (
        tmp_path / "IIIT5K" / "test" / "1.png"
    )


def test_ocrbench_parquet_and_its_pictures(tmp_path: Path, cache: Path) -> None:
    rows = [ocr_row("STOP"), ocr_row("STOP", question="And now?"), ocr_row("a/2", **FORMULA)]
    file = as_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    read = load_data(str(file))
    first, second, third = read.questions
    # Equal pictures are one file, so that both questions share its encoding.
    assert first.path == second.path != third.path
    assert first.path.read_bytes() == drawn("STOP")
    assert cache in first.path.parents
    assert first.path.suffix == ".png"
    assert (third.scoring, third.answer) == ("formula", "\\frac { a } { 2 }")
    before = first.path.stat().st_mtime_ns
    assert load_data(f"ocrbench:{tmp_path}") == read
    assert first.path.stat().st_mtime_ns == before
    own = load_data(str(file), work=tmp_path / "own")
    assert tmp_path / "own" in own.questions[0].path.parents


def test_ocrbench_refused(tmp_path: Path) -> None:
    rows = [
        ocr(),
        ocr(2, type="APP agent en"),
        ocr(3, answers=[]),
        ocr(4, answers=["ok", " "]),
        ocr(5, image_path="../../etc/passwd"),
    ]
    message = refused(as_json(tmp_path / "OCRBench.json", rows))
    assert "4 problems" in message
    assert "entry 2: the type 'APP agent en' is none of OCRBench's ten. OCRBench v2" in message
    assert "entry 3: the answer is missing" in message
    assert "entry 4: an answer is empty" in message
    assert "entry 5: the path '../../etc/passwd' leads out" in message

    pictures = [
        ocr_row("x", image={"bytes": None, "path": "1.jpg"}),
        ocr_row("x", image={"bytes": b"no picture", "path": ""}),
        ocr_row("x", image=None),
    ]
    message = refused(as_parquet(tmp_path / "bad.parquet", pictures))
    assert "row 1: the picture is not in the file, which only names it ('1.jpg')" in message
    assert "row 2: the picture cannot be read" in message
    assert "row 3: there is no picture" in message


def test_textvqa(tmp_path: Path) -> None:
    answers = ["nokia"] * 6 + ["Nokia phone"] * 4
    file = as_json(
        tmp_path / "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "data": [text_vqa(1, answers)]},
    )
    (tmp_path / "train_images").mkdir()
    (question,) = load_data(str(file)).questions
    assert question == Question(
        id="34601",
        kind="image",
        path=tmp_path / "train_images" / "001.jpg",
        question="What brand is this?",
        answer="nokia",
        answers=tuple(answers),
        scoring="vqa",
        instruction=SHORT,
    )
    rows = [text_vqa(1, answers, image=embedded("NOKIA")), text_vqa(2, ["a"] * 10, image=None)]
    rows[1]["image"] = embedded("A")
    folder = tmp_path / "data"
    as_parquet(folder / "validation-00000-of-00002.parquet", rows[:1])
    as_parquet(folder / "validation-00001-of-00002.parquet", rows[1:])
    none = text_vqa(3, [], image=embedded("B"))
    none["answers"] = pa.scalar([], pa.list_(pa.string())).as_py()
    as_parquet(folder / "test-00000-of-00001.parquet", [text_vqa(3, None, image=embedded("B"))])
    read = load_data(str(folder), split="validation")
    assert [one.id for one in read.questions] == ["34601", "34602"]
    assert read.questions[0].path.read_bytes() == drawn("NOKIA")
    message = refused(folder)
    assert "holds no answers" in message
    assert "validation split" in message
    message = refused(folder, split="train")
    assert "has no split 'train'" in message
    assert "it has test, validation" in message
    assert "has no split 'validation'" in refused(file, split="validation")

    few = as_json(tmp_path / "few.json", {"data": [text_vqa(1, ["a"] * 3), text_vqa(2, answers)]})
    assert "entry 1: VQA accuracy needs the answers of 4 annotators or more, got 3" in refused(few)
    test = as_json(tmp_path / "TextVQA_0.5.1_test.json", {"data": [text_vqa(1, None)]})
    assert "holds no answers" in refused(test)


def test_docvqa(tmp_path: Path) -> None:
    entries = [doc(1, ["1/8/93", "January 8"]), doc(2, ["0.28"], question_types=None)]
    file = as_json(tmp_path / "val_v1.0_withQT.json", {"dataset_name": "docvqa", "data": entries})
    (tmp_path / "documents").mkdir()
    read = load_data(str(file))
    assert read.name == "docvqa"
    assert read.questions[0] == Question(
        id="49151",
        kind="image",
        path=tmp_path / "documents" / "page_1.png",
        question="What is the date?",
        answer="1/8/93",
        answers=("1/8/93", "January 8"),
        scoring="anls",
        instruction=SHORT,
        type="form, handwritten",
    )
    assert read.questions[1].type == ""
    pages = tmp_path / "pages"
    pages.mkdir()
    assert load_data(str(file), media=pages).questions[0].path == pages / "page_1.png"

    rows = [doc(1, ["1/8/93"], image=embedded("1/8/93"))]
    (row,) = load_data(str(as_parquet(tmp_path / "validation-0.parquet", rows))).questions
    assert (row.path.read_bytes(), row.scoring) == (drawn("1/8/93"), "anls")
    message = refused(as_json(tmp_path / "test_v1.0.json", {"data": [doc(1, None)]}))
    assert "holds no answers" in message
    twice = as_json(tmp_path / "twice.json", {"data": [doc(1, ["a"]), doc(1, ["b"]), "x"]})
    message = refused(twice)
    assert "entry 2: the id '49151' is that of entry 1 too" in message
    assert "entry 3: a JSON object is needed, got str" in message


def test_pope(tmp_path: Path) -> None:
    file = as_lines(
        tmp_path / "output" / "coco" / "coco_pope_adversarial.json",
        [pope_line(0, "yes"), pope_line(1, "no")],
    )
    (tmp_path / "val2014").mkdir()
    read = load_data(str(file))
    assert read.name == "pope-adversarial"
    assert read.questions[0] == Question(
        id="0",
        kind="image",
        path=tmp_path / "val2014" / "COCO_val2014_0.png",
        question="Is there a dog in the image?",
        answer="yes",
        scoring="yes-no",
        instruction=SHORT,
        type="adversarial",
    )
    assert read.questions[1].answer == "no"
    # One line is a JSON object, too.
    one = as_lines(tmp_path / "gqa_pope_seem_random.json", [pope_line(0, "no")])
    assert load_data(str(one)).name == "pope-random"

    rows = [
        pope_row(0, "yes", "adversarial", "dog"),
        pope_row(1, "no", "adversarial", "dog"),
        pope_row(2, "no", "popular", "cat"),
    ]
    read = load_data(str(as_parquet(tmp_path / "test-00000-of-00001.parquet", rows)))
    assert read.name == "pope"
    assert [(one.id, one.type) for one in read.questions] == [
        ("0", "adversarial"),
        ("1", "adversarial"),
        ("2", "popular"),
    ]
    bad = [pope_line(0, "maybe"), pope_line(1, None), {"question_id": 2, "image": "x", "text": "?"}]
    message = refused(as_lines(tmp_path / "coco_pope_popular.json", bad))
    assert "line 1: the answer 'maybe' is neither yes nor no" in message
    assert "line 2: the label is missing" in message
    assert "line 3: the label is missing" in message


def test_refcoco(tmp_path: Path) -> None:
    rows = [
        ref_row(7, ["left dog", "dog"], [20.0, 10.0, 40.5, 30.0]),
        ref_row(8, ["cat"], [0, 0, 1, 1]),
    ]
    read = load_data(str(as_parquet(tmp_path / "val-00000-of-00001.parquet", rows)))
    assert read.name == "refcoco"
    assert [one.id for one in read.questions] == ["1-1", "1-2", "2-1"]
    first = read.questions[0]
    assert first == Question(
        id="1-1",
        kind="image",
        path=first.path,
        question="Please provide the bounding box coordinate of the region this sentence "
        "describes: left dog",
        answer="[20.0, 10.0, 60.5, 40.0]",
        scoring="box",
        size=(80, 50),
        evidence=((20, 10, 61, 40),),
    )
    assert first.path == read.questions[1].path
    assert first.path.read_bytes() == drawn("ref 7", size=(80, 50))

    line = {
        "image": "data/coco/train2014/COCO_train2014_1.jpg",
        "sent": "the lady",
        "bbox": [1.5, 2, 30.25, 40],
        "height": 48,
        "width": 64,
    }
    file = as_lines(tmp_path / "refcoco" / "refcoco+_testA.jsonl", [line])
    (tmp_path / "coco").mkdir()
    read = load_data(str(file))
    assert read.name == "refcoco+_testA"
    (question,) = read.questions
    assert question.path == tmp_path / "coco" / "train2014" / "COCO_train2014_1.jpg"
    assert (question.answer, question.size) == ("[1.5, 2.0, 30.25, 40.0]", (64, 48))

    bad = [
        line | {"bbox": [5, 5, 5, 9]},
        line | {"bbox": [1, 2, 3]},
        line | {"sent": " "},
        line | {"bbox": None},
    ]
    message = refused(as_lines(tmp_path / "bad.jsonl", bad))
    assert "line 1: the box [5.0, 5.0, 5.0, 9.0] has no area" in message
    assert "line 2: bbox" in message
    assert "line 3: the phrase is empty" in message
    assert "line 4: the box is missing" in message


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        college("validation_Basic_Medical_Science_1", ["cell", "not named"]),
        college(
            "validation_Math_2",
            ["one", "two", "three"],
            question="Compare <image 3> with <image 1>.",
            question_type="open",
            options="[]",
            answer="['24/7', '3.429']",
        ),
        college(
            "validation_Math_3",
            ["x"],
            question="Which?",
            options="['<image 1>', 'none']",
            answer="A",
        ),
    ]
    file = as_parquet(tmp_path / "Math" / "validation-00000-of-00001.parquet", rows)
    read = load_data(str(file))
    choice, opened, option = read.questions
    assert choice == Question(
        id="validation_Basic_Medical_Science_1",
        kind="image",
        path=choice.path,
        question="<image 1> What is shown?",
        answer="B",
        choices=("a cell", "a cat's eye", "both"),
        type="Basic Medical Science",
    )
    assert choice.path.read_bytes() == drawn("cell")
    assert (opened.answer, opened.answers) == ("24/7", ("24/7", "3.429"))
    assert (opened.choices, opened.scoring, opened.instruction) == ((), "exact", SHORT)
    assert [path.read_bytes() for path in opened.paths] == [drawn("one"), drawn("three")]
    assert (option.type, option.answer, option.further) == ("Math", "A", ())
    as_parquet(
        tmp_path / "Art" / "validation-00000-of-00001.parquet",
        [college("validation_Art_1", ["art"])],
    )
    whole = load_data(f"mmmu:{tmp_path}", split="validation")
    assert [one.type for one in whole.questions] == ["Art", "Basic Medical Science", "Math", "Math"]

    hidden = [college(f"test_Math_{n}", ["x"], answer="?") for n in (1, 2)]
    message = refused(as_parquet(tmp_path / "test-00000-of-00001.parquet", hidden))
    assert "holds no answers" in message
    bad = [
        college("a_1", ["x"], answer="D"),
        college("a_2", ["x"], options="['a', open('x')]"),
        college("a_3", ["x"], question="<image 2> What?"),
        college("a_4", []),
        college("a_5", ["x"], options="['a']", answer="A"),
    ]
    message = refused(as_parquet(tmp_path / "bad" / "bad.parquet", bad))
    assert "5 problems" in message
    assert "row 1: the answer 'D' is no letter from A to C" in message
    assert "row 2: \"['a', open('x')]\" is no list of texts" in message
    assert "row 3: image 2 is named and not there" in message
    assert "row 4: image 1 is named and not there" in message
    assert "row 5: 2 to 26 choices are needed, got 1" in message


def test_mmbench(tmp_path: Path) -> None:
    picture = drawn("red", "red", size=(300, 200))
    rows = [
        bench(241, "A", text_of(picture), hint="Look\nclosely.", C="green"),
        bench(1000241, "B", "241", A="green", B="red", C="blue"),
        bench(252, "B", text_of(drawn("blue", "blue"))),
    ]
    read = load_data(str(as_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)))
    assert read.name == "mmbench"
    first, rotated, other = read.questions
    assert first == Question(
        id="241",
        kind="image",
        path=first.path,
        question="Look\nclosely.\nWhich color is it?",
        answer="A",
        choices=("red", "blue", "green"),
        type="attribute_recognition",
        group="241",
    )
    assert first.path.read_bytes() == picture
    assert (rotated.path, rotated.group, rotated.answer) == (first.path, "241", "B")
    assert (other.choices, other.group) == (("red", "blue"), "252")

    hub = [
        bench(1, "A", {"bytes": picture, "path": ""}, hint="nan", C="nan", D=None),
        bench(2, "B", {"bytes": picture, "path": ""}, hint=None, C=None, D=None),
    ]
    read = load_data(str(as_parquet(tmp_path / "en" / "dev-00000-of-00001.parquet", hub)))
    assert [(one.question, one.choices) for one in read.questions] == [
        ("Which color is it?", ("red", "blue"))
    ] * 2
    assert load_data(f"mmbench:{tmp_path / 'en'}", split="dev") == read

    bad = [
        bench(1, "C", text_of(picture)),
        bench(2, "A", "9"),
        bench(3, "A", "*" * 100),
        bench(4, "A", text_of(picture), B=""),
        bench(5, "A", text_of(picture)),
        bench(5, "A", text_of(picture)),
        bench(6, "", text_of(picture)),
    ]
    message = refused(as_tsv(tmp_path / "bad.tsv", bad))
    assert "row 1: the answer 'C' is no letter from A to B" in message
    assert "row 2: the image '9' is neither a picture nor the index of a row with one" in message
    assert "row 3: the picture is no base64" in message
    assert "row 4: 2 to 26 choices are needed, got 1" in message
    assert "row 6: the id '5' is that of row 5 too" in message
    assert "row 7: the answer is missing" in message
    hidden = as_tsv(tmp_path / "MMBench_TEST_EN.tsv", [bench(1, "", text_of(picture))])
    message = refused(hidden)
    assert "holds no answers" in message
    assert "dev split" in message


def test_tallyqa(tmp_path: Path) -> None:
    file = as_json(tmp_path / "test.json", [tally(0, 4), tally(1, 0), tally(1, 2)])
    read = load_data(str(file))
    assert read.name == "tallyqa"
    assert read.questions[0] == Question(
        id="test-1",
        kind="image",
        path=tmp_path / "VG_100K_2" / "0.png",
        question="How many dots are there?",
        answer="4",
        scoring="count",
        instruction=SHORT,
        type="simple",
    )
    assert [(one.id, one.type) for one in read.questions[1:]] == [
        ("test-2", "complex"),
        ("test-3", "complex"),
    ]
    (tmp_path / "images").mkdir()
    assert load_data(str(file)).questions[0].path == tmp_path / "images" / "VG_100K_2" / "0.png"
    message = refused(as_json(tmp_path / "bad.json", [tally(0, -1), tally(1, None), tally(2, 3)]))
    assert "entry 1: answer" in message
    assert "entry 2: the answer is missing" in message


def test_own_questions_with_several_answers(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", "x")
    line: dict[str, Any] = {"image": "a.png", "question": "?", "answer": "red"}
    rows = [
        line | {"answers": ["red", "crimson"]},
        line | {"scoring": "anls"},
        line | {"scoring": "vqa", "answers": ["red"] * 5},
        line | {"scoring": "yes-no", "answer": "No"},
    ]
    read = load_data(str(as_lines(tmp_path / "own.jsonl", rows)))
    assert [(one.scoring, one.accepted) for one in read.questions] == [
        ("exact", ("red", "crimson")),
        ("anls", ("red",)),
        ("vqa", ("red",) * 5),
        ("yes-no", ("No",)),
    ]
    bad = [
        line | {"answers": ["blue"]},
        line | {"scoring": "vqa"},
        line | {"scoring": "box"},
        line | {"scoring": "count"},
        line | {"scoring": "anls", "choices": ["red", "blue"]},
        line | {"scoring": "best"},
        line | {"answers": ["red", ""]},
    ]
    message = refused(as_lines(tmp_path / "bad.jsonl", bad))
    for number, text in enumerate(
        (
            "the answer 'red' is none of 'answers'",
            "VQA accuracy needs the answers of 4 annotators",
            "the scoring 'box' is for data sets with boxes",
            "the answer 'red' is no count",
            "are for open questions",
            "scoring",
            "an answer is empty",
        ),
        start=1,
    ):
        assert any(f"line {number}: " in part and text in part for part in message.split("\n")), (
            text
        )


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="is a file") as caught:
        Pictures(tmp_path / "file").put(drawn("x"))
    assert type(caught.value).__name__ == "OutputError"


# Runs -------------------------------------------------------------------------------------------


class Says:
    """An engine that gives what it is told; other answers with half of the tokens."""

    def __init__(self, says: Callable[[Question, Condition], str]) -> None:
        self.says = says
        self.media_at_once = {"image": 4, "video": 1}
        self.prompts: dict[str, str] = {}

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, asked: MediaQuestions) -> None:
        ids = [one.id.partition("/")[2] for one in asked.questions]
        self.prompts |= zip(ids, asked.prompts, strict=True)

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        pass

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        for item in wanted:
            tokens = 64 if condition.method == UNPRUNED else 32
            done(
                item,
                EngineAnswer(
                    text=self.says(item, condition), visual_tokens=tokens, of_visual_tokens=64
                ),
            )

    def peak_bytes(self, *_: object) -> None:
        return None

    def close(self) -> None:
        pass


def evaluated(
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    says: Callable[[Question, Condition], str],
    **more: Any,
) -> tuple[Results, Says]:
    engine = Says(says)
    monkeypatch.setattr(runner, "build_engine", lambda settings: engine)
    monkeypatch.setattr(runner, "check_before_model", lambda settings, sets: None)  # no checkpoint
    values: dict[str, Any] = {"model": "stub", "data": [str(file)]}
    values |= {"method": ["uniform"], "keep": [0.5]}
    values |= {"choose_by": "text", "out": file.parent / "out", **more}
    settings = Settings.model_validate(values)
    results = run(settings, Quiet())
    assert read_results(settings.out) == results
    return results, engine


def table_of(file: Path) -> str:
    return (file.parent / "out" / "table.md").read_text("utf-8")


def rows_of(results: Results) -> tuple[Row, Row]:
    unpruned, pruned = results.rows
    return unpruned, pruned


def by_number(full: Sequence[str], half: Sequence[str]) -> Callable[[Question, Condition], str]:
    """Return what gives the n-th question its answer under each condition."""
    numbers: dict[str, int] = {}

    def says(item: Question, condition: Condition) -> str:
        number = numbers.setdefault(item.id, len(numbers))
        return (full if condition.method == UNPRUNED else half)[number]

    return says


def test_a_run_over_ocrbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_parquet(
        tmp_path / "test-0.parquet", [ocr_row("STOP"), ocr_row("GO"), ocr_row("a/2", **FORMULA)]
    )
    results, engine = evaluated(
        monkeypatch,
        file,
        by_number(["It says 'Stop'.", "go", r"$\frac{a}{2}$"], ["Stop", "no idea", r"\frac{A}{2}"]),
    )
    unpruned, pruned = rows_of(results)
    assert unpruned.accuracy is not None
    assert (unpruned.accuracy.share, pruned.accuracy and pruned.accuracy.correct) == (1.0, 1)
    assert set(engine.prompts.values()) == {"what is written in the image?"}
    assert set(unpruned.by_type) == {
        "Regular Text Recognition",
        "Handwritten Mathematical Expression Recognition",
    }
    assert "100.0 (" in table_of(file)


def test_a_run_over_textvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        text_vqa(1, ["nokia"] * 2 + ["sony"] * 8, image=embedded("N")),
        text_vqa(2, ["5"] * 10, image=embedded("5")),
    ]
    file = as_parquet(tmp_path / "validation-0.parquet", rows)
    results, engine = evaluated(
        monkeypatch, file, by_number(["nokia", "five"], ["a phone", "Five."])
    )
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    # Two of ten: 2 leave one other, 8 leave two.
    nokia = (2 * (1 / 3) + 8 * (2 / 3)) / 10
    assert unpruned.scores.value == pytest.approx((nokia + 1) / 2)
    assert pruned.scores.against_unpruned is not None
    assert pruned.scores.against_unpruned.difference == pytest.approx(-nokia / 2)
    assert engine.prompts["34601"] == f"What brand is this?\n{SHORT}"
    assert "VQA accuracy, %" in table_of(file)
    records = {(one.item, one.condition): one for one in read_run(tmp_path / "out").records}
    first = records["textvqa/34601", "unpruned"]
    assert (first.read, first.correct) == ("nokia", True)
    assert first.score == pytest.approx(nokia)


def test_a_run_over_docvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_json(tmp_path / "val_v1.0.json", {"data": [doc(1, ["1/8/93"]), doc(2, ["0.28"])]})
    for number in (1, 2):
        saved(tmp_path / "documents" / f"page_{number}.png", f"page {number}")
    results, _ = evaluated(
        monkeypatch,
        file,
        by_number(["1/8/93", "0.23"], ["1/8", "12"]),
        instruction="In one word.",
    )
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert unpruned.scores.metric == "ANLS"
    assert unpruned.scores.value == pytest.approx((1 + 3 / 4) / 2)
    assert pruned.scores.value == pytest.approx((3 / 6 + 0) / 2)
    assert "ANLS difference" in table_of(file)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "ANLS, %" in page
    assert ">ANLS 87.5<" in page
    assert ">ANLS 25.0<" in page


def test_a_run_over_pope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["yes", "yes", "no", "no"]
    file = as_lines(
        tmp_path / "coco_pope_popular.json", [pope_line(n, one) for n, one in enumerate(labels)]
    )
    for number in (0, 1):
        saved(tmp_path / "val2014" / f"COCO_val2014_{number}.png", f"{number}")
    results, engine = evaluated(
        monkeypatch,
        file,
        by_number(["Yes", "Yes.", "No", "No, there is not."], ["Yes", "No", "Yes", "no"]),
    )
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert unpruned.scores.value == 1.0
    assert (pruned.scores.metric, pruned.scores.value) == ("F1", 0.5)
    assert pruned.scores.figures == {
        "precision": 0.5,
        "recall": 0.5,
        "yes_ratio": 0.5,
        "neither": 0.0,
    }
    assert engine.prompts["0"].endswith(SHORT)
    table = table_of(file)
    assert "## pope-popular" in table
    for title in ("F1, %", "precision, %", "recall, %", "yes, %"):
        assert title in table
    assert "neither, %" not in table


def test_a_run_over_refcoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ref_row(7, ["left dog", "dog"], [20.0, 10.0, 40.0, 30.0])]
    file = as_parquet(tmp_path / "val-0.parquet", rows)
    says = by_number(["[20, 10, 60, 40]", "(20,10),(40,40)"], ["[0, 0, 8, 5]", "nowhere"])
    results, engine = evaluated(monkeypatch, file, says, box_unit="pixel")
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert unpruned.scores.metric == "mean IoU"
    assert unpruned.scores.value == pytest.approx((1 + 0.5) / 2)
    assert unpruned.accuracy is not None
    assert unpruned.accuracy.share == 1.0
    assert pruned.scores.figures == {"no_box": 0.5, "outside": 0.0}
    assert engine.prompts["1-1"].splitlines()[1].endswith("in pixels of the image.")

    # The same numbers, read in the unit that is the default, are boxes far outside.
    results, engine = evaluated(monkeypatch, file, says, out=tmp_path / "other")
    assert results.rows[0].scores is not None
    assert results.rows[0].scores.value == 0.0
    assert results.rows[0].scores.figures["outside"] == 1.0
    assert "--box-unit" in (tmp_path / "other" / "table.md").read_text("utf-8")


def test_pixels_of_a_picture_that_is_made_smaller_are_refused(tmp_path: Path) -> None:
    file = as_parquet(tmp_path / "val-0.parquet", [ref_row(7, ["dog"], [0.0, 0.0, 9.0, 9.0])])
    values = {"model": "stub", "data": [str(file)], "method": ["resize"], "keep": [0.5]}
    settings = Settings.model_validate({**values, "box_unit": "pixel", "out": tmp_path / "out"})
    with pytest.raises(ConfigError, match="resize makes the picture smaller"):
        check_before_model(settings, [load_data(str(file))])


def test_a_run_over_mmmu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        college("validation_Math_1", ["cell"]),
        college(
            "validation_Art_2",
            ["one"],
            question_type="open",
            options="[]",
            answer="['24/7', '3.429']",
        ),
    ]
    file = as_parquet(tmp_path / "validation-0.parquet", rows)
    results, engine = evaluated(monkeypatch, file, by_number(["B", "3.429"], ["(C)", "7"]))
    unpruned, pruned = rows_of(results)
    assert unpruned.accuracy is not None
    assert pruned.accuracy is not None
    assert (unpruned.accuracy.share, pruned.accuracy.share) == (1.0, 0.0)
    assert set(unpruned.by_type) == {"Math", "Art"}
    assert unpruned.scores is None
    assert "B. a cat's eye" in engine.prompts["validation_Math_1"]
    assert engine.prompts["validation_Art_2"].endswith(SHORT)


def test_a_run_over_mmbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, other = text_of(drawn("red", "red")), text_of(drawn("blue", "blue"))
    rows = [
        bench(1, "A", picture),
        bench(1000001, "B", "1", A="blue", B="red"),
        bench(2, "B", other),
        bench(1000002, "A", "2", A="blue", B="red"),
    ]
    file = as_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    results, _ = evaluated(monkeypatch, file, by_number(["A", "B", "B", "A"], ["A", "A", "B", "A"]))
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert unpruned.scores.figures == {"circular": 1.0}
    assert pruned.scores.figures == {"circular": 0.5}
    assert pruned.accuracy is not None
    assert pruned.accuracy.share == 0.75
    assert "circular, %" in table_of(file)


def test_a_run_over_tallyqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_json(tmp_path / "test.json", [tally(0, 4), tally(1, 0)])
    for number in (0, 1):
        saved(tmp_path / "VG_100K_2" / f"{number}.png", "." * number)
    results, _ = evaluated(
        monkeypatch, file, by_number(["four dots", "none"], ["There are 6.", ""])
    )
    unpruned, pruned = rows_of(results)
    assert unpruned.scores is not None
    assert pruned.scores is not None
    assert unpruned.accuracy is not None
    assert unpruned.accuracy.share == 1.0
    assert pruned.scores.figures == {"rmse": 2.0, "no_number": 0.5}
    assert set(pruned.by_type) == {"simple", "complex"}
    table = table_of(file)
    assert "RMSE" in table
    assert "no number, %" in table


def test_all_of_them_with_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENPRUNE_CACHE")  # the bundled model is there already
    saved(tmp_path / "val2014" / "COCO_val2014_0.png", "a dog")
    saved(tmp_path / "VG_100K_2" / "0.png", ". . .")
    answers = ["nokia"] * 10
    files = [
        as_parquet(tmp_path / "ocr.parquet", [ocr_row("STOP"), ocr_row("GO")]),
        as_parquet(tmp_path / "text.parquet", [text_vqa(1, answers, image=embedded("NOKIA"))]),
        as_parquet(tmp_path / "doc.parquet", [doc(1, ["1/8/93"], image=embedded("1/8/93"))]),
        as_lines(tmp_path / "coco_pope_random.json", [pope_line(0, "yes"), pope_line(1, "no")]),
        as_parquet(tmp_path / "ref.parquet", [ref_row(7, ["dog"], [20.0, 10.0, 40.0, 30.0])]),
        as_parquet(
            tmp_path / "mmmu.parquet",
            [college("validation_Math_1", ["cell", "eye"], question="<image 1> <image 2>?")],
        ),
        as_tsv(tmp_path / "mmb.tsv", [bench(1, "A", text_of(drawn("red", "red")))]),
        as_json(tmp_path / "test.json", [tally(0, 3)]),
    ]
    out = tmp_path / "out"
    arguments = ["--method", "uniform", "--keep", "0.25", "--out", str(out), "--choose-by", "text"]
    assert cli.main(["eval", "bundled", "--data", *map(str, files), *arguments]) == 0
    assert "report:" in capsys.readouterr().out
    results = read_results(out)
    names = [
        "ocrbench",
        "textvqa",
        "docvqa",
        "pope-random",
        "refcoco",
        "mmmu",
        "mmbench",
        "tallyqa",
    ]
    assert [one.name for one in results.data] == names
    assert not results.errors
    assert all(row.answered + row.cut == row.questions for row in results.rows)
    metrics = {row.data_set: row.scores and row.scores.metric for row in results.rows}
    assert metrics == {
        "ocrbench": "accuracy",
        "textvqa": "VQA accuracy",
        "docvqa": "ANLS",
        "pope-random": "F1",
        "refcoco": "mean IoU",
        "mmmu": None,
        "mmbench": "accuracy",
        "tallyqa": "accuracy",
    }


def test_questions_of_one_picture_are_asked_together(tmp_path: Path) -> None:
    rows = [pope_row(n, "yes", "popular", "dog" if n < 3 else "cat") for n in range(6)]
    read: DataSet = load_data(str(as_parquet(tmp_path / "test-0.parquet", rows)))
    from tokenprune_eval.evaluation.read_ahead import by_media

    assert [len(group) for group in by_media(read.questions)] == [3, 3]
    assert replace(read.questions[0], id="x").paths == read.questions[1].paths


def test_two_runs_are_compared_in_the_sets_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [doc(n, ["12 kg"], image=embedded("12 kg")) for n in (1, 2)]
    file = as_parquet(tmp_path / "validation-0.parquet", rows)
    evaluated(monkeypatch, file, by_number(["12 kg", "12 kg"], ["12 kg", "x"]), out=tmp_path / "a")
    evaluated(monkeypatch, file, by_number(["12 kg", "12 g"], ["12 kg", "y"]), out=tmp_path / "b")
    comparison = compare(tmp_path / "a", tmp_path / "b")
    unpruned, pruned = comparison.pairs
    assert unpruned.scores_a is not None
    assert unpruned.scores_b is not None
    assert unpruned.scores_a.value == 1.0
    assert unpruned.scores_b.value == pytest.approx(0.9)
    assert unpruned.scores_b.against_unpruned is not None
    assert unpruned.scores_b.against_unpruned.difference == pytest.approx(-0.1)
    assert pruned.scores_b is not None
    assert pruned.scores_b.value == 0.5
    text = comparison_markdown(comparison)
    assert "A, ANLS, %" in text
    assert "-10.0 [-20.0, 0.0]" in text.replace("\\", "")
