"Rejection sampling: what is kept, what is counted, and what happens when nothing is."

import json
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import ToyEngine, register_toy_source

from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.distill.cost import Budget, compute_price, load_prices, read_budget
from octomed.distill.filters import FILTERS, filtered, measure, rank_values, rated
from octomed.distill.pools import questions, read_questions, take_subset
from octomed.distill.rejection import accept, accepted, judge_samples, write_in_box
from octomed.distill.sampling import read_samples, samples
from octomed.distill.statistics import (
    add_up_cost,
    count_duplicates,
    find_failed_by_all,
    measure_distinct,
    summarise_samples,
)
from octomed.generate.answers import Verdict
from octomed.generate.engines import register_teacher
from octomed.generate.samples import Sample, Sampling

QUESTIONS = [
    Question(
        stem=f"which is it, {n}?",
        options=("yes", "no", "perhaps"),
        answer="B",
        source="toy",
        split="train",
        category="text_only",
    )
    for n in range(4)
]
register_toy_source("toy", "train", "train", QUESTIONS)


class Toy(ToyEngine):
    "Right on every second sample, never on the first question; refuses one, is cut off in another."

    def answer(self, request, index):
        if index == 2:
            return "i cannot answer this", "refused", 7
        if index == 4:
            return "<think>it goes on", "length", 7
        letter = "B" if index % 2 and request.question != QUESTIONS[0].id else "A"
        return f"<think>sample {index}</think>\n\n<answer>{letter}</answer>", "stop", 7


class Hopeless(ToyEngine):
    model = "hopeless@1"

    def answer(self, request, index):
        return "<answer>C</answer>", "stop", 7


class Stubborn(ToyEngine):
    model = "stubborn@1"

    def answer(self, request, index):
        return "<think>A</think><answer>A</answer>", "stop", 7


register_teacher("toy/stubborn", Stubborn, "1")
register_teacher("toy/teacher", Toy, "1")
register_teacher("toy/hopeless", Hopeless, "1")


def declare(teacher="toy/teacher", n=16, k=4, keep="correct", answer="letter"):
    data = questions(sources=(("toy:train", None, "1"),), against=(), seed=0, max_pixels=12_544)
    drawn = samples(
        questions=data,
        teachers={"text": (teacher, "1", "r1")},
        n=n,
        sampling=Sampling(),
        max_pixels=12_544,
    )
    return data, drawn, accepted(questions=data, samples=drawn, k=k, answer=answer, keep=keep)


def test_fault_15_a_question_with_none_of_16_accepted_is_counted_and_left_out():
    _, _drawn, kept = declare()
    rows = read_jsonl(run_stage(kept) / "traces.jsonl")
    funnel = json.loads((run_stage(kept) / "funnel.json").read_text())
    assert funnel["questions_without"] == 1
    assert QUESTIONS[0].id not in {r["question"] for r in rows}
    assert funnel["pass_count"] == {"0": 1, "8": 3}
    assert len(rows) == 3 * 4


def test_fault_15_no_trace_at_all_is_an_error_and_leaves_no_artifact():
    *_, kept = declare("toy/hopeless")
    with pytest.raises(OctomedError, match="no sample was accepted"):
        run_stage(kept)
    assert not kept.folder.exists()


def test_the_funnel_conserves_samples_and_keeps_every_outcome():
    _, drawn, kept = declare()
    funnel = json.loads((run_stage(kept) / "funnel.json").read_text())
    assert funnel["samples"] == 4 * 16 == sum(funnel["outcomes"].values())
    assert funnel["outcomes"] == {"correct": 24, "wrong": 32, "refused": 4, "truncated": 4}
    assert funnel["kept"] + funnel["over_k"] == funnel["outcomes"]["correct"]
    assert all(len(ss) == 16 for ss in read_samples(run_stage(drawn)).values())


