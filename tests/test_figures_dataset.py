"The dataset's section: what is counted, what is dropped, and the figure that shows it."

from dataclasses import replace
from itertools import chain

import octomed.clinic.graders  # registers the clinic's grader
import octomed.clinic.teachers  # noqa: F401 - registers the clinic's questions and teachers
from octomed.clinic.questions import load_questions
from octomed.core.recipe import Common, Recipe
from octomed.data.decontaminate import decontaminate
from octomed.data.questions import Question
from octomed.data.sources import NAMED, SOURCES
from octomed.paper import dataset as D


def question(stem, answer="A", **fields):
    "A made-up question; any field may be given."
    defaults = {
        "stem": stem,
        "options": ("yes", "no"),
        "answer": answer,
        "source": "clinic_ward",
        "split": "train",
        "category": "text_only",
    }
    return Question(**(defaults | fields))


LONG = (
    "a woman of middle age comes to the clinic with a rash that has been there for two weeks "
    "and does not itch"
)
TRAIN = [
    question(LONG + " today"),
    question("Is this a fact?"),
    question("is this  a FACT?", options=("no", "maybe")),
    question("Is that another one?"),
]
BENCH = {
    "one:test": [
        question(LONG + " and with fever"),
        question("is this a fact?", options=("no", "yes")),
    ],
    "two:test": [question("Is this a fact?")],
}


def reports():
    return D.find_contamination({"clinic_ward:train": TRAIN}, BENCH)


def test_reports_over_one_index_are_those_of_each_pair():
    for (_, b), r in reports().items():
        alone = decontaminate(TRAIN, BENCH[b])
        assert (r.flagged, r.exact, r.exact_options, r.blind, r.rows, r.bench_rows) == (
            alone.flagged,
            alone.exact,
            alone.exact_options,
            alone.blind,
            alone.rows,
            alone.bench_rows,
        )


def test_fault_25_every_training_row_is_kept_or_dropped_once_for_its_strongest_reason():
    (row,) = D.count_by_source(reports())
    assert row["rows"] == 4
    assert row["kept"] == 1
    assert sum(v for k, v in row.items() if k not in ("train", "rows")) == 4
    assert sorted(v for k, v in row.items() if k not in ("train", "rows", "kept")) == [1, 1, 1]


def test_fault_24_pairs_tell_drops_boilerplate_and_what_the_rule_cannot_see():
    one, two = D.count_by_pair(reports())
    assert (
        one["flagged"],
        one["exact"],
        one["dropped"],
        one["kept"],
        one["blind"],
        one["bench_rows"],
    ) == (1, 2, 3, 1, 1, 2)
    assert (two["flagged"], two["covered"], two["blind"]) == (0, None, 1)
    assert one["covered"] > 0.8
    assert one["boilerplate"] == 0
    assert (one["other options"], two["other options"]) == (1, 1)


def test_matches_are_shown_from_the_least_covered_to_the_most():
    shown = D.list_matches(reports(), most=2)
    assert [m["covered"] for m in shown] == sorted(m["covered"] for m in shown)
    assert len(shown) == 4
    assert any(m["words in common"].startswith("a woman of middle age") for m in shown)


def test_fault_21_copies_and_conflicting_labels_are_counted():
    qs = [question("?", a) for a in "ABAAB"]
    assert D.count_repeats(qs, ["p", "p", "q", "q", "r"]) == {
        "images": 5,
        "distinct": 3,
        "with a copy": 4,
        "too many": 2,
        "labels in conflict": 2,
    }
    assert D.count_repeats([], [])["images"] == 0


def test_what_the_named_sources_leave_open_grows_with_rejection():
    rows = D.compute_open_part((1.0, 0.5))
    counts = sum(SOURCES[s].expected or 0 for s in NAMED)
    assert [r["traces left open"] for r in rows] == [
        8_000_000 - 16 * counts,
        8_000_000 - 8 * counts,
    ]
    assert rows[0]["questions that would fill it"] == round(rows[0]["traces left open"] / 16)
    assert rows[1]["questions that would fill it"] == round(rows[1]["traces left open"] / 8)


def test_the_paper_counts_and_the_given_questions_are_two_things():
    (counted,) = D.count_listed("brain_tumor:train", "paper")
    assert (counted["questions"], counted["modality"], counted["region"]) == (2_870, "MRI", "brain")
    assert D.count_listed("bcss:train", "paper") == []  # no count is given, and none is made up
    (text,) = D.count_listed("medqa:train", "at hand", [question("?")] * 3)
    assert (text["questions"], text["modality"]) == (3, None)
    (untagged,) = D.count_listed(
        "pmc_vqa:train",
        "at hand",
        [question("?", images=("name:a.jpg",), category="multimodal_reasoning")],
    )
    assert untagged["modality"] == D.UNKNOWN


def test_labels_without_images_are_not_at_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOMED_DATA", str(tmp_path))
    assert not D.are_askable(
        [
            question(
                "?", source="aptos", category="multimodal_classification", images=("name:x.png",)
            )
        ]
    )
    assert D.are_askable([question("?")])
    assert not D.are_askable([])


def test_a_grader_tags_the_clinic_nearly_as_its_world_does():
    qs = load_questions("clinic_rounds", "train", limit=60, max_pixels=None)
    agreement = D.measure_agreement(qs)
    assert agreement["asked"] == 60
    assert 45 <= agreement["modality"] < 60
    assert 45 <= agreement["region"] <= 60


RECIPE = Recipe("smoke", replace(Common(), train=("clinic_ward:train",)))


def test_the_pilot_is_the_teachers_stated_quality():
    (row,) = D.run_pilot(RECIPE, 20)
    assert row["samples"] == 320
    assert 0.6 < row["accepted"] < 0.95
    assert row["tokens"] > 20
    assert D.run_pilot(Recipe("none", replace(Common(), train=("medqa:train",)))) == []


def test_the_composition_is_drawn_with_and_without_real_files():
    named = chain.from_iterable(D.count_listed(source, "paper") for source in NAMED)
    rows = list(named) + D.count_listed("clinic_ward:train", "clinic", [question("?")] * 50)
    pilot = [{"source": "clinic_ward:train", "accepted": 0.5, "tokens": 10.0}]
    shown = D.make_panels(rows)
    assert [r["name"] for r in shown["Modality of the images"]][-1] == D.UNKNOWN
    assert {
        "MedQA",
        "clinic_ward",
    } <= {r["name"] for r in shown["Task types and sources"]}
    assert (
        next(r for r in shown["Task types and sources"] if r["name"] == "MedQA")["paper"] == 11_450
    )
    facts = D.summarise(rows, pilot)
    assert facts[1][3] == f"about {SOURCES['clinic_ward:train'].expected * 8:,}"
    assert facts[0][2] == "0"
    fig = D.composition_figure({"panels": shown, "statistics": facts})
    assert len(fig.axes) == 4
    assert D.summarise(rows, [])[2][3] == "–"
