"Scaling: the axes and their centre, the curve, what the teachers and a vote say, and the figures."

import itertools
from dataclasses import replace

import numpy as np
import pytest
from declarations import PLACES, RECIPES, check_claims, declared
from scipy.special import expit

import octomed.clinic.students
import octomed.clinic.teachers  # noqa: F401 - registers the teachers
from octomed.core.recipe import CATEGORIES, Common
from octomed.data.sources import find_source
from octomed.evaluate.arms import declare_stages
from octomed.evaluate.claims import judge_claim
from octomed.evaluate.figures import OUTCOME_COLOURS
from octomed.evaluate.results import Results
from octomed.evaluate.section_run import benchmark_rows
from octomed.evaluate.stats import find_paper_number
from octomed.evaluate.tables import tabulate_scores
from octomed.paper import scaling
from octomed.paper.sourcing import Everywhere


@RECIPES
def test_three_axes_cross_in_one_student_and_change_nothing_else(name):
    recipe, arms = declared(scaling, name)
    centre = arms[scaling.CENTRE]
    for share in scaling.SHARES:
        assert replace(arms[scaling.name(share)], sources=centre.sources) == centre
    for e in scaling.EPOCHS:
        arm = arms[scaling.name(1 / 2, e)]
        assert replace(arm, schedule=centre.schedule) == centre
        assert arm.schedule.epochs == e
    smaller = arms[scaling.SMALLER]
    assert replace(smaller, student=centre.student, base=centre.base) == centre
    assert smaller.base == replace(centre.base, student=smaller.student)
    assert arms[scaling.REPEATED] == replace(arms[scaling.name(1 / 8)], compute_of=centre)
    assert arms[scaling.FINAL].schedule.epochs == 3
    assert (
        len({declare_stages(a, recipe.common)["student"].key for a in arms.values()})
        == len(arms)
        == 9
    )
    assert (centre.filter, centre.form) == ((), "cot")
    assert (centre.keep, centre.teacher) == ("correct", "")


@RECIPES
def test_every_part_lies_within_the_next_and_the_smallest_holds_every_pool(name):
    recipe, arms = declared(scaling, name)
    amounts = [dict(arms[scaling.name(s)].sources) for s in scaling.SHARES]
    assert all(set(a) == set(recipe.common.train) and min(a.values()) >= 1 for a in amounts)
    for less, more in itertools.pairwise(amounts):
        assert all(less[s] < more[s] for s in less)
    assert {find_source(s).category for s in amounts[0]} == set(CATEGORIES)
    for spec, n in arms[scaling.CENTRE].base.sources:
        assert n < 0 and amounts[-1][spec] - n <= find_source(spec).expected


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
                "options": 4,
            }
            for i in range(n)
        ]

    names = map(scaling.name, scaling.SHARES)
    arms = {
        **dict(zip(names, shares, strict=True)),
        scaling.BEFORE: 0.1,
        scaling.name(1 / 2, 1): 0.2,
        scaling.name(1 / 2, 2): 0.3,
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
    smooth = scaling.state_finding(c, invented(shares=tuple(expit(0.5 * at)), n=400), None)
    jump = scaling.state_finding(c, invented(shares=(0.2, 0.25, 0.3, 0.9), n=400), None)
    assert smooth["outcome"] == "holds"
    assert abs(smooth["difference"]) < 0.02
    assert len(smooth["by_seed"]) == smooth["training_seeds"] == 2
    assert smooth["n"] == 2400
    assert jump["outcome"] == "fails"
    assert jump["difference"] > 0.4
    assert jump["interval"][0] > scaling.MARGIN


def test_a_fit_says_what_it_misses():
    f = scaling.fit_curve(invented(shares=(0.2, 0.25, 0.3, 0.9), n=200), scaling.EVERYWHERE)
    assert f["found"] == pytest.approx(0.9)
    assert f["if nothing changed"] == pytest.approx(0.3)
    assert f["foretold"] < 0.5
    assert f["largest residual"] > 0.1
    assert f["last doubling"] > 0
    assert f["curve"][0][0] == pytest.approx(1 / 8)
    assert f["curve"][-1][0] == pytest.approx(1)
    low, high = f["foretold, interval"]
    assert low <= f["foretold"] <= high


def test_a_vote_is_right_where_most_readable_responses_are():
    status = {"A": "correct", "B": "wrong", None: "unparsed"}

    def row(letters):
        return {
            "question": "q",
            "answer": "A",
            "options": 4,
            "letters": letters,
            "statuses": [status[letter] for letter in letters],
        }

    ward = "clinic_ward:test"
    run = [
        row(["A", "A", "B"]),
        row([None, "A", None]),
        row(["B", "B", "A"]),
        row([None, None, None]),
    ]
    votes = scaling.take_votes(Results(Common(bootstrap=100), {scaling.FINAL: {ward: [run]}}))
    assert votes.scores(scaling.VOTE, ward)[0].ravel().tolist() == [1, 1, 0, 0]
    single = votes.scores(scaling.SINGLE, ward)[0]
    assert single.mean(1) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])
    c = next(c for c in scaling.claims() if c.a == scaling.VOTE)
    assert scaling.state_finding(c, None, votes)["difference"] == pytest.approx(0.5 - 1 / 3)


