"""How answers are read: one line for each phrasing, and what it names; ``""`` is nothing."""

# ruff: noqa: RUF001  (full-width letters and brackets are what is read here)

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="evaluating needs the extra `eval`")

from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import EngineAnswer
from tokenprune_eval.evaluation.scoring import prompt_of, score
from tokenprune_eval.results.answer_text import final_part, is_right, read_choice, read_open
from tokenprune_eval.results.records import UNPRUNED, Condition

CARS = ("a blue car", "a red car", "a green bus", "a bicycle")
ANIMALS = ("man", "woman", "child", "dog")
COLORS = ("red", "blue", "red and blue", "green")
COUNTS = ("1", "2", "3", "4")
YES_NO = ("Yes", "No")
STATES = ("moving", "not moving", "broken", "cannot be determined")
DEEDS = ("He opens the door.", "He closes the window.", "He sits down.", "He leaves the room.")
DOZENS = ("12", "15", "18", "20")
LETTERS = ("A", "B", "C", "D")
TURNS = ("It turns left.", "It turns right.", "It stops.", "It reverses.")
PEOPLE = ("Alice", "Bob", "Carol", "Nobody")
BALLS = ("red", "blue", "green", "I cannot tell")
CROWDS = ("1 person", "2 people", "3 people", "more than 3 people")
TIMES = ("0:05", "0:15", "1:05", "None of the above")
TRUTH = ("true", "false")
PETS = ("cat", "dog", "bird", "fish", "elephant")
WAYS = tuple(f"way {number}" for number in range(9))


def question(choices: tuple[str, ...] = (), answer: str = "B") -> Question:
    return Question("1", "image", Path("x.png"), "which?", answer, choices)


PLAIN = [
    (CARS, "B", "B"),
    (CARS, "b", "B"),
    (CARS, " B\n", "B"),
    (CARS, "B.", "B"),
    (CARS, "(B)", "B"),
    (CARS, "(b)", "B"),
    (CARS, "[B]", "B"),
    (CARS, "B)", "B"),
    (CARS, '"B"', "B"),
    (CARS, "**B**", "B"),
    (CARS, "**B.** a red car", "B"),
    (CARS, "`B`", "B"),
    (CARS, "Option B", "B"),
    (CARS, "option b.", "B"),
    (CARS, "Ｂ", "B"),
    (CARS, "（B）", "B"),
    (CARS, "B: a red car", "B"),
    (CARS, "B) a red car", "B"),
    (CARS, "(B) a red car", "B"),
    (CARS, "B.a red car", "B"),
    (CARS, "B - a red car", "B"),
    (CARS, "B, because it is red.", "B"),
    (CARS, "B because option A is blue", "B"),
    (CARS, "C is the answer", "C"),
    (CARS, "A", "A"),
    (CARS, "A.", "A"),
    (CARS, "A because the car is blue", "A"),
    (CARS, "A, not B", "A"),
    (CARS, "A a blue car", "A"),
    (CARS, "B\n\nExplanation: option A is blue and option C is a bus.", "B"),
    (CARS, "B\nQuestion: what is the color of the bus?\nAnswer: C", "B"),
    (WAYS, "I", "I"),
    (WAYS, "I.", "I"),
    (WAYS, "(I)", "I"),
    (CARS, "B<|im_end|>", "B"),
]

