"""Checkpoints: a run that was stopped ends with the same student.

A checkpoint that is not complete is ignored.
"""

import copy
import json
import os
import signal

import pytest
import torch
from toys import chat

from octomed.core.paths import OctomedError, UsageError
from octomed.core.store import ExternalInput
from octomed.core.store import run_stage as make
from octomed.generate.render import render_row, save_rows
from octomed.train import loop
from octomed.train.checkpoints import (
    collect_random_states,
    list_checkpoints,
    read_checkpoint,
    restore_random_states,
    write_checkpoint,
)
from octomed.train.launch import Execution
from octomed.train.loop import CheckpointKeeper, Loop, fit
from octomed.train.schedule import Schedule, draw_batches
from octomed.train.students import load_student, save_student, sft, student_at

PIXELS = 12_544
EVERY = Execution(checkpoint_every=2)


@pytest.fixture(scope="module")
def rows(student, picture):
    _, processor = student
    return [
        render_row(
            processor,
            chat("which is it ?", *([picture] if n % 3 == 0 else [])),
            "one " * n + f"\\boxed{{{'AB'[n % 2]}}}",
            PIXELS,
        )
        for n in range(1, 8)
    ]


class Killed(BaseException):
    "What a test raises where a process would die."


def fit_example(model, processor, rows, s, folder=None, how=EVERY, seed=3):
    "Seven steps."
    return fit(
        model,
        processor,
        rows,
        schedule=s,
        seed=seed,
        steps=7,
        max_pixels=PIXELS,
        how=how,
        folder=folder,
    )


def run(student, rows, s, folder=None, **options):
    "Weights and log of a run on a copy of the student."
    model, processor = copy.deepcopy(student[0]), student[1]
    torch.manual_seed(5)
    log = fit_example(model, processor, rows, s, folder=folder, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, log


def run_and_die(student, rows, s, folder, die_at, **options):
    "A run that dies before the step `die_at` is taken."
    step, taken = Loop.step, []

    def dying(self, *args):
        if len(taken) == die_at:
            raise Killed
        taken.append(1)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loop, "step", dying)
        run(student, rows, s, folder=folder, **options)


def equal_weights(weights, others):
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def without_times(log):
    return [{key: v for key, v in record.items() if key != "seconds"} for record in log]


@pytest.mark.parametrize(
    "s",
    [
        Schedule(batch=3, lr=1e-2, weight_decay=0.01),
        Schedule(batch=3, lr=1e-2, optimizer="muon", freeze=("model.visual",)),
        Schedule(batch=3, lr=1e-2, lora=2),
    ],
    ids=["adamw", "muon", "lora"],
)
def test_fault_34_a_resumed_run_is_the_run_that_was_not_stopped(student, rows, tmp_path, s):
    whole, log = run(student, rows, s)
    run_and_die(student, rows, s, tmp_path, die_at=5)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    again, log_again = run(student, rows, s, tmp_path)
    assert equal_weights(whole, again)
    assert without_times(log) == without_times(log_again)


def test_fault_34_optimiser_and_random_states_are_those_of_the_moment(student, rows, tmp_path):
    noisy = copy.deepcopy(student[0]), student[1]
    for layer in noisy[0].model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    s, how = Schedule(batch=3, lr=1e-2), Execution(checkpoint_every=2, pack=False)
    whole, _ = run(noisy, rows, s, how=how)
    without_dropout, _ = run(student, rows, s, how=how)
    assert not equal_weights(whole, without_dropout), (
        "nothing is drawn: the random state would not matter"
    )
    run_and_die(noisy, rows, s, tmp_path, die_at=4, how=how)
    tensors, _ = read_checkpoint(list_checkpoints(tmp_path)[-1])
    kinds = {k.partition("/")[0] for k in tensors}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step", "random"}
    again, _ = run(noisy, rows, s, tmp_path, how=how)
    assert equal_weights(whole, again)


