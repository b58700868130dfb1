"Length against difficulty and error, the teacher of one length, cut thoughts, 42's students."

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from octomed.core.recipe import load_recipe
from octomed.evaluate.arms import declare_evaluation, declare_stages
from octomed.evaluate.results import Results, declare_evaluations, give_seeds
from octomed.generate.engines import find_teacher_revision
from octomed.generate.samples import Request, Sampling
from octomed.paper import calibration, formatting


def column(*x):
    return np.array(x, float)[:, None]


ONCE = np.ones((1, 4))


@pytest.mark.parametrize("recipe", ("smoke", "course"))
def test_the_first_student_is_the_one_that_42_trains(recipe):
    r = load_recipe(recipe)
    n = r.scalars("52_calibration")["seeds"]
    assert n <= r.scalars("42_formatting")["seeds"]
    mine, theirs = calibration.arms(r)[calibration.ROUTED], formatting.declare_students(r)["cot"]

    def evaluation_keys(arm):
        by_benchmark = declare_evaluations({"a": arm}, r, n)["a"]
        return {b: [stage.key for stage in made] for b, made in by_benchmark.items()}

    def stage_keys(arm):
        return {stage.key for stage in declare_stages(arm, r.common).values()}

    assert evaluation_keys(mine) == evaluation_keys(theirs)
    assert stage_keys(mine) == stage_keys(theirs)


def test_the_other_students_differ_in_their_teacher_alone():
    r = load_recipe("smoke")
    first, *others = calibration.arms(r).values()
    for arm in others:
        assert replace(arm, teacher=first.teacher, points=first.points) == first
        assert arm.teacher != first.teacher
        other, own = declare_stages(arm, r.common), declare_stages(first, r.common)
        assert other["data"].key == own["data"].key
        assert other["student"].key != own["student"].key


def test_a_repeated_reading_asks_the_same_student_under_the_same_sampling():
    r = load_recipe("course")
    arm = give_seeds(calibration.arms(r)[calibration.ROUTED], 1, r.common)[0]
    one, more = (
        declare_evaluation(arm, calibration.WARD, x.common).params
        for x in (r, calibration.ask_again(r))
    )
    assert more["seeds"] == r.scalars("52_calibration")["responses"] > one["seeds"]
    assert not more["likelihood"]
    assert one["student"].key == more["student"].key
    assert one["sampling"] == more["sampling"]
    assert one["limit"] == more["limit"]


def words_of_thought(text):
    return len(text.partition("</think>")[0].split())


def test_the_teacher_of_one_length_says_the_same_at_one_length():
    from octomed.clinic.questions import load_questions
    from octomed.clinic.teachers import INSTRUCT, SimulatedTeacher, read_facts
    from octomed.generate.answers import judge

    qs = load_questions("clinic_ward", "train", limit=40)
    asked = [Request(q.id, [], "", (0, 1)) for q in qs]
    plain, full = (
        list(t.generate(asked, Sampling(max_tokens=128)))
        for t in (SimulatedTeacher(INSTRUCT), calibration.OneLength())
    )
    by_id = {q.id: q for q in qs}
    for a, b in zip(plain, full, strict=True):
        q = by_id[a.question]
        before, after = (
            judge(sample.text, q.letters, q.answer, think_first=True) for sample in (a, b)
        )
        assert before == after
        assert read_facts(a.text) == read_facts(b.text)
        assert (a.seed, a.finish) == (b.seed, b.finish)
        assert b.tokens == len(b.text.split())
        assert b.model != a.model
    ended = [
        (words_of_thought(a.text), words_of_thought(b.text))
        for a, b in zip(plain, full, strict=True)
        if "</think>" in a.text
    ]
    short, long = np.array(ended, float).T
    assert (long >= calibration.LENGTH).all()
    assert long.max() < calibration.LENGTH + 8
    assert long.std() < short.std() / 3
    again = calibration.OneLength().generate(asked, Sampling(max_tokens=128))
    assert [sample.text for sample in again] == [sample.text for sample in full]


def test_what_ends_without_a_thought_is_not_filled():
    for text in ("i cannot help with this.", "<think>a. b"):
        assert calibration.fill_thought(text, 60, 0) == text
    long = "<think>" + "word " * 70 + "end.</think>\n\n<answer>A</answer>"
    assert calibration.fill_thought(long, 60, 0) == long


def test_filling_uses_only_words_that_the_student_reads():
    import re

    from octomed.clinic.textbook import list_vocabulary
    from octomed.clinic.world import load_knowledge

    speech = load_knowledge()["speech"]
    words = re.findall(r"[A-Za-z]+", " ".join(speech["doubt"] + speech["confirm"]))
    assert set(words) <= set(list_vocabulary())


def test_the_teacher_is_registered_with_what_it_rests_on():
    revision = find_teacher_revision(calibration.OneLength.label)
    assert revision == calibration.OneLength().model
    assert revision != calibration.OneLength(61).model


