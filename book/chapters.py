"The pages around the notebooks: the first page, folders, the API's lists, recipes, results."

from collections import Counter
from collections.abc import Iterable

from .notebooks import Page
from .project import COURSE, Project, api_page, has_api

OUTCOMES = (
    "agrees",
    "disagrees",
    "holds",
    "fails",
    "undecided",
    "not tested",
)
# Texts of the repository → their pages.
TEXTS = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "nbs/LOG.md": "log"}


def toctree(entries: Iterable[str], caption: str = "", hidden: bool = True) -> str:
    options = [":hidden:"] if hidden else []
    options += [f":caption: {caption}"] if caption else []
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def entry(page: Page) -> str:
    return f"{page.short_title} </{page.name}>"


def write_index(project: Project) -> str:
    "The first page: README's text, and the order of the chapters."
    notebook = Page(project.root / "nbs" / "index.ipynb", "index")
    text = "\n\n".join(c["source"] for c in notebook.cells if c["cell_type"] == "markdown")
    text = text.replace("](nbs/", "](")  # the book's pages lie as notebooks do below nbs/
    start = [page for page in project.pages if "/" not in page.name]
    library = [folder for folder in project.folders if folder != "paper"]
    course = list_course(project)
    reference = ["recipes/index", "cli", "api/index"]
    trees = [
        toctree([*map(entry, start), "launch"], "Start"),
        toctree([entry(page) for page in project.pages_of("paper")], "The paper"),
        toctree(course, "The course") if course else "",
        toctree([f"{folder}/index" for folder in library], "The library"),
        toctree(reference, "Reference"),
        toctree(["results", "log"], "Results"),
        toctree(["contributing", "changelog"], "The project"),
    ]
    return "\n\n".join([text, *filter(None, trees)]) + "\n"


def list_course_texts(project: Project) -> list[str]:
    "Pages of the course that are plain Markdown, by their place below `nbs/`."
    nbs = project.root / "nbs"
    paths = sorted((nbs / COURSE).rglob("*.md"))
    return [path.relative_to(nbs).with_suffix("").as_posix() for path in paths]


def find_place(name: str) -> tuple:
    "Where a page of the course stands: the syllabus first, a unit's page before its exercises."
    parts = name.split("/")[1:]
    return parts[0] == "instructor", *("" if part == "index" else part for part in parts)


def list_course(project: Project) -> list[str]:
    "The course's notebooks and texts in the order of the chapter; instructors' pages are last."
    entries = {page.name: entry(page) for page in project.pages_of(COURSE)}
    entries |= {name: f"/{name}" for name in list_course_texts(project)}
    return [entries[name] for name in sorted(entries, key=find_place)]


def write_folder(folder: str, about: str, project: Project) -> str:
    "The page of a folder of the library: its notebooks with what each promises."
    pages = project.pages_of(folder)
    rows = [f"| {{doc}}`/{page.name}` | {page.promise} |" for page in pages]
    table = "\n".join(["| notebook | what it is about |", "|---|---|", *rows])
    return "\n\n".join([f"# {folder}", f"> {about}", table, toctree(map(entry, pages))]) + "\n"


def write_api_index(project: Project) -> str:
    "The first page of the API: the modules of each folder."
    text = [
        "# API",
        "> Every public name of the package, by module: signature, parameters, source.",
        "Types, defaults and comments are read from the code. {doc}`/00_front_door` has the names "
        "that `import octomed` gives, and {ref}`the index <genindex>` has all of them by letter.",
    ]
    top = [page for page in project.pages if "/" not in page.name and has_api(page)]
    trees = [toctree([f"/{api_page(page.module)}" for page in top])]
    for folder, about in project.api_folders.items():
        pages = [page for page in project.pages_of(folder) if has_api(page)]
        rows = [
            f"| {{doc}}`{page.module} </{api_page(page.module)}>` | {page.promise} |"
            for page in pages
        ]
        table = "| module | what it is about |\n|---|---|\n" + "\n".join(rows)
        text += [f"## {folder}", about, table]
        trees += [toctree([f"{folder}/index"])]
    return "\n\n".join([*text, *trees]) + "\n"


def write_api_folder(folder: str, project: Project) -> str:
    "The page of a folder of the API: each public name with its page."
    pages = [page for page in project.pages_of(folder) if has_api(page)]
    parts = [f"# octomed.{folder}", f"> {project.api_folders[folder]}"]
    for page in pages:
        names = [name for name in page.definitions if "." not in name]
        listed = ", ".join(f"{{py:obj}}`~{page.module}.{name}`" for name in names)
        parts += [f"## {{doc}}`{page.module} </{api_page(page.module)}>`", page.promise, listed]
    tree = toctree([f"{p.module.removeprefix('octomed.')} </{api_page(p.module)}>" for p in pages])
    return "\n\n".join(part for part in [*parts, tree] if part) + "\n"


