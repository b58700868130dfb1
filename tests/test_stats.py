"Intervals against closed forms, outcomes of claims, and the paper's tables."

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octomed.core.paths import OctomedError
from octomed.evaluate.stats import (
    Interval,
    average_runs,
    bootstrap,
    bootstrap_trend,
    detectable_difference,
    find_odd_overalls,
    find_paper_number,
    judge_difference,
    load_paper_table,
    needed_questions,
    paired_bootstrap,
    paired_sd,
)


def draw_scores(p, m, seeds=None, seed=0):
    return np.random.default_rng(seed).random((m, seeds) if seeds else m) < p


@pytest.mark.parametrize("p, q, m", [(0.6, 0.5, 800), (0.9, 0.85, 2000), (0.5, 0.5, 300)])
def test_fault_42_interval_against_a_closed_form(p, q, m):
    "The bounds meet the normal approximation within 5 % of the interval's width."
    a, b = draw_scores(p, m, seed=1), draw_scores(q, m, seed=2)
    d, i = a.astype(float) - b, paired_bootstrap(a, b)
    half = 1.959964 * d.std() / m**0.5
    assert i.difference == pytest.approx(d.mean(), abs=1e-12)
    assert np.abs(np.array(i.interval) - [d.mean() - half, d.mean() + half]).max() < 0.05 * 2 * half


def test_fault_42_stratified_interval_against_a_closed_form():
    "Overall of two benchmarks: its variance is the mean of theirs over two."
    a = np.r_[draw_scores(0.8, 200, seed=1), draw_scores(0.3, 1000, seed=2)]
    groups = ["x"] * 200 + ["y"] * 1000
    i, parts = bootstrap(a, groups=groups), (a[:200], a[200:])
    half = 1.959964 * sum(p.var() / len(p) for p in parts) ** 0.5 / 2
    mean = sum(p.mean() for p in parts) / 2
    assert i.estimate == pytest.approx(mean)
    assert np.abs(np.array(i.interval) - [mean - half, mean + half]).max() < 0.05 * 2 * half


def test_golden_numbers():
    a, b = np.arange(100) % 10 < 6, np.arange(100) % 4 < 2
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b, n=10_000, level=0.95, seed=0)
    i = paired_bootstrap(a, b)
    assert (i.difference, i.n) == (pytest.approx(0.10), 100)
    assert i.interval == pytest.approx((-0.04, 0.24), abs=0.011)


def test_fault_41_same_seed_same_bytes():
    a, b = draw_scores(0.6, 300, 5, seed=1), draw_scores(0.5, 300, 3, seed=2)
    first, again = paired_bootstrap(a, b, seed=9), paired_bootstrap(a.copy(), b.copy(), seed=9)
    assert (
        np.array([first.low, first.high]).tobytes() == np.array([again.low, again.high]).tobytes()
    )


def test_seeds_of_a_question_are_drawn_together():
    "Five equal seeds of each question give the interval of one; as five questions it would shrink."
    a = draw_scores(0.6, 400)
    copied = np.repeat(a[:, None], 5, axis=1)
    assert bootstrap(copied).interval == pytest.approx(bootstrap(a).interval, abs=1e-12)
    wide, narrow = bootstrap(copied), bootstrap(copied.ravel())
    assert (wide.high - wide.low) > 2 * (narrow.high - narrow.low)


def test_pairing_uses_the_agreement_of_the_arms():
    u = np.random.default_rng(0).random(500)
    paired = paired_bootstrap(u < 0.6, u < 0.55)
    shuffled = paired_bootstrap(u < 0.6, np.random.default_rng(1).permutation(u < 0.55))
    assert paired.difference == pytest.approx(shuffled.difference)
    assert (paired.high - paired.low) < 0.5 * (shuffled.high - shuffled.low)


def test_overall_ignores_the_order_and_size_of_benchmarks():
    a = np.r_[np.ones(10), np.zeros(1000)]
    assert bootstrap(a, groups=["b"] * 10 + ["a"] * 1000).estimate == 0.5
    assert bootstrap(np.ones(30), groups=["a", "b", "c"] * 10).interval == (1.0, 1.0)


