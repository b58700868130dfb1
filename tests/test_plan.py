"What a plan states before anything runs."

from dataclasses import replace

import pytest

import octomed.clinic.graders
import octomed.clinic.students
import octomed.clinic.teachers  # noqa: F401 - the three imports register what the plans name
from octomed.core.recipe import Common, Recipe, load_recipe
from octomed.evaluate.arms import Arm, schedule_of
from octomed.run.plan_rates import RATES, READ, find_speed
from octomed.run.plan_sections import plan_section

COMMON = Common(
    train=("clinic_ward:train",), benchmarks=("clinic_ward:test",), benchmark_limit=10, samples=16
)
RECIPE = Recipe("r", COMMON)
ARM = Arm((("clinic_ward:train", 30),), schedule=schedule_of(COMMON, 2.0))


def test_tokens_and_money_of_the_teacher_are_known_before():
    plan = plan_section(RECIPE, "none", {"a": ARM})
    assert plan["samples"] == 480
    assert plan["teacher_tokens"] == 480 * RATES["clinic_tokens"]["text"]
    assert plan["money"] == pytest.approx(
        480 * (80 * 0.55e-6 + RATES["clinic_tokens"]["text"] * 2.19e-6), rel=0.05
    )


def test_samples_that_arms_share_are_paid_once():
    one = plan_section(RECIPE, "none", {"a": ARM})
    two = plan_section(
        RECIPE, "none", {"a": ARM, "b": replace(ARM, k=4), "c": replace(ARM, keep="all")}
    )
    assert two["samples"] == one["samples"]
    assert two["money"] == one["money"]
    assert two["training_tokens"] > one["training_tokens"]


