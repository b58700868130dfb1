"""A recipe killed with SIGKILL at random moments and run again ends with the results of an uninterrupted run.

    python tests/soak/kills.py [KILLS] [SECTIONS]      of smoke; by default 20 and all; writes outputs/reference/soak/kills.json

A kill hits one process of the run: every other time the runner itself, else a kernel, a worker or what else they started.
A run that comes to its end meanwhile is compared, and the next begins from nothing.
"""

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
from octomed.core.identity import card
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
    try:
        children = [
            int(c)
            for t in Path(f"/proc/{pid}/task").iterdir()
            for c in (t / "children").read_text().split()
        ]
    except OSError:
        return []
    return [*children, *(p for c in children for p in started_by(c))]


def name_of(pid: int) -> str:
    try:
        said = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "gone"
    return next(
        (
            name
            for word, name in (
                ("octomed.run.cli", "runner"),
                ("ipykernel", "kernel"),
                ("forkserver", "server or worker"),
                ("resource_tracker", "tracker"),
            )
            if word in said
        ),
        "other",
    )


def timeless(found):
    "Results without what tells of the run itself."
    if isinstance(found, list):
        return [timeless(v) for v in found]
    return (
        {k: timeless(v) for k, v in found.items() if k not in ("card", "seconds")}
        if isinstance(found, dict)
        else found
    )


def results(folder: Path) -> dict:
    return {
        f.stem: timeless(json.loads(f.read_text()))
        for f in sorted((folder / "smoke" / "results").glob("*.json"))
    }


def main(kills: int, sections: str):
    begun, rng, log, same, only = (
        time.time(),
        random.Random(0),
        [],
        [],
        ["--only", sections] if sections else [],
    )
    whole, broken = (Path(tempfile.mkdtemp(prefix="octomed-soak-")) for _ in range(2))
    assert start(whole, only).wait() == 0, "the uninterrupted run did not end well"
    length, wanted = time.time() - begun, results(whole)

    def compared():
        same.append(results(broken) == wanted)
        shutil.rmtree(broken)
        broken.mkdir()

    while len(log) < kills:
        p = start(broken, only)
        try:
            p.wait(timeout=rng.uniform(3, max(length / 4, min(length, 30))))
        except subprocess.TimeoutExpired:
            victim = p.pid if len(log) % 2 else rng.choice(started_by(p.pid) or [p.pid])
            hit = name_of(victim)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                hit = "gone"
            p.wait()  # without its kernel or a worker a run fails by itself, without its server or tracker it may end well
            done = sum((f / "card.json").exists() for f in (broken / "store" / "stages").glob("*"))
            log.append(
                {"kill": len(log) + 1, "hit": hit, "exit": p.returncode, "finished stages": done}
            )
            print(log[-1], flush=True)
        if p.returncode == 0:
            compared()
        assert p.returncode in (0, 1, -signal.SIGKILL), f"a run ended with {p.returncode}"
    assert start(broken, only).wait() == 0, "the last run did not end well"
    compared()
    write_json(
        root() / "outputs" / "reference" / "soak" / "kills.json",
        {
            "recipe": "smoke",
            "sections": list(wanted),
            "kills": log,
            "runs_compared": len(same),
            "same_results": all(same),
            "seconds_uninterrupted": round(length, 1),
            "card": card(minutes=round((time.time() - begun) / 60, 1)),
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
