"The section of scale: the law, what it foretells, its arms and its claims."

from itertools import pairwise

import numpy as np
import pytest
from declarations import RECIPES, check_claims, declared

from octomed.core.paths import UsageError
from octomed.core.recipe import Common, load_recipe
from octomed.evaluate.arms import Arm, declare_stages
from octomed.evaluate.results import Results
from octomed.paper import scale

WARD = "clinic_ward:test"
AMOUNTS = [50, 100, 200, 400, 800]


@pytest.mark.parametrize("floor, a, exponent", [(0.0, 2.0, 0.3), (0.2, 3.0, 0.5), (0.4, 8.0, 1.0)])
def test_a_law_without_noise_foretells_what_it_is(floor, a, exponent):
    truth = np.array([[floor, a, exponent]])
    law = scale.fit_law(AMOUNTS, scale.read_law(truth, AMOUNTS))
    beyond = [1600, 6400]
    assert scale.read_law(law, beyond) == pytest.approx(scale.read_law(truth, beyond), abs=0.01)


def test_the_fit_is_the_best_of_a_plain_search():
    "Slower, and without an array of resamples: the same floor and the same line."
    rng = np.random.default_rng(3)
    noisy = scale.read_law(np.array([[0.2, 3.0, 0.5]]), AMOUNTS) + rng.normal(0, 0.01, (4, 5))
    for errors, law in zip(noisy, scale.fit_law(AMOUNTS, noisy), strict=True):
        best = None
        for floor in scale.FLOORS * errors.min():
            slope, constant = np.polyfit(np.log(AMOUNTS), np.log(errors - floor), 1)
            fitted = floor + np.exp(constant) * np.array(AMOUNTS) ** slope
            missed = ((np.log(fitted) - np.log(errors)) ** 2).sum()
            if best is None or missed < best[0]:
                best = missed, floor, np.exp(constant), -slope
        assert law == pytest.approx(best[1:], rel=1e-6)


def test_what_a_law_needs_for_an_accuracy_is_its_inverse():
    laws = np.array([[0.1, 3.0, 0.5], [0.0, 0.3, -0.1]])
    error = float(scale.read_law(laws, [700])[0, 0])
    assert scale.find_needed(laws, 1 - error) == pytest.approx([700, np.inf])
    assert scale.find_needed(laws, 0.95)[0] == np.inf, "the floor forbids it"


def rows_of(error, n=400):
    wrong = round(n * error)
    return [
        {
            "question": str(number),
            "letters": ["B" if number < wrong else "A"],
            "answer": "A",
            "options": 4,
            "statuses": ["wrong" if number < wrong else "correct"],
            "tags": {},
        }
        for number in range(n)
    ]


def invented(errors):
    rows = {arm: {WARD: [rows_of(error), rows_of(error)]} for arm, error in errors.items()}
    arms = {arm: Arm(sources=(("clinic_ward:train", 1),)) for arm in rows}
    return Results(Common(bootstrap=300), rows, arms)


def follow(law, beyond):
    errors = scale.read_law(np.array([law]), [*AMOUNTS, 1600])[0]
    names = [scale.name_amount(amount) for amount in (*AMOUNTS, 1600)]
    return invented({**dict(zip(names, errors, strict=True)), names[-1]: errors[-1] + beyond})


def forecast(results):
    claim = next(claim for claim in scale.claims() if claim.b == scale.LAW)
    return scale.state_finding(claim, results, AMOUNTS)


def test_a_law_that_goes_on_is_foretold_and_one_that_ends_is_not():
    goes_on = forecast(follow([0.1, 3.0, 0.5], 0.0))
    assert goes_on["outcome"] == "holds" and abs(goes_on["difference"]) < 0.02
    ends = forecast(follow([0.1, 3.0, 0.5], 0.2))
    assert ends["outcome"] == "fails" and ends["difference"] == pytest.approx(-0.2, abs=0.02)


def test_students_at_chance_are_foretold_and_tell_nothing():
    finding = forecast(follow([0.75, 1e-6, 0.5], 0.0))
    assert finding["outcome"] == "not tested"


