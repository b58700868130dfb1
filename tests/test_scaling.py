"Scaling: the axes and their centre, the curve, what the teachers and a vote say, and the figures."

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

import octomed.clinic.students  # noqa: F401 - registers the students
import octomed.clinic.teachers  # noqa: F401 - registers the teachers
from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.data.sources import source_of
from octomed.evaluate.arms import Results, stages
from octomed.evaluate.claims import finding
from octomed.evaluate.figures import VERDICT_COLOURS
from octomed.evaluate.stats import paper_number
from octomed.paper import scaling as S

RECIPES = pytest.mark.parametrize("name", ["smoke", "course"])
PLACES = (
    "clinic_ward:test",
    "clinic_boards:test",
    "clinic_rounds:test",
    "clinic_grand:test",
    "clinic_reading:test",
    "clinic_scanner:test",
)


def declared(name):
    recipe = S.scope(load_recipe(name))
    return recipe, S.arms(recipe)


@RECIPES
def test_three_axes_cross_in_one_student_and_change_nothing_else(name):
    recipe, arms = declared(name)
    centre = arms[S.CENTRE]
    for share in S.SHARES:
        assert replace(arms[S.name(share)], sources=centre.sources) == centre
    for e in S.EPOCHS:
        assert (
            replace(arms[S.name(1 / 2, e)], schedule=centre.schedule) == centre
            and arms[S.name(1 / 2, e)].schedule.epochs == e
        )
    assert replace(arms[S.SMALLER], student=centre.student, base=centre.base) == centre and arms[
        S.SMALLER
    ].base == replace(centre.base, student=arms[S.SMALLER].student)
    assert (
        arms[S.REPEATED] == replace(arms[S.name(1 / 8)], compute_of=centre)
        and arms[S.FINAL].schedule.epochs == 3
    )
    assert len({stages(a, recipe.common)["student"].key for a in arms.values()}) == len(arms) == 9
    assert (
        centre.filter == ()
        and centre.form == "cot"
        and centre.keep == "correct"
        and centre.teacher == ""
    )


@RECIPES
def test_every_part_lies_within_the_next_and_the_smallest_holds_every_pool(name):
    recipe, arms = declared(name)
    amounts = [dict(arms[S.name(s)].sources) for s in S.SHARES]
    assert all(set(a) == set(recipe.common.train) and min(a.values()) >= 1 for a in amounts)
    for less, more in itertools.pairwise(amounts):
        assert all(less[s] < more[s] for s in less)
    assert {source_of(s).category for s in amounts[0]} == set(CATEGORIES)
    for spec, n in arms[S.CENTRE].base.sources:
        assert n < 0 and amounts[-1][spec] - n <= source_of(spec).expected


def test_parts_of_a_pool_are_nested_question_by_question():
    from octomed.data.questions import Question, balanced
    from octomed.distill.pools import subset

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
    for part in (lambda n: subset(made, n, 0), lambda n: balanced(made, n, 0)[0]):
        parts = [{q.id for q in part(n)} for n in (20, 40, 80, 160)]
        assert [len(p) for p in parts] == [20, 40, 80, 160] and all(
            a < b for a, b in itertools.pairwise(parts)
        )


@RECIPES
def test_claims_are_about_arms_and_what_stands_beside_them(name):
    recipe, arms = declared(name)
    claims = S.claims()
    for c in claims:
        assert (
            {c.a, c.b} | {a for a, _ in c.along} <= {*arms, *S.BESIDE}
            and c.a != c.b
            and c.not_proved
        )
        assert (
            c.benchmark in {*CATEGORIES, S.EVERYWHERE}
            and (c.kind == "equivalent") == (c.margin is not None)
            and (c.kind == "trend") == bool(c.along)
        )
    assert len({c.text for c in claims}) == len(claims) and recipe.of("51_scaling")[
        "vote_on"
    ] in S.benchmarks(recipe)
    ahead = {(c.a, c.b): c.paper for c in claims if S.TEACHERS in (c.a, c.b)}
    assert (
        list(ahead) == [(S.FINAL, S.TEACHERS), (S.TEACHERS, S.FINAL)]
        and "67.29 against 53.96" in ahead[S.FINAL, S.TEACHERS]
    )


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

    arms = (
        {S.name(s): right for s, right in zip(S.SHARES, shares, strict=False)}
        | {
            S.BEFORE: 0.1,
            S.name(1 / 2, 1): 0.2,
            S.name(1 / 2, 2): 0.3,
            S.REPEATED: 0.25,
            S.SMALLER: 0.3,
            S.TEACHERS: 0.6,
        }
        | others
    )
    return S.Everywhere(
        Common(bootstrap=300),
        {
            a: {b: [rows(right, b) for _ in range(seeds)] for b in PLACES}
            for a, right in arms.items()
        },
    )