def test_concordance_by_hand():
    length, harder = column(10, 20, 20, 40), column(1, 1, 2, 3)
    # pairs that differ in difficulty: (1,3)+ (1,4)+ (2,3)= (2,4)+ (3,4)+ → 4 of 5
    assert calibration.concordance(ONCE, length, harder)[0] == pytest.approx(0.8)
    assert calibration.concordance(ONCE, -length, harder)[0] == pytest.approx(-0.8)
    assert calibration.concordance(ONCE, length, column(1, 1, 1, 1))[0] == 0
    # (1,3) and (2,4) alone
    assert calibration.concordance(ONCE, length, harder, same=column(0, 1, 0, 1))[0] == 1
    # seeds are never paired with each other
    two, twice = np.concatenate([length, -length], 1), np.concatenate([harder, harder], 1)
    assert calibration.concordance(ONCE, two, twice)[0] == 0


def test_a_resample_counts_a_question_as_often_as_it_was_drawn():
    rng = np.random.default_rng(0)
    length = rng.integers(5, 60, (12, 1)).astype(float)
    harder = rng.integers(1, 5, (12, 1)).astype(float)
    w = rng.multinomial(12, [1 / 12] * 12, size=5).astype(float)
    for k in range(5):
        drawn = np.repeat(np.arange(12), w[k].astype(int))
        by_hand = calibration.concordance(np.ones((1, 12)), length[drawn], harder[drawn])[0]
        assert calibration.concordance(w, length, harder)[k] == pytest.approx(by_hand)


def test_risk_and_what_a_signal_saves_by_hand():
    coverage, risk = calibration.compute_risk(
        ONCE, np.array([4.0, 1, 2, 3]), np.array([1.0, 0, 0, 1])
    )
    assert coverage.tolist() == [[0.25, 0.5, 0.75, 1]]
    assert risk[0] == pytest.approx([0, 0, 1 / 3, 0.5])
    saved = calibration.measure_saving(ONCE, column(4, 1, 2, 3), column(1, 0, 0, 1))[0]
    assert saved == pytest.approx(0.5 - (0 + 0 + 1 / 3 + 0.5) / 4)
    assert calibration.measure_saving(ONCE, column(1, 4, 3, 2), column(1, 0, 0, 1))[0] < 0


def made(longer: float, seeds: int = 2, n: int = 60, flat: bool = False):
    "Results of students whose wrong answers are `longer` tokens longer."
    rng, r = np.random.default_rng(1), load_recipe("smoke")

    def run(b, runs):
        rows = []
        for i in range(n):
            steps = i % 3 + 1
            wrong = [bool(rng.random() < 0.2 * steps) for _ in range(runs)]
            base = 40 if flat else {calibration.READING: 10, calibration.SCANNER: 10}.get(b, 30)
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
    arms = (calibration.ROUTED, calibration.ONE_TEACHER, calibration.ONE_LENGTH)
    benchmarks = (*calibration.IN, *calibration.OUT)
    by_arm = {arm: {b: [run(b, 1) for _ in range(seeds)] for b in benchmarks} for arm in arms}
    results = Results(common, by_arm)
    if flat:
        return results
    level = made(0, seeds, n, flat=True)
    results.rows[calibration.ONE_LENGTH] = level.rows[calibration.ONE_LENGTH]

    def three_times(run):
        lists = ("statuses", "letters", "tokens")
        return [{**row, **{name: row[name] * 3 for name in lists}} for row in run]

    routed = results.rows[calibration.ROUTED]
    repeated = {b: [three_times(run) for run in routed[b]] for b in calibration.IN}
    return results, Results(common, {calibration.ROUTED: repeated})


HELD = ("agrees", "holds")  # the paper's claims, and ours


def test_findings_see_what_was_put_in():
    results, repeated = made(longer=10)
    measured = calibration.collect_cells(results, repeated)
    findings = [
        calibration.state_finding(claim, results, measured) for claim in calibration.claims()
    ]
    by_measure = {finding["measure"]: finding for finding in findings}
    for measure in ("error at equal steps", "escalation"):
        assert by_measure[measure]["outcome"] in HELD, measure
    gaps = [f for f in findings if f["measure"] == "gap"]
    assert [gaps[place]["outcome"] for place in (0, 2, 3)] == ["agrees"] * 3
    assert gaps[3]["kind"] == "equivalent"
    assert abs(gaps[3]["difference"]) < 0.05
    assert gaps[0]["difference"] > 0.3
    for f in findings:
        assert f["interval"][0] <= f["interval"][1]
        assert len(f["by_seed"]) == f["training_seeds"] == 2


def test_findings_see_nothing_where_nothing_is():
    results, repeated = made(longer=0)
    measured = calibration.collect_cells(results, repeated)
    for claim in calibration.claims():
        if claim.measure == "error at equal steps":
            assert abs(calibration.state_finding(claim, results, measured)["difference"]) < 0.2


