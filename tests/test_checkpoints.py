"Checkpoints: a run that was stopped ends with the same student, and what is not complete is not there."

import copy
import json
import os
import signal

import pytest
import torch

from octomed.core.paths import OctomedError
from octomed.generate.render import row
from octomed.train import loop as train
from octomed.train.checkpoints import (
    checkpoints,
    random_states,
    read_checkpoint,
    restore_random,
    write_checkpoint,
)
from octomed.train.launch import Execution
from octomed.train.loop import fit
from octomed.train.schedule import Schedule

PIXELS = 12_544
EVERY = Execution(checkpoint_every=2)


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
    _, processor = student
    return [
        row(
            processor,
            chat("which is it ?", *([picture] if n % 3 == 0 else [])),
            "one " * n + f"\\boxed{{{'AB'[n % 2]}}}",
            PIXELS,
        )
        for n in range(1, 8)
    ]


class Killed(BaseException):
    "What a test throws where a process would die."


def run(student, rows, s, folder=None, steps=7, die_at=None, how=EVERY, monkeypatch=None, seed=3):
    "Weights and log of a run; with `die_at` it dies before that step is taken."
    model, processor = student
    m = copy.deepcopy(model)
    torch.manual_seed(5)
    if die_at is not None:
        step, taken = train.Loop.step, []

        def dying(self, *a):
            if len(taken) == die_at:
                raise Killed
            taken.append(1)
            return step(self, *a)

        monkeypatch.setattr(train.Loop, "step", dying)
        with pytest.raises(Killed):
            fit(m, processor, rows, s, seed, steps, PIXELS, how=how, folder=folder)
        monkeypatch.undo()
        return None
    log = fit(m, processor, rows, s, seed, steps, PIXELS, how=how, folder=folder)
    return {n: p.detach().clone() for n, p in m.named_parameters()}, log


@pytest.mark.parametrize(
    "s",
    [
        Schedule(batch=3, lr=1e-2, weight_decay=0.01),
        Schedule(batch=3, lr=1e-2, optimizer="muon", freeze=("model.visual",)),
        Schedule(batch=3, lr=1e-2, lora=2),
    ],
    ids=["adamw", "muon", "lora"],
)
def test_fault_34_a_resumed_run_is_the_run_that_was_not_stopped(
    student, rows, tmp_path, monkeypatch, s
):
    whole, log = run(student, rows, s)
    run(student, rows, s, tmp_path, die_at=5, monkeypatch=monkeypatch)
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    again, log2 = run(student, rows, s, tmp_path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)

    def drop(log):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in log]

    assert drop(log) == drop(log2)


def test_fault_34_optimiser_and_random_states_are_those_of_the_moment(
    student, rows, tmp_path, monkeypatch
):
    def dropout(m):
        return [
            setattr(l.self_attn, "attention_dropout", 0.3) for l in m[0].model.language_model.layers
        ] and m

    noisy = dropout((copy.deepcopy(student[0]), student[1]))
    s, how = Schedule(batch=3, lr=1e-2), Execution(checkpoint_every=2, pack=False)
    whole, _ = run(noisy, rows, s, how=how)
    assert not all(
        torch.equal(whole[n], p) for n, p in run(student, rows, s, how=how)[0].items()
    ), "nothing is drawn: the random state would not matter"
    run(noisy, rows, s, tmp_path, die_at=4, monkeypatch=monkeypatch, how=how)
    tensors, _ = read_checkpoint(checkpoints(tmp_path)[-1])
    kinds = {k.partition("/")[0] for k in tensors}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step", "random"}
    again, _ = run(noisy, rows, s, tmp_path, how=how)
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_fault_34_another_next_batch_is_refused(student, rows, tmp_path, monkeypatch):
    s = Schedule(batch=3, lr=1e-2)
    run(student, rows, s, tmp_path, die_at=3, monkeypatch=monkeypatch)
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
def test_fault_35_a_partial_checkpoint_is_skipped(student, rows, tmp_path, monkeypatch, harm):
    s = Schedule(batch=3, lr=1e-2)
    whole, _ = run(student, rows, s)
    run(student, rows, s, tmp_path, die_at=5, monkeypatch=monkeypatch)
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
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000002"]
    again, _ = run(student, rows, s, tmp_path)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert len(checkpoints(tmp_path)) == 2 and checkpoints(tmp_path)[-1].name == "step-00000006"


