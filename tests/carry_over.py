"""Carry kept reference results over to the present names.

python tests/carry_over.py renames the key `verdict` of each claim to `outcome`, and modules that
have moved, in the results and cards under outputs/reference/. It may be run again: a file that has
the present names is left as it is.
"""

import json
from pathlib import Path

from octomed.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {"verdict": "outcome"}  # former key of a claim → its present key
MOVED = {"octomed.clinic.world": "octomed.clinic.questions"}  # what a recipe's plugins name


def renamed(claim: dict) -> dict:
    "The claim with the present names of its keys, in the same order."
    return {RENAMED.get(key, key): value for key, value in claim.items()}


def moved(value):
    "The same value with the present names of modules, wherever they stand in it."
    if isinstance(value, dict):
        return {key: moved(part) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part) for part in value]
    return MOVED.get(value, value) if isinstance(value, str) else value


def carry_over(path: Path) -> bool:
    "Rewrite one file where it has a former name; returns whether it had one."
    kept = json.loads(path.read_text(encoding="utf-8"))
    carried = moved(kept)
    if "claims" in carried:
        carried["claims"] = [renamed(claim) for claim in carried["claims"]]
    if carried == kept:
        return False
    write_json(path, carried)
    return True


if __name__ == "__main__":
    reference = ROOT / "outputs" / "reference"
    files = sorted([*reference.glob("*/results/*.json"), *reference.glob("*/cards/*.json")])
    changed = [path for path in files if carry_over(path)]
    print(f"{len(changed)} of {len(files)} files carried over")
