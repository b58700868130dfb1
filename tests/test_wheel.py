"""An installed package works: a wheel, in an environment of its own, used from an empty folder.

The environment sees the packages of the one that runs the tests; octomed comes from the wheel.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def call(*command, cwd, **environment):
    "The finished process of a command that has to succeed."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OCTOMED_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "(the folder of the scripts, an empty folder to work in)."
    folder = tmp_path_factory.mktemp("wheel")
    uv = Path(sys.executable).parent / "uv"
    call(uv, "build", "--wheel", "--out-dir", folder, ROOT, cwd=folder)
    [wheel] = folder.glob("octomed-*.whl")
    call(uv, "venv", "--python", sys.executable, folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    call(uv, "pip", "install", "--no-deps", "--python", python, wheel, cwd=folder)
    site = Path(sysconfig.get_paths(vars={"base": str(folder / "venv")})["purelib"])
    # Everything else is found where the tests run; an editable octomed there comes after the wheel.
    (site / "pinned.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    call(python, "-m", "ipykernel", "install", "--prefix", folder / "venv", cwd=folder)
    work = folder / "work"
    work.mkdir()
    return folder / "venv" / "bin", work


def test_the_package_is_the_wheels(installed):
    scripts, work = installed
    done = call(scripts / "python", "-c", "import octomed; print(octomed.__file__)", cwd=work)
    assert str(scripts.parent) in done.stdout


def test_the_command_and_the_module_say_their_version(installed):
    scripts, work = installed
    versions = [
        call(*command, "--version", cwd=work).stdout
        for command in ([scripts / "octomed"], [scripts / "python", "-m", "octomed"])
    ]
    assert versions[0] == versions[1] and versions[0].count(".") == 2


def test_the_reference_report_needs_no_run(installed):
    scripts, work = installed
    page = call(scripts / "octomed", "report", "course", "--html", cwd=work).stdout.strip()
    assert Path(page) == work / "outputs" / "course" / "report.html"
    assert "42 · Formatting" in Path(page).read_text(encoding="utf-8")


def test_judge(installed):
    scripts, work = installed
    row = {"id": 1, "text": r"\boxed{B}", "options": {"A": "yes", "B": "no"}, "answer": "B"}
    (work / "answers.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    done = call(scripts / "octomed", "judge", "answers.jsonl", cwd=work)
    assert json.loads(done.stdout.splitlines()[0])["status"] == "correct"


def test_sources(installed):
    scripts, work = installed
    rows = json.loads(call(scripts / "octomed", "sources", "--json", cwd=work).stdout)
    assert {"medqa", "clinic_ward"} <= {row["source"] for row in rows}


def test_decontaminate(installed):
    scripts, work = installed
    (work / "train.jsonl").write_text(
        json.dumps({"question": "What is this?"}) + "\n", encoding="utf-8"
    )
    command = ("decontaminate", "train.jsonl", "--against", "train.jsonl", "--json")
    pairs = json.loads(call(scripts / "octomed", *command, cwd=work).stdout)["pairs"]
    assert pairs[0]["exact"] == 1


def test_plan_course(installed):
    scripts, work = installed
    rows = json.loads(call(scripts / "octomed", "plan", "course", "--json", cwd=work).stdout)
    assert "42_formatting" in {row["section"] for row in rows}


def test_a_section_runs_and_its_outputs_lie_where_it_was_started(installed):
    scripts, work = installed
    call(scripts / "octomed", "run", "smoke", "--only", "42_formatting", cwd=work)
    results = json.loads(
        (work / "outputs/smoke/results/42_formatting.json").read_text(encoding="utf-8")
    )
    assert results["claims"]
    assert not list((scripts.parent / "lib").rglob("outputs/smoke"))
