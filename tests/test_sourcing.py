"Question sourcing: seven combinations, their controls, what is claimed of them, and the figure."

from dataclasses import replace
from itertools import chain, combinations, product

import pytest
from declarations import PLACES, RECIPES, check_claims, declared

from octomed.core.recipe import CATEGORIES, Common
from octomed.data.sources import find_source
from octomed.evaluate.arms import declare_stages
from octomed.evaluate.claims import Claim, judge_claim
from octomed.evaluate.stats import detectable_difference, paired_sd
from octomed.paper import sourcing

CONTROLS = {sourcing.name_at_equal_tokens(a) for a in ("reasoning", "classification", sourcing.ALL)}


@RECIPES
def test_seven_combinations_hold_the_categories_of_their_names_and_equal_questions_of_each(name):
    recipe, arms = declared(sourcing, name)
    seven = {
        n: {find_source(spec).category for spec, _ in a.sources}
        for n, a in arms.items()
        if a.compute_of is None and n != sourcing.BEFORE
    }
    every = chain.from_iterable(combinations(sourcing.SOURCES, n) for n in (1, 2, 3))
    assert seven == {
        sourcing.name(*sources): {sourcing.SOURCES[source] for source in sources}
        for sources in every
    }
    assert len(seven) == 7
    assert tuple(sourcing.SOURCES.values()) == CATEGORIES
    for arm in arms.values():
        assert {n for _, n in arm.sources} == {recipe.scalars("41_sourcing")["questions"]}
        assert set(arm.sources) <= set(arms[sourcing.ALL].sources)


@RECIPES
def test_every_student_is_another_one_and_all_start_from_the_same(name):
    recipe, arms = declared(sourcing, name)
    assert (
        len({declare_stages(a, recipe.common)["student"].key for a in arms.values()})
        == len(arms)
        == 11
    )
    (first,) = {a.base for a in arms.values()}
    start = declare_stages(first, recipe.common)["student"].key
    assert declare_stages(arms[sourcing.BEFORE], recipe.common)["student"].key == start
    assert all(n < 0 for _, n in first.sources)
    for spec, n in first.sources:
        assert dict(arms[sourcing.ALL].sources)[spec] - n <= find_source(spec).expected


@RECIPES
def test_controls_differ_from_their_arms_in_the_tokens_that_they_read_alone(name):
    _, arms = declared(sourcing, name)
    assert {n for n, a in arms.items() if a.compute_of} == CONTROLS
    for n in CONTROLS:
        assert arms[n] == replace(arms[n.split(", ")[0]], compute_of=arms["text"])


@RECIPES
def test_claims_are_about_arms_and_benchmarks_that_exist(name):
    recipe, arms = declared(sourcing, name)
    claims, benchmarks = sourcing.claims(), sourcing.benchmarks(recipe)
    categories = {find_source(benchmark).category for benchmark in benchmarks}
    assert categories == set(CATEGORIES)
    assert set(benchmarks) <= set(recipe.common.benchmarks)
    check_claims(claims, arms, categories | {sourcing.EVERYWHERE})
    for c in claims:
        assert (c.paper is None) == bool({c.a, c.b} & CONTROLS), (
            "an arm at equal tokens is ours, the others are the paper's"
        )


def test_each_category_has_a_claim_that_its_source_is_needed_and_one_that_mixing_is_harmless():
    for s, where in sourcing.SOURCES.items():
        need, calm = [c for c in sourcing.claims() if c.benchmark == where]
        assert (need.kind, need.a) == ("greater", s)
        assert set(need.b.split(" + ")) == set(sourcing.SOURCES) - {s}
        assert (calm.kind, calm.a, calm.b) == ("equivalent", sourcing.ALL, s)
    (rise,) = [c for c in sourcing.claims() if c.kind == "trend"]
    assert dict(rise.along) == {sourcing.name(*c): len(c) for c in sourcing.COMBINATIONS}


