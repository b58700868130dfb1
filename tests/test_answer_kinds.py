"""Kinds of responses that a parser is known to misread, each in every form in which it may come."""

import math
import os
from itertools import product

import numpy as np
import pandas as pd
import pytest

from octomed.core.paths import OctomedError, UsageError
from octomed.data.questions import Question
from octomed.data.sources import SOURCES, load
from octomed.distill.rejection import _write_target, judge_open_samples, write_in_box
from octomed.generate.answers import _fold, judge, letter_options
from octomed.generate.graders import read_rating, read_verdict
from octomed.generate.prompts import (
    END_OF_THINK,
    THINKING_MARKS,
    find_end_of_think,
    format_boxed,
    load_template,
    make_direct_target,
)
from octomed.generate.samples import Sample

TISSUE = {"A": "Tumor", "B": "Stroma", "C": "Inflammatory", "D": "Necrosis"}
FORMS = {
    "box": r"\boxed{%s}",
    "box, maths": r"$$\boxed{%s}$$",
    "tag": "<answer>%s</answer>",
    "tag, cut off": "<answer>%s",
    "phrase": "The answer is %s",
    "phrase, full stop": "So the correct answer is %s.",
    "label": "Spindle cells.\nAnswer: %s",
    "label, bold": "**Answer:** **%s**",
    "next line": "Answer:\n%s",
    "whole": "%s",
}


def read(text, options=TISSUE, **how):
    return judge(text, options, **how).letter


def read_in_every_form(content, options=TISSUE, leave_out=()):
    "What each form reads in a content, by letter."
    letters = {}
    for name, form in FORMS.items():
        if name not in leave_out:
            letters.setdefault(read(form % content, options), []).append(name)
    return letters


ONE_LETTER = r"""
B|(B)|B)|[B]|**B**|B.|B:|b|(b)|**B**.|(B).|`B`|*B*|{B}|~B|\text{B}|\mathbf{B}|\textbf{B}|\mathrm{(B)}
|$\text{B}$|\(B\)|\textbf{(B)}|(\text{B})|\textsf{B}|B<|im_end|>|B: Stroma|B) Stroma|B. Stroma
|(B) Stroma|**B) Stroma**|\text{B. Stroma}|\mathbf{B: Stroma}|stroma|STROMA""".replace("\n", "")
ONE_LETTER = ONE_LETTER.replace("<|im_end|>", "<#im_end#>").split("|")


@pytest.mark.parametrize("content", [part.replace("#", "|") for part in ONE_LETTER])
def test_one_letter_is_read_in_every_form(content):
    assert list(read_in_every_form(content)) == ["B"]


