"The instrument: what its intervals cover, its p-values, joins, seeds, families, and itself."

from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest

import octomed.clinic.questions  # noqa: F401 - registers the sources
from octomed.core.paths import OctomedError
from octomed.core.recipe import Common
from octomed.evaluate.claims import Claim, judge_claim, read_alike, word_outcome
from octomed.evaluate.family import count_family, settle_run
from octomed.evaluate.results import Results
from octomed.evaluate.seeds import (
    SeedSpread,
    measure_detectable,
    measure_seeds,
    pool_seeds,
    resample_twice,
    tally_units,
)
from octomed.evaluate.splits import check_instrument, list_halves
from octomed.evaluate.stats import (
    adjust_holm,
    bootstrap,
    find_p,
    find_power,
    heed_signs,
    paired_bootstrap,
)

WARD = "clinic_ward:test"
ALIKE = {"benchmarks": 1, "joins": "all", "reading": "generated"}


def draw_arm(rng, easy, seeds=3, spread=0.03, joins=None):
    "(questions, seeds) of 0 and 1: questions of an arm differ, seeds differ, joins differ."
    n = len(easy)
    own = rng.normal(0, 0.1, n) if joins is None else rng.normal(0, 0.15, max(joins) + 1)[joins]
    p = (easy + own)[:, None] + rng.normal(0, spread, seeds)
    return (rng.random((n, seeds)) < p).astype(float)


def pool_of(arms, units=None):
    rows = []
    for place, scores in enumerate(arms):
        between, noise = measure_seeds(scores, units=units)
        row = {"arm": place, "where": "w", "seeds": scores.shape[1]}
        rows.append(row | {"between": between, "noise": noise} | ALIKE)
    return pool_seeds(rows, ALIKE)


@lru_cache
def share_covered(n, joins=None, trials=200, arms=5):
    "How often intervals hold 0, of two arms that differ in nothing: with seeds, and without."
    held = np.zeros(2)
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        units = None if joins is None else rng.permutation(np.arange(n) % joins)
        easy = rng.uniform(0.3, 0.7, n)
        scores = [draw_arm(rng, easy, joins=units) for _ in range(arms)]
        tally = tally_units(scores[0] - scores[1], units=units)
        for place, spread in enumerate((pool_of(scores, units), None)):
            drawn = resample_twice(tally, spread, seed_weight=2 / 3, n=400, seed=trial)
            low, high = np.quantile(drawn, [0.025, 0.975])
            held[place] += low <= 0 <= high
    return held / trials


@pytest.mark.parametrize("n, joins", [(40, None), (240, None), (160, 40)])
def test_intervals_of_three_seeds_hold_the_truth_in_95_of_100_cases(n, joins):
    with_seeds, without = share_covered(n, joins)
    assert 0.91 <= with_seeds <= 0.99
    assert without < with_seeds


def test_questions_alone_do_not_cover_what_seeds_do():
    assert share_covered(240)[1] < 0.91


def test_the_seed_s_part_is_what_is_left_when_chance_is_taken_away():
    rng = np.random.default_rng(0)
    easy = rng.uniform(0.3, 0.7, 100)
    for spread in (0.0, 0.04):
        between, noise = measure_seeds(draw_arm(rng, easy, seeds=600, spread=spread))
        assert noise == pytest.approx(0.22 / 100, rel=0.1)
        assert between - noise == pytest.approx(spread**2, abs=4e-4)


def test_the_seed_s_part_is_pooled_by_degrees_of_freedom_and_students_count_once():
    rows = [
        {"arm": "a", "where": "w", "seeds": 3, "between": 0.01, "noise": 0.0},
        {"arm": "b", "where": "w", "seeds": 2, "between": 0.04, "noise": 0.003},
        {"arm": "a", "where": "w", "seeds": 3, "between": 0.01, "noise": 0.0, "section": "other"},
    ]
    rows = [row | ALIKE for row in rows]
    spread = pool_seeds(rows, ALIKE)
    assert (spread.between, spread.noise, spread.df) == pytest.approx((0.02, 0.001, 3))
    assert pool_seeds(rows, ALIKE | {"joins": "unseen"}) is None
    assert SeedSpread(between=0.001, noise=0.002, df=4).sd == 0


# Units


def test_joins_are_drawn_with_all_their_questions():
    "Questions that are answered alike within a join count as one."
    by_join = np.random.default_rng(0).random(50) < 0.5
    joins = np.repeat(np.arange(50), 4)
    drawn = bootstrap(np.repeat(by_join, 4), units=joins)
    assert drawn.interval == pytest.approx(bootstrap(by_join).interval, abs=1e-12)
    assert (drawn.n, drawn.joins) == (200, 50)
    a, b = np.repeat(by_join, 4), np.zeros(200)
    assert paired_bootstrap(a, b, units=joins).interval == pytest.approx(drawn.interval)
    with pytest.raises(OctomedError, match="unit labels"):
        bootstrap([1, 0], units=["a"])