def test_the_law_is_described_without_what_it_foretells():
    places = {scale.name_amount(amount): amount for amount in (*AMOUNTS, 1600)}
    first, second = (
        scale.describe_law(follow([0.1, 3.0, 0.5], beyond), WARD, places) for beyond in (0.0, 0.2)
    )
    assert first["foretold"] == second["foretold"] and first["law"] == second["law"]
    assert first["found"] - second["found"] == pytest.approx(0.2, abs=0.01)
    low, high = first["foretold_interval"]
    assert low < first["foretold"] < high


@RECIPES
def test_amounts_are_halves_and_trades_read_as_many_tokens(name):
    recipe, arms = declared(scale, name)
    own = recipe.scalars("64_scale")
    amounts = scale.list_amounts(own)
    assert amounts[-1] == own["questions"] < own["held_out"]
    assert all(b == 2 * a for a, b in pairwise(amounts))
    trades = scale.list_trades(own)
    assert {questions * k for questions, k in trades} == {own["questions"]}
    whole = arms[scale.name_amount(own["questions"])]
    for questions, k in trades[:-1]:
        assert arms[scale.name_amount(questions, k)].compute_of == whole
    assert {f"{amount} questions" for amount in amounts} <= set(arms)


@RECIPES
def test_claims_compare_arms_that_exist(name):
    recipe, arms = declared(scale, name)
    own = recipe.scalars("64_scale")
    claims = scale.claims(own, recipe.common.student, recipe.common.reading)
    check_claims(claims, [*arms, scale.LAW], scale.benchmarks(recipe))
    assert len(claims) == 5 and {claim.reading for claim in claims} == {recipe.common.reading}


def test_amounts_lie_within_each_other():
    recipe, arms = declared(scale, "course")
    pools = {arm.sources[0][0] for arm in arms.values()}
    assert len(pools) == 1
    (stage,) = {declare_stages(arms["800 questions"], recipe.common)["data"]}
    assert stage.params["sources"][0][1] == 800


def test_sizes_come_by_their_parameters():
    own = {"sizes": "clinic/small, clinic/mini"}
    assert scale.list_sizes(own, "clinic/tiny") == ["clinic/mini", "clinic/tiny", "clinic/small"]
    counts = [scale.count_parameters(f"clinic/{size}") for size in ("mini", "tiny", "small")]
    assert counts == sorted(counts) and counts[0] > 1e6
    assert scale.count_parameters("clinic/tiny") == scale.count_parameters("clinic/tiny-other")


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_one_size_alone_has_no_claims_about_size(name):
    recipe = load_recipe(name)
    own = recipe.scalars("64_scale")
    (benchmark,) = scale.benchmarks(recipe)
    claims = scale.claims(own, recipe.common.student, benchmark=benchmark)
    assert len(claims) == 3
    check_claims(claims, [*scale.arms(recipe), scale.LAW], [benchmark])
    assert f"{own['held_out'] / own['questions']:g} times" in claims[1].text


def test_other_sizes_have_chance_students_of_their_own():
    recipe, arms = declared(scale, "course")
    chance = scale.chance(recipe)
    assert {arm.student for arm in chance.values()} == {"", "clinic/mini", "clinic/small"}
    assert all(arm.blind for arm in chance.values()) and not set(chance) & set(arms)


@pytest.mark.parametrize("changed", [{"halves": 1}, {"held_out": 8}, {"many": 1}])
def test_what_no_law_can_be_fitted_to_is_one_sentence(changed):
    own = {**load_recipe("smoke").scalars("64_scale"), **changed}
    with pytest.raises(UsageError, match="raise questions, halves, held_out or many"):
        scale.list_amounts(own)


def test_findings_of_two_students_are_set_side_by_side():
    ours = {"claims": [{"text": "a", "outcome": "agrees"}, {"text": "b", "outcome": "fails"}]}
    other = {"claims": [{"text": "a", "outcome": "disagrees"}, {"text": "c", "outcome": "holds"}]}
    assert scale.find_partings(ours, other) == [
        {"claim": "a", "small student": "agrees", "pretrained": "disagrees"}
    ]
