"What a machine computes with: cores, memory and accelerators of several kinds and systems."

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from octomed.core import devices, workers
from octomed.core.identity import describe_hardware

# What a process meets on macOS: no binding to cores, no advice about files, no /proc.
MACOS = """
import os
import sys

for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)


def refuse_proc(event, args):
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith("/proc"):
        raise FileNotFoundError(args[0])


sys.addaudithook(refuse_proc)
"""

STAGED = """
import os

from octomed.core.store import stage


@stage
def base(out, n):
    (out / "base.txt").write_text(str(n))


@stage
def student(out, base, seed):
    assert not hasattr(os, "sched_getaffinity")
    (out / "student.txt").write_text((base / "base.txt").read_text() + str(seed))
"""

RUN = """
import json
import os
import sys
from pathlib import Path

import staged
from octomed.core import workers
from octomed.core.devices import usable_cores
from octomed.core.identity import content_digest, file_digest, describe_hardware, read_ahead


def has_proc():
    try:
        return bool(os.listdir("/proc"))
    except FileNotFoundError:
        return False


def make_students():
    students = [staged.student(base=staged.base(n=7), seed=seed) for seed in (1, 2)]
    workers.run_all([[student] for student in students])
    return [(student.folder / "student.txt").read_text() for student in students]


if __name__ == "__main__":
    workers.PRELOADED = ()
    worker_count = workers.count_workers()
    os.environ["OCTOMED_WORKERS"] = "2"
    large = Path(sys.argv[1])
    large.write_bytes(bytes(3 << 20))
    read_ahead(large)
    facts = {
        "proc": has_proc(),
        "written": make_students(),
        "cores": usable_cores(),
        "workers": worker_count,
        "hardware": describe_hardware(),
        "digest": file_digest(large),
        "mapped": workers.map_in_workers(content_digest, [large] * 3, few=1),
    }
    print(json.dumps(facts))
"""


def run_as_macos(tmp_path, script, *args):
    "The last line that a script prints in a Python as on macOS, as do all that it starts."
    (tmp_path / "sitecustomize.py").write_text(MACOS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "OCTOMED_WORKERS"}
    environment |= {"PYTHONPATH": path, "OCTOMED_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-m", script, *args],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stages_digests_and_cards_work_as_on_macos(tmp_path):
    (tmp_path / "staged.py").write_text(STAGED)
    (tmp_path / "as_on_macos.py").write_text(RUN)
    result = run_as_macos(tmp_path, "as_on_macos", str(tmp_path / "large.bin"))
    assert result["proc"] is False
    assert result["written"] == ["71", "72"]
    assert result["cores"] == os.cpu_count()
    assert 1 <= result["workers"] <= os.cpu_count()
    assert result["hardware"].startswith(f"{os.cpu_count()} cores (")
    from blake3 import blake3

    assert result["digest"] == blake3(bytes(3 << 20)).hexdigest()
    assert len(set(result["mapped"])) == 1


def test_a_system_that_does_not_tell_its_memory_has_a_worker_a_core(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.delenv("OCTOMED_WORKERS", raising=False)
    monkeypatch.setattr(workers, "has_accelerator", lambda: False)
    monkeypatch.setattr(workers, "usable_cores", lambda: 6)
    monkeypatch.setattr(devices.os, "sysconf", unknown)
    assert devices.total_memory() is None
    assert workers.count_workers() == 6
    monkeypatch.setattr(workers, "total_memory", lambda: 9 * 2**30)
    assert workers.count_workers() == 2
    monkeypatch.setattr(workers, "total_memory", lambda: 2**30)
    assert workers.count_workers() == 1


@pytest.fixture
def reported(monkeypatch):
    "Has torch report an accelerator of some kind, or none."

    def report(kind, count=1, name=None):
        found = torch.device(kind) if kind else None

        def current(check_available=False):
            return found

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        names = {"get_device_name": lambda index: name} if name else {}
        monkeypatch.setattr(torch, "get_device_module", lambda of: SimpleNamespace(**names))
        monkeypatch.delenv("OCTOMED_WORKERS", raising=False)
        describe_hardware.cache_clear()

    yield report
    describe_hardware.cache_clear()


@pytest.mark.parametrize(
    ("kind", "count", "name", "words"),
    [
        ("cuda", 8, "NVIDIA H200", "8 × NVIDIA H200"),
        ("xpu", 1, "Intel Arc", "1 × Intel Arc"),
        ("mps", 1, None, "1 × MPS"),
    ],
)
def test_an_accelerator_of_any_kind_is_used_named_and_given_one_stage(
    reported, kind, count, name, words
):
    reported(kind, count, name)
    assert devices.has_accelerator()
    assert devices.device() == torch.device(kind)
    assert devices.accelerator_name() == words
    assert describe_hardware().endswith(f", {words}")
    assert workers.count_workers() == 1


def test_without_an_accelerator_the_processor_computes(reported):
    reported(None)
    assert not devices.has_accelerator()
    assert devices.device() == torch.device("cpu")
    assert devices.accelerator_name() is None
    assert "×" not in describe_hardware()


def test_torch_is_imported_only_where_something_hints_at_an_accelerator():
    code = (
        "import sys\n"
        "from octomed.core import devices\n"
        "devices.DRIVER_FILES = {files}\n"
        "found = devices.has_accelerator()\n"
        "print(found, 'torch' in sys.modules)"
    )
    for files, words in (((), "False False"), (("/dev/null",), "True")):
        command = [sys.executable, "-c", code.format(files=files)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith(words)
