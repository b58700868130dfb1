"""Stages as jobs of a cluster: what waits for what, what is asked for, what a job does.

A real Slurm is in tests/soak/slurm.py."""

import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import yaml

from octomed.core.paths import OctomedError, UsageError, outputs_dir, root
from octomed.core.recipe import Recipe, load_recipe
from octomed.core.store import run_stage, stage
from octomed.run import cluster
from octomed.run.cluster import (
    Job,
    find_queued,
    find_unfinished,
    group_stages,
    list_jobs,
    prepare_work,
    read_resources,
    resources_for,
    submit,
)

submitit = pytest.importorskip("submitit")


@stage
def pool(out, n):
    (out / "x").write_text(str(n))


@stage
def traces(out, data):
    (out / "x").write_text((data / "x").read_text() + " traces")


@stage
def teach(out, rows, seed):
    (out / "x").write_text((rows / "x").read_text() + f" student {seed}")


@stage
def evaluation(out, student, benchmark):
    (out / "x").write_text((student / "x").read_text() + benchmark)


@stage
def broken(out, why):
    raise ValueError(f"no {os.environ['MY_API_KEY']} here")


ASKS = {
    "default": {"cpus_per_task": 1, "timeout_min": 5},
    "stages": {"teach": {"gpus_per_node": 1}},
}


def readings(n, seeds=(0, 1), benchmarks=("a", "b")):
    rows = traces(data=pool(n=n))
    return [
        evaluation(student=teach(rows=rows, seed=s), benchmark=b) for s in seeds for b in benchmarks
    ]


@pytest.fixture(scope="module")
def course():
    recipe = load_recipe("smoke")
    return recipe, list_jobs(recipe)


def test_a_job_comes_after_all_that_it_waits_for(course):
    recipe, jobs = course
    place = {j.name: n for n, j in enumerate(jobs)}
    assert len(place) == len(jobs) > len(recipe.sections)
    for n, j in enumerate(jobs):
        assert all(place[a] < n for a in j.after)


def test_every_unfinished_stage_of_every_arm_is_in_one_job_behind_its_parents(course):
    _, jobs = course
    by = {s.key: j.name for j in jobs for s in j.stages}
    assert len(by) == sum(len(j.stages) for j in jobs)
    above = {j.name: set(j.after) for j in jobs}
    for j in jobs:
        for n, s in enumerate(j.stages):
            for p in s.parents:
                assert (
                    p.done or p.key in {x.key for x in j.stages[:n]} or by[p.key] in above[j.name]
                ), f"{s.name} does not wait for {p.name}"


def test_the_notebooks_are_last_and_wait_for_their_own_stages(course):
    recipe, jobs = course
    last = jobs[-len(recipe.sections) :]
    assert [j.section for j in last] == sorted(recipe.sections)
    assert not any(j.section for j in jobs[: -len(last)])
    # a student on its way is taken out and read in one job
    ends = {j.name: j.stages[-1].name for j in jobs if j.stages}
    assert all(ends[a] == "evaluation" for j in last for a in j.after)
    assert all(j.after for j in last if j.section != "30_dataset")


def test_chains_and_readings_of_one_student_share_a_job_and_students_do_not():
    assert [[s.name for s in j.stages] for j in group_stages(readings(1), ASKS)] == [
        ["pool", "traces"],
        ["teach"],
        ["evaluation"] * 2,
        ["teach"],
        ["evaluation"] * 2,
    ]
    alike = group_stages(readings(1, benchmarks=("a",)), {"default": {}, "stages": {}})
    assert [[s.name for s in j.stages] for j in alike] == [
        ["pool", "traces"],
        ["teach", "evaluation"],
        ["teach", "evaluation"],
    ]


def test_fault_8_what_is_made_needs_no_job():
    wanted = readings(2)
    run_stage(wanted[0])
    assert {s.key for s in find_unfinished(wanted).values()} == {
        wanted[1].key,
        wanted[2].key,
        wanted[3].key,
        wanted[2].params["student"].key,
    }
    for s in wanted:
        run_stage(s)
    assert group_stages(wanted, ASKS) == []


