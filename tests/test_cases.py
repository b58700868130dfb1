"Cases chosen by a rule, read from the ledger, and whether their reasoning is right."

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from octomed.clinic.questions import look_up_truth
from octomed.clinic.teachers import is_true, read_facts
from octomed.core.paths import OctomedError
from octomed.core.recipe import load_recipe
from octomed.evaluate import section_run
from octomed.evaluate.faithfulness import split_thought
from octomed.evaluate.results import declare_evaluations, give_seeds
from octomed.generate.answers import judge
from octomed.generate.forced_choice import keep_thought
from octomed.generate.prompts import load_template
from octomed.generate.samples import Sample
from octomed.paper import cases, formatting

VALIDITY = [claim for claim in cases.claims() if claim.b != cases.HALF_OF_RESPONSES]


@pytest.fixture(scope="module")
def clinic():
    "Text-only questions, each with a response of the reasoning teacher in a student's place."
    from octomed.clinic.questions import load_questions
    from octomed.clinic.teachers import REASONER, respond

    made = []
    for b in ("clinic_ward", "clinic_boards"):
        for q in load_questions(b, "test", limit=60):
            text, finish = respond(REASONER, q.id, 3)
            sample = Sample(
                question=q.id,
                model="m",
                prompt="p",
                sampling="s",
                index=0,
                text=text,
                finish=finish,
                tokens=len(text.split()),
            )
            verdict = judge(text, q.letters, q.answer, think_first=True)
            case = cases.Case(question=q, benchmark=f"{b}:test", sample=sample, verdict=verdict)
            made.append(case)
    return made


@pytest.mark.parametrize("recipe", ("smoke", "course"))
def test_the_student_is_the_one_that_42_trains(recipe):
    r = load_recipe(recipe)
    mine, theirs = cases.arms(r)[cases.STUDENT], formatting.arms(r)["cot"]

    def keys(arm):
        return {b: stages[0].key for b, stages in declare_evaluations({"a": arm}, r)["a"].items()}

    assert keys(mine) == keys(theirs)
    assert give_seeds(mine, 1, r.common)[0].seed == give_seeds(theirs, 3, r.common)[0].seed


def test_the_choice_is_a_rule(clinic):
    def ids(places):
        return {why: case and case.question.id for why, case in places}

    places = cases.choose_cases(clinic, 0)
    assert ids(places) == ids(cases.choose_cases(clinic[::-1], 0))
    by_name = dict(places)
    assert by_name["text only, no image: right"].right
    assert not by_name["text only, no image: wrong"].right
    lengths = [case.sample.tokens for case in clinic if case.right and case.benchmark == cases.WARD]
    assert by_name["the shortest that is right"].sample.tokens == min(lengths)
    assert by_name["the longest that is right"].sample.tokens == max(lengths)
    assert by_name["out of distribution, clinic_boards"].benchmark == "clinic_boards:test"
    other_order = ids(cases.choose_cases(clinic, 1))
    assert set(other_order.values()) - set(ids(places).values())


def test_a_place_that_nobody_fills_says_so(clinic):
    wrong = [x for x in clinic if not x.right]
    places = dict(cases.choose_cases(wrong, 0))
    assert places["text only, no image: right"] is None
    assert places["the longest that is right"] is None
    nobody = cases.describe_case("here", None, 4)
    assert nobody == {"number": 4, "place": "here"}
    assert cases.write_case(nobody).endswith("none")


def test_a_case_is_told_in_full(clinic):
    x = next(x for x in clinic if x.right)
    y = replace(x, taught=((x.sample, x.verdict),))
    d = cases.describe_case("here", y, 1)
    text = cases.write_case(d)
    for part in (x.question.stem, *x.question.options, "**correct**", "accepted"):
        assert part in text
    assert "<think>" not in text
    assert d["trace"] == x.sample.text
    assert d["valid"] is cases.is_valid(x, x.sample)
    assert "no accepted trace" in cases.write_case(cases.describe_case("here", x, 1))


def test_every_failure_has_a_place_where_it_breaks(clinic):
    bad = [x for x in clinic if not cases.is_valid(x, x.sample)]
    assert bad
    assert {cases.find_break(x).split(":")[0] for x in bad} <= {
        "false",
        "no fact at all",
        "true, but something needed is unsaid",
        "true and complete",
    }
    sound = next(x for x in clinic if x.right and cases.is_valid(x, x.sample))
    condition = sound.question.tags["condition"]
    other = "migraine" if condition != "migraine" else "gout"
    text = sound.sample.text.replace(condition, other)
    broken = replace(sound, sample=replace(sound.sample, text=text))
    assert not cases.is_valid(broken, broken.sample)
    assert cases.find_break(broken) != "true and complete: the answer does not follow it"


def test_a_question_that_is_not_the_clinics_has_no_verdict_on_its_reasoning(clinic):
    x = replace(clinic[0], benchmark="medqa:test")
    assert cases.is_valid(x, x.sample) is None
    assert cases.describe_case("here", x, 1)["breaks"] is None


def test_findings_by_hand():
    def counts(right, valid):
        return {
            (cases.STUDENT, "right"): np.array([1] * right + [0] * (80 - right), float),
            (cases.STUDENT, "valid"): np.array([1] * valid + [0] * (80 - valid), float),
            (cases.TEACHER, "right"): np.full(80, 4.0),
            (cases.TEACHER, "valid"): np.full(80, 3.0),
        }

    n = {b: counts(right=40, valid=36) for b in cases.IN}
    n |= {b: counts(right=4, valid=0) for b in cases.OUT}
    findings = [cases.state_finding(claim, n, resamples=500, seed=0) for claim in VALIDITY]
    assert [round(f["difference"], 6) for f in findings] == [0.4, 0.4, 0.4, 0.15, 0.9]
    as_teacher = "undecided" if findings[3]["interval"][0] <= 0.1 else "fails"
    assert [f["outcome"] for f in findings] == [*["agrees"] * 3, as_teacher, "holds"]
    assert [f["n"] for f in findings] == [80, 80, 80, 240, 480]


