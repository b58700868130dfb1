"""Whether every recipe can be run as it is, gives the paper's numbers, and can be rehearsed."""

import json
import os
from functools import cache

import pytest

from octomed.core.paths import UsageError
from octomed.core.recipe import Common, Recipe, list_recipes, load_recipe
from octomed.data.sources import NAMED, SOURCES, find_source
from octomed.generate.engines import KINDS, find_teacher_revision
from octomed.run.sections import find_sections, read_defaults, read_parameters


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_gives_what_its_notebooks_declare(name):
    recipe = load_recipe(name)
    for section in find_sections(recipe, ",".join(recipe.sections)):
        assert section.module.__name__.startswith("octomed.paper.")
        given = read_parameters(section, recipe).keys()
        assert given == read_defaults(section).keys() - {"recipe", "out"}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_names_sources_in_their_roles_and_teachers_that_exist(name):
    recipe = load_recipe(name)
    common = recipe.common
    assert common.train
    assert {find_source(pool).role for pool in common.train} == {"train"}
    assert {find_source(benchmark).role for benchmark in common.benchmarks} == {"benchmark"}
    for scalars in recipe.sections.values():
        for key in ("benchmark", "inside", "outside"):
            assert key not in scalars or scalars[key] in SOURCES
    for teacher in (common.teacher_text, common.teacher_image, common.grader):
        find_teacher_revision(teacher)


def test_the_paper_recipe_has_the_papers_training_and_evaluation():
    common = load_recipe("paper").common
    # §2 and §4: training
    assert common.samples == 16
    assert common.batch == 128
    assert common.lr == 5e-5
    assert common.warmup == 0.01
    assert common.max_pixels == 262_144
    # §5: evaluation
    assert common.max_tokens == 8_192
    assert common.temperature == 0.6
    assert common.top_p == 0.95
    assert common.eval_seeds == 5
    assert common.bootstrap == 10_000
    assert common.benchmark_limit == 0


def test_the_paper_recipe_has_the_papers_sources_student_and_teachers():
    common = load_recipe("paper").common
    assert common.train == NAMED
    assert all(SOURCES[benchmark].category for benchmark in common.benchmarks)
    assert "medmcqa:dev" in common.benchmarks  # its test labels are not public
    student, _, commit = common.student.partition("@")
    assert student == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert len(commit) == 40 == len(commit.strip("ghijklmnopqrstuvwxyz"))

    def split(teacher):
        kind, _, name = teacher.partition(":")
        return kind in KINDS, name.rpartition("@")[0]

    assert split(common.teacher_text) == (True, "deepseek-ai/DeepSeek-R1")
    assert split(common.teacher_image) == (True, "gpt-4o")
    assert split(common.grader) == (True, "gpt-4.1-mini")


def test_the_paper_recipe_has_the_papers_sections():
    recipe = load_recipe("paper")
    train, scalars = recipe.common.train, recipe.sections
    assert scalars["43_filtering"]["lowest"] == 2 / 16
    assert scalars["43_filtering"]["benchmark"] == "pmc_vqa:test"
    assert scalars["44_samples"]["source"] == "medqa:train"
    assert scalars["45_teacher"]["epochs"] == 1

    def total(each, pools):
        return sum(min(each, SOURCES[pool].expected or 0) for pool in pools)

    text_only = [pool for pool in train if SOURCES[pool].category == "text_only"]
    assert total(scalars["42_formatting"]["questions"], train) == pytest.approx(100_000, rel=0.01)
    assert total(scalars["45_teacher"]["questions"], text_only) == pytest.approx(30_000, rel=0.01)
    for pool in train:
        source = SOURCES[pool]
        if source.category != "multimodal_reasoning" and source.expected is not None:
            assert scalars["41_sourcing"]["questions"] // 5 <= source.expected
    for name, values in scalars.items():
        if name != "30_dataset":
            assert values.get("seeds") == 1


def test_the_gpu_recipe_has_three_training_seeds_an_arm_and_pools_that_are_large_enough():
    recipe, course = load_recipe("gpu"), load_recipe("course")
    assert recipe.common.student != course.common.student
    assert set(recipe.sections) == set(course.sections)
    for section in find_sections(recipe):
        assert read_parameters(section, recipe).get("seeds", 3) >= 3
    for scalars in recipe.sections.values():
        needed = scalars.get("questions", 0)
        assert all(needed <= SOURCES[pool].expected for pool in recipe.common.train)


