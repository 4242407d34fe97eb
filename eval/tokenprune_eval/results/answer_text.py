r"""What the text of a model answers: the choice that it names, or its answer to an open question.

A text is read in this order, and what comes first decides:

1. What the model thought (``<think>…</think>``) is left out. Where it marks its answer
   (``<answer>…</answer>``, ``\boxed{…}``), only that is read.
2. A text that is a letter or a choice and nothing else.
3. Letters that the text declares to be the answer ("the answer is B", "B is correct", "B, because
   …", a line with a letter alone), and choices declared by name ("the answer is a red car"). Of
   several declarations the last counts, as people correct themselves; a "final answer" counts
   before any other.
4. The one choice whose text is in the answer, then the one letter that stands in it as a letter.

A declaration that something is *not* the answer is none. A text that declares several choices at
once, or refuses to answer, names nothing: nothing is ever guessed.

The forms that are read are those of `lmms_eval.tasks._task_utils.mcq_extract`, of lmms-eval's
copy of the MMMU parser, and of VLMEvalKit's `can_infer`; where these take a letter out of ordinary
prose (an article, the last letter, a random one), this reader names nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenprune_eval.data.question import LETTERS, Question

# The part of a text that is the answer ----------------------------------------------------------

_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'")  # quotation marks
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")  # dashes
    | {"\u3002": ". ", "\u3001": ", "}  # full stop and comma of Chinese
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")  # signs of no width
)

_THINKING = r"(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad"
_THINKING += r"|summary|caption)"
_THOUGHT = re.compile(
    rf"(?P<open><(?:\w+:)?{_THINKING}>|<\|begin_of_thought\|>|◁think▷|\[think\]"
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought))"
    rf"|(?P<close></(?:\w+:)?{_THINKING}>|<\|end_of_thought\|>|◁/think▷|\[/think\]"
    r"|<\|channel\|>\s*final|<\|end\|>|<channel\|>)",
    re.IGNORECASE,
)
"""Marks of thoughts: DeepSeek's and Qwen's, LLaVA-CoT's, Sky-T1's, Kimi's, Mistral's, gpt-oss's."""

_CONTAINER = re.compile(
    r"<(?P<tag>answer|final_answer|final|conclusion|solution|output)>"
    r"|<\|begin_of_(?P<special>box|solution|answer)\|>"
    r"|\\(?:boxed|fbox)\s*(?P<brace>\{)",
    re.IGNORECASE,
)

_LATEX = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mathit)\s*\{([^{}]*)\}")
_DECORATION = re.compile(
    r"<\|[^<>|\s]*\|>|</?(?:s|eos|bos|end_of_turn|end_of_utterance)>"  # tokens left in the text
    r"|[*`$]|\\[()\[\]]|^[ \t]*(?:#+|>|[-•])[ \t]+|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)",
    re.MULTILINE,
)
_NEXT_TURN = re.compile(r"\n\s*(?:question|user|human|q)\s*:", re.IGNORECASE)


def marked_part(text: str) -> str:
    """Return the part of a text that is the answer, as it was written.

    Thoughts are left out, and where the answer is marked, all around it; no sign is changed, as an
    answer may be spelled out from a picture.

    Parameters
    ----------
    text
        What the model said.
    """
    said = _without_thoughts(text)
    while (inside := _last_container(said)) is not None:
        said = inside
    return said.strip()


def final_part(text: str) -> str:
    """Return the part of a text that is the answer, without thoughts and decoration.

    Parameters
    ----------
    text
        What the model said.

    Returns
    -------
    str
        Empty where the model only thought.
    """
    said = marked_part(unicodedata.normalize("NFKC", text.translate(_PLAIN)))
    while (bare := _LATEX.sub(r"\1", said)) != said:
        said = bare
    said = _DECORATION.sub("", said)
    # One space at most, so that no pattern has two ways to match the same spaces.
    said = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", said)).strip()
    # A model that goes on after its answer writes the next question of a dialogue.
    begun = _NEXT_TURN.search(said)
    return said[: begun.start()].strip() if begun else said


def _without_thoughts(text: str) -> str:
    """Return what stands outside of thoughts.

    A thought that is not closed goes to the end. A close without its opening, which some chat
    templates put into the prompt, ends a thought from the start.
    """
    kept: list[str] = []
    start, thinking = 0, False
    for mark in _THOUGHT.finditer(text):
        if mark["open"]:
            if not thinking:
                kept.append(text[start : mark.start()])
            thinking = True
        else:
            if not thinking:
                kept.clear()
            thinking, start = False, mark.end()
    if not thinking:
        kept.append(text[start:])
    return " ".join(kept)


