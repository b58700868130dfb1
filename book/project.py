"A checkout as the book reads it: settings, folders, notebooks, and who uses whom."

import re
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .notebooks import Page, read_pages

COURSE = "course"  # the folder of the syllabus; the book has that chapter when it is there


@dataclass(frozen=True)
class Project:
    "A checkout, as the book reads it."

    root: Path

    @cached_property
    def settings(self) -> dict[str, str]:
        ini = ConfigParser(delimiters=["="])
        ini.read(self.root / "settings.ini", encoding="utf-8")
        return dict(ini["DEFAULT"])

    @property
    def blob(self) -> str:
        "Where the code host shows files."
        return f"{self.settings['git_url']}/blob/{self.settings['branch']}"

    @cached_property
    def folders(self) -> dict[str, str]:
        "Folder → what is in it, in the order of import: the table of CONTRIBUTING.md."
        text = (self.root / "CONTRIBUTING.md").read_text(encoding="utf-8")
        table = text.split("## Where things live")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", table, re.M)
        rows = [row for row in rows if row[0] != COURSE]
        return {folder: text[0].upper() + text[1:] + "." for folder, text in rows}

    @cached_property
    def pages(self) -> list[Page]:
        return read_pages(self.root / "nbs", (*self.folders, COURSE))

    @cached_property
    def api_folders(self) -> dict[str, str]:
        "The folders whose notebooks export modules."
        folders = {**self.folders, COURSE: "Names of the course."}
        return {
            name: text for name, text in folders.items() if any(map(has_api, self.pages_of(name)))
        }

    @cached_property
    def by_module(self) -> dict[str, Page]:
        return {page.module: page for page in self.pages if page.module}

    def pages_of(self, folder: str) -> list[Page]:
        return [page for page in self.pages if page.name.startswith(f"{folder}/")]

    @cached_property
    def used_by(self) -> dict[str, list[Page]]:
        "Module → the notebooks that import from it."
        users: dict[str, list[Page]] = {}
        for page in self.pages:
            for module in page.imports:
                users.setdefault(module, []).append(page)
        return users


def api_page(module: str) -> str:
    "The page of a module: `api/evaluate/claims`, and `api/octomed` for the package itself."
    return "api/" + (module.removeprefix("octomed.").replace(".", "/"))


def has_api(page: Page) -> bool:
    return bool(page.module) and not page.module.endswith("__main__")
