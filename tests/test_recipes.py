"Whether every recipe can be run as it stands, says of the paper what the paper says, and can be rehearsed."

import json
import os

import pytest

from octomed.core.paths import UsageError
from octomed.core.recipe import Common, Recipe, load_recipe, recipes
from octomed.data.sources import NAMED, SOURCES, source_of
from octomed.generate.engines import KINDS, teacher_revision
from octomed.run.sections import declared, parameters, sections


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_gives_what_its_notebooks_declare(name):
    recipe = load_recipe(name)
    for s in sections(recipe):
        assert s.module.__name__.startswith("octomed.paper.") and parameters(
            s, recipe
        ).keys() == declared(s).keys() - {"recipe", "out"}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_names_sources_in_their_roles_and_teachers_that_there_are(name):
    recipe = load_recipe(name)
    c = recipe.common
    assert (
        c.train
        and {source_of(s).role for s in c.train} == {"train"}
        and {source_of(b).role for b in c.benchmarks} == {"benchmark"}
    )
    for p in recipe.sections.values():
        for k in ("benchmark", "inside", "outside"):
            assert k not in p or p[k] in SOURCES
    for t in (c.teacher_text, c.teacher_image, c.grader):
        teacher_revision(t)


def test_the_paper_recipe_has_the_papers_numbers():
    c, s = load_recipe("paper").common, load_recipe("paper").sections
    assert (c.samples, c.batch, c.lr, c.warmup, c.max_pixels, c.max_tokens) == (
        16,
        128,
        5e-5,
        0.01,
        262_144,
        8_192,
    )  # §2, §4: training; §5: evaluation
    assert (c.temperature, c.top_p, c.eval_seeds, c.bootstrap, c.benchmark_limit) == (
        0.6,
        0.95,
        5,
        10_000,
        0,
    )
    assert (
        c.train == NAMED
        and all(SOURCES[b].category for b in c.benchmarks)
        and "medmcqa:dev" in c.benchmarks
    )  # its test labels are not public
    student, _, commit = c.student.partition("@")
    assert student == "Qwen/Qwen2.5-VL-7B-Instruct" and len(commit) == 40 == len(
        commit.strip("ghijklmnopqrstuvwxyz")
    )

    def kind(t):
        return (t.partition(":")[0] in KINDS, t.partition(":")[2].rpartition("@")[0])

    assert [kind(t) for t in (c.teacher_text, c.teacher_image, c.grader)] == [
        (True, "deepseek-ai/DeepSeek-R1"),
        (True, "gpt-4o"),
        (True, "gpt-4.1-mini"),
    ]
    assert (
        s["43_filtering"]["lowest"] == 2 / 16
        and s["43_filtering"]["benchmark"] == "pmc_vqa:test"
        and s["44_samples"]["source"] == "medqa:train"
        and s["45_teacher"]["epochs"] == 1
    )

    def asked(n, pools):
        return sum(min(n, SOURCES[p].expected or 0) for p in pools)

    assert asked(s["42_formatting"]["questions"], c.train) == pytest.approx(100_000, rel=0.01)
    assert asked(
        s["45_teacher"]["questions"], [p for p in c.train if SOURCES[p].category == "text_only"]
    ) == pytest.approx(30_000, rel=0.01)
    assert all(
        SOURCES[p].expected is None or s["41_sourcing"]["questions"] // 5 <= SOURCES[p].expected
        for p in c.train
        if SOURCES[p].category != "multimodal_reasoning"
    )
    assert all(not p.get("warm") and p.get("seeds") == 1 for n, p in s.items() if n != "30_dataset")


def test_the_gpu_recipe_has_three_training_seeds_an_arm_and_pools_that_are_large_enough():
    recipe = load_recipe("gpu")
    assert recipe.common.student != load_recipe("course").common.student and set(
        recipe.sections
    ) == set(load_recipe("course").sections)
    for s in sections(recipe):
        assert parameters(s, recipe).get("seeds", 3) >= 3
    for p in recipe.sections.values():
        assert all(
            p.get("questions", 0) + p.get("warm", 0) <= SOURCES[pool].expected
            for pool in recipe.common.train
        )


@pytest.mark.timeout(900)
def test_a_rehearsal_goes_through_the_papers_code_and_touches_nothing_of_its_own(
    tmp_path, monkeypatch
):
    from octomed.run.rehearsal import rehearse

    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.delenv("OCTOMED_STORE", raising=False)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    before, environment = dict(SOURCES), dict(os.environ)
    assert rehearse("paper", "44_samples") == {"ran": ["44_samples"], "skipped": []}
    assert before == SOURCES and dict(os.environ) == environment
    folder = tmp_path / "out" / "paper-rehearsal"
    results = json.loads((folder / "results" / "44_samples.json").read_text())
    assert (
        results["recipe"] == "paper-rehearsal"
        and {r["benchmark"] for r in results["rows"]} == {"medqa:test"}
        and len(results["claims"]) == 4
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["paper-rehearsal"]
    told = (folder / "run.log").read_text()
    assert "nothing of it is a finding" in told and "left out, since nowhere at hand: " in told
    models = {
        json.loads(line)["model"]
        for f in (folder / "store").rglob("requests.jsonl")
        for line in f.open()
    }
    assert models == {"deepseek-ai/DeepSeek-R1@rehearsal"}  # never taken for the real model's
    assert rehearse("paper", "44_samples") == {
        "ran": [],
        "skipped": ["44_samples"],
    }  # a second rehearsal finds it done


@pytest.mark.timeout(900)
def test_a_rehearsal_has_the_images_at_the_size_that_a_sections_own_student_sees(
    tmp_path, monkeypatch
):
    from octomed.run.rehearsal import rehearse

    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.delenv("OCTOMED_STORE", raising=False)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    assert load_recipe("paper").common.max_pixels > Common().max_pixels
    assert rehearse("paper", "30_dataset") == {"ran": ["30_dataset"], "skipped": []}
    rows = json.loads(
        (tmp_path / "out" / "paper-rehearsal" / "results" / "30_dataset.json").read_text()
    )["rows"]
    assert {r["benchmark"] for r in rows} >= {"brain_tumor:test"} and all(r["n"] for r in rows)


def test_a_rehearsals_chats_ask_for_no_picture_that_is_not_at_hand(tmp_path, monkeypatch):
    from octomed.run.rehearsal import handful

    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    for spec, pictures in (
        ("pubmedvision:alignment", True),
        ("pubmedvision:instruct", True),
        ("llava_med:instruct", False),
    ):
        rows, where = handful(spec, 4, (12_544,))
        parts = [p for r in rows for p in r["messages"][0]["content"]]
        assert (
            rows
            and where == "the examples"
            and "name:" not in json.dumps(rows)
            and all(p["text"] for p in parts if p["type"] == "text")
        )
        assert (
            any(r["images"] for r in rows) == any(p["type"] == "image" for p in parts) == pictures
        )


def test_a_name_that_another_section_reads_and_no_recipe_gives_is_told():
    recipe = Recipe("mine", sections={"51_scaling": {"questions": 8}})
    with pytest.raises(
        UsageError,
        match="recipe mine gives 51_scaling no warm_epochs, which another section reads there: add it",
    ):
        recipe.of("51_scaling")["warm_epochs"]