def write_recipes(project: Project) -> dict[str, str]:
    "Page → text for every recipe: the YAML with its comments."
    folder = project.root / "nbs" / "recipes"
    pages, names = {}, []
    for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]:
        name = path.relative_to(folder).with_suffix("").as_posix()
        names.append(name)
        text = path.read_text(encoding="utf-8").rstrip()
        where = f"`nbs/recipes/{name}.yaml`"
        pages[f"recipes/{name}"] = f"# {name}\n\n{where}\n\n```yaml\n{text}\n```\n"
    rows = "\n".join(f"| {{doc}}`/recipes/{name}` | `nbs/recipes/{name}.yaml` |" for name in names)
    pages["recipes/index"] = (
        "# Recipes\n\n> A recipe gives the whole paper one size.\n\n"
        "The reason for a value stands beside it. {doc}`/core/06_recipe` reads these files, and "
        "{doc}`/index` says what each size is for.\n\n"
        f"| recipe | file |\n|---|---|\n{rows}\n\n{toctree(names)}\n"
    )
    return pages


def write_cli() -> str:
    "The command line, by cyclopts's own writer."
    from octomed.run.cli import app

    text = app.generate_docs(output_format="markdown")
    head, commands = text.split("## Table of Contents")[0], text[text.index("**Commands**") :]
    return head.replace("# octomed", "# The command line") + commands


def write_results(report: dict) -> str:
    "The results of the reference run, a line for each section, and a link to the report."
    head = ["section", "claims", *OUTCOMES]
    rows = []
    for section in report["sections"]:
        outcomes = [claim["outcome"] for claim in section["claims"]]
        counts = [len(outcomes), *(outcomes.count(outcome) for outcome in OUTCOMES)]
        rows.append([f"{{doc}}`/paper/{section['section']}`", *map(str, counts)])
    table = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n\n".join(
        [
            "# The reference run",
            "> What the run that the project keeps found, section by section.",
            '<a href="report.html">The whole report</a> has every claim with '
            "its interval, every score, the figures, and the machine that made them.",
            *(note for note in report["notes"] if not note.startswith("Not run here")),
            "\n".join("| " + " | ".join(row) + " |" for row in table),
            "An outcome of the paper's claims is *agrees* or *disagrees*, of our own *holds* or "
            "*fails*, of either *undecided*, or *not tested* where the students fail their gate. "
            "{doc}`/evaluate/05_claims` says how they are judged.",
        ]
    )


def is_telling(name: str) -> bool:
    "Whether inline code of this text can only mean the name."
    return len(name) > 2 and ("_" in name or not name.islower())


def list_links(project: Project) -> dict[str, list[str]]:
    """What inline code means: code → (kind of target, target).

    Names of one plain word, such as `load`, are left alone, as are those that several modules have:
    in prose they may mean something else."""
    links: dict[str, list[str]] = {}
    times = Counter(name for page in project.pages if has_api(page) for name in page.definitions)
    for page in project.pages:
        short = page.name.split("/")[-1]
        for name in (page.name, f"nbs/{page.name}.ipynb", short if short[:1].isdigit() else ""):
            links[name] = ["doc", page.name]
        if not has_api(page):
            continue
        for name in (page.module, page.module.removeprefix("octomed.")):
            links[name] = ["doc", api_page(page.module)]
        for name in page.definitions:
            links[f"{page.module}.{name}"] = ["py", f"{page.module}.{name}"]
            if is_telling(name) and times[name] == 1:
                links[name] = ["py", f"{page.module}.{name}"]
    for name, target in TEXTS.items():
        links[name] = ["doc", target]
    for path in (project.root / "nbs" / "recipes").rglob("*.yaml"):
        place = path.relative_to(project.root / "nbs").with_suffix("").as_posix()
        links[f"nbs/{place}.yaml"] = ["doc", place]
    return links


def list_cell_links(page: Page, project: Project) -> dict[str, str]:
    "Names in a page's cells → page and anchor: what it imports from the package or exports."
    links = {}
    public = {} if not has_api(page) else {page.module: list(page.definitions)}
    for module, names in {**page.imports, **public}.items():
        other = project.by_module.get(module)
        if not other or not has_api(other):
            continue
        if other != page:
            links[module] = other.name
        for name in names:
            if name in other.definitions:
                links[name] = f"{api_page(module)}#{module}.{name}"
    return links
