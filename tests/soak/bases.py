"""A shipped base is made again: the same weights, and with two threads every gate again.

    python tests/soak/bases.py [NAME ...]     by default tiny
        writes outputs/reference/soak/bases.json

For each NAME the gate is read again on the weights as shipped; then the base is made again with one
thread, and once more with two. Some 50 minutes of two slow cores for each NAME.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def read_again(name: str, store: Path) -> list[dict]:
    "The gate of the weights as shipped, asked anew."
    from octomed.clinic.bases import BASES, PIXELS, gate
    from octomed.clinic.gate import read_gate
    from octomed.clinic.questions import identify_world
    from octomed.clinic.students import find_shipped_student
    from octomed.core.files import read_jsonl
    from octomed.core.store import run_stage

    os.environ["OCTOMED_STORE"] = str(store)
    student = find_shipped_student(name)
    answers = run_stage(gate(student=student, max_pixels=PIXELS, world=identify_world()))
    return read_gate(read_jsonl(answers / "answers.jsonl"), reasons=BASES[name].chains > 0)


def make_again(name: str, threads: int, work: Path) -> tuple[str, list[dict]]:
    "A base from nothing in a store of its own: its digest and its gate."
    out = work / f"{name}-{threads}"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OCTOMED_STORE": str(out / "store")}
    command = [sys.executable, "-m", "octomed", "base", name, "--out", str(out / "base")]
    subprocess.run(command, cwd=HOME, env=env, stdout=subprocess.DEVNULL)
    lines = json.loads((out / "base" / "gate.json").read_text(encoding="utf-8"))["lines"]
    return digest_of(out / "base"), lines


def measure(name: str, work: Path) -> dict:
    from octomed.core.paths import shipped

    say(f"{name}: the gate again")
    started = time.time()
    kept = json.loads((shipped("students", name) / "gate.json").read_text(encoding="utf-8"))
    again = read_again(name, work / "store")
    say(f"{name}: made again with one thread")
    one, _ = make_again(name, 1, work)
    say(f"{name}: made again with two threads")
    two, lines = make_again(name, 2, work)
    shipped_digest = digest_of(shipped("students", name))
    return {
        "gate_again": again,
        "gate_again_is_the_card": again == kept["lines"],
        "same_weights_with_one_thread": one == shipped_digest,
        "same_weights_with_two_threads": two == shipped_digest,
        "gate_with_two_threads": lines,
        "minutes": round((time.time() - started) / 60, 1),
    }


def main(names: list[str]):
    from octomed.core.files import write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root

    with tempfile.TemporaryDirectory() as work:
        measured = {name: measure(name, Path(work)) for name in names}
    good = all(
        each["gate_again_is_the_card"]
        and all(line["passed"] for line in each["gate_with_two_threads"])
        for each in measured.values()
    )
    card = make_card(minutes=sum(each["minutes"] for each in measured.values()))
    target = root() / "outputs" / "reference" / "soak" / "bases.json"
    write_json(target, {**measured, "good": good, "card": card})
    print(json.dumps(measured, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    main(sys.argv[1:] or ["tiny"])
