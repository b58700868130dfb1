"One step is the same step on one process and on many, in one piece and in many."

import copy
import importlib.util
import itertools
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
from toys import chat

from octomed.core.files import read_jsonl, write_json
from octomed.core.paths import OctomedError, UsageError, root
from octomed.core.store import ExternalInput, run_stage
from octomed.generate.render import PixelCache, collate, render_row, save_rows
from octomed.train import launch
from octomed.train.checkpoints import list_checkpoints, read_checkpoint
from octomed.train.launch import (
    Curve,
    Execution,
    build_accelerator,
    build_launch_command,
    current_execution,
    parse_execution,
)
from octomed.train.loop import Loop, complete_execution, fit, prepare_padded
from octomed.train.objective import move_to_device, objective_class, prepare_packed
from octomed.train.optimizers import build_optimizers
from octomed.train.packing import group_packed
from octomed.train.schedule import Schedule, deal_groups, group_padded
from octomed.train.students import load_student, make_student, save_student, sft

PIXELS = 12_544
CONFIGURATIONS = root() / "nbs" / "recipes" / "accelerate"
WORKER = "octomed.train.students"


@pytest.fixture(scope="module")
def rows(student, picture):
    "Seven rows of uneven length, two of them with a picture."
    _, processor = student
    return [
        render_row(
            processor,
            chat("which is it ?", *([picture] if n in (2, 5) else [])),
            "one " * (3 * n) + f"\\boxed{{{'AB'[n % 2]}}}",
            PIXELS,
        )
        for n in range(7)
    ]


def fit_example(model, processor, rows, s, steps, **options):
    return fit(
        model, processor, rows, schedule=s, seed=0, steps=steps, max_pixels=PIXELS, **options
    )


def gradient_of_a_step(student, rows, how):
    "The gradient that one step of the loop leaves, its loss, and the gradient's norm."
    model, processor = copy.deepcopy(student[0]), student[1]
    loop = Loop(
        model,
        processor,
        schedule=Schedule(clip=1e9),
        how=how,
        max_pixels=PIXELS,
        accelerator=build_accelerator(how),
    )
    loop.optimizers = []  # so that the gradient stays
    total, norm, _ = loop.step(rows, 0.0)
    return torch.cat([p.grad.flatten() for p in loop.named.values()]), total, norm


def whole_gradient(student, rows):
    "The same from one padded batch and transformers' own loss, which is a mean."
    model, processor = copy.deepcopy(student[0]), student[1]
    ids, images = [r.input_ids for r in rows], [r.images for r in rows]
    batch = collate(processor, ids, images, pixels=PixelCache(processor, PIXELS))
    labels = torch.full_like(batch["input_ids"], -100)
    for n, r in enumerate(rows):
        labels[n, r.prompt : len(r.input_ids)] = batch["input_ids"][n, r.prompt : len(r.input_ids)]
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item()


@pytest.mark.parametrize("pack", [False, True])
# seven groups and fewer, the last one smaller than the others
@pytest.mark.parametrize("budget", [90, 150, 10_000])
def test_fault_27_accumulation_is_the_full_batch(student, rows, pack, budget):
    theirs, loss = whole_gradient(student, rows)
    ours, total, norm = gradient_of_a_step(student, rows, Execution(pack=pack, micro_tokens=budget))
    split = (group_packed if pack else group_padded)(rows, budget)
    assert (len(list(split)) > 1) == (budget < 10_000)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert math.isclose(norm, theirs.norm().item(), rel_tol=1e-5)
    trained = sum(len(r.input_ids) - r.prompt for r in rows)
    assert math.isclose(total / trained, loss, rel_tol=1e-5)


def test_fault_27_the_mean_of_means_would_be_noticed(student, rows):
    theirs, _ = whole_gradient(student, rows)
    halves = [whole_gradient(student, part)[0] for part in (rows[:5], rows[5:])]
    assert (sum(halves) / 2 - theirs).norm() > 0.01 * theirs.norm()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 16])  # more processes than groups, too