def test_resources_are_the_recipes_file_or_the_default_and_submitits_own_names(tmp_path):
    assert resources_for("sft", read_resources("paper"))["gpus_per_node"] == 8
    assert "gpus_per_node" not in resources_for("sft", read_resources("course"))
    executor = submitit.AutoExecutor(tmp_path, cluster="local")
    for f in (root() / "nbs" / "recipes" / "cluster").glob("*.yaml"):
        wanted = read_resources("x", f)
        for name in ("any", *wanted["stages"]):
            executor.update_parameters(
                **resources_for(name, wanted)
            )  # raises for a name that submitit does not know
    (tmp_path / "bad.yaml").write_text("partition: x")
    with pytest.raises(UsageError, match="unknown key partition"):
        read_resources("x", tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match=r"no file none\.yaml"):
        read_resources("x", tmp_path / "none.yaml")
    for text, message in (
        ("- a", "holds no keys"),
        ("stages: [sft]", "where a mapping belongs"),
        ("stages: {sft: 120}", "where a mapping belongs"),
        ("default: {a", "is not YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_resources("x", tmp_path / "bad.yaml")
    (tmp_path / "ok.yaml").write_text("default:\nstages: {sft: }")
    assert resources_for("sft", read_resources("x", tmp_path / "ok.yaml")) == {}


def test_fault_6_a_job_whose_code_has_moved_on_refuses():
    job = group_stages(readings(3), ASKS)[0]
    work = prepare_work(job, Recipe("r"), "r")
    with pytest.raises(OctomedError, match="submit it again"):
        replace(work, code={**work.code, "pool": "older"})()
    assert not job.stages[0].done
    assert work() == [s.key for s in job.stages]
    assert job.stages[-1].done


def test_fault_17_a_failing_job_shows_no_key(monkeypatch, capfd):
    monkeypatch.setenv("MY_API_KEY", "canary-12345")
    with pytest.raises(OctomedError) as e:
        prepare_work(Job("broken", (broken(why=1),)), Recipe("r"), "r")()
    shown = capfd.readouterr()
    assert "[MY_API_KEY]" in str(e.value)
    assert "ValueError" in shown.err
    assert "canary" not in str(e.value) + shown.err + shown.out


def test_a_killed_job_goes_into_the_queue_as_it_was():
    work = prepare_work(group_stages(readings(4), ASKS)[0], Recipe("r"), "r")
    again = work.checkpoint()
    assert again.function is work
    assert not again.args
    assert not again.kwargs


def test_a_stage_survives_the_trip_to_another_process(tmp_path):
    import subprocess
    import sys

    import cloudpickle

    import octomed.clinic.questions  # noqa: F401 - registers the sources
    from octomed.distill.pools import questions

    work = prepare_work(
        Job(
            "q",
            (
                questions(
                    sources=(("clinic_ward:test", 3, "x"),), against=(), seed=0, max_pixels=12_544
                ),
            ),
        ),
        Recipe("r"),
        "r",
    )
    work = replace(work, modules=("octomed.clinic.questions",))
    (tmp_path / "w.pkl").write_bytes(cloudpickle.dumps(work))
    p = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import pickle; print(*pickle.load(open({str(tmp_path / 'w.pkl')!r}, 'rb'))())",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert p.stdout.split() == [work.stages[0].key], p.stderr
    assert work.stages[0].done


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A recipe of one section with one arm and one evaluation, whose stages do next to nothing."
    wanted = readings(str(tmp_path), seeds=(0,), benchmarks=("a",))
    monkeypatch.setattr(cluster, "load_recipe", lambda name: Recipe("tiny"))
    monkeypatch.setattr(cluster, "list_jobs", lambda *args, **options: group_stages(wanted, ASKS))
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "outputs"))
    return wanted


@pytest.mark.parametrize("where", ["debug", "local"])
def test_submitit_runs_the_jobs_and_the_record_says_which_log_is_whose(
    tiny, tmp_path, monkeypatch, where
):
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parent)
    )  # where another process finds these stages
    (tmp_path / "asks.yaml").write_text("default: {timeout_min: 5}\n")
    rows = submit("tiny", cluster=where, file=tmp_path / "asks.yaml")
    folder = outputs_dir() / "tiny" / "slurm"
    assert all(s.done for s in tiny)
    assert json.loads((folder / "jobs.json").read_text()) == rows
    student = tiny[0].params["student"]
    traced = student.params["rows"]
    made = (traced.params["data"], traced, student, tiny[0])
    assert list(chain.from_iterable(r["stages"] for r in rows)) == [
        f"{s.name}-{s.key}" for s in made
    ]
    ids = [r["id"] for r in rows]
    assert all(a in ids[:n] for n, r in enumerate(rows) for a in r["after"])
    assert len(rows) == 3
    assert all((folder / r["log"]).exists() for r in rows)


def test_wrong_resources_are_refused_before_anything_waits(tiny, tmp_path):
    (tmp_path / "a.yaml").write_text("default: {gpu_number: 3}")
    with pytest.raises(UsageError, match="are not submitit's"):
        submit("tiny", cluster="local", file=tmp_path / "a.yaml")


def test_without_slurm_it_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OctomedError, match="no Slurm here"):
        submit("tiny")


def slurm(tmp_path, monkeypatch, listed=""):
    "An sbatch that keeps what it is given and numbers jobs; a squeue that lists `listed`."
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text(
        f"""#!/bin/sh
n=$(ls {tmp_path}/bin/*.sh 2>/dev/null | wc -l)
n=$((n+1))
cp "$1" {tmp_path}/bin/$n.sh
echo Submitted batch job $n
"""
    )
    (bin / "squeue").write_text(f"#!/bin/sh\necho {listed}\n")
    (bin / "srun").write_text("#!/bin/sh\n")
    for f in bin.iterdir():
        f.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return bin


