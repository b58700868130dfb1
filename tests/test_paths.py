"Where files are: in a checkout, in a folder whose name has a blank, and in an installed package."

import json
import os
import shutil
import subprocess
import sys

import pytest

from octomed.core.paths import (
    checkout,
    root,
    shipped,
    shipped_notebooks,
    shipped_recipes,
    shipped_results,
)
from octomed.core.recipe import list_recipes

FACTS = """
import json
import os
from octomed.core import paths
from octomed.core.code import code_digest, section_digest
from octomed.core.identity import find_commit
from octomed.core.recipe import load_recipe, list_recipes

os.makedirs("elsewhere")
os.chdir("elsewhere")
print(json.dumps({
    "root": str(paths.root()),
    "shipped": paths.shipped("prices.yaml").read_text(),
    "results": str(paths.shipped_results("smoke")),
    "outputs": str(paths.outputs_dir()),
    "store": str(paths.store_dir()),
    "recipes": list_recipes(),
    "lr": load_recipe("smoke").common.lr,
    "section": section_digest("10_one"),
    "commit": find_commit(),
    "code": code_digest(paths.store_dir),
}))
"""


@pytest.fixture
def place(tmp_path):
    "Writes the files of a project into a folder, and a copy of the package into another."

    def write(files, package):
        (files / "data").mkdir(parents=True)
        (files / "data" / "prices.yaml").write_text("prices: 1", encoding="utf-8")
        (files / "nbs" / "recipes").mkdir(parents=True)
        (files / "nbs" / "recipes" / "smoke.yaml").write_text("common: {lr: 0.5}", encoding="utf-8")
        (files / "nbs" / "paper").mkdir()
        source = ["from octomed.core.files import write_json"]
        cell = {"cell_type": "code", "source": source}
        (files / "nbs" / "paper" / "10_one.ipynb").write_text(
            json.dumps({"cells": [cell]}), encoding="utf-8"
        )
        ignore = shutil.ignore_patterns("__pycache__", "paper", "clinic", "bench")
        shutil.copytree(root() / "octomed", package, ignore=ignore, dirs_exist_ok=True)

    return write


def ask(package, started_in):
    "What a process that starts in a folder finds out with this copy of the package."
    started_in.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OCTOMED_")}
    done = subprocess.run(
        [sys.executable, "-c", FACTS],
        cwd=started_in,
        env=environment | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_installed_package_finds_its_files_inside_and_writes_into_the_current_folder(
    place, tmp_path
):
    package = tmp_path / "lib" / "site-packages" / "octomed"
    place(package / "_shipped", package)
    facts = ask(package, tmp_path / "work")
    assert facts["root"] == str(package / "_shipped")
    assert facts["shipped"] == "prices: 1"
    assert facts["results"] == str(package / "_shipped" / "outputs" / "reference" / "smoke")
    assert (facts["recipes"], facts["lr"]) == (["smoke"], 0.5)
    assert facts["outputs"] == str(tmp_path / "work" / "outputs")
    assert facts["store"] == str(tmp_path / "work" / "outputs" / "store")
    assert len(facts["section"]) == 16
    assert facts["commit"] is None


def test_an_installed_package_is_no_part_of_the_repository_around_it(place, tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *author, "commit", "--quiet", "--allow-empty", "--message", "one"]
    subprocess.run(command, cwd=tmp_path, check=True)
    package = tmp_path / "lib" / "octomed"
    place(package / "_shipped", package)
    assert ask(package, tmp_path / "work")["commit"] is None


def test_a_checkout_whose_path_has_a_blank_works(place, tmp_path):
    folder = tmp_path / "my own projects" / "octomed copy"
    place(folder, folder / "octomed")
    (folder / "settings.ini").write_text("[DEFAULT]\n", encoding="utf-8")
    facts = ask(folder / "octomed", tmp_path / "else where")
    assert facts["root"] == str(folder)
    assert facts["shipped"] == "prices: 1"
    assert (facts["recipes"], facts["lr"]) == (["smoke"], 0.5)
    assert facts["outputs"] == str(folder / "outputs")
    assert facts["store"] == str(folder / "outputs" / "store")


def test_the_place_of_a_run_is_no_part_of_a_key(place, tmp_path):
    package = tmp_path / "lib" / "octomed"
    place(package / "_shipped", package)
    first, second = (ask(package, tmp_path / name) for name in ("one", "two"))
    assert first["outputs"] != second["outputs"]
    assert first["code"] == second["code"]
    assert first["section"] == second["section"]


def test_this_checkout_has_what_it_ships():
    assert checkout() == root()
    assert (root() / "settings.ini").exists()
    assert shipped("prices.yaml").exists()
    assert {path.stem for path in shipped_recipes().glob("*.yaml")} == set(list_recipes())
    assert shipped_recipes("cluster").is_dir()
    assert list(shipped_notebooks().glob("*.ipynb"))
    assert shipped_results("course").is_dir()