SEVERAL = [
    *("A and B", "both A and C", "Both A and C", "A and/or B", "A, B", "A/B", "A-B", "A – B"),
    *("A or B", "A & B", "A+B", "A B", "AB", "A,B,C", "A;B", "A|B", "A -> B", "A → B", "A vs B"),
    *("A to D", "A through D", "A...D", "A…D", "A then B", "A, not B", "not A but B", "A (not B)"),
    *("A instead of B", "A rather than B", "rather B than A", "A versus B", "either A or B"),
    *("A.C", "A.B.", "A. B.", "A. B. C.", "A). B).", "A) B)", "(A),(C)", "(A)-(C)", "(A)(C)"),
    *("(A) and (C)", "(A, C)", "[A][C]", "[A, B]", "A) or B)", "a) and b)", "a, b", "a/b", "a.c"),
    *("(B)? No, (D).", "A: no, wait, B", "A? No, B", "A... no, C", "A: never mind, C", "A (or B)"),
    *(
        "A, actually B",
        "A. Actually B",
        "A, wait no B",
        "first A, then B",
        "A = B",
        "A: B",
        "A (B)",
    ),
    *(
        "options A and B",
        "Options A, B",
        "Option A and Option B",
        "A and B are correct",
        "A only, B",
    ),
    *("**A** and **B**", "**A**, **B**", "**A**/**B**", "- A\n- B", "* A\n* B", "1. A\n2. B"),
    *("A\nB", "A.\nC.", "(A)\n(C)", "A\n\nB", "A;\nB", "A<br>B", "A: Tumor\nC: Inflammatory"),
    *("A: Tumor, B: Stroma", "A. Tumor and B. Stroma", "(A) Tumor and (D) Necrosis"),
    *(
        "A: Tumor or C",
        "A: Tumor and necrosis",
        "Tumor and Stroma",
        "Tumor, Stroma",
        "Tumor; Stroma",
    ),
    *("Tumor or stroma", "Tumor, not Stroma", "Tumor, Stroma, and Necrosis", "Tumor\nStroma"),
    *(
        r"\text{A and B}",
        r"\text{A}, \text{B}",
        r"A \text{ and } B",
        r"\text{A} \text{ or } \text{B}",
    ),
    *(r"\{A, B\}", r"A,\,B", r"A \land B", r"A \cup B", r"A \quad \text{C}", r"A\ \&\ B"),
    *("A、B", "A，B", "A和B", "A或B", "Ａ和Ｂ", "A und B", "A oder B", "A et C", "A ou B", "A и B"),  # noqa: RUF001
]
DENIED = [
    *(
        "not A",
        "Not A",
        "not (A)",
        "(B) is wrong",
        "A is not correct",
        "A isn't right",
        "A: incorrect",
    ),
    *("A (incorrect)", "A: wrong", "A, no", "A — no", "A? No", "A?", "A (?)", "A cannot be right"),
    *(
        "A was ruled out",
        "A) is out",
        "(A) no",
        "(A) isn't the answer",
        "neither A nor B",
        "neither",
    ),
    *(
        "anything but A",
        "everything but A",
        "all but A",
        "all except A",
        "other than A",
        "except A",
    ),
    *(
        "No A",
        "non-A",
        "wrong: A",
        "A is wrong, B is right",
        "A ✗",
        "~~A~~",
        "~~A~~ B",
        "<s>A</s> B",
    ),
    *(
        r"\cancel{A}",
        r"\cancel{A} B",
        r"\neg A",
        "¬A",
        "≠ A",
        "A ≠ B",
        "A ist falsch",
        "不是A",
        "A错误",
    ),
    *(
        "A or none",
        "A, maybe",
        "I don't know",
        "unknown",
        "?",
        "all of the above",
        "none of the above",
    ),
]


@pytest.mark.parametrize("content", SEVERAL)
def test_several_letters_name_no_option_in_any_form(content):
    assert list(read_in_every_form(content)) == [None]


@pytest.mark.parametrize("content", DENIED)
def test_a_letter_that_is_denied_or_corrected_is_no_answer_in_any_form(content):
    assert list(read_in_every_form(content)) == [None]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{A} and \boxed{C}",
        r"\boxed{A}, \boxed{C}",
        r"$\boxed{A}$ or $\boxed{C}$",
        r"\(\boxed{A}\) \text{ and } \(\boxed{C}\)",
        r"The answer is \boxed{A} or \boxed{C}.",
        r"\boxed{A} and (C)",
        r"\boxed{A} or C.",
        r"not \boxed{B}",
        r"The answer is not \boxed{B}.",
        r"It isn't $\boxed{B}$",
        r"\boxed{B} is wrong.",
        r"$\boxed{B}$ is not the correct answer",
        r"\boxed{B}? No, that is wrong.",
        r"\boxed{A} rather than \boxed{C}",
        "<answer>A</answer> and <answer>C</answer>",
        "<answer>A</answer>, <answer>C</answer>",
        "<answer>A</answer> or C.",
        "not <answer>B</answer>",
        "<answer>B</answer> is wrong",
    ],
)
def test_words_around_a_box_or_a_tag_deny_it_or_join_it_to_another(text):
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{A}. On reflection \boxed{B}.",
        r"\boxed{A} is wrong, so \boxed{B}.",
        r"\boxed{A}\boxed{B}",
        r"\boxed{B} and \boxed{B}",
        r"\boxed{B}, a stromal lesion.",
        r"\boxed{B}, and the other options are wrong.",
        r"\boxed{B} is right, and A is wrong.",
        r"It is not a tumour. \boxed{B}",
        "<answer>A</answer> Wait. <answer>B</answer>",
        "<answer>B</answer> is right.",
        "<answer>B</answer",
        "<answer>B</ans",
        "<answer>B<",
    ],
)
def test_other_words_around_a_box_or_a_tag_change_nothing(text):
    assert read(text) == "B"


