"""The runner: order, parameters, failures, signals, and the bytes that it leaves."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from octomed.core import identity
from octomed.core.files import atomic_write
from octomed.core.paths import OctomedError, UsageError, root
from octomed.core.recipe import load_recipe
from octomed.run.execute import SectionFailed
from octomed.run.log import Pace, seconds_left
from octomed.run.runner import notebook_stage, run_recipe, status
from octomed.run.sections import Section

RESULT = """
import json, pathlib, time
def finish(section, **row):
    folder = pathlib.Path(out)/"results"; folder.mkdir(exist_ok=True)
    results = {"section": section, "recipe": "r", "claims": [], "rows": [row], "card": {}}
    (folder/f"{section}.json").write_text(json.dumps(results))
"""


class World:
    "Fake sections, a recipe, a store and outputs of their own."

    def __init__(self, folder: Path):
        self.folder, self.nbs, self.out, self.recipe = (
            folder,
            folder / "nbs",
            folder / "out",
            folder / "r.yaml",
        )
        self.nbs.mkdir()
        self.values = {}

    def section(
        self,
        name,
        body="",
        values=None,
        parameters='recipe = "smoke"\nout = None\nn = 1',
        tagged=1,
        module=None,
    ):
        cells = [
            *([f"#| default_exp paper.{module}"] if module else []),
            *[parameters] * tagged,
            RESULT,
            body or f"finish({name!r}, n=n)",
        ]
        cells = [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {"tags": ["parameters"]} if c == parameters else {},
                "source": c,
                "outputs": [],
                "execution_count": None,
            }
            for i, c in enumerate(cells)
        ]
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        (self.nbs / f"{name}.ipynb").write_text(
            json.dumps(
                {
                    "cells": cells,
                    "metadata": {"kernelspec": kernel},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            ),
            encoding="utf-8",
        )
        self.values[name] = values or {}
        return self.write()

    def write(self, **common):
        self.recipe.write_text(
            json.dumps({"common": common, "sections": self.values}), encoding="utf-8"
        )
        return self

    def run(self, **kw):
        return run_recipe(str(self.recipe), notebooks=self.nbs, **kw)

    def states(self):
        return {r["section"]: r["state"] for r in status(str(self.recipe), self.nbs)}

    def rows(self, name):
        return json.loads(
            (self.out / "r" / "results" / f"{name}.json").read_text(encoding="utf-8")
        )["rows"]

    def bytes(self):
        return {
            str(p.relative_to(self.out)): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in (self.out / "r").rglob("*")
            if p.is_file() and p.name != "run.log"
        }

    def start(self, **env):
        "The runner in a process of its own."
        return subprocess.Popen(
            [sys.executable, "-m", "octomed.run.cli", "run", str(self.recipe)],
            env={**os.environ, "OCTOMED_NOTEBOOKS": str(self.nbs), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )


@pytest.fixture
def world(own_places, tmp_path, monkeypatch):
    monkeypatch.delenv("OCTOMED_FRESH", raising=False)
    return World(tmp_path)


def declare(monkeypatch, **functions):
    "A section's module with these functions, in place of a real one."
    module = types.ModuleType("octomed.paper.fake")
    module.arms = lambda recipe: {}
    module.claims = lambda: []  # noqa: PIE807 - a builtin has no signature to check
    module.figure = lambda results: None
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "octomed.paper", types.ModuleType("octomed.paper"))
    monkeypatch.setitem(sys.modules, "octomed.paper.fake", module)
    return module


NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="this system has no /proc, which the test looks into"
)


def children(pid):
    return [
        int(p)
        for t in Path(f"/proc/{pid}/task").glob("*/children")
        for p in t.read_text(encoding="utf-8").split()
    ]


def wait_for(condition, seconds=20):
    end = time.time() + seconds
    while time.time() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


# Order and parameters: nothing is run before everything was checked.


def test_unknown_names_are_wrong_usage(world):
    world.section("1_a", values={"m": 3})
    with pytest.raises(UsageError, match="1_a has no parameter m: choose from n"):
        world.run()
    world.section("1_a", values={"n": "three"})
    with pytest.raises(UsageError, match="n of 1_a must be int, not 'three'"):
        world.run()
    world.section("1_a", values={"out": "x"})
    with pytest.raises(UsageError, match="out"):
        world.run()
    with pytest.raises(UsageError, match="no section 2_b: choose from 1_a"):
        world.run(only="1_a,2_b")
    with pytest.raises(UsageError, match="there is no recipe nothing"):
        run_recipe("nothing")
    world.values["3_c"] = {}
    world.write()
    with pytest.raises(UsageError, match="3_c, which has no notebook"):
        world.run()
    assert not world.out.exists()


@pytest.mark.parametrize("tagged", [0, 2])
def test_exactly_one_parameters_cell(world, tagged):
    with pytest.raises(OctomedError, match=f"{tagged} cells tagged parameters: tag exactly one"):
        world.section("1_a", tagged=tagged).run()


def test_parameters_cell_needs_recipe_and_out(world):
    with pytest.raises(OctomedError, match="lacks out: add it"):
        world.section("1_a", parameters='recipe = "smoke"').run()


def test_order_by_number_and_published_copies(world):
    world.section("10_b")
    world.section("9_a", values={"n": 7})
    assert world.run()["ran"] == ["9_a", "10_b"]
    assert world.rows("9_a") == [{"n": 7}]
    assert world.rows("10_b") == [{"n": 1}]
    text = (world.out / "r" / "9_a.ipynb").read_text(encoding="utf-8")
    assert str(world.folder / "store") not in text
    assert "outputs/r" in text
    assert not list(world.nbs.glob("*.failed*"))
    assert sorted(p.name for p in world.nbs.iterdir()) == ["10_b.ipynb", "9_a.ipynb"]
    assert world.states() == {"9_a": "done", "10_b": "done"}


# Failures.


def test_a_failing_cell_is_named_and_the_work_before_it_kept(world):
    world.section("1_a")
    world.section("2_b", body="x = 1\n1/0")
    with pytest.raises(
        SectionFailed, match=r"2_b failed in cell 3 \(ZeroDivisionError: division by zero\)"
    ):
        world.run()
    assert world.rows("1_a")
    assert world.states() == {"1_a": "done", "2_b": "failed"}
    assert "ZeroDivisionError" in (world.out / "r" / "run.log").read_text(encoding="utf-8")
    world.section("2_b")
    assert world.run() == {"ran": ["2_b"], "skipped": ["1_a"]}
    assert world.states()["2_b"] == "done"
    assert not (world.out / "r" / "2_b.failed.ipynb").exists()


def test_fault_1_killed_kernel(world):
    flag = world.folder / "mended"
    world.section(
        "1_a",
        body=f"""
