"""What every section notebook and every recipe must hold, whichever there are."""

import ast
import datetime
import json
from itertools import chain
from pathlib import Path

import pytest
import yaml

from octomed.core.code import section_digest
from octomed.core.paths import (
    OctomedError,
    UsageError,
    root,
    shipped_notebooks,
    shipped_recipes,
)
from octomed.core.recipe import Recipe, list_recipes, load_recipe
from octomed.run.sections import Section, find_sections, read_defaults, read_parameters

NOTEBOOKS = sorted(shipped_notebooks().glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
RECIPES = pytest.mark.parametrize("name", list_recipes())


def cells(path, kind="code"):
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == kind]


def tagged(path):
    return [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]


@EVERY
def test_exactly_one_parameters_cell_with_recipe_and_out(path):
    assert len(tagged(path)) == 1
    values = read_defaults(Section(path.stem, path))
    assert values["recipe"] == "smoke"
    assert values.pop("out") is None
    assert all(isinstance(value, int | float | str) for value in values.values()), (
        "a section's own parameters are scalars"
    )


@EVERY
def test_parameters_are_not_exported(path):
    source = "".join(tagged(path)[0]["source"])
    assert not source.lstrip().startswith("#|")
    module = root() / "octomed" / "paper" / f"{path.stem.partition('_')[2]}.py"
    assignments = [
        node
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
    ]
    targets = chain.from_iterable(node.targets for node in assignments)
    top = {target.id for target in targets if isinstance(target, ast.Name)}
    assert not top & {"recipe", "out"}


@EVERY
def test_module_keeps_the_contract(path):
    section = Section(path.stem, path)
    assert section.module.__name__ == f"octomed.paper.{path.stem.partition('_')[2]}"
    for function in ("arms", "claims", "figure"):
        assert callable(getattr(section.module, function, None))
    assert isinstance(section.module.claims(), list)


@EVERY
def test_committed_sections_carry_no_executed_parameters(path):
    tags = chain.from_iterable(cell["metadata"].get("tags", []) for cell in cells(path))
    assert "injected-parameters" not in set(tags)
    assert "papermill" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


@EVERY
def test_smoke_values_are_the_defaults(path):
    own = read_defaults(Section(path.stem, path))
    del own["recipe"], own["out"]
    assert load_recipe("smoke").sections.get(path.stem) == own


@RECIPES
def test_recipes_name_only_what_notebooks_declare(name):
    recipe = load_recipe(name)
    for section in find_sections(recipe):
        assert set(recipe.scalars(section.name)) <= set(read_parameters(section, recipe))


@RECIPES
def test_recipes_run_in_the_paper_order(name):
    recipe = load_recipe(name)
    named = recipe.usual or recipe.sections
    assert [section.name for section in find_sections(recipe)] == sorted(named)


def test_no_executed_copy_lies_under_nbs():
    for path in (root() / "nbs").rglob("*.ipynb"):
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        assert '"papermill"' not in json.dumps(metadata), path.name


def test_recipe_values_carry_their_reason_or_size():
    "Every recipe is plain YAML: what it holds is what `load_recipe` gives."
    for name in list_recipes():
        raw = yaml.safe_load(shipped_recipes(f"{name}.yaml").read_text(encoding="utf-8"))
        if "extends" in raw:
            raw["sections"] = load_recipe(raw["extends"]).sections | raw["sections"]
        assert load_recipe(name).sections == {
            section: values or {} for section, values in raw["sections"].items()
        }


BARE = 'recipe = "smoke"\nout = None\n'


