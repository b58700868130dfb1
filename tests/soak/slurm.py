"""A recipe runs as jobs of a real Slurm on this machine and ends with the results of a local run.

    python tests/soak/slurm.py
        as root, with Debian's slurm-wlm and munge; writes outputs/reference/soak/slurm.json

Two of the jobs are killed midway. One is requeued by Slurm, which kills it. The other gets the
signals of a preemption, after which submitit requeues it.
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
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(random.SystemRandom().randbytes(128))
        os.chmod(folder / "munge.key", 0o600)
        os.chmod(folder, 0o755)
        ports = [free_port(), free_port()]
        cpus = len(os.sched_getaffinity(0))
        conf = CONF.format(folder=folder, host=self.host, cpus=cpus, ports=ports)
        (folder / "slurm.conf").write_text(conf)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        self.start_daemons()
        for _ in range(60):
            if command("sinfo", "--noheader", "--format=%T").strip() == "idle":
                return self
            time.sleep(1)
        log = (folder / "slurmctld.log").read_text()[-2000:]
        raise SystemExit(f"the node does not become idle: see slurmctld.log\n{log}")

    def start_daemons(self):
        command(
            "munged",
            "--force",
            f"--key-file={self.folder}/munge.key",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )
        command("slurmctld")
        command("slurmd", "-N", self.host)

    def __exit__(self, *_):
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(3)


def queue() -> dict[str, str]:
    "The state of each job in the queue, by its id."
    lines = command("squeue", "--noheader", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)


def restarts(job: str) -> int:
    "How often Slurm has started a job again."
    words = command("scontrol", "show", "job", job).split()
    (field,) = [word for word in words if word.startswith("Restarts=")][:1]
    return int(field.split("=")[1])


def results(folder: Path) -> dict:
    written = json.loads((folder / "tiny" / "results" / f"{SECTION}.json").read_text())
    return {key: written[key] for key in ("claims", "rows", "funnel")}


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


def watch(rows: list[dict], folder: Path, limit: float = 3600) -> list[dict]:
    "Wait until the queue is empty; meanwhile hurt the first student's job and the notebook's."
    first_student = next(row["id"] for row in rows if row["job"].startswith("sft"))
    victims = {  # job → how it is hurt, and how many seconds after its start
        first_student: ("scontrol requeue", 3),
        rows[-1]["id"]: ("signals of a preemption", 12),
    }
    by_id, hurts, begun = {row["id"]: row for row in rows}, [], time.time()
    while time.time() - begun < limit:
        states = queue()
        if not states:
            break
        for job, (how, wait) in list(victims.items()):
            if states.get(job) == "RUNNING" and started(by_id[job], folder):
                time.sleep(wait)
                hurt(by_id[job], how)
                victims.pop(job)
                hurts.append({"job": by_id[job]["job"].split("-")[0], "id": job, "how": how})
                print(hurts[-1], flush=True)
        time.sleep(1)
    for row in hurts:
        row["restarts"] = restarts(row.pop("id"))
    return hurts


def places(folder: Path) -> dict[str, str]:
    "The environment of a run that leaves everything in a folder."
    return {
        "OCTOMED_OUTPUTS": str(folder),
        "OCTOMED_STORE": str(folder / "store"),
        "OMP_NUM_THREADS": "1",
    }


def run_locally(recipe: Path, folder: Path):
    subprocess.run(
        [sys.executable, "-m", "octomed.run.cli", "run", str(recipe)],
        env={**os.environ, **places(folder)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def run_on_slurm(recipe: Path, folder: Path, slurm: Path) -> dict:
    "Submit a recipe, hurt two of its jobs, and wait: the rows of its jobs and what became of them."
    from octomed.run import cluster

    with Slurm(slurm):
        start, asks = time.time(), recipe.parent / "asks.yaml"
        rows = cluster.submit(str(recipe), file=asks)
        stages = sum(len(row["stages"]) for row in rows)
        print(f"{len(rows)} jobs for {stages} stages and the notebook", flush=True)
        try:
            hurts = watch(rows, folder)
        finally:
            print("left in the queue:", queue(), flush=True)
        return {
            "rows": rows,
            "stages": stages,
            "hurts": hurts,
            "seconds": time.time() - start,
            "states": [row["state"] for row in cluster.find_job_states(str(recipe))],
            "again": len(cluster.submit(str(recipe), file=asks)),
            "version": command("sinfo", "--version").split()[1],
        }


def main():
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]
    if missing:
        sys.exit(f"{missing[0]} is missing: apt-get install slurm-wlm munge")
    begun, folder = time.time(), Path(tempfile.mkdtemp(prefix="octomed-slurm-"))
    whole, by_jobs = folder / "whole", folder / "there"
    os.environ |= places(by_jobs)  # before octomed is imported, so that jobs inherit it
    import submitit

    from octomed.core.files import write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root

    recipe = tiny(folder)
    run_locally(recipe, whole)
    local = time.time() - begun
    ran = run_on_slurm(recipe, by_jobs, slurm=folder / "slurm")
    has_logs = all((by_jobs / "tiny" / "slurm" / row["log"]).exists() for row in ran["rows"])
    is_same = (by_jobs / "tiny" / "results").exists() and results(whole) == results(by_jobs)
    was_hurt = len(ran["hurts"]) == 2 and all(row["restarts"] for row in ran["hurts"])
    is_done = set(ran["states"]) == {"done"} and not ran["again"]
    good = is_same and has_logs and is_done and was_hurt
    write_json(
        root() / "outputs" / "reference" / "soak" / "slurm.json",
        {
            "section": SECTION,
            "slurm": ran["version"],
            "submitit": submitit.__version__,
            "jobs": len(ran["rows"]),
            "stages": ran["stages"],
            "killed": ran["hurts"],
            "same_results": is_same,
            "logs": has_logs,
            "jobs_left_when_asked_again": ran["again"],
            "seconds_local": round(local, 1),
            "seconds_on_slurm": round(ran["seconds"], 1),
            "good": good,
            "card": make_card(minutes=round((time.time() - begun) / 60, 1)),
        },
    )
    states = {state: ran["states"].count(state) for state in ran["states"]}
    print(
        f"jobs {states}; results equal to the local run's: {is_same}; "
        f"asked again: {ran['again']} jobs; killed: {ran['hurts']}"
    )
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"the files of the run are in {folder}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
