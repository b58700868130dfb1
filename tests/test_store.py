"Stages side by side: order, what is shared, and how workers end."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octomed.core import store
from octomed.core.identity import digest
from octomed.core.paths import OctomedError
from octomed.core.store import made
from octomed.core.workers import _jobs, mapped, run_all

CODE = """
import os, signal, time
from pathlib import Path
from octomed.store import stage

@stage
def base(out, n):
    (out/"base.txt").write_text(str(n))
    with open(os.environ["COUNT"], "a") as f: f.write("base\\n")

@stage
def student(out, base, seed):
    if seed == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if seed == "fail": raise ValueError("no number")
    if seed == "wait": Path(os.environ["COUNT"] + ".waits").write_text(str(os.getpid())); time.sleep(60)
    (out/"student.txt").write_text(f"{(base/'base.txt').read_text()} {seed} {os.getpid()} {os.environ.get('TOLD', '')}")
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    "A module of stages that workers can import, in a store of its own, with two workers."
    name = f"staged_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(store, "NEEDED", ())  # these need no torch
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("OCTOMED_WORKERS", "2")
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    return __import__(name)


def told(s):
    return (s.folder / "student.txt").read_text().split(" ")


def test_what_is_shared_is_made_once_and_groups_are_made_by_workers(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("TOLD", "now")
    groups = [[stages.student(base=stages.base(n=1), seed=i)] for i in range(4)]
    run_all(groups)
    assert [told(g[0])[:2] for g in groups] == [["1", str(i)] for i in range(4)] and (
        tmp_path / "count"
    ).read_text() == "base\n"
    assert str(os.getpid()) not in {told(g[0])[2] for g in groups}
    run_all([[alone := stages.student(base=stages.base(n=1), seed=4)]])
    assert told(alone)[2] != str(os.getpid())  # with a worker's number of threads, as beside others
    monkeypatch.setenv(
        "TOLD", "later"
    )  # a worker has the environment of its call, not of the server's start
    run_all(more := [[stages.student(base=stages.base(n=1), seed=i)] for i in (5, 6)])
    assert {told(g[0])[3] for g in groups} == {"now"} and {told(g[0])[3] for g in more} == {"later"}


def test_jobs_wait_for_what_they_rest_on(stages):
    first = stages.base(n=1)
    second = stages.student(base=first, seed=0)
    groups = [
        [stages.student(base=second, seed=1)],
        [stages.student(base=second, seed=2)],
        [stages.student(base=stages.base(n=9), seed=3)],
    ]
    jobs, before = _jobs(groups)
    assert jobs == {
        first.key: [first],
        second.key: [second],
        0: groups[0],
        1: groups[1],
        2: groups[2],
    }
    assert before == {
        first.key: set(),
        second.key: {first.key},
        0: {first.key, second.key},
        1: {first.key, second.key},
        2: set(),
    }


def test_a_failing_stage_is_told_and_the_others_kept(stages):
    good, bad = (
        stages.student(base=stages.base(n=1), seed=1),
        stages.student(base=stages.base(n=1), seed="fail"),
    )
    with pytest.raises(ValueError, match="no number"):
        run_all([[good], [bad]])
    assert good.done and not bad.done


def test_fault_1_a_killed_worker_is_told_and_the_next_run_goes_on(stages):
    good, bad = (
        stages.student(base=stages.base(n=1), seed=1),
        stages.student(base=stages.base(n=1), seed="kill"),
    )
    with pytest.raises(OctomedError, match="a worker was killed.*run again"):
        run_all([[bad], [bad, good]])
    assert stages.base(n=1).done and not made(bad.folder)
    run_all([[good], [stages.student(base=stages.base(n=1), seed=2)]])
    assert good.done


def test_code_that_changed_since_is_not_left_to_the_server(monkeypatch):
    assert store._start_method() == "forkserver"
    changed = store._server["since"] + 10
    real = os.stat
    monkeypatch.setattr(
        store.os,
        "stat",
        lambda p, *a, **k: (
            type("", (), {"st_mtime": changed}) if p == store.__file__ else real(p, *a, **k)
        ),
    )
    assert store._start_method() == "spawn"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_fault_2_workers_and_their_server_end_with_the_process(stages, tmp_path, signum):
    code = f"import {stages.__name__} as m; from octomed import store; store.NEEDED = (); store.run_all([[m.student(base=m.base(n=1), seed='wait')], [m.student(base=m.base(n=1), seed=1)]])"
    p = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True
    )
    waits = tmp_path / "count.waits"
    end = time.time() + 120
    while not waits.exists() or not waits.read_text():
        assert time.time() < end and p.poll() is None
        time.sleep(0.05)

    def group():
        return [
            pid
            for pid in os.listdir("/proc")
            if pid.isdigit() and _session(pid) == p.pid and int(pid) != p.pid
        ]

    assert len(group()) >= 2  # the server and a worker
    (os.killpg if signum == signal.SIGINT else os.kill)(
        p.pid, signum
    )  # Ctrl-C reaches the whole group, a kill one process
    assert p.wait(timeout=30) != 0
    end = time.time() + 30
    while left := group():
        assert time.time() < end, left
        time.sleep(0.1)


def _session(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return None


def test_many_items_are_worked_on_in_processes_with_the_same_result(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    monkeypatch.setenv("OCTOMED_WORKERS", "2")
    pools, pool = [], store._pool
    monkeypatch.setattr(store, "_pool", lambda n: pools.append(n) or pool(n))
    assert mapped(digest, list(range(12)), few=4) == [digest(i) for i in range(12)] and pools == [2]
    assert mapped(digest, list(range(4)), few=4) == [digest(i) for i in range(4)] and pools == [2]