def test_what_slurm_is_given_waits_for_its_parents_and_may_be_requeued(tiny, tmp_path, monkeypatch):
    bin = slurm(tmp_path, monkeypatch)
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(
            {
                "default": {"timeout_min": 7, "slurm_partition": "long"},
                "stages": {"teach": {"gpus_per_node": 8}},
            }
        )
    )
    rows = submit("tiny", file=tmp_path / "a.yaml")
    scripts = [(bin / f"{r['id']}.sh").read_text() for r in rows]
    for r, text in zip(rows, scripts, strict=False):
        assert "--requeue" in text
        assert "--partition=long" in text
        assert "--time=7" in text
        assert f"--job-name={r['job']}" in text
        assert (
            (
                "--dependency=afterok:" + ":".join(r["after"]) in text
                and "--kill-on-invalid-dep=yes" in text
            )
            if r["after"]
            else "--dependency" not in text
        )
        assert ("--gpus-per-node=8" in text) == r["job"].startswith("teach")
    assert any(r["after"] for r in rows)
    assert str(outputs_dir() / "tiny" / "slurm") in scripts[0]


def test_jobs_still_in_the_queue_are_not_submitted_twice(tiny, tmp_path, monkeypatch):
    slurm(tmp_path, monkeypatch, listed="2")
    (tmp_path / "a.yaml").write_text(
        "default: {timeout_min: 7}\nstages: {teach: {gpus_per_node: 1}}"
    )
    rows = submit("tiny", file=tmp_path / "a.yaml")
    assert find_queued(outputs_dir() / "tiny" / "slurm") == ["2"]
    assert len(rows) == 3
    with pytest.raises(OctomedError, match="scancel 2"):
        submit("tiny", file=tmp_path / "a.yaml")


def test_what_sbatch_refuses_is_one_sentence(tiny, tmp_path, monkeypatch):
    bin = slurm(tmp_path, monkeypatch)
    (bin / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: long' >&2; exit 1\n"
    )
    (tmp_path / "a.yaml").write_text("default: {timeout_min: 7}")
    with pytest.raises(
        OctomedError, match=r"sbatch refused the job pool-.* [(]sbatch: error: invalid partition"
    ):
        submit("tiny", file=tmp_path / "a.yaml")


def test_the_command_hands_over_and_says_where_jobs_stand(tiny, tmp_path, monkeypatch, capsys):
    from octomed.run.cli import main

    slurm(tmp_path, monkeypatch, listed="3")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ASKS))
    assert main(["run", "tiny", "--on", "slurm", "--cluster", str(tmp_path / "a.yaml")]) == 0
    assert "3 jobs submitted" in capsys.readouterr().out
    monkeypatch.setattr("octomed.run.runner.status", lambda name: [])
    run_stage(tiny[0].params["student"].params["rows"])
    assert main(["status", "tiny", "--jobs", "--json"]) == 0
    assert [(j["id"], j["state"]) for j in json.loads(capsys.readouterr().out)] == [
        ("1", "done"),
        ("2", "not done"),
        ("3", "queued"),
    ]
    assert main(["run", "tiny", "--on", "slurm", "--fresh"]) == 2
    assert "leave out --on slurm" in capsys.readouterr().err


@stage
def preempted(out, why):
    os.kill(os.getpid(), 15)
    raise ValueError("a child of it died")


@pytest.mark.parametrize("state, again", [("RUNNING", True), ("COMPLETING", False)])
def test_what_dies_of_a_preemption_is_requeued_and_what_is_cancelled_is_not(
    tmp_path, monkeypatch, state, again
):
    import signal

    bin = slurm(tmp_path, monkeypatch, listed=state)
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (bin / "scontrol").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("octomed.run.cluster.time.sleep", lambda s: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OctomedError, match="a child of it died"):
        prepare_work(Job("preempted", (preempted(why=state),)), Recipe("r"), "r")()
    assert (tmp_path / "asked").exists() == again
    assert not again or (tmp_path / "asked").read_text() == "requeue 77\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_of_its_own_is_not_requeued(tmp_path, monkeypatch):
    bin = slurm(tmp_path, monkeypatch, listed="RUNNING")
    (bin / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    (bin / "scontrol").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("MY_API_KEY", "canary-12345")
    with pytest.raises(OctomedError, match="here"):
        prepare_work(Job("broken", (broken(why=2),)), Recipe("r"), "r")()
    assert not (tmp_path / "asked").exists()


def test_a_notebook_that_fails_fails_its_job():
    with pytest.raises(OctomedError, match="42_formatting did not run to its end"):
        prepare_work(Job("n", (), section="42_formatting"), Recipe("r"), "no such recipe.yaml")()
