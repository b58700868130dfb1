"""A policy that is killed at random moments and run again ends with the same weights.

    python tests/soak/rl_kills.py [KILLS]
        10 kills by default; writes outputs/reference/soak/rl_kills.json

The command is `octomed rl` with a base of the clinic, on one process. A kill is a SIGKILL in the
middle of a step that was drawn by lot. What was drawn is compared too: the same questions, the same
share of right responses at every step. It takes some eight minutes of one core.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from octomed.core.files import read_jsonl, write_json
from octomed.core.identity import make_card
from octomed.core.paths import root

STEPS = 12
COMMAND = [
    *(sys.executable, "-m", "octomed", "rl", "clinic_ward:train"),
    *("--student", "clinic/mini", "--limit", "200", "--steps", str(STEPS)),
    *("--prompts", "3", "--responses", "4", "--lr", "0.0003", "--json"),
]


def start(folder: Path):
    env = {
        **os.environ,
        "OCTOMED_STORE": str(folder / "store"),
        "OCTOMED_OUTPUTS": str(folder / "outputs"),
        "OCTOMED_TRAIN": "checkpoint_every=1",
    }
    return subprocess.Popen(
        COMMAND,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def run_whole(folder: Path) -> Path:
    "The policy's folder, of a run that is left alone."
    process = start(folder)
    printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}: {printed}")
    return Path(json.loads(printed)[0]["folder"])


def find_checkpoint(folder: Path) -> int:
    "The last step that is kept; 0 before the first."
    kept = [int(path.name[5:]) for path in folder.rglob("checkpoints/step-*")]
    return max(kept, default=0)


def kill_at(folder: Path, step: int, rng: random.Random) -> int | None:
    "Start a run, and kill it some moments after a step was kept; the step, None if it had ended."
    process = start(folder)
    while find_checkpoint(folder) < step and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 3))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return find_checkpoint(folder)


def describe(policy: Path) -> dict:
    "What two runs must have alike."
    weights = hashlib.sha256((policy / "model.safetensors").read_bytes()).hexdigest()
    log = read_jsonl(policy / "log.jsonl")
    kept = ("step", "asked", "right", "length", "loss", "norm", "entropy")
    return {"weights": weights, "log": [{name: row[name] for name in kept} for row in log]}


def main(kills: int):
    rng, began = random.Random(0), time.time()
    work = Path(tempfile.mkdtemp(prefix="octomed-rl-kills-"))
    expected = describe(run_whole(work / "whole"))
    killed, folder = [], work / "killed"
    while len(killed) < kills:
        step = kill_at(folder, rng.randint(find_checkpoint(folder), STEPS - 2), rng)
        if step is None:  # it ended first: begin again
            shutil.rmtree(folder, ignore_errors=True)
            continue
        killed.append(step)
        print(f"killed {len(killed)} of {kills}, after step {step}", flush=True)
        if step >= STEPS - 2:
            same = describe(run_whole(folder)) == expected
            if not same:
                sys.exit("the run that was killed ended otherwise")
            shutil.rmtree(folder)
    same = describe(run_whole(folder)) == expected
    facts = {
        "kills": len(killed),
        "after_steps": killed,
        "steps": STEPS,
        "same_weights_and_log": same,
        "weights": expected["weights"],
        "card": make_card(minutes=round((time.time() - began) / 60, 1)),
    }
    write_json(root() / "outputs" / "reference" / "soak" / "rl_kills.json", facts)
    shutil.rmtree(work)
    print(json.dumps(facts, indent=1))
    sys.exit(not same)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    main(*(int(word) for word in sys.argv[1:2] or ["10"]))
