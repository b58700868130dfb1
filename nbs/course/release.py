"""The course's assignments, as nbgrader releases and grades them.

python nbs/course/release.py FOLDER   writes an nbgrader course: the sources with their answers
python nbs/course/release.py          says which answers pass and which fail, without nbgrader

A student's notebook is `unit*/assignment.ipynb`. It has a stub for every exercise, and no answer.
The answers lie apart, on the instructor's pages `instructor/unit*.md`: for every exercise the right
one, hidden checks where there are any, and the two commonest wrong ones with what they look like.
"""

import contextlib
import copy
import io
import json
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

COURSE = Path(__file__).resolve().parent
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # nbgrader's own
CONFIG = """\
c = get_config()
c.CourseDirectory.course_id = "octomed"
c.CourseDirectory.root = {root!r}
c.ExecutePreprocessor.timeout = 300  # seconds for a cell; one of them trains students
"""


@dataclass
class Answer:
    "An answer to an exercise."

    title: str
    code: str
    message: str = ""  # of a wrong one: what its check says


@dataclass
class Exercise:
    "The answers to an exercise, from the instructor's page."

    name: str
    right: Answer | None = None
    hidden: str = ""  # checks that students do not see
    wrong: list[Answer] = field(default_factory=list)


def list_units() -> list[str]:
    return sorted(path.parent.name for path in COURSE.glob("unit*/assignment.ipynb"))


