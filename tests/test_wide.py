"One step is the same step on one process and on many, in one piece and in many."

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from octomed.core.files import write_json
from octomed.core.paths import OctomedError, UsageError, root
from octomed.generate.render import Pixels, row, save_rows
from octomed.train import launch as execution
from octomed.train import loop as train
from octomed.train.checkpoints import checkpoints, read_checkpoint
from octomed.train.launch import Execution, launch_command, read_execution
from octomed.train.loop import Loop, fit, padded_inputs
from octomed.train.objective import objective, on, packed_inputs
from octomed.train.packing import packed_groups
from octomed.train.schedule import Schedule, dealt, micro_batches
from octomed.train.students import load_student, save_student

PIXELS = 12_544


def chat(text, *images):
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": i} for i in images),
                {"type": "text", "text": text},
            ],
        }
    ]


@pytest.fixture(scope="module")
def rows(student, picture):
    "Seven rows of uneven length, two of them with a picture."
    _, processor = student
    return [
        row(
            processor,
            chat("which is it ?", *([picture] if n in (2, 5) else [])),
            "one " * (3 * n) + f"\\boxed{{{'AB'[n % 2]}}}",
            PIXELS,
        )
        for n in range(7)
    ]


def gradient_of_a_step(student, rows, how, s=Schedule(clip=1e9)):
    "The gradient that one step of the loop leaves, and its loss."
    model, processor = copy.deepcopy(student[0]), student[1]
    loop = Loop(model, processor, s, how, PIXELS, execution.accelerator_of(how))
    loop.optimizers = []  # what is accumulated stays
    total, norm, _ = loop.step(rows, 0.0)
    return torch.cat([p.grad.flatten() for p in loop.named.values()]), total, norm


def whole_gradient(student, rows):
    "The same from one padded batch and transformers' own loss, whose mean is undone."
    model, processor = copy.deepcopy(student[0]), student[1]
    from octomed.generate.render import collate

    batch = collate(
        processor, [r.input_ids for r in rows], [r.images for r in rows], Pixels(processor, PIXELS)
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for n, r in enumerate(rows):
        labels[n, r.prompt : len(r.input_ids)] = batch["input_ids"][n, r.prompt : len(r.input_ids)]
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "budget", [90, 150, 10_000]
)  # seven groups and fewer, the last one smaller than the others
def test_fault_27_accumulation_is_the_full_batch(student, rows, pack, budget):
    theirs, loss = whole_gradient(student, rows)
    ours, total, norm = gradient_of_a_step(student, rows, Execution(pack=pack, micro_tokens=budget))
    split = (packed_groups if pack else micro_batches)(rows, budget)
    assert (len(list(split)) > 1) == (budget < 10_000)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm() and math.isclose(
        norm, theirs.norm().item(), rel_tol=1e-5
    )
    assert math.isclose(total / sum(len(r.input_ids) - r.prompt for r in rows), loss, rel_tol=1e-5)


def test_fault_27_the_mean_of_means_would_be_noticed(student, rows):
    theirs, _ = whole_gradient(student, rows)
    halves = [whole_gradient(student, part)[0] for part in (rows[:5], rows[5:])]
    assert (sum(halves) / 2 - theirs).norm() > 0.01 * theirs.norm()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 16])  # more processes than groups, too
def test_fault_27_what_is_dealt_to_processes_sums_to_the_step(student, rows, pack, ranks):
    model, processor = student
    pixels, loss = Pixels(processor, PIXELS), objective()(model)
    groups = list((packed_groups if pack else micro_batches)(rows, 110))

    def gradient(groups):
        model.zero_grad()
        n = 0
        for g in groups:
            batch, at = (
                packed_inputs(model, processor, g, pixels)
                if pack
                else padded_inputs(processor, g, pixels)
            )
            loss(*on("cpu", batch, at)).backward()
            n += len(at)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, n

    whole, trained = gradient(groups)
    parts = [dealt(groups, r, ranks) for r in range(ranks)]
    assert len({len(p) for p in parts}) == 1, "processes would wait for each other for ever"
    for now in zip(*parts, strict=False):
        assert len({any(r.images for r in g) for g in now}) == 1, (
            "some look at an image and some do not"
        )
    shares = [gradient(p) for p in parts]
    assert sum(n for _, n in shares) == trained and all(
        g.keys() == whole.keys()
        for g, _ in shares
        if any(r.images for p in parts for x in p for r in x)
    )

    def flat(g):
        return torch.cat([g[n].flatten() for n in whole])

    assert (sum(flat(g) for g, _ in shares) - flat(whole)).norm() < 1e-5 * flat(whole).norm()
    model.zero_grad()