@pytest.mark.parametrize("text", [r"\boxed{}", r"\boxed{B", r"\boxed{A}\boxed{}", r"B\boxed{ }"])
def test_a_last_box_decides_although_it_is_empty(text):
    assert read(text) is None


def test_an_empty_last_tag_decides():
    assert read("The answer is B. <answer></answer>") is None
    assert read("<answer>B</answer><answer> </answer>") is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is A. C is also correct.",
        "The answer is A. Both A and C are correct.",
        "The answer is A. Or C.",
        "The answer is A. Also C.",
        "The answer is B. However, C could also be correct.",
        "The answer is Tumor. Stroma is also possible.",
        "The answer is (A). It could also be (B).",
        "The answer is (A); (B) is also correct.",
        "The answer is (A). Oh wait, it's (B).",
        "The answer is (A). Correction: (B).",
        "The answer is (A), I mean (B).",
        "The answer is (A)\n\nor\n\n(B)",
        "The answer is between A and B.",
        "The answer is B. Wait, that is wrong.",
        "The answer is B. Hmm, no.",
        "The answer is (B). (B) is wrong.",
        "The answer is B? I am not sure.",
        "The answer is either A or C. I choose C.",
        "Answer: B\nor C",
        "Answer: B\nWait, no: C",
        "Answer: A\nC",
        "The correct answers are: A, C",
        "I don't think the answer is (B).",
        "It is not true that the answer is B.",
        "I doubt the answer is B.",
        "The wrong answer is B.",
        "The least likely answer is B.",
        "Incorrect answer: B",
        "The answer cannot be B.",
        "The answer is no longer B.",
        "The answer is Tumor.\nStroma",
        "The answer is Tumor. Or Stroma.",
        "The answer is Tumor; Stroma.",
    ],
)
def test_what_follows_or_precedes_a_phrase_may_leave_a_doubt(text):
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B.\nExplanation: Option A is wrong because no mitoses are seen, and C is absent.",
        "Answer: B\n\nA is incorrect because no mitoses are seen.",
        "Answer: B\n\nA) Tumor is incorrect.\nC) Inflammatory is wrong.",
        "**Answer: B**\n\n**Why not A?** No mitoses.",
        "The answer is B. The other options (A, C and D) are wrong.",
        "The answer is B. A is wrong because no mitoses are seen.",
        "The answer is (B). A and C are also wrong.",
        "Answer: (B)\nReason: vitamin C is low.",
        "The answer is (B), since vitamin C is low and hepatitis D is absent.",
        "The answer is (B). A biopsy shows it.",
        "The answer is (B) because the patient does not have a fever.",
        "The answer is stroma, as tumor cells are absent.",
        "The answer is stroma, tumor cells being absent.",
        "Answer: A\nAnswer: B",
        "Wrong answer: A\nCorrect answer: B\nIncorrect answer: C",
    ],
)
def test_a_reason_after_an_answer_is_no_second_answer(text):
    assert read(text) == "B"


GERMS = {
    "A": "E. coli infection",
    "B": "S. aureus",
    "C": "A and B are both right",
    "D": "not a tumour",
    "E": "C. albicans",
    "F": "Vitamin A, or D",
}