def test_a_rehearsal_has_the_usual_sections_of_its_recipe(tmp_path):
    from octomed.run.rehearsal import _write_recipe, shrink_recipe

    recipe = load_recipe("real")
    small = shrink_recipe(recipe, {*recipe.common.train, *recipe.common.benchmarks})
    written = load_recipe(str(_write_recipe(small, tmp_path / "small.yaml")))
    assert written.usual == recipe.usual == ("42_formatting",)
    assert written.sections.keys() == recipe.sections.keys()


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    "The folder in which a rehearsal of the recipe `paper` leaves what it makes."
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.delenv("OCTOMED_STORE", raising=False)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    return tmp_path / "out" / "paper-rehearsal"


@pytest.mark.timeout(900)
def test_a_rehearsal_goes_through_the_papers_code_and_touches_nothing_of_its_own(rehearsed):
    from octomed.run.rehearsal import rehearse

    sources, environment = dict(SOURCES), dict(os.environ)
    assert rehearse("paper", "44_samples") == {"ran": ["44_samples"], "skipped": []}
    assert {name: SOURCES[name] for name in sources} == sources
    added = (
        SOURCES.keys() - sources.keys()
    )  # what the recipe's plugins register, if none had before
    assert all(name.startswith("clinic_") for name in added)
    assert {name: os.environ[name] for name in environment} == environment
    assert not [name for name in os.environ.keys() - environment.keys() if "OCTOMED" in name]
    results = json.loads((rehearsed / "results" / "44_samples.json").read_text())
    assert results["recipe"] == "paper-rehearsal"
    assert {row["benchmark"] for row in results["rows"]} == {"medqa:test"}
    assert len(results["claims"]) == 4
    assert [path.name for path in rehearsed.parent.iterdir()] == ["paper-rehearsal"]
    log = (rehearsed / "run.log").read_text()
    assert "nothing of it is a finding" in log
    assert "left out, since nowhere at hand: " in log
    models = set()
    for file in (rehearsed / "store").rglob("requests.jsonl"):
        models |= {json.loads(line)["model"] for line in file.open()}
    # Its answers are never taken for the real model's.
    assert models == {"deepseek-ai/DeepSeek-R1@rehearsal"}
    # A second rehearsal finds it done.
    assert rehearse("paper", "44_samples") == {"ran": [], "skipped": ["44_samples"]}


@pytest.mark.timeout(900)
def test_a_rehearsal_has_the_images_at_the_size_that_a_sections_own_student_reads(rehearsed):
    from octomed.run.rehearsal import rehearse

    assert load_recipe("paper").common.max_pixels > Common().max_pixels
    assert rehearse("paper", "30_dataset") == {"ran": ["30_dataset"], "skipped": []}
    rows = json.loads((rehearsed / "results" / "30_dataset.json").read_text())["rows"]
    assert {row["benchmark"] for row in rows} >= {"brain_tumor:test"}
    assert all(row["n"] for row in rows)


@pytest.mark.parametrize(
    ("source", "has_pictures"),
    [
        ("pubmedvision:alignment", True),
        ("pubmedvision:instruct", True),
        ("llava_med:instruct", False),
    ],
)
def test_a_rehearsals_chats_ask_for_no_picture_that_is_not_at_hand(
    tmp_path, monkeypatch, source, has_pictures
):
    from octomed.run.rehearsal import take_handful

    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    rows, where = take_handful(source, 4, (12_544,))
    assert rows
    assert where == "the examples"
    assert "name:" not in json.dumps(rows)
    parts = []
    for row in rows:
        parts += row["messages"][0]["content"]
    assert all(part["text"] for part in parts if part["type"] == "text")
    assert any(part["type"] == "image" for part in parts) == has_pictures
    assert any(row["images"] for row in rows) == has_pictures


