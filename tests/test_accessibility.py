"""The pages that the project writes, for readers who do not see them, or not well.

Tables name their columns and rows, and text stands out from its ground (WCAG 2.2, level AA). The
book has its own check of links, alternative texts and tables (`book/check.py`)."""

import re
from html.parser import HTMLParser

import pytest

from octomed.core.paths import shipped
from octomed.evaluate.figures import FAINT, INK
from octomed.run.report_html import STYLE, write_report_page

LEAST = 4.5  # contrast of a text and its ground
TRACES = shipped("browser", "traces.css").read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    "The relative luminance of `#rgb` or `#rrggbb` (WCAG)."
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    linear = []
    for place in (0, 2, 4):
        part = int(digits[place : place + 2], 16) / 255
        linear.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colours_of(style: str) -> dict[str, str]:
    "The named colours of a style sheet."
    return dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", style))


def test_contrast_is_that_of_the_guideline():
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("style", [STYLE, TRACES], ids=["report", "traces"])
def test_text_of_every_colour_stands_out(style):
    named = colours_of(style)
    texts = [name for name in named if name not in ("rule", "wash", "read")]
    assert {"ink", "soft", "yes", "no"} <= set(texts)
    faint = [
        (name, ground)
        for name in texts
        for ground in ("#fff", named["wash"])
        if contrast(named[name], ground) < LEAST
    ]
    assert not faint
    if "read" in named:
        assert contrast(named["ink"], named["read"]) >= LEAST


def test_words_in_a_figure_stand_out():
    assert contrast(INK, "#fff") >= LEAST and contrast(FAINT, "#fff") >= LEAST


class Tables(HTMLParser):
    "The scope of each header cell of a page, and the rows that begin with another cell."

    def __init__(self):
        super().__init__()
        self.tables, self.scopes, self.nameless = 0, [], []
        self.part, self.is_first = "", False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables += 1
        if tag in ("thead", "tbody"):
            self.part = tag
        if tag == "tr":
            self.is_first = True
        if tag == "th":
            self.scopes.append(dict(attrs).get("scope"))
        if tag in ("th", "td") and self.is_first:
            self.is_first = False
            if tag == "td" or (self.part == "thead" and self.scopes[-1] != "col"):
                self.nameless.append(self.getpos())


def test_every_table_of_the_report_names_its_columns_and_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "nowhere"))
    tables = Tables()
    tables.feed(write_report_page("course").read_text(encoding="utf-8"))
    assert tables.tables > 20 and not tables.nameless
    assert set(tables.scopes) == {"col", "row", "rowgroup"}
