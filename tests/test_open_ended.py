"The section of open-ended questions: what scores accept, its arms, its claims and its findings."

import json
from dataclasses import replace

import numpy as np
import pytest
from declarations import RECIPES, check_claims, declared
from hypothesis import given, settings
from hypothesis import strategies as st

from octomed.clinic.open_teachers import CLINICIAN, WORDED, read_in_words, respond_in_words
from octomed.clinic.questions import load_questions, look_up_truth
from octomed.core.paths import OctomedError, UsageError
from octomed.core.recipe import load_recipe
from octomed.core.store import run_stage
from octomed.distill.open_rejection import (
    ERRORS,
    OPEN_SCORES,
    OpenSample,
    accept_in_words,
    count_accepted,
    find_break_even,
    resample_graders,
    take_share,
    turn_over,
)
from octomed.evaluate.arms import Arm, declare_evaluation, declare_stages
from octomed.generate.answers import Verdict
from octomed.generate.open_answers import OpenReading, find_open_reader
from octomed.generate.prompts import format_question, load_template
from octomed.generate.samples import Sample
from octomed.paper import open_ended
from octomed.run.plan import plan

WARD = "clinic_ward:train"


@pytest.fixture(scope="module")
def questions():
    return load_questions("clinic_ward", "dev", limit=60)


def make_sample(q, index=0, text="", finish="stop"):
    return Sample(
        question=q.id,
        model="m@1",
        prompt="p",
        sampling="s",
        index=index,
        text=text,
        finish=finish,
        tokens=3,
    )


def test_an_answer_is_right_if_it_names_the_reference_and_nothing_else(questions):
    for q in questions:
        truth = look_up_truth(q.id)
        other = next(option for option in truth.options if option != truth.answer)
        said = {
            truth.answer: (True, True),
            f"The {truth.answer.upper()}.": (True, True),
            f"{truth.answer} or {other}": (False, True),
            other: (False, True),
            "more tests are needed": (False, False),
        }
        for answer, expected in said.items():
            reading = read_in_words(q.id, f"<think>x</think> <answer>{answer}</answer>")
            assert (reading.is_right, reading.is_named) == expected, answer
            assert (reading.points, reading.false) == (0, 0) and reading.full == len(truth.facts)


def test_the_teacher_is_right_as_often_as_stated_and_words_it_as_stated(questions):
    responses = [respond_in_words(CLINICIAN, q.id, s) for q in questions for s in range(30)]
    asked = [q for q in questions for _ in range(30)]
    assert not any("option" in text for text, _ in responses)
    ended = [
        (q, text) for q, (text, finish) in zip(asked, responses, strict=True) if finish == "stop"
    ]
    readings = [read_in_words(q.id, text) for q, text in ended]
    hedged = np.mean([" or " in text.rpartition("<answer>")[2] for _, text in ended])
    assert hedged == pytest.approx(WORDED["hedged"], abs=0.02)
    sound = [reading.is_sound for reading in readings if reading.is_right]
    assert np.mean(sound) == pytest.approx(1 - CLINICIAN.reasoning_wrong, abs=0.05)
    assert 0.6 < np.mean([reading.is_right for reading in readings]) < 0.85


def make_own(q, finals, rights, sounds=None):
    "Samples of a question with these answers."
    sounds = sounds or rights
    own = []
    for n, (final, right, sound) in enumerate(zip(finals, rights, sounds, strict=True)):
        reading = OpenReading(right, True, points=int(sound), full=1, false=0)
        own.append(OpenSample(make_sample(q, n), final, reading))
    return own


