"What the tests of several sections ask of a section's declarations."

import pytest

from octomed.core.recipe import load_recipe
from octomed.evaluate.results import scope_recipe
from octomed.evaluate.stats import KINDS

RECIPES = pytest.mark.parametrize("name", ["smoke", "course"])
PLACES = load_recipe("course").common.benchmarks


def declared(section, name):
    "The recipe as a section uses it, and the section's arms."
    recipe = load_recipe(name)
    module = section.__name__.rpartition(".")[2]
    (own,) = (each for each in recipe.sections if each.endswith(f"_{module}"))
    recipe = scope_recipe(recipe, own)
    return recipe, section.arms(recipe)


def check_claims(claims, arms, benchmarks):
    "Claims compare what exists, and hold what their kind needs."
    for claim in claims:
        assert {claim.a, claim.b} | {arm for arm, _ in claim.along} <= set(arms)
        assert claim.a != claim.b
        assert claim.kind in KINDS
        assert claim.not_proved
        assert claim.benchmark in benchmarks
        assert (claim.kind == "equivalent") == (claim.margin is not None)
        assert (claim.kind == "trend") == bool(claim.along)
    assert len({claim.text for claim in claims}) == len(claims)
