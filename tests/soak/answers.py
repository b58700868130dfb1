"""Real models' answers by an earlier parser and by this one, beside their publishers' letters.

    python tests/soak/answers.py [REVISION]
        REVISION is a commit that holds the earlier parser, by default the last one that took the
        first of several letters; OCTOMED_DATA names the answers' folder; writes
        outputs/reference/soak/answers.json

The file holds ids and letters, and none of the answers' texts.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from octomed.core.files import read_jsonl, write_json
from octomed.core.identity import make_card
from octomed.core.paths import data_dir, root
from octomed.generate import answers as parser
from octomed.generate.prompts import END_OF_THINK

EARLIER = "98d9a90"
MODULE = "octomed/generate/answers.py"
OUT = root() / "outputs" / "reference" / "soak" / "answers.json"
_MARK = re.compile(r"\(([A-J])\)|(?<![\w(])([A-J])(?=[).:,]|\s+(?:and|or)\b|\Z)")


def load_earlier_parser(revision: str):
    "The module of answers as a commit holds it, beside the present one."
    source = subprocess.run(
        ["git", "show", f"{revision}:{MODULE}"], cwd=root(), check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.py"
        path.write_bytes(source)
        spec = importlib.util.spec_from_file_location("octomed.generate.earlier_answers", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def list_ids(data: Path) -> dict[str, list]:
    "The publishers' ids of each model's answers, in the files' order."
    files = sorted(data.glob("mmlu_pro_health/model_cots/*.jsonl"))
    files += sorted(data.glob("mmmu_pro/*_10opt_*.jsonl"))
    return {
        path.stem: [row.get("question_id", row.get("id")) for row in read_jsonl(path)]
        for path in files
    }


def find_statement(text: str, options: dict) -> str:
    "The line, or the content, that this parser reads an answer in."
    text = parser.cut_run_on(text, options, END_OF_THINK)
    content = parser.find_boxed(text) or parser.find_tagged(text) or parser.find_phrase(text)
    lines = text.strip().splitlines() or [""]
    return content if content is not None else lines[-1]


def list_marks(statement: str) -> list[str]:
    "The letters that a statement marks, in order, each once."
    letters = [match[1] or match[2] for match in _MARK.finditer(statement)]
    return list(dict.fromkeys(letters))


JUDGEMENTS = {
    "several letters": "The answer names several letters. Theirs is the first of them.",
    "denied letter": "The answer says that its letter is wrong. Before, it was read all the same.",
    "read alike now": "A last sentence, or a statement before an empty one, names theirs.",
    "read by us alone": "A last sentence names a letter with exactly its option's text.",
    "theirs is elsewhere": "The same, and theirs is a capital elsewhere in the answer.",
}  # kind: what a reader of all answers of this kind finds


def judge_change(statement: str, now: str | None, theirs: str | None) -> str:
    "Which of `JUDGEMENTS` applies to an answer that is read otherwise than before."
    if now is None:
        return "several letters" if len(list_marks(statement)) > 1 else "denied letter"
    if now == theirs:
        return "read alike now"
    return "theirs is elsewhere" if theirs else "read by us alone"


def compare_model(rows: list[tuple], ids: list, earlier, earlier_rows) -> tuple[dict, list[dict]]:
    "The agreement of both parsers on a model's answers, and every answer that they read otherwise."
    agreement = {
        "answers": len(rows),
        "before": earlier.measure_extraction_agreement(earlier_rows)[0],
        "now": parser.measure_extraction_agreement(rows)[0],
    }
    changes = []
    for id, row, earlier_row in zip(ids, rows, earlier_rows, strict=True):
        text, options, theirs = row
        options = parser.letter_options(options)
        before = earlier.judge(*earlier_row[:2]).letter
        now = parser.judge(text, options).letter
        if before == now:
            continue
        statement = find_statement(text, options)
        changes.append(
            {
                "id": id,
                "theirs": theirs or None,
                "before": before,
                "now": now,
                "marks": "".join(list_marks(statement)),
                "kind": judge_change(statement, now=now, theirs=theirs or None),
            }
        )
    return agreement, changes


def count_kinds(changes: dict[str, list[dict]]) -> dict[str, dict[str, int]]:
    "How many answers lost or gained their agreement, or have none before and now, by kind."
    counts = {"lost": Counter(), "gained": Counter(), "neither": Counter()}
    for rows in changes.values():
        for row in rows:
            agreed = row["before"] == row["theirs"]
            agrees = row["now"] == row["theirs"]
            what = "neither"
            if agreed != agrees:
                what = "lost" if agreed else "gained"
            counts[what][row["kind"]] += 1
    return {what: dict(sorted(kinds.items())) for what, kinds in counts.items()}


def main(revision: str) -> None:
    started, data = time.time(), data_dir()
    if data is None:
        sys.exit("name the folder of the published answers by OCTOMED_DATA")
    earlier, ids = load_earlier_parser(revision), list_ids(data)
    earlier_rows = earlier.load_published_answers(data)
    models, changes = {}, {}
    for model, rows in parser.load_published_answers(data).items():
        models[model], changed = compare_model(
            rows, ids[model], earlier=earlier, earlier_rows=earlier_rows[model]
        )
        if changed:
            changes[model] = changed
    kinds = count_kinds(changes)
    minutes = round((time.time() - started) / 60, 1)
    facts = {"models": models, "kinds": kinds, "judgements": JUDGEMENTS, "changes": changes}
    write_json(OUT, {**facts, "earlier": revision, "card": make_card(minutes=minutes)})
    print(json.dumps(kinds, indent=1))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else EARLIER)
