"""A recipe as jobs of a real Slurm on this machine, two of its jobs killed midway, ends with the results of a local run.

    python tests/soak/slurm.py      as root, with Debian's slurm-wlm and munge; writes outputs/reference/soak/slurm.json

One job is requeued by Slurm, which kills it, and one gets the signals of a preemption, on which submitit requeues it.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECTION = "42_formatting"
TINY = {
    "benchmarks": ["clinic_ward:test", "clinic_rounds:test", "clinic_reading:test"],
    "benchmark_limit": 4,
    "pretrain_tokens": 8000,
}
ASKS = "default: {timeout_min: 20, cpus_per_task: 1, mem_gb: 2, slurm_signal_delay_s: 10}\n"
CONF = """ClusterName=soak
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def command(*words) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    "One node on loopback, its state in a folder; stopped by the ids in its pid files."

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]

    def __enter__(self):
        f = self.folder
        for d in ("state", "spool"):
            (f / d).mkdir(parents=True)
        (f / "munge.key").write_bytes(random.SystemRandom().randbytes(128))
        os.chmod(f / "munge.key", 0o600)
        os.chmod(f, 0o755)
        (f / "slurm.conf").write_text(
            CONF.format(
                folder=f,
                host=self.host,
                cpus=len(os.sched_getaffinity(0)),
                ports=[free_port(), free_port()],
            )
        )
        os.environ["SLURM_CONF"] = str(f / "slurm.conf")
        command(
            "munged",
            "--force",
            f"--key-file={f}/munge.key",
            f"--socket={f}/munge.socket",
            f"--pid-file={f}/munged.pid",
            f"--log-file={f}/munged.log",
            f"--seed-file={f}/munged.seed",
        )
        command("slurmctld")
        command("slurmd", "-N", self.host)
        for _ in range(60):
            if command("sinfo", "--noheader", "--format=%T").strip() == "idle":
                return self
            time.sleep(1)
        raise SystemExit(
            "the node does not become idle: see slurmctld.log\n"
            + (f / "slurmctld.log").read_text()[-2000:]
        )

    def __exit__(self, *_):
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(3)


def queue() -> dict[str, str]:
    return dict(
        line.split() for line in command("squeue", "--noheader", "--format=%i %T").splitlines()
    )


def restarts(job: str) -> int:
    return int(
        next(
            w for w in command("scontrol", "show", "job", job).split() if w.startswith("Restarts=")
        ).split("=")[1]
    )


def results(folder: Path) -> dict:
    found = json.loads((folder / "tiny" / "results" / f"{SECTION}.json").read_text())
    return {k: found[k] for k in ("claims", "rows", "funnel")}


def tiny(folder: Path) -> Path:
    "The recipe smoke, smaller still."
    import yaml

    from octomed.core.paths import root

    raw = yaml.safe_load((root() / "nbs" / "recipes" / "smoke.yaml").read_text())
    raw["common"] |= TINY
    raw["sections"] = {SECTION: {**raw["sections"][SECTION], "questions": 6}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    (folder / "asks.yaml").write_text(ASKS)
    return folder / "tiny.yaml"


def hurt(row: dict, how: str):
    "Requeue a running job through Slurm, or send it what a preemption sends."
    if how == "scontrol requeue":
        command("scontrol", "requeue", row["id"])
    else:
        command("scancel", row["id"], "--signal=SIGTERM")
        time.sleep(2)
        subprocess.run(["scancel", row["id"], "--signal=USR2"])  # it may be gone by then


def started(row: dict, folder: Path) -> bool:
    log = folder / "tiny" / "slurm" / row["log"].replace(".err", ".out")
    return log.exists() and "Loading pickle" in log.read_text()


def watched(rows: list[dict], folder: Path, limit: float = 3600) -> list[dict]:
    "Wait for the queue to be empty; on the way hurt the first student's job and the notebook's."
    victims = {
        next(r["id"] for r in rows if r["job"].startswith("sft")): ("scontrol requeue", 3),
        rows[-1]["id"]: ("signals of a preemption", 12),
    }
    by_id, done, begun = {r["id"]: r for r in rows}, [], time.time()
    while (now := queue()) and time.time() - begun < limit:
        for job, (how, wait) in list(victims.items()):
            if now.get(job) == "RUNNING" and started(by_id[job], folder):
                time.sleep(wait)
                hurt(by_id[job], how)
                victims.pop(job)
                done.append({"job": by_id[job]["job"].split("-")[0], "id": job, "how": how})
                print(done[-1], flush=True)
        time.sleep(1)
    for d in done:
        d["restarts"] = restarts(d.pop("id"))
    return done


def main():
    if missing := [p for p in ("slurmctld", "slurmd", "munged") if not shutil.which(p)]:
        sys.exit(f"{missing[0]} is missing: apt-get install slurm-wlm munge")
    begun, folder = time.time(), Path(tempfile.mkdtemp(prefix="octomed-slurm-"))
    whole, there = folder / "whole", folder / "there"

    def env(f):
        return {
            "OCTOMED_OUTPUTS": str(f),
            "OCTOMED_STORE": str(f / "store"),
            "OMP_NUM_THREADS": "1",
        }

    os.environ |= env(there)  # before octomed is imported, so that jobs inherit it
    from octomed.core.files import write_json
    from octomed.core.identity import card
    from octomed.core.paths import root
    from octomed.run import cluster

    recipe = tiny(folder)
    subprocess.run(
        [sys.executable, "-m", "octomed.run.cli", "run", str(recipe)],
        env={**os.environ, **env(whole)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    local = time.time() - begun
    with Slurm(folder / "slurm"):
        start = time.time()
        rows = cluster.submit(str(recipe), file=folder / "asks.yaml")
        print(
            f"{len(rows)} jobs for {sum(len(r['stages']) for r in rows)} stages and the notebook",
            flush=True,
        )
        try:
            hurts = watched(rows, there)
        finally:
            print("left in the queue:", queue(), flush=True)
        seconds, states = time.time() - start, [s["state"] for s in cluster.state(str(recipe))]
        again = len(cluster.submit(str(recipe), file=folder / "asks.yaml"))
        version = command("sinfo", "--version").split()[1]
    logs = all((there / "tiny" / "slurm" / r["log"]).exists() for r in rows)
    same = (there / "tiny" / "results").exists() and results(whole) == results(there)
    good = (
        same
        and logs
        and not again
        and set(states) == {"done"}
        and len(hurts) == 2
        and all(h["restarts"] for h in hurts)
    )
    import submitit

    write_json(
        root() / "outputs" / "reference" / "soak" / "slurm.json",
        {
            "section": SECTION,
            "slurm": version,
            "submitit": submitit.__version__,
            "jobs": len(rows),
            "stages": sum(len(r["stages"]) for r in rows),
            "killed": hurts,
            "same_results": same,
            "logs": logs,
            "jobs_left_when_asked_again": again,
            "seconds_local": round(local, 1),
            "seconds_on_slurm": round(seconds, 1),
            "good": good,
            "card": card(minutes=round((time.time() - begun) / 60, 1)),
        },
    )
    print(
        f"jobs { {s: states.count(s) for s in states} }; results equal to the local run's: {same}; asked again: {again} jobs; killed: {hurts}"
    )
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"what happened lies in {folder}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
