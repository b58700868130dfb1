"""A distillation that is killed at random moments and run again ends like an uninterrupted one.

    python tests/soak/distill_kills.py [KILLS] [QUESTIONS]
        writes outputs/reference/soak/distill_kills.json

The kills are SIGKILLs. The teacher is the clinic's simulated one, slowed down so that kills come
midway. It gives the same response to the same question, index and seed, so everything that was
kept can be compared byte for byte.
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
from octomed.core.identity import digest, file_digest, make_card
from octomed.core.paths import root

SAMPLES = 16  # per question
PAUSE = 0.004  # seconds that the slowed teacher takes for a sample


def work(folder: Path, questions: int):
    """One run, from the questions to the accepted set.

    Every sample that is made leaves a line in made.log."""
    from octomed.clinic import teachers
    from octomed.clinic.questions import identify_world
    from octomed.core.store import run_stage
    from octomed.distill import pools, rejection, sampling
    from octomed.generate.engines import register_teacher
    from octomed.generate.samples import Sampling

    log = os.open(folder / "made.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class SlowTeacher:
        name, engine = "simulated", teachers.SimulatedTeacher(teachers.REASONER)
        model = engine.model

        def generate(self, requests, sampling):
            for sample in self.engine.generate(requests, sampling):
                time.sleep(PAUSE)
                os.write(log, f"{time.time():.3f} {sample.question} {sample.index}\n".encode())
                yield sample

    register_teacher("soak/slow", SlowTeacher, "1")
    data = pools.questions(
        sources=(("clinic_ward:train", questions, identify_world()),),
        against=(),
        seed=0,
        max_pixels=12_544,
    )
    drawn = sampling.samples(
        questions=data,
        teachers={"text": ("soak/slow", "1", "r1")},
        n=SAMPLES,
        sampling=Sampling(1.0, 0.95),
        max_pixels=12_544,
    )
    run_stage(rejection.accepted(questions=data, samples=drawn, k=16, answer="letter"))


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
    """(time, question, index) of every sample that was made, in order.

    A sample that was made twice is there twice."""
    log = folder / "made.log"
    lines = log.read_text().splitlines() if log.exists() else []
    fields = [line.split() for line in lines]
    return [(float(when), question, int(index)) for when, question, index in fields]


def kept(folder: Path) -> dict[bytes, dict]:
    "The rows of the ledger by their key, without the two columns that are times."
    held = {}
    for path in sorted((folder / "store").glob("ledger*.sqlite")):
        with sqlite3.connect(path) as db:
            columns = [column[1] for column in db.execute("PRAGMA table_info(samples)")]
            names = [name for name in columns if name not in ("seconds", "at")]
            quoted = ", ".join(f'"{name}"' for name in names)
            rows = db.execute(f"SELECT {quoted} FROM samples").fetchall() if names else []
        assert not held.keys() & {row[0] for row in rows}, "a key is in two shards"
        held |= {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    return held


def files(folder: Path) -> dict[str, str]:
    "Digests of the files that the stages wrote, without their cards."
    paths = sorted((folder / "store" / "stages").rglob("*"))
    files = [path for path in paths if path.is_file() and path.name != "card.json"]
    return {f"{path.parent.name}/{path.name}": file_digest(path) for path in files}


def same_files(whole: dict, broken: dict) -> bool:
    "Whether both runs left the same files; a resumed one may have read more of the clinic's plans."
    further = broken.keys() - whole.keys()
    is_same = bool(whole) and whole.items() <= broken.items()
    return is_same and all(name.startswith("plans-") for name in further)


def start_and_kill(folder: Path, questions: int, share: float, rng) -> dict:
    "Start a run, kill it at a random moment, and report what that cost."
    process, before = start(folder, questions), len(made(folder))
    target = before + rng.uniform(0, 1.5 * share)
    while process.poll() is None and len(made(folder)) < target:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.2))
    killed_at = time.time()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    held = {(row["question"], row["index"]) for row in kept(folder).values()}
    new = made(folder)[before:]
    lost = [when for when, question, index in new if (question, index) not in held]
    return {
        "exit": process.returncode,
        "made": len(new),
        "kept_in_all": len(held),
        "lost": len(lost),
        "oldest_lost_s": round(max((killed_at - when for when in lost), default=0), 3),
    }


def compare_runs(kills: int, questions: int, folder: Path) -> dict:
    "The same distillation in one go and with kills, compared."
    rng, log, total = random.Random(0), [], questions * SAMPLES
    whole, broken = folder / "whole", folder / "broken"
    for path in (whole, broken):
        path.mkdir(parents=True)
    assert start(whole, questions).wait() == 0, "the uninterrupted run did not end well"
    for n in range(kills):
        left = total - (log[-1]["kept_in_all"] if log else 0)
        kill = start_and_kill(broken, questions, share=left / (kills - n + 1), rng=rng)
        log.append({"kill": n + 1, **kill})
        print(log[-1], flush=True)
    assert start(broken, questions).wait() == 0, "the last run did not end well"
    expected, held = kept(whole), kept(broken)
    rows = sorted([key.hex(), list(row.values())[1:]] for key, row in held.items())
    return {
        "samples": total,
        "kills": log,
        "same_keys": expected.keys() == held.keys() and len(expected) == total,
        "same_bytes": expected == held,
        "same_files": same_files(files(whole), files(broken)),
        "digest": digest(rows),
        "made": len(made(broken)),
        "lost": sum(kill["lost"] for kill in log),
        "oldest_lost_s": max((kill["oldest_lost_s"] for kill in log), default=0),
    }


def main(kills: int = 20, questions: int = 256):
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="octomed-soak-") as folder:
        results = compare_runs(kills, questions, Path(folder))
    good = (
        results["same_keys"]
        and results["same_bytes"]
        and results["same_files"]
        and results["made"] == results["samples"] + results["lost"]
        and results["oldest_lost_s"] <= 1
    )
    write_json(
        root() / "outputs" / "reference" / "soak" / "distill_kills.json",
        {
            **results,
            "good": good,
            "card": make_card(minutes=round((time.time() - started) / 60, 1)),
        },
    )
    print(
        f"{kills} kills of {results['samples']} samples: same keys {results['same_keys']}, "
        f"same bytes {results['same_bytes']}, made again {results['lost']}, "
        f"none older than {results['oldest_lost_s']} s"
    )
    sys.exit(not good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