def test_a_curve_recovers_the_line_that_made_the_points():
    at = np.log2(S.SHARES)
    acc = expit(0.4 * at + 0.3)[None]
    assert S.curve(at, acc, 10**9, at) == pytest.approx(acc) and S.curve(
        at[:3], acc[:, :3], 10**9, at[3:]
    ) == pytest.approx(acc[:, 3:])
    assert np.isfinite(S.curve(at, np.array([[0.0, 0, 1, 1]]), 10, at)).all()
    assert S.curve(at, np.full((1, 4), 0.3), 10**9, np.array([5.0])) == pytest.approx(0.3)


def test_accuracies_are_means_over_benchmarks_and_resamples_are_shared_by_the_arms():
    r = invented(n=40)
    got = S.accuracies(r, [S.name(1 / 8), S.name(1 / 4), S.name(1 / 8)], "text_only")
    assert (
        got.shape == (301, 3)
        and got[0] == pytest.approx([0.2, 0.3, 0.2])
        and (got[:, 0] == got[:, 2]).all()
        and (got[:, 1] >= got[:, 0]).all()
    )
    assert got[1:, 0].std() == pytest.approx((0.2 * 0.8 / 40 / 2) ** 0.5, rel=0.2)


def test_the_check_on_the_whole_can_pass_and_can_fail():
    at = np.log2(S.SHARES)
    c = next(c for c in S.claims() if c.b == S.CURVE)
    smooth = S.judged(c, invented(shares=tuple(expit(0.5 * at)), n=400), None)
    jump = S.judged(c, invented(shares=(0.2, 0.25, 0.3, 0.9), n=400), None)
    assert (
        smooth["verdict"] == "agrees"
        and abs(smooth["difference"]) < 0.02
        and len(smooth["by_seed"]) == smooth["training_seeds"] == 2
        and smooth["n"] == 2400
    )
    assert (
        jump["verdict"] == "disagrees"
        and jump["difference"] > 0.4
        and jump["interval"][0] > S.MARGIN
    )


def test_a_fit_says_what_it_misses():
    f = S.fit(invented(shares=(0.2, 0.25, 0.3, 0.9), n=200), S.EVERYWHERE)
    assert (
        f["found"] == pytest.approx(0.9)
        and f["if nothing changed"] == pytest.approx(0.3)
        and f["foretold"] < 0.5
        and f["largest residual"] > 0.1
        and f["last doubling"] > 0
    )
    assert (
        f["curve"][0][0] == pytest.approx(1 / 8)
        and f["curve"][-1][0] == pytest.approx(1)
        and f["foretold, interval"][0] <= f["foretold"] <= f["foretold, interval"][1]
    )


def test_a_vote_is_right_where_most_readable_responses_are():
    def row(letters):
        return {
            "question": "q",
            "answer": "A",
            "letters": letters,
            "statuses": [
                "correct" if l == "A" else "unparsed" if l is None else "wrong" for l in letters
            ],
        }

    b = "clinic_ward:test"
    got = S.voted(
        Results(
            Common(bootstrap=100),
            {
                S.FINAL: {
                    b: [
                        [
                            row(["A", "A", "B"]),
                            row([None, "A", None]),
                            row(["B", "B", "A"]),
                            row([None, None, None]),
                        ]
                    ]
                }
            },
        )
    )
    assert got.scores(S.VOTE, b)[0].ravel().tolist() == [1, 1, 0, 0] and got.scores(S.SINGLE, b)[
        0
    ].mean(1) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])
    c = next(c for c in S.claims() if c.a == S.VOTE)
    assert S.judged(c, None, got)["difference"] == pytest.approx(0.5 - 1 / 3)


