"""Build the book: `python -m book` writes its pages, runs Sphinx, and checks every link.

The notebooks are not run. The pages go to outputs/book/source, the site to outputs/book/html.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import api, chapters, check, pages
from .project import COURSE, Project, api_page, has_api

HERE = Path(__file__).resolve().parent
SITE_BRANCH = "gh-pages"  # the branch that holds the built book, and Colab's notebooks


def save(path: Path, content: str | dict):
    "Write a page, or a notebook."
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def list_texts(project: Project) -> dict[str, str]:
    "Page → text, for every page that is no notebook."
    root, settings = project.root, project.settings
    launch = (HERE / "launch.md").read_text(encoding="utf-8")
    texts = {
        "index": chapters.write_index(project),
        "launch": launch.format(site_branch=SITE_BRANCH, **settings),
        "cli": chapters.write_cli(),
        "api/index": chapters.write_api_index(project),
        **chapters.write_recipes(project),
    }
    for file, page in chapters.TEXTS.items():
        texts[page] = (root / file).read_text(encoding="utf-8")
    for folder, about in project.folders.items():
        if folder != "paper":  # the first page lists the sections
            texts[f"{folder}/index"] = chapters.write_folder(folder, about, project)
    for folder in project.api_folders:
        texts[f"api/{folder}/index"] = chapters.write_api_folder(folder, project)
    for page in filter(has_api, project.pages):
        texts[api_page(page.module)] = api.write_module(page.module, page, project.blob)
    return texts


def write_report(source: Path) -> str:
    "The report of the reference run as a page of its own, and its lines as a page of the book."
    from octomed.run.report import gather_report
    from octomed.run.report_html import write_report_page

    write_report_page("course").replace(source / "_extra" / "report.html")
    return chapters.write_results(gather_report("course"))


def write_source(project: Project, source: Path):
    "The folder that Sphinx reads."
    (source / "_extra").mkdir(parents=True)
    if (course := project.root / "nbs" / COURSE).exists():  # its texts and pictures
        shutil.copytree(course, source / COURSE, ignore=shutil.ignore_patterns("*.ipynb", ".*"))
    for page in project.pages:
        save(source / f"{page.name}.ipynb", pages.copy_notebook(page, project))
        launch = pages.copy_for_launch(page, project)
        save(source / "_extra" / "launch" / f"{page.name}.ipynb", launch)
    for name, text in {**list_texts(project), "results": write_report(source)}.items():
        save(source / f"{name}.md", text)
    site = {
        **project.settings,
        "site_branch": SITE_BRANCH,
        "links": chapters.list_links(project),
        "cells": {page.name: chapters.list_cell_links(page, project) for page in project.pages},
    }
    save(source / "site.json", site)
    shutil.copy(HERE / "conf.py", source / "conf.py")
    shutil.copytree(HERE / "static", source / "_static")
    figures = "outputs/reference/course/figures"  # README shows one of them
    shutil.copytree(project.root / figures, source / figures)


def main() -> int:
    start = time.time()
    project = Project(HERE.parent)
    folder = project.root / "outputs" / "book"
    os.environ["OCTOMED_OUTPUTS"] = str(folder / "report")  # so that the report is the reference's
    shutil.rmtree(folder, ignore_errors=True)  # a page that has lost its notebook goes too
    write_source(project, folder / "source")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options]
    done = subprocess.run([*command, str(folder / "source"), str(folder / "html")])
    print(f"the book took {time.time() - start:.0f} s: {folder / 'html' / 'index.html'}")
    return done.returncode or check.main(str(folder / "html"))


if __name__ == "__main__":
    sys.exit(main())
