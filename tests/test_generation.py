"Engines and ledger: what is drawn, kept, and never drawn twice."

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import ask
from transformers import LogitsProcessor, LogitsProcessorList

from octomed.core.paths import OctomedError
from octomed.generate.engine_transformers import (
    TransformersEngine,
    choose_from_nucleus,
    decode_shrinking,
)
from octomed.generate.engines import FORCED
from octomed.generate.ledger import Ledger, draw_samples
from octomed.generate.samples import Sample, Sampling, derive_sample_seed, make_sample_key
from octomed.train.students import save_student


@pytest.fixture(scope="module")
def engine(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    save_student(folder, *student, [])
    return TransformersEngine(folder, "tiny@1", max_pixels=12_544, batch=5)


FAST = Sampling(temperature=1.0, max_tokens=12)


def test_fault_13_samples_are_distinct_and_each_has_its_own_seed(engine):
    samples = list(engine.generate([ask("q1", 16)], FAST))
    assert len({s.text for s in samples}) == 16
    assert [s.seed for s in sorted(samples, key=lambda s: s.index)] == [
        derive_sample_seed(FAST, "q1", i) for i in range(16)
    ]


def test_a_sample_does_not_depend_on_its_neighbours(engine):
    alone = {s.index: s.text for s in engine.generate([ask("q1", 3)], FAST)}
    among = {
        s.index: s.text
        for s in engine.generate([ask("q2", 7), ask("q1", 3), ask("q3", 1)], FAST)
        if s.question == "q1"
    }
    assert alone == among


def test_rows_that_end_early_leave_the_batch_and_change_nothing(engine):
    """The same tokens as from transformers' own loop and attention, in fewer steps of rows."""
    from octomed.generate.render import encode_prompts, write_chat

    tok, sizes = engine.processor.tokenizer, []
    prompts = [
        write_chat(engine.processor, ask("q", text=t).messages, 12_544)
        for t in (
            "which is it ?",
            "one two three",
            "which ?",
            "it is one",
            "two",
            "three which one",
        )
    ]
    inputs = encode_prompts(engine.processor, prompts, [[] for _ in prompts], 12_544)
    plain = (
        type(engine.net).from_pretrained(engine.net.name_or_path, attn_implementation="sdpa").eval()
    )
    u = torch.rand(len(prompts), 24)
    width = inputs["input_ids"].shape[1]

    class Choose(LogitsProcessor):
        def __call__(self, ids, scores):
            chosen = choose_from_nucleus(scores, u[:, ids.shape[1] - width], 1.0, 0.95)
            impossible = torch.full_like(scores, -torch.inf)
            return impossible.scatter_(-1, chosen[:, None], 0.0)

    how = {
        "max_new_tokens": 24,
        "do_sample": False,
        "repetition_penalty": 1.1,
        "pad_token_id": tok.pad_token_id,
    }

    def draw(ends):
        return plain.generate(
            **inputs, **how, eos_token_id=ends, logits_processor=LogitsProcessorList([Choose()])
        )

    early = draw(tok.eos_token_id)[:3, width + 2].tolist()  # some rows end early with these
    ends = [*early, tok.eos_token_id]
    whole = draw(ends)
    watch = engine.net.register_forward_pre_hook(
        lambda _, args, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True
    )
    ours = engine.net.generate(
        **inputs,
        **how,
        eos_token_id=ends,
        custom_generate=decode_shrinking,
        choose=lambda scores, rows, step: choose_from_nucleus(scores, u[rows, step], 1.0, 0.95),
    )
    watch.remove()
    assert torch.equal(ours, whole) and sizes[0] == len(prompts) > sizes[-1]


def test_temperature_zero_is_the_likeliest_token():
    logits = torch.randn(50, 30)
    assert torch.equal(choose_from_nucleus(logits, torch.rand(50), 0, 0.95), logits.argmax(-1))


def test_nucleus_draws_by_probability():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose_from_nucleus(
        p.log().repeat(20_000, 1),
        torch.from_numpy(np.random.default_rng(0).random(20_000)),
        1.0,
        0.9,
    )
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert share[3] == 0 and torch.allclose(share[:3], p[:3] / 0.95, atol=0.015)


def test_a_wide_nucleus_is_drawn_as_by_sorting_everything():
    # some nuclei hold four tokens, some four hundred
    logits = torch.randn(40, 500) * torch.linspace(0.1, 6, 40)[:, None]
    u = torch.rand(40)
    p, order = torch.sort(logits.softmax(-1), dim=-1, descending=True)
    p = p * (p.cumsum(-1) - p < 0.95)
    at = (p.cumsum(-1) < u[:, None] * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    wanted = order.gather(-1, at)[:, 0]
    assert torch.equal(choose_from_nucleus(logits, u, 1.0, 0.95), wanted)
    # alone, without wide neighbours
    assert torch.equal(choose_from_nucleus(logits[-8:], u[-8:], 1.0, 0.95), wanted[-8:])


def test_fault_12_one_over_long_prompt_stops_nobody_else(engine):
    samples = {
        s.question: s
        for s in engine.generate([ask("q1", 1), ask("long", 1, "one " * 3000), ask("q2", 1)], FAST)
    }
    assert samples["long"].finish == "error" and "no room" in samples["long"].text
    assert {samples["q1"].finish, samples["q2"].finish} <= {"stop", "length"}


def test_forced_exit_never_passes_its_budget_and_is_counted(engine):
    s = Sampling(temperature=1.0, max_tokens=6, answer_tokens=4)
    samples = list(engine.generate([ask("q1", 12)], s))
    late = [x for x in samples if x.answer_tokens]
    assert late, "a student that learnt nothing never ends its thought in six tokens"
    assert all(FORCED in x.text and x.answer_tokens <= 4 and x.tokens <= 10 for x in late)
    assert all(x.tokens <= 6 for x in samples if not x.answer_tokens)


def test_fault_16_the_same_payload_hits_and_a_changed_one_misses(engine, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = draw_samples(ledger, engine, [ask("q1")], FAST)

    class Refuses:
        model, name = engine.model, "none"

        def generate(self, requests, sampling):
            raise AssertionError("asked again")

    assert draw_samples(ledger, Refuses(), [ask("q1")], FAST) == first
    for request, sampling in (
        (replace(ask("q1"), prompt="other words"), FAST),
        (ask("q1"), replace(FAST, temperature=0.5)),
        (ask("q1", 5), FAST),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            draw_samples(ledger, Refuses(), [request], sampling)


WRITER = """
    import sys
    import time
    from pathlib import Path

    from octomed.generate.engines import make_sample
    from octomed.generate.samples import Request, Sampling
    from octomed.generate.ledger import Ledger, draw_samples

    class Slow:
        model, name = "slow@1", "test"

        def generate(self, requests, sampling):
            for r in requests:
                for i in r.indices:
                    time.sleep(0.004)
                    print("made", flush=True)
                    text = f"{r.question} {i}"
                    yield make_sample(self, r, i, sampling=sampling, text=text, finish="stop")

    requests = [Request(f"q{n}", [], "p", tuple(range(16))) for n in range(25)]
    draw_samples(Ledger(Path(sys.argv[1])), Slow(), requests, Sampling())
    print("complete", flush=True)
"""


def start(path):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_fault_9_killed_runs_resume_with_exactly_what_is_missing(tmp_path):
    path, drawn = tmp_path / "ledger.sqlite", 0
    for _ in range(3):
        p = start(path)
        for n, _line in enumerate(p.stdout):
            drawn += 1
            if n == 200:
                break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kept = len(Ledger(path))
        assert kept <= drawn
    p = start(path)
    lines = p.communicate()[0].split()
    assert lines[-1] == "complete" and lines.count("made") == 400 - kept
    assert len(Ledger(path)) == 400


def test_two_writers_meet_in_one_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    both = [start(path), start(path)]
    assert all("complete" in p.communicate(timeout=60)[0] for p in both)
    assert len(Ledger(path)) == 400


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def sample(n):
        return Sample(f"q{n}", "m", "p", "s", 0, "x" * 4000, "stop")

    ledger.append([sample(0)])
    ledger.db.execute(
        f"PRAGMA max_page_count={ledger.db.execute('PRAGMA page_count').fetchone()[0] + 2}"
    )
    with pytest.raises(OctomedError, match="free some space"):
        ledger.append([sample(n) for n in range(1, 50)])
    assert len(ledger) == 1 and ledger.find([make_sample_key("q0", "m", "p", "s", 0)])


def test_fault_43_a_failed_item_counts_as_wrong_and_is_not_skipped():
    from octomed.evaluate.evaluate import compute_rates, score_runs

    rows = [
        {
            "question": s,
            "statuses": [s],
            "letters": [None],
            "forced": [False],
            "tokens": [0],
            "options": 4,
        }
        for s in ("correct", "wrong", "unparsed", "truncated")
    ]
    assert score_runs(rows).tolist() == [[1.0], [0.0], [0.0], [0.0]]
    assert compute_rates(rows)["unparsed"] == compute_rates(rows)["truncated"] == 0.25
