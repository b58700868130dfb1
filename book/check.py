"""Whether the built book hangs together: links and anchors, alternative texts, one title a page.

python -m book.check FOLDER   prints what is wrong, page by page, and fails if anything is
"""

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}
GENERATED = ("search.html", "genindex.html", "py-modindex.html", "report.html")  # by other hands
LOADED = {"img", "script", "iframe"}  # what a reader's browser fetches without being asked


@dataclass
class Contents(HTMLParser):
    "What a page refers to, and what can be referred to in it."

    links: list[tuple[str, str]] = field(default_factory=list)  # (tag, address)
    anchors: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    titles: int = 0  # in the article; the theme repeats the title for print
    is_article: bool = False
    tables: list[bool] = field(default_factory=list)  # for each open table, whether it has headings

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.update(filter(None, (attributes.get("id"), attributes.get("name"))))
        address = attributes.get(LINKS.get(tag, ""))
        if address is not None:
            is_sheet = tag == "link" and attributes.get("rel") == "stylesheet"
            self.links.append(("img" if is_sheet else tag, address))
        if tag == "img" and not attributes.get("alt", "").strip():
            self.faults.append(f"no alternative text: {attributes.get('src')}")
        self.is_article = self.is_article or tag == "article"
        self.titles += self.is_article and tag == "h1"
        if tag == "table":
            self.tables.append(False)
        elif tag == "th" and self.tables:
            self.tables[-1] = True

    def handle_endtag(self, tag):
        self.is_article = self.is_article and tag != "article"
        if tag == "table" and not self.tables.pop():
            self.faults.append("a table without headings")


def read_page(path: Path) -> Contents:
    contents = Contents()
    contents.feed(path.read_text(encoding="utf-8"))
    return contents


def resolve(page: Path, address: str, root: Path) -> tuple[Path, str] | None:
    "The file and the anchor that an address means; None for one that leaves the book."
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    path = unquote(parts.path)
    base = root if path.startswith("/") else page.parent
    file = (base / path.lstrip("/")).resolve() if path else page
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def find_faults(root: Path) -> list[str]:
    "Dead links and missing texts of a built book, a line each that names page and link."
    root = root.resolve()
    paths = sorted(path for path in root.rglob("*.html") if "_static" not in path.parts)
    pages = {path: read_page(path) for path in paths}
    faults = []
    for path, contents in pages.items():
        name = path.relative_to(root).as_posix()
        if name not in GENERATED:
            faults += [f"{name}: {fault}" for fault in contents.faults]
            faults += [f"{name}: {contents.titles} titles"] * (contents.titles != 1)
        for tag, address in contents.links:
            target = resolve(path, address, root)
            if target is None:
                if tag in LOADED and not address.startswith("data:"):
                    faults.append(f"{name}: loads {address} from elsewhere")
                continue
            file, anchor = target
            if not file.exists():
                faults.append(f"{name}: dead link {address}")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                faults.append(f"{name}: no such anchor {address}")
    return faults


def main(folder: str) -> int:
    root = Path(folder)
    pages = len(list(root.rglob("*.html")))
    faults = find_faults(root)
    if not pages:
        faults = [f"{folder} holds no page: build the book first"]
    print("\n".join(faults) or f"{pages} pages, no dead link, every picture and table is named")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