import os, signal, pathlib
if not pathlib.Path({str(flag)!r}).exists():
    os.kill(os.getpid(), signal.SIGKILL)
finish('1_a')
""",
    )
    with pytest.raises(
        SectionFailed, match=r"1_a failed in cell 3 \(its kernel was killed or died\)"
    ):
        world.run()
    states = [
        c["metadata"]["papermill"]["status"]
        for c in json.loads((world.out / "r" / "1_a.failed.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
    ]
    assert states == ["completed", "completed", "completed", "failed"]
    assert world.states() == {"1_a": "failed"}
    assert not (world.out / "r" / "results").exists()
    assert not list((world.folder / "store" / "stages").glob("*"))
    flag.touch()
    assert world.run()["ran"] == ["1_a"]
    assert world.states() == {"1_a": "done"}


@NEEDS_PROC
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_fault_2_signals(world, signum):
    running = world.folder / "running"
    p = (
        world.section("1_a")
        .section("2_b", body=f"pathlib.Path({str(running)!r}).touch()\ntime.sleep(60)")
        .start()
    )
    wait_for(running.exists)
    kernels = children(p.pid)
    p.send_signal(signum)
    _, err = p.communicate(timeout=20)
    assert p.returncode == 1
    assert "stopped: what was finished is kept" in err
    assert "Traceback" not in err
    wait_for(lambda: not any(Path(f"/proc/{k}").exists() for k in kernels), 10)
    assert kernels
    assert world.states() == {"1_a": "done", "2_b": "missing"}
    assert not any(p.is_dir() for p in (world.folder / "store" / "work").glob("*"))


def test_a_slice_of_time_ends_with_everything_kept(world):
    world.section("1_a").section("2_b", body="time.sleep(600)")
    world.run(only="1_a")
    begun = time.time()
    with pytest.raises(OctomedError, match="stopped: what was finished is kept"):
        world.run(minutes=0.1)
    assert time.time() - begun < 120
    assert world.states() == {"1_a": "done", "2_b": "missing"}
    assert world.section("2_b").run(minutes=60) == {
        "ran": ["2_b"],
        "skipped": ["1_a"],
    }  # the same command goes on


def test_fault_3_killed_during_a_write(tmp_path):
    "A process that is killed between the bytes and the rename leaves the previous file whole."
    atomic_write(tmp_path / "a.json", "old")
    code = f"""