@pytest.mark.parametrize(
    "content, letter",
    [
        ("E. coli infection", "A"),
        ("e. COLI  infection", "A"),
        ("S. aureus", "B"),
        ("A and B are both right", "C"),
        ("not a tumour", "D"),
        ("C. albicans", "E"),
        ("Vitamin A, or D", "F"),
        *((f"{letter}: {text}", letter) for letter, text in GERMS.items()),
        *((f"({letter}) {text}", letter) for letter, text in GERMS.items()),
        *((f"{letter}. {text}", letter) for letter, text in GERMS.items()),
        *((f"**{letter}) {text}**", letter) for letter, text in GERMS.items()),
    ],
)
def test_a_text_and_a_letter_with_its_own_text_name_their_option_in_every_form(content, letter):
    assert list(read_in_every_form(content, GERMS)) == [letter]


@pytest.mark.parametrize("content", ["E. coli", "C. difficile infection", "S. pyogenes", "A and B"])
def test_the_beginning_of_a_text_is_no_text(content):
    options = {**GERMS, "F": "S. pneumoniae"}
    assert set(read_in_every_form(content, options)) <= {None, content[0]}
    assert read(format_boxed("E. coli"), options) is None


ODD = [
    ({"A": "Yes", "B": "No"}, "B", ["B) No", "B. No", "No", "no.", "(B) No, because it is."]),
    ({"A": "Vitamin A", "C": "Vitamin C"}, "C", ["Vitamin C", "(C) Vitamin C", "C: vitamin c"]),
    ({"A": "Give no drug", "B": "Do not operate"}, "B", ["B: Do not operate", "Do not operate"]),
    ({"A": "I and II", "B": "II only", "C": "A, B and D"}, "C", ["C. A, B and D", "A, B and D"]),
    ({"A": "I and II", "B": "II only", "C": "A, B and D"}, "A", ["I and II", "(A) I and II"]),
    ({"A": "5 mg", "B": "0.5 mg", "C": "50 mg"}, "B", ["0.5 mg", "(B) 0.5 mg", r"0.5\text{ mg}"]),
    (
        {"A": "Hepatitis B", "B": "Hepatitis A"},
        "A",
        ["Hepatitis B", "A: hepatitis B", "A) Hepatitis B"],
    ),
    (
        {"A": "Neither", "D": "None of the above"},
        "D",
        ["None of the above", "D. None of the above"],
    ),
    ({"A": "All except B", "B": "B. cereus"}, "A", ["All except B", "A: All except B"]),
]


@pytest.mark.parametrize("options, letter, contents", ODD)
def test_odd_texts_name_their_option(options, letter, contents):
    for content in contents:
        assert read(format_boxed(content), options) == letter
        assert read(f"<answer>{content}</answer>", options) == letter
        assert read(f"Answer: {content}", options) == letter


def test_the_public_example_of_a_genus():
    options = ["S. aureus", "C. albicans", "A. niger", "E. coli", "B. cereus"]
    for text, letter in zip(options, "ABCDE", strict=True):
        assert list(read_in_every_form(text, options)) == [letter]


@pytest.mark.parametrize(
    "missing", [None, math.nan, np.nan, np.float32("nan"), pd.NA, pd.NaT], ids=repr
)
def test_a_missing_option_is_refused_and_never_a_text(missing):
    for options in ({"A": "Yes", "B": missing}, ["Yes", missing], ("Yes", missing)):
        with pytest.raises(OctomedError, match="option B has no text"):
            judge(r"\boxed{None}", options)


def test_none_as_a_text_is_a_text():
    options = ["Yes", "None", "nan"]
    assert [read(format_boxed(text), options) for text in ("None", "nan", "none.")] == list("BCB")