def test_a_teacher_without_a_price_gives_no_money(tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text("models: {}")
    monkeypatch.setenv("OCTOMED_PRICES", str(tmp_path / "p.yaml"))
    assert plan_section(RECIPE, "none", {"a": ARM})["money"] is None


def test_known_answers_cost_no_teacher():
    plan = plan_section(RECIPE, "none", {"a": replace(ARM, form="direct", k=0)})
    assert plan["samples"] == plan["teacher_tokens"] == plan["money"] == 0


def test_a_student_that_others_start_from_is_counted_once_and_no_epoch_costs_nothing():
    first = replace(ARM, sources=(("clinic_ward:train", 8),))
    alone = plan_section(RECIPE, "none", {"a": ARM})
    more = plan_section(
        RECIPE,
        "none",
        {
            "before": replace(ARM, base=first, schedule=replace(ARM.schedule, epochs=0)),
            "a": replace(ARM, base=first),
        },
    )
    assert (
        more["training_tokens"] - alone["training_tokens"]
        == plan_section(RECIPE, "none", {"a": first})["training_tokens"]
    )


def test_what_the_student_draws_for_a_filter_is_counted():
    plain, asked = (
        plan_section(RECIPE, "none", {"a": a})
        for a in (ARM, replace(ARM, filter=("student", 0.125, 0.875)))
    )
    assert asked["responses"] - plain["responses"] == 30 * 16


HUB = "Qwen/Qwen2.5-VL-7B-Instruct@cc594898137f460bfe9f0759e9844b3ce807cfb5"


def test_device_hours_of_a_hub_student_by_hand():
    from octomed.train.sizing import (
        Load,
        estimate_drawing_hours,
        estimate_training_hours,
        load_shape,
    )

    common = replace(COMMON, student=HUB, eval_seeds=5)
    plan = plan_section(replace(RECIPE, common=common), "none", {"a": replace(ARM, k=4)})
    traces, prompt, response = 30 * 4, RATES["prompt_tokens"]["r1"], RATES["paper_tokens"]
    assert plan["training_tokens"] == traces * (prompt + response) * 2
    s, tokens = load_shape(HUB), traces * (prompt + response) * 2
    assert plan["training_hours"] == pytest.approx(
        estimate_training_hours(s, Load(tokens, prompt + response, answered=traces * response * 2)),
        rel=0.05,
    )
    assert plan["evaluation_hours"] == pytest.approx(
        estimate_drawing_hours(s, Load(10 * prompt, prompt), 50 * response, prompt + response / 2),
        rel=0.05,
    )
    assert plan["generation_hours"] == 0
    assert plan["minutes"] == round(
        60
        * (
            plan.demand.by_stage["training_hours"].popitem()[1]
            + plan.demand.by_stage["evaluation_hours"].popitem()[1]
        )
        / 8
    )


def test_an_unknown_configuration_gives_no_hours(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = plan_section(
        replace(RECIPE, common=replace(COMMON, student="nobody/nothing")), "none", {"a": ARM}
    )
    assert plan["training_hours"] is plan["minutes"] is None
    assert "nobody/nothing" in plan["basis"]


def test_a_pool_gives_no_more_than_it_has():
    from octomed.data.sources import find_source

    plan = plan_section(
        RECIPE, "none", {"a": replace(ARM, sources=(("clinic_ward:train", 10**9),))}
    )
    assert plan["questions"] == find_source("clinic_ward:train").expected


def test_a_pretrained_student_is_planned_by_its_own_speed():
    slow = find_speed("clinic/smol")
    assert slow.train_tokens < find_speed("clinic/tiny").train_tokens / 20
    plan = plan_section(RECIPE, "none", {"a": replace(ARM, student="clinic/smol")})
    arm = slow.time_training(30 * slow.row_tokens["cot"] * 2) + slow.time_answers(10, "cot")
    reading = slow.time_training(sum(READ.values()))
    assert plan["minutes"] == pytest.approx((arm + reading) / 60, abs=0.02)
    assert plan["basis"] == "measured rates of clinic/smol on two slow cores"


def test_the_real_recipe_takes_at_most_ninety_minutes(own_places):
    from octomed.run.plan import plan

    section, every = plan("real")
    assert (section["section"], section["arms"]) == ("42_formatting", 3)
    assert 30 < every["minutes"] <= 90
    assert every["money"] is not None


def test_ratings_are_paid_by_question(tmp_path, monkeypatch):
    difficult = replace(ARM, filter=("difficulty", 3, 6))
    assert (
        plan_section(RECIPE, "none", {"a": difficult})["money"]
        > plan_section(RECIPE, "none", {"a": ARM})["money"]
    )
    assert (
        plan_section(RECIPE, "none", {"a": replace(difficult, grader="openai:unknown@X")})["money"]
        is None
    )


def recipe_of(path, name, *sections):
    "A recipe with some of another's sections, as a file."
    import yaml

    from octomed.core.paths import root

    raw = yaml.safe_load((root() / "nbs" / "recipes" / f"{name}.yaml").read_text())
    path.write_text(yaml.safe_dump({**raw, "sections": {s: raw["sections"][s] for s in sections}}))
    return str(path)


def test_what_sections_share_is_counted_once_in_all(tmp_path, own_places):
    from octomed.run.plan import plan

    first, second, every = plan(
        recipe_of(tmp_path / "two.yaml", "smoke", "42_formatting", "55_cases")
    )
    assert second["training_tokens"] > 0
    assert every["training_tokens"] == first["training_tokens"]
    assert every["samples"] == first["samples"]
    assert first["minutes"] > 0 == second["minutes"]
    assert every["minutes"] == first["minutes"]  # section 55 uses the student of 42


def test_the_papers_plan_needs_no_data_and_says_all(tmp_path, own_places, monkeypatch):
    import json

    from octomed.data.sources import SOURCES
    from octomed.run.plan import plan

    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    before = dict(SOURCES)
    plans = plan(recipe_of(tmp_path / "paper.yaml", "paper", "41_sourcing", "44_samples"))
    many, few, every = plans
    assert before.items() <= SOURCES.items()
    assert few["questions"] == 10_178
    assert few["samples"] == 10_178 * 16
    assert few["traces"] == sum(
        round(10_178 * min(k, 16 * RATES["acceptance"])) for k in (1, 4, 16)
    )  # the three accepted sets, whatever is trained on them
    assert few["responses"] == few["evaluations"] * 1_273 * 5
    assert few["teacher_tokens"] == few["samples"] * 850
    assert few["money"] == pytest.approx(few["samples"] * (80 * 0.55e-6 + 850 * 2.19e-6), rel=0.02)
    assert every["samples"] == many["samples"] + few["samples"]
    assert None not in (
        every["money"],
        every["minutes"],
        every["training_hours"],
        every["evaluation_hours"],
    )
    assert {r["machine"] for r in every["memory"]} == {"8 × 80 GB", "1 × 141 GB"}
    assert "bcss:train" in every["not_at_hand"]
    assert any("46 %" in a for a in every["assumptions"])
    assert json.loads(json.dumps(plans))[-1]["section"] == "in all"
    assert all(len(line) <= 120 for line in str(plans).splitlines()), str(plans)


@pytest.mark.parametrize("recipe", ["course", "gpu", "paper"])
def test_a_whole_recipe_is_planned_without_data(own_places, monkeypatch, recipe):
    from octomed.run.plan import plan

    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    mri, *_, every = plans = plan(recipe)
    assert mri["section"] == "30_dataset"
    assert mri["questions"] == 3 * 2_870
    assert mri["training_tokens"] > 0
    assert "brain_tumor:train" in every["not_at_hand"]
    assert {p["section"] for p in plans} >= {
        "41_sourcing",
        "51_scaling",
        "53_datasets",
    }
    assert None not in (every["samples"], every["money"], every["minutes"])


def test_a_part_of_a_recipe_is_planned(own_places, monkeypatch):
    from octomed.core.paths import UsageError
    from octomed.run.plan import plan

    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    planned = plan("smoke", only="44_samples,42_formatting")
    assert [row["section"] for row in planned] == ["42_formatting", "44_samples", "in all"]
    with pytest.raises(UsageError, match="has no section 99_nothing"):
        plan("smoke", only="99_nothing")


def test_a_plan_of_no_questions_divides_by_nothing(own_places, monkeypatch, tmp_path):
    from octomed.run.plan import plan

    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smoke\nsections: {42_formatting: {questions: 0}}")
    section, in_all = plan(str(path), only="42_formatting")
    assert (section["section"], in_all["section"]) == ("42_formatting", "in all")
    chance = 2 * 3  # forms and categories
    assert section["arms"] == in_all["arms"] == 3 + chance


def write_recipe(folder, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_variant_shows_what_it_adds_to_its_base(own_places, tmp_path):
    from octomed.run.plan import plan

    mine = write_recipe(tmp_path, "extends: smoke\nsections: {42_formatting: {seeds: 2}}\n")
    planned = plan(mine, only="42_formatting,45_teacher")
    assert planned.beside["base"] == "smoke"
    rows = {row["section"]: row for row in planned.beside["new"]}
    base = plan("smoke", only="42_formatting")[0]
    # The first of two seeds is the base's own, and so are the teacher's samples and the six chance
    # students, which have one seed and two benchmarks each.
    assert rows["42_formatting"]["samples"] == 0
    of_chance = 6 * 2 * load_recipe("smoke").common.benchmark_limit
    assert rows["42_formatting"]["responses"] == base["responses"] - of_chance > 0
    assert not any(rows["45_teacher"][key] for key in ("samples", "responses", "training_tokens"))
    text = str(planned)
    assert "What it adds to smoke, which it extends" in text and " s\n" in text
    own = write_recipe(tmp_path, "extends: smoke\n")
    assert "It asks for nothing that smoke does not make" in str(plan(own, only="42_formatting"))
    assert plan("smoke", only="42_formatting").beside is None


def test_a_section_says_whose_samples_it_reads(own_places):
    from octomed.run.plan import plan

    planned = plan("smoke", only="42_formatting,52_calibration,55_cases")
    assert [section["shares_with"] for section in planned[:-1]] == [
        [],
        ["42_formatting"],
        ["42_formatting", "52_calibration"],
    ]
    assert "55_cases reads samples that 42_formatting and 52_calibration draw" in str(planned)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "runs no section"),
        ("sections: {}", "runs no section"),
        ("sections: {30: {}}", "did you mean 30_dataset?"),
        ("sections: {42_formatting: {}}", "an arm has no training pool: write one"),
        ("extends: smoke\ncommon: {train: []}", "an arm has no training pool"),
        ("extends: smoke\ncommon: {train: ['nowhere:x']}", "mine.yaml line 2: there is no source"),
        ("extends: smoke\ncommon: {train: ['medqa:trian']}", "choose from medqa:train"),
        ("extends: smoke\ncommon: {benchmarks: ['medqa:tset']}", "mine.yaml line 2: there is no"),
        (
            "extends: smoke\ncommon: {train: ['pubmedvision:instruct']}",
            "which holds chats and no questions",
        ),
        ("extends: smoke\ncommon: {benchmarks: []}", "54_families needs a benchmark of text_only"),
        ("extends: smoke\nsections: {54_families: {warm: 0}}", "54_families has no parameter warm"),
        ("extends: smoke\nsections: {54_families: {families: Qwen}}", "knows no family Qwen"),
        (
            "extends: smoke\nsections: {30_dataset: {size: huge}}",
            "no student is registered as scratch/mri-huge",
        ),
        ("extends: smoke\nsections: {42_formatting: {epochs: 0}}", "must be a number above 0"),
    ],
)
def test_a_recipe_that_cannot_be_planned_says_why(own_places, tmp_path, text, sentence):
    from octomed.core.paths import UsageError
    from octomed.run.plan import plan

    with pytest.raises(UsageError) as error:
        plan(write_recipe(tmp_path, text))
    assert sentence in str(error.value) and "\n" not in str(error.value)