def test_fault_34_another_next_batch_is_refused(student, rows, tmp_path):
    s = Schedule(batch=3, lr=1e-2)
    run_and_die(student, rows, s, tmp_path, die_at=3)
    for other, seed in ((rows, 4), ([*rows[1:], rows[0]], 3)):
        with pytest.raises(OctomedError, match="made with other rows, or in another order"):
            run(student, other, s, tmp_path, seed=seed)
    smaller = copy.deepcopy(student[0])
    smaller.model.language_model.layers = smaller.model.language_model.layers[:1]
    with pytest.raises(OctomedError, match="of another model"):
        run((smaller, student[1]), rows, s, tmp_path)


@pytest.mark.parametrize(
    "harm", ["no state", "half a file", "no file", "half a state", "another name"]
)
def test_fault_35_a_partial_checkpoint_is_skipped(student, rows, tmp_path, harm):
    s = Schedule(batch=3, lr=1e-2)
    whole, _ = run(student, rows, s)
    run_and_die(student, rows, s, tmp_path, die_at=5)
    last = tmp_path / "step-00000004"
    tensors = last / "rank-00000.safetensors"
    if harm == "no state":
        (last / "state.json").unlink()
    elif harm == "half a file":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif harm == "no file":
        tensors.unlink()
    elif harm == "half a state":
        (last / "state.json").write_text((last / "state.json").read_text()[:100])
    else:
        last.rename(tmp_path / ".step-00000004")  # as a kill during the write leaves it
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000002"]
    again, _ = run(student, rows, s, tmp_path)
    assert equal_weights(whole, again)
    assert (
        len(list_checkpoints(tmp_path)) == 2
        and list_checkpoints(tmp_path)[-1].name == "step-00000006"
    )


def test_fault_36_a_checkpoint_holds_no_pickle(student, rows, tmp_path, monkeypatch):
    run_and_die(student, rows, Schedule(batch=3, lr=1e-2), tmp_path, die_at=3)
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".safetensors", ".json"}
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle is read"))
    run(student, rows, Schedule(batch=3, lr=1e-2), tmp_path)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_fault_33_no_number_stops_the_run_names_its_rows_and_keeps_the_last_checkpoint(
    student, rows, tmp_path, monkeypatch, how
):
    model, processor = copy.deepcopy(student[0]), student[1]
    loss_of, calls = Loop.loss, []

    def spoilt(self, group):
        calls.append(1)
        loss = loss_of(self, group)
        if len(calls) != 4:
            return loss
        if how == "loss":
            return loss * float("inf")
        return loss + (self.model.lm_head.weight.sum() * 0).sqrt()  # 0, with a gradient of NaN

    monkeypatch.setattr(Loop, "loss", spoilt)
    s = Schedule(batch=3, lr=1e-2)
    order = list(draw_batches(len(rows), s, seed=3, steps=7))
    with pytest.raises(OctomedError, match="no longer a number at step 3") as error:
        fit_example(model, processor, rows, s, folder=tmp_path)
    message = str(error.value)
    assert ", ".join(map(str, sorted(order[3]))) in message and "step-00000002 is kept" in message
    assert all(p.isfinite().all() for p in model.parameters()), "the step was taken"


def test_a_job_that_is_asked_to_stop_keeps_its_state(student, rows, tmp_path):
    s, how = Schedule(batch=3, lr=1e-2), Execution()
    whole, _ = run(student, rows, s, how=how)
    before, step, sent = signal.getsignal(signal.SIGTERM), Loop.step, []

    def step_after_signal(self, chosen, lr, note):
        if self.schedule.lr * 0.9 < lr and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, chosen, lr, note)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="run it again to go on"),
    ):
        patch.setattr(Loop, "step", step_after_signal)
        run(student, rows, s, tmp_path, how=how)
    assert signal.getsignal(signal.SIGTERM) == before and len(list_checkpoints(tmp_path)) == 1
    again, _ = run(student, rows, s, tmp_path, how=how)
    assert equal_weights(whole, again)


