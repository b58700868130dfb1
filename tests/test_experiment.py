"Arms, and the findings that claims get."

import time
from dataclasses import replace
from itertools import product

import pytest
from declarations import declared

import octomed.clinic.graders  # registers the grader
import octomed.clinic.manners  # registers the wordings
import octomed.clinic.students  # noqa: F401 - registers the students
from octomed.core.paths import OctomedError, UsageError
from octomed.core.recipe import Common, Recipe
from octomed.distill.filters import FILTERS
from octomed.distill.pools import read_questions
from octomed.evaluate.arms import Arm, declare_stages, list_read_joins
from octomed.evaluate.claims import Claim, judge_claim
from octomed.evaluate.results import Results
from octomed.evaluate.results_file import write_results
from octomed.evaluate.tables import compare_arms, compare_parts, show_findings, tabulate_scores
from octomed.train.schedule import Schedule

COMMON = Common(
    train=("clinic_ward:train", "clinic_rounds:train", "clinic_reading:train"),
    benchmarks=("clinic_ward:test",),
    samples=4,
)
ARM = Arm((("clinic_ward:train", 10),))
PICTURED = Arm((("clinic_rounds:train", 10),))


def test_what_an_arm_leaves_alone_stays_the_same_stage():
    plain = declare_stages(ARM, COMMON)
    kept = declare_stages(replace(ARM, keep="all"), COMMON)
    assert kept["samples"] == plain["samples"]
    assert kept["accepted"] != plain["accepted"]
    assert declare_stages(replace(ARM, control=9), COMMON)["student"] == plain["student"]
    other = declare_stages(replace(ARM, teacher=COMMON.teacher_image), COMMON)
    assert other["data"] == plain["data"]
    assert other["samples"] != plain["samples"]
    assert (
        declare_stages(replace(ARM, teacher=COMMON.teacher_text), COMMON)["samples"].params[
            "teachers"
        ]["text"]
        == plain["samples"].params["teachers"]["text"]
    )


def test_every_filter_is_a_stage_between_the_same_data_and_samples():
    plain = declare_stages(PICTURED, COMMON)
    for name, window in FILTERS.items():
        steps = declare_stages(replace(PICTURED, filter=(name, *window)), COMMON)
        assert steps["data"] == plain["data"]
        assert steps["samples"] == plain["samples"]
        assert steps["accepted"].params["questions"] == steps["filtered"]
        assert steps["student"] != plain["student"]
    two = declare_stages(replace(ARM, filter=("teachers", 1, 1)), COMMON)["filtered"].params[
        "evidence"
    ]
    assert len(two) == 2
    assert two[0] == declare_stages(ARM, COMMON)["samples"]


def test_the_student_filter_asks_the_student_that_the_arm_starts_from():
    first = Arm((("clinic_ward:train", 3),))
    steps = declare_stages(
        replace(PICTURED, base=first, filter=("student", *FILTERS["student"])), COMMON
    )
    (asked,) = steps["filtered"].params["evidence"]
    assert (
        asked.params["student"]
        == declare_stages(first, COMMON)["student"]
        == steps["student"].params["base"]
    )


def test_the_grader_of_a_filter_is_the_recipe_s_unless_an_arm_has_its_own():
    from octomed.generate.engines import register_teacher

    register_teacher("test/other-grader", None, "1")

    def graded(arm, common):
        return (
            declare_stages(replace(arm, filter=("difficulty", *FILTERS["difficulty"])), common)[
                "filtered"
            ]
            .params["evidence"][0]
            .params["grader"]
        )

    assert graded(PICTURED, COMMON) == "clinic/grader"
    assert (
        graded(PICTURED, replace(COMMON, grader="test/other-grader"))
        == graded(replace(PICTURED, grader="test/other-grader"), COMMON)
        == "test/other-grader"
    )


def test_no_epoch_is_the_base_student_itself():
    first = Arm((("clinic_ward:train", 3),))
    assert (
        declare_stages(replace(ARM, base=first, schedule=Schedule(epochs=0)), COMMON)["student"]
        == declare_stages(first, COMMON)["student"]
    )


