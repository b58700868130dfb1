"Scaling: the parts, the curve, what the teachers say, what a vote costs, and the figures."

import itertools
from dataclasses import replace

import numpy as np
import pytest
from declarations import PLACES, RECIPES, check_claims, declared
from scipy.special import expit

import octomed.clinic.students
import octomed.clinic.teachers  # noqa: F401 - registers the teachers
from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.data.sources import find_source
from octomed.evaluate.arms import declare_stages
from octomed.evaluate.chance import find_chance_arm
from octomed.evaluate.claims import judge_claim
from octomed.evaluate.results import Results
from octomed.evaluate.stats import find_paper_number
from octomed.evaluate.tables import tabulate_scores
from octomed.paper import formatting, scaling
from octomed.paper.sourcing import Everywhere


@RECIPES
def test_parts_differ_in_their_questions_alone_and_two_controls_in_one_thing_more(name):
    recipe, arms = declared(scaling, name)
    centre, final = arms[scaling.CENTRE], arms[scaling.FINAL]
    for share in scaling.SHARES:
        part = arms[scaling.name(share)]
        assert replace(part, sources=final.sources, points=final.points) == final
    start = arms[scaling.BEFORE]
    assert start.schedule.epochs == 0
    assert replace(start, schedule=final.schedule, points=final.points) == final
    smaller = arms[scaling.SMALLER]
    assert smaller.student and replace(smaller, student=centre.student) == centre
    assert arms[scaling.REPEATED] == replace(arms[scaling.name(1 / 8)], compute_of=centre)
    keys = {declare_stages(arm, recipe.common)["student"].key for arm in arms.values()}
    assert len(keys) == len(arms) == 7
    assert (centre.filter, centre.form, centre.keep, centre.teacher) == ((), "cot", "correct", "")


@pytest.mark.parametrize("name", ["course", "gpu"])
def test_the_final_student_is_the_one_that_42_trains(name):
    recipe, arms = declared(scaling, name)
    theirs, cot = load_recipe(name), formatting.arms(load_recipe(name))["cot"]

    def stage_keys(arm, common):
        return {step: stage.key for step, stage in declare_stages(arm, common).items()}

    assert stage_keys(arms[scaling.FINAL], recipe.common) == stage_keys(cot, theirs.common)
    own = recipe.scalars("51_scaling")["seeds"]
    assert own <= theirs.scalars("42_formatting")["seeds"]


def test_chance_and_voters_are_students_of_42():
    recipe, arms = declared(scaling, "course")
    own = scaling.chance(recipe)
    assert own.items() <= formatting.chance(recipe).items()
    assert len(own) == len(CATEGORIES)
    asked = scaling.list_voters(recipe)
    assert asked[scaling.LONG] == arms[scaling.FINAL]
    assert asked[scaling.SHORT] == formatting.declare_students(recipe)["direct"]


@RECIPES
def test_every_part_lies_within_the_next_and_the_smallest_holds_every_pool(name):
    recipe, arms = declared(scaling, name)
    amounts = [dict(arms[scaling.name(s)].sources) for s in scaling.SHARES]
    assert all(set(a) == set(recipe.common.train) and min(a.values()) >= 1 for a in amounts)
    for less, more in itertools.pairwise(amounts):
        assert all(less[s] < more[s] for s in less)
    assert {find_source(s).category for s in amounts[0]} == set(CATEGORIES)
    assert all(n <= find_source(spec).expected for spec, n in amounts[-1].items())


def test_parts_of_a_pool_are_nested_question_by_question():
    from octomed.data.questions import Question, draw_balanced
    from octomed.distill.pools import take_subset

    made = [
        Question(
            f"which is {i}?",
            tuple("wxyz"),
            "ABCD"[i % 4],
            "s",
            "train",
            "multimodal_classification",
        )
        for i in range(400)
    ]
    for part in (lambda n: take_subset(made, n, 0), lambda n: draw_balanced(made, n, 0)[0]):
        parts = [{q.id for q in part(n)} for n in (20, 40, 80, 160)]
        assert [len(ids) for ids in parts] == [20, 40, 80, 160]
        assert all(less < more for less, more in itertools.pairwise(parts))


