"""What every section notebook and every recipe must hold, whichever there are."""

import ast
import json
from itertools import chain

import pytest
import yaml

from octomed.core.paths import root, shipped_notebooks, shipped_recipes
from octomed.core.recipe import list_recipes, load_recipe
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
    assert [section.name for section in find_sections(recipe)] == sorted(recipe.sections)


def test_no_executed_copy_lies_under_nbs():
    for path in (root() / "nbs").rglob("*.ipynb"):
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        assert '"papermill"' not in json.dumps(metadata), path.name


def test_recipe_values_carry_their_reason_or_size():
    "Every recipe is plain YAML: what it holds is what `load_recipe` gives."
    for name in list_recipes():
        raw = yaml.safe_load(shipped_recipes(f"{name}.yaml").read_text(encoding="utf-8"))
        assert load_recipe(name).sections == {
            section: values or {} for section, values in raw["sections"].items()
        }
