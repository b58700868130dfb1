"""A recipe that is killed at random moments and run again ends like an uninterrupted run.

    python tests/soak/kills.py [KILLS] [SECTIONS]
        of smoke; by default 20 kills and all sections; writes outputs/reference/soak/kills.json

A kill is a SIGKILL to one process of the run. Every other time it is the runner itself, otherwise a
kernel, a worker or another process that they started. A run that ends before its kill is compared,
and the next one begins from nothing.
"""

import itertools
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

from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import root


def start(folder: Path, only: list[str]):
    env = {**os.environ, "OCTOMED_OUTPUTS": str(folder), "OCTOMED_STORE": str(folder / "store")}
    return subprocess.Popen(
        [sys.executable, "-m", "octomed.run.cli", "run", "smoke", *only],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def started_by(pid: int) -> list[int]:
    "The processes that a process started, and those that they started."
    children = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    except OSError:
        return []
    grandchildren = itertools.chain.from_iterable(started_by(child) for child in children)
    return [*children, *grandchildren]


# a word of the command line, and what such a process is
KINDS = {
    "octomed.run.cli": "runner",
    "ipykernel": "kernel",
    "forkserver": "server or worker",
    "resource_tracker": "tracker",
}


def name_of(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "gone"
    return next((name for word, name in KINDS.items() if word in command), "other")


def timeless(value):
    "Results without what describes the run itself."
    if isinstance(value, list):
        return [timeless(entry) for entry in value]
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("card", "seconds")}
    return value


def results(folder: Path) -> dict:
    paths = sorted((folder / "smoke" / "results").glob("*.json"))
    return {path.stem: timeless(json.loads(path.read_text())) for path in paths}


def kill_one_of(process: subprocess.Popen, runner: bool, rng) -> str:
    "Kill the runner or a process that it started, and wait for the run to end; says what was hit."
    victim = process.pid if runner else rng.choice(started_by(process.pid) or [process.pid])
    hit = name_of(victim)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        hit = "gone"
    # without its kernel or a worker a run fails by itself; without its server or tracker it may
    # end well
    process.wait()
    return hit


def finished_stages(folder: Path) -> int:
    stages = (folder / "store" / "stages").glob("*")
    return sum((stage / "card.json").exists() for stage in stages)


def run_with_kills(folder: Path, only: list[str], kills: int, length: float, expected: dict):
    "Run, kill and run again: (the kills, whether each run that ended had the expected results)."
    rng, log, same = random.Random(0), [], []

    def compare():
        same.append(results(folder) == expected)
        shutil.rmtree(folder)
        folder.mkdir()

    while len(log) < kills:
        process = start(folder, only)
        try:
            process.wait(timeout=rng.uniform(3, max(length / 4, min(length, 30))))
        except subprocess.TimeoutExpired:
            hit = kill_one_of(process, runner=len(log) % 2 == 1, rng=rng)
            record = {"kill": len(log) + 1, "hit": hit, "exit": process.returncode}
            log.append({**record, "finished stages": finished_stages(folder)})
            print(log[-1], flush=True)
        if process.returncode == 0:
            compare()
        code = process.returncode
        assert code in (0, 1, -signal.SIGKILL), f"a run ended with {code}"
    assert start(folder, only).wait() == 0, "the last run did not end well"
    compare()
    return log, same


def main(kills: int, sections: str):
    started, only = time.time(), ["--only", sections] if sections else []
    whole, broken = (Path(tempfile.mkdtemp(prefix="octomed-soak-")) for _ in range(2))
    assert start(whole, only).wait() == 0, "the uninterrupted run did not end well"
    length, expected = time.time() - started, results(whole)
    log, same = run_with_kills(broken, only, kills=kills, length=length, expected=expected)
    write_json(
        root() / "outputs" / "reference" / "soak" / "kills.json",
        {
            "recipe": "smoke",
            "sections": list(expected),
            "kills": log,
            "runs_compared": len(same),
            "same_results": all(same),
            "seconds_uninterrupted": round(length, 1),
            "card": make_card(minutes=round((time.time() - started) / 60, 1)),
        },
    )
    for folder in (whole, broken):
        shutil.rmtree(folder)
    print(
        f"{kills} kills; results of {len(same)} runs equal to the uninterrupted one's: {all(same)}"
    )
    sys.exit(not all(same))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2] if len(sys.argv) > 2 else "")
