"""README.md is nbs/index.ipynb: its markdown cells, in order.

Numbers of the course's reference run stand between marks in the notebook, and are written anew:

    <!-- found 41_sourcing -->…<!-- end -->    outcomes of a section, and its first finding
    <!-- outcomes -->…<!-- end -->             outcomes of the whole run
    <!-- minutes -->…<!-- end -->              minutes of the whole run
    <!-- score 42_formatting; cot; clinic_ward:test; seen; generated -->…<!-- end -->
"""

import json
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"
RESULTS = ROOT / "outputs" / "reference" / "course" / "results"
MARKED = re.compile(r"<!-- (\w+)(?: ([^>]*?))? -->(.*?)<!-- end -->", re.S)
WORDS = ("agrees", "disagrees", "holds", "fails", "undecided", "not tested")
OPEN = ("undecided", "not tested")


def read_results(section: str) -> dict:
    return json.loads((RESULTS / f"{section}.json").read_text(encoding="utf-8"))


def read_all() -> list[dict]:
    return [read_results(path.stem) for path in sorted(RESULTS.glob("*.json"))]


def count_outcomes(claims: list[dict]) -> str:
    "Such as `5 agrees, 1 undecided`."
    counts = Counter(claim["outcome"] for claim in claims)
    return ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])


def write_points(claim: dict) -> str:
    low, high = (100 * bound for bound in claim["interval"])
    return f"{100 * claim['difference']:+.1f} points, {low:+.1f} to {high:+.1f}"


def write_found(section: str) -> str:
    "The outcomes of a section, and its first claim that was decided."
    claims = read_results(section)["claims"]
    decided = [claim for claim in claims if claim["outcome"] not in OPEN]
    first = "Nothing was decided."
    if decided:
        claim = decided[0]
        first = f"“{claim['text']}”: **{claim['outcome']}** ({write_points(claim)})."
    return f"{count_outcomes(claims)}. {first}"


def write_outcomes() -> str:
    claims = [claim for results in read_all() for claim in results["claims"]]
    papers = [claim for claim in claims if claim["paper"] is not None]
    ours = [claim for claim in claims if claim["paper"] is None]
    return (
        f"{len(claims)} claims: of {len(papers)} of the paper's {count_outcomes(papers)}; "
        f"of {len(ours)} of our own {count_outcomes(ours)}"
    )


def write_minutes() -> str:
    return f"{sum(results['card']['minutes'] for results in read_all()):.0f}"


def write_score(section: str, arm: str, benchmark: str, joins: str, reading: str) -> str:
    "An accuracy with its interval."
    asked = {"arm": arm, "benchmark": benchmark, "joins": joins, "reading": reading}
    rows = [row for row in read_results(section)["rows"] if asked.items() <= row.items()]
    if len(rows) != 1:
        raise SystemExit(f"{section} has {len(rows)} rows of {asked}: name one that it has")
    low, high = (100 * bound for bound in rows[0]["interval"])
    return f"{100 * rows[0]['accuracy']:.0f} % ({low:.0f} to {high:.0f})"


WRITERS = {
    "found": write_found,
    "outcomes": write_outcomes,
    "minutes": write_minutes,
    "score": write_score,
}


def write_anew(match: re.Match) -> str:
    "A marked place with what the reference results say now."
    kind, given, _ = match.groups()
    parts = [part.strip() for part in given.split(";")] if given else []
    mark = f"<!-- {kind} {given} -->" if given else f"<!-- {kind} -->"
    return f"{mark}{WRITERS[kind](*parts)}<!-- end -->"


def main():
    notebook = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = MARKED.sub(write_anew, "".join(cell["source"]))
        cell["source"] = text.splitlines(keepends=True)
    stored = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    INDEX.write_text(stored, encoding="utf-8")
    texts = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    (ROOT / "README.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