import os, signal
from octomed.core.files import atomic_write
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
atomic_write({str(tmp_path / "a.json")!r}, "new and longer")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old"


def test_fault_3_runner_killed(world):
    "SIGKILL of the runner itself: nothing looks finished, the kernel ends, the next run makes it."
    running = world.folder / "running"
    p = world.section(
        "1_a",
        body=f"""
pathlib.Path({str(running)!r}).touch()
if n == 1:
    time.sleep(3)
finish('1_a', n=n)
""",
    ).start()
    wait_for(running.exists)
    p.kill()
    p.communicate()
    assert world.states() == {"1_a": "missing"}
    assert not (world.out / "r" / "results").exists()
    world.values["1_a"] = {"n": 2}
    world.write()
    assert world.run()["ran"] == ["1_a"]
    assert world.rows("1_a") == [{"n": 2}]


@NEEDS_PROC
def test_fault_4_disk_full_in_the_runner(world, monkeypatch):
    real = os.fsync

    def full(fd):
        if ".1_a.ipynb." in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    world.section("1_a")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OctomedError, match=r"no space left to write 1_a\.ipynb: free some"):
            world.run()
    assert not (world.out / "r" / "results").exists()
    assert not list(world.folder.rglob(".*.ipynb.*"))
    assert world.run()["ran"] == ["1_a"]


def test_fault_4_disk_full_in_a_cell(world):
    world.section(
        "1_a",
        body="""
import resource, signal
from octomed.core.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
atomic_write(pathlib.Path(out) / "big.bin", b"0" * 5000)
""",
    )
    with pytest.raises(SectionFailed, match="1_a failed in cell 3"):
        world.run()
    assert not list(world.folder.rglob("*big.bin*"))


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)"]
)
def test_fault_5_leaving_early_is_a_failure(world, leave):
    world.section("1_a", body=f"finish('1_a')\n{leave}")
    with pytest.raises(
        SectionFailed,
        match=r"1_a failed in cell 3 \((it called sys.exit|its kernel was killed or died)",
    ):
        world.run()
    assert world.states() == {"1_a": "failed"}


def test_fault_5_no_results_is_a_failure(world):
    with pytest.raises(SectionFailed, match=r"wrote no results/1_a\.json"):
        world.section("1_a", body="1").run()
    with pytest.raises(SectionFailed, match="lack card, claims"):
        world.section(
            "1_a",
            body="""
(pathlib.Path(out) / "results").mkdir()
partial = {"section": 1, "recipe": 1, "rows": []}
(pathlib.Path(out) / "results" / "1_a.json").write_text(json.dumps(partial))
""",
        ).run()


# Staleness, by content.


def test_fault_6_stale_by_content(world, monkeypatch):
    data = world.folder / "data.csv"
    data.write_text("a", encoding="utf-8")
    declare(monkeypatch, inputs=lambda recipe: [data])
    world.section("1_a", module="fake")
    world.section("2_b")
    world.run()

    def both():
        return list(world.states().values())

    assert both() == ["done", "done"]
    os.utime(data, (1, 1))
    assert both() == ["done", "done"]  # time is no content
    data.write_text("b", encoding="utf-8")
    assert both() == ["stale", "done"]  # an input of one section
    data.write_text("a", encoding="utf-8")
    assert both() == ["done", "done"]
    world.values["2_b"] = {"n": 2}
    world.write()
    assert both() == ["done", "stale"]  # a parameter of one section
    world.values["2_b"] = {"n": 1}
    world.write()
    assert both() == ["done", "done"]  # its default, said aloud
    world.write(lr=0.5)
    assert both() == ["stale", "stale"]  # what sections share
    world.write()
    world.section("2_b", body="finish('2_b', n=n + 1)")
    assert both() == ["done", "stale"]  # code of one notebook
    assert world.run() == {"ran": ["2_b"], "skipped": ["1_a"]}
    assert world.rows("2_b") == [{"n": 2}]