def test_accepted_sets_are_nested_in_k_and_a_later_run_tops_up():
    few = read_jsonl(run_stage(declare(n=8, k=2)[2]) / "traces.jsonl")
    many = read_jsonl(run_stage(declare(n=16, k=4)[2]) / "traces.jsonl")

    def index(rows, q):
        return [r["index"] for r in rows if r["question"] == q]

    for q in QUESTIONS[1:]:
        assert index(few, q.id) == [1, 3]
        assert index(many, q.id) == [1, 3, 5, 7]


def test_the_box_holds_the_letter_or_the_text():
    assert (write_in_box(QUESTIONS[0], "letter"), write_in_box(QUESTIONS[0], "text")) == ("B", "no")
    with pytest.raises(OctomedError, match="choose letter or text"):
        write_in_box(QUESTIONS[0], "colour")


def test_subsets_are_nested_and_do_not_depend_on_the_order_of_rows():
    assert take_subset(QUESTIONS, 2) == take_subset(QUESTIONS[::-1], 3)[:2]
    assert take_subset(QUESTIONS, None, seed=1) != take_subset(QUESTIONS, None, seed=2)
    assert (
        take_subset(QUESTIONS, 3) + take_subset(QUESTIONS, -1)
        == take_subset(QUESTIONS, None)
        == take_subset(QUESTIONS, 0 or None)
    )


@given(
    st.lists(st.sampled_from(["correct", "wrong", "parsed", "unparsed", "truncated"]), max_size=16),
    st.integers(1, 16),
)
def test_the_three_rules_part_the_readable_samples(statuses, k):
    vs = [Verdict(None, s) for s in statuses]
    every = {keep: accept(vs, 16, keep) for keep in ("correct", "wrong", "all")}
    assert sorted(every["correct"] + every["wrong"]) == every["all"]
    assert all(accept(vs, k, keep) == indices[:k] for keep, indices in every.items())


def test_a_rule_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="correct, all, wrong"):
        accept([], 1, "some")


def test_a_rejected_trace_ends_on_its_own_wrong_answer():
    rows = {
        keep: read_jsonl(run_stage(declare(k=1, keep=keep)[2]) / "traces.jsonl")
        for keep in ("wrong", "all", "correct")
    }
    assert {r["response"][-9:] for r in rows["wrong"]} == {r"\boxed{A}"}
    assert len(rows["wrong"]) == len(QUESTIONS)
    assert [r["index"] for r in rows["all"]] == [0] * len(QUESTIONS)
    assert {r["response"][-9:] for r in rows["correct"]} == {r"\boxed{B}"}
    assert len(rows["correct"]) == len(QUESTIONS) - 1
    assert read_jsonl(run_stage(declare(k=1, keep="wrong", answer="text")[2]) / "traces.jsonl")[0][
        "response"
    ].endswith(r"\boxed{yes}")


def test_fault_15_rejected_traces_only_counts_the_questions_that_have_none():
    funnel = json.loads((run_stage(declare(keep="wrong")[2]) / "funnel.json").read_text())
    assert funnel["questions_without"] == 0
    assert funnel["kept"] + funnel["over_k"] == funnel["outcomes"]["wrong"]


def number_of(request):
    "The place of the question that is asked."
    return [q.id for q in QUESTIONS].index(request.question)


class Half(ToyEngine):
    "Right once in two, always on question 1, never on question 0; later questions take longer."

    model = "half@1"

    def answer(self, request, index):
        n = number_of(request)
        right = n == 1 or (n > 1 and index % 2)
        wrong = "A" if index % 4 else "C"
        letter = "B" if right else wrong
        return f"<think>{'so ' * n}{index}</think><answer>{letter}</answer>", "stop", 10 * n


register_teacher("toy/half", Half, "1")


def declare_filter(name, low, high, teacher="toy/half", n=16):
    data, drawn, _ = declare(teacher, n)
    return filtered(questions=data, evidence=(drawn,), name=name, low=low, high=high)


