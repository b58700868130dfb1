"Cases chosen by a rule, read from the ledger, and whether their reasoning is right."

from dataclasses import replace

import numpy as np
import pytest

from octomed.core.paths import OctomedError
from octomed.core.recipe import load_recipe
from octomed.evaluate.arms import evaluations, seeded
from octomed.generate.answers import judge
from octomed.generate.engines import Sample
from octomed.paper import cases as c
from octomed.paper import formatting


@pytest.fixture(scope="module")
def clinic():
    "Questions of the ward with a response of the reasoning teacher each, as if a student had said them."
    from octomed.clinic.questions import questions
    from octomed.clinic.teachers import REASONER, respond

    found = []
    for b in ("clinic_ward", "clinic_boards"):
        for q in questions(b, "test", limit=60):
            text, finish = respond(REASONER, q.id, 3)
            found.append(
                c.Case(
                    q,
                    f"{b}:test",
                    Sample(q.id, "m", "p", "s", 0, text, finish, tokens=len(text.split())),
                    judge(text, q.letters, q.answer, True),
                )
            )
    return found


@pytest.mark.parametrize("recipe", ("smoke", "course"))
def test_the_student_is_the_one_that_42_trains(recipe):
    r = load_recipe(recipe)
    mine, theirs = (
        evaluations({"a": arm}, r)["a"] for arm in (c.arms(r)[c.STUDENT], formatting.arms(r)["cot"])
    )
    assert {b: es[0].key for b, es in mine.items()} == {b: es[0].key for b, es in theirs.items()}
    assert (
        seeded(c.arms(r)[c.STUDENT], 1, r.common)[0].seed
        == seeded(formatting.arms(r)["cot"], 3, r.common)[0].seed
    )


def test_the_choice_is_a_rule(clinic):
    places = c.chosen(clinic, 0)
    assert [(w, x and x.question.id) for w, x in places] == [
        (w, x and x.question.id) for w, x in c.chosen(clinic[::-1], 0)
    ]
    by_name = dict(places)
    assert (
        by_name["text only, no image: right"].right
        and not by_name["text only, no image: wrong"].right
    )
    right = [x for x in clinic if x.right and x.benchmark == c.WARD]
    assert by_name["the shortest that is right"].sample.tokens == min(
        x.sample.tokens for x in right
    ) and by_name["the longest that is right"].sample.tokens == max(x.sample.tokens for x in right)
    assert (
        by_name["out of distribution, clinic_boards"].benchmark == "clinic_boards:test"
        and len(
            {x and x.question.id for _, x in c.chosen(clinic, 1)}
            - {x and x.question.id for _, x in places}
        )
        > 0
    )


def test_a_place_that_nobody_fills_says_so(clinic):
    wrong = [x for x in clinic if not x.right]
    places = dict(c.chosen(wrong, 0))
    assert (
        places["text only, no image: right"] is None and places["the longest that is right"] is None
    )
    assert c.told("here", None, 4) == {"number": 4, "place": "here"} and c.in_words(
        c.told("here", None, 4)
    ).endswith("none")


def test_a_case_is_told_in_full(clinic):
    x = next(x for x in clinic if x.right)
    y = replace(x, taught=((x.sample, x.verdict),))
    d = c.told("here", y, 1)
    text = c.in_words(d)
    assert (
        x.question.stem in text
        and all(o in text for o in x.question.options)
        and "**correct**" in text
        and "accepted" in text
        and "<think>" not in text
    )
    assert d["trace"] == x.sample.text and d["valid"] is c.valid(x, x.sample)
    assert "no accepted trace" in c.in_words(c.told("here", x, 1))


def test_every_failure_has_a_place_where_it_breaks(clinic):
    bad = [x for x in clinic if not c.valid(x, x.sample)]
    assert bad and {c.breaks(x).split(":")[0] for x in bad} <= {
        "false",
        "no fact at all",
        "true, but something needed is unsaid",
        "true and complete",
    }
    false_last = next(x for x in clinic if x.right and c.valid(x, x.sample))
    broken = replace(
        false_last,
        sample=replace(
            false_last.sample,
            text=false_last.sample.text.replace(
                false_last.question.tags["condition"],
                "migraine" if false_last.question.tags["condition"] != "migraine" else "gout",
            ),
        ),
    )
    assert (
        not c.valid(broken, broken.sample)
        and c.breaks(broken) != "true and complete: the answer does not follow it"
    )


def test_a_question_that_is_not_the_clinics_has_no_verdict_on_its_reasoning(clinic):
    x = replace(clinic[0], benchmark="medqa:test")
    assert c.valid(x, x.sample) is None and c.told("here", x, 1)["breaks"] is None


def test_findings_by_hand():
    def one(right, valid, tr, tv):
        return {
            (c.STUDENT, "right"): np.array(right, float),
            (c.STUDENT, "valid"): np.array(valid, float),
            (c.TEACHER, "right"): np.array(tr, float),
            (c.TEACHER, "valid"): np.array(tv, float),
        }

    n = {b: one([1] * 40 + [0] * 40, [1] * 36 + [0] * 44, [4] * 80, [3] * 80) for b in c.IN} | {
        b: one([1] * 4 + [0] * 76, [0] * 80, [4] * 80, [3] * 80) for b in c.OUT
    }
    found = [c.found_of(x, n, 500, 0) for x in c.claims()]
    assert [round(f["difference"], 6) for f in found] == [0.4, 0.4, 0.4, 0.15, 0.9] and [
        f["verdict"] for f in found
    ] == ["agrees"] * 3 + ["undecided" if found[3]["interval"][0] <= 0.1 else "disagrees", "agrees"]
    assert [f["n"] for f in found] == [80, 80, 80, 240, 480]


def test_nobody_right_is_no_error():
    n = {
        b: {(w, k): np.zeros(5) for w in (c.STUDENT, c.TEACHER) for k in ("right", "valid")}
        for b in (*c.IN, *c.OUT)
    }
    found = [c.found_of(x, n, 50, 0) for x in c.claims()]
    assert [(f["difference"], f["interval"]) for f in found] == [(0, [-1, 1])] * 5 and {
        f["verdict"] for f in found
    } == {"undecided"}


def test_the_teacher_beside_a_case_is_the_one_of_its_kind(clinic):
    r = load_recipe("smoke")
    qs = [x.question for x in clinic[:6]]
    got = c.taught(r, qs, 3)
    assert all(
        len(got[q.id]) == 3
        and got[q.id][0][0].model.startswith(r.common.teacher_text)
        and got[q.id][0][0].question == q.id
        for q in qs
    )


def test_a_response_that_is_not_in_the_ledger_is_said_to_be_missing(monkeypatch, tmp_path):
    r = load_recipe("smoke")
    monkeypatch.setattr(c, "run", lambda s: tmp_path / "student")
    monkeypatch.setattr(c, "identity", lambda s: "nobody")
    with pytest.raises(OctomedError, match="--fresh"):
        c.answered(r, seeded(c.arms(r)[c.STUDENT], 1, r.common)[0], c.WARD)