def test_fault_27_what_is_dealt_to_processes_sums_to_the_step(student, rows, pack, ranks):
    model, processor = student
    pixels, loss = PixelCache(processor, PIXELS), objective_class()(model)
    groups = list((group_packed if pack else group_padded)(rows, 110))

    def gradient(groups):
        "Gradients by parameter, and how many tokens were trained."
        model.zero_grad()
        trained = 0
        for group in groups:
            if pack:
                batch, at = prepare_packed(model, processor, rows=group, pixels=pixels)
            else:
                batch, at = prepare_padded(processor, group, pixels)
            loss(*move_to_device("cpu", batch, at)).backward()
            trained += len(at)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads, trained

    whole, trained = gradient(groups)
    parts = [deal_groups(groups, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1, "processes would wait for each other for ever"
    for at_once in zip(*parts, strict=True):
        assert len({any(r.images for r in group) for group in at_once}) == 1, (
            "some look at an image and some do not"
        )
    shares = [gradient(part) for part in parts]
    assert sum(n for _, n in shares) == trained
    dealt_groups = itertools.chain.from_iterable(parts)
    if any(r.images for r in itertools.chain.from_iterable(dealt_groups)):
        assert all(grads.keys() == whole.keys() for grads, _ in shares)

    def flat(grads):
        return torch.cat([grads[n].flatten() for n in whole])

    difference = sum(flat(grads) for grads, _ in shares) - flat(whole)
    assert difference.norm() < 1e-5 * flat(whole).norm()
    model.zero_grad()


def config(tmp_path, **changed):
    "An accelerate configuration of two processes on this machine."
    settings = {
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
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def assert_same_student(alone, wide):
    "Losses and norms are the same, step by step, and so are the weights."
    logs = [read_jsonl(folder / "log.jsonl") for folder in (alone, wide)]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["norm"], b["norm"], rel_tol=1e-4)
        assert a["tokens"] == b["tokens"]
    ours, theirs = (load_student(folder)[0].state_dict() for folder in (wide, alone))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-4
    weights = sorted(file.name for file in wide.iterdir() if file.suffix == ".safetensors")
    assert weights == ["model.safetensors"]


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
    def make():
        outside = {name: ExternalInput(job[name]) for name in ("base", "rendered")}
        return run_stage(sft(**{**job, **outside}))

    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110")
    alone = make().rename(tmp_path / "alone")  # so the same stage is made again
    monkeypatch.setenv(
        "OCTOMED_TRAIN", f"micro_tokens=110 checkpoint_every=1 accelerate={config(tmp_path)}"
    )
    wide = make()
    how = json.loads((wide / "execution.json").read_text())
    assert (how["processes"], how["distributed"], how["accelerate"]) == (
        2,
        "MULTI_CPU",
        "accelerate.yaml",
    )
    assert not (wide / "checkpoints").exists() and not (wide / "job.json").exists()
    assert_same_student(alone, wide)


def test_fault_27_two_processes_that_hold_a_part_each_are_one(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110 checkpoint_every=1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("alone", "wide"):
        (tmp_path / name).mkdir()
    make_student(tmp_path / "alone", **job, steps=2)
    write_job(tmp_path / "wide", job, steps=2)
    run_sharded(tmp_path / "wide")
    (kept,) = list_checkpoints(tmp_path / "wide" / "checkpoints")
    parts = [read_checkpoint(kept, rank, 2)[0] for rank in (0, 1)]
    for name, parameter in load_student(tmp_path / "wide")[0].named_parameters():
        for kind in ("weight", "exp_avg"):
            held = sum(part[f"{kind}/{name}"].numel() for part in parts)
            assert held == parameter.numel(), "what is sharded is held once"
    assert_same_student(tmp_path / "alone", tmp_path / "wide")


def write_job(folder, job, steps):
    "What `sft` leaves for the processes that it starts."
    write_json(folder / "job.json", {**job, "schedule": asdict(job["schedule"]), "steps": steps})


def run_sharded(folder):
    "Run the job of a folder in two processes that each hold a part; gives what they printed."
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).parent / "sharded_worker.py"
    done = subprocess.run(
        [sys.executable, *launcher, worker, folder], check=True, stderr=subprocess.PIPE, text=True
    )
    return done.stderr


def test_fault_34_processes_that_hold_a_part_each_go_on_bit_for_bit(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_TRAIN", "micro_tokens=110 checkpoint_every=2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("whole", "again"):
        write_job(tmp_path / name, job, steps=3)
    assert "continues" not in run_sharded(tmp_path / "whole")
    # the checkpoint of the second of three steps
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "again" / "checkpoints")
    assert "continues from" in run_sharded(tmp_path / "again")
    whole, again = (load_student(tmp_path / name)[0].state_dict() for name in ("whole", "again"))
    assert all(torch.equal(whole[n], again[n]) for n in whole)


# How an execution is written


def test_words_are_read_and_unknown_ones_refused(monkeypatch):
    monkeypatch.setenv(
        "OCTOMED_TRAIN",
        "pack=0 checkpoint_every=50 report_to=tensorboard,wandb recompute=1 checkpoint_minutes=2.5",
    )
    assert current_execution() == Execution(
        pack=False,
        checkpoint_every=50,
        report_to="tensorboard,wandb",
        recompute=True,
        checkpoint_minutes=2.5,
    )
    for text, message in (
        ("fast=1", "there is no fast"),
        ("pack=maybe", "write 0 or 1"),
        ("micro_tokens=many", "micro_tokens=8192"),
        ("report_to=paper", "there is no paper"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_execution(text)


def test_a_package_that_is_not_installed_is_named(student, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OctomedError, match="pip install trackio"):
        build_accelerator(Execution(report_to="trackio"))
    with pytest.raises(OctomedError, match="pip install bitsandbytes"):
        build_optimizers(copy.deepcopy(student[0]), Schedule(optimizer="paged_adamw_8bit"))
    with pytest.raises(OctomedError, match="deepspeed is not installed"):
        build_launch_command(CONFIGURATIONS / "zero3.yaml", WORKER, ["x"])


def test_a_schedule_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="no optimizer sgd"):
        Schedule(optimizer="sgd")
    with pytest.raises(UsageError, match="no precision fp8"):
        Schedule(precision="fp8")


def test_a_model_that_cannot_be_packed_is_padded(student, monkeypatch):
    model, _ = student
    assert complete_execution(Execution(), model, Schedule(), device="cpu").pack is True
    monkeypatch.delattr(type(model.model), "get_rope_index")
    assert complete_execution(Execution(), model, Schedule(), device="cuda").pack is False
    with pytest.raises(OctomedError, match="pack=0"):
        complete_execution(Execution(pack=True), model, Schedule(), device="cuda")


def test_several_machines_are_started_by_srun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    command = build_launch_command(
        CONFIGURATIONS / "fsdp2.yaml", WORKER, ["a folder"], precision="bf16"
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
        build_launch_command(write_json(tmp_path / "x.yaml", {}), WORKER, [])
    with pytest.raises(OctomedError, match="MULTI_CPU"):
        build_launch_command(config(tmp_path, distributed_type="FSDP"), WORKER, [])
    with pytest.raises(OctomedError, match="cannot be read"):
        build_launch_command(tmp_path / "none.yaml", WORKER, [])


@pytest.mark.parametrize("name", ["single", "fsdp2", "zero3"])
def test_shipped_configurations_are_accelerates_own(name):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert settings.num_processes in (1, 8) and settings.mixed_precision == "bf16"
    if name == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        known = {f"fsdp_{field}" for field in FullyShardedDataParallelPlugin.__dataclass_fields__}
        known |= {"fsdp_version", "fsdp_offload_params"}
        assert set(settings.fsdp_config) <= known, set(settings.fsdp_config) - known


# What else a schedule can ask for


def test_low_rank_additions_are_merged_and_answer_the_same(student, rows, tmp_path):
    model, processor = copy.deepcopy(student[0]), student[1]
    batch, _ = prepare_padded(processor, rows, PixelCache(processor, PIXELS))
    logits, step = [], Loop.step

    def watched(self, *args):
        result = step(self, *args)
        with torch.no_grad():
            logits.append(self.model(**batch).logits)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", watched)
        s = Schedule(batch=7, lr=2e-2, lora=4, freeze=("model.visual",))
        log = fit_example(model, processor, rows, s, steps=6)
    with torch.no_grad():
        merged = model(**batch).logits
    assert torch.allclose(merged, logits[-1], atol=1e-4) and log[-1]["loss"] < log[0]["loss"]
    before, after = (dict(m.named_parameters()) for m in (student[0], model))
    assert list(after) == list(before)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all("language_model.layers" in n and n.endswith("proj.weight") for n in moved)
    save_student(tmp_path, model, processor, log)
    assert not (tmp_path / "adapter_config.json").exists()
    with torch.no_grad():
        again = load_student(tmp_path)[0](**batch).logits
    assert torch.equal(again, merged)


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_half_precision_learns_and_keeps_what_it_says(student, rows, precision):
    model, processor = copy.deepcopy(student[0]), student[1]
    dtypes, step = {}, Loop.step

    def watched(self, *args):
        result = step(self, *args)
        dtypes["weight"] = next(iter(self.named.values())).dtype
        dtypes["moment"] = next(iter(self.optimizers[0].state.values()))["exp_avg"].dtype
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", watched)
        s = Schedule(batch=7, lr=1e-2, precision=precision)
        log = fit_example(model, processor, rows, s, steps=12)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert set(dtypes.values()) == {torch.float32 if precision == "bf16" else torch.bfloat16}


def test_recomputed_activations_change_nothing(student, rows):
    losses = []
    for recompute in (False, True):
        model, processor = copy.deepcopy(student[0]), student[1]
        how = Execution(recompute=recompute)
        log = fit_example(model, processor, rows, Schedule(batch=7, lr=1e-3), steps=2, how=how)
        losses.append([record["loss"] for record in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_is_reported(student, rows, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path))
    log = fit_example(
        copy.deepcopy(student[0]),
        student[1],
        rows,
        s=Schedule(batch=7, lr=1e-3),
        steps=3,
        desc="a run",
        how=Execution(report_to="tensorboard"),
    )
    events = EventAccumulator(str(tmp_path / "training" / "a run"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([record["loss"] for record in log])
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3]


def test_a_curve_is_drawn_only_for_a_reader(monkeypatch):
    import IPython.display

    shown, cleared = [], []

    class Handle:
        def update(self, content):
            (shown if hasattr(content, "savefig") else cleared).append(content)

    def display(content, display_id):
        shown.append(content)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    log = [{"step": n, "loss": 1 / (n + 1)} for n in range(5)]
    Curve("nobody", 5, every=0)(log)
    assert not shown
    monkeypatch.setattr(launch, "_has_reader", lambda: True)
    curve = Curve("a run", 5, every=0)
    curve(log[:2])
    curve(log)
    curve.close()
    assert [len(figure.axes[0].lines[0].get_xdata()) for figure in shown] == [2, 5]
    assert len(cleared) == 1