def test_a_chance_student_has_no_lengths():
    results, repeated = made(longer=10)
    blind = replace(calibration.arms(load_recipe("smoke"))[calibration.ROUTED], blind=True)
    ward = {calibration.WARD: results.rows[calibration.ROUTED][calibration.WARD]}
    with_chance = Results(results.common, {**results.rows, "chance": ward}, {"chance": blind})
    cells = calibration.collect_cells(with_chance, repeated)
    assert cells.keys() == calibration.collect_cells(results, repeated).keys()
    assert (
        calibration.chance(load_recipe("smoke")).items()
        <= formatting.chance(load_recipe("smoke")).items()
    )


def thought(sentences: int, belief: tuple[float, ...]) -> dict:
    "A row of `measure_faithfulness`: how likely the final answer A is after each share."
    shares = (0, 0.5, 1)
    cut = [
        {"share": share, "letter": "A", "logprobs": [float(np.log(p)), float(np.log(1 - p))]}
        for share, p in zip(shares, belief, strict=True)
    ]
    return {"answer": "A", "sentences": sentences, "whole": cut[-1], "cut": cut, "false": None}


def test_belief_is_tabulated_by_the_length_of_the_thought():
    short = [thought(2, (0.8, 0.9, 0.9))] * 3
    long = [thought(6, (0.5, 0.6, 0.9)), thought(7, (0.5, 0.8, 0.9))]
    rows = [*long, *short, thought(0, (0.5, 0.5, 0.6))]
    assert list(calibration.group_by_length(rows)) == ["2 sentences", "6 to 7 sentences"]
    assert calibration.group_by_length(short) == {"2 sentences": short}
    table = calibration.tabulate_belief(rows, n=50, seed=0)
    by_place = {(row["thought"], row["kept"]): row for row in table}
    assert by_place["2 sentences", 0]["belief"] == pytest.approx(0.8)
    assert by_place["6 to 7 sentences", 0.5]["belief"] == pytest.approx(0.7)
    assert {row["chance"] for row in table} == {0.5}
    assert sum(row["n"] for row in table if row["kept"] == 0) == 5
    (ax,) = calibration.belief_figure(table).axes
    curves = [list(line.get_ydata()) for line in ax.lines if line.get_marker() == "o"]
    assert curves[0] == pytest.approx([80, 90, 90])
    assert len(curves) == 2
    three = [thought(n, (0.5, 0.6, 0.9)) for n in (1, 1, 2, 2, 3, 3)]
    assert [len(group) for group in calibration.group_by_length(three).values()] == [2, 2, 2]
    empty = calibration.tabulate_belief([thought(0, (0.5, 0.5, 0.6))], n=50, seed=0)
    assert empty == []
    assert calibration.belief_figure(empty) is None


def test_a_finding_is_the_same_twice_and_a_flat_student_gives_numbers():
    results, repeated = made(longer=10)
    measured = calibration.collect_cells(results, repeated)

    def intervals():
        return [
            calibration.state_finding(c, results, measured)["interval"]
            for c in calibration.claims()
        ]

    assert intervals() == intervals()
    for by_benchmark in results.rows.values():
        for row in chain.from_iterable(chain(*by_benchmark.values())):
            row["statuses"] = ["wrong"]
    error = next(c for c in calibration.claims() if c.measure == "error at equal steps")
    f = calibration.state_finding(error, results, calibration.collect_cells(results, repeated))
    assert f["difference"] == 0
    assert f["outcome"] == "undecided"


def test_the_figures_show_every_arm_and_signal():
    results, repeated = made(longer=10)
    seen = calibration.collect_cells(results, repeated)
    fig = calibration.figure({"lengths": calibration.average_lengths(seen, 100, 0)})
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    arms = {calibration.ROUTED, calibration.ONE_TEACHER, calibration.ONE_LENGTH}
    assert set(labels[:3]) == arms
    curves = calibration.compute_curves(seen)
    best, chance = dict(curves["the errors (best)"]), dict(curves["at random"])
    assert all(best[share] <= chance[share] + 1e-9 for share in chance)
    for points in curves.values():
        assert points[-1][1] == pytest.approx(chance[1.0])
    figure = calibration.coverage_figure({"coverage": curves})
    assert figure.axes[0].get_ylabel() == "errors among them, %"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == list(curves)


def test_claims_name_arms_and_benchmarks_of_the_recipe():
    r = load_recipe("course")
    for claim in calibration.claims():
        assert {claim.a, claim.b} <= set(calibration.arms(r))
        assert set(claim.where) <= set(r.common.benchmarks)
        assert claim.kind != "equivalent" or claim.margin
    assert [bool(claim.paper) for claim in calibration.claims()] == [True] * 4 + [False] * 4