def leave(folder, *sources, text=None, tags=("parameters",), cell=None, **notebook):
    "A section whose notebook is left as given: its cells, or its whole text."
    cells = [{"cell_type": "code", "source": source} for source in sources]
    if cells:
        cells[0]["metadata"] = {"tags": list(tags)}
    if cell:
        cells.append(cell)
    content = json.dumps({"cells": cells, **notebook}) if text is None else text
    path = folder / "1_a.ipynb"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Section("1_a", path)


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("n: int = 1  # count", {"n": 1}),
        ("n = 1; m = 2", {"n": 1, "m": 2}),
        ("a, b = 1, 'x'", {"a": 1, "b": "x"}),
        ("a = b = -1.5", {"a": -1.5, "b": -1.5}),
        ("xs = [\n    1,\n    2,\n]", {"xs": [1, 2]}),
        ("note = '''two\nlines'''", {"note": "two\nlines"}),
        ("n = 1\nn = 2", {"n": 2}),
        ("n: int\nm = {'a': [None, True]}", {"m": {"a": [None, True]}}),
        ("import os\n'a remark'\n%matplotlib inline\nn = 1", {"n": 1}),
        ("n = 1\r\nm = 2\r\n", {"n": 1, "m": 2}),
    ],
)
def test_parameters_are_read_however_they_are_written(tmp_path, source, values):
    declared = read_defaults(leave(tmp_path, BARE + source))
    assert declared == {"recipe": "smoke", "out": None, **values}


@pytest.mark.parametrize(
    "source",
    [
        "n = float('nan')",
        "n = 1 + 2",
        "n = {1, 2}",
        "n = 1j",
        "n = b'x'",
        "n = 1e999",
        "n = {1: 2}",
        "if True:\n    n = 1",
        "n = 1\nn += 1",
        "a, *b = [1, 2]",
        "a.b = 1",
        "n = (",
    ],
)
def test_what_is_no_plain_parameter_is_named_with_its_cell(tmp_path, source):
    with pytest.raises(OctomedError, match=r"cell 1 of 1_a\.ipynb"):
        read_defaults(leave(tmp_path, BARE + source))


@pytest.mark.parametrize(
    ("declared", "value", "refused"),
    [
        ("n = 1", 3, None),
        ("n = 1", None, "must be int, not None"),
        ("n: int | None = 1", None, None),
        ("n: 'Optional[int]' = 1", "x", "must be int or None, not 'x'"),
        ("n: float = 1", 0.5, None),
        ("n: int = None", "three", "must be int or None, not 'three'"),
        ("n: list[int] = [1]", [2, 3], None),
        ("n: Path = 'x'", 5, None),
        ("n = None", "three", None),
        ("n = None", datetime.date(2024, 1, 1), "is 2024-01-01: write a finite number"),
        ("n = 'x'", datetime.date(2024, 1, 1), "must be str, not"),
        ("n = 0.1", float("nan"), "is nan: write a finite number"),
        ("n = [0.1]", [float("inf")], "write a finite number"),
        ("n = True", 0, "must be bool, not 0"),
        ("n = True", "False", "must be bool, not 'False'"),
        ("n = (1, 2)", [3], None),
    ],
)
def test_a_recipes_value_fits_the_declaration(tmp_path, declared, value, refused):
    section = leave(tmp_path, BARE + declared)
    recipe = Recipe("r", sections={"1_a": {"n": value}})
    if refused is None:
        assert read_parameters(section, recipe) == {"n": value}
    else:
        with pytest.raises(UsageError) as caught:
            read_parameters(section, recipe)
        assert refused in str(caught.value)
        assert "n of 1_a" in str(caught.value)


MARKS = "<<<<<<< HEAD\nx = 1\n=======\nx = 2\n>>>>>>> other"


@pytest.mark.parametrize(
    ("left", "sentence"),
    [
        ({"text": ""}, "1_a.ipynb is empty"),
        ({"text": MARKS}, "marks of a merge in line 1"),
        ({"text": '{"cells": [}'}, "is not JSON in line 1"),
        ({"text": "[]"}, "is no notebook"),
        ({"text": "[" * 100_000}, "is not JSON"),
        ({"text": "{}"}, "has no cells"),
        ({"text": '{"cells": null}'}, "has no cells"),
        ({"text": '{"cells": [3]}'}, "cell 1 of 1_a.ipynb is neither code nor text"),
        ({"text": '{"cells": [], "nbformat": 9}'}, "version 9 of the notebook format"),
        ({"text": '{"cells": []}'.encode("utf-16")}, "is not UTF-8 text"),
        ({"metadata": {"kernelspec": {"language": "R"}}}, "is written in R"),
        ({"cell": {"cell_type": "code", "source": 5}}, "cell 1 of 1_a.ipynb has no readable text"),
        ({"text": '{"cells": []}'}, "has 0 cells tagged parameters"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, left, sentence):
    with pytest.raises(OctomedError) as caught:
        read_defaults(leave(tmp_path, **left))
    assert sentence in str(caught.value)


def test_an_older_format_and_a_byte_order_mark_are_read(tmp_path):
    cell = {"cell_type": "code", "input": [BARE, "n = 4"], "metadata": {"tags": ["parameters"]}}
    old = {"nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": [cell]}]}
    section = leave(tmp_path, text=b"\xef\xbb\xbf" + json.dumps(old).encode())
    assert read_defaults(section)["n"] == 4


