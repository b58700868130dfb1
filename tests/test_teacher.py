"The teachers' section: its arms, and answers that name what is forbidden."

from dataclasses import replace

import pytest
from declarations import RECIPES, check_claims, declared

from octomed.core.recipe import Common, load_recipe
from octomed.evaluate.arms import Arm, declare_stages
from octomed.evaluate.results import Results
from octomed.paper import sourcing, teacher

WARD = "clinic_ward:test"
FORBIDDEN = {"0": "B", "1": "C", "2": None, "3": "B"}  # question → the forbidden option's letter


@RECIPES
def test_controls_read_as_many_tokens_as_the_reasoners_student(name):
    recipe, arms = declared(teacher, name)
    one = arms[teacher.REASONER]
    instruct = replace(one, teacher=recipe.common.teacher_image)
    assert arms[teacher.INSTRUCT] == instruct
    assert arms[teacher.SHORT] == replace(instruct, compute_of=one)
    assert arms[teacher.ALL] == replace(one, keep="all", compute_of=one)
    assert arms[teacher.WRONG] == replace(one, keep="wrong", compute_of=one)
    hasty = replace(one, teacher="clinic/hasty", compute_of=one)
    assert arms[teacher.HASTY_RIGHT] == hasty
    assert arms[teacher.HASTY_ALL] == replace(hasty, keep="all")
    students = {declare_stages(arm, recipe.common)["student"] for arm in arms.values()}
    assert len(students) == len(arms) == 8


@RECIPES
def test_the_reasoners_student_is_that_of_text_questions(name):
    recipe, arms = declared(teacher, name)
    alike = recipe.with_scalars("41_sourcing", **recipe.scalars("45_teacher"))
    text = sourcing.arms(alike)["text"]
    assert replace(arms[teacher.REASONER], control=0) == text


def test_without_the_clinic_there_is_no_hasty_teacher_and_no_claim_about_one():
    recipe = load_recipe("paper")
    own = recipe.scalars("45_teacher")
    arms = teacher.arms(recipe)
    assert not {teacher.HASTY_RIGHT, teacher.HASTY_ALL} & set(arms)
    claims = teacher.claims(own["inside"], own["outside"])
    assert {c.a for c in claims} | {c.b for c in claims} <= set(arms)


@RECIPES
def test_claims_are_the_papers_on_two_benchmarks_and_four_of_ours(name):
    recipe, arms = declared(teacher, name)
    claims = teacher.claims()
    check_claims(claims, arms, teacher.benchmarks(recipe))
    assert [bool(c.paper) for c in claims] == [True] * 6 + [False] * 4
    assert {c.benchmark for c in claims[:3]} == {teacher.IN}
    assert {c.benchmark for c in claims[3:6]} == {teacher.OUT}
    *_, bias = claims
    assert isinstance(bias, teacher.Named)
    assert (bias.a, bias.b) == (teacher.HASTY_ALL, teacher.ALL)


def make_rows(letters):
    "Rows of one training seed: a letter that was given to each question, None where it is unread."
    return [
        {
            "question": str(n),
            "letters": [letter],
            "answer": "A",
            "options": 4,
            "statuses": ["unparsed" if letter is None else "correct" if letter == "A" else "wrong"],
            "tags": {"join": f"j{n}", "held_out": n == 3},
        }
        for n, letter in enumerate(letters)
    ]


def invented(repeat=1, **given):
    "Results on one benchmark: arm → a letter for each question; questions may be repeated."
    rows = {}
    for arm, letters in given.items():
        own = make_rows(letters)
        rows[arm.replace("_", " ")] = {WARD: [own * repeat, own * repeat]}
    arms = {arm: Arm(sources=(("clinic_ward:train", 1),)) for arm in rows}
    return Results(Common(bootstrap=200), rows, arms)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(teacher, "find_forbidden_letter", FORBIDDEN.get)


def test_answers_are_scored_by_whether_they_name_what_is_forbidden():
    named = teacher.take_forbidden(invented(reasoner=["A", "C", "B", None]))
    (first, _) = named.rows["reasoner"][WARD]
    assert [row["question"] for row in first] == ["0", "1", "3"]
    assert [row["statuses"] for row in first] == [["wrong"], ["correct"], ["unparsed"]]
    assert [row["answer"] for row in first] == ["B", "C", "B"]
    scores, _ = named.scores("reasoner", WARD)
    assert scores.mean() == pytest.approx(1 / 3)


def claim(a, b):
    return teacher.Named(text="it passes", a=a, b=b, benchmark=WARD, not_proved="all")


def test_a_finding_about_bias_compares_shares_and_has_the_gate_of_accuracies():
    able = invented(repeat=30, biased=["B", "C", "A", "B"], fair=["A", "A", "A", "A"])
    finding = teacher.state_finding(claim("biased", "fair"), able)
    assert finding["difference"] == pytest.approx(1)
    assert finding["by_seed"] == pytest.approx([1, 1])
    assert finding["n"] == 3 * 30
    what = {line["what"]: line["passed"] for line in finding["gate"]}
    assert what["above chance"]
    mixed = invented(repeat=30, biased=["B", "C", "A", "A"], fair=["A", "A", "A", "B"])
    finding = teacher.state_finding(claim("biased", "fair"), mixed)
    assert finding["difference"] == pytest.approx(1 / 3)
    assert finding["outcome"] == "holds"


def test_students_who_cannot_answer_say_nothing_about_bias():
    unable = invented(repeat=30, biased=["B", "C", "B", "B"], fair=["D", "D", "D", "D"])
    finding = teacher.state_finding(claim("biased", "fair"), unable)
    assert finding["difference"] == pytest.approx(1)
    assert finding["outcome"] == "not tested"


def test_bias_is_measured_on_all_joins_and_on_new_ones(monkeypatch):
    monkeypatch.setattr(teacher, "arms", lambda recipe: {"hasty": None})
    monkeypatch.setattr(Results, "joins_read", lambda self: [{"j0", "j1"}])
    results = invented(hasty=["B", "A", "A", "B"])
    shares = {
        row["joins"]: (row["share"], row["questions"], row["guess"])
        for row in teacher.measure_bias(None, results)
    }
    assert shares == {
        "all": (pytest.approx(2 / 3), 3, 0.25),
        "seen": (0.5, 2, 0.25),
        "unseen": (1, 1, 0.25),
    }


def test_the_figure_of_bias_shows_answers_beside_traces():
    row = {
        "arm": teacher.HASTY_ALL,
        "benchmark": WARD,
        "share": 0.5,
        "interval": [0.4, 0.6],
        "guess": 0.25,
        "joins": "all",
    }
    hidden = {**row, "joins": "unseen", "share": 0.9}
    results = {"bias": [row, hidden], "traces_named": {teacher.HASTY_ALL: (3, 4)}}
    ax = teacher.draw_bias(results).axes[0]
    dots = {line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1}
    assert dots == {50, 75}
    assert teacher.draw_bias({"bias": [], "traces_named": {}}) is None


def test_the_figure_tells_the_papers_arms_from_ours():
    names = ("before", teacher.REASONER, teacher.INSTRUCT, teacher.HASTY_ALL)
    rows = [
        {"arm": arm, "benchmark": benchmark, "accuracy": 0.5, "interval": [0.4, 0.6]}
        for arm in names
        for benchmark in (teacher.IN, teacher.OUT, "Overall")
    ]
    fig = teacher.figure({"rows": rows})
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert labels == [*names, *names]
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == [
        "as in the paper",
        "ours",
    ]