def config(tmp_path, **changed):
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "MULTI_CPU",
                "num_processes": 2,
                "num_machines": 1,
                "machine_rank": 0,
                "main_training_function": "main",
                "mixed_precision": "no",
                "use_cpu": True,
                **changed,
            }
        )
    )
    return path


def compared(alone, wide):
    "The same losses and norms, step by step, and the same weights."
    logs = [
        [json.loads(l) for l in (f / "log.jsonl").read_text().splitlines()] for f in (alone, wide)
    ]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs, strict=False):
        assert (
            math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
            and math.isclose(a["norm"], b["norm"], rel_tol=1e-4)
            and a["tokens"] == b["tokens"]
        )
    one, two = (load_student(f)[0].state_dict() for f in (alone, wide))
    assert (
        one.keys() == two.keys() and max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-4
    )
    assert sorted(f.name for f in wide.iterdir() if f.suffix == ".safetensors") == [
        "model.safetensors"
    ]


@pytest.fixture
def job(student, rows, tmp_path):
    "A student and rows on disk, and the keywords of a stage that trains on them."
    (tmp_path / "base").mkdir()
    (tmp_path / "rows").mkdir()
    save_student(tmp_path / "base", *student, [])
    save_rows(tmp_path / "rows", rows, {})
    return {
        "base": tmp_path / "base",
        "rendered": tmp_path / "rows",
        "schedule": Schedule(epochs=2, batch=7, lr=1e-3),
        "seed": 0,
        "max_pixels": PIXELS,
    }


def test_fault_27_two_processes_are_one(job, tmp_path, monkeypatch):
    from octomed.core.store import Outside, run

    def made():
        return run(
            train.sft(**{**job, "base": Outside(job["base"]), "rendered": Outside(job["rendered"])})
        )

    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110")
    alone = made().rename(tmp_path / "alone")  # the same stage is made again
    monkeypatch.setenv(
        "OCTOMED_TRAIN", f"micro_tokens=110 checkpoint_every=1 accelerate={config(tmp_path)}"
    )
    wide = made()
    how = json.loads((wide / "execution.json").read_text())
    assert (how["processes"], how["distributed"], how["accelerate"]) == (
        2,
        "MULTI_CPU",
        "accelerate.yaml",
    )
    assert not (wide / "checkpoints").exists() and not (wide / "job.json").exists()
    compared(alone, wide)


def test_fault_27_two_processes_that_hold_a_part_each_are_one(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110 checkpoint_every=1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("alone", "wide"):
        (tmp_path / name).mkdir()
    train.make_student(tmp_path / "alone", **job, steps=2)
    write_json(
        tmp_path / "wide" / "job.json", {**job, "schedule": asdict(job["schedule"]), "steps": 2}
    )
    sharded(tmp_path / "wide")
    (kept,) = checkpoints(tmp_path / "wide" / "checkpoints")
    parts, whole = (
        [read_checkpoint(kept, r, 2)[0] for r in (0, 1)],
        dict(load_student(tmp_path / "wide")[0].named_parameters()),
    )
    for n, p in whole.items():
        assert (
            sum(part[f"exp_avg/{n}"].numel() for part in parts)
            == sum(part[f"weight/{n}"].numel() for part in parts)
            == p.numel()
        ), "what is sharded is held once"
    compared(tmp_path / "alone", tmp_path / "wide")


def sharded(folder):
    "The job of a folder in two processes with a part of the weights each."
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            Path(__file__).parent / "sharded_worker.py",
            folder,
        ],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr


def test_fault_34_processes_that_hold_a_part_each_go_on_bit_for_bit(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110 checkpoint_every=2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("whole", "again"):
        write_json(
            tmp_path / name / "job.json", {**job, "schedule": asdict(job["schedule"]), "steps": 3}
        )
    assert "goes on" not in sharded(tmp_path / "whole")
    shutil.copytree(
        tmp_path / "whole" / "checkpoints", tmp_path / "again" / "checkpoints"
    )  # of the second of three steps
    assert "goes on from" in sharded(tmp_path / "again")
    one, two = (load_student(tmp_path / name)[0].state_dict() for name in ("whole", "again"))
    assert all(torch.equal(one[n], two[n]) for n in one)


# How it is said


def test_words_are_read_and_unknown_ones_refused(monkeypatch):
    monkeypatch.setenv(
        "OCTOMED_TRAIN",
        "pack=0 checkpoint_every=50 report_to=tensorboard,wandb recompute=1 checkpoint_minutes=2.5",
    )
    assert execution.execution() == Execution(
        pack=False,
        checkpoint_every=50,
        report_to="tensorboard,wandb",
        recompute=True,
        checkpoint_minutes=2.5,
    )
    for text, what in (
        ("fast=1", "there is no fast"),
        ("pack=maybe", "write 0 or 1"),
        ("micro_tokens=many", "micro_tokens=8192"),
        ("report_to=paper", "there is no paper"),
    ):
        with pytest.raises(UsageError, match=what):
            read_execution(text)


def test_what_is_not_installed_is_said(student, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OctomedError, match="pip install trackio"):
        execution.accelerator_of(Execution(report_to="trackio"))
    with pytest.raises(OctomedError, match="pip install bitsandbytes"):
        train.optimizers(copy.deepcopy(student[0]), Schedule(optimizer="paged_adamw_8bit"))
    with pytest.raises(OctomedError, match="deepspeed is not installed"):
        launch_command(
            root() / "nbs" / "recipes" / "accelerate" / "zero3.yaml",
            "octomed.train.students",
            ["x"],
        )


def test_a_schedule_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="no optimizer sgd"):
        Schedule(optimizer="sgd")
    with pytest.raises(UsageError, match="no precision fp8"):
        Schedule(precision="fp8")


def test_a_model_that_cannot_be_packed_is_padded(student, monkeypatch):
    model, _ = student
    assert train.decided(Execution(), model, Schedule(), "cpu").pack is True
    monkeypatch.delattr(type(model.model), "get_rope_index")
    assert train.decided(Execution(), model, Schedule(), "cuda").pack is False
    with pytest.raises(OctomedError, match="pack=0"):
        train.decided(Execution(pack=True), model, Schedule(), "cuda")


def test_several_machines_are_started_by_srun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    command = launch_command(
        root() / "nbs" / "recipes" / "accelerate" / "fsdp2.yaml",
        "octomed.train.students",
        ["a folder"],
        "bf16",
    )
    assert command[:4] == ["srun", "--ntasks-per-node=1", "bash", "-c"]
    for part in (
        "--num_machines 4",
        "--num_processes 32",
        "--machine_rank $SLURM_NODEID",
        "-m octomed.train.students 'a folder'",
    ):
        assert part in command[4]
    with pytest.raises(OctomedError, match="no accelerate configuration"):
        launch_command(write_json(tmp_path / "x.yaml", {}), "octomed.train.students", [])
    with pytest.raises(OctomedError, match="MULTI_CPU"):
        launch_command(config(tmp_path, distributed_type="FSDP"), "octomed.train.students", [])
    with pytest.raises(OctomedError, match="cannot be read"):
        launch_command(tmp_path / "none.yaml", "octomed.train.students", [])


