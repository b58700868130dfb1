"Question sourcing: seven combinations, a control, what is claimed of them, and the matrix."

from dataclasses import replace
from itertools import chain, combinations, product

import numpy as np
import pytest
from declarations import PLACES, RECIPES, check_claims, declared

from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.data.sources import find_source
from octomed.evaluate.arms import Arm, declare_stages
from octomed.evaluate.chance import measure_chance
from octomed.evaluate.claims import Claim, judge_claim
from octomed.evaluate.results import Results
from octomed.paper import sourcing
from octomed.train.students import find_base_student

CONTROL = sourcing.name_at_equal_tokens(sourcing.ALL)


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
def test_every_student_is_another_one_and_all_start_from_the_recipes_base(name):
    recipe, arms = declared(sourcing, name)
    students = {declare_stages(a, recipe.common)["student"] for a in arms.values()}
    assert len(students) == len(arms) == 9
    assert {(a.base, a.student) for a in arms.values()} == {(None, "")}
    base = find_base_student(recipe.common)
    assert declare_stages(arms[sourcing.BEFORE], recipe.common)["student"].path == base.path
    for spec, n in arms[sourcing.ALL].sources:
        assert n <= find_source(spec).expected


@RECIPES
def test_the_control_differs_from_its_arm_in_the_tokens_that_it_reads_alone(name):
    _, arms = declared(sourcing, name)
    assert {n for n, a in arms.items() if a.compute_of} == {CONTROL}
    own = replace(arms[sourcing.ALL], points=())
    assert arms[CONTROL] == replace(own, compute_of=arms["text"])


def test_students_that_other_sections_read_are_kept_where_they_read_them():
    from octomed.paper import filtering, formatting

    assert sourcing.KEPT_AT["reasoning"] == filtering.POINTS[:-1]
    recipe, arms = declared(sourcing, "course")
    own = recipe.scalars("41_sourcing")
    alike = recipe.with_scalars(
        "42_formatting", questions=own["questions"], epochs=own["epochs"], seeds=1
    )
    cot = formatting.declare_students(alike)["cot"]
    assert sourcing.KEPT_AT[sourcing.ALL] == cot.points
    assert replace(arms[sourcing.ALL], points=()) == replace(cot, points=())


def test_chance_students_are_those_of_42_that_reason():
    from octomed.paper import formatting

    recipe, _ = declared(sourcing, "smoke")
    every = formatting.chance(recipe)
    assert sourcing.chance(recipe) == {n: a for n, a in every.items() if a.form == "cot"}
    assert len(sourcing.chance(recipe)) == 3


@RECIPES
def test_claims_are_about_arms_and_benchmarks_that_exist(name):
    recipe, arms = declared(sourcing, name)
    claims, benchmarks = sourcing.claims(), sourcing.benchmarks(recipe)
    categories = {find_source(benchmark).category for benchmark in benchmarks}
    assert categories == set(CATEGORIES)
    assert set(benchmarks) <= set(recipe.common.benchmarks)
    check_claims(claims, arms, categories | {sourcing.EVERYWHERE, *benchmarks})
    papers, ours = claims[:6], claims[6:]
    assert all(c.paper and c.joins == "all" and CONTROL not in (c.a, c.b) for c in papers)
    assert not any(c.paper for c in ours)
    assert [(c.a, c.b, c.joins, c.reading) for c in ours] == [
        (CONTROL, "text", "all", "generated"),
        ("text + reasoning", "text", "unseen", "likelihood"),
    ]