def test_the_pass_count_filter_keeps_2_to_14_of_16_and_conserves_questions():
    f = declare_filter("teacher", *FILTERS["teacher"])
    funnel = json.loads((run_stage(f) / "funnel.json").read_text())
    assert [q.id for q in read_questions(run_stage(f))] == [
        q.id
        for q in read_questions(run_stage(f.params["questions"]))
        if q.id in {QUESTIONS[2].id, QUESTIONS[3].id}
    ]
    assert funnel == {"in": 4, "teacher below 0.125": 1, "teacher above 0.875": 1, "kept": 2}


def test_a_filter_counts_shares_so_that_fewer_samples_mean_the_same():
    assert {
        q.id for q in read_questions(run_stage(declare_filter("teacher", *FILTERS["teacher"], n=4)))
    } == {
        QUESTIONS[2].id,
        QUESTIONS[3].id,
    }


def test_length_and_dissent_need_no_known_answer():
    data, drawn, _ = declare("toy/half")
    qs = read_questions(run_stage(data))
    blind = [replace(q, answer=None) for q in qs]
    place = {QUESTIONS[n].id: n for n in range(4)}
    assert {place[q]: v for q, v in measure("length", blind, [run_stage(drawn)]).items()} == {
        0: 0,
        1: 1 / 3,
        2: 2 / 3,
        3: 1,
    }
    dissent = {place[q]: v for q, v in measure("dissent", blind, [run_stage(drawn)]).items()}
    assert dissent[1] == 0
    assert dissent[2] == dissent[3] == 0.5


def test_disagreement_between_teachers():
    data, half, _ = declare("toy/half")
    _, other, _ = declare("toy/stubborn")
    _, mute, _ = declare("toy/mute")
    qs = read_questions(run_stage(data))
    differ = measure("teachers", qs, [run_stage(half), run_stage(other)])
    assert differ[QUESTIONS[1].id] == 1.0
    assert differ[QUESTIONS[0].id] == 0.0  # B against A; A and A
    assert set(measure("teachers", qs, [run_stage(half), run_stage(mute)]).values()) == {None}


def test_a_filter_that_leaves_nothing_is_an_error_and_no_artifact():
    f = declare_filter("teacher", 0.99, 0.999)
    with pytest.raises(OctomedError, match="leaves no question"):
        run_stage(f)
    assert not f.folder.exists()
    with pytest.raises(UsageError, match="choose from student"):
        measure("taste", [], [])


def test_a_question_without_evidence_is_dropped_with_that_reason():
    f = declare_filter("dissent", 0, 1, teacher="toy/mute")
    with pytest.raises(OctomedError, match="leaves no question"):
        run_stage(f)


class Mute(ToyEngine):
    model = "mute@1"

    def answer(self, request, index):
        return "<think>well</think> who knows", "stop", 7


register_teacher("toy/mute", Mute, "1")


class Rater(ToyEngine):
    "Rates question n with 2n + 1; the last one not at all."

    model = "rater@1"

    def answer(self, request, index):
        n = number_of(request)
        return "hm" if n == 3 else f"<rating>{2 * n + 1}</rating>", "stop", 1


register_teacher("toy/rater", Rater, "1")


def test_the_difficulty_filter_keeps_3_to_6_and_says_what_was_not_rated():
    data, *_ = declare()
    f = filtered(
        questions=data,
        evidence=(rated(questions=data, grader="toy/rater", revision="1"),),
        name="difficulty",
        low=3,
        high=6,
    )
    assert {q.id for q in read_questions(run_stage(f))} == {QUESTIONS[1].id, QUESTIONS[2].id}
    assert json.loads((run_stage(f) / "funnel.json").read_text()) == {
        "in": 4,
        "difficulty below 3": 1,
        "not measured": 1,
        "kept": 2,
    }


