"Length against difficulty and error, the teacher of one length, and students that are 42's."

from dataclasses import replace

import numpy as np
import pytest

from octomed.core.recipe import load_recipe
from octomed.evaluate.arms import Results, evaluated, evaluations, seeded, stages
from octomed.evaluate.stats import verdict
from octomed.generate.engines import Request, Sampling, teacher_revision
from octomed.paper import calibration as c
from octomed.paper import formatting


def column(*x):
    return np.array(x, float)[:, None]


ONCE = np.ones((1, 4))


@pytest.mark.parametrize("recipe", ("smoke", "course"))
def test_the_first_student_is_the_one_that_42_trains(recipe):
    r = load_recipe(recipe)
    n = r.of("52_calibration")["seeds"]
    assert n <= r.of("42_formatting")["seeds"]
    mine, theirs = (
        evaluations({"a": arm}, r, n)["a"]
        for arm in (c.arms(r)[c.ROUTED], formatting.arms(r)["cot"])
    )
    assert {b: [e.key for e in es] for b, es in mine.items()} == {
        b: [e.key for e in es] for b, es in theirs.items()
    }
    assert {s.key for s in stages(c.arms(r)[c.ROUTED], r.common).values()} == {
        s.key for s in stages(formatting.arms(r)["cot"], r.common).values()
    }


def test_the_other_students_differ_in_their_teacher_alone():
    r = load_recipe("smoke")
    first, *others = c.arms(r).values()
    for arm in others:
        assert replace(arm, teacher=first.teacher) == first and arm.teacher != first.teacher
        assert (
            stages(arm, r.common)["data"].key == stages(first, r.common)["data"].key
            and stages(arm, r.common)["student"].key != stages(first, r.common)["student"].key
        )


def test_a_repeated_reading_asks_the_same_student_under_the_same_sampling():
    r = load_recipe("course")
    arm = seeded(c.arms(r)[c.ROUTED], 1, r.common)[0]
    one, more = (evaluated(arm, c.WARD, x.common).params for x in (r, c.again(r)))
    assert more["seeds"] == r.of("52_calibration")["samples"] > one["seeds"]
    assert (
        one["student"].key == more["student"].key
        and one["sampling"] == more["sampling"]
        and one["limit"] == more["limit"]
    )


def test_the_teacher_of_one_length_says_the_same_at_one_length():
    from octomed.clinic.questions import questions
    from octomed.clinic.teachers import INSTRUCT, SimulatedTeacher, stated
    from octomed.generate.answers import judge

    qs = questions("clinic_ward", "train", limit=40)
    asked = [Request(q.id, [], "", (0, 1)) for q in qs]
    plain, full = (
        list(t.generate(asked, Sampling(max_tokens=128)))
        for t in (SimulatedTeacher(INSTRUCT), c.OneLength())
    )
    by_id = {q.id: q for q in qs}
    for a, b in zip(plain, full, strict=False):
        q = by_id[a.question]
        assert (
            judge(a.text, q.letters, q.answer, True) == judge(b.text, q.letters, q.answer, True)
            and stated(a.text) == stated(b.text)
            and a.seed == b.seed
            and a.finish == b.finish
        )
        assert b.tokens == len(b.text.split()) and b.model != a.model
    ended = [
        (len(a.text.partition("</think>")[0].split()), len(b.text.partition("</think>")[0].split()))
        for a, b in zip(plain, full, strict=False)
        if "</think>" in a.text
    ]
    short, long = np.array(ended, float).T
    assert (long >= c.LENGTH).all() and long.max() < c.LENGTH + 8 and long.std() < short.std() / 3
    assert [s.text for s in c.OneLength().generate(asked, Sampling(max_tokens=128))] == [
        s.text for s in full
    ]


def test_what_ends_without_a_thought_is_not_filled():
    assert (
        c.filled("i cannot help with this.", 60, 0) == "i cannot help with this."
        and c.filled("<think>a. b", 60, 0) == "<think>a. b"
    )
    long = "<think>" + "word " * 70 + "end.</think>\n\n<answer>A</answer>"
    assert c.filled(long, 60, 0) == long


