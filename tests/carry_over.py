"""Carry kept reference results over to the present names of their keys.

python tests/carry_over.py renames the key `verdict` of each claim to `outcome` in
outputs/reference/*/results/*.json. It may be run again: a file that has the present names is left
as it is.
"""

import json
from pathlib import Path

from octomed.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {"verdict": "outcome"}  # former key of a claim → its present key


def renamed(claim: dict) -> dict:
    "The claim with the present names of its keys, in the same order."
    return {RENAMED.get(key, key): value for key, value in claim.items()}


def carry_over(path: Path) -> bool:
    "Rewrite one results file where it has a former key; returns whether it had one."
    results = json.loads(path.read_text(encoding="utf-8"))
    claims = [renamed(claim) for claim in results["claims"]]
    if claims == results["claims"]:
        return False
    write_json(path, results | {"claims": claims})
    return True


if __name__ == "__main__":
    files = sorted(ROOT.glob("outputs/reference/*/results/*.json"))
    changed = [path for path in files if carry_over(path)]
    print(f"{len(changed)} of {len(files)} results files carried over")