@RECIPES
def test_claims_are_about_arms_and_what_stands_beside_them(name):
    recipe, arms = declared(scaling, name)
    claims = scaling.claims()
    places = {*CATEGORIES, scaling.EVERYWHERE}
    check_claims(claims, {*arms, *scaling.BESIDE}, places)
    assert recipe.scalars("51_scaling")["vote_on"] in scaling.benchmarks(recipe)
    ahead = {(c.a, c.b): c.paper for c in claims if scaling.TEACHERS in (c.a, c.b)}
    passes = (scaling.FINAL, scaling.TEACHERS)
    assert list(ahead) == [passes, passes[::-1]]
    assert "67.29 against 53.96" in ahead[passes]
    assert [bool(c.paper) for c in claims] == [True] * 6 + [False] * 4


HELD, FAILED = ("agrees", "holds"), ("disagrees", "fails")  # the paper's claims, and ours


def invented(shares=(0.2, 0.3, 0.4, 0.5), seeds=2, n=60, **others):
    "Results whose arms are right on these shares of the questions."

    def rows(right, b):
        return [
            {
                "question": f"{b}{i}",
                "answer": "A",
                "statuses": ["correct" if i < right * n else "wrong"],
                "letters": ["A" if i < right * n else "B"],
                "forced": [False],
                "tokens": [9],
                "tags": {},
                "options": 4,
            }
            for i in range(n)
        ]

    names = map(scaling.name, scaling.SHARES)
    arms = {
        **dict(zip(names, shares, strict=True)),
        scaling.BEFORE: 0.1,
        scaling.REPEATED: 0.25,
        scaling.SMALLER: 0.3,
        scaling.TEACHERS: 0.6,
        **others,
    }
    by_arm = {
        arm: {benchmark: [rows(right, benchmark) for _ in range(seeds)] for benchmark in PLACES}
        for arm, right in arms.items()
    }
    return Everywhere(Common(bootstrap=300), by_arm)


def test_a_curve_recovers_the_line_that_made_the_points():
    at = np.log2(scaling.SHARES)
    acc = expit(0.4 * at + 0.3)[None]
    assert scaling.read_curve(at, acc, n=10**9, to=at) == pytest.approx(acc)
    ahead = scaling.read_curve(at[:3], acc[:, :3], n=10**9, to=at[3:])
    assert ahead == pytest.approx(acc[:, 3:])
    assert np.isfinite(scaling.read_curve(at, np.array([[0.0, 0, 1, 1]]), n=10, to=at)).all()
    level = scaling.read_curve(at, np.full((1, 4), 0.3), n=10**9, to=np.array([5.0]))
    assert level == pytest.approx(0.3)


def test_accuracies_are_means_over_benchmarks_and_resamples_are_shared_by_the_arms():
    r = invented(n=40)
    arms = [scaling.name(share) for share in (1 / 8, 1 / 4, 1 / 8)]
    measured = scaling.resample_accuracies(r, arms, "text_only")
    assert measured.shape == (301, 3)
    assert measured[0] == pytest.approx([0.2, 0.3, 0.2])
    assert (measured[:, 0] == measured[:, 2]).all()
    assert (measured[:, 1] >= measured[:, 0]).all()
    assert measured[1:, 0].std() == pytest.approx((0.2 * 0.8 / 40 / 2) ** 0.5, rel=0.2)


def test_the_check_on_the_whole_can_pass_and_can_fail():
    at = np.log2(scaling.SHARES)
    c = next(c for c in scaling.claims() if c.b == scaling.CURVE)
    smooth = scaling.state_finding(c, invented(shares=tuple(expit(0.5 * at)), n=400))
    jump = scaling.state_finding(c, invented(shares=(0.2, 0.25, 0.3, 0.9), n=400))
    assert smooth["outcome"] in HELD
    assert abs(smooth["difference"]) < 0.02
    assert len(smooth["by_seed"]) == smooth["training_seeds"] == 2
    assert smooth["n"] == 2400
    assert jump["outcome"] in FAILED
    assert jump["difference"] > 0.4
    assert jump["interval"][0] > scaling.MARGIN