def test_an_arm_as_formatting_declares_it_expands_as_before():
    steps = declare_stages(ARM, COMMON)
    names = ["data", "samples", "accepted", "rendered", "trained", "student"]
    assert list(steps) == names
    assert steps["trained"] == steps["student"]
    assert steps["accepted"].params["keep"] == "correct"
    assert steps["accepted"].params["questions"] == steps["data"]


def results(**arms):
    def rows(right, seed):
        return [
            {
                "question": str(n),
                "statuses": ["correct" if r else "wrong"],
                "letters": ["A"],
                "forced": [False],
                "tokens": [3],
                "options": 4,
            }
            for n, r in enumerate(right)
        ]

    return Results(
        replace(COMMON, bootstrap=500),
        {
            a: {"clinic_ward:test": [rows(right, s) for s, right in enumerate(seeds)]}
            for a, seeds in arms.items()
        },
    )


def test_a_trend_is_the_rise_from_its_first_place_to_its_last():
    n = 40
    r = results(
        **{
            f"k{k}": [[i < n * share for i in range(n)]] * 2
            for k, share in ((1, 0.2), (4, 0.4), (16, 0.6))
        }
    )
    f = judge_claim(
        Claim(
            text="it rises",
            a="k16",
            b="k1",
            benchmark="clinic_ward:test",
            kind="trend",
            along=(("k1", 0), ("k4", 2), ("k16", 4)),
        ),
        r,
    )
    assert f["difference"] == pytest.approx(0.4)
    assert f["by_seed"] == pytest.approx([0.4, 0.4])
    assert f["outcome"] == "holds"
    assert f["training_seeds"] == 2
    falls = judge_claim(
        Claim(
            text="it rises",
            a="k1",
            b="k16",
            benchmark="clinic_ward:test",
            kind="trend",
            along=(("k16", 0), ("k4", 2), ("k1", 4)),
        ),
        r,
    )
    assert falls["difference"] == pytest.approx(-0.4)
    assert falls["outcome"] == "fails"


BETTER = Claim(text="a is better", a="a", b="b", benchmark="clinic_ward:test")


def lines_that_fail(finding):
    return [(line["of"], line["what"]) for line in finding["gate"] if not line["passed"]]


def test_a_claim_about_students_at_chance_is_not_tested():
    at_chance = [1, 0, 0, 0] * 50  # of four options
    finding = judge_claim(BETTER, results(a=[at_chance], b=[[0] * 200]))
    assert finding["interval"][0] > 0
    assert finding["outcome"] == "not tested"
    assert lines_that_fail(finding) == [("a", "above chance")]
    beyond = judge_claim(BETTER, results(a=[[1, 1, 0, 0] * 50], b=[at_chance]))
    assert (beyond["outcome"], lines_that_fail(beyond)) == ("holds", [])


def test_a_claim_about_responses_that_cannot_be_read_is_not_tested():
    r = results(a=[[1, 1, 1, 0] * 50], b=[[1, 1, 0, 0] * 50])
    for place, row in enumerate(r.rows["b"]["clinic_ward:test"][0]):
        if place % 4 == 3:
            row["statuses"] = ["truncated" if place % 8 == 3 else "unparsed"]
    finding = judge_claim(BETTER, r)
    assert lines_that_fail(finding) == [("b", "unread")]
    assert finding["gate"][1]["value"] == 0.25
    assert finding["outcome"] == "not tested"


def test_a_claim_at_the_ceiling_is_not_tested():
    nearly = [1] * 39 + [0]
    finding = judge_claim(BETTER, results(a=[[1] * 200], b=[nearly * 5]))
    assert lines_that_fail(finding) == [("b", "below the ceiling")]
    assert finding["outcome"] == "not tested"
    below = judge_claim(BETTER, results(a=[[1] * 200], b=[[1, 1, 1, 0] * 50]))
    assert below["outcome"] == "holds"


def test_a_difference_by_seed_is_a_minus_b():
    r = results(a=[[1, 1, 1, 0], [1, 0, 0, 0]], b=[[0, 1, 0, 0], [1, 0, 0, 0]])
    f = judge_claim(Claim(text="a is better", a="a", b="b", benchmark="clinic_ward:test"), r)
    assert f["by_seed"] == pytest.approx([0.5, 0.0])
    assert f["difference"] == pytest.approx(0.25)