DECLARED = [
    (CARS, "The answer is B.", "B"),
    (CARS, "the correct answer is: (D)", "D"),
    (CARS, "Answer: B", "B"),
    (CARS, "answer: b", "B"),
    (CARS, "Answer (C)", "C"),
    (CARS, "Final answer: **B**", "B"),
    (CARS, "The best option is C.", "C"),
    (CARS, "My answer would be (b).", "B"),
    (CARS, "The answer to this question is option D.", "D"),
    (CARS, '{"answer": "B"}', "B"),
    (CARS, "Therefore, the answer is most likely B", "B"),
    (CARS, "So the correct choice is B: a red car.", "B"),
    (CARS, "It's B, not A", "B"),
    (CARS, "It is B.", "B"),
    (CARS, "I would go with C", "C"),
    (CARS, "I choose option B.", "B"),
    (CARS, "I think it's D", "D"),
    (CARS, "I think it must be D", "D"),
    (CARS, "Option B is correct.", "B"),
    (CARS, "Option B (a red car) is the right one.", "B"),
    (CARS, "B is the best match, while A and C are wrong.", "B"),
    (CARS, "The car has no bus shape and it is red, hence (B).", "B"),
    (CARS, "The car is red and option A is blue.\n\nB", "B"),
    (CARS, "The answer is B. Option A is wrong, it is not blue.", "B"),
    (CARS, "The correct option is C, because option D has no wheels.", "C"),
    (CARS, "Option A is wrong. Option B is correct.", "B"),
    (CARS, "The answer is not A. The answer is B.", "B"),
    (CARS, "At first the answer seems to be A. Looking closer, the answer is B.", "B"),
    (CARS, "Final answer: B. Some would say that the answer is A.", "B"),
    (CARS, "If the car were blue, the answer would be A. The answer is B.", "B"),
    (CARS, "Is it A? No. It is B.", "B"),
    (CARS, "A. a blue car\nB. a red car\nC. a green bus\nD. a bicycle\nAnswer: D", "D"),
    (WAYS, "I think the answer is B", "B"),
    (WAYS, "I think that I would choose I.", "I"),
    (CARS, "答案是B。", "B"),
    (CARS, "正确答案：C", "C"),
    (CARS, "应该选B", "B"),
    (CARS, "B选项正确", "B"),
    (CARS, "答えはBです", "B"),
    (CARS, "정답은 B입니다", "B"),
    (CARS, "Antwort: B", "B"),
    (CARS, "Die richtige Antwort ist C.", "C"),
    (CARS, "La bonne réponse est B.", "B"),
    (CARS, "La respuesta correcta es (D)", "D"),
    (CARS, "A resposta é B", "B"),
    (CARS, "La risposta corretta è C", "C"),
    (CARS, "Ответ: B", "B"),
]

MARKED = [
    (CARS, "<think>Option A? No, the answer is not A.</think>\nB", "B"),
    (CARS, "<think>It may be A.</think>The answer is B.", "B"),
    (CARS, "Option A looks right, so A.\n</think>\n\nB", "B"),
    (CARS, "B<think>or is it A", "B"),
    (CARS, "<thinking>A</thinking> <answer>B</answer>", "B"),
    (CARS, "<answer>B", "B"),
    (CARS, "<answer> (b) a red car </answer>", "B"),
    (CARS, "Not A, so \\boxed{B}", "B"),
    (CARS, "The result is $\\boxed{\\text{B}}$.", "B"),
    (CARS, "\\boxed{a red car}", "B"),
    (
        CARS,
        "<|begin_of_thought|>A?<|end_of_thought|><|begin_of_solution|>B<|end_of_solution|>",
        "B",
    ),
    (CARS, "◁think▷A or C◁/think▷B", "B"),
    (CARS, "[THINK]A[/THINK]B", "B"),
    (CARS, "<think>A</think><|begin_of_box|>C<|end_of_box|>", "C"),
    (CARS, "<REASONING>A is blue.</REASONING><CONCLUSION>B</CONCLUSION>", "B"),
    (CARS, "<|channel|>analysis<|message|>A?<|end|><|channel|>final<|message|>B", "B"),
]

BY_TEXT = [
    (CARS, "a red car", "B"),
    (CARS, "A red car.", "B"),
    (CARS, "red car", "B"),
    (CARS, "The red car", "B"),
    (CARS, "The answer is a red car.", "B"),
    (CARS, "Answer: a bicycle", "D"),
    (CARS, "A: a bicycle", "D"),
    (CARS, "The picture shows a green bus at a stop.", "C"),
    (CARS, "It is not a blue car but a red car.", "B"),
    (CARS, "I think it is a bicycle.", "D"),
    (ANIMALS, "The answer is a dog.", "D"),
    (ANIMALS, "A dog.", "D"),
    (ANIMALS, "A woman is holding the ball", "B"),
    (ANIMALS, "It is a woman, not a man.", "B"),
    (COLORS, "red and blue", "C"),
    (COLORS, "The flag is red and blue.", "C"),
    (COLORS, "The answer is red", "A"),
    (COUNTS, "There are 3 cars.", "C"),
    (COUNTS, "There are three cars.", "C"),
    (COUNTS, "Two", "B"),
    (COUNTS, "One", "A"),
    (YES_NO, "Yes, there is no other car.", "A"),
    (YES_NO, "No.", "B"),
    (YES_NO, "no, it is not", "B"),
    (STATES, "The car is not moving.", "B"),
    (STATES, "This cannot be determined from the picture.", "D"),
    (("Tokyo", "New York", "York", "Paris"), "It was filmed in New York.", "B"),
    (("红色", "蓝色"), "红色", "A"),
]

