"What a section shows: its plan in short, the reading of its claims, and what a run changes."

import json
from copy import deepcopy

import pytest

from octomed.core.paths import root
from octomed.core.recipe import load_recipe
from octomed.evaluate.claims import settle_finding
from octomed.evaluate.figures import draw_accuracies
from octomed.evaluate.results import scope_recipe
from octomed.evaluate.results_file import MOST_SCORES, Comparison
from octomed.evaluate.seeds import SeedSpread, pool_seeds
from octomed.evaluate.tables import find_reading, list_drawn_rows
from octomed.run.plan_sections import Plan
from octomed.run.section_page import SectionPage

CARD = {"values": "v", "parents": ["a"], "commit": "abc", "made": "2026-01-02T03:04:05Z"}


def claim(text="One beats two", outcome="agrees", difference=0.05):
    return {"text": text, "outcome": outcome, "difference": difference}


def row(accuracy, half=0.05, benchmark="clinic_ward:test", **more):
    place = {"arm": "cot", "category": "text_only", "benchmark": benchmark}
    shown = {"accuracy": accuracy, "interval": [accuracy - half, accuracy + half]}
    return {**place, "joins": "all", "reading": "generated", **shown, **more}


def results(claims=None, rows=None, **card):
    claims = [claim()] if claims is None else claims
    rows = [row(0.5)] if rows is None else rows
    return {"recipe": "course", "claims": claims, "rows": rows, "card": {**CARD, **card}}


def test_without_a_reference_or_at_another_size_nothing_is_compared():
    none = Comparison(results() | {"recipe": "smoke"}, None)
    assert "There is no reference run of the recipe smoke" in str(none)
    assert "other values than the reference run of course" in str(
        Comparison(results(values="w"), results())
    )


def test_the_reference_run_says_that_it_is_that():
    assert str(Comparison(results(), results())).endswith("it is that run.")
    again = str(Comparison(results(parents=["b"]), results()))
    assert "0 of 1 claims have another outcome, and 0 of 1 scores changed" in again
    assert "(commit abc, 2026-01-02)" in again


def test_claims_with_another_outcome_and_scores_beyond_both_intervals_are_listed():
    ours = results(
        claims=[claim(outcome="undecided", difference=0.01), claim("New")],
        rows=[row(0.7), row(0.54, benchmark="medqa:test"), row(0.9, benchmark="headqa:test")],
        parents=["b"],
    )
    wide = row(0.5, half=0.45, benchmark="headqa:test")
    before = results(
        claims=[claim(), claim("Old")], rows=[row(0.5), row(0.5, benchmark="medqa:test"), wide]
    )
    compared = Comparison(ours, before)
    assert [(line["what"], line["reference"], line["ours"]) for line in compared.list_claims()] == [
        ("One beats two", "agrees, +5.0", "undecided, +1.0"),
        ("New", "not judged", "agrees, +5.0"),
        ("Old", "agrees, +5.0", "not judged"),
    ]
    (score,) = compared.list_scores()
    assert score["what"] == "cot on clinic_ward:test, as written"
    assert (score["reference"], score["ours"]) == ("50.0 (45.0 to 55.0)", "70.0 (65.0 to 75.0)")
    text = str(compared)
    assert "| One beats two | agrees, +5.0 | undecided" in text
    assert compared._repr_markdown_() == text


def test_of_many_changed_scores_those_that_changed_most_are_shown():
    places = [f"clinic_{n}:test" for n in range(MOST_SCORES + 3)]
    before = results(rows=[row(0.1, 0.001, place) for place in places])
    after = [row(0.2 + n / 100, 0.001, place) for n, place in enumerate(places)]
    text = str(Comparison(results(rows=after, parents=["b"]), before))
    assert f"The {MOST_SCORES} that changed most are shown." in text
    assert places[-1] in text and f"{places[0]}," not in text


def test_a_finding_of_the_reference_is_judged_with_its_own_sections_seeds():
    kept = json.loads(
        (root() / "outputs/reference/course/results/44_samples.json").read_text(encoding="utf-8")
    )
    settled = kept["claims"][0]
    alone = settle_finding(settled, pool_seeds(kept["seed_spreads"], settled["evidence"]))
    assert alone["interval"] != settled["interval"]
    ours = deepcopy(kept)
    ours["claims"][0] = alone
    assert Comparison(ours, kept).list_claims() == []
    wide = settle_finding(settled, SeedSpread(**{**settled["seed_spread"], "between": 0.5}))
    assert wide["outcome"] == "undecided"
    spreads = [{**spread, "between": 0.5} for spread in kept["seed_spreads"]]
    changed = Comparison(kept, {**kept, "seed_spreads": spreads}).list_claims()
    assert settled["text"] in {line["what"] for line in changed}


def test_a_section_finds_the_reference_of_its_recipe_alone():
    for name, says in (("course", "it is that run."), ("smoke", "no reference run of")):
        recipe = scope_recipe(load_recipe(name), "44_samples")
        page = SectionPage("44_samples", recipe, out=None, started=0.0)
        kept = root() / "outputs/reference/course/results/44_samples.json"
        done = json.loads(kept.read_text(encoding="utf-8")) | {"recipe": name}
        assert says in str(page.compare(done))


def test_a_plan_shows_rounded_numbers_and_leaves_out_what_is_empty():
    quantities = dict.fromkeys(
        ("questions", "samples", "prompt_tokens", "teacher_tokens", "traces", "responses"), 2160
    )
    hours = dict.fromkeys(("training_hours", "generation_hours", "evaluation_hours"), 0.0)
    plan = {"section": "44_samples", "arms": 13, "training_seeds": 1, "students": 16}
    plan |= {**quantities, **hours, "money": None, "training_tokens": 5_290_309}
    plan |= {"seconds": 430.909767379679, "evaluations": 35, "done": 3, "shares_with": []}
    text = repr(Plan({**plan, "minutes": 7.18, "basis": "rates"}))
    assert "430.9" not in text and "hours" not in text and "shares" not in text
    lines = {line[:16].strip(): line[17:] for line in text.splitlines()}
    assert lines["arms"] == "13 × 1 training seed"
    assert lines["training tokens"] == "5.29 M"
    assert lines["money"] == "not known"
    assert lines["evaluations"] == "35, of which 3 are done"
    assert lines["time"] == "7 min (rates)"


@pytest.mark.parametrize("reading", ["generated", "likelihood"])
def test_a_figure_shows_the_reading_of_the_claims_with_its_own_chance(reading):
    rows = [
        row(0.5, chance=0.25, paper=0.8),
        row(0.6, chance=0.3, reading="likelihood", paper=None),
        row(0.9, chance=0.3, reading=reading, joins="unseen"),
    ]
    apart = {"joins": "unseen", "reading": "likelihood"}
    measured = {"rows": rows, "claims": [{"joins": "all", "reading": reading}, apart]}
    assert find_reading(measured) == reading
    (drawn,) = list_drawn_rows(measured)
    shown = {"generated": (0.5, 0.25), "likelihood": (0.6, 0.3)}[reading]
    assert (drawn["accuracy"], drawn["chance"]) == shown
    assert drawn["paper"] == 0.8, "the paper's number stands beside either"
    ax = draw_accuracies([drawn], reading=reading).axes[0]
    words = {"generated": "as written", "likelihood": "by likelihood"}[reading]
    assert ax.get_xlabel() == f"accuracy {words}, %"
    key = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("paper" if reading == "generated" else "paper, as written") in key
