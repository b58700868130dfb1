"""README.md is nbs/index.ipynb: its markdown cells, in order.

`{found:41_sourcing}` in a cell becomes what that section found in the course's reference run.
"""

import json
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "outputs" / "reference" / "course" / "results"
WORDS = {"paper": ("agrees", "disagrees"), "ours": ("holds", "fails")}
OPEN = ("undecided", "not tested")


def count_outcomes(claims: list[dict], whose: str) -> str:
    "Such as `2 of 6 agree, 1 disagrees`; claims that were not decided are the rest."
    counts = Counter(claim["outcome"] for claim in claims)
    parts = [f"{counts[word]} {word}" for word in (*WORDS[whose], *OPEN) if counts[word]]
    return ", ".join(parts)


def describe_first(claims: list[dict]) -> str:
    "The first claim that was decided, with its difference."
    for claim in claims:
        if claim["outcome"] not in OPEN:
            low, high = (100 * bound for bound in claim["interval"])
            points = f"{100 * claim['difference']:+.1f} points, {low:+.1f} to {high:+.1f}"
            return f"“{claim['text']}” **{claim['outcome']}** ({points})"
    return "nothing was decided"


def describe_section(name: str) -> str:
    "What a section found, as a cell of a table."
    claims = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["claims"]
    papers = [claim for claim in claims if claim["paper"] is not None]
    ours = [claim for claim in claims if claim["paper"] is None]
    counted = [f"paper: {count_outcomes(papers, 'paper')}" if papers else ""]
    counted.append(f"ours: {count_outcomes(ours, 'ours')}" if ours else "")
    return f"{'; '.join(filter(None, counted))}. {describe_first(claims)}"


def write_readme() -> str:
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    text = "\n\n".join(texts) + "\n"
    return re.sub(r"\{found:(\w+)\}", lambda match: describe_section(match[1]), text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(write_readme(), encoding="utf-8")