def test_fault_36_a_checkpoint_holds_no_pickle(student, rows, tmp_path, monkeypatch):
    run(student, rows, Schedule(batch=3, lr=1e-2), tmp_path, die_at=3, monkeypatch=monkeypatch)
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".safetensors", ".json"}
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle is read"))
    run(student, rows, Schedule(batch=3, lr=1e-2), tmp_path)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_fault_33_no_number_stops_the_run_names_its_rows_and_keeps_the_last_checkpoint(
    student, rows, tmp_path, monkeypatch, how
):
    model, processor = student
    m, loss, seen = copy.deepcopy(model), train.Loop.loss, []

    def spoilt(self, group):
        seen.append(1)
        found = loss(self, group)
        if len(seen) != 4:
            return found
        return (
            found * float("inf")
            if how == "loss"
            else found + (self.model.lm_head.weight.sum() * 0).sqrt()
        )  # a value of 0 whose gradient is none

    monkeypatch.setattr(train.Loop, "loss", spoilt)
    s = Schedule(batch=3, lr=1e-2)
    order = list(train.batches(len(rows), s, 3, 7))
    with pytest.raises(OctomedError, match="no longer a number at step 3") as e:
        fit(m, processor, rows, s, 3, 7, PIXELS, how=EVERY, folder=tmp_path)
    assert ", ".join(map(str, sorted(order[3]))) in str(e.value) and "step-00000002 is kept" in str(
        e.value
    )
    assert all(p.isfinite().all() for p in m.parameters()), "the step was taken"


def test_a_job_that_is_told_to_stop_keeps_its_state(student, rows, tmp_path):
    s, how = Schedule(batch=3, lr=1e-2), Execution()
    whole, _ = run(student, rows, s, how=how)
    model, processor = student
    m, before, step = copy.deepcopy(model), signal.getsignal(signal.SIGTERM), train.Loop.step

    def told(self, chosen, lr, note):
        if self.s.lr * 0.9 < lr and not told.sent:
            told.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, chosen, lr, note)

    told.sent = False
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="run it again to go on"),
    ):
        patch.setattr(train.Loop, "step", told)
        torch.manual_seed(5)
        fit(m, processor, rows, s, 3, 7, PIXELS, how=how, folder=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before and len(checkpoints(tmp_path)) == 1
    again, _ = run(student, rows, s, tmp_path, how=how)
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_a_short_run_writes_nothing_and_a_long_one_by_the_clock(
    student, rows, tmp_path, monkeypatch
):
    run(student, rows, Schedule(batch=3, lr=1e-2), tmp_path, how=Execution())
    assert not list(tmp_path.iterdir())
    clock = [0.0]

    def minutes():
        clock[0] += 60
        return clock[0]

    monkeypatch.setattr(train.time, "time", minutes)
    run(
        student,
        rows,
        Schedule(batch=3, lr=1e-2),
        tmp_path,
        how=Execution(pack=False, checkpoint_minutes=5),
    )
    assert 1 <= len(checkpoints(tmp_path)) <= 2


def test_two_are_kept_and_a_stage_leaves_none(student, tmp_path):
    for n in range(1, 5):
        write_checkpoint(tmp_path, n, random_states(), {})
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    with pytest.raises(OctomedError, match="written by 1 processes, and 2 are here"):
        read_checkpoint(tmp_path / "step-00000004", ranks=2)


def test_generators_go_on_where_they_were():
    kept = random_states()
    one = torch.rand(5)
    restore_random(kept)
    assert torch.equal(one, torch.rand(5))


def test_a_killed_stage_goes_on_from_its_checkpoint(student, rows, tmp_path, monkeypatch):
    from octomed.core.store import Outside
    from octomed.core.store import run as make
    from octomed.generate.render import save_rows
    from octomed.train.students import save_student, sft

    (tmp_path / "base").mkdir()
    (tmp_path / "rows").mkdir()
    save_student(tmp_path / "base", *student, [])
    save_rows(tmp_path / "rows", rows, {})

    def declared(seed):
        return sft(
            base=Outside(tmp_path / "base"),
            rendered=Outside(tmp_path / "rows"),
            schedule=Schedule(epochs=2, batch=3, lr=1e-2),
            seed=seed,
            max_pixels=PIXELS,
        )

    monkeypatch.setenv("OCTOMED_TRAIN", "checkpoint_every=2")
    step, dead = train.Loop.step, []

    def dying(self, chosen, lr, note):
        if note and not dead:
            dead.append(1)
        elif dead:
            raise Killed
        return step(self, chosen, lr, note)

    monkeypatch.setattr(train.Loop, "step", dying)
    with pytest.raises(Killed):
        make(declared(1))
    monkeypatch.setattr(train.Loop, "step", step)
    began = []
    monkeypatch.setattr(
        train.Keeper,
        "resume",
        lambda self, resume=train.Keeper.resume: began.append(len(log := resume(self))) or log,
    )
    folder = make(declared(1))
    assert began == [2] and len((folder / "log.jsonl").read_text().splitlines()) == 5
    assert (
        not list(folder.rglob("step-*"))
        and json.loads((folder / "execution.json").read_text())["processes"] == 1
    )
    assert declared(1).key == (monkeypatch.setenv("OCTOMED_TRAIN", "pack=0"), declared(1))[1].key, (
        "how a student is trained moves its key"
    )