def digest_of(folder, *sources):
    leave(folder, BARE, *sources)
    return section_digest("1_a", folder)


@pytest.mark.parametrize(
    "source",
    [
        "%matplotlib inline",
        "%%bash\necho hi | grep h && ls",
        "!ls -la",
        "files = !ls",
        "print?",
        "??print",
        "%%writefile x.py\nnot python here !",
        "%%time\nx = 1",
        "    indented = 1",
        ">>> x = 1",
        "await something",
        "x = '''\n%magic in a text\n!too\n'''",
    ],
)
def test_what_a_kernel_takes_has_a_digest_that_follows_it(tmp_path, source):
    first = digest_of(tmp_path, source)
    assert digest_of(tmp_path, source) == first
    changed = source.replace("x", "xx").replace("ls", "l").replace("print", "prin")
    changed = changed.replace("indented", "x").replace("something", "x").replace("inline", "agg")
    assert changed != source and digest_of(tmp_path, changed) != first


@pytest.mark.parametrize("source", ["%%time\n{}", "%%capture\n{}", "%time {}", "%timeit -n 5 {}"])
def test_what_a_magic_imports_counts_as_the_cells_code(tmp_path, source):
    leave(tmp_path, BARE, source.format("from octomed.core.nothing import x"))
    with pytest.raises(OctomedError, match=r"octomed\.core\.nothing"):
        section_digest("1_a", tmp_path)


@pytest.mark.parametrize("source", [MARKS, "x = (", "x y", "x = 1\x00", "%%time\n\nx y"])
def test_a_cell_that_is_no_python_is_named(tmp_path, source):
    if source.startswith("%%time"):  # the magic is Python, what it runs fails in the kernel
        assert digest_of(tmp_path, source)
        return
    with pytest.raises(OctomedError, match=r"cell 2 of 1_a\.ipynb"):
        digest_of(tmp_path, source)


def test_a_module_that_is_not_there_is_one_sentence(tmp_path):
    section = leave(tmp_path, "#| default_exp paper.nothing_here", BARE)
    with pytest.raises(OctomedError, match="cannot be imported"):
        _ = section.interface


def test_the_folder_of_notebooks_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_NOTEBOOKS", str(tmp_path / "nothing"))
    with pytest.raises(OctomedError, match=r"OCTOMED_NOTEBOOKS names .*, which is no folder"):
        find_sections(Recipe("r", sections={"1_a": {}}))


def test_what_a_cell_runs_from_a_file_is_part_of_its_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("helper.py").write_text("x = 1", encoding="utf-8")
    first = digest_of(tmp_path, "%run -i helper.py 3")
    Path("helper.py").write_text("x = 2", encoding="utf-8")
    assert digest_of(tmp_path, "%run -i helper.py 3") != first


@pytest.mark.parametrize(
    "metadata", [None, [], {"kernelspec": "python3"}, {"language_info": {"name": "ipython"}}]
)
def test_metadata_of_any_shape_are_no_hindrance(tmp_path, metadata):
    section = leave(tmp_path, BARE, metadata=metadata, nbformat="4", nbformat_minor="x")
    assert read_defaults(section) == {"recipe": "smoke", "out": None}


def test_a_claim_about_a_part_of_a_benchmark_is_not_set_aside():
    from octomed.core.recipe import load_recipe
    from octomed.evaluate.claims import Claim
    from octomed.run.section_page import SectionPage, find_lacking

    page = SectionPage("30_dataset", load_recipe("course"), out=None, started=0.0)
    page.benchmarks = ("brain_tumor:test",)
    part = Claim("", "a", "b", "brain_tumor:test · with a twin")
    other = Claim("", "a", "b", "medqa:test · with a twin, brain_tumor:test")
    assert find_lacking(page, part) == []
    assert find_lacking(page, other) == ["medqa:test"]
