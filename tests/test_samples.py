"Traces per question: runs read on their way, controls at equal tokens, coverage, the figure."

from dataclasses import replace
from itertools import product

import pytest

from octomed.core.recipe import load_recipe
from octomed.data.sources import load
from octomed.distill.pools import take_subset
from octomed.evaluate.arms import declare_stages
from octomed.evaluate.results import scope_recipe
from octomed.paper import formatting, samples
from octomed.run.section_page import SectionPage


def declare(name: str):
    "The recipe as the section uses it, and the section's arms."
    recipe = scope_recipe(load_recipe(name), "44_samples")
    return recipe, samples.arms(recipe)


def test_each_k_is_one_run_whose_student_is_read_after_each_epoch():
    recipe, arms = declare("course")
    for k in samples.KS:
        along = [arms[samples.name(k, epochs)] for epochs in samples.EPOCHS]
        assert len({replace(arm, at=1.0) for arm in along}) == 1
        assert [3 * arm.at for arm in along] == pytest.approx([1, 2, 3])
        assert along[-1].schedule.epochs == 3
        trained = {declare_stages(arm, recipe.common)["trained"].key for arm in along}
        students = {declare_stages(arm, recipe.common)["student"].key for arm in along}
        assert (len(trained), len(students)) == (1, 3)
    assert arms["before"].schedule.epochs == 0
    assert recipe.scalars("44_samples")["seeds"] == 3
    assert recipe.common.samples == 16


@pytest.mark.parametrize("name", ["smoke", "course"])
def test_controls_read_the_tokens_of_sixteen_traces_over_three_epochs(name):
    recipe, arms = declare(name)
    most = arms[samples.name(16, 3)]
    for control in (samples.REPEATED, samples.REWORDED):
        assert arms[control].compute_of == most
        assert (arms[control].k, arms[control].schedule) == (1, most.schedule)
    assert arms[samples.REPEATED].sources == most.sources
    assert arms[samples.REWORDED].sources[0][1] == 16 * most.sources[0][1]
    own = recipe.scalars("44_samples")
    without = recipe.with_scalars("44_samples", **{**own, "near": ""})
    assert samples.REWORDED not in samples.arms(without)


def test_the_pool_asks_at_least_half_of_the_joins_that_may_be_trained_on():
    recipe, arms = declare("course")
    for arm in (samples.name(16, 3), samples.REWORDED):
        ((spec, amount),) = arms[arm].sources
        asked = take_subset(load(spec), amount, recipe.common.base_seed)
        assert samples.measure_coverage(asked) >= 0.5
    few = take_subset(load("clinic_near:one"), 10, recipe.common.base_seed)
    assert 0 < samples.measure_coverage(few) <= 10 / 91
    assert samples.measure_coverage([replace(q, tags={}) for q in few]) is None


def test_claims_are_the_papers_three_and_three_of_ours():
    claims = samples.claims()
    assert [bool(claim.paper) for claim in claims] == [True] * 3 + [False] * 3
    on_the_way = [claim for claim in claims if claim.a == samples.name(4, 1)]
    assert all("still high" in claim.not_proved for claim in on_the_way)
    recipe, _ = declare("course")
    generated = replace(recipe, common=replace(recipe.common, likelihood=False))
    assert judged(recipe) == claims
    assert judged(generated) == claims[:-1]
    assert judged(declare("paper")[0]) == claims[:4]


def judged(recipe):
    "The claims that the section's page keeps under a recipe."
    page = SectionPage("44_samples", recipe, out=None, started=0.0, claims=samples.claims())
    page.arms, page.benchmarks = samples.arms(recipe), samples.benchmarks(recipe)
    page.set_aside_claims()
    return page.claims


def test_claims_that_a_recipe_cannot_ask_do_not_end_the_judgement(capsys):
    from octomed.paper import sourcing

    recipe = scope_recipe(load_recipe("paper"), "41_sourcing")
    page = SectionPage("41_sourcing", recipe, out=None, started=0.0, claims=sourcing.claims())
    page.judge(lambda claim, results: {**SETTLED, "text": claim.text}, results={})
    assert len(page.findings) == len(sourcing.claims()) - 1
    printed = capsys.readouterr().out
    assert "clinic_ward:test" in printed and "the reading by likelihood" in printed


SETTLED = {
    "kind": "greater",
    "margin": None,
    "paper": None,
    "difference": 0.1,
    "interval": [0.0, 0.2],
    "by_seed": [0.1],
    "n": 10,
    "outcome": "undecided",
}


def test_chance_is_what_42_trains():
    recipe, _ = declare("course")
    (own,) = samples.chance(recipe).items()
    assert own in formatting.chance(recipe).items()
    assert own[0] == "chance, cot, text_only"


def rows(arms) -> list[dict]:
    "Rows of a table of scores: an accuracy for each arm."
    every = []
    for place, (arm, blind) in enumerate(product(arms, (False, True))):
        accuracy = 0.3 + place / 100
        row = {
            "arm": arm,
            "benchmark": "clinic_ward:test",
            "joins": "all",
            "reading": "generated",
            "accuracy": accuracy,
            "interval": [accuracy - 0.05, accuracy + 0.05],
            "chance": 0.27,
            "blind": blind,
        }
        every.append(row)
    return [*every, *({**row, "joins": "seen", "accuracy": 0.9} for row in every)]


def test_the_figure_has_a_curve_for_each_k_and_the_paper_apart():
    fig = samples.figure({"rows": rows(declare("course")[1])})
    ours, papers = fig.axes
    curves = [line for line in ours.lines if len(line.get_xdata()) == 4]
    assert [list(line.get_xdata()) for line in curves] == [[0, 1, 2, 3]] * 3
    diamonds = [line for line in ours.lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in diamonds] == [[3], [3]]
    assert max(line.get_ydata()[0] for line in ours.lines) < 60, "a part is no point"
    levels = [line for line in ours.lines if list(line.get_ydata()) == pytest.approx([27, 27])]
    assert len(levels) == 1
    hollow = [line.get_ydata()[0] for line in papers.lines if line.get_marker() == "D"]
    assert sorted(hollow) == pytest.approx([75.16, 76.5])