def test_each_score_accepts_by_its_own_rule(questions):
    q = questions[0]
    answer = q.answer_text
    finals = [answer, f"the {answer}.", f"it is {answer}", "x", "X.", "x", None]
    own = make_own(q, finals, [True] * 3 + [False] * 4, [False, True, True] + [False] * 4)
    accepted = {score: accept_in_words(score, q, own) for score in OPEN_SCORES}
    assert accepted["all"] == [True] * 6 + [False]
    assert accepted["exact"] == [True] + [False] * 6
    assert accepted["normalised"] == [True] * 2 + [False] * 5
    assert accepted["grader"] == [True] * 3 + [False] * 4
    assert accepted["rubric"] == [False, True, True] + [False] * 4
    assert accepted["agreement"] == [False] * 3 + [True] * 3 + [False]
    with pytest.raises(UsageError, match="there is no score luck: choose from all"):
        accept_in_words("luck", q, own)
    unknown = [replace(sample, reading=None) for sample in own]
    with pytest.raises(UsageError, match="nobody knows the facts behind clinic_ward"):
        accept_in_words("rubric", q, unknown)


def test_a_worse_grader_errs_wherever_a_better_one_does(questions):
    q = questions[0]
    own = make_own(q, ["x"] * 200, [n % 3 > 0 for n in range(200)])
    right = np.array([sample.is_right for sample in own])
    wrong = {
        error: np.array(accept_in_words("grader", q, own, error=error)) != right
        for error in (0.0, 0.25, 0.75, 1.0)
    }
    assert not wrong[0.0].any() and wrong[1.0].all()
    assert (wrong[0.25] <= wrong[0.75]).all()
    assert wrong[0.25].mean() == pytest.approx(0.25, abs=0.08)
    again = accept_in_words("grader", q, own, error=0.25)
    assert again == accept_in_words("grader", q, own, error=0.25)


@settings(deadline=None)
@given(
    rights=st.lists(st.booleans(), min_size=1, max_size=30),
    error=st.floats(0, 1),
    how=st.sampled_from(list(ERRORS)),
    seed=st.integers(0, 99),
)
def test_a_grader_errs_only_in_the_stated_direction(rights, error, how, seed):
    right = np.array(rights)
    verdicts = turn_over(right, np.random.default_rng(seed).random(len(right)), error, how)
    if how == "accepts":
        assert verdicts[right].all()
    if how == "rejects":
        assert not verdicts[~right].any()


def test_precision_and_recall_are_counted_over_all_samples(questions):
    a, b = questions[:2]
    taken = {
        a.id: make_own(a, [a.answer_text, "x", "x"], [True, False, False]),
        b.id: make_own(b, [b.answer_text, f"the {b.answer_text}", None], [True, True, False]),
    }
    counts = count_accepted("exact", [a, b], taken)
    assert counts["samples"].tolist() == [3, 3] and counts["right"].tolist() == [1, 2]
    shares = {name: take_share(name, counts)[0] for name in ("accepted", "precision", "recall")}
    assert shares == {
        "accepted": pytest.approx(2 / 6),
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
    }
    twice_b = np.array([[0.0, 2.0]])
    assert take_share("recall", counts, twice_b)[0] == 0.5
    nothing = {**counts, "accepted": np.zeros(2)}
    assert np.isnan(take_share("precision", nothing)[0])


def test_a_grader_that_errs_both_ways_breaks_even_at_one_half():
    rng = np.random.default_rng(0)
    right = rng.random((3000, 8)) < 0.7
    answered = np.ones_like(right)
    rates = tuple(round(0.1 * step, 1) for step in range(11))
    even, kept = {}, {}
    for how in ERRORS:
        rows = resample_graders(right, answered, rates, how=how, n=5)
        even[how] = find_break_even(rows, level=float(right[:, 0].mean()))
        kept[how] = [row["kept"] for row in rows]
        assert rows[0]["kept"] == 1.0 and rows[0]["recall"] == 1.0
    assert even["both"] == pytest.approx(0.5, abs=0.03)
    assert even["rejects"] is None and set(kept["rejects"][:-1]) == {1.0}
    assert kept["rejects"][-1] is None  # nothing is accepted
    assert min(kept["accepts"]) == pytest.approx(0.7, abs=0.03)


def test_without_options_a_prompt_holds_the_stem_alone(questions):
    q = questions[0]
    assert format_question(q, "") == q.stem
    for name in ("cot_open", "r1_open", "short_answer"):
        text = load_template(name).fill(q)
        assert q.stem in text and not any(option in text for option in set(q.options) - {q.stem})
    words = load_template("cot").text
    assert load_template("cot_open").text == words


