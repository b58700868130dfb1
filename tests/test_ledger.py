"The ledger: every generation once, through kills, two writers, a full disk and a changed version."

import importlib.util
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyEngine

from octomed.core.paths import OctomedError
from octomed.generate.ledger import Ledger, Stopped, draw_samples, top_up
from octomed.generate.samples import Request, Sample, Sampling, make_sample_key

S = Sampling()


def sample(n, text="it is B", finish="stop", **kw):
    return Sample(f"q{n}", "m@1", "p", S.key, 0, text, finish, **kw)


def key(s):
    return make_sample_key(s.question, s.model, s.prompt, s.sampling, s.index)


def ask(questions, n=16):
    return [Request(f"q{k}", [], "p", tuple(range(n))) for k in range(questions)]


class Engine(ToyEngine):
    "Counts what it makes."

    model, name = "m@1", "test"

    def __init__(self, **finishes):
        self.drawn, self.finishes = [], finishes

    def answer(self, request, index):
        question = request.question
        self.drawn.append((question, index))
        return f"{question} {index}", self.finishes.get(question, "stop"), 10


def keys_of_shards(folder):
    return [
        {r[0] for r in sqlite3.connect(p).execute('SELECT "key" FROM samples')}
        for p in sorted(folder.glob("ledger*.sqlite"), key=lambda p: (len(p.name), p.name))
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.sampled_from(["stop", "length", "refused", "error"])),
            max_size=8,
        ),
        max_size=8,
    ),
    st.integers(1, 9),
)
def test_any_order_of_appends_keeps_the_first_outcome_of_each_key_once(
    tmp_path_factory, batches, rows
):
    folder, first, errors = tmp_path_factory.mktemp("ledger"), {}, {}
    for k, batch in enumerate(batches):
        ss = [sample(n, f"{k}.{j}", finish) for j, (n, finish) in enumerate(batch)]
        ledger = Ledger(folder / "ledger.sqlite", rows)  # a new process each time
        ledger.append(ss)
        ledger.close()
        for s in ss:
            if s.finish == "error":
                errors[key(s)] = s
            else:
                first.setdefault(key(s), s)
    ledger = Ledger(folder / "ledger.sqlite", rows)
    wanted = [key(sample(n)) for n in range(31)]
    assert ledger.find(wanted) == errors | first
    assert ledger.has(wanted) == first.keys() and len(ledger) == len(first)
    ledger.close()


