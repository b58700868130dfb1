"""What no linter sees: the layers, and the measures of code, cells and prose."""

import ast
import re
from itertools import chain

import measures
import pytest

ORDER = ("core", "data", "generate", "distill", "train", "evaluate", "run", "bench", "clinic")
TOP = (*ORDER, "paper")
# Names that say nothing of what they hold.
EMPTY_NAMES = {"found", "got", "told", "said", "of", "one", "made", "seen", "there"}


def modules():
    "(path under `octomed/`, syntax tree) of every exported module."
    for path in measures.exported_files():
        yield path.relative_to(measures.ROOT / "octomed"), ast.parse(path.read_text("utf-8"))


def imported_rooms(path, tree):
    "(line, room) of every import of the project's own in a module."
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = ["octomed", *path.parts[:-1]]
            package = base[: len(base) - node.level + 1] if node.level else []
            names = [".".join([*package, *filter(None, [node.module])])]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "octomed" and len(parts) > 1 and parts[1] in TOP:
                yield node.lineno, parts[1]


def test_a_room_imports_only_rooms_before_it():
    wrong = [
        f"{path}:{line} imports {room}"
        for path, tree in modules()
        for line, room in imported_rooms(path, tree)
        if TOP.index(room) > TOP.index(path.parts[0])
    ]
    assert not wrong


@pytest.mark.parametrize("folders", [measures.LIBRARY, measures.SECTIONS], ids=["lib", "paper"])
def test_the_measures_hold(folders):
    measured = measures.measure(folders)
    assert measured["lines over 100"] == 0
    assert measured["characters a line, 90th percentile"] <= 92
    assert measured["statements that share a line"] == 0
    assert measured["exported cell, lines, median"] <= 15
    assert measured["exported cell, lines, longest"] <= 40
    assert measured["nested conditional expressions"] == 0
    assert measured["own calls with more than 3 positional arguments"] == 0
    assert measured["exported literals of more than 3 entries on a line"] == 0


def test_library_pages_show_results_and_short_prose():
    measured = measures.measure(measures.LIBRARY)
    assert measured["share with output"] >= 0.8
    assert measured["words in a markdown cell, 90th percentile"] <= 80


def test_names_say_what_they_hold():
    wrong = [
        f"{path}:{node.lineno} {node.id}"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES
    ]
    assert not wrong


def test_a_function_has_a_name_of_its_own():
    "A name that stands for several functions is a trap for the reader."
    by_name: dict[str, list] = {}
    for path, tree in modules():
        if path.parts[0] == "paper" or str(path) == "run/cli.py":
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                patched = any(ast.unparse(mark).startswith("patch") for mark in node.decorator_list)
                if not patched and node.name != "main":
                    by_name.setdefault(node.name, []).append(str(path))
    most = {name: 2 if name.startswith("_") else 1 for name in by_name}
    assert not {name: paths for name, paths in by_name.items() if len(paths) > most[name]}


def test_methods_are_in_their_class():
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in modules()
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(
            isinstance(part, ast.Attribute) for target in node.targets for part in ast.walk(target)
        )
    ]
    assert not wrong


def test_a_heading_is_followed_by_a_sentence():
    wrong = []
    for cell in measures.cells(measures.LIBRARY):
        if cell.kind == "markdown" and re.fullmatch(r"#{1,3} [^\n]+", cell.text.strip()):
            wrong.append(cell.where)
    assert not wrong


def test_every_notebook_opens_with_a_title_and_a_promise():
    first: dict[str, str] = {}
    for cell in chain(measures.cells(measures.LIBRARY), measures.cells(measures.SECTIONS)):
        first.setdefault(cell.notebook, cell.text)
    assert not [name for name, text in first.items() if not re.match(r"# .+\n\n> .+", text)]


def lacks_encoding(call):
    "Whether a call reads or writes text in the encoding of the machine's locale."
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if "encoding" in keywords:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < {"read_text": 1, "write_text": 2}[name]
    if (isinstance(call.func, ast.Name) and name == "open") or name == "fdopen":
        modes = [ast.unparse(mode) for mode in call.args[1:2]]
        return "b" not in "".join(modes) + keywords.get("mode", "")
    return keywords.get("text") == "True" and name in ("run", "Popen", "check_output")


def test_text_is_utf8_whatever_the_locale():
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and lacks_encoding(node)
    ]
    assert not wrong