def test_fault_6_stale_by_module(world, monkeypatch):
    "The code of a module that the notebook imports is part of its key."

    world.section("1_a", body="from octomed.core.identity import digest\nfinish('1_a', n=n)")

    def key():
        section = Section("1_a", world.nbs / "1_a.ipynb")
        return notebook_stage(section, load_recipe(str(world.recipe))).key

    before, real = key(), Path.read_text

    def append(text):
        "Let the module's file end on this text."

        def read(path, *args, **kwargs):
            end = text if path == Path(identity.__file__) else ""
            return real(path, *args, **kwargs) + end

        monkeypatch.setattr(Path, "read_text", read)

    append("\nchanged = 1\n")
    assert key() != before
    append("\n# a comment\n")
    assert key() == before


def test_fault_7_two_runners_at_once(world):
    count = world.folder / "count"
    world.section(
        "1_a",
        body=f"time.sleep(0.5)\nwith open({str(count)!r}, 'a') as f: f.write('x')\nfinish('1_a')",
    )
    errs = [p.communicate(timeout=40)[1] for p in [world.start(), world.start()] if p.wait(40) == 0]
    assert len(errs) == 2
    assert count.read_text(encoding="utf-8") == "x"
    assert world.states() == {"1_a": "done"}


def test_sections_side_by_side(world, capfd):
    def meet(me, other):
        return f"""
pathlib.Path('{world.folder}/{me}').touch()
while not pathlib.Path('{world.folder}/{other}').exists():
    time.sleep(0.05)
finish({me!r}, n=n)
"""

    world.section("0_z")
    world.run(only="0_z")
    world.section("1_a", body=meet("1_a", "2_b")).section("2_b", body=meet("2_b", "1_a")).section(
        "3_c", values={"n": 7}
    )
    outcome = world.run(jobs=2)
    assert outcome["skipped"] == ["0_z"]
    assert sorted(outcome["ran"]) == [
        "1_a",
        "2_b",
        "3_c",
    ]  # one at a time, the first would wait for ever
    assert world.rows("3_c") == [{"n": 7}]
    assert set(world.states().values()) == {"done"}
    assert "3_c done in" in capfd.readouterr().err
    assert world.run(jobs=2) == {"ran": [], "skipped": ["0_z", "1_a", "2_b", "3_c"]}


def test_what_took_longest_is_started_first_beside_others(world, capfd):
    for name, slow in (("1_a", 0), ("2_b", 0), ("3_c", 4)):
        world.section(name, body=f"time.sleep({slow})\nfinish({name!r}, n=n)")
    world.run()
    world.write(lr=0.5)
    capfd.readouterr()
    world.run(jobs=2)
    lines = capfd.readouterr().err
    assert lines.index("3_c starts") < lines.index("1_a starts")
    assert lines.index("3_c starts") < lines.index("2_b starts")


def test_a_failure_beside_others_lets_them_end_and_starts_no_more(world, capfd):
    world.section("1_a", body="1/0").section("2_b", body="time.sleep(4)\nfinish('2_b')").section(
        "3_c"
    )
    with pytest.raises(SectionFailed, match="1_a failed, as reported above"):
        world.run(jobs=2)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert world.states() == {
        "1_a": "failed",
        "2_b": "done",
        "3_c": "missing",
    }


@NEEDS_PROC
def test_side_by_side_stops_with_everything_it_started(world):
    for n in "ab":
        world.section(f"1_{n}", body="time.sleep(600)")
    begun = time.time()
    with pytest.raises(OctomedError, match="stopped: what was finished is kept"):
        world.run(jobs=2, minutes=0.15)
    assert not [
        p
        for p in children(os.getpid())
        if "\0octomed.run.cli\0run" in Path(f"/proc/{p}/cmdline").read_text(encoding="utf-8")
    ]
    assert time.time() - begun < 60
    assert set(world.states().values()) == {"missing"}


def test_fault_8_a_finished_run_does_nothing(world, capfd):
    world.section("1_a")
    world.run()
    before = world.bytes()
    capfd.readouterr()
    assert world.run() == {"ran": [], "skipped": ["1_a"]}
    assert "nothing to do, all 1 sections are done" in capfd.readouterr().err
    assert world.bytes() == before
    (world.out / "r" / "results" / "1_a.json").unlink()
    world.run()
    assert {k: v[0] for k, v in world.bytes().items()} == {k: v[0] for k, v in before.items()}
    assert world.run(fresh=True)["ran"] == ["1_a"]
    assert "OCTOMED_FRESH" not in os.environ