def test_a_missing_response_is_empty_and_a_number_is_refused():
    assert read(None) is None and read(math.nan) is None
    with pytest.raises(OctomedError, match="a response is text"):
        judge(3, TISSUE)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"A": "x", "a": "y"}, "options are named A and a, which answers cannot tell apart"),
        ({"AB": "x"}, "name each by one letter"),
        ({"A": ["x"]}, "option A is a list and no text"),
        ("AB", "is no list of options"),
        (None, "is no list of options"),
        (["x"] * 27, "give at most 26"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(OctomedError, match=sentence):
        letter_options(options)


@pytest.mark.parametrize("first", ["The answer is (B).", "**Answer:** B", "Answer: B. Stroma"])
@pytest.mark.parametrize(
    "end",
    [
        "So, the final answer is:",
        "So, the final answer is: **",
        "Final Answer:",
        "**Final answer:**\n",
        "Answer: ",
        "Answer:\n```\n```",
        "So the answer is …",
        "The best option is (",
        'The answer is ""',
        "The answer is —",
    ],
)
def test_a_statement_that_states_nothing_hides_nothing(first, end):
    assert read(f"Spindle cells.\n{first}\n\n{end}") == "B"
    assert read(f"Spindle cells.\n\n{end}") is None


@pytest.mark.parametrize("end", ["The answer is unclear.", "Answer: none", "The answer is: ?"])
def test_a_statement_that_states_something_hides_what_precedes_it(end):
    assert read(f"The answer is (B).\n\n{end}") is None


@pytest.mark.parametrize(
    "sentence",
    [
        "The most likely diagnosis is (B) Stroma.",
        "The most likely diagnosis is **(B) Stroma**.",
        "The most likely tissue is B. Stroma.",
        "The tissue is B: Stroma",
        "The tissue is B) stroma",
        "I would pick (B) Stroma.\n\n",
        "No mitoses. The diagnosis is (B) Stroma.",
        "Therefore, (B) Stroma.\n\nSo, the final answer is:",
    ],
)
def test_a_last_sentence_that_ends_on_a_letter_and_its_text_names_it(sentence):
    assert read(f"Spindle cells abound. {sentence}") == "B"


@pytest.mark.parametrize(
    "sentence",
    [
        "It is not (B) Stroma.",
        "It isn't (B) Stroma.",
        "It is hardly (B) Stroma.",
        "I doubt that it is (B) Stroma.",
        "We can rule out (B) Stroma.",
        "Less likely is (B) Stroma.",
        "The distractor is (B) Stroma.",
        "Contraindicated is (B) Stroma.",
        "It is (A) Tumor or (B) Stroma.",
        "(A) Tumor is possible, but more likely is (B) Stroma.",
        "Unlike (A), this is (B) Stroma.",
        "Is it (B) Stroma?",
        "The diagnosis is (B) Stroma cell.",
        "The diagnosis is (A) Stroma.",
        "The diagnosis is (B) Stroma. It is common.",
        "The options are:\n(A) Tumor\n(B) Stroma",
        "A. Tumor\nB. Stroma\nC. Inflammatory\nD. Necrosis",
    ],
)
def test_a_last_sentence_with_a_doubt_names_nothing(sentence):
    assert read(f"Spindle cells abound. {sentence}") is None


NEXT = [
    "\n\nQuestion: next?\nAnswer: C",
    "\nQ: next?\nA: C\nAnswer: C",
    "\n\nQ2. next?\nAnswer: C",
    "\n\nQuestion 2\nnext?\nAnswer: C",
    "\n\n### Question 2:\nnext?\nAnswer: C",
    "\n\n**Question:** next?\n**Answer:** C",
    "\n\n---\n\nQuestion: next?\nAnswer: C",
    "\n\nNext question: what?\nAnswer: C",
    "\n\nPROBLEM: what?\nAnswer: C",
    "\n\nExample 2:\nwhat?\nAnswer: C",
    "\n\nHuman: next?\n\nAnswer: C",
    "\n\nUser: next?\nAssistant: The answer is C",
    "<|im_end|>\n<|im_start|>user\nnext?<|im_end|>\n<|im_start|>assistant\nAnswer: C",
    "</s>[INST] next? [/INST] Answer: C",
    "<|endoftext|>Which nerve? Answer: C",
    "\n\n2. Which nerve is it?\nAnswer: C",
    "\n\nWhich nerve is it?\nA. Vagus\nB. Facial\nAnswer: A",
    "\n\nOptions:\nA: ulna\nB: rib\nAnswer: A",
    "\n\nPregunta: next?\nAnswer: C",
    "\n\nFrage: next?\nAnswer: C",
    "\n\n问题：下一个？\nAnswer: C",  # noqa: RUF001
]


@pytest.mark.parametrize("first", ["Answer: B", "The answer is (B).", r"\boxed{B}", "(B) Stroma"])
@pytest.mark.parametrize("run_on", NEXT)
def test_a_new_question_after_the_answer_is_not_read(first, run_on):
    assert read(first + run_on) == "B"
    if "Which nerve" not in run_on:  # a numbered question is one if "Answer:" follows
        assert read(first + run_on.replace("Answer: C", r"\boxed{C}")) == "B"
    assert read(f"<think>x</think>{first}{run_on}", think_first=True) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "Question: Which tissue is it?\nA: Tumor\nB: Stroma\nAnswer: B",
        "Question 2: which?\nThe answer is B",
        "Options:\nA: Tumor\nB: Stroma\nC: Inflammatory\nAnswer: B",
    ],
)
def test_the_question_itself_may_be_repeated_before_its_answer(text):
    assert read(text) == "B"