def test_a_short_run_writes_nothing_and_a_long_one_by_the_clock(
    student, rows, tmp_path, monkeypatch
):
    run(student, rows, Schedule(batch=3, lr=1e-2), tmp_path, how=Execution())
    assert not list(tmp_path.iterdir())
    clock = [0.0]

    def minutes():
        clock[0] += 60
        return clock[0]

    monkeypatch.setattr(loop.time, "time", minutes)
    run(
        student,
        rows,
        Schedule(batch=3, lr=1e-2),
        tmp_path,
        how=Execution(pack=False, checkpoint_minutes=5),
    )
    assert 1 <= len(list_checkpoints(tmp_path)) <= 2


def test_two_are_kept_and_a_stage_leaves_none(student, tmp_path):
    for n in range(1, 5):
        write_checkpoint(tmp_path, n, collect_random_states(), {})
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    with pytest.raises(OctomedError, match="written by 1 processes, and 2 are here"):
        read_checkpoint(tmp_path / "step-00000004", ranks=2)


def test_generators_go_on_where_they_were():
    states = collect_random_states()
    drawn = torch.rand(5)
    restore_random_states(states)
    assert torch.equal(drawn, torch.rand(5))


def test_a_student_is_kept_on_its_way_and_ends_the_same(student, rows, tmp_path):
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
    save_student(tmp_path / "base", *student, [])
    save_rows(tmp_path / "rows", rows, {})
    job = {
        "base": ExternalInput(tmp_path / "base"),
        "rendered": ExternalInput(tmp_path / "rows"),
        "schedule": Schedule(epochs=2, batch=3, lr=1e-2),
        "seed": 7,
        "max_pixels": PIXELS,
    }
    whole = sft(**job)
    kept = sft(**job, points=(0.4, 0.6))
    ends = [load_student(make(stage))[0].state_dict() for stage in (whole, kept)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    ways = {point: make(student_at(student=kept, point=point)) for point in (0.4, 0.6)}
    steps = {
        point: len((folder / "log.jsonl").read_text().splitlines())
        for point, folder in ways.items()
    }
    assert steps == {0.4: 2, 0.6: 3}  # of five
    early = load_student(ways[0.4])[0].state_dict()
    assert any(not torch.equal(early[name], ends[1][name]) for name in early)


def test_a_student_of_low_rank_additions_is_not_kept_on_its_way(student, rows, tmp_path):
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
    save_student(tmp_path / "base", *student, [])
    save_rows(tmp_path / "rows", rows, {})
    stage = sft(
        base=ExternalInput(tmp_path / "base"),
        rendered=ExternalInput(tmp_path / "rows"),
        schedule=Schedule(epochs=2, batch=3, lora=2),
        seed=7,
        max_pixels=PIXELS,
        points=(0.5,),
    )
    with pytest.raises(UsageError, match="lora=0"):
        make(stage)


def test_a_killed_stage_goes_on_from_its_checkpoint(student, rows, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "rows").mkdir()
    save_student(tmp_path / "base", *student, [])
    save_rows(tmp_path / "rows", rows, {})

    def declared(seed):
        return sft(
            base=ExternalInput(tmp_path / "base"),
            rendered=ExternalInput(tmp_path / "rows"),
            schedule=Schedule(epochs=2, batch=3, lr=1e-2),
            seed=seed,
            max_pixels=PIXELS,
        )

    monkeypatch.setenv("OCTOMED_TRAIN", "checkpoint_every=2")
    step, resume, kept, began = Loop.step, CheckpointKeeper.resume, [], []

    def dying(self, chosen, lr, note):
        if kept:
            raise Killed
        if note:
            kept.append(1)
        return step(self, chosen, lr, note)

    def watched_resume(self):
        log = resume(self)
        began.append(len(log))
        return log

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loop, "step", dying)
        make(declared(1))
    monkeypatch.setattr(CheckpointKeeper, "resume", watched_resume)
    folder = make(declared(1))
    assert began == [2] and len((folder / "log.jsonl").read_text().splitlines()) == 5
    assert not list(folder.rglob("step-*"))
    assert json.loads((folder / "execution.json").read_text())["processes"] == 1
    key = declared(1).key
    monkeypatch.setenv("OCTOMED_TRAIN", "pack=0")
    assert declared(1).key == key, "how a student is trained moves its key"
