"""The book: pages of the API from signatures and comments, notebooks without noise, dead links.

The whole book is built by `make book`, which ends on the same check of links.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from book import api, chapters, check, notebooks, pages
from book.project import Project

ROOT = Path(__file__).resolve().parents[1]

OPENING = "# Sums: of two\n\n> Numbers are added.\n\nThe paper's eq. 1."
ADD = """#| export
def add_numbers(
    first: int,  # one | two
    second: "int | None" = None,  # the other; `None`: zero
    *rest: int,
) -> int:  # their sum
    "The sum (paper §2)."
    return first + (second or 0) + sum(rest)
"""


def code_cell(name: str, source: str, outputs=(), tags=()) -> dict:
    return {
        "cell_type": "code",
        "id": name,
        "metadata": {"tags": list(tags)},
        "execution_count": None,
        "outputs": list(outputs),
        "source": source.splitlines(True),
    }


def write_notebook(path: Path, *cells: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")


def prose_cell(text: str) -> dict:
    return {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": text}


@pytest.fixture
def project(tmp_path):
    "A checkout of two notebooks: a library's, and a section's that uses it."
    (tmp_path / "settings.ini").write_text(
        "[DEFAULT]\nlib_name = octomed\ngit_url = https://host.example/o/r\nbranch = main\n"
    )
    folders = "## Where things live\n\n| `core` | sums |\n| `paper` | sections |\n\n## Next\n"
    (tmp_path / "CONTRIBUTING.md").write_text(folders)
    rows = f"<tr><th>0</th><td>short</td><td>{'a long text ' * 4}</td></tr>"
    table = f'<table border="1"><thead><tr><th>n</th></tr></thead>{rows}</table>'
    shown = {"output_type": "display_data", "metadata": {}, "data": {"text/html": table}}
    write_notebook(
        tmp_path / "nbs" / "core" / "01_sums.ipynb",
        prose_cell(OPENING),
        code_cell("c0000001", "#| default_exp core.sums"),
        code_cell("c0000002", ADD),
        code_cell("c0000003", "#| export\n@patch\ndef twice(self: Sum): return 2\n_HIDDEN = 1"),
        code_cell("c0000004", "#| eval: false\nadd_numbers(1)", [shown]),
        code_cell("c0000005", "plt.draw_bars(1)", tags=["hidden"]),
    )
    write_notebook(
        tmp_path / "nbs" / "paper" / "30_use.ipynb",
        prose_cell("# 30 · Use: it\n\n> A use."),
        code_cell("d0000001", "#| default_exp paper.use"),
        code_cell("d0000002", "from octomed.core.sums import add_numbers\n%time add_numbers(1)"),
    )
    return Project(tmp_path)


def sources(notebook: dict) -> list[str]:
    return [cell["source"] for cell in notebook["cells"]]


def test_a_notebook_says_what_it_holds(project):
    sums, use = project.pages
    assert (sums.name, sums.short_title) == ("core/01_sums", "Sums")
    assert sums.promise == "Numbers are added."
    assert sums.module == "octomed.core.sums"
    assert sums.definitions == {"add_numbers": "c0000002", "Sum.twice": "c0000003"}
    assert use.imports == {"octomed.core.sums": ["add_numbers"]}
    assert project.used_by == {"octomed.core.sums": [use]}


def test_the_book_shows_cells_without_directives_and_keeps_their_outputs(project):
    sums, use = project.pages
    notebook = pages.copy_notebook(sums, project)
    assert not any("#|" in source for source in sources(notebook))
    assert "(cell-core-01_sums-c0000002)=" in sources(notebook)
    by_id = {cell.get("id"): cell for cell in notebook["cells"]}
    assert pages.LABEL in by_id["c0000002"]["metadata"]["tags"]
    assert pages.LABEL not in by_id["c0000004"]["metadata"]["tags"]
    assert "hide-input" in by_id["c0000005"]["metadata"]["tags"]
    alt = by_id["c0000005"]["metadata"]["mystnb"]["image"]["alt"]
    assert alt == "Figure: Sums: of two, drawn by plt.draw_bars"
    [output] = by_id["c0000004"]["outputs"]
    shown = output["data"]["text/html"]
    assert '<th scope="col">n</th>' in shown and '<th scope="row">0</th>' in shown
    assert "border" not in shown
    assert "<td>short" in shown and '<td class="long">a long' in shown
    assert "{doc}`/paper/30_use`" in sources(notebook)[-1]
    used = sources(pages.copy_notebook(use, project))[-1]
    assert "| {doc}`/core/01_sums` | `add_numbers` |" in used


def test_a_copy_for_colab_installs_the_package_first(project):
    notebook = pages.copy_for_launch(project.pages[1], project)
    opening, install, use = sources(notebook)
    assert opening.startswith("# 30") and "%time" in use
    assert 'octomed @ git+https://host.example/o/r@main"' in install
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_inline_code_means_a_page_only_where_it_can_mean_nothing_else(project):
    links = chapters.list_links(project)
    assert links["add_numbers"] == ["py", "octomed.core.sums.add_numbers"]
    assert links["30_use"] == links["nbs/paper/30_use.ipynb"] == ["doc", "paper/30_use"]
    assert links["core.sums"] == ["doc", "api/core/sums"]
    assert not chapters.is_telling("load") and chapters.is_telling("Claim")
    cells = chapters.list_cell_links(project.pages[1], project)
    assert cells["octomed.core.sums"] == "core/01_sums"
    assert cells["add_numbers"] == "api/core/sums#octomed.core.sums.add_numbers"


def test_the_course_is_a_chapter_when_it_is_there(project):
    write_notebook(project.root / "nbs" / "index.ipynb", prose_cell("# The book"))
    assert ":caption: The course" not in chapters.write_index(project)
    write_notebook(project.root / "nbs" / "course" / "00_syllabus.ipynb", prose_cell("# Syllabus"))
    (project.root / "nbs" / "course" / "rubric.md").write_text("# Rubric")
    exporting = code_cell("e0000001", "#| default_exp course.marks")
    marks = project.root / "nbs" / "course" / "solutions" / "01_marks.ipynb"
    write_notebook(marks, prose_cell("# Marks\n\n> Given."), exporting)
    with_course = Project(project.root)
    index = chapters.write_index(with_course)
    assert ":caption: The course" in index
    assert "Syllabus </course/00_syllabus>" in index and "/course/rubric" in index
    assert "Marks </course/solutions/01_marks>" in index
    assert "course/index" in chapters.write_api_index(with_course)
    for name in ("index", "unit1/index", "instructor/unit1"):
        path = project.root / "nbs" / "course" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# A page")
    write_notebook(path.parents[1] / "unit1" / "assignment.ipynb", prose_cell("# Exercises"))
    in_order = ["index", "unit1/index", "unit1/assignment", "instructor/unit1"]
    course = chapters.list_course(Project(project.root))
    names = [entry.split("/course/")[1].rstrip(">") for entry in course]
    assert [name for name in names if name in in_order] == in_order
    assert "course/index" not in chapters.write_api_index(project)


def test_parameters_have_types_defaults_and_the_comment_beside_them():
    from octomed.data.resize import smart_resize

    rows = {row["name"]: row for row in api.list_parameters(smart_resize)}
    assert rows["factor"]["type"] == "int" and rows["factor"]["default"] == "28"
    assert rows["max_pixels"]["text"] == "a larger area is reduced (paper §3)"
    assert rows["returns"] == {
        "name": "returns",
        "type": "tuple[int, int]",
        "default": "",
        "text": "height, width",
    }


@dataclass
class Measured:
    "What was measured."

    values: list = field(default_factory=list)  # in seconds
    unit: "str | None" = "a" * 80  # of the values

    def total(self, factor: float = 1.0) -> float:
        "The sum of `values`."
        return factor * sum(self.values)

    @property
    def count(self) -> int:
        "How many there are."
        return len(self.values)


def test_a_class_has_fields_methods_and_properties():
    place = api.Place("https://host.example/blob/main", None)
    text = api.write_class("Measured", Measured, __name__, place)
    assert "{py:class} Measured(values=new, unit=...)" in text
    assert "| `values` | in seconds | `list`{.type} | `new` |" in text
    assert r"| `unit` | of the values | `str \| None`{.type} | `…` |" in text
    assert "{py:method} Measured.total(factor=1.0)" in text
    assert "{py:property} Measured.count" in text


def test_a_stage_is_called_by_name_and_without_its_folder():
    from octomed.distill.sampling import samples

    signature = api.write_signature("samples", samples)
    assert signature == "samples(*, questions, teachers, n, sampling, max_pixels)"


def test_every_public_name_has_an_entry_that_leads_to_its_cell_and_its_lines():
    project = Project(ROOT)
    page = project.by_module["octomed.evaluate.claims"]
    text = api.write_module(page.module, page, project.blob)
    for name, cell in page.definitions.items():
        assert f"}} {name}" in text
        assert f"<{api.cell_label(page, cell)}>" in text
    line = (ROOT / "octomed/evaluate/claims.py").read_text().split("\n").index("class Claim:")
    assert f"{project.blob}/octomed/evaluate/claims.py#L{line}-" in text  # its decorator's line


def test_the_real_notebooks_export_what_their_modules_hold():
    import importlib

    for page in Project(ROOT).pages:
        if page.module and not page.module.endswith("__main__"):
            names = set(importlib.import_module(page.module).__all__)
            assert {name for name in page.definitions if "." not in name} == names, page.name


def test_a_dead_link_a_missing_anchor_and_an_unnamed_picture_are_reported(tmp_path, capsys):
    (tmp_path / "a.html").write_text(
        '<article><h1 id="top">A</h1><a href="b.html#here">b</a><a href="#top">up</a>'
        '<a href="https://host.example/x">out</a></article>'
    )
    (tmp_path / "b.html").write_text('<article><h1 id="here">B</h1></article>')
    assert check.main(str(tmp_path)) == 0
    (tmp_path / "b.html").write_text(
        '<article><h1>B</h1><a href="c.html">c</a><img src="a.html">'
        '<script src="https://host.example/s.js"></script>'
        "<table><tr><td>1</td></tr></table></article>"
    )
    assert check.main(str(tmp_path)) == 1
    lines = capsys.readouterr().out.split("\n")
    assert "a.html: no such anchor b.html#here" in lines
    assert "b.html: dead link c.html" in lines
    assert "b.html: no alternative text: a.html" in lines
    assert "b.html: a table without headings" in lines
    assert "b.html: loads https://host.example/s.js from elsewhere" in lines


def test_a_folder_without_pages_is_no_book(tmp_path):
    assert check.main(str(tmp_path)) == 1


def test_constants_keep_their_comments():
    import octomed.data.resize as resize

    line = "MAX_PIXELS = 262_144  # the paper's limit (§3): 512 × 512"
    assert api.read_constants(resize)["MAX_PIXELS"] == line


def test_directives_go_and_code_stays():
    assert notebooks.strip_directives("#| export\n# why\nx = 1\n") == "# why\nx = 1"
