"""The course: what its exercises accept and refuse, and nbgrader's own round trip.

Every check fails on the empty answer, passes on the right one, and fails on the two commonest wrong
ones with the words that the instructor's page quotes.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from nbs.course import release

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "nbs" / "course"

UNITS = release.list_units()


@pytest.fixture(scope="module", params=UNITS)
def unit(request):
    return request.param


@pytest.fixture(scope="module")
def outcomes(unit):
    return release.try_answers(unit)


def test_every_answer_is_taken_as_the_instructors_page_says(outcomes):
    assert not [outcome for outcome in outcomes if not outcome.is_as_stated]


def test_every_exercise_has_a_right_answer_an_empty_one_and_two_wrong_ones(unit, outcomes):
    by_exercise: dict[str, list] = {}
    for outcome in outcomes:
        by_exercise.setdefault(outcome.exercise, []).append(outcome.answer)
    roles = map(release.read_role, release.read_notebook(unit)["cells"])
    asked = list(dict.fromkeys(name for name, role in roles if role))
    assert list(by_exercise) == asked
    assert 3 <= len(asked) <= 5
    for answers in by_exercise.values():
        assert answers[:2] == ["right", "empty"]
        assert len(set(answers)) == 4


def test_a_students_notebook_has_no_answer(unit):
    for cell in release.read_notebook(unit)["cells"]:
        assert "### BEGIN" not in cell["source"]
        assert not cell.get("outputs")
        if release.read_role(cell)[1] == "answer":
            stub = re.sub(r"^ +", "", cell["source"], flags=re.M)
            assert stub.endswith(release.STUB)


def test_a_unit_has_its_pages(unit):
    page = (COURSE / unit / "index.md").read_text(encoding="utf-8")
    for heading in ("## Aims", "## A path of 20 minutes", "## Exercises"):
        assert heading in page
    teaching = (COURSE / "instructor" / f"{unit}.md").read_text(encoding="utf-8")
    for heading in ("## Plan", "## Discussion"):
        assert heading in teaching
    assert f"unit{unit[-1]}/index.md" in (COURSE / "index.md").read_text(encoding="utf-8")


def test_the_paths_minutes_add_up(unit):
    page = (COURSE / unit / "index.md").read_text(encoding="utf-8")
    table = page.split("## A path of 20 minutes")[1].split("\n## ")[0]
    minutes = [int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)]
    assert sum(minutes) == 20


def test_a_units_page_lists_its_exercises_with_their_points(unit):
    page = (COURSE / unit / "index.md").read_text(encoding="utf-8")
    table = page.split("## Exercises")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| (\d+) \|$", table, re.M)
    checks = []
    for cell in release.read_notebook(unit)["cells"]:
        name, role = release.read_role(cell)
        if role == "check":
            checks.append((name, str(cell["metadata"]["nbgrader"]["points"])))
    assert listed == checks


def test_notebooks_that_a_path_names_are_there(unit):
    page = (COURSE / unit / "index.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:paper|data|generate|distill|train|evaluate|clinic)/\w+)`", page)
    assert names
    assert not [name for name in names if not (ROOT / "nbs" / f"{name}.ipynb").is_file()]


class Course:
    "A course of nbgrader in a folder, with an exchange."

    def __init__(self, folder: Path):
        from nbgrader.apps import NbGraderAPI
        from traitlets.config import Config

        self.folder = folder
        release.write_course(folder)
        self.config = Config()
        self.config.CourseDirectory.root = str(folder)
        self.config.CourseDirectory.course_id = "octomed"
        self.config.Exchange.root = str(folder / "exchange")
        self.config.Exchange.cache = str(folder / "cache")
        self.config.ExecutePreprocessor.timeout = 280
        (folder / "exchange").mkdir(mode=0o777)
        (folder / "exchange").chmod(0o777)
        self.api = NbGraderAPI(config=self.config)

    def transfer(self, action, unit: str, student: str):
        "Fetch or submit, in the student's own folder."
        from nbgrader.auth import Authenticator
        from nbgrader.coursedir import CourseDirectory

        config = self.config.copy()
        config.CourseDirectory.assignment_id = unit
        config.CourseDirectory.student_id = student
        home = self.folder / "students" / student
        home.mkdir(parents=True, exist_ok=True)
        action(
            assignment_dir=str(home),
            coursedir=CourseDirectory(config=config),
            authenticator=Authenticator(config=config),
            config=config,
        ).start()
        return home / unit / "assignment.ipynb"


def check_success(result: dict):
    assert result["success"], result.get("log") or result.get("error")


def answer_as(student: str, unit: str) -> dict[str, str]:
    "A made-up student's answers: none, the right ones, or the first wrong one of each."
    exercises = release.read_exercises(unit).values()
    if student == "right":
        return {exercise.name: exercise.right.code for exercise in exercises}
    if student == "wrong":
        return {exercise.name: exercise.wrong[0].code for exercise in exercises}
    return {}


def read_cells(path: Path) -> dict[str, str]:
    "Id → source of the cells of a notebook."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}


@pytest.mark.filterwarnings("ignore:Object of type")  # SQLAlchemy, of nbgrader
@pytest.mark.timeout(900)
def test_nbgrader_releases_collects_and_grades(unit, tmp_path, monkeypatch):
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: `make course` installs it")
    from nbgrader.exchange.default import ExchangeFetchAssignment, ExchangeSubmit

    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    tools = Path(sys.executable).parent  # nbgrader looks for alembic among the commands
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    course = Course(tmp_path)
    check_success(course.api.generate_assignment(unit))
    released = tmp_path / "release" / unit / "assignment.ipynb"
    assert read_cells(released) == read_cells(COURSE / unit / "assignment.ipynb")
    check_success(course.api.release_assignment(unit))
    for student in ("empty", "right", "wrong"):
        path = course.transfer(ExchangeFetchAssignment, unit, student)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
        answered = release.answer_notebook(notebook, answer_as(student, unit))
        path.write_text(json.dumps(answered), encoding="utf-8")
        course.transfer(ExchangeSubmit, unit, student)
    check_success(course.api.collect(unit))
    scores = {}
    for student in ("empty", "right", "wrong"):
        check_success(course.api.autograde(unit, student))
        with course.api.gradebook as gradebook:
            submission = gradebook.find_submission(unit, student)
            scores[student] = submission.score
            full = submission.max_score
    assert scores == {"empty": 0, "right": full, "wrong": 0}
