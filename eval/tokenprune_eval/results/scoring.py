"""How the answers to open questions are read and scored: one rule for each word of `Scoring`.

`RULES` has them all. A rule reads a text, compares it with the right answers and returns a score
from 0 to 1; an answer counts as right from `RIGHT` on. The rules are those of the data sets'
authors, written anew; each says where it is published and where it differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tokenprune_eval.data.question import BoxUnit, Question, Scoring
from tokenprune_eval.results.answer_text import (
    final_part,
    is_right,
    marked_part,
    normalised,
    read_open,
)

RIGHT = 0.5
"""Score from which an answer counts as right."""


@dataclass(frozen=True)
class Reading:
    """What an answer was read as, and what it is worth.

    Attributes
    ----------
    score
        From 0 to 1.
    said
        What was read; two answers with the same are the same. Empty where nothing was found.
    """

    score: float
    said: str


@dataclass(frozen=True)
class Rule:
    """One way to read and score.

    Attributes
    ----------
    metric
        What the mean of the scores is called.
    read
        (text, question, whether the text was cut off, unit of boxes) -> what it is worth; None
        where it was cut off before it named anything.
    """

    metric: str
    read: Callable[[str, Question, bool, BoxUnit], Reading | None]


ACCURACY = "accuracy"
"""The metric of rules whose scores are 0 and 1."""


def _exact(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score 1 for a text that gives one of the right answers; see `is_right`."""
    found = [is_right(text, answer, cut=cut) for answer in question.accepted]
    if None in found:
        return None
    return Reading(float(any(found)), read_open(text, cut=cut))


# Text in pictures -------------------------------------------------------------------------------