def test_a_fit_says_what_it_misses():
    f = scaling.fit_curve(invented(shares=(0.2, 0.25, 0.3, 0.9), n=200), scaling.EVERYWHERE)
    assert f["found"] == pytest.approx(0.9)
    assert f["if nothing changed"] == pytest.approx(0.3)
    assert f["foretold"] < 0.5
    assert f["largest residual"] > 0.1
    assert f["last doubling"] > 0
    low, high = f["foretold, interval"]
    assert low <= f["foretold"] <= high


def test_a_vote_is_right_where_most_readable_responses_are_and_costs_all_of_them():
    def row(letters):
        return {
            "question": "q",
            "answer": "A",
            "letters": letters,
            "tokens": list(range(1, len(letters) + 1)),
        }

    for letters, right in (("AAB", 1), ("?A?", 1), ("BBA", 0), ("???", 0)):
        answers = [None if letter == "?" else letter for letter in letters]
        assert scaling.vote_on_question(row(answers), 3, 0) == (right, 6)
    # Groups of three responses in a row; the seventh is in none.
    assert scaling.vote_on_question(row(list("AABBBAB")), 3, 0) == (0.5, (6 + 15) / 2)
    assert scaling.vote_on_question(row(list("AABB")), 1, 0) == (0.5, 2.5)


def test_votes_are_tabulated_as_far_as_there_are_responses():
    def run(letters):
        row = {"question": "q", "answer": "A", "letters": letters, "tokens": [2] * len(letters)}
        return [row, {**row, "question": "p", "answer": "B"}]

    asked = {"clinic_ward:test": [run(list("AABAB")), run(list("BBBBA"))]}
    repeated = Results(Common(bootstrap=100, eval_seeds=5), {scaling.LONG: asked})
    rows = scaling.tabulate_votes(repeated)
    assert [row["votes"] for row in rows] == [1, 3, 5]
    assert [row["tokens"] for row in rows] == [2, 6, 10]
    # Every vote gives one of two questions, whatever is said, to each training seed.
    assert [row["accuracy"] for row in rows] == pytest.approx([0.5] * 3)
    for row in rows:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["tokens_interval"] == pytest.approx([row["tokens"]] * 2)


def test_a_vote_asks_for_the_responses_that_are_there_already():
    recipe, arms = declared(scaling, "course")
    from octomed.evaluate.arms import declare_evaluation

    once, often = (
        declare_evaluation(arms[scaling.FINAL], "clinic_ward:test", r.common).params
        for r in (recipe, scaling.ask_for_vote(recipe))
    )
    assert often["seeds"] == 10
    assert not often["likelihood"]
    assert once["sampling"] == often["sampling"]
    assert once["student"] == often["student"]


def test_the_teacher_answers_every_question_as_often_as_there_are_students():
    recipe, _ = declared(scaling, "smoke")
    small = replace(recipe, common=replace(recipe.common, benchmark_limit=80))
    runs = scaling.ask_own_teacher(small, "clinic_ward:test", 2)
    assert [len(run) for run in runs] == [80, 80]
    assert [row["question"] for row in runs[0]] == [row["question"] for row in runs[1]]
    statuses = [row["statuses"] for row in itertools.chain(*runs)]
    assert {len(some) for some in statuses} == {1}
    share = np.mean([some == ["correct"] for some in statuses])
    assert 0.7 < share < 0.97, "the reasoning teacher's stated rate"


def test_the_paper_rows_are_the_overalls_of_the_student_and_its_teachers():
    rows = scaling.paper_rows()
    assert rows[scaling.FINAL, "multimodal_classification"] == pytest.approx(0.6729)
    assert rows[scaling.TEACHERS, "multimodal_classification"] == pytest.approx(0.5396)
    teacher = find_paper_number(2, "Overall", "DeepSeek-R1", category="text_only")
    assert rows[scaling.TEACHERS, "text_only"] * 100 == pytest.approx(teacher)
    assert scaling.medqa_of("OctoMed-7B") == pytest.approx(0.9081)


