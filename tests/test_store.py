"Stages side by side: their order, what they share, and how workers end."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from octomed.core import store, workers
from octomed.core.identity import digest
from octomed.core.paths import OctomedError
from octomed.core.store import hold_lock, is_finished
from octomed.core.workers import _jobs, map_in_workers, run_all

CODE = """
import os
import signal
import time
from pathlib import Path

from octomed.core.store import stage


@stage
def base(out, n):
    (out / "base.txt").write_text(str(n))
    with open(os.environ["COUNT"], "a") as file:
        file.write("base\\n")


@stage
def student(out, base, seed):
    if seed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == "fail":
        raise ValueError("no number")
    if seed == "wait":
        Path(os.environ["COUNT"] + ".waits").write_text(str(os.getpid()))
        time.sleep(60)
    parts = [(base / "base.txt").read_text(), seed, os.getpid(), os.environ.get("TOLD", "")]
    (out / "student.txt").write_text(" ".join(map(str, parts)))
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    "A module of stages that workers can import, in a store of its own, with two workers."
    name = f"staged_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(workers, "PRELOADED", ())  # these need no torch
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("OCTOMED_WORKERS", "2")
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    return __import__(name)


def written(s):
    "What a student wrote: its base, its seed, its process, and a variable of its environment."
    return (s.folder / "student.txt").read_text(encoding="utf-8").split(" ")


def test_what_is_shared_is_made_once_and_groups_are_made_by_workers(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("TOLD", "now")
    groups = [[stages.student(base=stages.base(n=1), seed=i)] for i in range(4)]
    run_all(groups)
    assert [written(group[0])[:2] for group in groups] == [["1", str(i)] for i in range(4)]
    assert (tmp_path / "count").read_text(encoding="utf-8") == "base\n"
    assert str(os.getpid()) not in {written(group[0])[2] for group in groups}
    alone = stages.student(base=stages.base(n=1), seed=4)
    run_all([[alone]])
    # A single group has a worker too, with a worker's number of threads.
    assert written(alone)[2] != str(os.getpid())
    # A worker has the environment of its call, not that of the server's start.
    monkeypatch.setenv("TOLD", "later")
    more = [[stages.student(base=stages.base(n=1), seed=i)] for i in (5, 6)]
    run_all(more)
    assert {written(group[0])[3] for group in groups} == {"now"}
    assert {written(group[0])[3] for group in more} == {"later"}


def test_jobs_wait_for_what_they_depend_on(stages):
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


def test_a_failing_stage_is_reported_and_the_others_are_kept(stages):
    good = stages.student(base=stages.base(n=1), seed=1)
    bad = stages.student(base=stages.base(n=1), seed="fail")
    with pytest.raises(ValueError, match="no number"):
        run_all([[good], [bad]])
    assert good.done
    assert not bad.done


def test_fault_1_a_killed_worker_is_reported_and_the_next_run_goes_on(stages):
    good = stages.student(base=stages.base(n=1), seed=1)
    bad = stages.student(base=stages.base(n=1), seed="kill")
    with pytest.raises(OctomedError, match=r"a worker was killed.*run again"):
        run_all([[bad], [bad, good]])
    assert stages.base(n=1).done
    assert not is_finished(bad.folder)
    run_all([[good], [stages.student(base=stages.base(n=1), seed=2)]])
    assert good.done


def test_code_that_changed_since_is_not_left_to_the_server(monkeypatch):
    assert workers._start_method() == "forkserver"
    changed = SimpleNamespace(st_mtime=workers._server["since"] + 10)
    stat = os.stat

    def stat_changed(path, *args, **kwargs):
        return changed if path == store.__file__ else stat(path, *args, **kwargs)

    monkeypatch.setattr(workers.os, "stat", stat_changed)
    assert workers._start_method() == "spawn"


WAITING = """
import {name} as m
from octomed.core import workers

workers.PRELOADED = ()
waiting = m.student(base=m.base(n=1), seed="wait")
workers.run_all([[waiting], [m.student(base=m.base(n=1), seed=1)]])
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_fault_2_workers_and_their_server_end_with_the_process(stages, tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(name=stages.__name__)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    waits = tmp_path / "count.waits"
    end = time.time() + 120
    while not waits.exists() or not waits.read_text(encoding="utf-8"):
        assert time.time() < end
        assert process.poll() is None
        time.sleep(0.05)
    assert len(others_in_session(process.pid)) >= 2  # the server and a worker
    # Ctrl-C reaches the whole group, a kill one process.
    send = os.killpg if signum == signal.SIGINT else os.kill
    send(process.pid, signum)
    assert process.wait(timeout=30) != 0
    end = time.time() + 30
    while left := others_in_session(process.pid):
        assert time.time() < end, left
        time.sleep(0.1)


def others_in_session(session):
    "The processes of a session without the one that leads it."
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    return [pid for pid in pids if pid != session and session_of(pid) == session]


def session_of(pid):
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[3]
        )
    except (OSError, IndexError):
        return None


def test_many_items_are_worked_on_in_processes_with_the_same_result(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    monkeypatch.setenv("OCTOMED_WORKERS", "2")
    sizes, make_pool = [], workers._pool

    def count_pool(n):
        sizes.append(n)
        return make_pool(n)

    monkeypatch.setattr(workers, "_pool", count_pool)
    many, few = list(range(12)), list(range(4))
    assert map_in_workers(digest, many, few=4) == [digest(i) for i in many]
    assert sizes == [2]
    assert map_in_workers(digest, few, few=4) == [digest(i) for i in few]
    assert sizes == [2]


def test_on_windows_one_sentence_names_the_systems_that_octomed_runs_on():
    code = "import sys\nsys.modules['fcntl'] = None\nimport octomed.core.store"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "octomed.core.paths.OctomedError: octomed runs on Linux and macOS: "
        "on Windows, install it and run it inside WSL"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"finished": 1}', '{"finished": "x"}'])
def test_a_card_that_cannot_be_read_is_of_no_finished_stage(tmp_path, text):
    (tmp_path / "card.json").write_text(text, encoding="utf-8")
    assert not is_finished(tmp_path)


def test_a_store_whose_locks_are_a_file_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    (tmp_path / "locks" / "x.lock").mkdir(parents=True)
    with pytest.raises(OctomedError, match="the store cannot be written"), hold_lock("x"):
        pass