@RECIPES
def test_six_students_read_as_many_traces_of_one_teachers_samples(name):
    recipe, arms = declared(open_ended, name)
    own = recipe.scalars("63_open_ended")
    stages = {arm: declare_stages(each, recipe.common) for arm, each in arms.items()}
    assert len({of["samples"] for of in stages.values()}) == 1
    assert len({of["student"] for of in stages.values()}) == len(arms) == 6
    assert {(a.form, a.k, a.traces, a.teacher) for a in arms.values()} == {
        ("cot_open", 1, own["traces"], "clinic/clinician")
    }
    errors = {arm: a.error for arm, a in arms.items() if a.score == "grader"}
    stated = {arm: e for arm, e in open_ended.ERROR_OF.items() if arm != open_ended.NONE}
    assert errors == stated
    (samples,) = {of["samples"] for of in stages.values()}
    assert samples.params["teachers"]["text"][2] == "r1_open"
    assert not stages[open_ended.GRADER]["accepted"].params["grader"]


@RECIPES
def test_claims_compare_arms_that_exist_on_the_benchmark(name):
    recipe, arms = declared(open_ended, name)
    claims = open_ended.claims()
    check_claims(claims, arms, open_ended.benchmarks(recipe))
    assert len(claims) == 6 and not any(claim.paper for claim in claims)
    first, trend, *_ = claims
    assert isinstance(first, open_ended.Accepted)
    places = dict(trend.along)
    assert places[trend.a] == max(places.values()) and places[trend.b] == min(places.values())
    assert {arm: -place for arm, place in places.items()} == open_ended.ERROR_OF


def test_the_chance_student_reads_nothing_of_a_question():
    recipe, _ = declared(open_ended, "smoke")
    ((name, arm),) = open_ended.chance(recipe).items()
    assert name == "chance, cot_open, text_only" and arm.blind
    params = declare_evaluation(arm, WARD.replace("train", "test"), recipe.common).params
    assert params["form"] == "cot_open" and params["blind"]


def test_without_a_known_world_a_model_grades_and_there_is_no_rubric():
    recipe = load_recipe("paper")
    arms = open_ended.arms(recipe)
    assert set(arms) == {open_ended.NONE, open_ended.GRADER, open_ended.AGREEMENT}
    stages = declare_stages(arms[open_ended.GRADER], recipe.common)
    assert stages["accepted"].params["grader"] == recipe.common.grader
    assert find_open_reader("medqa:test") is None
    planned = plan("paper", only="63_open_ended")[0]
    assert planned["samples"] == 16 * planned["questions"] and planned["money"] > 0


def test_arms_that_are_asked_with_options_are_as_they_were():
    common = load_recipe("smoke").common
    arm = Arm(sources=((WARD, 4),))
    stages = declare_stages(arm, common)
    assert stages["accepted"].name == "accepted"
    assert stages["samples"].params["teachers"]["text"][2] == "r1"


def declare_accepted(score, **changes):
    common = replace(load_recipe("smoke").common, samples=4)
    arm = Arm(
        sources=((WARD, 12),),
        form="cot_open",
        score=score,
        teacher="clinic/clinician",
        **changes,
    )
    return declare_stages(arm, common)["accepted"]


def read_accepted(score, **changes):
    "The funnel and the traces of an accepted set."
    folder = run_stage(declare_accepted(score, **changes))
    rows = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    return json.loads((folder / "funnel.json").read_text()), rows


def test_every_score_gives_as_many_traces_in_the_teachers_words(own_places):
    kept = {}
    for score in ("all", "grader", "rubric", "agreement"):
        funnel, rows = read_accepted(score, traces=8)
        assert funnel["kept"] == len(rows) == 8
        assert len({row["question"] for row in rows}) == 8
        assert funnel["right"] == np.mean([row["right"] for row in rows])
        assert all(row["response"].startswith("<think>") for row in rows)
        assert all(r"\boxed{" in row["response"] for row in rows)
        kept[score] = funnel
    assert kept["grader"]["right"] == 1.0 and kept["rubric"]["sound"] == 1.0
    assert kept["all"]["accepted"] > kept["grader"]["accepted"]