def test_a_join_of_two_benchmarks_is_drawn_for_both_and_sizes_may_differ():
    scores, groups = [1, 1, 0, 0, 1, 0], ["x", "x", "x", "y", "y", "y"]
    units = ["j", "k", "k", "j", "k", "l"]
    interval = bootstrap(scores, groups=groups, units=units, n=500)
    assert interval.estimate == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert interval.joins == 3
    same = bootstrap([1, 0, 1, 0], groups=["x", "x", "y", "y"], units=["j", "k", "j", "k"])
    apart = bootstrap([1, 0, 1, 0], groups=["x", "x", "y", "y"])
    assert same.interval == (0.0, 1.0)
    assert apart.high - apart.low == 1.0


def make_results(seeds_of, joins=False, spread=0.0, n=120, lift=None, bootstrap=400):
    "Made-up evaluations: arm → training seeds; an arm's accuracy may be lifted."
    easy = np.random.default_rng(9).uniform(0.3, 0.6, n)
    rows = {}
    for place, (arm, seeds) in enumerate(seeds_of.items()):
        rng = np.random.default_rng(100 + place)
        scores = draw_arm(rng, easy + (lift or {}).get(arm, 0), seeds=seeds, spread=spread)
        rows[arm] = {WARD: [list(map(make_row, range(n), of_seed)) for of_seed in scores.T]}
        if joins:
            for of_seed in rows[arm][WARD]:
                for row in of_seed:
                    row["tags"] = {"join": str(int(row["question"]) % 30), "held_out": True}
    return Results(Common(bootstrap=bootstrap), rows)


def make_row(number, right):
    status = "correct" if right else "wrong"
    return {
        "question": str(number),
        "options": 4,
        "statuses": [status],
        "letters": ["A"],
        "forced": [False],
        "tokens": [3],
    }


def claim_of(a="a", b="b", **more):
    return Claim(text=f"{a} beats {b}", a=a, b=b, benchmark=WARD, **more)


def test_unseen_joins_are_the_unit_of_claims_and_tables():
    from octomed.evaluate.tables import tabulate_scores

    r = make_results({"a": 1, "b": 1}, joins=True)
    finding = judge_claim(claim_of(joins="unseen"), r)
    assert (finding["n"], finding["n_joins"]) == (120, 30)
    assert judge_claim(claim_of(), r)["n_joins"] is None
    rows = tabulate_scores(r, joins=("all", "unseen"))
    assert {row["joins"]: row["n_joins"] for row in rows} == {"all": None, "unseen": 30}


# p, and the family


def test_p_is_two_sided_from_the_resamples_and_bounded():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.02, 0.01, 9999)
    assert find_p("greater", drawn) == pytest.approx(0.0455, abs=0.006)
    assert find_p("greater", -drawn) == find_p("greater", drawn)
    assert find_p("greater", drawn + 9) == find_p("trend", -drawn - 9) == 1 / 10_000
    assert find_p("greater", np.zeros(10)) == 1
    assert find_p("equivalent", drawn, 0.03) == pytest.approx(0.159, abs=0.01)
    assert find_p("equivalent", drawn, 1) == 1 / 10_000
    with pytest.raises(OctomedError, match="margin"):
        find_p("equivalent", drawn)


def test_p_is_below_5_percent_just_where_0_is_outside_the_interval():
    for seed in range(40):
        drawn = np.random.default_rng(seed).normal(seed / 1000, 0.01, 1999)
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (find_p("greater", drawn) < 0.05) == (low > 0 or high < 0)


def test_holm_is_the_closed_test_of_bonferroni_s():
    "The adjusted p is the largest Bonferroni p of all families that hold the claim."
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([]) == []
    p = np.random.default_rng(1).random(6) ** 3
    families = [s for size in range(1, 7) for s in combinations(range(6), size)]
    for place, adjusted in enumerate(adjust_holm(p)):
        own = [min(1, len(s) * p[list(s)].min()) for s in families if place in s]
        assert adjusted == pytest.approx(max(own))


def test_the_claims_of_a_run_are_one_family_under_one_spread():
    sections = []
    for name, arms in {"one": ("a", "b"), "two": ("c", "d")}.items():
        lift = {arms[0]: 0.25}
        r = make_results(dict.fromkeys(arms, 3), spread=0.02, lift=lift)
        more = {"paper": "9 against 8"} if name == "one" else {}
        finding = judge_claim(claim_of(*arms, **more), r)
        spreads = finding.pop("seed_spreads")
        sections.append({"section": name, "claims": [finding], "seed_spreads": spreads})
    sections[1]["seed_spreads"][0]["between"] += 0.002
    gated = {**sections[0]["claims"][0], "outcome": "not tested", "training_seeds": 1}
    sections[0]["claims"].append(gated)
    one, two = settle_run(sections)
    first, second = one["claims"][0], two["claims"][0]
    assert first["seed_spread"] == second["seed_spread"] != sections[0]["claims"][0]["seed_spread"]
    assert sorted([first["p_holm"], second["p_holm"]])[0] == pytest.approx(
        min(1, 2 * min(first["p"], second["p"]))
    )
    assert one["claims"][1]["p_holm"] is None
    assert (first["outcome"], second["outcome"]) == ("agrees", "holds")
    assert settle_run([one, two])[0]["claims"] == one["claims"]
    assert sections[0]["claims"][0]["p_holm"] is None
    family = count_family([*one["claims"], *two["claims"]])
    assert (family["tested"], family["by_chance"], family["decided"]) == (2, pytest.approx(0.1), 2)