def test_the_accepted_set_of_filtered_questions_is_part_of_the_whole():
    _data, drawn, whole = declare("toy/half", k=1)
    part = accepted(
        questions=declare_filter("teacher", *FILTERS["teacher"]),
        samples=drawn,
        k=1,
        answer="letter",
    )
    few, all_ = (
        {(r["question"], r["index"]) for r in read_jsonl(run_stage(a) / "traces.jsonl")}
        for a in (part, whole)
    )
    assert few < all_
    assert len(few) == 2


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_lie_between_0_and_1_and_keep_the_order(values):
    r = rank_values(values)
    assert all(0 <= x <= 1 for x in r.values())
    for a in values:
        for b in values:
            assert (values[a] < values[b]) == (r[a] < r[b])


def test_rewordings_stand_together_in_the_place_of_their_question():
    like = [
        replace(q, stem=f"{q.stem} in other words {n}", tags={"like": q.id})
        for q, n in product(QUESTIONS, range(3))
    ]
    for amount in (1, 2, 3):
        assert {q.tags["like"] for q in take_subset(like[::-1], 3 * amount)} == {
            q.id for q in take_subset(QUESTIONS, amount)
        }


def test_statistics_by_source_and_teacher():
    data, drawn, _ = declare("toy/half")
    qs = read_questions(run_stage(data))
    (row,) = summarise_samples(qs, judge_samples(qs, run_stage(drawn)))
    assert (row["source"], row["teacher"], row["questions"], row["samples"]) == (
        "toy",
        "half",
        4,
        64,
    )
    assert row["pass_count"] == {"0": 1, "8": 2, "16": 1}
    assert row["acceptance"] == 0.5
    assert row["duplicates"] == 0
    assert 0 < row["distinct_2"] < 1


def test_diversity_and_duplicates():
    assert measure_distinct(["a b a b"]) == 2 / 3
    assert measure_distinct([]) == 0
    assert measure_distinct(["one"]) == 0
    assert count_duplicates([]) == 0
    assert count_duplicates(["x", "x ", " x"]) == 2


def test_teacher_errors_are_counted_where_all_were_asked():
    def v(s):
        return (None, Verdict(None, s))

    one = {"q1": [v("wrong"), v("correct")], "q2": [v("wrong")], "q3": [v("wrong")]}
    other = {"q1": [v("wrong")], "q2": [v("truncated")]}
    assert find_failed_by_all([one, other]) == ["q2"]
    assert find_failed_by_all([one]) == ["q2", "q3"]
    assert find_failed_by_all([one], at_most=0.5) == ["q1", "q2", "q3"]


def test_prices_name_their_source_and_simulated_teachers_stand_for_real_ones(tmp_path):
    import yaml

    from octomed.core.paths import shipped

    table = yaml.safe_load(shipped("prices.yaml").read_text())["models"]
    assert all(
        r.get("as") in table or (r["source"].startswith("https://") and r["date"])
        for r in table.values()
    )
    assert load_prices()["clinic/reasoner"] == load_prices()["deepseek-reasoner"]
    assert compute_price("mine@3", 1, 1) is None
    (tmp_path / "p.yaml").write_text(
        "models: {mine: {input: 1, output: 2}, later: {input: null, output: null}}"
    )
    mine = load_prices(tmp_path / "p.yaml")
    assert mine == {"mine": (1e-6, 2e-6)}
    assert compute_price("mine@3", 10, 5, table=mine) == pytest.approx(2e-5)


def test_cost_per_sample_and_per_correct_trace():
    data, drawn, _ = declare("toy/half")
    (row,) = add_up_cost(read_questions(run_stage(data)), run_stage(drawn), {"half": (1e-6, 1e-5)})
    assert (row["samples"], row["correct"], row["tokens"]) == (64, 32, 16 * (0 + 10 + 20 + 30))
    assert row["money"] == pytest.approx(1e-6 * row["prompt_tokens"] + 1e-5 * row["tokens"])
    assert row["prompt_tokens"] > 64 * 10
    assert row["per_correct_trace"]["money"] == pytest.approx(2 * row["per_sample"]["money"])
    (unpriced,) = add_up_cost(read_questions(run_stage(data)), run_stage(drawn), {})
    assert unpriced["money"] is None
    assert unpriced["per_sample"]["tokens"] == row["per_sample"]["tokens"]