def test_the_margin_is_what_the_course_can_see():
    recipe, _ = declared(sourcing, "course")
    p = recipe.scalars("41_sourcing")
    n = p["limit"] * len(sourcing.benchmarks(recipe)) // 3
    assert n == 200
    assert detectable_difference(n, paired_sd(0.5, 0.5, p["seeds"])) < sourcing.MARGIN
    assert detectable_difference(n, paired_sd(0.5, 0.5)) > sourcing.MARGIN


def invented(**right):
    """Results of two benchmarks per category: arm → six numbers of right answers.

    A benchmark has ten questions, and the first one twenty.
    """

    def rows(k, n):
        return [
            {
                "statuses": ["correct" if i < k else "wrong"],
                "question": str(i),
                "letters": ["A"],
                "forced": [False],
                "tokens": [3],
                "options": 4,
            }
            for i in range(n)
        ]

    sizes = (20, 10, 10, 10, 10, 10)
    by_arm = {}
    for arm, numbers in right.items():
        by_benchmark = zip(PLACES, numbers, sizes, strict=True)
        by_arm[arm.replace("_", " + ")] = {b: [rows(k, n)] for b, k, n in by_benchmark}
    return sourcing.Everywhere(Common(bootstrap=200), by_arm)


def test_every_category_is_the_mean_over_benchmarks_whatever_their_sizes():
    r = invented(before=(0,) * 6, text=(20, 0, 5, 0, 0, 0))
    f = judge_claim(Claim(text="it helps", a="text", b="before", benchmark=sourcing.EVERYWHERE), r)
    assert f["difference"] == pytest.approx((1 + 0.5) / 6)
    assert f["n"] == 70
    on_text = judge_claim(Claim(text="it helps", a="text", b="before", benchmark="text_only"), r)
    assert on_text["difference"] == pytest.approx(0.5)


def test_gains_are_differences_to_the_start_by_category():
    r = invented(before=(4, 2, 2, 2, 2, 2), text=(8, 4, 1, 2, 2, 2), reasoning=(4, 2, 6, 2, 2, 2))
    r.rows[sourcing.name_at_equal_tokens("reasoning")] = r.rows["reasoning"]
    gains = {
        (g["sources"], g["reads"], g["category"]): g["gain"] for g in sourcing.measure_gains(r)
    }
    assert len(gains) == 3 * 4
    equal = "equal questions"
    assert gains["text", equal, "text_only"] == pytest.approx(0.2)
    assert gains["text", equal, "multimodal_reasoning"] == pytest.approx(-0.05)
    assert gains["reasoning", equal, "multimodal_reasoning"] == pytest.approx(0.2)
    assert gains["reasoning", "text's tokens", "multimodal_reasoning"] == pytest.approx(0.2)
    assert gains["text", equal, sourcing.EVERYWHERE] == pytest.approx((0.2 + 0.2 - 0.1) / 6)


def test_the_figure_has_a_place_for_every_combination_in_every_category():
    gained = []
    for where, sources in product((*CATEGORIES, sourcing.EVERYWHERE), sourcing.COMBINATIONS):
        name = sourcing.name(*sources)
        with_control = sourcing.name_at_equal_tokens(name) in CONTROLS
        for reads in ("equal questions", "text's tokens")[: 1 + with_control]:
            gain = {
                "sources": name,
                "reads": reads,
                "category": where,
                "gain": 0.1,
                "interval": [0.05, 0.15],
            }
            gained.append(gain)
    ax = sourcing.figure({"gains": gained}).axes[0]
    names = [sourcing.name(*sources) for sources in sourcing.COMBINATIONS]
    assert [label.get_text() for label in ax.get_yticklabels()] == names * 4
    assert sum(len(line.get_xdata()) == 1 for line in ax.lines) == 4 * (7 + 3)
    assert any(list(line.get_xdata()) == [0, 0] for line in ax.lines)