MORE = [
    (TURNS, "The vehicle turns right at the intersection. So the answer is B.", "B"),
    (
        TURNS,
        "To determine what the car does, let me look at the frames.\n1. In "
        "the first frame the car is on the left.\n2. It then turns "
        "right.\n\nAnswer: B",
        "B",
    ),
    (TURNS, "It turns right.", "B"),
    (TURNS, "it turns right", "B"),
    (TURNS, "The car: It turns right", "B"),
    (
        TURNS,
        "Step 1: consider A. It does not turn left.\nStep 2: consider B. It does.\nConclusion: B",
        "B",
    ),
    (TURNS, "After careful consideration, I'd choose B over A.", "B"),
    (TURNS, "B is the answer, A is not.", "B"),
    (TURNS, "The answer is definitely not C. I believe it's B.", "B"),
    (TURNS, "A? B? It has to be B.", "B"),
    (
        TURNS,
        "A) It turns left: No\nB) It turns right: Yes\nC) It stops: No\nD) It "
        "reverses: No\n\nSo, B.",
        "B",
    ),
    (TURNS, "My choice: B", "B"),
    (TURNS, "I'll pick B.", "B"),
    (TURNS, "I vote for C.", "C"),
    (TURNS, "Selected option: D", "D"),
    (TURNS, "Correct: B", "B"),
    (TURNS, "**Final Answer**: B", "B"),
    (TURNS, "Final answer is B", "B"),
    (TURNS, "Final Answer: The correct option is B.", "B"),
    (TURNS, "The final answer is: $\\boxed{B}$", "B"),
    (TURNS, "The final answer is $\\boxed{B. It turns right.}$", "B"),
    (TURNS, "A: It turns right.", "B"),
    (TURNS, "(A) It turns left.", "A"),
    (TURNS, "It is either A or B, but I think B.", "B"),
    (TURNS, "It could be A, though B is more likely.", "B"),
    (TURNS, "I can't answer that, but if I had to guess, B.", "B"),
    (PEOPLE, "Bob", "B"),
    (PEOPLE, "The winner is Bob.", "B"),
    (PEOPLE, "Bob, not Alice", "B"),
    (PEOPLE, "Nobody is there", "D"),
    (PEOPLE, "It was Carol who opened the door.", "C"),
    (BALLS, "I cannot tell", "D"),
    (BALLS, "I cannot tell.", "D"),
    (BALLS, "D. I cannot tell", "D"),
    (BALLS, "The ball is red", "A"),
    (BALLS, "It's not blue; it's green.", "C"),
    (CROWDS, "There are 3 people.", "C"),
    (CROWDS, "three people", "C"),
    (CROWDS, "more than 3 people", "D"),
    (CROWDS, "B. 2 people", "B"),
    (TIMES, "0:15", "B"),
    (TIMES, "At 0:15", "B"),
    (TIMES, "None of the above", "D"),
    (TIMES, "none of the above.", "D"),
    (TRUTH, "True", "A"),
    (TRUTH, "False.", "B"),
    (TRUTH, "The statement is true.", "A"),
    (TRUTH, "It is false", "B"),
    (TRUTH, "A", "A"),
    (PETS, "E", "E"),
    (PETS, "E. elephant", "E"),
    (PETS, "e", "E"),
    (PETS, "The answer is E", "E"),
    (PETS, "e.g. a cat", "A"),
    (PETS, "i.e. dog", "B"),
    (PETS, "An elephant", "E"),
    (PETS, "It is a big elephant.", "E"),
    (PETS, "A cat is shown in the picture. The answer is A.", "A"),
    (PETS, "A bird in a cage", "C"),
    (
        TURNS,
        "Let me think step by step. The options are A, B, C and D. The car "
        "goes to the right. Therefore B.",
        "B",
    ),
    (TURNS, "Looking at the options A, B, C, and D, the most appropriate one is B.", "B"),
    (
        TURNS,
        "Option A says it turns left, which is wrong. Option C says it "
        "stops, which is wrong. Option B is right.",
        "B",
    ),
    (
        TURNS,
        "Options: A. It turns left. B. It turns right. C. It stops. D. It reverses. Answer: C",
        "C",
    ),
    (TURNS, "The answer is B, and not A.", "B"),
    (TURNS, "The answer is B, not A or C.", "B"),
    (TURNS, "It is not A, it is C.", "C"),
    (TURNS, "No, it is B", "B"),
    (TURNS, "Definitely B.", "B"),
    (TURNS, "Probably B", "B"),
    (TURNS, "B, I think.", "B"),
    (TURNS, "B I guess", "B"),
    (TURNS, "Hmm, B", "B"),
    (TURNS, "Sure, B.", "B"),
    (TURNS, "the letter b", "B"),
    (TURNS, "letter: B", "B"),
    (TURNS, "Letter B", "B"),
    (TURNS, "#B", "B"),
    (TURNS, "- B", "B"),
    (TURNS, "> B", "B"),
    (TURNS, "B\n\n\n", "B"),
    (TURNS, "B,", "B"),
    (TURNS, "B;", "B"),
    (TURNS, "B:", "B"),
    (TURNS, "A:", "A"),
    (TURNS, "<|im_start|>assistant\nB", "B"),
    (TURNS, "assistant: B", "B"),
    (TURNS, "ASSISTANT: B", "B"),
    (TURNS, "Assistant: The answer is B", "B"),
    (TURNS, '{"choice": "B"}', "B"),
    (TURNS, "{'answer': 'B'}", "B"),
    (TURNS, '```json\n{"answer": "B"}\n```', "B"),
    (TURNS, "answer = B", "B"),
    (TURNS, "[[B]]", "B"),
    (CARS, "The correct answer is **B. a red car**.", "B"),
    (CARS, "The correct answer is:\n\n**B. a red car**", "B"),
    (CARS, "The answer is: B) a red car", "B"),
    (CARS, "Based on the image, the vehicle is red. Therefore, the answer is (B) a red car.", "B"),
    (
        CARS,
        "Let's analyze the options:\n\nA. a blue car - the car is not blue.\nB. a red car - this "
        "matches.\nC. a green bus - there is none.\nD. a bicycle - no.\n\nThe correct answer is B.",
        "B",
    ),
    (CARS, "A. a blue car is incorrect because the car is red. B. a red car is correct.", "B"),
    (CARS, "The best answer is B because it shows a red car and not a blue car.", "B"),
    (CARS, "I'd say B", "B"),
    (CARS, "I believe the correct answer is C.", "C"),
    (CARS, "I'm going with D.", "D"),
    (CARS, "My final answer is C", "C"),
    (CARS, "Final Answer: (B)", "B"),
    (CARS, "### Final Answer\n\nB", "B"),
    (CARS, "### Answer: B", "B"),
    (CARS, "Answer:\nB", "B"),
    (CARS, "Answer: \n\n(B) a red car", "B"),
    (CARS, "ANSWER: B", "B"),
    (CARS, "Ans: B", "B"),
    (CARS, "The option that matches is B.", "B"),
    (CARS, "The correct letter is B", "B"),
    (CARS, "B is correct", "B"),
    (CARS, "B.\n\nThe vehicle is a red car.", "B"),
    (CARS, "(B)\nThe car is red, not blue as in (A).", "B"),
    (CARS, "Choice (C).", "C"),
    (CARS, "The image shows a red car, so the answer should be B.", "B"),
    (CARS, "Among the options, B is the most accurate.", "B"),
    (CARS, "It must be option C", "C"),
    (CARS, "That would be B.", "B"),
    (CARS, "the answer is b", "B"),
    (CARS, "answer is a", "A"),
    (CARS, "The answer is A", "A"),
    (CARS, "The answer is A, a blue car", "A"),
    (CARS, "the answer is: a", "A"),
    (CARS, "a", "A"),
    (CARS, "a)", "A"),
    (CARS, "a.", "A"),
    (CARS, "A: a blue car", "A"),
    (CARS, "A - a blue car", "A"),
    (CARS, "A blue car", "A"),
    (CARS, "A, B, and C are wrong, so the answer is D.", "D"),
    (CARS, "Options A and C can be ruled out. The answer is B.", "B"),
    (CARS, "It can't be A, so it's B.", "B"),
    (CARS, "We can eliminate A, C and D, which leaves B.", "B"),
    (CARS, "The answer isn't A; it's B.", "B"),
    (CARS, "B rather than A", "B"),
    (CARS, "B instead of C.", "B"),
    (CARS, "Not B but C", "C"),
    (CARS, "Between A and B, B is the better one", "B"),
    (CARS, "B (a red car)", "B"),
    (CARS, "**Answer:** B", "B"),
    (CARS, "**Answer: B. a red car**", "B"),
    (CARS, "*B*", "B"),
    (CARS, "Answer: $B$", "B"),
    (CARS, "$\\mathbf{B}$", "B"),
    (CARS, "The answer is $\\boxed{(B)}$", "B"),
    (CARS, "\\boxed{B. a red car}", "B"),
    (CARS, "<answer>\nB. a red car\n</answer>", "B"),
    (CARS, "<think>\nHmm </think> <answer>The answer is B</answer>", "B"),
    (CARS, "Looking at it, the car is red → B", "B"),
    (CARS, "=> B", "B"),
    (CARS, "B!", "B"),
    (CARS, "'B'", "B"),
    (CARS, "{B}", "B"),
    (CARS, "<B>", "B"),
    (CARS, "B</s>", "B"),
    (CARS, "Correct answer: B", "B"),
    (CARS, "Correct option: B", "B"),
    (CARS, "The right choice is B: a red car", "B"),
    (CARS, "选B。", "B"),
    (CARS, "答案：B", "B"),
    (CARS, "答案为（B）", "B"),
    (CARS, "我选择B", "B"),
    (CARS, "选项B是正确的", "B"),
    (CARS, "正解はCです。", "C"),
    (CARS, "답: B", "B"),
    (CARS, "Die Antwort lautet B.", "B"),
    (CARS, "Réponse : B", "B"),
    (CARS, "Respuesta: B", "B"),
    (CARS, "Правильный ответ: C", "C"),
    (CARS, "La respuesta es la opción B", "B"),
    (CARS, "Option B est correcte", "B"),
    (DEEDS, "He closes the window", "B"),
    (DEEDS, "B. He closes the window.", "B"),
    (DEEDS, "In the video, he closes the window.", "B"),
    (DEEDS, "A. He opens the door.", "A"),
    (DEEDS, "A He opens the door.", "A"),
    (DOZENS, "15", "B"),
    (DOZENS, "There are 15 people", "B"),
    (DOZENS, "fifteen", "B"),
    (DOZENS, "The answer is 18.", "C"),
    (WAYS, "The answer is I.", "I"),
    (WAYS, "I would say way 3", "D"),
    (WAYS, "I can see that the answer is C.", "C"),
    (WAYS, "In my opinion, B", "B"),
    (YES_NO, "yes", "A"),
    (YES_NO, "Yes, it is.", "A"),
    (YES_NO, "There is no dog", "B"),
    (YES_NO, "A", "A"),
    (YES_NO, "The answer is yes", "A"),
    (LETTERS, "A", "A"),
    (LETTERS, "The letter is C", "C"),
    (LETTERS, "d", "D"),
    (ANIMALS, "It looks like a dog", "D"),
    (ANIMALS, "I see a dog.", "D"),
    (ANIMALS, "A child, not a man", "C"),
    (ANIMALS, "The subject in the picture is a woman.", "B"),
    (ANIMALS, "A man", "A"),
    (ANIMALS, "D. The dog is chasing the man.", "D"),
    (ANIMALS, "dog.", "D"),
    (ANIMALS, "a Dog", "D"),
    (COLORS, "It's blue", "B"),
    (COLORS, "Red", "A"),
    (COLORS, "not red, but green", "D"),
    (COLORS, "B: blue", "B"),
    (CARS, "Question: what is it?\nAnswer: B", "B"),
    (CARS, "Sure! The answer is B.", "B"),
    (CARS, "Okay, so B it is.", "B"),
    (CARS, "The car is red, which corresponds to option B.", "B"),
    (CARS, "This corresponds to B.", "B"),
    (CARS, "The car is red, which is option B", "B"),
    (CARS, "Given the options, I select (b).", "B"),
    (CARS, "A is wrong. B is wrong. C is wrong. So D.", "D"),
    (CARS, "The answer is B.The reason is its color.", "B"),
    (CARS, "Thus the answer: B", "B"),
    (CARS, "A\n\nWait, the answer is B.", "B"),
]