def test_a_budget_says_when_it_is_spent(monkeypatch):
    s = Sample(
        question="q",
        model="deepseek-reasoner@1",
        prompt="p",
        sampling="s",
        index=0,
        text="",
        finish="stop",
        tokens=1000,
        seconds=2.0,
    )
    spend = Budget(money=3.0 * compute_price("deepseek-reasoner", 100, 1000))
    assert [spend(s, 100) is None for _ in range(3)] == [True, True, False]
    assert "seconds" in Budget(seconds=1)(s)
    assert Budget(seconds=3)(s) is None
    with pytest.raises(OctomedError, match="has no price"):
        Budget(money=1)(
            Sample(
                question="q",
                model="mine",
                prompt="p",
                sampling="s",
                index=0,
                text="",
                finish="stop",
            )
        )
    monkeypatch.delenv("OCTOMED_BUDGET", raising=False)
    assert read_budget() is None
    monkeypatch.setenv("OCTOMED_BUDGET", "tokens=10, seconds=5")
    assert (read_budget().tokens, read_budget().seconds, read_budget()) == (10, 5, read_budget())
    for bad in ("5", "euros=3", "money=-1", "money=x"):
        monkeypatch.setenv("OCTOMED_BUDGET", bad)
        with pytest.raises(UsageError, match="write money=5"):
            read_budget()


def test_a_budget_stops_cleanly_and_a_later_run_goes_on(monkeypatch):
    from octomed.generate.ledger import Stopped

    drawn_now = []

    class Slow(Toy):
        model = "slow@1"

        def answer(self, request, index):
            drawn_now.append((request.question, index))
            return super().answer(request, index)

    register_teacher("toy/slow", Slow, "1")
    _, drawn, _ = declare("toy/slow")
    monkeypatch.setenv("OCTOMED_BUDGET", "tokens=70")
    with pytest.raises(Stopped, match=r"budget of 70 tokens is spent.*10 of 64 samples are kept"):
        run_stage(drawn)
    assert not drawn.folder.exists()
    assert len(drawn_now) == 10
    monkeypatch.delenv("OCTOMED_BUDGET")
    assert sum(map(len, read_samples(run_stage(drawn)).values())) == 64
    assert len(drawn_now) == len(set(drawn_now)) == 64


def test_an_open_answer_is_scored_by_a_grader_behind_the_same_score():
    from octomed.distill.rejection import judge_open_samples
    from octomed.generate.answers import score

    class Judge(ToyEngine):
        model = "judge@1"

        def answer(self, request, index):
            text = request.messages[-1]["content"][-1]["text"]
            means_it = "a fever" in text.split("<response>")[-1]
            return f"<verdict>{'yes' if means_it else 'no'}</verdict>", "stop", 1

    def s(n, text):
        return Sample(
            question=QUESTIONS[0].id,
            model="m",
            prompt="p",
            sampling="s",
            index=n,
            text=text,
            finish="stop",
        )

    judged_samples = judge_open_samples(
        [(QUESTIONS[0], "high temperature")],
        {
            QUESTIONS[0].id: [
                s(0, "<think>so</think> a fever"),
                s(1, "<think>so</think> a cough"),
                s(2, "<think>it goes on"),
            ]
        },
        Judge(),
    )
    verdicts = [v for _, v in judged_samples[QUESTIONS[0].id]]
    assert [v.status for v in verdicts] == ["correct", "wrong", "truncated"]
    assert list(map(score, verdicts)) == [1, 0, 0]
    assert accept(verdicts, 16) == [0]