def test_filling_uses_only_words_that_the_student_reads():
    import re

    from octomed.clinic.textbook import vocabulary
    from octomed.clinic.world import knowledge

    assert {
        w
        for s in knowledge()["speech"]["doubt"] + knowledge()["speech"]["confirm"]
        for w in re.findall(r"[A-Za-z]+", s)
    } <= set(vocabulary())


def test_the_teacher_is_registered_with_what_it_rests_on():
    assert teacher_revision(c.OneLength.label) == c.OneLength().model != c.OneLength(61).model


def test_concordance_by_hand():
    length, harder = column(10, 20, 20, 40), column(1, 1, 2, 3)
    # pairs that differ in difficulty: (1,3)+ (1,4)+ (2,3)= (2,4)+ (3,4)+ → 4 of 5
    assert c.concordance(ONCE, length, harder)[0] == pytest.approx(0.8) and c.concordance(
        ONCE, -length, harder
    )[0] == pytest.approx(-0.8)
    assert c.concordance(ONCE, length, column(1, 1, 1, 1))[0] == 0
    assert (
        c.concordance(ONCE, length, harder, same=column(0, 1, 0, 1))[0] == 1
    )  # (1,3) and (2,4) alone
    two = np.concatenate([length, -length], 1)
    assert (
        c.concordance(ONCE, two, np.concatenate([harder, harder], 1))[0] == 0
    )  # seeds are never paired with each other


def test_a_resample_counts_a_question_as_often_as_it_was_drawn():
    rng = np.random.default_rng(0)
    length, harder, w = (
        rng.integers(5, 60, (12, 1)).astype(float),
        rng.integers(1, 5, (12, 1)).astype(float),
        rng.multinomial(12, [1 / 12] * 12, size=5).astype(float),
    )
    for k in range(5):
        drawn = np.repeat(np.arange(12), w[k].astype(int))
        assert c.concordance(w, length, harder)[k] == pytest.approx(
            c.concordance(np.ones((1, 12)), length[drawn], harder[drawn])[0]
        )


def test_risk_and_what_a_signal_saves_by_hand():
    coverage, risk = c.risk(ONCE, np.array([4.0, 1, 2, 3]), np.array([1.0, 0, 0, 1]))
    assert coverage.tolist() == [[0.25, 0.5, 0.75, 1]] and risk[0] == pytest.approx(
        [0, 0, 1 / 3, 0.5]
    )
    assert c.saved(ONCE, column(4, 1, 2, 3), column(1, 0, 0, 1))[0] == pytest.approx(
        0.5 - (0 + 0 + 1 / 3 + 0.5) / 4
    )
    assert c.saved(ONCE, column(1, 4, 3, 2), column(1, 0, 0, 1))[0] < 0


def test_places_are_within_a_benchmark():
    assert (
        c.placed(column(30, 10, 20)).ravel().tolist() == [1, 0, 0.5]
        and c.placed(column(5, 5, 5)).ravel().tolist() == [0.5] * 3
        and c.placed(column(7)).tolist() == [[0]]
    )


def made(longer: float, seeds: int = 2, n: int = 60, flat: bool = False):
    "Results of students whose wrong answers are `longer` tokens longer."
    rng, r = np.random.default_rng(1), load_recipe("smoke")

    def run(b, runs):
        rows = []
        for i in range(n):
            steps = i % 3 + 1
            wrong = [bool(rng.random() < 0.2 * steps) for _ in range(runs)]
            base = 40 if flat else {c.READING: 10, c.SCANNER: 10}.get(b, 30)
            rows.append(
                {
                    "question": f"{b}{i}",
                    "statuses": ["wrong" if x else "correct" for x in wrong],
                    "letters": ["B" if x else "A" for x in wrong],
                    "tags": {"steps": steps},
                    "options": 4,
                    "finishes": ["stop"] * runs,
                    "forced": [False] * runs,
                    "tokens": [base + rng.integers(3) + longer * x for x in wrong],
                }
            )
        return rows

    common = replace(r.common, bootstrap=300)
    results = Results(
        common,
        {
            arm: {b: [run(b, 1) for _ in range(seeds)] for b in (*c.IN, *c.OUT)}
            for arm in (c.ROUTED, c.ONE_TEACHER, c.ONE_LENGTH)
        },
    )
    if flat:
        return results
    results.rows[c.ONE_LENGTH] = made(0, seeds, n, True).rows[c.ONE_LENGTH]
    return results, Results(
        common,
        {
            c.ROUTED: {
                b: [
                    [
                        {
                            **x,
                            "statuses": x["statuses"] * 3,
                            "letters": x["letters"] * 3,
                            "tokens": x["tokens"] * 3,
                        }
                        for x in run
                    ]
                    for run in results.rows[c.ROUTED][b]
                ]
                for b in c.IN
            }
        },
    )