def test_a_name_that_another_section_reads_and_no_recipe_gives_is_reported():
    recipe = Recipe("mine", sections={"51_scaling": {"questions": 8}})
    message = "recipe mine gives 51_scaling no epochs, which another section reads there: add it"
    with pytest.raises(UsageError, match=message):
        recipe.scalars("51_scaling")["epochs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("common: [1, 2]", "mine.yaml line 1 is no recipe: common holds names and values"),
        ("sections: {44_samples: 3}", "mine.yaml line 1 is no recipe: section 44_samples"),
        ("- a list", "mine.yaml is no recipe"),
        ("common: {batchsize: 3}", "line 1 has an unknown key batchsize in common"),
        ("commun: {batch: 3}", "line 1 has an unknown key commun: did you mean common"),
        (
            "common: {batch: many}",
            "mine.yaml line 1: batch must be a whole number of at least 1, not 'many'",
        ),
        (
            "common: {train: medqa}",
            "mine.yaml line 1: train must be a list, each entry a text such as medqa:train",
        ),
        ("common: {lr: fast}", "mine.yaml line 1: lr must be a number above 0, not 'fast'"),
        ("common: {", "mine.yaml line 1 is not YAML"),
        ("", "mine.yaml is empty: write extends: smoke"),
        ("common: {temperature: -1}", "temperature must be a number of at least 0"),
        ("common: {temperature: .nan}", "temperature must be a number of at least 0, not nan"),
        ("common: {top_p: 2}", "top_p must be a number above 0 and at most 1, not 2"),
        ("common: {top_p: 0}", "top_p must be a number above 0 and at most 1, not 0"),
        ("common: {warmup: 1}", "warmup must be a number of at least 0 and below 1, not 1"),
        ("common: {samples: 0}", "samples must be a whole number of at least 1, not 0"),
        ("common: {batch: 1.5}", "batch must be a whole number of at least 1, not 1.5"),
        ("common: {batch: true}", "batch must be a whole number of at least 1, not true"),
        ("common: {batch: '8'}", "write 8 without quotation marks"),
        ("common: {batch: }", "batch must be a whole number of at least 1, but has no value"),
        ("common: {lr: .inf}", "above 0 and at most 1,000,000,000,000, not inf"),
        ("common: {answer: word}", "answer must be one of letter, text"),
        ("common: {train: [medqa: train]}", "write medqa:train, without a blank"),
        ("common: {train: ['a:b', 'a:b']}", "has a:b twice"),
        ("common: {batch: 010}", "read 010 differently: write a decimal number"),
        ("common: {batch: 1:30}", "read 1:30 differently"),
        ("common: {batch: 1_000}", "without underscores"),
        ("common:\n  lr: 1\n  lr: 2", "line 3 gives lr again, after line 2"),
        ("common: {batch: 4}\n---\nsections: {}", "several documents"),
        ("common:\n\tbatch: 4", "indented with a tab"),
        ("common: {[1]: 2}", "a key must be a name"),
        ("common: &a {batch: *a}", "contains itself"),
        ("42_formatting: {questions: 3}", "write it under sections:"),
        ("common: {42_formatting: {questions: 3}}", "write it under sections:"),
        ("lr: 1", "write it under common:"),
        ("extends: mine.yaml", "extends mine.yaml in its turn"),
        ("extends: curse", "there is no recipe curse"),
        ("common: {plugins: [no_such_module]}", "the plugin no_such_module, which cannot be"),
    ],
)
def test_a_malformed_recipe_is_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def write_recipe(tmp_path, text: str) -> str:
    "The path of a recipe with this text."
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_numbers_are_read_as_yaml_1_2_writes_them_and_keep_one_type(tmp_path):
    text = "common: {lr: 1e-4, temperature: 1, batch: 1e2}\nsections: {30_dataset: {lr: 5e-5}}"
    recipe = load_recipe(write_recipe(tmp_path, text))
    values = (recipe.common.lr, recipe.common.temperature, recipe.common.batch)
    assert list(map(repr, values)) == ["0.0001", "1.0", "100"]
    assert recipe.scalars("30_dataset")["lr"] == 5e-5


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "42_formatting",
            "epochs: -1.0",
            "epochs of 42_formatting must be a number above 0, not -1",
        ),
        ("42_formatting", "seeds: 0", "must be a whole number of at least 1, not 0"),
        ("30_dataset", "lr: 0.0", "must be a number above 0, not 0.0"),
        ("30_dataset", "epochs: '8'", "must be float, not '8'"),
    ],
)
def test_a_sections_value_out_of_range_is_refused_with_its_line(tmp_path, section, value, message):
    text = f"extends: smoke\nsections:\n  {section}:\n    {value}\n"
    recipe = load_recipe(write_recipe(tmp_path, text))
    [own] = find_sections(recipe, section)
    with pytest.raises(UsageError, match=message) as error:
        read_parameters(own, recipe)
    assert str(error.value).startswith("mine.yaml line 4: ")