def test_an_equivalence_needs_its_margin():
    r = results(a=[[1, 0] * 20], b=[[1, 0] * 20])
    assert (
        judge_claim(
            Claim(
                text="equal",
                a="a",
                b="b",
                benchmark="clinic_ward:test",
                kind="equivalent",
                margin=0.05,
            ),
            r,
        )["outcome"]
        == "holds"
    )
    with pytest.raises(OctomedError, match="margin"):
        judge_claim(
            Claim(text="equal", a="a", b="b", benchmark="clinic_ward:test", kind="equivalent"), r
        )


def test_frames_show_every_row_and_leave_out_what_no_row_has():
    r = results(a=[[1, 0, 1, 1]], b=[[0, 0, 1, 1]])
    rows = tabulate_scores(r)
    frame = compare_arms(rows, beside=("shuffled",))
    assert list(frame.index) == ["a", "b"], "an Overall of one benchmark stands for it"
    assert set(frame.columns.get_level_values(0)) == {"clinic_ward:test"}
    assert set(frame.columns.get_level_values(1)) == {"accuracy", "chance", "unread"}
    with_paper = compare_arms(
        [row | {"paper": 0.9, "shuffled": 0.5} for row in rows], ("shuffled",)
    )
    assert with_paper["clinic_ward:test", "paper"].tolist() == ["90.0", "90.0"]
    assert with_paper["clinic_ward:test", "shuffled"].tolist() == ["50.0", "50.0"]
    alone = compare_arms([row for row in rows if row["arm"] == "a"])
    assert list(alone.index) == ["clinic_ward:test"], "of one arm, benchmarks stand down the side"
    shown = show_findings(
        [judge_claim(Claim(text="a is better", a="a", b="b", benchmark="clinic_ward:test"), r)]
    )
    assert shown.loc[0, "points"] == "+25.0"
    assert shown.loc[0, "paper"] == "no such arm"


def results_with_joins(**arms):
    "Made-up results: two questions for each of a held-out join, two for training, and no join."
    tags = [
        {"join": "migraine/test", "held_out": True},
        {"join": "angina/dx", "held_out": False},
        {"join": "angina/test", "held_out": False},
        {},
    ]
    r = results(**arms)
    for by_benchmark in r.rows.values():
        for rows in by_benchmark["clinic_ward:test"]:
            for n, row in enumerate(rows):
                row["tags"] = tags[n % 4]
    return r


def with_read(monkeypatch, r, **read):
    "The same results, of arms that have read these joins."
    trained = {name: Arm((("clinic_ward:train", 1),), seed=n) for n, name in enumerate(read)}
    joins = {arm: read[name] for name, arm in trained.items()}
    monkeypatch.setattr("octomed.evaluate.results.list_read_joins", lambda arm, common: joins[arm])
    return replace(r, arms=trained)


def test_a_claim_and_a_table_can_be_about_one_part_of_the_joins(monkeypatch):
    a, b = [1, 1, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0, 1, 1]
    plain = results_with_joins(a=[a], b=[b])
    r = with_read(monkeypatch, plain, a={"angina/dx", "angina/test"}, b={"angina/dx"})
    expected = {"all": (8, 0.125), "seen": (2, 0.5), "unseen": (2, 1.0)}
    for part, (n, difference) in expected.items():
        claim = Claim(text="a", a="a", b="b", benchmark="clinic_ward:test", joins=part)
        f = judge_claim(claim, r)
        assert (f["joins"], f["n"]) == (part, n)
        assert f["difference"] == pytest.approx(difference)
    rows = tabulate_scores(r, {("a", "clinic_ward:test"): 0.9}, joins=("all", "seen", "unseen"))
    of_a = [row for row in rows if row["arm"] == "a" and row["benchmark"] == "clinic_ward:test"]
    shown = {row["joins"]: (row["n"], row["accuracy"], row["paper"]) for row in of_a}
    assert shown == {"all": (8, 0.5, 0.9), "seen": (2, 0.5, None), "unseen": (2, 1.0, None)}
    divided = compare_parts(rows)
    assert divided["unseen", "n"].tolist() == ["2 of 1 joins"] * 2
    assert divided["seen", "n"].tolist() == ["2", "2"]
    assert divided.loc[("clinic_ward:test", "a"), ("all", "accuracy")].startswith("50.0")
    whole = compare_parts(tabulate_scores(r))
    assert set(whole.columns.get_level_values(0)) == {"all"}