def _contains(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score 1 for a text that has a right answer in it, apart from case and line breaks.

    The rule of OCRBench (arXiv 2305.07895, ``OCRBench/example.py`` of its authors). Thoughts are
    left out, which its models did not have.
    """

    def plain(said: str) -> str:
        return said.lower().strip().replace("\n", " ")

    return _found_in(plain(marked_part(text)), map(plain, question.accepted), cut)


def _formula(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    r"""Score 1 for a text that has a right formula in it, apart from spaces; case counts.

    OCRBench's rule for handwritten formulas (data set HME100k), same source as `_contains`: ``"a"``
    and ``"A"`` are different variables, and LaTeX is spaced freely.
    """

    def plain(said: str) -> str:
        return said.replace("\n", "").replace(" ", "").strip()

    return _found_in(plain(marked_part(text)), map(plain, question.accepted), cut)


def _found_in(said: str, answers: Iterable[str], cut: bool) -> Reading | None:
    if any(answer in said for answer in answers):
        return Reading(1.0, said)
    # What was cut off might have gone on with it.
    return None if cut else Reading(0.0, said)


def _anls(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score by the normalised Levenshtein similarity to the nearest right answer.

    ANLS of ST-VQA (arXiv 1905.13648, equation 1) and DocVQA (arXiv 2007.00398): one less the edit
    distance over the length of the longer text, in lower case with single spaces, and 0 below 0.5.
    Exactly 0.5 counts, as in DocVQA's evaluation script and in lmms-eval; by the equation it is 0.
    """
    said = _one_line(marked_part(text))
    if cut and _unfinished(text):
        return None
    score = max(_similarity(said, _one_line(answer)) for answer in question.accepted)
    return Reading(score if score >= 0.5 else 0.0, said)


def _one_line(text: str) -> str:
    return " ".join(text.lower().split())


def _unfinished(text: str) -> bool:
    """Say whether a text that was cut off has no whole answer."""
    return not read_open(text, cut=True)


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1.0 - _distance(one, other) / longest if longest else 1.0


def _distance(one: str, other: str) -> int:
    """Return the Levenshtein distance, row by row over the longer text."""
    short, long = sorted((one, other), key=len)
    row = list(range(len(short) + 1))
    for number, sign in enumerate(long, start=1):
        above_left, row[0] = row[0], number
        for place, own in enumerate(short, start=1):
            changed = above_left + (own != sign)
            above_left = row[place]
            row[place] = min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


# VQA accuracy -----------------------------------------------------------------------------------


def _vqa(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score by how many annotators gave the answer: three of the others make it fully right.

    VQA accuracy (arXiv 1505.00468, section 5), min(n / 3, 1), averaged over all ways to leave one
    annotator out, as the evaluations of VQA and TextVQA (arXiv 1904.08920) do. Texts are compared
    as `vqa_normalised`.
    """
    said = vqa_normalised(marked_part(text))
    if cut and _unfinished(text):
        return None
    answers = [vqa_normalised(answer) for answer in question.accepted]
    equal, others = answers.count(said), len(answers) - answers.count(said)
    # Of those who gave it, each leaves one less; of the others, none.
    left_out = equal * min((equal - 1) / 3, 1.0) + others * min(equal / 3, 1.0)
    return Reading(left_out / len(answers), said)


_VQA_REMOVED = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_VQA_ARTICLES = ("a", "an", "the")
# Those whose writing without the apostrophe is no other word, as "its" and "were" are.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITH_APOSTROPHE = {whole.replace("'", ""): whole for whole in _CONTRACTIONS.split()}


def vqa_normalised(text: str) -> str:
    """Return a text as VQA and TextVQA compare answers.

    Lower case; no commas, question marks or articles; other punctuation away where it stands beside
    a space, else a space; no full stops but in numbers; number words up to ten, and "none", as
    digits; apostrophes put into contractions. The rules of the evaluation server as they stand in
    ``pythia/tasks/processors.py`` (class EvalAIAnswerProcessor) of ``facebookresearch/mmf``. Their
    list also mends contractions that lack one of two apostrophes ("couldn'tve"); these stay here.
    """
    said = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    said = said.replace("\n", " ").replace("\t", " ").strip()
    before = said
    for sign in _VQA_REMOVED:
        beside_space = f"{sign} " in before or f" {sign}" in before
        said = said.replace(sign, "" if beside_space else " ")
    said = re.sub(r"\.(?!\d)", "", said)
    words = (_VQA_NUMBERS.get(word, word) for word in said.split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _VQA_ARTICLES)


# Yes or no --------------------------------------------------------------------------------------

_NO = re.compile(r"\b(?:no|not)\b|n't\b|n\u2019t\b", re.IGNORECASE)


def _yes_no(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score 1 where the text says yes or no as the right answer does.

    A text that begins with "yes" or "no", or declares it, says so. Of any other the first sentence
    counts: "no" or "not" in it is a no, and all else a yes, which is the rule of POPE (arXiv
    2305.10355, ``evaluate.py`` of ``AoiDragon/POPE``); "isn't" is a no here, too. An empty text is
    neither.
    """
    read = read_open(text, cut=cut)
    said = read if read in ("yes", "no") else ""
    if not said:
        if cut and not read:
            return None
        sentence = final_part(text).split(".")[0]
        if sentence.strip():
            said = "no" if _NO.search(sentence) else "yes"
    return Reading(float(said == question.answer.strip().lower()), said)


# Counting ---------------------------------------------------------------------------------------

_WHOLE_NUMBER = re.compile(r"(?<![\w.,-])\d+(?![\w]|[.,]\d)")
_NOTHING = re.compile(r"\b(?:no|none|nothing)\b", re.IGNORECASE)


def _count(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score 1 for the right number, in digits or as a word.

    What the text declares, or says alone, is its number, else the only one in it; "no" and "none"
    are 0 where there is no number. A text with several different numbers names none. TallyQA (arXiv
    1810.12440) counts equal numbers; its models did not write sentences, so the reading is ours.
    """
    read = read_open(text, cut=cut)
    if cut and not read:
        return None
    said = read if read.isdecimal() else _only_number(text)
    return Reading(float(bool(said) and int(said) == int(question.answer)), said)


def _only_number(text: str) -> str:
    # Every word on its own, so that "six," and "(six)" are numbers, too.
    words = [normalised(word) for word in final_part(text).split()]
    told = {str(int(number)) for number in _WHOLE_NUMBER.findall(" ".join(words))}
    if not told and _NOTHING.search(final_part(text)):
        return "0"
    return told.pop() if len(told) == 1 else ""


# Boxes ------------------------------------------------------------------------------------------

_NUMBER = r"\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*"
_FOUR = rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}"
_BOXES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\"bbox(?:_2d)?\"\s*:\s*\[{_FOUR}\]",
        rf"<\|?box(?:_start)?\|?>\s*[\[\(]*{_NUMBER},{_NUMBER}\)?\s*,\s*\(?{_NUMBER},{_NUMBER}[\]\)]*",
        rf"\[{_FOUR}\]",
        rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*(?:and|to|-)?\s*\({_NUMBER},{_NUMBER}\)",
        rf"\({_FOUR}\)",
        rf"^[^\w.-]*{_FOUR}\W*$",
    )
)
"""Ways in which models write a box, the surest first; the first box of the first way counts."""

Box = tuple[float, float, float, float]


def _box(text: str, question: Question, cut: bool, unit: BoxUnit) -> Reading | None:
    """Score by the intersection over union of the box in the text with the right one.

    The usual measure of RefCOCO, whose accuracy counts boxes from 0.5 on (``lmms_eval/tasks/
    refcoco/utils_rec.py`` of ``EvolvingLMMs-Lab/lmms-eval``). See `read_box` for what is read as
    a box. Its numbers are in the unit that was asked for, whatever their size: a unit that is
    guessed from the numbers would make a wrong box in one unit right in another.
    """
    box = read_box(marked_part(text))
    if box is None:
        return None if cut else Reading(0.0, "")
    width, height = question.size or (1, 1)
    left, top, right, bottom = json.loads(question.answer)
    wanted = (left / width, top / height, right / width, bottom / height)
    across, down = {"fraction": (1, 1), "thousandth": (1000, 1000), "pixel": (width, height)}[unit]
    found = (box[0] / across, box[1] / down, box[2] / across, box[3] / down)
    return Reading(overlap(found, wanted), json.dumps([round(value, 4) for value in found]))


def read_box(text: str) -> Box | None:
    """Return left, top, right and bottom of the first box in a text, in whatever unit; or None.

    Read are ``{"bbox_2d": [1, 2, 3, 4]}`` (Qwen2.5-VL and later), ``<box>[[1, 2, 3, 4]]</box>``
    (InternVL), ``<|box_start|>(1,2),(3,4)<|box_end|>`` (Qwen2-VL), ``[1, 2, 3, 4]`` (LLaVA),
    ``(1,2),(3,4)``, ``(1, 2, 3, 4)``, and four numbers alone. Corners are not put in order. Boxes
    that begin with the vertical coordinate (``box_2d`` of Gemini, PaliGemma's location tokens) are
    not read.
    """
    said = " ".join(text.split())  # one space at most, so that no pattern matches it two ways
    for pattern in _BOXES:
        if found := pattern.search(said):
            left, top, right, bottom = map(float, found.groups())
            return left, top, right, bottom
    return None


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes; 0 where one has no area."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    if across <= 0 or down <= 0 or min(areas) <= 0:
        return 0.0
    both = across * down
    return min(1.0, both / (sum(areas) - both))


RULES: Mapping[Scoring, Rule] = {
    "exact": Rule(ACCURACY, _exact),
    "contains": Rule(ACCURACY, _contains),
    "formula": Rule(ACCURACY, _formula),
    "vqa": Rule("VQA accuracy", _vqa),
    "anls": Rule("ANLS", _anls),
    "yes-no": Rule("F1", _yes_no),
    "count": Rule(ACCURACY, _count),
    "box": Rule("mean IoU", _box),
}
"""How each is read and scored. F1 is no mean: see `tokenprune_eval.results.scores`."""