def test_a_few_lines_of_aliases_are_refused_before_they_are_written_out(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9)]
    with pytest.raises(UsageError, match="more than 20,000 values"):
        load_recipe(write_recipe(tmp_path, "\n".join(lines)))


def test_a_variant_changes_what_it_names_and_keeps_the_rest(tmp_path):
    smoke = load_recipe("smoke")
    text = "extends: smoke\ncommon: {batch: 3}\nsections: {42_formatting: {questions: 30}}"
    (tmp_path / "base.yaml").write_text(text, encoding="utf-8")
    variant = load_recipe(write_recipe(tmp_path, "extends: base.yaml\ncommon: {samples: 2}"))
    assert (variant.common.batch, variant.common.samples) == (3, 2)
    assert variant.common.lr == smoke.common.lr
    changed = smoke.scalars("42_formatting") | {"questions": 30}
    assert variant.scalars("42_formatting") == changed
    assert variant.sections.keys() == smoke.sections.keys()


def test_the_usual_sections_are_meant_where_none_is_named(tmp_path):
    text = "extends: smoke\nusual: [42_formatting]"
    recipe = load_recipe(write_recipe(tmp_path, text))
    assert [section.name for section in find_sections(recipe)] == ["42_formatting"]
    assert [section.name for section in find_sections(recipe, "55_cases")] == ["55_cases"]
    (tmp_path / "heir.yaml").write_text("extends: mine.yaml", encoding="utf-8")
    assert load_recipe(str(tmp_path / "heir.yaml")).usual == ("42_formatting",)
    (tmp_path / "heir.yaml").write_text("extends: mine.yaml\nusual: []", encoding="utf-8")
    assert load_recipe(str(tmp_path / "heir.yaml")).usual == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("usual: [42_formating]", "42_formating, which it does not have: did you mean 42_form"),
        ("usual: 42_formatting", "line 2: usual must be a list"),
        ("usual: [42_formatting, 42_formatting]", "usual has 42_formatting twice"),
        ("common: {usual: [42_formatting]}", "usual is no part of common"),
    ],
)
def test_usual_sections_that_are_none_are_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(write_recipe(tmp_path, f"extends: smoke\n{text}"))


def test_the_real_recipe_is_section_42_with_a_pretrained_student_and_the_gpu_has_it_too():
    recipe = load_recipe("real")
    assert [section.name for section in find_sections(recipe)] == ["42_formatting"]
    assert recipe.sections.keys() == load_recipe("course").sections.keys()
    assert recipe.common.student == load_recipe("gpu").common.student == "clinic/smol"
    own = recipe.scalars("42_formatting")
    assert (own["questions"] <= 500, own["epochs"], own["seeds"]) == (True, 2.0, 1)
    categories = {SOURCES[pool].category for pool in recipe.common.train}
    assert len(categories) == 3


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("extends: mine.yaml", encoding="utf-8")
    with pytest.raises(UsageError, match="in its turn: extend another recipe"):
        load_recipe(write_recipe(tmp_path, "extends: other.yaml"))


def test_a_benchmark_is_no_training_pool(tmp_path):
    text = "extends: smoke\ncommon:\n  train: ['medqa:test']"
    recipe = load_recipe(write_recipe(tmp_path, text))
    with pytest.raises(UsageError, match=r"line 3 trains on medqa:test, which is a benchmark"):
        find_sections(recipe)


def test_the_schema_is_shipped_beside_the_recipes_that_name_it():
    from octomed.core.paths import shipped_recipes
    from octomed.run.recipe_schema import make_recipe_schema

    kept = json.loads(shipped_recipes("schema.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(make_recipe_schema())), "octomed schema > its file"
    for path in shipped_recipes().glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == "# yaml-language-server: $schema=schema.json"


@cache
def make_validator():
    from jsonschema import Draft202012Validator

    from octomed.run.recipe_schema import make_recipe_schema

    return Draft202012Validator(make_recipe_schema())


def list_schema_errors(text: str) -> list[str]:
    from octomed.core.yaml_files import parse_yaml

    value = parse_yaml(text, "r.yaml").value
    return [error.json_path for error in make_validator().iter_errors(value)]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("common: {temperature: -1}", "$.common.temperature"),
        ("common: {top_p: 2}", "$.common.top_p"),
        ("common: {lr: '1e-4'}", "$.common.lr"),
        ("common: {studnet: x}", "$.common"),
        ("common: {train: [1]}", "$.common.train[0]"),
        ("common: {answer: word}", "$.common.answer"),
        ("sections: {42_formatting: {seeds: 0}}", "$.sections['42_formatting'].seeds"),
        ("sections: {42_formatting: {qestions: 1}}", "$.sections['42_formatting']"),
        ("42_formatting: {}", "$"),
        ("[1]", "$"),
    ],
)
def test_the_schema_marks_what_the_command_line_refuses(tmp_path, text, place):
    from octomed.core.paths import UsageError
    from octomed.run.plan import plan

    assert list_schema_errors(text) == [place]
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        plan(str(tmp_path / "r.yaml"))