def test_a_part_without_questions_has_no_row_and_an_unknown_one_is_refused(monkeypatch):
    r = with_read(monkeypatch, results(a=[[1, 0]]), a=set())
    assert tabulate_scores(r, joins=("unseen",)) == tabulate_scores(r, joins=("seen",)) == []
    with pytest.raises(UsageError, match="choose from all, seen, unseen"):
        r.take_joins("old")
    with pytest.raises(OctomedError, match="run_arms"):
        results(a=[[1, 0]]).take_joins("seen")


def test_an_arm_has_read_the_joins_of_its_questions_and_of_its_base(own_places):
    common = Common(
        train=("clinic_ward:train",),
        benchmarks=("clinic_ward:test",),
        student="clinic/mini",
        max_pixels=3136,
    )
    first = Arm((("clinic_ward:train", 6),), form="direct", k=0)
    second = replace(first, sources=(("clinic_ward:train", -3),), base=first)
    untrained = replace(first, schedule=replace(first.schedule, epochs=0))
    told = Arm((("clinic_captions:instruct", 40),), form="direct", k=0)
    read = list_read_joins(first, common)
    asked = read_questions(declare_stages(first, common)["data"].folder)
    assert read == {q.tags["join"] for q in asked} and 3 <= len(read) <= 6
    assert read < list_read_joins(second, common)
    assert list_read_joins(untrained, common) == set()
    assert all("/" in join for join in list_read_joins(told, common))
    assert list_read_joins(told, common)


def test_rewordings_keep_the_truth_and_stay_in_the_training_split():
    from octomed.clinic.manners import load_families
    from octomed.clinic.oracles import answer_by_composition
    from octomed.clinic.questions import split_by_id

    for family in load_families()[:5]:
        assert len({q.id for q in family}) == 16
        assert len({(q.options, q.answer) for q in family}) == 1
        assert not any(split_by_id(q.id) != "train" for q in family)
        assert {answer_by_composition(q) for q in family} == {family[0].answer}
    assert load_families()[0][0].id == load_families()[0][5].tags["like"]


SECTIONS = ("43_filtering", "44_samples", "45_teacher", "51_scaling", "53_datasets")


def declare(section, recipe="course"):
    import importlib

    module = importlib.import_module(f"octomed.paper.{section[3:]}")
    return module, *declared(module, recipe)


@pytest.mark.parametrize("section", [*SECTIONS, "54_families"])
def test_claims_are_about_arms_and_benchmarks_that_exist(section):
    from octomed.evaluate.results import category_of
    from octomed.evaluate.stats import KINDS

    module, recipe, arms = declare(section)
    places = {
        *module.benchmarks(recipe),
        *(category_of(b) for b in module.benchmarks(recipe)),
        getattr(module, "EVERYWHERE", None),
        getattr(module, "REASONING", None),
    }
    known = {*arms, *getattr(module, "BESIDE", ())}
    for family in getattr(module, "FAMILIES", ()):  # a recipe may leave some out
        known |= {family, module.name_base(family)}
    for c in module.claims():
        assert {c.a, c.b} | {a for a, _ in c.along} <= known
        assert c.benchmark in places
        assert c.kind in KINDS
        assert c.not_proved
        assert (c.kind == "equivalent") == (c.margin is not None)
        assert (c.kind == "trend") == bool(c.along)
    assert any(c.paper for c in module.claims())
    assert any(not c.paper for c in module.claims())