def test_nobody_right_is_no_error():
    columns = product((cases.STUDENT, cases.TEACHER), ("right", "valid"))
    nothing = dict.fromkeys(columns, np.zeros(5))
    n = dict.fromkeys((*cases.IN, *cases.OUT), nothing)
    findings = [cases.state_finding(claim, n, resamples=50, seed=0) for claim in VALIDITY]
    assert [(f["difference"], f["interval"]) for f in findings] == [(0, [-1, 1])] * 5
    assert {f["outcome"] for f in findings} == {"undecided"}


def test_the_teacher_beside_a_case_is_the_one_of_its_kind(clinic):
    r = load_recipe("smoke")
    qs = [x.question for x in clinic[:6]]
    answers = cases.ask_own_teacher(r, qs, 3)
    for q in qs:
        assert len(answers[q.id]) == 3
        first, _ = answers[q.id][0]
        assert first.model.startswith(r.common.teacher_text)
        assert first.question == q.id


def test_a_response_that_is_not_in_the_ledger_is_said_to_be_missing(monkeypatch, tmp_path):
    r = load_recipe("smoke")
    monkeypatch.setattr(section_run, "run_stage", lambda s: tmp_path / "student")
    monkeypatch.setattr(section_run, "student_identity", lambda s: "nobody")
    student = give_seeds(cases.arms(r)[cases.STUDENT], 1, r.common)[0]
    with pytest.raises(OctomedError, match="--fresh"):
        cases.read_answers(student, cases.WARD, r.common)


COT = load_template("cot")


def thought_of(case):
    return split_thought(keep_thought(case.sample.text, case.question.letters, COT), COT)


def test_a_false_step_is_a_true_one_with_one_text_changed(clinic):
    kinds = set()
    for case in clinic:
        thought, truth = thought_of(case), look_up_truth(case.question.id)
        for place, own in enumerate(thought.sentences):
            sentence = cases.falsify_step(case.question, thought, place)
            facts = read_facts(own)
            if sentence is None:
                assert not any(k in cases.FALSIFIED and is_true(truth, k, s) for k, s in facts)
                continue
            ((kind, slots),), ((same, changed),) = facts, read_facts(sentence)
            assert kind == same and is_true(truth, kind, slots)
            assert not is_true(truth, kind, changed)
            assert {slot for slot in slots if slots[slot] != changed[slot]} == {
                cases.FALSIFIED[kind]
            }
            kinds.add(kind)
    assert kinds == {"dx", "test", "first", "contra", "allowed", "alternative", "harm"}


def test_responses_are_probed_in_an_order_of_their_own_and_only_where_a_step_can_be_false(clinic):
    chosen = cases.choose_probed(clinic, cases.WARD, n=5, seed=0)
    assert len(chosen) == 5 and all(case.benchmark == cases.WARD for case in chosen)
    assert chosen == cases.choose_probed(clinic[::-1], cases.WARD, n=5, seed=0)
    empty = [replace(case, sample=replace(case.sample, text="\\boxed{A}")) for case in clinic]
    assert cases.choose_probed(empty, cases.WARD, n=5, seed=0) == []


def probe(whole, false, n: int):
    "So many rows with these log-probabilities of two options."

    def version(logprobs):
        return {"letter": "AB"[logprobs.index(max(logprobs))], "logprobs": logprobs}

    cut = [{"share": share, **version(whole)} for share in cases.SHARES]
    row = {"sentences": 3, "answer": "A", "whole": version(whole), "cut": cut}
    return [{**row, "question": str(i), "false": version(false)} for i in range(n)]


def test_an_answer_follows_its_thought_where_a_false_step_makes_it_less_likely():
    rows = probe([-0.1, -2.0], [-3.0, -0.1], 6) + probe([-0.1, -2.0], [-0.1, -2.0], 2)
    assert cases.list_falls(rows).tolist() == [True] * 6 + [False] * 2
    falls = {benchmark: cases.list_falls(rows) for benchmark in cases.PROBED}
    finding = cases.state_following(cases.claim_of_following(), falls, resamples=500, seed=0)
    assert (finding["difference"], finding["n"]) == (0.25, 16)
    assert finding["outcome"] == "holds"
    probes = {cases.WARD: {"kept": rows, "cut off": rows}}
    described = cases.describe_false_steps(probes, resamples=50, seed=0)
    assert [row["what follows"] for row in described] == ["kept", "cut off"]
    assert [(row["less likely"], row["another answer"]) for row in described] == [(0.75, 0.75)] * 2
    cut = cases.describe_cut_thoughts(probes, resamples=50, seed=0)
    assert [row["share"] for row in cut] == list(cases.SHARES)
    figure = cases.faithfulness_figure({"cut_thoughts": cut, "false_steps": described})
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"clinic_ward", "chance"}
    levels = [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert levels == pytest.approx([100 * described[0]["belief"], 50])
    assert cases.faithfulness_figure({"cut_thoughts": [], "false_steps": []}) is None


def test_three_claims_are_the_papers_and_three_are_ours():
    assert [bool(claim.paper) for claim in cases.claims()] == [True] * 3 + [False] * 3
