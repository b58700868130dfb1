"Where files are: in a checkout, in a folder whose name has a blank, and in an installed package."

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from octomed.core.files import atomic_write, read_jsonl, write_jsonl
from octomed.core.paths import (
    OctomedError,
    checkout,
    data_dir,
    fix_places,
    outputs_dir,
    root,
    shipped,
    shipped_notebooks,
    shipped_recipes,
    shipped_results,
    store_dir,
)
from octomed.core.recipe import Common, Recipe, list_recipes
from octomed.run.cluster import Job, Work, prepare_work
from octomed.train.students import find_base_student

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


# Relative names mean the folder where the command was typed.


def test_what_the_environment_names_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable, name in (("OCTOMED_STORE", "st"), ("OCTOMED_DATA", "../da ta")):
        monkeypatch.setenv(variable, name)
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.delenv("OCTOMED_NOTEBOOKS", raising=False)
    fix_places()
    assert os.environ["OCTOMED_STORE"] == str(tmp_path / "st")
    assert os.environ["OCTOMED_DATA"] == str(tmp_path.parent / "da ta")
    assert os.environ["OCTOMED_OUTPUTS"] == str(tmp_path / "out")
    assert "OCTOMED_NOTEBOOKS" not in os.environ
    monkeypatch.chdir("/")
    assert store_dir() == tmp_path / "st"


@pytest.mark.parametrize(
    "ask_for", [store_dir, outputs_dir, data_dir, fix_places], ids=lambda f: f.__name__
)
def test_a_home_that_is_not_there_is_one_sentence(monkeypatch, ask_for):
    for variable in ("OCTOMED_STORE", "OCTOMED_OUTPUTS", "OCTOMED_DATA"):
        monkeypatch.setenv(variable, "~nobody-of-that-name/x")
    with pytest.raises(OctomedError, match="there is no such home folder: write the whole path"):
        ask_for()


def test_a_student_is_a_folder_of_the_current_one_and_known_by_its_content(tmp_path, monkeypatch):
    for name, weights in (("one", "1"), ("two", "2")):
        (tmp_path / name / "student").mkdir(parents=True)
        (tmp_path / name / "student" / "model.safetensors").write_text(weights, encoding="utf-8")
    keys = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        base = find_base_student(Common(student="student"))
        assert base.path == tmp_path / name / "student"
        keys.append(base.key)
    assert keys[0] != keys[1]
    assert find_base_student(Common(student="Qwen/Qwen2.5-VL-7B-Instruct")).startswith("Qwen/")


def test_a_cluster_job_works_where_it_was_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTOMED_STORE", "st")
    work = prepare_work(Job("x", ()), Recipe("r"), "r.yaml")
    monkeypatch.chdir("/")
    monkeypatch.setenv("OCTOMED_STORE", "other")
    work()
    assert Path.cwd() == tmp_path
    assert store_dir() == tmp_path / "st"
    gone = Work((), {}, (), folder=str(tmp_path / "gone"))
    with pytest.raises(OctomedError, match="cannot be entered here"):
        gone()


# Outputs that are no plain file.


def read_pipe(path):
    "A thread that reads a pipe to its end, and the list that it puts the bytes into."
    read = []
    thread = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, read


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread, read = read_pipe(tmp_path / "pipe")
    atomic_write(tmp_path / "pipe", "é" * 100_000)
    thread.join(30)
    assert read == [("é" * 100_000).encode()]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_stays_one():
    atomic_write("/dev/null", "gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_one_sentence():
    with pytest.raises(OctomedError, match="no space left to write full"):
        atomic_write("/dev/full", "text")


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old", encoding="utf-8")
    for name, target in (("link", "real"), ("link to link", "link"), ("dangling", "far/new")):
        (tmp_path / name).symlink_to(target)
        atomic_write(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text(encoding="utf-8") == name
    assert (tmp_path / "real").read_text(encoding="utf-8") == "link to link"
    assert (tmp_path / "far" / "new").is_file()


PRINT = """
from octomed.core.files import atomic_write
print("before")
atomic_write("/dev/stdout", "between\\n")
print("after")
"""


@pytest.mark.parametrize("into", ["file", "pipe"])
def test_stdout_keeps_what_was_printed_before_and_after(tmp_path, into):
    command = [sys.executable, "-c", PRINT]
    if into == "pipe":
        text = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    else:
        with open(tmp_path / "out.txt", "wb") as file:
            subprocess.run(command, stdout=file, check=True)
        text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert text == "before\nbetween\nafter\n"


def test_an_existing_file_keeps_its_mode_and_half_a_surrogate_pair_its_escape(tmp_path):
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "rows.jsonl").chmod(0o600)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "\ud83d é"}])
    assert stat.S_IMODE((tmp_path / "rows.jsonl").stat().st_mode) == 0o600
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"text": "\ud83d é"}]
    assert "é" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_a_long_name_is_written(tmp_path):
    atomic_write(tmp_path / ("x" * 250), "text")
    assert [len(path.name) for path in tmp_path.iterdir()] == [250]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "Is a directory"),
        ("file/page.html", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OctomedError) as caught:
        atomic_write(tmp_path / name, "text")
    assert f"{name} cannot be written ({reason}): name a file" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


AS_USER = """
import os, sys
os.setgid(65534) if os.getuid() == 0 else None
os.setuid(65534) if os.getuid() == 0 else None
from octomed.core.files import atomic_write
from octomed.core.paths import OctomedError
atomic_write("/dev/null", "x")
atomic_write("closed/own", "new")
for name in ("closed/other", "/proc/version", os.environ["OCTOMED_STORE"] + "/x"):
    try:
        atomic_write(name, "x")
    except OctomedError as error:
        print(error)
"""


def test_an_ordinary_user_gets_a_sentence(tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if os.getuid() == 0 and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "own").write_text("old", encoding="utf-8")
    (tmp_path / "closed" / "own").chmod(0o666)
    (tmp_path / "closed").chmod(0o555)
    script = tmp_path / "script.py"
    code = f"import sys\nsys.path.insert(0, {str(root())!r})\nimport octomed.core.files\n{AS_USER}"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "OCTOMED_STORE": str(tmp_path / "closed" / "store")},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    advice = "name a file in a folder of your own"
    assert first == f"closed/other cannot be written (Permission denied): {advice}"
    assert second.startswith("/proc/version cannot be written (") and second.endswith(advice)
    assert third.endswith("(Permission denied): point OCTOMED_STORE at a folder of your own")
    assert (tmp_path / "closed" / "own").read_text(encoding="utf-8") == "new"