# Seeds and words


def test_opposite_signs_are_undecided_and_equivalence_does_not_mind():
    assert heed_signs("agrees", "greater", [0.1, 0.2, -0.01]) == "undecided"
    assert heed_signs("disagrees", "trend", [-0.1, 0.01]) == "undecided"
    assert heed_signs("agrees", "greater", [0.1, 0.0]) == "agrees"
    assert heed_signs("agrees", "equivalent", [0.01, -0.01]) == "agrees"


def test_fewer_than_three_seeds_are_about_these_students():
    lift = {"a": 0.3}
    few = judge_claim(claim_of(), make_results({"a": 2, "b": 2}, lift=lift))
    many = judge_claim(claim_of(), make_results({"a": 3, "b": 4}, lift=lift, spread=0.05))
    assert (few["about"], word_outcome(few)) == ("these students", "holds, for these students")
    assert (many["about"], many["training_seeds"]) == ("training", 3)
    assert few["seed_spread"] is None and many["seed_spread"]["df"] == 5
    assert word_outcome(many) == "holds"
    assert few["detectable"] > 0 and few["p"] >= 1 / 401


def test_arms_that_are_not_trained_have_no_spread():
    r = make_results({"a": 3, "b": 1})
    r.rows["b"][WARD] *= 3
    finding = judge_claim(claim_of(), r)
    assert finding["evidence"]["seed_weight"] == pytest.approx(1 / 3)
    assert [row["arm"] for row in finding["seed_spreads"]] == ["a"]


# The instrument itself


def test_six_seeds_split_into_ten_halves():
    splits = list_halves()
    assert len({frozenset(map(frozenset, split)) for split in splits}) == 10
    assert all(sorted((*first, *second)) == list(range(6)) for first, second in splits)


def test_the_detectable_difference_is_detected_in_80_of_100_cases():
    found = {1.0: 0, 0.5: 0}
    expected = []
    for trial in range(250):
        rng = np.random.default_rng(trial)
        scores = [draw_arm(rng, np.full(120, 0.45), spread=0.03) for _ in range(6)]
        spread = pool_of(scores)
        for share in found:
            lifted = draw_arm(rng, np.full(120, 0.45) + share * 0.16, spread=0.03)
            tally = tally_units(lifted - scores[1])
            drawn = resample_twice(tally, spread, seed_weight=2 / 3, n=300, seed=trial)
            low, high = np.quantile(drawn, [0.025, 0.975])
            found[share] += low > 0
            detectable, widening = measure_detectable(tally, (low, high), spread, 2 / 3)
            expected.append((share, find_power(share * 0.16, detectable, widening=widening)))
    for share, count in found.items():
        computed = np.mean([power for key, power in expected if key == share])
        assert count / 250 == pytest.approx(computed, abs=0.09)


def test_the_instrument_finds_little_in_nothing_and_what_is_planted():
    seeds_of = {**dict.fromkeys("abcdef", 6), "i": 3, "j": 3}
    r = make_results(seeds_of, spread=0.03, bootstrap=300)
    rows = {(row["what"], row["signs"]): row for row in check_instrument([claim_of()], r)}
    nothing = rows["nothing, three seeds against three", "not yet"]
    heeded = rows["nothing, three seeds against three", "heeded"]
    planted = rows["the detectable difference, planted", "not yet"]
    half = rows["half of it, planted", "not yet"]
    assert (nothing["arms"], nothing["cases"]) == (6, 60)
    assert nothing["interval"][0] <= 0.05 and nothing["share"] < 0.15
    assert heeded["share"] <= nothing["share"]
    assert planted["share"] == pytest.approx(0.8, abs=0.13)
    assert half["share"] == pytest.approx(half["expected"], abs=0.13)
    assert 0.2 < half["expected"] < 0.4
    assert rows["nothing, one seed against one", "not yet"]["cases"] == 90
    assert check_instrument([claim_of()], make_results({"a": 3, "b": 3})) == []


def test_a_recipe_says_how_claims_about_accuracy_read_students():
    from octomed.core.recipe import load_recipe
    from octomed.paper import scaling, teacher

    read = read_alike(teacher.claims(), "likelihood")
    readings = {claim.reading for claim in read if claim.a != teacher.HASTY_ALL}
    assert readings == {"likelihood"}
    (bias,) = [claim for claim in read if claim.a == teacher.HASTY_ALL]
    assert bias.reading == "generated"  # it is about which option is named
    apart = (scaling.TEACHERS, scaling.CURVE)
    kept = read_alike(scaling.claims(), "likelihood", apart=apart)
    assert [c.reading for c in kept if {c.a, c.b} & set(apart)] == ["generated"] * 4
    assert read_alike(teacher.claims(), "generated") == teacher.claims()
    assert load_recipe("course").common.reading == "likelihood"
    assert load_recipe("paper").common.reading == "generated"