def test_too_few_traces_are_refused_and_not_made_up_for(own_places):
    with pytest.raises(OctomedError, match="of the 13 that every score is to give"):
        run_stage(declare_accepted("all", traces=13))


def test_a_model_grades_where_nobody_knows_the_world(own_places, monkeypatch):
    from octomed.distill import open_rejection

    monkeypatch.setattr(open_rejection, "find_open_reader", lambda source: None)
    monkeypatch.setattr(
        open_rejection,
        "judge_open_ended",
        lambda items, *_, **__: [
            Verdict(None, "correct" if n % 2 else "wrong") for n, _ in enumerate(items)
        ],
    )
    folder = run_stage(
        replace(
            declare_accepted("grader", traces=3),
            params={**declare_accepted("grader", traces=3).params, "grader": "a model"},
        )
    )
    rows = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and {row["right"] for row in rows} == {None}


def test_a_students_words_are_read_as_its_teachers(questions):
    q = questions[0]
    other = next(option for option in q.options if option != q.answer_text)
    thought = "<think>so</think> "
    said = {
        rf"\boxed{{give {q.answer_text}}}": "correct",
        rf"\boxed{{{other}}}": "wrong",
        r"\boxed{nothing}": "unparsed",
        r"\boxed{" + q.answer + "}": "unparsed",  # a letter names nothing where none was shown
    }
    for answer, status in said.items():
        sample = make_sample(q, text=thought + answer)
        assert open_ended.name_open_status(q, sample, Verdict(None, "unparsed")) == status
    cut = make_sample(q, text="<think>", finish="length")
    assert open_ended.name_open_status(q, cut, Verdict(None, "truncated")) == "truncated"
    strange = replace(q, source="medqa")
    sample = make_sample(q, text=thought)
    assert open_ended.name_open_status(strange, sample, Verdict("A", "correct")) == "correct"


def test_the_finding_about_acceptance_is_a_difference_of_precisions():
    hits = np.array([3.0, 1.0, 2.0, 2.0] * 20)
    whole = {"samples": np.full(80, 4.0), "accepted": np.full(80, 4.0), "hits": hits}
    counts = {open_ended.AGREEMENT: {**whole, "hits": whole["accepted"]}, open_ended.SOME: whole}
    (claim, *_) = open_ended.claims()
    finding = open_ended.state_acceptance(claim, counts, resamples=300, seed=0)
    assert finding["difference"] == pytest.approx(0.5) and finding["outcome"] == "holds"
    assert finding["n"] == 80 and finding["interval"][0] > 0.4
    swapped = {claim.a: counts[claim.b], claim.b: counts[claim.a]}
    finding = open_ended.state_acceptance(claim, swapped, resamples=300, seed=0)
    assert finding["outcome"] == "fails"


def test_figures_show_each_student_and_each_way_to_err():
    row = {"joins": "all", "reading": "generated", "benchmark": WARD}
    row |= {"interval": [0.3, 0.5], "chance": 0.25}
    rows = [{**row, "arm": arm, "accuracy": 0.4} for arm in (open_ended.NONE, open_ended.GRADER)]
    funnels = {open_ended.NONE: {"right": 0.7}, open_ended.GRADER: {"right": 1.0}}
    results = {"rows": rows, "funnels": funnels, "reading": "generated"}
    assert [point["right"] for point in open_ended.list_points(results)] == [0.7, 1.0]
    assert open_ended.figure(results).axes
    assert open_ended.figure({**results, "reading": "likelihood"}) is None
    assert open_ended.figure_of_graders({"graders": [], "without_rejection": None}) is None
    kept = {"how": "both", "kept_range": [0.5, 0.9]}
    curve = [{**kept, "error": error, "kept": 1 - error} for error in (0.0, 0.5)]
    assert open_ended.figure_of_graders({"graders": curve, "without_rejection": 0.7}).axes


def test_questions_without_an_answer_never_count_as_right(questions):
    q = questions[0]
    own = [OpenSample(make_sample(q), None)]
    assert [own[0].is_right, *accept_in_words("all", q, own)] == [False, False]