def test_fault_17_a_canary_key_is_nowhere(world, monkeypatch, capfd):
    canary = "sk-canary\"'0123456789"
    monkeypatch.setenv("SOME_API_KEY", canary)
    world.section(
        "1_a",
        body="""
import os, sys
key = os.environ['SOME_API_KEY']
print(key)
print(key, file=sys.stderr)
finish('1_a', key=key)
key
""",
    )
    world.section(
        "2_b",
        body="import os\nkey = os.environ['SOME_API_KEY']\nraise ValueError(f'refused {key}')",
    )
    with pytest.raises(SectionFailed) as failure:
        world.run()
    shown = capfd.readouterr()
    seen = [str(failure.value), shown.out, shown.err]
    files = [p for p in world.folder.rglob("*") if p.is_file()]
    assert len([p for p in files if p.suffix == ".ipynb"]) == 5
    assert "[SOME_API_KEY]" in str(failure.value)  # two sources, one kept twice, one failed
    for text in [*seen, *(p.read_bytes().decode(errors="replace") for p in files)]:
        assert "0123456789" not in text
    assert world.rows("1_a") == [{"key": "[SOME_API_KEY]"}]


def test_a_module_that_lacks_a_function_is_refused_with_one_sentence(world, monkeypatch):
    module = declare(monkeypatch)
    world.section("1_a", module="fake")
    del module.claims
    with pytest.raises(OctomedError, match=r"octomed\.paper\.fake has no function claims: define"):
        world.run()
    module.claims = lambda recipe: []
    with pytest.raises(OctomedError, match=r"claims of .* cannot be called as claims\(\): give"):
        world.run()
    assert not world.out.exists()


def test_one_arm(world, monkeypatch):
    cot, direct = types.SimpleNamespace(student=""), types.SimpleNamespace(student="")
    declare(monkeypatch, arms=lambda recipe: {"cot": cot, "direct": direct})
    asked = []

    def note_arms(arms, recipe, seeds, benchmarks):
        asked.append((arms, recipe.scalars("1_a"), seeds))

    monkeypatch.setattr("octomed.evaluate.results.run_arms", note_arms)
    world.section("1_a", module="fake")
    world.section("2_b")
    with pytest.raises(UsageError, match="no section has an arm none: choose from cot, direct"):
        world.run(arm="none")
    assert world.run(arm="cot")["ran"] == ["1_a"]
    assert asked == [({"cot": cot}, {"n": 1}, 1)]


# Where a run works, and how far it says it is.

