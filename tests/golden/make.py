"""The golden store: what a smoke run computes, as a small file to compare two runs by.

python tests/golden/make.py OUTPUTS STORE > FILE.json            of a finished smoke run
python tests/golden/make.py OUTPUTS STORE --against FILE.json    lists what differs
python tests/golden/make.py OUTPUTS STORE --against FILE.json --pinned

Numbers of results depend on the machine's arithmetic: they are compared on one machine, before and
after a change of the code's form. `--pinned` compares what is the same everywhere: the ids of the
clinic's questions, and the keys and texts of what its teachers and graders wrote.
"""

import argparse
import hashlib
import json
import sqlite3
import sys
from pathlib import Path

# Times, and what findings are computed from: their differences and intervals are compared.
TIMES = {"minutes", "seconds", "made", "card", "parents", "committed", "evidence"}


def numbers(value, path=""):
    "Every number of a results file under the path that leads to it."
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in TIMES:
                yield from numbers(part, f"{path}/{key}")
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from numbers(part, f"{path}/{place}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def digest_of(lines) -> str:
    "A short name for many lines, whatever their order."
    text = "\n".join(sorted(lines))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def questions(store: Path) -> dict:
    "The ids of all questions that any stage of the store has read, by source and split."
    by_source: dict[str, set] = {}
    for file in store.glob("stages/*/questions.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            by_source.setdefault(f"{row['source']}:{row['split']}", set()).add(row["id"])
    for file in store.glob("stages/*/rows.jsonl"):
        benchmark = json.loads((file.parent / "card.json").read_text(encoding="utf-8"))[
            "params"
        ].get("benchmark")
        for line in file.read_text(encoding="utf-8").splitlines():
            question = json.loads(line).get("question")
            if benchmark and question:
                by_source.setdefault(benchmark, set()).add(question)
    return {
        name: {"n": len(ids), "digest": digest_of(ids)} for name, ids in sorted(by_source.items())
    }


def samples(store: Path) -> dict:
    "Keys and texts of what the clinic's teachers and graders wrote, by model."
    rows = (
        sqlite3.connect(store / "ledger.sqlite")
        .execute("SELECT model, key, text, finish, tokens FROM samples")
        .fetchall()
    )
    by_model: dict[str, list] = {}
    for model, key, text, finish, tokens in rows:
        if model.startswith("clinic/"):
            by_model.setdefault(model, []).append(f"{key.hex()} {finish} {tokens} {text}")
    return {
        model: {"n": len(lines), "digest": digest_of(lines)}
        for model, lines in sorted(by_model.items())
    }


def golden(outputs: Path, store: Path) -> dict:
    "Numbers of the results files, question ids, and the teachers' samples."
    results = {
        file.stem: dict(numbers(json.loads(file.read_text(encoding="utf-8"))))
        for file in sorted((outputs / "smoke" / "results").glob("*.json"))
    }
    return {"results": results, "questions": questions(store), "samples": samples(store)}


def differences(a, b, path="") -> list[str]:
    "The paths at which two golden files differ."
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for key in sorted(a.keys() | b.keys())
            for d in differences(a.get(key), b.get(key), f"{path} {key}")
        ]
    return [] if a == b else [f"{path}: {a} and {b}"]


def pinned(golden: dict) -> dict:
    "The part of a golden file that is the same on every machine."
    clinic = {k: v for k, v in golden["questions"].items() if k.startswith("clinic_")}
    return {"questions": clinic, "samples": golden["samples"]}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("outputs", type=Path)
    arguments.add_argument("store", type=Path)
    arguments.add_argument("--against", type=Path)
    arguments.add_argument("--pinned", action="store_true")
    given = arguments.parse_args()
    made = golden(given.outputs, given.store)
    if given.against:
        kept = json.loads(given.against.read_text(encoding="utf-8"))
        if given.pinned:
            kept, made = pinned(kept), pinned(made)
        found = differences(kept, made)
        print("\n".join(found[:60]) or "equal, line by line")
        sys.exit(bool(found))
    print(json.dumps(made, indent=1, sort_keys=True))