def read_notebook(unit: str) -> dict:
    "A student's notebook, each cell's source as one text."
    text = (COURSE / unit / "assignment.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def find_block(text: str, language: str) -> str:
    "The first block of code in this language; an empty text if there is none."
    match = re.search(rf"^```{language}\n(.*?)\n```$", text, re.M | re.S)
    return match[1] if match else ""


def read_exercise(name: str, text: str) -> Exercise:
    "An exercise from its part of an instructor's page."
    exercise = Exercise(name)
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        title = part.split("\n")[0]
        code = find_block(part, "python")
        if title == "Right":
            exercise.right = Answer(title, code)
        elif title == "Hidden checks":
            exercise.hidden = code
        elif title.startswith("Wrong: "):
            message = find_block(part, "text")
            exercise.wrong.append(Answer(title.removeprefix("Wrong: "), code, message))
    return exercise


def read_exercises(unit: str) -> dict[str, Exercise]:
    "Name → exercise, from the instructor's page of a unit."
    text = (COURSE / "instructor" / f"{unit}.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.M)[1:]
    exercises = {}
    for part in parts:
        match = re.match(r"Exercise `([\w-]+)`", part)
        if match:
            exercises[match[1]] = read_exercise(match[1], part)
    return exercises


def read_role(cell: dict) -> tuple[str, str]:
    "(exercise, `answer` or `check`) of a cell; empty texts for any other."
    name = cell["metadata"].get("nbgrader", {}).get("grade_id", "")
    exercise, _, role = name.rpartition("-")
    return (exercise, role) if role in ("answer", "check") else ("", "")


def fill(stub: str, code: str, is_source: bool = False) -> str:
    "A cell with an answer in the place of its stub; in a source nbgrader's marks stand around it."
    head, _, _ = stub.partition(STUB.split("\n")[0])
    indent = head[head.rfind("\n") + 1 :]
    first = head.split("\n")[0]
    lines = code.split("\n")
    if first.startswith("def ") and lines[0] == first:
        code = textwrap.dedent("\n".join(lines[1:]))
    if is_source:
        code = f"### BEGIN SOLUTION\n{code}\n### END SOLUTION"
    return head.removesuffix(indent) + textwrap.indent(code, indent)


def hide(check: str, hidden: str) -> str:
    "A check with those that students do not see."
    if not hidden:
        return check
    return f"{check}\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS"


def make_source(unit: str) -> dict:
    "The notebook that nbgrader releases from: answers in their marks, and hidden checks."
    notebook, exercises = read_notebook(unit), read_exercises(unit)
    for cell in notebook["cells"]:
        name, role = read_role(cell)
        if role == "answer":
            cell["source"] = fill(cell["source"], exercises[name].right.code, is_source=True)
        elif role == "check":
            cell["source"] = hide(cell["source"], exercises[name].hidden)
    return notebook


def answer_notebook(notebook: dict, answers: dict[str, str]) -> dict:
    "A student's notebook with these answers, by exercise; other stubs are left."
    answered = copy.deepcopy(notebook)
    for cell in answered["cells"]:
        name, role = read_role(cell)
        if role == "answer" and name in answers:
            cell["source"] = fill(cell["source"], answers[name])
    return answered


def run_cell(source: str, name: str, names: dict, is_check: bool = False) -> str:
    "What went wrong in a cell; an empty text if nothing did."
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            exec(compile(source, name, "exec"), names)
    except NotImplementedError:
        return "NotImplementedError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if is_check and errors.getvalue():
        return f"nbgrader takes what a check writes to stderr for a failure: {errors.getvalue()}"
    return ""


@dataclass
class Outcome:
    "What the check of an exercise says of one answer."

    exercise: str
    answer: str  # `empty`, `right`, or the title of a wrong one
    message: str  # empty where the check passes
    expected: str  # what the instructor's page quotes

    @property
    def is_as_stated(self) -> bool:
        "Whether the right answer passes, and others fail as the instructor's page says."
        if self.answer == "right":
            return not self.message
        if self.answer == "empty":
            return self.message == "NotImplementedError"
        return bool(self.message) and self.message == self.expected


def run_right_answers(unit: str, exercises: dict[str, Exercise]) -> tuple[dict, dict, list]:
    "(names before each answer, cells by exercise and role, outcomes) with every right answer."
    names: dict = {"__name__": "__main__"}
    before, cells, outcomes = {}, {}, []
    for cell in read_notebook(unit)["cells"]:
        if cell["cell_type"] != "code":
            continue
        name, role = read_role(cell)
        source = cell["source"]
        if role:
            cells[name, role] = source
        if role == "answer":
            before[name] = dict(names)
            source = fill(source, exercises[name].right.code)
        if role == "check":
            source = hide(source, exercises[name].hidden)
        message = run_cell(source, f"{unit} {name} {role}", names, role == "check")
        if role == "check":
            outcomes.append(Outcome(name, "right", message, ""))
        elif message:
            raise RuntimeError(f"{unit}: the cell {cell['id']} fails: {message}")
    return before, cells, outcomes


def try_answers(unit: str) -> list[Outcome]:
    "Every answer to every exercise of a unit: the right ones, none, and the wrong ones."
    exercises = read_exercises(unit)
    before, cells, outcomes = run_right_answers(unit, exercises)
    for name, exercise in exercises.items():
        stub = cells[name, "answer"]
        check = hide(cells[name, "check"], exercise.hidden)
        tried = [("empty", stub, "")]
        tried += [(a.title, fill(stub, a.code), a.message) for a in exercise.wrong]
        for title, source, expected in tried:
            names = dict(before[name])
            message = run_cell(source, title, names) or run_cell(check, title, names, True)
            outcomes.append(Outcome(name, title, message, expected))
    return outcomes


def write_course(folder: Path):
    "An nbgrader course in a folder, with the sources of every assignment."
    for unit in list_units():
        path = folder / "source" / unit / "assignment.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make_source(unit), indent=1), encoding="utf-8")
    config = CONFIG.format(root=str(folder.resolve()))
    (folder / "nbgrader_config.py").write_text(config, encoding="utf-8")


def main() -> int:
    if len(sys.argv) > 1:
        write_course(Path(sys.argv[1]))
        print(f"{len(list_units())} assignments: cd {sys.argv[1]}; nbgrader generate_assignment …")
        return 0
    outcomes = {unit: try_answers(unit) for unit in list_units()}
    wrong = 0
    for unit, tried in outcomes.items():
        for outcome in tried:
            wrong += not outcome.is_as_stated
            mark = "ok" if outcome.is_as_stated else "WRONG"
            print(f"{mark:6}{unit} {outcome.exercise}, {outcome.answer}: {outcome.message}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