WHERE = """
import os
from octomed.core.paths import data_dir, outputs_dir, store_dir
from octomed.core.workers import map_in_workers
os.environ["OCTOMED_WORKERS"] = "2"
there = map_in_workers(os.path.abspath, ["x"] * 3, few=1)
places = [os.getcwd(), str(store_dir()), str(outputs_dir()), str(data_dir()), there[0]]
pathlib.Path("seen.json").write_text(json.dumps(places), encoding="utf-8")
finish("1_a")
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_relative_folders_are_those_of_the_command_in_kernels_and_workers(world, jobs):
    world.section("1_a", body=WHERE)
    work = world.folder / "typed here"
    (work / "da ta").mkdir(parents=True)
    os.rename(world.nbs, work / "nbs")
    names = {"STORE": "st", "OUTPUTS": "ou", "DATA": "da ta", "NOTEBOOKS": "nbs"}
    environment = {f"OCTOMED_{name}": value for name, value in names.items()}
    done = subprocess.run(
        [sys.executable, "-m", "octomed", "run", "../r.yaml", "--jobs", jobs],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(root()), **environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads((work / "seen.json").read_text(encoding="utf-8"))
    assert seen == [str(work), *(str(work / name) for name in ("st", "ou", "da ta", "x"))]
    assert (work / "ou" / "r" / "results" / "1_a.json").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_says_how_far_it_is(world, jobs):
    for name in ("1_a", "2_b"):
        world.section(name)
    world.run(jobs=jobs)
    lines = [line[20:] for line in (world.out / "r" / "run.log").read_text("utf-8").splitlines()]
    assert "0 of 2 sections done, about" in lines[0]
    assert [line for line in lines if "1 of 2 sections done, about" in line]
    assert [line for line in lines if line.endswith(": 2 of 2 sections done")]
    assert not [line for line in lines if "of 1 sections" in line]


def test_the_time_left_follows_the_run():
    pace = Pace({"a": 100, "b": 300, "c": None, "d": 100})
    assert str(pace) == "0 of 4 sections done, time left not known yet"
    pace.skip("c")
    assert str(pace) == "1 of 4 sections done, about 8 min left"
    pace.start("a")
    pace.begun["a"] -= 50
    assert 449 <= seconds_left(pace) <= 450
    assert 49 <= pace.end("a") <= 52
    assert 199 <= seconds_left(pace) <= 210  # it took half of what was expected
    pace.start("b")
    pace.begun["b"] -= 1000
    assert 60 <= seconds_left(pace) <= 70  # b is late, d takes half
    pace.at_once = 2
    assert 45 <= seconds_left(pace) <= 55  # the longest decides
    pace.end("b")
    pace.skip("d")
    assert str(pace) == "4 of 4 sections done"


def test_a_run_goes_on_when_nobody_reads_it_any_more(world):
    world.section("1_a").section("2_b")
    run = shlex.join([sys.executable, "-m", "octomed", "run", str(world.recipe)])
    command = f"{run} 2>&1 | head -1"
    environment = {"PYTHONPATH": str(root()), "OCTOMED_NOTEBOOKS": str(world.nbs)}
    subprocess.run(
        ["sh", "-c", command], env={**os.environ, **environment}, capture_output=True, check=True
    )
    assert world.states() == {"1_a": "done", "2_b": "done"}


@pytest.mark.parametrize(
    ("source", "leaves"),
    [
        ("%%bash\necho hi | grep h && pwd", None),
        ("files = !ls", None),
        ("print?", None),
        ("%%writefile beside.py\nnot python here !", "beside.py"),
        ("%%time\nx = 1", None),
        ("await __import__('asyncio').sleep(0)", None),
    ],
)
def test_a_section_runs_what_a_kernel_takes(world, monkeypatch, source, leaves):
    monkeypatch.chdir(world.folder)
    world.section("1_a", body="finish('1_a', n=n)", values={"n": 4})
    path = world.nbs / "1_a.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"].insert(1, {"cell_type": "code", "source": source})
    del nb["metadata"], nb["nbformat_minor"]
    path.write_text(json.dumps(nb), encoding="utf-8-sig")
    assert world.run()["ran"] == ["1_a"]
    assert world.rows("1_a") == [{"n": 4}]
    assert leaves is None or (world.folder / leaves).exists()


def test_a_tuple_stays_one_in_the_kernel(world):
    parameters = 'recipe = "smoke"\nout = None\nn = (1, 2)'
    world.section("1_a", body="finish('1_a', n=type(n).__name__)", parameters=parameters)
    world.run()
    assert world.rows("1_a") == [{"n": "tuple"}]


def test_a_magic_that_only_prints_its_error_is_named(world):
    world.section("1_a", body="# a remark before it\n%%time\nfinish('1_a')")
    with pytest.raises(SectionFailed, match=r"1_a failed in cell 3 \(UsageError: Line magic"):
        world.run()


def test_a_plugin_in_the_folder_of_the_command_is_found(world):
    world.section("1_a", body="import my_own_plugin\nfinish('1_a', n=my_own_plugin.n)")
    (world.folder / "my_own_plugin.py").write_text("n = 5", encoding="utf-8")
    world.write(plugins=["my_own_plugin"])
    program = Path(sys.executable).parent / "octomed"
    if not program.exists():
        pytest.skip("octomed is not installed beside this interpreter")
    done = subprocess.run(
        [str(program), "run", "r.yaml"],
        cwd=world.folder,
        env={**os.environ, "PYTHONPATH": str(root()), "OCTOMED_NOTEBOOKS": "nbs"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert world.rows("1_a") == [{"n": 5}]


def test_outputs_that_cannot_be_written_stop_a_run_before_it_starts(world):
    world.section("1_a", body=f"pathlib.Path({str(world.folder / 'ran')!r}).touch()\nfinish('1_a')")
    world.out.mkdir(exist_ok=True)
    (world.out / "r").write_text("", encoding="utf-8")
    with pytest.raises(OctomedError, match="point OCTOMED_OUTPUTS at a folder of your own"):
        world.run()
    assert not (world.folder / "ran").exists()
