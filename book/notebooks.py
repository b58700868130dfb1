"What the notebooks hold: titles, modules, the names that they export, and their imports."

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)


def join_lines(text: str | list[str]) -> str:
    "A cell's text, which a file may hold as a list of lines."
    return text if isinstance(text, str) else "".join(text)


def strip_directives(source: str) -> str:
    "A cell without nbdev's `#|` lines."
    return DIRECTIVE.sub("", source).strip("\n")


def parse_cell(source: str) -> ast.Module:
    "A cell as Python, without directives and magics."
    lines = [line for line in source.split("\n") if not line.startswith(("#|", "%", "!"))]
    return ast.parse("\n".join(lines))


def name_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    "A function's name; of one that fastcore's `patch` puts into a class, with the class's."
    is_patch = any(ast.unparse(part).startswith("patch") for part in node.decorator_list)
    if is_patch and node.args.args and node.args.args[0].annotation:
        return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"
    return node.name


def list_definitions(source: str) -> list[str]:
    "The public names that a cell defines at its top level, and methods that it patches in."
    names = []
    for node in parse_cell(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(name_function(node))
        elif isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names += [part.id for part in parts if isinstance(part, ast.Name)]
    return [name for name in names if not name.split(".")[-1].startswith("_")]


def list_imports(source: str, package: str = "octomed") -> dict[str, list[str]]:
    "Module → names, for what a cell imports from the package."
    imports: dict[str, list[str]] = {}
    for node in ast.walk(parse_cell(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            imports.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return imports


@dataclass(frozen=True)
class Page:
    "A notebook of the project as a page of the book."

    path: Path  # of the notebook
    name: str  # its place below `nbs/` without the ending, and the page's: `evaluate/05_claims`

    @cached_property
    def notebook(self) -> dict:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def cells(self) -> list[dict]:
        return [{**c, "source": join_lines(c["source"])} for c in self.notebook["cells"]]

    @cached_property
    def opening(self) -> str:
        "The first cell of prose, which has the title."
        prose = (c["source"] for c in self.cells if c["cell_type"] == "markdown")
        return next(prose, "")

    @cached_property
    def title(self) -> str:
        match = re.search(r"^# (.+)$", self.opening, re.M)
        return match[1].strip() if match else self.name

    @property
    def short_title(self) -> str:
        "The title up to its colon, for the table of contents."
        return self.title.split(": ")[0]

    @cached_property
    def promise(self) -> str:
        "The line after the title that says what the notebook is about."
        match = re.search(r"^> (.+)$", self.opening, re.M)
        return match[1].strip() if match else ""

    @cached_property
    def code(self) -> list[dict]:
        return [c for c in self.cells if c["cell_type"] == "code"]

    @cached_property
    def module(self) -> str | None:
        "The module that the notebook exports, or None."
        for cell in self.code:
            if match := MODULE.search(cell["source"]):
                name = match[1].removesuffix("__init__").rstrip(".")
                return f"octomed.{name}".rstrip(".")
        return None

    @cached_property
    def definitions(self) -> dict[str, str]:
        "Public name → id of the cell that exports it."
        names = {}
        for cell in self.code:
            if EXPORT.search(cell["source"]):
                names |= dict.fromkeys(list_definitions(cell["source"]), cell["id"])
        return names

    @cached_property
    def imports(self) -> dict[str, list[str]]:
        "Module of the package → the names that the notebook imports from it, sorted."
        imports: dict[str, set[str]] = {}
        for cell in self.code:
            for module, names in list_imports(cell["source"]).items():
                imports.setdefault(module, set()).update(names)
        return {module: sorted(imports[module]) for module in sorted(imports)}


def read_pages(nbs: Path, folders: tuple[str, ...]) -> list[Page]:
    "The notebooks at the top of `nbs/` and in these folders, in the order of import."
    paths = sorted(nbs.glob("[0-9]*.ipynb"))
    for folder in folders:
        found = sorted((nbs / folder).rglob("*.ipynb"))
        paths += [path for path in found if ".ipynb_checkpoints" not in path.parts]
    return [Page(path, path.relative_to(nbs).with_suffix("").as_posix()) for path in paths]