def test_fault_43_a_missing_score_is_refused():
    with pytest.raises(OctomedError, match="counts as wrong"):
        bootstrap([1, 0, np.nan])
    with pytest.raises(OctomedError, match="counts as wrong"):
        paired_bootstrap([1, 0], [[1, 0], [np.inf, 0]])
    with pytest.raises(OctomedError, match="give"):
        bootstrap([])
    with pytest.raises(OctomedError, match="give"):
        bootstrap(np.ones((2, 2, 2)))
    with pytest.raises(OctomedError, match="same ones"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(OctomedError, match="one each"):
        bootstrap([1, 0], groups=["a"])


def test_coverage_is_near_its_level():
    "Of 200 intervals of a known accuracy, about 95 % hold it."
    held = sum(
        i.low <= 0.7 <= i.high
        for i in (bootstrap(draw_scores(0.7, 200, seed=s), n=1000, seed=s) for s in range(200))
    )
    assert 180 <= held <= 199


def test_time_and_memory_of_10000_resamples_of_2000_questions():
    a, b = draw_scores(0.6, 2000, 5), draw_scores(0.5, 2000, 5, seed=1)
    start = time.process_time()
    paired_bootstrap(a, b)
    assert time.process_time() - start < 2
    tracemalloc.start()
    paired_bootstrap(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


@settings(max_examples=200, deadline=None)
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.001, 1))
def test_outcomes_follow_from_the_interval(low, width, margin):
    i = Interval(estimate=low + width / 2, low=low, high=low + width, n=10)
    for kind in ("greater", "trend"):
        v = judge_difference(kind, i)
        assert (v == "agrees") == (i.low > 0)
        assert (v == "disagrees") == (i.high < 0)
    v = judge_difference("equivalent", i, margin)
    assert (v == "agrees") == (i.low > -margin and i.high < margin)
    assert (v == "disagrees") == (i.low > margin or i.high < -margin)
    assert judge_difference("greater", i) == judge_difference("greater", i.interval)


def test_a_claim_needs_a_known_kind_and_its_margin():
    with pytest.raises(OctomedError, match="choose from"):
        judge_difference("smaller", (0, 1))
    with pytest.raises(OctomedError, match="margin"):
        judge_difference("equivalent", (0, 1))


def test_trend_is_the_least_squares_slope():
    u, x = np.random.default_rng(3).random(300), [0, 1, 3]
    ys = [u < 0.4, u < 0.5, np.stack([u < 0.6, u < 0.7], axis=1)]
    i = bootstrap_trend(x, ys, n=500)
    assert i.estimate == pytest.approx(np.polyfit(x, [average_runs(y).mean() for y in ys], 1)[0])
    assert judge_difference("trend", i) == "agrees"
    with pytest.raises(OctomedError, match="two values"):
        bootstrap_trend([1, 1], ys[:2])
    with pytest.raises(OctomedError, match="same questions"):
        bootstrap_trend([1, 2], [[1, 0], [1]])


def test_detectable_difference_has_its_power():
    "Of 300 runs with the difference that n can detect, about 80 % have an interval above 0."
    n, p = 400, 0.5
    d = detectable_difference(n, paired_sd(p + 0.09, p))
    rng = np.random.default_rng(0)
    seen = sum(
        paired_bootstrap(rng.random(n) < p + d, rng.random(n) < p, n=400, seed=s).low > 0
        for s in range(300)
    )
    assert 0.72 <= seen / 300 <= 0.88
    assert needed_questions(d, paired_sd(p + 0.09, p)) == pytest.approx(n, abs=1)


def test_the_papers_tables():
    assert len(load_paper_table(1)) == 17
    assert len(load_paper_table(2)) == 17
    assert find_paper_number(2, "MedQA", "OctoMed-7B", category="text_only") == 90.81
    assert find_paper_number(2, "NEJM", "DeepSeek-R1", category="multimodal_reasoning") is None
    assert find_odd_overalls(1) == []
    assert {r["column"] for r in find_odd_overalls(2)} == {
        "DeepSeek-R1",
        "HuatuoGPT-Vision-7B",
        "InternVL3.5-8B",
        "GLM-4.1V-Thinking-9B",
    }
    with pytest.raises(OctomedError, match="choose 1 or 2"):
        load_paper_table(3)