def test_a_thought_may_ask_what_it_likes():
    text = "<think>The answer is A?\nQuestion: is it?\nAnswer: no</think>The answer is B"
    assert read(text, think_first=True) == "B"


# targets


TEXTS_TO_TEACH = [
    *("E. coli infection", "not a tumour", "A and B", "B", "c", "(D)", "B.", "Tumor, not C"),
    *(
        r"\frac{1}{2}",
        r"\boxed{C}",
        "{",
        "}",
        r"\{",
        "50 %",
        "None",
        "$5",
        "*",
        "<answer>C",
        "C: x",
    ),
    *("The answer is C", "no", "I", "B or C", "x" * 600, "A\nB", "?", "μ", "Ｂ", "</think>"),  # noqa: RUF001
]


@pytest.mark.parametrize("text", TEXTS_TO_TEACH)
def test_a_target_is_read_back_as_its_own_option(text):
    options = dict(zip("ABCD", (text, "E. coli", "Tumor", "Not A"), strict=True))
    q = ask_directly(options)
    for letter in options:
        box = write_in_box(q, "text", letter)
        assert box in (letter, options[letter])
        assert read(make_direct_target(box), options) == letter


def ask_directly(options):
    "A question by its letters alone, however odd its texts are."

    class Asked:
        letters, answer = options, "A"

    return Asked()


EXPLANATIONS = [
    "So it is not",
    "Neither is it",
    "The answer is A or",
    r"It may be \boxed{C} and",
    "Answer: C,",
    "Question: what?\nAnswer: C",
    "The answer is C.\n\nQuestion: next?",
    "<answer>C</answer> or",
]


@pytest.mark.parametrize("explanation, answer", list(product(EXPLANATIONS, ("letter", "text"))))
def test_an_explanation_that_misleads_the_parser_is_not_taught(explanation, answer):
    q = ask_directly(TISSUE)
    text = f"<think>Spindle cells.</think>{explanation} <answer>B</answer>"
    sample = Sample(
        question="q",
        model="m",
        prompt="p",
        sampling="s",
        index=0,
        text=text,
        finish="stop",
        tokens=1,
    )
    box = write_in_box(q, answer, "B")
    target = _write_target(sample, q, box=box, letter="B", end_of_think=END_OF_THINK)
    assert read(target, think_first=True) == "B" and "Spindle cells." in target


@pytest.mark.parametrize("run_on", NEXT)
def test_a_new_question_after_the_answer_is_not_taught(run_on):
    q = ask_directly(TISSUE)
    text = f"<think>Spindle cells.</think>It is pink.\n\nAnswer: B{run_on}<answer>C</answer>"
    sample = Sample("q", "m", "p", "s", index=0, text=text, finish="stop", tokens=1)
    target = _write_target(sample, q, box="B", letter="B", end_of_think=END_OF_THINK)
    assert target.startswith("<think>Spindle cells.</think>\n\nIt is pink.")
    assert target.endswith("\\boxed{B}") and "next" not in target and "nerve" not in target