@pytest.mark.parametrize("name", ["single", "fsdp2", "zero3"])
def test_shipped_configurations_are_accelerates_own(name):
    from accelerate.commands.config.config_args import load_config_from_file

    c = load_config_from_file(str(root() / "nbs" / "recipes" / "accelerate" / f"{name}.yaml"))
    assert c.num_processes in (1, 8) and c.mixed_precision == "bf16"
    if name == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        known = {f"fsdp_{f}" for f in FullyShardedDataParallelPlugin.__dataclass_fields__} | {
            "fsdp_version",
            "fsdp_offload_params",
        }
        assert set(c.fsdp_config) <= known, set(c.fsdp_config) - known


# What else a schedule can ask for


def test_low_rank_additions_are_merged_and_answer_the_same(student, rows, tmp_path):
    model, processor = copy.deepcopy(student[0]), student[1]
    batch, _at = padded_inputs(processor, rows, Pixels(processor, PIXELS))
    seen, step = [], Loop.step

    def watched(self, *a):
        found = step(self, *a)
        with torch.no_grad():
            seen.append(self.model(**batch).logits)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", watched)
        log = fit(
            model,
            processor,
            rows,
            Schedule(batch=7, lr=2e-2, lora=4, freeze=("model.visual",)),
            0,
            6,
            PIXELS,
        )
    with torch.no_grad():
        merged = model(**batch).logits
    assert torch.allclose(merged, seen[-1], atol=1e-4) and log[-1]["loss"] < log[0]["loss"]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in student[0].named_parameters()]
    moved = {
        n
        for (n, p), q in zip(model.named_parameters(), student[0].parameters(), strict=False)
        if not torch.equal(p, q)
    }
    assert moved and all("language_model.layers" in n and n.endswith("proj.weight") for n in moved)
    save_student(tmp_path, model, processor, log)
    assert not (tmp_path / "adapter_config.json").exists()
    with torch.no_grad():
        again = load_student(tmp_path)[0](**batch).logits
    assert torch.equal(again, merged)


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_half_precision_learns_and_keeps_what_it_says(student, rows, precision):
    model, processor = copy.deepcopy(student[0]), student[1]
    held, step = {}, Loop.step

    def watched(self, *a):
        found = step(self, *a)
        held.update(
            weight=next(iter(self.named.values())).dtype,
            moment=next(iter(self.optimizers[0].state.values()))["exp_avg"].dtype,
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", watched)
        log = fit(
            model, processor, rows, Schedule(batch=7, lr=1e-2, precision=precision), 0, 12, PIXELS
        )
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert set(held.values()) == {torch.float32 if precision == "bf16" else torch.bfloat16}


def test_recomputed_activations_change_nothing(student, rows):
    runs = [
        fit(
            copy.deepcopy(student[0]),
            student[1],
            rows,
            Schedule(batch=7, lr=1e-3),
            0,
            2,
            PIXELS,
            how=Execution(recompute=r),
        )
        for r in (False, True)
    ]
    assert [r["loss"] for r in runs[0]] == pytest.approx([r["loss"] for r in runs[1]], rel=1e-6)


def test_the_loss_is_reported(student, rows, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path))
    log = fit(
        copy.deepcopy(student[0]),
        student[1],
        rows,
        Schedule(batch=7, lr=1e-3),
        0,
        3,
        PIXELS,
        desc="a run",
        how=Execution(report_to="tensorboard"),
    )
    events = EventAccumulator(str(tmp_path / "training" / "a run"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in log]
    ) and [e.step for e in events.Scalars("lr")] == [1, 2, 3]


def test_a_curve_is_drawn_where_somebody_looks(monkeypatch):
    import IPython.display

    shown, cleared = [], []

    class Handle:
        def update(self, what):
            (shown if hasattr(what, "savefig") else cleared).append(what)

    monkeypatch.setattr(
        IPython.display, "display", lambda what, display_id: shown.append(what) or Handle()
    )
    log = [{"step": n, "loss": 1 / (n + 1)} for n in range(5)]
    execution.Curve("nobody", 5, every=0)(log)
    assert not shown
    monkeypatch.setattr(execution, "_somebody_looks", lambda: True)
    c = execution.Curve("a run", 5, every=0)
    c(log[:2])
    c(log)
    c.close()
    assert [len(f.axes[0].lines[0].get_xdata()) for f in shown] == [2, 5] and len(cleared) == 1
