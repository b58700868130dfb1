"""Notebooks as the book shows them, and as they run on a machine that has only Jupyter.

Nothing is run: outputs are those that the notebooks hold.
"""

import copy
import re

from . import api
from .notebooks import EXPORT, Page, list_definitions, strip_directives
from .project import Project, api_page, has_api

LABEL = "exported"  # the tag of cells that the module holds; the style sheet marks them


def label_table(html: str) -> str:
    "A table of pandas with the scope of its headings and a mark on long texts, without a border."
    head, mark, body = html.partition("</thead>")
    head = head.replace("<th>", '<th scope="col">').replace(' border="1"', "")
    body = re.sub(r"<td>(?=[^<]{30})", '<td class="long">', body)
    return head + mark + body.replace("<th>", '<th scope="row">')


def describe_figure(heading: str, source: str) -> str:
    "An alternative text: where the figure stands and what draws it."
    calls = re.findall(r"(?<![\w.])((?:\w+\.)*\w+)\(", source)
    drawing = next((call for call in calls if re.search(r"draw|show|plot|sheet", call)), None)
    return f"Figure: {heading}" + (f", drawn by {drawing}" if drawing else "")


def copy_outputs(cell: dict) -> list[dict]:
    "A cell's outputs with tables that name their headings."
    outputs = copy.deepcopy(cell.get("outputs", []))
    for output in outputs:
        html = output.get("data", {}).get("text/html")
        if html:
            output["data"]["text/html"] = label_table("".join(html))
    return outputs


def copy_code(page: Page, cell: dict, heading: str) -> list[dict]:
    "A code cell as a reader sees it, after the label that pages of the API link to."
    source = strip_directives(cell["source"])
    if not source.strip():
        return []
    tags = list(cell["metadata"].get("tags", []))
    cells = []
    if EXPORT.search(cell["source"]):
        tags.append(LABEL)
        if list_definitions(cell["source"]):
            cells.append(prose(f"({api.cell_label(page, cell['id'])})="))
    if "hidden" in tags:
        tags.append("hide-input")
    figure = {"image": {"alt": describe_figure(heading, source)}}
    code = {
        "cell_type": "code",
        "id": cell["id"],
        "metadata": {"tags": tags, "mystnb": figure},
        "execution_count": None,
        "source": source,
        "outputs": copy_outputs(cell),
    }
    return [*cells, code]


def prose(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def introduce(page: Page) -> dict:
    "The line below a notebook's opening: its module, and how to read its cells."
    module = f"{{doc}}`{page.module} </{api_page(page.module)}>`"
    return prose(
        f"*A bar at the left marks the cells that make up the module* {module}*; "
        "the other cells try it.*"
    )


def connect(page: Page, project: Project) -> str:
    "The last part of a page: the notebooks that it uses, and those that use it."
    rows = [
        f"| {{doc}}`/{project.by_module[module].name}` | {', '.join(f'`{n}`' for n in names)} |"
        for module, names in page.imports.items()
        if module in project.by_module and module != page.module
    ]
    users = [f"{{doc}}`/{user.name}`" for user in project.used_by.get(page.module, [])]
    users = [user for user in users if user != f"{{doc}}`/{page.name}`"]
    parts = []
    if rows:
        parts += ["## What this page uses", "| notebook | names |\n|---|---|\n" + "\n".join(rows)]
    if users:
        parts += ["## What uses this page", ", ".join(users) + "."]
    return "\n\n".join(parts)


def copy_notebook(page: Page, project: Project) -> dict:
    "A notebook for the book: no directives, labels at definitions, links to what it uses."
    cells, heading = [], page.title
    for cell in page.cells:
        if cell["cell_type"] == "markdown":
            cells.append(prose(cell["source"]))
            if headings := re.findall(r"^#+ (.+)$", cell["source"], re.M):
                heading = headings[-1]
            if cell["source"] == page.opening and has_api(page):
                cells.append(introduce(page))
        elif cell["cell_type"] == "code":
            cells += copy_code(page, cell, heading)
    if ending := connect(page, project):
        cells.append(prose(ending))
    metadata = {**page.notebook["metadata"], "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def install_cell(project: Project) -> str:
    "The first cell in Colab, whose machines do not have the package."
    address = f"git+{project.settings['git_url']}@{project.settings['branch']}"
    return (
        "# This machine may not have octomed yet; installing it takes some minutes.\n"
        "# If you are asked to restart the runtime then, do so and go on with the next cell.\n"
        "import importlib.util\n\n"
        'if importlib.util.find_spec("octomed") is None:\n'
        f'    %pip install --quiet "{project.settings["lib_name"]} @ {address}"'
    )


def plain_code(source: str) -> dict:
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "source": source,
        "outputs": [],
    }


def copy_for_launch(page: Page, project: Project) -> dict:
    "A notebook without outputs that installs the package before anything else."
    cells = []
    for cell in page.cells:
        source = strip_directives(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(prose(cell["source"]))
        elif source.strip():
            cells.append(plain_code(source))
    cells.insert(1, plain_code(install_cell(project)))
    metadata = page.notebook["metadata"]
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