def test_filters_read_equal_tokens_and_are_the_paper_windows():
    module, recipe, arms = declare("43_filtering")
    whole = arms[module.name(module.NONE, module.END)]
    for f in module.NAMES:
        run = arms[module.name(f, module.END)]
        assert run == replace(whole, filter=(f, *FILTERS[f]), compute_of=whole)
    assert FILTERS["student"] == FILTERS["teacher"] == (2 / 16, 14 / 16)
    assert FILTERS["difficulty"] == (3, 6)
    assert recipe.scalars("43_filtering")["lowest"] == 2 / 16


@pytest.mark.parametrize("recipe", ["smoke", "course"])
def test_the_points_of_a_filter_are_checkpoints_of_one_run(recipe):
    from octomed.paper import sourcing

    module, scoped_recipe, arms = declare("43_filtering", recipe)
    common = scoped_recipe.common
    trained = {}
    for f in (module.NONE, *module.NAMES):
        along = [arms[module.name(f, at)] for at in module.POINTS]
        assert [arm.at for arm in along] == list(module.POINTS)
        (trained[f],) = {declare_stages(arm, common)["trained"] for arm in along}
        assert len({declare_stages(arm, common)["student"] for arm in along}) == len(along)
    assert len(set(trained.values())) == 1 + len(module.NAMES)
    alike = scoped_recipe.with_scalars(
        "41_sourcing", **{**scoped_recipe.scalars("43_filtering"), "each": 1}
    )
    assert sourcing.arms(alike)["reasoning"] == arms[module.name(module.NONE, module.END)]


def test_peaks_of_filters_are_read_from_the_rows_of_the_benchmark():
    module, *_ = declare("43_filtering")
    rows = []
    for f, point in product((module.NONE, *module.NAMES), module.POINTS):
        accuracy = 0.5 * point if f == module.NONE else 0.4
        row = {"arm": module.name(f, point), "benchmark": "clinic_rounds:test"}
        shown = {**row, "accuracy": accuracy, "joins": "all", "reading": "generated"}
        rows += [shown, {**shown, "joins": "unseen", "accuracy": 0.9}]
        rows.append({**shown, "reading": "likelihood", "accuracy": 0.9})
        rows.append({**shown, "benchmark": "Overall", "accuracy": 0.9})
    none, *filtered = module.find_peaks({"rows": rows})
    assert (none["peak"], none["at"], none["near the unfiltered peak at"]) == (0.5, 1.0, 1.0)
    assert {(row["peak"], row["near the unfiltered peak at"]) for row in filtered} == {(0.4, None)}


def test_the_figure_of_filters_has_a_panel_for_each_with_bands_and_chance():
    module, *_ = declare("43_filtering")
    names = [
        "before",
        *(module.name(f, p) for f in (module.NONE, *module.NAMES) for p in module.POINTS),
    ]
    rows = [
        {
            "arm": name,
            "benchmark": "clinic_rounds:test",
            "accuracy": 0.5,
            "interval": [0.4, 0.6],
            "chance": 0.3,
        }
        for name in names
    ]
    axes = module.figure({"rows": rows}).axes
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == list(module.FILTER_WORDS.values())
    for ax in axes:
        assert len(ax.collections) == 2
        assert [list(line.get_ydata()) for line in ax.lines[-1:]] == [[30, 30]]
        assert list(ax.lines[0].get_xdata()) == [0, *module.POINTS]


@pytest.mark.parametrize("section", ["41_sourcing", "43_filtering", "44_samples", "45_teacher"])
def test_every_student_starts_from_the_recipes_base(section):
    _, _, arms = declare(section)
    assert {(arm.base, arm.student) for arm in arms.values()} == {(None, "")}
    assert arms["before"].schedule.epochs == 0
    assert all(arm.schedule.epochs for name, arm in arms.items() if name != "before")


def test_minutes_of_sections_side_by_side_are_their_share_of_the_machine(monkeypatch):
    def minutes():
        results = write_results(
            None,
            "42_formatting",
            Recipe("r", Common(), {}),
            claims=[],
            rows=[],
            started=time.time() - 600,
        )
        return results["card"]["minutes"]

    assert 10 <= minutes() < 11
    monkeypatch.setenv("OCTOMED_BESIDE", "2")
    assert 5 <= minutes() < 5.5
