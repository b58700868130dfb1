"Question sourcing: seven combinations, their controls, what is claimed of them, and the figure."

from dataclasses import replace
from itertools import combinations

import pytest

from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.data.sources import source_of
from octomed.evaluate.arms import stages
from octomed.evaluate.claims import Claim, finding
from octomed.evaluate.stats import KINDS, detectable, paired_sd
from octomed.paper import sourcing as S

RECIPES = pytest.mark.parametrize("name", ["smoke", "course"])
CONTROLS = {S.matched(a) for a in ("reasoning", "classification", S.ALL)}


def declared(name):
    recipe = S.scope(load_recipe(name))
    return recipe, S.arms(recipe)


@RECIPES
def test_seven_combinations_hold_the_categories_of_their_names_and_equal_questions_of_each(name):
    recipe, arms = declared(name)
    seven = {
        n: {source_of(spec).category for spec, _ in a.sources}
        for n, a in arms.items()
        if a.compute_of is None and n != S.BEFORE
    }
    assert (
        seven
        == {
            S.name(*c): {S.SOURCES[s] for s in c}
            for n in (1, 2, 3)
            for c in combinations(S.SOURCES, n)
        }
        and len(seven) == 7
    )
    assert tuple(S.SOURCES.values()) == CATEGORIES
    for arm in arms.values():
        assert {n for _, n in arm.sources} == {recipe.of("41_sourcing")["questions"]} and set(
            arm.sources
        ) <= set(arms[S.ALL].sources)


@RECIPES
def test_every_student_is_another_one_and_all_start_from_the_same(name):
    recipe, arms = declared(name)
    assert len({stages(a, recipe.common)["student"].key for a in arms.values()}) == len(arms) == 11
    (first,) = {a.base for a in arms.values()}
    start = stages(first, recipe.common)["student"].key
    assert stages(arms[S.BEFORE], recipe.common)["student"].key == start and all(
        n < 0 for _, n in first.sources
    )
    for spec, n in first.sources:
        assert dict(arms[S.ALL].sources)[spec] - n <= source_of(spec).expected


@RECIPES
def test_controls_differ_from_their_arms_in_the_tokens_that_they_read_alone(name):
    _, arms = declared(name)
    assert {n for n, a in arms.items() if a.compute_of} == CONTROLS
    for n in CONTROLS:
        assert arms[n] == replace(arms[n.split(", ")[0]], compute_of=arms["text"])


@RECIPES
def test_claims_are_about_arms_and_benchmarks_that_exist(name):
    recipe, arms = declared(name)
    claims, read = S.claims(), {source_of(b).category for b in S.benchmarks(recipe)}
    assert read == set(CATEGORIES) and set(S.benchmarks(recipe)) <= set(recipe.common.benchmarks)
    for c in claims:
        assert (
            {c.a, c.b} | {a for a, _ in c.along} <= set(arms)
            and c.a != c.b
            and c.kind in KINDS
            and c.not_proved
        )
        assert c.benchmark in read | {S.EVERYWHERE}
        assert (c.kind == "equivalent") == (c.margin is not None) and (c.kind == "trend") == bool(
            c.along
        )
        assert (c.paper is None) == bool({c.a, c.b} & CONTROLS), (
            "an arm at equal tokens is ours, the others are the paper's"
        )
    assert len({c.text for c in claims}) == len(claims)


def test_each_category_has_a_claim_that_its_source_is_needed_and_one_that_mixing_is_harmless():
    for s, where in S.SOURCES.items():
        need, calm = [c for c in S.claims() if c.benchmark == where]
        assert (need.kind, need.a) == ("greater", s) and set(need.b.split(" + ")) == set(
            S.SOURCES
        ) - {s}
        assert (calm.kind, calm.a, calm.b) == ("equivalent", S.ALL, s)
    (rise,) = [c for c in S.claims() if c.kind == "trend"]
    assert dict(rise.along) == {S.name(*c): len(c) for c in S.COMBINATIONS}


def test_the_margin_is_what_the_course_can_see():
    recipe, _ = declared("course")
    p = recipe.of("41_sourcing")
    n = p["limit"] * len(S.benchmarks(recipe)) // 3
    assert n == 200 and detectable(n, paired_sd(0.5, 0.5, p["seeds"])) < S.MARGIN < detectable(
        n, paired_sd(0.5, 0.5)
    )


def invented(**right):
    "Results with the number of right answers of ten on each of two benchmarks a category: arm → six numbers."
    places = (
        "clinic_ward:test",
        "clinic_boards:test",
        "clinic_rounds:test",
        "clinic_grand:test",
        "clinic_reading:test",
        "clinic_scanner:test",
    )

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
    return S.Everywhere(
        Common(bootstrap=200),
        {
            arm.replace("_", " + "): {
                b: [rows(k, n)] for b, k, n in zip(places, ks, sizes, strict=False)
            }
            for arm, ks in right.items()
        },
    )


def test_every_category_is_the_mean_over_benchmarks_whatever_their_sizes():
    r = invented(before=(0,) * 6, text=(20, 0, 5, 0, 0, 0))
    f = finding(Claim("it helps", "text", "before", S.EVERYWHERE), r)
    assert f["difference"] == pytest.approx((1 + 0.5) / 6) and f["n"] == 70
    assert finding(Claim("it helps", "text", "before", "text_only"), r)[
        "difference"
    ] == pytest.approx(0.5)


def test_gains_are_differences_to_the_start_by_category():
    r = invented(before=(4, 2, 2, 2, 2, 2), text=(8, 4, 1, 2, 2, 2), reasoning=(4, 2, 6, 2, 2, 2))
    r.rows[S.matched("reasoning")] = r.rows["reasoning"]
    found = {(g["sources"], g["reads"], g["category"]): g["gain"] for g in S.gains(r)}
    assert found["text", "equal questions", "text_only"] == pytest.approx(0.2) and found[
        "text", "equal questions", "multimodal_reasoning"
    ] == pytest.approx(-0.05)
    assert (
        found["reasoning", "text's tokens", "multimodal_reasoning"]
        == found["reasoning", "equal questions", "multimodal_reasoning"]
        == pytest.approx(0.2)
    )
    assert (
        found["text", "equal questions", S.EVERYWHERE] == pytest.approx((0.2 + 0.2 - 0.1) / 6)
        and len(found) == 3 * 4
    )


def test_the_figure_has_a_place_for_every_combination_in_every_category():
    gained = [
        {
            "sources": S.name(*c),
            "reads": reads,
            "category": where,
            "gain": 0.1,
            "interval": [0.05, 0.15],
        }
        for where in (*CATEGORIES, S.EVERYWHERE)
        for c in S.COMBINATIONS
        for reads in ("equal questions", "text's tokens")[: 1 + (S.matched(S.name(*c)) in CONTROLS)]
    ]
    ax = S.figure({"gains": gained}).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [S.name(*c) for c in S.COMBINATIONS] * 4
    assert sum(len(l.get_xdata()) == 1 for l in ax.lines) == 4 * (7 + 3) and any(
        list(l.get_xdata()) == [0, 0] for l in ax.lines
    )