def test_a_closed_shard_takes_no_more_and_the_next_is_begun(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", rows=10)
    for n in range(35):
        ledger.append([sample(n)])
    assert [len(k) for k in keys_of_shards(tmp_path)] == [10, 10, 10, 5]
    assert (
        len(Ledger(tmp_path / "ledger.sqlite", rows=10).find([key(sample(n)) for n in range(40)]))
        == 35
    )


def test_another_process_s_shards_are_seen(tmp_path):
    early, late = (Ledger(tmp_path / "ledger.sqlite", rows=3) for _ in range(2))
    late.append([sample(n) for n in range(3)])
    late.append([sample(3)])
    assert len(early.shards) == 1 and early.has([key(sample(3))]) and len(early) == 4
    early.append([sample(0, "something else"), sample(4)])
    assert (
        late.find([key(sample(0)), key(sample(4))])[key(sample(0))].text == "it is B"
        and len(late) == 5
    )


def test_fault_16_the_same_payload_hits_and_a_changed_one_misses(tmp_path):
    ledger, first = Ledger(tmp_path / "ledger.sqlite"), Engine()
    samples = draw_samples(ledger, first, ask(2), S)
    for requests, sampling, expected in (
        (ask(2), S, 0),
        (ask(2, 20), S, 8),
        ([replace(r, prompt="other") for r in ask(2)], S, 32),
        (ask(2), replace(S, temperature=0.1), 32),
    ):
        engine = Engine()
        again = draw_samples(ledger, engine, requests, sampling)
        assert len(engine.drawn) == expected and (expected or again == samples)


def test_fault_11_wrong_unparsed_truncated_and_refused_samples_are_kept_and_not_drawn_again(
    tmp_path,
):
    ledger, asked = Ledger(tmp_path / "ledger.sqlite"), ask(3, 4)
    draw_samples(ledger, Engine(q0="refused", q1="length"), asked, S)
    engine = Engine()
    assert [s.finish for s in draw_samples(ledger, engine, asked, S)] == ["refused"] * 4 + [
        "length"
    ] * 4 + ["stop"] * 4 and not engine.drawn


def test_an_error_is_drawn_again_by_the_next_run_and_only_it(tmp_path):
    ledger, asked = Ledger(tmp_path / "ledger.sqlite"), ask(3, 2)
    assert [s.finish for s in draw_samples(ledger, Engine(q1="error"), asked, S)] == [
        "stop",
        "stop",
        "error",
        "error",
        "stop",
        "stop",
    ]
    engine = Engine()
    assert {
        s.finish for s in draw_samples(Ledger(tmp_path / "ledger.sqlite"), engine, asked, S)
    } == {"stop"} and engine.drawn == [("q1", 0), ("q1", 1)]


def test_fault_14_what_is_asked_for_twice_is_drawn_once(tmp_path):
    engine = Engine()
    samples = draw_samples(Ledger(tmp_path / "ledger.sqlite"), engine, ask(1, 4) + ask(2, 6), S)
    assert len(engine.drawn) == len(set(engine.drawn)) == 12 and [s.index for s in samples] == [
        0,
        1,
        2,
        3,
        *range(6),
        *range(6),
    ]


def test_an_engine_that_gives_too_little_or_something_else_is_found_out(tmp_path):
    class Half(Engine):
        def generate(self, requests, sampling):
            yield from list(super().generate(requests, sampling))[::2]

    class Other(Engine):
        def generate(self, requests, sampling):
            return (replace(s, index=s.index + 100) for s in super().generate(requests, sampling))

    for k, wrong, lost in ((0, Half(), 8), (1, Other(), 16)):
        with pytest.raises(OctomedError, match=f"gave {lost} samples too few"):
            top_up(Ledger(tmp_path / f"{k}.sqlite"), wrong, ask(1), S)


def test_a_budget_stops_with_a_sentence_and_the_next_run_goes_on(tmp_path, capsys):
    ledger, spent = Ledger(tmp_path / "ledger.sqlite"), []

    def budget(s):
        spent.append(s.tokens)
        return "the budget of 200 tokens is spent" if sum(spent) >= 200 else None

    with pytest.raises(
        Stopped,
        match=r"^the budget of 200 tokens is spent: 20 of 32 samples are kept, run again to go on$",
    ):
        draw_samples(ledger, Engine(), ask(2), S, stop=budget)
    engine = Engine()
    draw_samples(ledger, engine, ask(2), S)
    assert len(engine.drawn) == 12 and "20 of 32 are there already" in capsys.readouterr().err


def test_a_budget_that_is_spent_by_the_last_sample_stops_nothing(tmp_path):
    assert (
        len(
            draw_samples(
                Ledger(tmp_path / "ledger.sqlite"),
                Engine(),
                ask(1),
                S,
                stop=lambda s: "spent" if s.index == 15 else None,
            )
        )
        == 16
    )


def test_what_was_made_is_kept_within_a_second_while_the_engine_thinks(tmp_path):
    path, counts = tmp_path / "ledger.sqlite", []

    class Thinks(Engine):
        def generate(self, requests, sampling):
            for n, s in enumerate(super().generate(requests, sampling)):
                if n == 3:
                    time.sleep(0.95)
                    counts.append(len(Ledger(path)))
                yield s

    draw_samples(Ledger(path), Thinks(), ask(1, 5), S)
    assert counts == [3]


def test_text_that_is_no_utf8_is_kept(tmp_path):
    ledger, odd = Ledger(tmp_path / "ledger.sqlite"), ["cut \ud83d", "nul \0 in it", "β → ∞", ""]
    ledger.append([sample(n, t) for n, t in enumerate(odd)])
    assert [ledger.find([key(sample(n))])[key(sample(n))].text for n in range(4)] == [
        "cut ?",
        *odd[1:],
    ]


WORKER = """
    import resource
    import sys
    import time
    from pathlib import Path

    from octomed.generate.engines import make_sample
    from octomed.generate.samples import Request, Sampling
    from octomed.generate.ledger import Ledger, draw_samples

    path = Path(sys.argv[1])
    rows, first, last, limit = (int(sys.argv[n]) for n in (2, 3, 4, 6))
    pause = float(sys.argv[5])

    class Slow:
        model, name = "m@1", "test"

        def generate(self, requests, sampling):
            for r in requests:
                for i in r.indices:
                    time.sleep(pause)
                    print("made", r.question, i, flush=True)
                    text = f"{r.question} {i} " + "x" * 3000
                    yield make_sample(self, r, i, sampling=sampling, text=text, finish="stop")

    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    requests = [Request(f"q{n}", [], "p", tuple(range(16))) for n in range(first, last)]
    draw_samples(Ledger(path, rows), Slow(), requests, Sampling())
    print("complete", flush=True)
"""


def worker(path, rows=1000, first=0, last=25, pause=0.002, limit=0):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(WORKER),
            *map(str, (path, rows, first, last, pause, limit)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_writers_in_one_ledger_lose_nothing_and_keep_no_key_twice(tmp_path):
    both = [
        worker(tmp_path / "ledger.sqlite", 60, *span, pause)
        for span, pause in (((0, 20), 0.002), ((8, 28), 0.0015))
    ]  # 12 questions are wanted by both
    assert all(p.communicate(timeout=120)[0].endswith("complete\n") for p in both)
    shards = keys_of_shards(tmp_path)
    assert len(shards) > 2 and sum(map(len, shards)) == len(set().union(*shards)) == 28 * 16


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_fault_2_stopped_by_a_signal_nothing_that_was_made_is_lost(tmp_path, how):
    p, lines_before = worker(tmp_path / "ledger.sqlite"), []
    for line in p.stdout:
        lines_before.append(line)
        if len(lines_before) == 60:
            p.send_signal(how)
    stderr = p.stderr.read()
    p.wait()
    kept = len(Ledger(tmp_path / "ledger.sqlite"))
    assert (
        p.returncode != 0
        and "complete\n" not in lines_before
        and f"stopped, {kept} of 400 are kept" in stderr
    )
    assert (
        len(lines_before) - 1 <= kept <= len(lines_before)
    )  # the signal may meet a sample between its making and its adding
    lines = worker(tmp_path / "ledger.sqlite", pause=0).communicate()[0].splitlines()
    assert lines[-1] == "complete" and len(lines) - 1 == 400 - kept


def test_fault_4_a_full_disk_is_one_sentence_and_what_was_kept_is_not_made_again(tmp_path):
    path = tmp_path / "ledger.sqlite"
    p = worker(path, pause=0.004, limit=600_000)
    out, stderr = p.communicate(timeout=120)
    assert (
        p.returncode != 0
        and "OctomedError: the ledger took no more samples" in stderr
        and "free some space and run again" in stderr
    )
    kept = len(Ledger(path))
    assert 0 < kept < out.count("made") < 400
    lines = worker(path, pause=0).communicate()[0].splitlines()
    assert lines[-1] == "complete" and len(lines) - 1 == 400 - kept and len(Ledger(path)) == 400
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_fault_9_a_killed_distillation_ends_with_the_same_keys_and_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "distill_kills", Path(__file__).parent / "soak" / "distill_kills.py"
    )
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    report = soak.compare_runs(3, 16, tmp_path)
    assert report["same_keys"] and report["same_bytes"] and report["same_files"]
    assert (
        any(k["exit"] == -signal.SIGKILL for k in report["kills"])
        and report["made"] == report["samples"] + report["lost"]
    )


OLD = (
    "question",
    "model",
    "prompt",
    "sampling",
    "index",
    "text",
    "finish",
    "tokens",
    "answer_tokens",
    "seconds",
    "seed",
    "engine",
)


def test_a_ledger_of_an_earlier_version_is_read_and_brought_up_to_date_once(tmp_path, capsys):
    path, old = (
        tmp_path / "ledger.sqlite",
        [sample(0, tokens=5, seed=7), sample(1, "timed out", "error")],
    )
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(
        'CREATE TABLE samples ("key" BLOB PRIMARY KEY, '
        + ", ".join(f'"{c}"' for c in OLD)
        + ", at REAL)"
    )
    db.executemany(
        f"INSERT INTO samples VALUES ({', '.join('?' * 14)})",
        [(key(s), *(getattr(s, c) for c in OLD), 1.5) for s in old],
    )
    db.commit()
    db.close()
    assert Ledger(path).find([key(s) for s in old]) == {key(s): s for s in old}
    assert capsys.readouterr().err.count("\n") == 1
    ledger = Ledger(path)
    ledger.append([sample(1), sample(2, prompt_tokens=9)])
    assert (
        capsys.readouterr().err == ""
        and len(ledger) == 3
        and ledger.find([key(old[1])])[key(old[1])].finish == "stop"
    )


def test_parquet_is_read_by_datasets_and_duckdb(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.sqlite", rows=10)
    for k in range(0, 25, 5):
        ledger.append(
            [
                sample(n, f"text {n}", ("stop", "length", "refused")[n % 3], tokens=n, seconds=0.5)
                for n in range(k, k + 5)
            ]
        )
    ledger.append([sample(99, "timed out", "error")])
    folder = ledger.parquet()
    files = sorted(folder.glob("*.parquet"))
    assert [f.name for f in files] == ["0000.parquet", "0001.parquet", "0002.parquet"] and len(
        list(folder.iterdir())
    ) == 3
    import datasets

    rows = datasets.load_dataset(
        "parquet",
        data_files=str(folder / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert (
        rows["text"][:] == [f"text {n}" for n in range(25)]
        and bytes.fromhex(rows[3]["key"]) == key(sample(3))
        and sum(rows["tokens"][:]) == 300
    )
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    counts = duckdb.sql(
        f"SELECT finish, count(*), sum(seconds) FROM '{folder}/*.parquet' GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    assert counts == [("length", 8, 4.0), ("refused", 8, 4.0), ("stop", 9, 4.5)]


def test_a_closed_shard_s_parquet_is_written_once(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", rows=10)
    for k in (0, 10):
        ledger.append([sample(n) for n in range(k, k + 10)])
    before = {f.name: f.stat().st_mtime_ns for f in ledger.parquet().iterdir()}
    ledger.append([sample(50)])
    after = {f.name: f.stat().st_mtime_ns for f in ledger.parquet().iterdir()}
    assert after.items() > before.items() and set(after) - set(before) == {"0002.parquet"}


def test_a_parquet_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch):
    import errno

    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([sample(0)])
    before = (ledger.parquet() / "0000.parquet").read_bytes()
    ledger.append([sample(1)])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OctomedError, match="no space left"):
        ledger.parquet()
    assert [f.name for f in (tmp_path / "ledger.parquet").iterdir()] == ["0000.parquet"] and (
        tmp_path / "ledger.parquet" / "0000.parquet"
    ).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OctomedError, match="point OCTOMED_STORE at a folder of your own"):
        Ledger(tmp_path / "file" / "ledger.sqlite")