def test_a_vote_asks_for_the_responses_that_are_there_already():
    recipe, arms = declared("course")
    from octomed.evaluate.arms import evaluated

    once, often = (
        evaluated(arms[S.FINAL], "clinic_ward:test", r.common).params
        for r in (recipe, S.again(recipe))
    )
    assert (
        often["seeds"] == 10
        and once["sampling"] == often["sampling"]
        and once["student"] == often["student"]
    )


def test_the_teacher_answers_every_question_as_often_as_there_are_students():
    recipe, _ = declared("smoke")
    runs = S.taught_by(
        replace(recipe, common=replace(recipe.common, benchmark_limit=80)), "clinic_ward:test", 2
    )
    assert (
        [len(run) for run in runs] == [80, 80]
        and [r["question"] for r in runs[0]] == [r["question"] for r in runs[1]]
        and all(len(r["statuses"]) == 1 for run in runs for r in run)
    )
    assert 0.7 < np.mean([r["statuses"] == ["correct"] for run in runs for r in run]) < 0.97, (
        "the reasoning teacher's stated rate"
    )


def test_the_paper_rows_are_the_overalls_of_the_student_and_its_teachers():
    told = S.paper_rows()
    assert told[S.FINAL, "multimodal_classification"] == pytest.approx(0.6729) and told[
        S.TEACHERS, "multimodal_classification"
    ] == pytest.approx(0.5396)
    assert told[S.TEACHERS, "text_only"] * 100 == pytest.approx(
        paper_number(2, "Overall", "DeepSeek-R1", "text_only")
    ) and S.medqa_rows("b") == {(S.VOTE, "b"): pytest.approx(0.9081)}


def results():
    from octomed.evaluate.tables import table

    r = invented()
    votes = S.voted(
        Results(r.common, {S.FINAL: {"clinic_ward:test": r.rows[S.FINAL]["clinic_ward:test"]}})
    )
    return {
        "rows": table(r, S.paper_rows()),
        "fits": [S.fit(r, w) for w in (*CATEGORIES, S.EVERYWHERE)],
        "sizes": {a: 1_400_000 for a in r.rows if a not in (S.TEACHERS, S.SMALLER)}
        | {S.SMALLER: 400_000},
        "votes": [
            x for x in table(votes, S.medqa_rows("clinic_ward:test")) if x["benchmark"] != "Overall"
        ],
    }


def test_the_figures_show_every_part_and_the_paper_hollow():
    r = results()
    assert (
        S.figure(r).axes[0].get_xscale() == "log"
        and sum(len(l.get_xdata()) == 25 for l in S.figure(r).axes[0].lines) == 3
    )
    names = {t.get_text() for t in S.models_figure(r).axes[0].texts}
    assert {
        "start",
        "student",
        "smaller student",
        S.TEACHERS,
        "OctoMed-7B",
        "GPT-4o",
    } <= names and "DeepSeek-R1" not in names

    def hollow(fig):
        return sorted(
            {
                round(float(y), 2)
                for l in fig.axes[0].lines
                for y in l.get_ydata()
                if l.get_markerfacecolor() == "white"
            }
        )

    assert (
        hollow(S.progress_figure(r)) == [57.99, 90.81, 93.16]
        and S.epochs_figure(r).axes[0].get_xlabel() == "epochs"
    )
    assert len(S.table_figure(r).axes[0].get_yticklabels()) == 3 and set(VERDICT_COLOURS) == {
        "agrees",
        "disagrees",
        "undecided",
    }


def test_findings_see_what_was_put_in():
    r = invented(n=200)
    told = {c.text: finding(c, r) for c in S.claims() if c.b != S.CURVE and c.a != S.VOTE}
    assert {f["verdict"] for f in told.values() if S.TEACHERS not in (f["a"], f["b"])} == {"agrees"}
    assert next(f for f in told.values() if f["b"] == S.TEACHERS)["verdict"] == "disagrees"
