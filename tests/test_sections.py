"""What every section notebook and every recipe must hold, whichever there are."""

import ast
import json

import pytest
import yaml

from octomed.core.paths import root, shipped_notebooks, shipped_recipes
from octomed.core.recipe import load_recipe, recipes
from octomed.run.sections import Section, declared, parameters, sections

NOTEBOOKS = sorted(shipped_notebooks().glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
RECIPES = pytest.mark.parametrize("name", recipes())


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def tagged(path):
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


@EVERY
def test_exactly_one_parameters_cell_with_recipe_and_out(path):
    assert len(tagged(path)) == 1
    found = declared(Section(path.stem, path))
    assert found["recipe"] == "smoke" and found["out"] is None
    assert all(isinstance(v, (int, float, str)) for k, v in found.items() if k != "out"), (
        "a section's own parameters are scalars"
    )


@EVERY
def test_parameters_are_not_exported(path):
    source = "".join(tagged(path)[0]["source"])
    assert not source.lstrip().startswith("#|")
    module = root() / "octomed" / "paper" / f"{path.stem.partition('_')[2]}.py"
    top = {
        t.id
        for n in ast.parse(module.read_text()).body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    }
    assert not top & {"recipe", "out"}


@EVERY
def test_module_keeps_the_contract(path):
    section = Section(path.stem, path)
    assert section.module.__name__ == f"octomed.paper.{path.stem.partition('_')[2]}"
    assert all(callable(getattr(section.module, f, None)) for f in ("arms", "claims", "figure"))
    assert isinstance(section.module.claims(), list)


@EVERY
def test_committed_sections_carry_no_executed_parameters(path):
    assert (
        not any("injected-parameters" in c["metadata"].get("tags", []) for c in cells(path))
        and "papermill" not in json.loads(path.read_text())["metadata"]
    )


@EVERY
def test_smoke_values_are_the_defaults(path):
    own = {
        k: v for k, v in declared(Section(path.stem, path)).items() if k not in ("recipe", "out")
    }
    assert load_recipe("smoke").sections.get(path.stem) == own


@RECIPES
def test_recipes_name_only_what_notebooks_declare(name):
    recipe = load_recipe(name)
    for s in sections(recipe):
        assert set(recipe.of(s.name)) <= set(parameters(s, recipe))


@RECIPES
def test_recipes_run_in_the_paper_order(name):
    assert [s.name for s in sections(load_recipe(name))] == sorted(load_recipe(name).sections)


def test_no_executed_copy_lies_under_nbs():
    assert not [
        p
        for p in (root() / "nbs").rglob("*.ipynb")
        if '"papermill"' in json.dumps(json.loads(p.read_text())["metadata"])
    ]


def test_recipe_values_carry_their_reason_or_size():
    "Every recipe is plain YAML: what it holds is what `load_recipe` gives."
    for name in recipes():
        raw = yaml.safe_load(shipped_recipes(f"{name}.yaml").read_text())
        assert load_recipe(name).sections == {k: v or {} for k, v in raw["sections"].items()}