def test_findings_see_what_was_put_in():
    results, repeated = made(longer=10)
    found = {
        f["text"]: f for f in (c.judged(x, results, c.cells(results, repeated)) for x in c.claims())
    }
    told = {
        f["measure"]: f["verdict"]
        for f in found.values()
        if f["a"] == c.ROUTED and f["measure"] != "gap"
    }
    assert (
        told["error"]
        == told["error at equal steps"]
        == told["pass count"]
        == told["escalation"]
        == told["escalation within a benchmark"]
        == "agrees"
    )
    gaps = [f for f in found.values() if f["measure"] == "gap"]
    assert (
        gaps[0]["verdict"] == gaps[3]["verdict"] == gaps[4]["verdict"] == "agrees"
        and gaps[4]["kind"] == "equivalent"
        and abs(gaps[4]["difference"]) < 0.05 < 0.3 < gaps[0]["difference"]
    )
    for f in found.values():
        assert (
            f["interval"][0] <= f["interval"][1]
            and len(f["by_seed"]) == f["training_seeds"] == 2
            and f["verdict"] == verdict(f["kind"], f["interval"], f["margin"])
        )


def test_findings_see_nothing_where_nothing_is():
    results, repeated = made(longer=0)
    for x in c.claims():
        if x.measure in ("error", "escalation within a benchmark"):
            assert abs(c.judged(x, results, c.cells(results, repeated))["difference"]) < 0.2


def test_a_finding_is_the_same_twice_and_a_flat_student_gives_numbers():
    results, repeated = made(longer=10)
    seen = c.cells(results, repeated)
    assert [c.judged(x, results, seen)["interval"] for x in c.claims()] == [
        c.judged(x, results, seen)["interval"] for x in c.claims()
    ]
    for rows in (run for per in results.rows.values() for runs in per.values() for run in runs):
        for r in rows:
            r["statuses"] = ["wrong"]
    f = next(
        c.judged(x, results, c.cells(results, repeated)) for x in c.claims() if x.measure == "error"
    )
    assert f["difference"] == 0 and f["verdict"] == "undecided"


def test_the_figures_show_every_arm_and_signal():
    results, repeated = made(longer=10)
    seen = c.cells(results, repeated)
    fig = c.figure({"lengths": c.mean_lengths(seen, 100, 0)})
    assert {fig.axes[0].get_legend().get_texts()[k].get_text() for k in range(3)} == {
        c.ROUTED,
        c.ONE_TEACHER,
        c.ONE_LENGTH,
    }
    told = c.curves(seen)
    best, lot = dict(told["the errors (best)"]), dict(told["by lot"])
    assert all(best[x] <= lot[x] + 1e-9 for x in lot) and all(
        s[-1][1] == pytest.approx(lot[1.0]) for s in told.values()
    )
    assert c.coverage_figure({"coverage": told}).axes[0].get_ylabel() == "errors among them, %"


def test_claims_name_arms_and_benchmarks_of_the_recipe():
    r = load_recipe("course")
    for x in c.claims():
        assert (
            {x.a, x.b} <= set(c.arms(r))
            and set(x.where) <= set(r.common.benchmarks)
            and (x.kind != "equivalent" or x.margin)
        )