# ends of thinking


@pytest.mark.parametrize("name", THINKING_MARKS)
def test_ends_of_thinking_are_known_by_name(name):
    begin, end = THINKING_MARKS[name]
    text = f"{begin} The answer is A. \\boxed{{A}} {end} The answer is B."
    assert find_end_of_think(name) == end and find_end_of_think(end) == end
    assert judge(text, TISSUE, "B", think_first=True, end_of_think=end).status == "correct"
    unended = text.replace(end, "")
    assert judge(unended, TISSUE, "B", think_first=True, end_of_think=end).status == "truncated"


def test_a_template_names_its_end_of_think_by_name_or_as_it_is(tmp_path):
    lines = "name: t\nsource: x\nthink_first: true\ntext: '{question}'\nend_of_think: "
    for value, end in (("kimi", "◁/think▷"), ("'[/THINK]'", "[/THINK]")):
        path = tmp_path / "t.yaml"
        path.write_text(lines + value, encoding="utf-8")
        assert load_template(str(path)).end_of_think == end
    path.write_text(lines + "kimmi", encoding="utf-8")
    with pytest.raises(UsageError, match="there is no end-of-think 'kimmi'"):
        load_template(str(path))


@pytest.mark.parametrize("name", THINKING_MARKS)
def test_a_grader_is_read_after_its_thought_whatever_ends_it(name):
    begin, end = THINKING_MARKS[name]
    text = f"{begin} <rating>3</rating>? <verdict>no</verdict> {end}\n<rating>7</rating>"
    assert read_rating(text) == 7 and read_verdict(f"{text}<verdict>yes</verdict>") is True


def test_an_open_answer_is_graded_after_the_thought_of_its_own_model():
    class Grader:
        "A grader that says yes to what it is not shown a thought of."

        model, name = "grader@1", "toy"

        def generate(self, requests, sampling):
            for request in requests:
                shown = str(request.messages)
                word = "no" if "Spindle cells" in shown else "yes"
                yield Sample(
                    request.question,
                    self.model,
                    request.prompt,
                    sampling.key,
                    index=0,
                    text=f"<verdict>{word}</verdict>",
                    finish="stop",
                    tokens=1,
                )

    q = Question(
        stem="Which tissue is it?",
        options=tuple(TISSUE.values()),
        answer="B",
        source="toy",
        split="test",
        category="text_only",
    )
    text = "◁think▷Spindle cells.◁/think▷ Stroma."
    sample = Sample(q.id, "m", "p", "s", index=0, text=text, finish="stop", tokens=1)
    how = {"grader": Grader(), "reasoning": False}
    pairs = judge_open_samples([(q, "Stroma")], {q.id: [sample]}, end_of_think="◁/think▷", **how)
    assert pairs[q.id][0][1].status == "correct"
    pairs = judge_open_samples([(q, "Stroma")], {q.id: [sample]}, **how)
    assert pairs[q.id][0][1].status == "truncated"


# real questions


def load_real(name):
    "The questions of a source without their pictures; none if its files are not here."
    try:
        return load(name, images=False)
    except OctomedError:
        return []


@pytest.mark.skipif(
    not os.environ.get("OCTOMED_DATA"), reason="OCTOMED_DATA names no folder with real questions"
)
def test_every_real_option_in_a_box_is_read_as_itself_or_is_one_letter():
    misread, taught, options = [], [], 0
    for name in [name for name in SOURCES if not name.startswith("clinic")]:
        for q in load_real(name):
            for letter, text in (q.letters or {}).items():
                options += 1
                read_as = read(format_boxed(text), q.letters)
                if read_as not in (letter, None):
                    misread.append(text)
                target = make_direct_target(write_in_box(q, "text", letter))
                if read(target, q.letters) != letter:
                    taught.append(text)
    if not options:
        pytest.skip("OCTOMED_DATA holds none of the sets")
    assert taught == []
    assert [text for text in misread if len(_fold(text)) > 1] == []