def test_the_schema_takes_what_the_command_line_takes():
    text = "extends: course\ncommon: {lr: 1e-4, bootstrap: 1e4}\nsections: {30_dataset: }\n"
    assert list_schema_errors(text) == []


VALUES = [
    *("0", "1", "-1", "1.5", "2.0", "1e12", "1e13", "1e30", ".inf", "-.inf", "1e-400"),
    *("true", "null", "x", "''", "' '", "'a:b:c'", "[]", "[1]", "{a: 1}"),
]


def is_refused(path, section=None):
    try:
        recipe = load_recipe(path)
        if section:
            read_parameters(*find_sections(recipe, section), recipe)
    except UsageError as error:
        assert "line 3" in str(error) or "line 4" in str(error)
        return True
    return False


@pytest.mark.parametrize("value", VALUES)
def test_the_schema_and_the_command_agree_on_every_shared_value(tmp_path, value):
    from octomed.core.recipe import common_types

    for name in common_types():
        text = f"extends: smoke\ncommon:\n  {name}: {value}\n"
        refused = is_refused(write_recipe(tmp_path, text))
        assert refused == bool(list_schema_errors(text)), name


@pytest.mark.parametrize("value", [*VALUES, "adamw", "clinic_ward:test"])
def test_the_schema_and_the_command_agree_on_the_values_of_sections(tmp_path, value):
    names = {
        "30_dataset": ("images", "epochs", "optimizer", "lr", "seeds"),
        "43_filtering": ("benchmark", "lowest", "limit"),
        "53_datasets": ("captions", "each"),
    }
    for section, parameters in names.items():
        for name in parameters:
            text = f"extends: smoke\nsections:\n  {section}:\n    {name}: {value}\n"
            refused = is_refused(write_recipe(tmp_path, text), section)
            is_spec = refused and value == "'a:b:c'"  # no source has the name
            assert refused == bool(list_schema_errors(text)) or is_spec, (section, name)


SECTION_FAULTS = {
    "42_formatting: {qestions: 1}": "mine.yaml line 3: 42_formatting has no parameter qestions",
    "99_other: {}": "mine.yaml line 3 names 99_other, which has no notebook",
    "42_formatting: []": "mine.yaml line 3 is no recipe: section 42_formatting holds names",
    "30_dataset: {optimizer: x}": "mine.yaml line 3: optimizer of 30_dataset must be one of adamw",
    "43_filtering: {benchmark: nothere:test}": "mine.yaml line 3: benchmark of 43_filtering: there "
    "is no source nothere:test",
    "51_scaling: {smaller: clinic/none}": "mine.yaml line 3: smaller of 51_scaling: no student is",
    "54_families: {families: x}": "mine.yaml line 3: 54_families knows no family x",
}


@pytest.mark.parametrize("fault", SECTION_FAULTS)
def test_a_fault_in_a_section_names_file_and_line(tmp_path, fault):
    from octomed.run.plan import plan

    path = write_recipe(tmp_path, f"extends: smoke\nsections:\n  {fault}\n")
    with pytest.raises(UsageError) as error:
        plan(path, only=fault.split(":")[0])
    assert str(error.value).startswith(SECTION_FAULTS[fault])


@pytest.mark.parametrize(
    "fault",
    ["student: clinic/none", "teacher_text: none", "teacher_image: vllm:x", "grader: none"],
)
def test_a_model_that_no_one_knows_is_named_with_file_and_line(tmp_path, fault):
    recipe = load_recipe(write_recipe(tmp_path, f"extends: smoke\ncommon:\n  {fault}\n"))
    with pytest.raises(UsageError, match=f"^mine.yaml line 3: {fault.split(':')[0]}: "):
        find_sections(recipe)