def test_each_category_has_a_claim_that_its_source_is_needed():
    for s, where in sourcing.SOURCES.items():
        (need,) = [c for c in sourcing.claims() if c.benchmark == where]
        assert (need.kind, need.a) == ("greater", s)
        assert set(need.b.split(" + ")) == set(sourcing.SOURCES) - {s}
    (rise,) = [c for c in sourcing.claims() if c.kind == "trend"]
    assert dict(rise.along) == {sourcing.name(*c): len(c) for c in sourcing.COMBINATIONS}


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
    rows = sourcing.measure_gains(r)
    gains = {(g["sources"], g["reads"], g["category"]): g["gain"] for g in rows}
    assert len(gains) == 3 * 4
    equal = "equal questions"
    assert gains["text", equal, "text_only"] == pytest.approx(0.2)
    assert gains["text", equal, "multimodal_reasoning"] == pytest.approx(-0.05)
    assert gains["reasoning", equal, "multimodal_reasoning"] == pytest.approx(0.2)
    assert gains["reasoning", "text's tokens", "multimodal_reasoning"] == pytest.approx(0.2)
    assert gains["text", equal, sourcing.EVERYWHERE] == pytest.approx((0.2 + 0.2 - 0.1) / 6)
    assert [g["start"] for g in rows] == pytest.approx([0.2] * len(rows))


def with_chance(hidden, **right):
    "Results with a chance student of each category: numbers of right answers on each benchmark."
    r = invented(**right)
    common = Common(bootstrap=200)
    arms = {name: Arm(sources=(("clinic_ward:train", 1),)) for name in r.rows}
    shown = invented(hidden=hidden).rows["hidden"]
    for pool in load_recipe("course").common.train:
        category = find_source(pool).category
        label = f"chance, cot, {category}"
        arms[label] = Arm(sources=((pool, 1),), blind=True)
        own = [b for b in PLACES if find_source(b).category == category]
        r.rows[label] = {b: shown[b] for b in own}
    return Results(common, r.rows, arms)


def test_chance_over_all_categories_is_the_mean_of_the_chance_students():
    right = {"before": (5, 3, 3, 3, 3, 3), "text": (18, 9, 9, 9, 9, 9)}
    r = sourcing.see_everywhere(with_chance(hidden=(10, 6, 4, 5, 5, 5), **right))
    whole = measure_chance(r, "text", sourcing.EVERYWHERE)
    assert whole.student == pytest.approx(np.mean([0.5, 0.6, 0.4, 0.5, 0.5, 0.5]))
    assert measure_chance(r, "text", "text_only").student == pytest.approx(0.55)
    beyond = {g["category"]: g["beyond chance"] for g in sourcing.measure_gains(r)}
    assert beyond == dict.fromkeys((*CATEGORIES, sourcing.EVERYWHERE), True)
    low = sourcing.see_everywhere(with_chance(hidden=(18, 9, 9, 9, 9, 9), **right))
    assert not any(g["beyond chance"] for g in sourcing.measure_gains(low))


def invent_gains():
    rows = [(sourcing.name(*sources), "equal questions") for sources in sourcing.COMBINATIONS]
    return [
        {
            "sources": name,
            "reads": reads,
            "category": where,
            "gain": 0.1 if where == "text_only" else -0.02,
            "interval": [0.05, 0.15] if where == "text_only" else [-0.05, 0.01],
            "start": 0.25,
            "beyond chance": where != sourcing.EVERYWHERE,
        }
        for (name, reads), where in product(
            [*rows, (sourcing.ALL, "text's tokens")], (*CATEGORIES, sourcing.EVERYWHERE)
        )
    ]


def test_the_matrix_has_a_cell_for_every_arm_in_every_category():
    ax = sourcing.figure({"gains": invent_gains()}).axes[0]
    assert len(ax.get_yticklabels()) == 8
    assert [label.get_text().split("\n")[-1] for label in ax.get_xticklabels()] == [
        "start 25 %"
    ] * 4
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("+10.0") == 8
    assert texts.count("-2.0") == 3 * 8
    assert texts.count("+5.0 to +15.0") == 8
    assert texts.count("at chance") == 8
    own = 3 * 1 + 3 * 2 + 2 * 3  # cells of a category that the arm has read
    assert len(ax.patches) == own
    (image,) = ax.images
    assert image.get_array().shape == (8, 4)


def test_colours_of_gains_lie_on_both_sides_of_white():
    ax = sourcing.figure({"gains": invent_gains()}).axes[0]
    (image,) = ax.images
    above, start, below = image.cmap(image.norm([10, 0, -10]))
    assert start[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert above[2] > above[0]
    assert below[0] > below[2]
