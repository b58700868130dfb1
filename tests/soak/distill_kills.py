"""A distillation killed with SIGKILL at random moments and run again ends with what an uninterrupted one ends with.

    python tests/soak/distill_kills.py [KILLS] [QUESTIONS]      writes outputs/reference/soak/distill_kills.json

The teacher is the clinic's simulated one, slowed so that kills land midway; it gives the same response to the same
question, index and seed, so all that was kept can be compared byte for byte.
"""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from octomed.core.files import write_json
from octomed.core.identity import card, digest, file_digest
from octomed.core.paths import root

N, PAUSE = 16, 0.004  # samples a question; seconds that the slowed teacher takes for one


def work(folder: Path, questions: int):
    "One run, from the questions to the accepted set; every sample that is made leaves a line in made.log."
    from octomed.clinic import teachers, world
    from octomed.core.store import run
    from octomed.distill import pools as distill
    from octomed.generate.engines import Sampling, register_teacher

    log = os.open(folder / "made.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Slow:
        name, engine = "simulated", teachers.SimulatedTeacher(teachers.REASONER)
        model = engine.model

        def generate(self, requests, sampling):
            for s in self.engine.generate(requests, sampling):
                time.sleep(PAUSE)
                os.write(log, f"{time.time():.3f} {s.question} {s.index}\n".encode())
                yield s

    register_teacher("soak/slow", Slow, "1")
    data = distill.questions(
        sources=(("clinic_ward:train", questions, world.world_identity()),),
        against=(),
        seed=0,
        max_pixels=12_544,
    )
    drawn = distill.samples(
        questions=data,
        teachers={"text": ("soak/slow", "1", "r1")},
        n=N,
        sampling=Sampling(1.0, 0.95),
        max_pixels=12_544,
    )
    run(distill.accepted(questions=data, samples=drawn, k=16, answer="letter"))


def start(folder: Path, questions: int) -> subprocess.Popen:
    env = {
        **os.environ,
        "OCTOMED_OUTPUTS": str(folder),
        "OCTOMED_STORE": str(folder / "store"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, "work", str(folder), str(questions)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def made(folder: Path) -> list[tuple[float, str, int]]:
    "(when, question, index) of every sample that was made, in order; made twice, it is there twice."
    lines = (folder / "made.log").read_text().splitlines() if (folder / "made.log").exists() else []
    return [(float(t), q, int(i)) for t, q, i in map(str.split, lines)]


def kept(folder: Path) -> dict[bytes, dict]:
    "What the ledger holds, by key, without the two columns that are times."
    held = {}
    for path in sorted((folder / "store").glob("ledger*.sqlite")):
        with sqlite3.connect(path) as db:
            names = [
                r[1]
                for r in db.execute("PRAGMA table_info(samples)")
                if r[1] not in ("seconds", "at")
            ]
            rows = (
                db.execute(
                    "SELECT " + ", ".join(f'"{n}"' for n in names) + " FROM samples"
                ).fetchall()
                if names
                else []
            )
        assert not held.keys() & {r[0] for r in rows}, "a key is in two shards"
        held |= {r[0]: dict(zip(names, r, strict=False)) for r in rows}
    return held


def files(folder: Path) -> dict[str, str]:
    "Digests of what the stages wrote, by stage and key, cards apart."
    found = [
        f
        for f in sorted((folder / "store" / "stages").rglob("*"))
        if f.is_file() and f.name != "card.json"
    ]
    return {f"{f.parent.name}/{f.name}": file_digest(f) for f in found}


def same_files(whole: dict, broken: dict) -> bool:
    "Whether both runs left the same; one that goes on may have read more of the clinic's plans."
    return (
        bool(whole)
        and whole.items() <= broken.items()
        and all(f.startswith("plans-") for f in broken.keys() - whole.keys())
    )


def killed(folder: Path, questions: int, share: float, rng) -> dict:
    "Start, kill at a random moment of what is left to do, and tell what that cost."
    p, before = start(folder, questions), len(made(folder))
    target = before + rng.uniform(0, 1.5 * share)
    while p.poll() is None and len(made(folder)) < target:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.2))
    when = time.time()
    if p.poll() is None:
        os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    there, new = {(r["question"], r["index"]) for r in kept(folder).values()}, made(folder)[before:]
    lost = [t for t, q, i in new if (q, i) not in there]
    return {
        "exit": p.returncode,
        "made": len(new),
        "kept_in_all": len(there),
        "lost": len(lost),
        "oldest_lost_s": round(max((when - t for t in lost), default=0), 3),
    }


def series(kills: int, questions: int, folder: Path) -> dict:
    "The same distillation in one go and with kills, compared."
    rng, log, total = random.Random(0), [], questions * N
    whole, broken = folder / "whole", folder / "broken"
    for f in (whole, broken):
        f.mkdir(parents=True)
    assert start(whole, questions).wait() == 0, "the uninterrupted run did not end well"
    for n in range(kills):
        left = total - (log[-1]["kept_in_all"] if log else 0)
        log.append({"kill": n + 1, **killed(broken, questions, left / (kills - n + 1), rng)})
        print(log[-1], flush=True)
    assert start(broken, questions).wait() == 0, "the last run did not end well"
    a, b = kept(whole), kept(broken)
    return {
        "samples": total,
        "kills": log,
        "same_keys": a.keys() == b.keys() and len(a) == total,
        "same_bytes": a == b,
        "same_files": same_files(files(whole), files(broken)),
        "digest": digest(sorted([k.hex(), list(r.values())[1:]] for k, r in b.items())),
        "made": len(made(broken)),
        "lost": sum(k["lost"] for k in log),
        "oldest_lost_s": max((k["oldest_lost_s"] for k in log), default=0),
    }


def main(kills: int = 20, questions: int = 256):
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="octomed-soak-") as folder:
        found = series(kills, questions, Path(folder))
    good = (
        found["same_keys"]
        and found["same_bytes"]
        and found["same_files"]
        and found["made"] == found["samples"] + found["lost"]
        and found["oldest_lost_s"] <= 1
    )
    write_json(
        root() / "outputs" / "reference" / "soak" / "distill_kills.json",
        {**found, "good": good, "card": card(minutes=round((time.time() - started) / 60, 1))},
    )
    print(
        f"{kills} kills of {found['samples']} samples: same keys {found['same_keys']}, same bytes {found['same_bytes']}, made again {found['lost']}, none older than {found['oldest_lost_s']} s"
    )
    sys.exit(not good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