def test_a_vote_asks_for_the_responses_that_are_there_already():
    recipe, arms = declared(scaling, "course")
    from octomed.evaluate.arms import declare_evaluation

    once, often = (
        declare_evaluation(arms[scaling.FINAL], "clinic_ward:test", r.common).params
        for r in (recipe, scaling.ask_for_vote(recipe))
    )
    assert often["seeds"] == 10
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
    assert scaling.medqa_rows("b") == {(scaling.VOTE, "b"): pytest.approx(0.9081)}


def results():
    r, ward = invented(), "clinic_ward:test"
    final = {ward: r.rows[scaling.FINAL][ward]}
    votes = scaling.take_votes(Results(r.common, {scaling.FINAL: final}))
    sizes = dict.fromkeys(r.rows, 1_400_000)
    del sizes[scaling.TEACHERS]
    return {
        "rows": tabulate_scores(r, scaling.paper_rows()),
        "fits": [scaling.fit_curve(r, where) for where in (*CATEGORIES, scaling.EVERYWHERE)],
        "sizes": {**sizes, scaling.SMALLER: 400_000},
        "votes": benchmark_rows(tabulate_scores(votes, scaling.medqa_rows(ward))),
    }


def test_the_figures_show_every_part_and_the_paper_hollow():
    r = results()
    ax = scaling.figure(r).axes[0]
    assert ax.get_xscale() == "log"
    assert sum(len(line.get_xdata()) == 25 for line in ax.lines) == 3
    names = {t.get_text() for t in scaling.models_figure(r).axes[0].texts}
    assert {"start", "student", "smaller student", scaling.TEACHERS} <= names
    assert {"OctoMed-7B", "GPT-4o"} <= names
    assert "DeepSeek-R1" not in names

    def hollow(fig):
        lines = [line for line in fig.axes[0].lines if line.get_markerfacecolor() == "white"]
        heights = itertools.chain.from_iterable(line.get_ydata() for line in lines)
        return sorted({round(float(height), 2) for height in heights})

    assert hollow(scaling.progress_figure(r)) == [57.99, 90.81, 93.16]
    assert scaling.epochs_figure(r).axes[0].get_xlabel() == "epochs"
    assert len(scaling.table_figure(r).axes[0].get_yticklabels()) == 3
    assert set(OUTCOME_COLOURS) == {
        "agrees",
        "disagrees",
        "holds",
        "fails",
        "undecided",
        "not tested",
    }


def test_findings_see_what_was_put_in():
    r = invented(n=200)
    claims = [c for c in scaling.claims() if c.b != scaling.CURVE and c.a != scaling.VOTE]
    findings = [judge_claim(c, r) for c in claims]
    students = [f for f in findings if scaling.TEACHERS not in (f["a"], f["b"])]
    assert {f["outcome"] for f in students} == {"agrees", "holds"}
    (passes,) = (f for f in findings if f["b"] == scaling.TEACHERS)
    assert passes["outcome"] == "disagrees"