NOTHING = [
    (CARS, ""),
    (CARS, "..."),
    (CARS, "E"),
    (CARS, "The answer is E."),
    (CARS, "A man in a hat"),
    (CARS, "A truck"),
    (CARS, "I am not sure."),
    (WAYS, "I think so."),
    (WAYS, "I cannot tell."),
    (WAYS, "I'm sorry, I can't help with that."),
    (CARS, "A or B"),
    (CARS, "A and C"),
    (CARS, "A, B"),
    (CARS, "A, B and D"),
    (CARS, "A/B"),
    (CARS, "B C"),
    (CARS, "A\nB\nC\nD"),
    (CARS, "The answer is A or B."),
    (CARS, "The answer is either A or C"),
    (CARS, "Both A and B are correct."),
    (CARS, "Not A."),
    (CARS, "It is not B."),
    (CARS, "Option A is wrong."),
    (CARS, "Neither A nor B"),
    (CARS, "A. a blue car\nB. a red car\nC. a green bus\nD. a bicycle"),
    (CARS, "There is a red car and a blue car."),
    (CARS, "It is not a red car."),
    (CARS, "None of the above."),
    (CARS, "I cannot determine whether it is a red car."),
    (CARS, "Sorry, without the image I can't say if it is a bicycle."),
    (CARS, "<think>The answer is B."),
    (CARS, "<think>The answer is B.</think>"),
    (CARS, "<answer></answer> B"),
    (CARS, "\\boxed{A, B}"),
    (CARS, "The writing on the shirt says B and the cap is black"),
    (CARS, "The answer is unknown"),
    (ANIMALS, "A picture of the sea"),
    (ANIMALS, "a manly woman-like doggy"),
    (COLORS, "green or blue"),
    (COUNTS, "13"),
    (COUNTS, "2.5"),
    (COUNTS, "the red one"),
    (CARS, "A vehicle that is red"),
    (CARS, "The answer cannot be A."),
    (CARS, "The answer could be A, B, or C."),
    (CARS, "Either B or C"),
    (CARS, "B and/or C"),
    (CARS, "I do not know."),
    (CARS, "As an AI model, I cannot see the image."),
    (CARS, "I'm sorry, but I can't assist with that request."),
    (CARS, "The image does not show any of the options."),
    (CARS, "There is a car."),
    (DEEDS, "He opens the door and then he leaves the room."),
    (DEEDS, "The man sits down."),
    (DOZENS, "150"),
    (DOZENS, "12 + 3 = 15"),
    (WAYS, "I don't think so"),
    (WAYS, "Am I sure? No."),
    (YES_NO, "It is not."),
    (YES_NO, "No, yes"),
    (ANIMALS, "The answer is a man or a woman"),
    (ANIMALS, "man and woman"),
    (ANIMALS, "There is a man and his dog"),
    (COLORS, "blue-green"),
    (COLORS, "The ball is red; the box is blue."),
    (CARS, "B\n\nA"),
    (TURNS, "There's not enough information."),
    (TURNS, "Not sure."),
    (TURNS, "None"),
    (TURNS, "All of the above"),
    (TURNS, "N/A"),
    (TURNS, "Sorry, I am unable to view the video."),
    (TURNS, "As a language model I can't watch videos."),
    (PEOPLE, "Alice and Bob"),
    (PEOPLE, "Alice's brother Bob"),
    (BALLS, "redish"),
    (BALLS, "The ball isn't red."),
    (CROWDS, "2"),
    (TIMES, "At 10:15"),
    (TRUTH, "That is not true."),
    (PETS, "cat, dog"),
    (PETS, "catfish"),
    (PETS, "cats"),
    (TURNS, "From the options: A, B, C, D"),
    (TURNS, "Not A or B."),
]