def results():
    votes = [
        {
            "student": student,
            "benchmark": "clinic_ward:test",
            "votes": n,
            "accuracy": 0.5,
            "interval": [0.4, 0.6],
            "tokens": tokens * n,
        }
        for student, tokens in ((scaling.LONG, 60), (scaling.SHORT, 6))
        for n in scaling.VOTES
    ]
    r = invented()
    return {
        "rows": tabulate_scores(r, scaling.paper_rows()),
        "fits": [scaling.fit_curve(r, where) for where in (*CATEGORIES, scaling.EVERYWHERE)],
        "votes": votes,
    }


def hollow(ax):
    "Heights of the hollow points of axes."
    lines = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    heights = itertools.chain.from_iterable(line.get_ydata() for line in lines)
    return sorted({round(float(height), 2) for height in heights})


def test_the_curves_stand_in_a_panel_for_each_category():
    r = results()
    axes = scaling.figure(r).axes
    assert [ax.get_title(loc="left") for ax in axes] == list(map(scaling.say, CATEGORIES))
    for ax in axes:
        assert ax.get_xscale() == "log"
        (curve,) = (line for line in ax.lines if len(line.get_xdata()) == 25)
        assert [curve.get_xdata()[end] for end in (0, -1)] == pytest.approx([1 / 8, 1])
        assert sum(line.get_marker() == "D" for line in ax.lines) == 2
        chance = [line for line in ax.lines if list(line.get_ydata()) == pytest.approx([25, 25])]
        assert len(chance) == 1


def test_the_papers_numbers_stand_apart_where_they_are_on_another_scale():
    r = results()
    ours, papers = scaling.progress_figure(r).axes
    assert hollow(papers) == [57.99, 90.81, 93.16]
    assert hollow(ours) == []
    ranked, of_paper = scaling.models_figure(r).axes
    names = [label.get_text() for label in ranked.get_yticklabels()]
    assert names[0] == scaling.TEACHERS
    assert {"start", "student", "1/2, smaller student", "chance"} <= set(names)
    names = [label.get_text() for label in of_paper.get_yticklabels()]
    assert {"OctoMed-7B", "GPT-4o"} <= set(names)
    assert "DeepSeek-R1" not in names, "it has no Overall with images"
    assert len(scaling.table_figure(r).axes[0].get_yticklabels()) == 3


def test_the_figure_of_votes_says_how_many_each_point_is():
    (ax,) = scaling.votes_figure(results()).axes
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.texts] == ["1", "3", "5", "10"] * 2
    curves = [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"]
    assert curves == [[60, 180, 300, 600], [6, 18, 30, 60]]


def test_all_categories_together_have_no_one_chance_student():
    recipe, arms = declared(scaling, "smoke")
    blind = scaling.chance(recipe)
    r = invented()
    rows = {**r.rows, **dict.fromkeys(blind, r.rows[scaling.FINAL])}
    r = replace(r, rows=rows, arms={scaling.FINAL: arms[scaling.FINAL], **blind})
    assert find_chance_arm(r, scaling.FINAL, scaling.EVERYWHERE) is None
    assert find_chance_arm(r, scaling.FINAL, "text_only") == "chance, cot, text_only"
    assert find_chance_arm(r, scaling.FINAL, "clinic_reading:test") == (
        "chance, cot, multimodal_classification"
    )


def test_findings_see_what_was_put_in():
    r = invented(n=200)
    claims = [c for c in scaling.claims() if c.b != scaling.CURVE]
    findings = [judge_claim(c, r) for c in claims]
    students = [f for f in findings if scaling.TEACHERS not in (f["a"], f["b"])]
    assert {f["outcome"] for f in students} <= set(HELD)
    (passes,) = (f for f in findings if f["b"] == scaling.TEACHERS)
    assert passes["outcome"] in FAILED
