"""Pages of the API in MyST markdown: signatures, parameters by fastcore's docments, and sources.

Types, defaults and comments are read where they stand, beside each parameter, so the page, the
command's help and the notebook say the same.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from dataclasses import dataclass

from fastcore.docments import docments

from .notebooks import Page

LONGEST = 60  # characters of a default; a longer one stands in the source
LINES = 12  # of a constant's value
EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Place:
    "Where the book finds code: on the code host, and in its notebook."

    blob: str  # address of the repository's files
    page: Page | None  # the notebook of the module

    def link(self, obj, name: str) -> str:
        "Links to the cell and to the lines that define a name."
        links = []
        if self.page and name in self.page.definitions:
            target = cell_label(self.page, self.page.definitions[name])
            links.append(f"{{ref}}`notebook <{target}>`")
        if lines := find_lines(obj):
            links.append(f"[source]({self.blob}/{lines})")
        return " · ".join(links)


def cell_label(page: Page, cell: str) -> str:
    "The label of a cell, to which pages of the API link."
    return f"cell-{page.name.replace('/', '-')}-{cell}".lower()


def find_lines(obj) -> str:
    "The file and lines of a function or class, as an address on the code host ends."
    obj = inspect.unwrap(obj)
    try:
        lines, first = inspect.getsourcelines(obj)
    except (OSError, TypeError):
        return ""
    path = obj.__module__.replace(".", "/")
    return f"{path}.py#L{first}-L{first + len(lines) - 1}"


def format_type(annotation) -> str:
    "A type as it is written: without modules, and empty if there is none."
    # docments takes the type of a parameter without one from its default, also from None
    if annotation in (EMPTY, None, type(None)):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"Annotated\[(.*?), .*\]", r"\1", text)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def format_default(value) -> str:
    "A default as code; of a function its name, and … for what is too long to read here."
    if value is EMPTY:
        return ""
    if value is dataclasses._HAS_DEFAULT_FACTORY:
        return "new"
    text = getattr(value, "__name__", None) or repr(value)
    return "…" if len(text) > LONGEST or text.startswith("<") else text


def escape(text: str) -> str:
    "Text for a cell of a table: a bar or a line break would end it, `<` would begin HTML."
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for index in range(0, len(pieces), 2):
        pieces[index] = re.sub(r"([<$*])", r"\\\1", pieces[index])
    return "".join(pieces).replace("|", r"\|")


def code(text: str, kind: str = "") -> str:
    "Inline code for a cell of a table, with a class that links the names of types."
    if not text:
        return ""
    return f"`{escape(text)}`" if not kind else f"`{escape(text)}`{{.{kind}}}"


def list_parameters(obj) -> list[dict]:
    "Name, type, default and comment of each parameter, and last of what is returned."
    is_stage = type(obj).__name__ == "StageFunction"
    function = inspect.unwrap(obj)
    described = docments(function, full=True, args_kwargs=True)
    rows = []
    for name, about in described.items():
        if name == "return" or name == "self" or (is_stage and name == "out"):
            continue
        star = {2: "*", 4: "**"}.get(about.get("kind"), "")
        rows.append(
            {
                "name": star + name,
                "type": format_type(about.anno),
                "default": format_default(about.default),
                "text": about.docment or "",
            }
        )
    result = described.get("return")
    if result and not is_stage and not inspect.isclass(obj):
        returned = {"type": format_type(result.anno), "text": result.docment or ""}
        if any(returned.values()):
            rows.append({"name": "returns", "default": "", **returned})
    return rows


def write_table(rows: list[dict], first: str = "parameter") -> str:
    """Parameters as a table; columns that nothing fills are left out.

    There is no table where the signature already says everything."""
    if not any(row["type"] or row["text"] for row in rows):
        return ""
    # What it is comes second: on a phone, types and defaults are what one scrolls to.
    heads = {"name": first, "text": "what it is", "type": "type", "default": "default"}
    columns = [key for key in heads if key == "name" or any(row[key] for row in rows)]
    lines = ["| " + " | ".join(heads[key] for key in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        shown = {
            "name": "*returns*" if row["name"] == "returns" else code(row["name"]),
            "type": code(row["type"], "type"),
            "default": code(row["default"]),
            "text": escape(row["text"]),
        }
        lines.append("| " + " | ".join(shown[key] for key in columns) + " |")
    return "\n".join(lines)


def write_signature(name: str, obj) -> str:
    "The call in one line, without types, which the table has."
    try:
        signature = inspect.signature(obj)
    except (ValueError, TypeError):
        return name
    is_stage = type(obj).__name__ == "StageFunction"
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name == "self" or (is_stage and parameter.name == "out"):
            continue
        text = format_default(parameter.default)
        default = EMPTY if not text else Shown("..." if text == "…" else text)
        kind = inspect.Parameter.KEYWORD_ONLY if is_stage else parameter.kind
        parameters.append(parameter.replace(annotation=EMPTY, default=default, kind=kind))
    return name + str(signature.replace(parameters=parameters, return_annotation=EMPTY))


class Shown(str):
    "A default that a signature shows as it is, without quotes of its own."

    __slots__ = ()
    __repr__ = str.__str__


def write_docstring(obj) -> str:
    "What a docstring says; a dataclass without one has its signature there, which is left out."
    text = inspect.getdoc(obj) or ""
    is_own = isinstance(obj, property) or obj.__dict__.get("__doc__") if inspect.isclass(obj) else 1
    if not is_own or text.startswith(f"{getattr(obj, '__name__', '')}("):
        return ""
    return re.sub(r"(?<![`\\])<(?=\w)", r"\\<", text)


def fence(kind: str, head: str, module: str, body: list[str], depth: int = 3) -> str:
    "A directive of Sphinx's Python domain."
    colons = ":" * depth
    content = "\n\n".join(part for part in body if part)
    return f"{colons}{{py:{kind}}} {head}\n:module: {module}\n\n{content}\n{colons}"


def write_function(name: str, obj, module: str, place: Place) -> str:
    rows = list_parameters(obj)
    is_stage = type(obj).__name__ == "StageFunction"
    stage = "Declares a stage: arguments go by name, and `Stage` runs it." if is_stage else ""
    table = write_table(rows)
    body = [write_docstring(obj), stage, table, place.link(obj, name)]
    return fence("function", write_signature(name, obj), module, body)


def list_members(cls: type) -> list[tuple[str, object]]:
    "The public methods and properties that a class defines and describes itself."
    members = []
    for name, member in vars(cls).items():
        plain = getattr(member, "__func__", member)  # of a class method or static method
        is_described = isinstance(plain, property) or inspect.isfunction(plain)
        plain = getattr(plain, "func", plain)  # of a cached property
        is_described = is_described or inspect.isfunction(plain)
        if not name.startswith("_") and is_described and inspect.getdoc(plain):
            members.append((name, plain))
    return members


def write_member(name: str, member, cls: str, module: str, place: Place) -> str:
    "A method or a property of a class."
    target = f"{cls}.{name}"
    is_property = isinstance(member, property) or not inspect.signature(member).parameters
    if is_property or isinstance(vars_of(module, cls).get(name), property):
        return fence("property", target, module, [write_docstring(member)])
    rows = list_parameters(member)
    body = [write_docstring(member), write_table(rows), place.link(member, target)]
    return fence("method", write_signature(target, member), module, body)


def vars_of(module: str, cls: str) -> dict:
    return vars(getattr(importlib.import_module(module), cls))


def write_class(name: str, cls: type, module: str, place: Place) -> str:
    "A class: its fields or the parameters that make one, then its methods."
    is_record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
    rows = [row for row in list_parameters(cls) if row["name"] != "returns"] if is_record else []
    if not is_record and "__init__" in vars(cls):
        rows = [row for row in list_parameters(cls.__init__) if row["name"] != "returns"]
    table = write_table(rows, "field" if is_record else "parameter")
    members = [write_member(*member, name, module, place) for member in list_members(cls)]
    head = write_signature(name, cls) if rows else name
    body = [write_docstring(cls), table, place.link(cls, name), *members]
    return fence("class", head, module, body, depth=4)


def read_constants(module) -> dict[str, str]:
    "Name → the lines that give each constant of a module its value, comments too."
    source = inspect.getsource(module)
    lines = source.split("\n")
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)]
            constants |= dict.fromkeys(names, "\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return constants


def write_constant(name: str, source: str, module: str, place: Place) -> str:
    "A constant with the line that gives it its value, if that is short."
    lines = source.split("\n")
    if len(lines) > LINES:
        lines = [*lines[:LINES], "# …"]
    shown = "```python\n" + "\n".join(lines) + "\n```" if source else ""
    return fence("data", name, module, [shown, place.link(None, name)])


def write_module(module: str, page: Page, blob: str) -> str:
    "The page of a module: what its notebook promises, then each public name."
    loaded = importlib.import_module(module)
    place = Place(blob, page)
    constants = read_constants(loaded)
    parts = [
        f"# {module}",
        f"> {page.promise}",
        f"The notebook {{doc}}`/{page.name}` explains and tries these names.",
        f":::{{py:module}} {module}\n:::",
    ]
    for name in getattr(loaded, "__all__", []):
        obj = getattr(loaded, name)
        if inspect.isclass(obj) and obj.__module__ == module:
            parts.append(write_class(name, obj, module, place))
        elif inspect.isroutine(inspect.unwrap(obj)) and not name.isupper():
            parts.append(write_function(name, obj, module, place))
        else:
            parts.append(write_constant(name, constants.get(name, ""), module, place))
    return "\n\n".join(parts) + "\n"