@pytest.mark.parametrize(
    ("choices", "text", "letter"),
    [*PLAIN, *DECLARED, *MARKED, *BY_TEXT, *MORE, *((*one, "") for one in NOTHING)],
)
def test_choices(choices: tuple[str, ...], text: str, letter: str) -> None:
    assert read_choice(text, question(choices)) == letter


def test_a_thousand_times_the_same_words_take_no_time() -> None:
    for piece in ("the answer is ", "A or ", "it is ", "not ", "(", " ", "\\boxed{", "<think>"):
        read_choice(piece * 4000, question(CARS))
        read_open(piece * 4000)


OPEN_RIGHT = [
    ("red", "red"),
    ("Red.", "red"),
    (" a red\n", "red"),
    ("the circle", "circle"),
    ("A circle.", "circle"),
    ("The answer is red.", "red"),
    ("Answer: red", "red"),
    ("Final answer: **red**", "red"),
    ("It is red.", "red"),
    ("It's a circle.", "circle"),
    ("The shape is a circle.", "circle"),
    ("The color of the shape is red.", "red"),
    ("<think>blue? no</think>red", "red"),
    ("<answer>red</answer>", "red"),
    ("\\boxed{red}", "red"),
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("Yes, it is.", "yes"),
    ("Yes, there is a circle and no triangle.", "yes"),
    ("No, there is not.", "no"),
    ("No there isn't", "no"),
    ("The answer is no.", "no"),
    ("three", "3"),
    ("3", "three"),
    ("There are 3 circles.", "3"),
    ("I see two cars in the picture", "2"),
    ("No parking", "no parking"),
    ("It is raining", "it is raining"),
    ("U.S.A.", "u.s.a"),
    ("A", "a"),
    ("“red”", "red"),
]
OPEN_WRONG = [
    ("", "red"),
    ("blue", "red"),
    ("not red", "red"),
    ("It is not red.", "red"),
    ("red or blue", "red"),
    ("It is red or blue.", "red"),
    ("reddish", "red"),
    ("<think>red", "red"),
    ("<think>red</think>blue", "red"),
    ("no", "yes"),
    ("No, yes would be wrong.", "yes"),
    ("Nothing", "no"),
    ("yesterday", "yes"),
    ("30", "3"),
    ("3 or 4", "3"),
    ("There are 3 circles and 2 squares.", "3"),
    ("The answer is blue, not red.", "red"),
]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [*((*one, True) for one in OPEN_RIGHT), *((*one, False) for one in OPEN_WRONG)],
)
def test_open_answers(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # Named before the end came.
        ("B", "B"),
        ("B, because the car in the middle of the", "B"),
        ("The answer is B. Option A", "B"),
        ("The picture shows a red car on the", "B"),
        ("<think>It is A.</think><answer>B", "B"),
        # Not yet.
        ("", ""),
        ("<think>The answer is B", ""),
        ("Let me look at option A", ""),
        ("To find the answer, look at the car first. It is not a bus. The red car", ""),
        ("The answer is", ""),
    ],
)
def test_cut_answers_count_if_they_name_a_choice(text: str, letter: str) -> None:
    condition = Condition(method=UNPRUNED, keep=1.0)
    record = score(question(CARS), condition, EngineAnswer(text=text, cut=True), "text")
    assert (record.choice, record.cut) == (letter, None if letter else True)
    assert record.correct is (True if letter else None)
    # Where the likelihoods count, the text need not be whole.
    likely = EngineAnswer(
        text=text, cut=True, likelihoods={"A": -0.1, "B": -2.0, "C": -3.0, "D": -9.0}
    )
    assert score(question(CARS), condition, likely, "likelihood").correct is False
    # An answer that ended by itself and names nothing is wrong.
    ended = score(question(CARS), condition, EngineAnswer(text=text), "text")
    assert (ended.correct, ended.cut) == (ended.choice == "B", None)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        # Whether a cut answer counts must not depend on whether it is right.
        ("red", ""),
        ("The shape in the picture", ""),
        ("yes", ""),
        ("<think>red", ""),
        ("yes, it", "yes"),
        ("The answer is red. The", "red"),
        ("The answer is", ""),
        ("red\nThe", "red"),
        ("It is red. There", "red"),
        ("The picture shows many things in a row. One of", ""),
    ],
)
def test_cut_open_answers(text: str, read: str) -> None:
    assert read_open(text, cut=True) == read
    for answer in ("red", "yes", "blue"):
        said = EngineAnswer(text=text, cut=True)
        record = score(question(answer=answer), Condition(method=UNPRUNED, keep=1.0), said, "text")
        assert record.correct is (read == answer if read else None)
        assert record.cut is (None if read else True)


def test_what_is_left_of_a_text() -> None:
    assert final_part("  **B**  <|im_end|>") == "B"
    assert final_part("a <think>b</think> c") == "a c"
    assert final_part("a </think> c") == "c"
    assert final_part("<think>a</think>b<think>c") == "b"
    assert prompt_of(question(CARS)).splitlines()[:3] == ["which?", "A. a blue car", "B. a red car"]