def _last_container(text: str) -> str | None:
    """Return what is inside the last mark of an answer; one that is not closed goes to the end."""
    found = list(_CONTAINER.finditer(text))
    if not found:
        return None
    opening = found[-1]
    rest = text[opening.end() :]
    if opening["brace"]:
        return rest[: _closing_brace(rest)]
    end = rf"</{opening['tag']}\s*>" if opening["tag"] else r"<\|end_of_\w+\|>"
    closing = re.search(end, rest, re.IGNORECASE)
    return rest[: closing.start()] if closing else rest


def _closing_brace(text: str) -> int:
    depth = 1
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return place
    return len(text)


# Words ------------------------------------------------------------------------------------------

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})
_OUTER = " .,;:!?\"'`()[]{}*"


def normalised(text: str) -> str:
    """Return a text as answers are compared: words in lower case, numbers in digits, no articles.

    Outer punctuation and spaces go too. A text of one word keeps it, article or not.
    """
    plain = unicodedata.normalize("NFKC", text.translate(_PLAIN)).lower().strip(_OUTER)
    words = [_DIGITS.get(word, word) for word in plain.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


# Word characters of scripts that put spaces between words: beside Chinese, Japanese and Korean
# signs a letter stands alone. Without regard to case, `re` would go through every sign of these
# ranges.
_W = r"(?-i:[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])"

_WORD_SIGN = re.compile(_W)

_QUOTES = r"[\(\[\{\"'<]*"
_LEAD = (
    r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?"
    r"(?:(?:option|choice|letter|alternative|answer|opción|opção|opzione|вариант)\b|选项|選項)"
    r"\s*[:#]?\s*)"
)
_LABEL = re.compile(
    rf"(?P<lead>{_LEAD})?(?P<left>[\(\[\{{\"'<]*)\s*(?P<letter>[A-Za-z])\s*(?P<right>[\)\]\}}\"'>]*)"
    rf"(?!{_W}|[-'&/]{_W}{{2}}|['&]{_W}|-{_W}{{2}})",
    re.IGNORECASE,
)

_ENDS = re.compile(r"\s*(?:$|[.,;:!)\]}>]|\n|-+\s|\s-|=>|->|→)")
_GOES_ON = r"because|since|as\s+(?:it|the|there)|due\s+to|or\b|and\b|instead|rather"
_AFTER_LETTER = re.compile(
    rf"\s*(?:{_GOES_ON}|is|was|would|should|must|seems|appears|matches|fits|shows|describes)\b",
    re.IGNORECASE,
)
_AFTER_PRONOUN = re.compile(rf"\s*(?:{_GOES_ON}|is)\b", re.IGNORECASE)

_NOT = (
    r"(?:\b(?:not|never|neither|nor|without|except|excluding|unlike|rather\s+than|instead\s+of"
    r"|rul(?:e|es|ed|ing)\s+out|eliminat\w+|exclud\w+|reject\w*|discard\w*|than|nicht|keine?|pas"
    r"|cannot\s+be|can't\s+be)|n't|不是|不选|非|排除)"
)
_FILLER = r"(?:\s+(?:a|an|the|be|really|just|any|it|is|really|either|both))*"
_DENIED_BEFORE = re.compile(
    rf"{_NOT}{_FILLER}\s*{_LEAD}?{_QUOTES}\s*(?:(?:a|an|the)\s+)?$", re.IGNORECASE
)
_NO_BEFORE = re.compile(r"\bno\s+$", re.IGNORECASE)
_DENIED_AFTER = re.compile(
    r"\s*[\)\]\}\"']*\s*(?:\([^)]*\))?\s*[:,]?\s*"
    r"(?:(?:is|are|was|were|seems|looks|would\s+be|has\s+been|must\s+be|can\s+be)\s+)?"
    r"(?:\w+ly\s+|also\s+|therefore\s+)?"
    r"(?:wrong\b|incorrect\b|false\b|ruled\s+out|eliminated|excluded|out\b|impossible|unlikely"
    r"|not\s+(?:the\s+)?(?:correct|right|answer|it\b|true|possible|an?\s+option|supported|the\s+case)"
    r"|isn't\s+(?:the\s+)?(?:correct|right|answer|it\b|true)|(?:cannot|can't)\s+be"
    r"|(?:does\s+not|doesn't)\s+(?:match|fit|apply)|不对|不正确|错误|错)",
    re.IGNORECASE,
)
_JOINS = re.compile(
    r"\s*(?:,\s*(?:and|or|und|oder|et|ou|y|o)\b|,|/|&|\+|and\s*/\s*or\b|and\b|or\b|nor\b|und\b"
    r"|oder\b|et\b|ou\b|或者?|和|以及|または|と)\s*",
    re.IGNORECASE,
)
_JOINS_DENIED = re.compile(r"\s*(?:or|nor|and|/|,\s*(?:or|nor|and))\s*", re.IGNORECASE)
_PREDICATE = re.compile(
    r"\s+(?:is|has|was|does|shows|would|looks|seems|cannot|can't|isn't)\b", re.I
)
_CONDITION = re.compile(
    r"\b(?:if|whether|unless|suppose|assuming|why|when)\s+(?:the\s+)?$", re.IGNORECASE
)

# Declarations -----------------------------------------------------------------------------------

_COPULA = (
    r"(?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be|seems?(?:\s+to\s+be)?"
    r"|appears?\s+to\s+be|may\s+be|might\s+be|could\s+be|remains|lautet)"
)
_ADVERBS = (
    r"(?:\s*,?\s*\b(?:most\s+likely|likely|probably|clearly|therefore|thus|then|indeed|simply|just"
    r"|either|definitely|actually|now|still|hence|given\s+by|that\s+it\s+is|that|as\s+follows)\b,?)*"
)
_SIGN = r"(?:\"?\s*(?:[:=]+>?|->|=>|→))"

_STRONG = re.compile(
    # "The correct answer is", "Answer:", {"answer": "B"}
    r"(?P<final>\bfinal\s+)?\b(?:answer|option|choice|solution|response|selection|letter|conclusion"
    r"|guess|ans|(?:correct|right|best|appropriate|suitable|accurate|likely)\s+one)\b"
    r"(?:\s+(?:to|for|of)\s+(?:this|the|your)\s+\w+)?(?:\s+here)?"
    r"(?:\s+(?:that|which)(?:\s+\w+){1,5}?)?"
    rf"(?:\s*{_SIGN}|\s+{_COPULA}\b){_ADVERBS}\s*{_SIGN}?"
    # "Answer (B)", "answer B."
    rf"|\banswer\s+(?={_QUOTES}[A-Z][\)\]\}}\"'>]*\s*(?:$|[.,;:!\n]))"
    # Other languages
    r"|(?:正确)?(?:答案|選項|选项|回答)(?:应该|应)?(?:是|为|為|选|選|:)+"
    r"|(?:应该|应|故|因此|所以|我)?(?:选择|選擇|选|選)(?:项|項)?(?:是|为|:)?"
    r"|(?:答え|回答|正解|解答)\s*(?:は|:)|(?:정답|답변|답)\s*(?:은|는|:)"
    r"|\b(?:antwort|lösung)\b(?:\s+(?:ist|lautet|wäre))?\s*:?"
    r"|\b(?:réponse|choix)\b(?:\s+(?:correcte|exacte|juste))?\s*(?:est|:)"
    r"|\b(?:respuesta|opción|resposta|opção|alternativa)\b(?:\s+correcta|\s+correta)?\s*(?:es|é|:)"
    r"|\b(?:risposta|opzione)\b(?:\s+(?:corretta|giusta))?\s*(?:è|:)"
    r"|\b(?:ответ|вариант)\b\s*(?:[:-]|это)?|\bantwoord\b\s*(?:is|:)",
    re.IGNORECASE,
)
_WEAK = re.compile(
    # "I would go with", "I think it is"
    r"\bI(?:'d|'ll)?(?:\s+(?:would|will|have\s+to|must|also|therefore|then|can))*\s+"
    r"(?:choose|chose|pick|picked|select|selected|say|guess|answer|go\s+with|go\s+for|vote\s+for"
    r"|opt\s+for|think|believe)\b"
    rf"(?:\s+(?:that|it(?:'s|\s+{_COPULA})|this\s+is))*{_ADVERBS}"
    # "It's", "that must be"
    rf"|\b(?:it|this|that|he|she)(?:'s|\s+{_COPULA}){_ADVERBS}",
    re.IGNORECASE,
)
_HENCE = re.compile(
    r"(?:\b(?:so|thus|hence|therefore|then|consequently|finally|overall|leaves(?:\s+us\s+with)?"
    r"|leaving|going\s+with|go\s+with|but(?:\s+rather)?|corresponds?\s+to|points?\s+to)\b,?"
    r"|\b(?:definitely|certainly|clearly|obviously|probably|perhaps|maybe)\b|=>|->|→|⇒|∴)\s*",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"\s*(?:\([^)]*\)\s*)?,?\s*(?:is|seems|appears\s+to\s+be|looks|would\s+be|must\s+be|should\s+be)"
    r"(?:\s+\w+ly)?\s+(?:the\s+)?(?:most\s+|more\s+|only\s+)?"
    r"(?:correct|right\b|best|better|true\b|accurate|appropriate|answer|likely|suitable|one\b)"
    r"|\s*(?:\([^)]*\)\s*)?(?:best\s+)?(?:matches|fits|describes)\b"
    r"|\s*(?:项|項|选项)?(?:是)?正确",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\b(?:cannot|can't|can\s+not|could\s+not|couldn't|unable\s+to|not\s+able\s+to|impossible\s+to"
    r"|no\s+way\s+to|don't|do\s+not|not\s+(?:sure|certain|possible\s+to|enough)|difficult\s+to"
    r"|hard\s+to|insufficient)\b.{0,40}?"
    r"\b(?:tell|determine\w*|say|see|answer|help|assist|identify|know|provide|view|process|be\s+sure"
    r"|information|if|whether|which|what)\b"
    r"|\bnone\s+of\s+(?:the|these|them)\b|\bnot\s+(?:visible|shown|clear|provided|given)\b|无法|不能确定",
    re.IGNORECASE | re.DOTALL,
)
_WORDS_SEARCHED = 60
"""Of a longer text only the last sentence is searched for a choice: it tells, then concludes."""


@dataclass(frozen=True)
class _Declared:
    """Something declared to be the answer; `letter` is empty for several, or for no choice."""

    place: int
    letter: str
    final: bool = False


@dataclass(frozen=True)
class _Label:
    """A letter that stands for a choice."""

    start: int
    end: int
    letter: str
    dressed: bool


def read_choice(text: str, question: Question, *, cut: bool = False) -> str:
    """Return the letter of the choice that a text names, or ``""``; see the module.

    Parameters
    ----------
    text
        What the model said.
    question
        A question with choices.
    cut
        Whether the text was cut off. It then counts only what is declared, or is one sentence.
    """
    return _Reader(question.choices).read(final_part(text), cut)


class _Reader:
    """Reads texts that answer one question."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.letters = LETTERS[: len(choices)]
        self.choices = choices
        self.plain = [normalised(choice) for choice in choices]
        self.phrases = [_phrase(choice) for choice in choices]
        # A longer piece than the longest choice; without a bound, long texts take quadratic time.
        self._reach = 100 + 2 * max(map(len, choices), default=0)

    def read(self, said: str, cut: bool) -> str:
        """Return the letter, or ``""``."""
        if whole := self._whole(said):
            return whole
        said = self._without_list(said)
        declared = sorted(self._declared_letters(said), key=lambda one: one.place)
        if (letter := _last(declared)) is not None:
            return letter
        if (letter := _last(list(self._declared_texts(said, _WEAK)))) is not None:
            return letter
        if letter := self._leading_text(said):
            return letter
        sentences = _sentences(said)
        if cut and len(sentences) > 1:
            return ""
        refused = _REFUSES.search(said) and not any(map(_REFUSES.search, self.choices))
        if refused or not sentences:
            return ""
        long = len(said.split()) > _WORDS_SEARCHED
        within = self._mentioned_texts(sentences[-1] if long else said)
        if within:
            return within.pop() if len(within) == 1 else ""
        return "" if cut else self._mentioned_letter(said)

    def _whole(self, said: str) -> str:
        """Return the letter of a text that is a letter or a choice and nothing else."""
        bare = said.strip(" .,;:!?#\n")
        # What a choice says counts before a small letter that might be meant as one.
        label = _LABEL.fullmatch(bare)
        if label and label["letter"].upper() in self.letters and label["letter"].isupper():
            return label["letter"].upper()
        plain = normalised(said)
        same = [
            letter
            for letter, choice in zip(self.letters, self.plain, strict=True)
            if choice == plain and plain
        ]
        if len(same) == 1:
            return same[0]
        if label and label["letter"].upper() in self.letters:
            return label["letter"].upper()
        return ""

    # Letters

    def _label(self, said: str, place: int) -> _Label | None:
        """Return the letter that stands at a place as a name of a choice, not as a word."""
        match = _LABEL.match(said, place)
        if match is None:
            return None
        start, end = match.start("left" if match["left"] else "letter"), match.end()
        before = match.start("lead") if match["lead"] else start
        if before and re.match(_W, said[before - 1]):
            return None
        dressed = bool(match["lead"]) or bool(match["left"] and match["right"])
        raw, rest = match["letter"], self._rest(said, end)
        letter = raw.upper()
        if rest.startswith("?") or (re.match(r"\.[a-z]{2}", rest) and not self._own(rest, letter)):
            return None
        ends = bool(_ENDS.match(rest))
        if (raw.isupper() and raw not in "AI") or (match["left"] and match["right"]):
            stands = True  # no English word is one such letter
        elif raw == "A":
            stands = ends or bool(_AFTER_LETTER.match(rest)) or self._own(rest, letter)
        elif raw == "I":
            # "I, too, think" is a pronoun.
            stands = ends and not rest.lstrip().startswith(",")
            stands = stands or bool(_AFTER_PRONOUN.match(rest)) or self._own(rest, letter)
        else:
            stands = ends or bool(re.match(rf"\s*(?:{_GOES_ON})", rest, re.IGNORECASE))
        return _Label(start, end, letter, dressed) if stands else None

    def _rest(self, said: str, place: int) -> str:
        """Return what follows a place, as much of it as is ever looked at."""
        return said[place : place + self._reach]

    def _own(self, rest: str, letter: str) -> bool:
        """Say whether a letter is followed by the text of its own choice."""
        if letter not in self.letters:
            return False
        text = re.sub(r"^[\s.:,;)\]\-]+", "", rest)
        return self.phrases[self.letters.index(letter)].match(text) is not None

    def _several(self, said: str, label: _Label) -> bool:
        """Say whether another letter is joined to one, as in "A or B", "A, B and C"."""
        rest = label.end + len(_closing(said[label.end :]))
        join = _JOINS.match(said, rest)
        if join is None:
            other = self._label(said, rest + 1) if said[rest : rest + 1] == " " else None
            return (
                other is not None
                and other.letter in self.letters
                and said[other.start].isupper()
                and not said[other.end :].strip(" .,;!\n")
            )
        other = self._label(said, join.end())
        if other is None or other.letter not in self.letters or other.letter == label.letter:
            return False
        if _DENIED_AFTER.match(said, other.end):
            return False
        listed = "," not in join[0] or re.search(r"[a-z]", join[0], re.IGNORECASE)
        return bool(listed) or not _PREDICATE.match(said, other.end)

    def _letter(self, said: str, place: int, final: bool = False) -> _Declared | None:
        """Return what is declared by the letter at a place."""
        label = self._label(said, place)
        if label is None or self._denied(said, label):
            return None
        if label.letter not in self.letters or self._several(said, label):
            return _Declared(place, "", final)
        return _Declared(place, label.letter, final)

    def _declared_letters(self, said: str) -> Iterator[_Declared]:
        """Yield declarations by letter, and those by name that speak of "the answer"."""
        yield from self._bare_lines(said)
        yield from self._leading_letter(said)
        for cue in _STRONG.finditer(said):
            if _CONDITION.search(_before(said, cue.start())):
                continue
            place = _skip(said, cue.end())
            found = self._letter(said, place, bool(cue["final"]))
            found = found or self._text_at(said, place, bool(cue["final"]))
            if found:
                yield found
        for cue in _WEAK.finditer(said):
            conditional = _CONDITION.search(_before(said, cue.start()))
            found = None if conditional else self._letter(said, _skip(said, cue.end()))
            if found:
                yield found
        for cue in _HENCE.finditer(said):
            label = self._label(said, cue.end())
            if label and re.match(r"[\s.!)\]]*(?:$|\n|[.;,])|\s+it\s+is\b", said[label.end :]):
                found = self._letter(said, cue.end())
                if found:
                    yield found
        yield from self._last_clause(said)
        for label in self._labels(said):
            right = _IS_RIGHT.match(said, self._past_own(said, label))
            if right and label.letter in self.letters and not self._denied(said, label):
                yield _Declared(label.start, label.letter)

    def _last_clause(self, said: str) -> Iterator[_Declared]:
        """Yield the letter that is the last clause: "it is red, B"."""
        place = max(said.rfind(sign) for sign in ",;:") + 1
        label = self._label(said, _skip(said, place)) if place else None
        if label is None or said[label.end :].strip(" .!)]}\"'") or said[label.start].islower():
            return
        # "A, B" is a list.
        if not re.search(rf"(?<!{_W})[A-Za-z][)\]]?[,;:]$", _before(said, place)):
            found = self._letter(said, label.start)
            if found:
                yield found

    def _bare_lines(self, said: str) -> Iterator[_Declared]:
        """Yield the lines that are a letter alone; several one after the other say nothing."""
        before: _Declared | None = None
        place = 0
        for line in said.split("\n"):
            bare = line.strip(" .,;:!\t")
            match = _LABEL.fullmatch(bare)
            if match and match["letter"].isupper() and match["letter"] in self.letters:
                letter = match["letter"]
                joined = before is not None and before.letter != letter
                before = _Declared(place, "" if joined else letter)
                yield before
            elif bare:
                before = None
            place += len(line) + 1

    def _leading_letter(self, said: str) -> Iterator[_Declared]:
        """Yield the letter that the text begins with: "B. a red car", "B, because …"."""
        label = self._label(said, 0)
        if label is None or label.letter not in self.letters or said[label.start].islower():
            return
        rest = said[label.end :]
        # "A: a dog" is the answer to "Q: …", unless the dog is choice A.
        if said[label.start] == "A" and rest.startswith(":") and not self._own(rest, "A"):
            other = self._text_at(said, _skip(said, label.end + 1))
            if other:
                yield other
                return
        if (found := self._letter(said, 0)) is not None:
            yield found

    def _labels(self, said: str) -> Iterator[_Label]:
        """Yield every letter in a text that may stand for a choice."""
        for match in re.finditer(rf"(?<!{_W})(?<!{_W}['\-.&/])[A-Z](?!{_W})", said):
            left = re.search(
                rf"(?:(?<!{_W}){_LEAD})?{_QUOTES}\s*$", _before(said, match.start()), re.I
            )
            label = self._label(said, match.start() - len(left[0] if left else ""))
            if label is not None and label.letter == match[0]:
                yield label

    def _denied(self, said: str, label: _Label) -> bool:
        before = _DENIED_BEFORE.search(_before(said, label.start))
        return bool(before or _DENIED_AFTER.match(said, label.end))

    def _past_own(self, said: str, label: _Label) -> int:
        """Return where a text goes on behind a letter and its own choice, if that follows."""
        if not self._own(self._rest(said, label.end), label.letter):
            return label.end
        skipped = re.compile(r"[\s.:,;)\]\-(]+").match(said, label.end)
        place = skipped.end() if skipped else label.end
        own = self.phrases[self.letters.index(label.letter)].match(said, place)
        return own.end() if own else label.end

    def _mentioned_letter(self, said: str) -> str:
        """Return the one letter that is mentioned and not denied; articles and pronouns are none.

        In prose a letter counts only in brackets, behind "option", or before its own choice: it may
        be on a shirt in the picture.
        """
        found: set[str] = set()
        denied: _Label | None = None
        for label in self._labels(said):
            if label.letter not in self.letters:
                continue
            between = said[denied.end : label.start] if denied else ""
            if self._denied(said, label) or (denied and _JOINS_DENIED.fullmatch(between)):
                denied = label
                continue
            if label.dressed or self._own(self._rest(said, label.end), label.letter):
                found.add(label.letter)
        return found.pop() if len(found) == 1 else ""

    # Texts of choices

    def _text_at(self, said: str, place: int, final: bool = False) -> _Declared | None:
        """Return the choice whose text stands at a place, the longest of several."""
        found = self._longest(said, place)
        if found is None:
            return None
        end, letter = found
        if _DENIED_AFTER.match(said, end):
            return None
        join = _JOINS.match(said, end)
        other = self._longest(said, _skip(said, join.end())) if join else None
        if join and other and other[1] != letter and join[0].strip() != ",":
            letter = ""
        return _Declared(place, letter, final)

    def _longest(self, said: str, place: int) -> tuple[int, str] | None:
        ends = [
            (match.end(), letter)
            for letter, phrase in zip(self.letters, self.phrases, strict=True)
            if (match := phrase.match(said, place))
        ]
        if not ends:
            return None
        longest = max(end for end, _ in ends)
        letters = [letter for end, letter in ends if end == longest]
        return (longest, letters[0]) if len(letters) == 1 else None

    def _declared_texts(self, said: str, cues: re.Pattern[str]) -> Iterator[_Declared]:
        for cue in cues.finditer(said):
            if not _CONDITION.search(_before(said, cue.start())):
                found = self._text_at(said, _skip(said, cue.end()))
                if found:
                    yield found

    def _leading_text(self, said: str) -> str:
        """Return the choice that the text begins with, set off by punctuation: "Yes, it is."."""
        start = _skip(said, 0)
        found = self._longest(said, start)
        if found is None or not re.match(r"\s*(?:$|[.,;:!\n])", said[found[0] :]):
            return ""
        declared = self._text_at(said, start)
        # "red, blue" is a list.
        join = _JOINS.match(said, found[0])
        listed = join is not None and self._longest(said, join.end()) is not None
        return "" if declared is None or listed else declared.letter

    def _mentioned_texts(self, said: str) -> set[str]:
        """Return the choices whose texts are in the answer and not denied.

        A text inside a longer one does not count: "red" in "red and blue".
        """
        found = [
            (match.start(), match.end(), letter)
            for letter, phrase in zip(self.letters, self.phrases, strict=True)
            for match in phrase.finditer(said)
        ]
        longest = [
            one
            for one in found
            if not any(
                other[0] <= one[0] and one[1] <= other[1] and other[1] - other[0] > one[1] - one[0]
                for other in found
            )
        ]
        return {
            letter
            for start, end, letter in longest
            if not _DENIED_BEFORE.search(_before(said, start))
            and not _NO_BEFORE.search(_before(said, start))
            and not _DENIED_AFTER.match(said, end)
        }

    def _without_list(self, said: str) -> str:
        """Return a text without the choices that it repeats, letter and text, two at least."""
        repeated = [
            (label, end)
            for label in self._labels(said)
            if label.letter in self.letters
            and (end := self._past_own(said, label)) > label.end
            and not (_IS_RIGHT.match(said, end) or _DENIED_AFTER.match(said, end))
        ]
        if len({label.letter for label, _ in repeated}) < 2:
            return said
        for label, end in reversed(repeated):
            said = f"{said[: label.start]}\n{said[end:]}"
        return re.sub(r"\n[\s.;,]*\n", "\n", said).strip()


def _last(declared: Sequence[_Declared]) -> str | None:
    """Return the letter of the last declaration that counts; None where there is none."""
    counting = [one for one in declared if one.final] or declared
    return counting[-1].letter if counting else None


def _skip(said: str, place: int) -> int:
    """Return where a letter or a choice begins behind spaces, quotes and articles."""
    match = re.compile(r"[\s:\"']*").match(said, place)
    return match.end() if match else place


def _before(said: str, place: int) -> str:
    """Return the few words before a place."""
    return said[max(0, place - 60) : place]


def _closing(rest: str) -> str:
    match = re.match(r"[.)\]}\"']*", rest)
    return match[0] if match and match[0] != "." else ""


def _sentences(said: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", said) if part.strip()]


class _Phrase:
    """Finds a choice's text, with or without its article, at the bounds of words.

    The bounds are looked at here and not by the pattern: to compile a class of signs takes
    milliseconds, and a data set has thousands of choices.
    """

    def __init__(self, choice: str) -> None:
        plain = unicodedata.normalize("NFKC", choice.translate(_PLAIN)).strip(_OUTER)
        words = plain.split()
        if len(words) > 1 and words[0].lower() in _ARTICLES:
            words = words[1:]
        # A choice that is a letter is only ever the whole answer.
        letter = len(plain) == 1 and plain.isalpha() and plain.isascii()
        text = r"[\s,]+".join(map(_word, words)) if words and not letter else "(?!)"
        self._found = re.compile(rf"(?:\b(?:a|an|the)\s+)?({text})", re.IGNORECASE)

    def match(self, said: str, place: int = 0) -> re.Match[str] | None:
        """Return the text at a place, if it stands there."""
        found = self._found.match(said, place)
        return found if found and self._stands(said, found) else None

    def finditer(self, said: str) -> Iterator[re.Match[str]]:
        """Yield every place where the text stands."""
        return (found for found in self._found.finditer(said) if self._stands(said, found))

    @staticmethod
    def _stands(said: str, found: re.Match[str]) -> bool:
        """Say whether neither a word nor a number goes on before or behind the text."""
        start, end = found.span(1)
        inside_word = _is_word(said[start]) and (
            _is_word(said[start - 1 : start])
            or (said[start - 1 : start] == "-" and _is_word(said[start - 2 : start - 1]))
            or (said[start - 1 : start] in (".", ",") and said[start - 2 : start - 1].isdigit())
        )
        goes_on = _is_word(said[end - 1]) and (
            _is_word(said[end : end + 1])
            or (said[end : end + 1] == "-" and _is_word(said[end + 1 : end + 2]))
            or (said[end : end + 1] in (".", ",") and said[end + 1 : end + 2].isdigit())
        )
        return not inside_word and not goes_on


def _is_word(sign: str) -> bool:
    return _WORD_SIGN.fullmatch(sign) is not None


_phrase = lru_cache(maxsize=4096)(_Phrase)


def _word(word: str) -> str:
    """Return a pattern for a word; numbers are found as digits and as words.

    "one" alone is not: it is a pronoun more often than a number.
    """
    low = word.lower()
    if low in _DIGITS and low != "one":
        return f"(?:{re.escape(word)}|{_DIGITS[low]})"
    if low.isdecimal() and low in _DIGITS.values() and low != "1":
        return f"(?:{low}|{_NUMBERS[int(low)]})"
    return re.escape(word)


# Open questions ---------------------------------------------------------------------------------

_YES_NO = re.compile(
    r"(?P<word>yes|no)\b(?=\s*(?:$|[.,;:!\n])|\s+(?:it|there|this|that|these|those|he|she|they|we|you|I)\b)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:it|this|that|he|she|they|(?:the|this|that|its|his|her|their)\s[^,.;\n]{1,60}?)"
    r"(?:'s|\s+(?:is|are|was|were|reads?|says?))\s+(?P<rest>[^,.;\n]+)$",
    re.IGNORECASE,
)
_LONGEST_REST = 5
"""Words behind "it is" that still are an answer and no description."""

_NUMBER = re.compile(rf"(?<!{_W})-?\d+(?:[.,]\d+)*(?!{_W})")


def read_open(text: str, *, cut: bool = False) -> str:
    """Return the answer to an open question in a text, normalised; ``""`` where there is none.

    What is declared ("the answer is red") is taken out of its sentence, so is "yes" or "no" at the
    start, and what a single short sentence says of its subject ("the shape is a circle"). Any other
    text is the answer as a whole. The right answer plays no part.

    Parameters
    ----------
    text
        What the model said.
    cut
        Whether the text was cut off. It then counts only if its answer is whole.
    """
    said = final_part(text)
    if (found := _YES_NO.match(said)) and not (cut and found.end() == len(said)):
        return found["word"].lower()
    cues = list(_STRONG.finditer(said))
    cues = [cue for cue in cues if cue["final"]] or cues
    if cues:
        rest = said[_skip(said, cues[-1].end()) :]
        end = re.search(r"[.!?](?:\s|$)|\n", rest)
        told = rest[: end.start()] if end else rest
        if told.strip() and (end or not cut):
            return normalised(told)
    sentences = _sentences(said)
    if cut:
        # The last sentence is the one that was cut.
        sentences = sentences[:-1]
        if len(sentences) != 1 or len(sentences[0].split()) > _LONGEST_REST:
            return ""
    if len(sentences) == 1:
        whole = sentences[0].strip(_OUTER)
        sentence = _SENTENCE.fullmatch(whole)
        if sentence and len(sentence["rest"].split()) <= _LONGEST_REST:
            return normalised(sentence["rest"])
        return normalised(whole)
    return normalised(said)


def is_right(text: str, answer: str, *, cut: bool = False) -> bool | None:
    """Say whether a text gives the right answer to an open question; None where it was cut before.

    It does if both are equal as `normalised` or as `read_open` reads them, or if the right answer
    is a number and the only one in the text.

    Parameters
    ----------
    text
        What the model said.
    answer
        The right answer.
    cut
        Whether the text was cut off.
    """
    read = read_open(text, cut=cut)
    if cut and not read:
        return None
    wanted = normalised(answer)
    if wanted and wanted in (read, normalised(final_part(text))):
        return True
    if read and read == read_open(answer):
        return True
    if _NUMBER.fullmatch(wanted):
        told = set(_NUMBER.findall(normalised(final_part(text))))
        return told == {wanted}
    return False
