import ast
import functools
import json
import math
import re
import shutil
import sys
import time

import numpy as np
import pytest

from octomed.bench import timing as benchmarks
from octomed.bench.answers import bench_answers, traces
from octomed.bench.decontaminate import bench_decontaminate, compared, lengths, made_up
from octomed.bench.engines import bench_engines
from octomed.bench.formats import READERS, bench_formats
from octomed.bench.ledger import LOOK_UP, bench_ledger_index
from octomed.bench.packing import first_fit, recipe_lengths
from octomed.bench.timing import (
    BENCHES,
    TARGETS,
    benchmark,
    in_turns,
    judged,
    measured,
    over,
    peer,
    ratio,
    repeated,
    row,
    table_of,
    timed,
    took,
)
from octomed.bench.trainers import (
    TRAINERS,
    beside,
    defined_gradient,
    exported,
    fitted_gradient,
    in_laps,
    peer_gradient,
)
from octomed.core.paths import OctomedError, UsageError, root
from octomed.data.decontaminate import decontaminate
from octomed.generate.render import Pixels
from octomed.generate.render import row as row_of
from octomed.run.cli import main
from octomed.train.students import load_student

STEMS = [" ".join(f"w{i}_{k}" for k in range(60)) for i in range(40)]


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    return tmp_path


@pytest.fixture
def toy():
    @benchmark(size=1000)
    def bench_toy(size=3):
        return [row("toy", "octomed", "steps", float(size), "s")]

    yield
    del BENCHES["toy"]


def test_the_ratio_and_its_interval():
    r = ratio([10.0, 20.0], [5.0, 5.0])
    assert (r.estimate, r.low, r.high) == (3, 2, 4) and ratio([1.0], [2.0]).interval == (0.5, 0.5)


def test_a_repeated_measure_is_its_median_from_the_least_to_the_most():
    assert repeated("toy", "octomed", "steps", [5.0, 1.0, 3.0], "s") == row(
        "toy", "octomed", "steps", 3.0, "s", [1.0, 5.0]
    )


def test_turns_alternate_and_a_call_is_timed_by_the_clock_given():
    order = []
    got = in_turns({k: lambda k=k: order.append(k) or len(order) for k in "abc"}, 3)
    assert (
        "".join(order) == "cbaabccba"
        and got == {"a": [3, 4, 9], "b": [2, 5, 8], "c": [1, 6, 7]}
        and over([6, 1], [3, 2]) == [2, 0.5]
    )
    assert took(time.sleep, 0.05) >= 0.05 > took(time.sleep, 0.05, clock=time.process_time)


def test_full_size_is_kept_with_a_card_and_small_size_is_not(places, toy):
    assert (
        measured(["toy"], small=True)[0]["rows"][0]["value"] == 3
        and not (places / "bench").exists()
    )
    (result,) = measured(["toy"])
    kept = json.loads((places / "bench" / "toy.json").read_text())
    assert kept == json.loads(json.dumps(result)) and kept["rows"] == [
        row("toy", "octomed", "steps", 1000.0, "s")
    ]
    assert kept["card"]["sizes"] == {"size": 1000} and {
        "versions",
        "hardware",
        "commit",
        "minutes",
    } <= set(kept["card"])


def test_the_command(places, toy, capsys):
    assert main(["bench", "toy", "--small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "bench": "toy",
            "who": "octomed",
            "what": "steps",
            "value": 3.0,
            "unit": "s",
            "interval": None,
        }
    ]
    assert (
        main(["bench", "toy", "nonsense"]) == 2
        and "there is no benchmark nonsense: choose from" in capsys.readouterr().err
    )
    with pytest.raises(UsageError):
        measured(["nonsense"])


def test_made_up_questions_are_seeded_and_as_long_as_real_ones():
    a = list(made_up(3000, STEMS, 1))
    assert (
        a == list(made_up(3000, STEMS, 1))
        and a != list(made_up(3000, STEMS, 2))
        and list(a[0]) == ["question", "options", "answer"]
    )
    n = lengths(200_000, np.random.default_rng(0))
    assert 8 <= np.median(n) <= 10 and 17 < n.mean() < 21 and n.max() > 200 and n.min() >= 2
    report = decontaminate(a, [{"question": s} for s in STEMS])
    assert 2 <= len(report.exact) <= 9 and 5 < len(report.flagged) < 30


def test_memory_and_processor_time_of_children_are_counted():
    child = "x = bytearray(60_000_000); y = sum(range(5_000_000)); import time; time.sleep(.5)"
    got = timed(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; [p.wait() for p in [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]]; print(7)",
        ]
    )
    assert got.out == "7\n" and got.cpu > 0.1 and got.seconds > 0.5 and got.peak > 120e6


def test_a_failed_command_says_its_last_words():
    with pytest.raises(OctomedError, match="failed: ValueError: no such thing"):
        timed([sys.executable, "-c", "raise ValueError('no such thing')"])


def test_a_peer_that_cannot_be_made_is_a_row_with_a_reason(places, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    with pytest.raises(OctomedError, match="uv is not there"):
        peer("datatrove", "datatrove==0.10.1")

    def absent(folder):
        return peer("datatrove", "datatrove==0.10.1")

    rows = compared({"datatrove": absent}, "10 of them", 1)
    assert rows == [
        row(
            "decontaminate",
            "datatrove",
            "10 of them: not measured, uv is not there: install it with `pip install uv`",
            None,
            "s",
        )
    ]


def test_a_peer_is_made_once_and_again_after_a_failure(places, monkeypatch):
    calls, code = [], 1

    class Done:
        stderr = "error: no route to the index"

        @property
        def returncode(self):
            return code

    monkeypatch.setattr(shutil, "which", lambda *a, **k: "uv")
    monkeypatch.setattr(
        benchmarks.subprocess, "run", lambda args, **k: (calls.append(args), Done())[1]
    )
    with pytest.raises(OctomedError, match="no route to the index"):
        peer("thing", "thing==1")
    code = 0
    folder = benchmarks.store_dir() / "peers" / f"thing-{benchmarks.digest(('thing==1',))}"
    folder.mkdir(parents=True)
    assert peer("thing", "thing==1") == folder / "bin" / "python" and len(calls) == 3
    peer("thing", "thing==1")
    assert len(calls) == 3


@pytest.mark.parametrize("files", [1, 2])
def test_decontamination_agrees_with_plain_python_on_its_own_corpus(places, files):
    rows = bench_decontaminate(questions=20_000, a_file=20_000 // files, peer_files=files)
    found = {r["who"]: r["value"] for r in rows if r["what"].endswith("flagged")}
    assert found["octomed"] == found["plain Python"] > 0
    assert len(list(places.glob("store/stages/corpus-*/part-*.jsonl"))) == files
    assert all(
        set(r) == {"bench", "who", "what", "value", "unit", "interval"} and r["value"] > 0
        for r in rows
    )
    assert [r["unit"] for r in rows if "peak memory" in r["what"]] == ["GB"] and {
        r["what"] for r in rows if r["unit"] == "×"
    } == {"20,000 of them: time over octomed's", "20,000 of them: processor time over octomed's"}


@functools.cache
def small_rows(name):
    return measured([name], small=True)[0]["rows"]  # once for all tests


def well_formed(r):
    "A row with a number inside its interval, or with the reason why there is none."
    assert list(r) == ["bench", "who", "what", "value", "unit", "interval"] and all(
        isinstance(r[k], str) and r[k] for k in ("bench", "who", "what", "unit")
    ), r
    if r["value"] is None:
        assert "not measured, " in r["what"] and r["interval"] is None, r
    else:
        assert math.isfinite(r["value"]) and (
            r["interval"] is None or r["interval"][0] <= r["value"] <= r["interval"][1]
        ), r


@pytest.mark.parametrize("name", list(BENCHES))
def test_every_benchmark_runs_small_and_its_rows_are_well_formed(name):
    rows = small_rows(name)
    for r in rows:
        well_formed(r)
    assert (
        rows
        and {r["bench"] for r in rows} == {name}
        and len({(r["who"], r["what"], r["unit"]) for r in rows}) == len(rows)
    )
    assert json.loads(json.dumps(rows)) == rows
    if all(r["value"] is None for r in rows):
        pytest.skip(rows[0]["what"])
    assert all(r["value"] > 0 for r in rows if r["value"] is not None and "memory" not in r["what"])


@pytest.mark.parametrize("name", list(BENCHES))
def test_the_full_size_names_arguments_and_is_larger(name):
    f, full = BENCHES[name]
    small = dict(zip(f.__code__.co_varnames, f.__defaults__, strict=False))
    assert full and set(full) <= set(small) and all(full[k] > small[k] for k in full)


def test_vllm_is_measured_in_its_own_environment_or_a_row_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_VLLM", str(tmp_path))
    (absent,) = bench_engines(vllm=True)
    well_formed(absent)
    assert absent["value"] is None and "make it with `python tests/vllm_env.py`" in absent["what"]
    rows = [row("engines, an image", "VLLMEngine", "16 tokens", 3.0, "µs a sample", [2.0, 4.0])]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        f"#!/bin/sh\necho starting; echo 'ROWS {json.dumps(rows)}'\n"
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    assert bench_engines(vllm=True) == [
        row("engines", "VLLMEngine", "an image: 16 tokens", 3.0, "µs a sample", [2.0, 4.0])
    ]
    (tmp_path / "bin" / "python").write_text(
        "#!/bin/sh\necho 'no kernel for this processor' >&2; exit 1\n"
    )
    (failed,) = bench_engines(vllm=True)
    assert (
        failed["value"] is None
        and "not measured, python failed: no kernel for this processor" in failed["what"]
    )


def test_expressions_that_read_wrongly_say_so_and_the_parser_reads_every_form():
    what = {
        (r["who"], r["what"].split(",")[1].split(" (")[0]): r["what"]
        for r in bench_answers(n=1, rounds=1)
    }
    assert "reads" in what["MMLU-Pro's expressions", " no answer"]
    assert not any("reads" in w for (who, _), w in what.items() if who == "octomed")
    assert {len(text) for text, _ in traces(2000).values()} == {2000}


def test_a_reader_that_loses_rows_is_no_result(monkeypatch):
    monkeypatch.setitem(READERS, ("array.json", "json.load"), "def read(p): return [1, 2]")
    with pytest.raises(OctomedError, match="json.load counts 2 of 5 rows in array.json"):
        bench_formats(rows=5)


def test_a_ledger_that_finds_wrong_keys_is_no_result(monkeypatch):
    monkeypatch.setattr(
        benchmarks, "LOOK_UP", LOOK_UP.replace("(ledger.has, absent)", "(ledger.has, there)")
    )
    with pytest.raises(OctomedError, match="look at Ledger.has"):
        bench_ledger_index(n=20, rows=10)


def test_the_lengths_that_are_packed():
    n = recipe_lengths(50_000)
    assert len(n) == 50_000 and n.min() >= 1 and n.max() <= 8192 and 800 < n.mean() < 900
    assert first_fit([6, 5, 3, 2], 8) == [8, 8] and first_fit([8, 8], 8) == [8, 8]


def test_targets_hold_for_lines_of_the_full_size_only():
    def packed(n, value, unit):
        return judged(
            row("packing", "octomed", f"{n:,} lengths, mean 840, bins of 8,192", value, unit)
        )["met"]

    assert [
        packed(8_000_000, 60.0, "s"),
        packed(8_000_000, 61.0, "s"),
        packed(8_000_000, 0.994, "useful share"),
        packed(20_000, 61.0, "s"),
    ] == [True, False, False, None]
    slow = judged(
        row(
            "answers", "octomed", "thinking never ended, 4096 characters", 50_000.0, "traces/s/core"
        )
    )
    first = judged(
        row("answers", "octomed", "think first, boxed, 4096 characters", 50_000.0, "traces/s/core")
    )
    assert (slow["met"], first["met"], first["target"]) == (True, False, "≥ 100,000 traces/s")
    assert (
        judged(
            row("ledger", "octomed", "appends, not measured, the disk is full", None, "samples/s")
        )["met"]
        is False
    )


@pytest.mark.parametrize("name", sorted({t[0] for t in TARGETS}))
def test_every_target_is_a_line_that_its_benchmark_gives(name):
    rows, full = (
        small_rows(name),
        {
            "5,000 questions": "8,000,000 questions",
            "2,000 samples": "10,000,000 samples",
            "20,000 lengths": "8,000,000 lengths",
        },
    )
    for small, large in full.items():
        rows = [{**r, "what": r["what"].replace(small, large)} for r in rows]
    for bench, who, what, unit, *_ in TARGETS:
        if bench == name:
            assert [
                r
                for r in rows
                if (r["who"], r["unit"]) == (who, unit) and re.fullmatch(what, r["what"])
            ], what


def test_the_table_of_everything_measured(tmp_path, places):
    assert table_of(tmp_path / "nowhere") == []
    (places / "bench").mkdir()
    lines = {
        "packing": row(
            "packing",
            "octomed",
            "8,000,000 lengths, mean 840, bins of 8,192",
            21.0,
            "s",
            [20.0, 22.0],
        ),
        "images": row("images", "octomed", "counting, processes", 1.9, "× with 2 workers"),
        "another": row("another", "somebody", "something", 1.0, "s"),
    }
    for name, r in lines.items():
        (places / "bench" / f"{name}.json").write_text(
            json.dumps({"bench": name, "rows": [r], "card": {}})
        )
    assert (
        table_of()
        == table_of(places / "bench")
        == [
            {**lines["images"], "target": None, "met": None},
            {**lines["packing"], "target": "8 million lengths ≤ 60 s, ≥ 99.5 %", "met": True},
            {**lines["another"], "target": None, "met": None},
        ]
    )


@pytest.mark.parametrize("room", sorted(p.name for p in (root() / "octomed").glob("*.py")))
def test_no_library_room_imports_a_section_or_the_clinic(room):
    found = [
        f"{'.' * n.level}{n.module or ''}.{a.name}" if isinstance(n, ast.ImportFrom) else a.name
        for n in ast.walk(ast.parse((root() / "octomed" / room).read_text()))
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    ]
    assert not [name for name in found if {"clinic", "paper"} & set(name.split("."))]


@pytest.fixture(scope="module")
def uneven(student, picture):
    "A student, its processor, and three rows of which one has an image and another is short."
    model, processor = student

    def ask(text, *images):
        return [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": i} for i in images),
                    {"type": "text", "text": text},
                ],
            }
        ]

    return (
        model,
        processor,
        [
            row_of(processor, ask("which is it ?", *images), said, 12_544)
            for images, said in (
                ((), "one two three fever"),
                ((picture,), "rash"),
                ((), "two three one two three one two"),
            )
        ],
    )


def test_fault_27_the_gradient_by_definition_and_the_mean_of_means(uneven):
    model, processor, rows = uneven
    pixels, each = Pixels(processor, 12_544), [[r] for r in rows]
    right, means = (
        defined_gradient(model, processor, [rows], pixels),
        defined_gradient(model, processor, each, pixels, means=True),
    )
    assert (
        beside(defined_gradient(model, processor, each, pixels), right)[0] < 1e-5
        and beside(defined_gradient(model, processor, [rows], pixels, means=True), right)[0] < 1e-5
    )
    far, size = beside(means, right)
    assert far > 0.05 and size != 1
    alone = [defined_gradient(model, processor, [g], pixels) for g in each]
    assert (
        beside(
            {k: sum(g[k] if k in g else 0 * v for g in alone) / 3 for k, v in right.items()}, means
        )[0]
        < 1e-5
    )
    with pytest.raises(OctomedError, match="look at what is frozen"):
        beside(alone[0], right)  # a row without an image trains no vision tower


def test_fault_27_our_loop_hands_the_defined_gradient_to_the_optimiser(uneven):
    model, processor, rows = uneven
    right = defined_gradient(model, processor, [rows], Pixels(processor, 12_544))
    before = [p.detach().clone() for p in model.parameters()]
    for budget in (10_000, max(len(r.input_ids) for r in rows)):
        assert beside(fitted_gradient(model, processor, rows, budget, 12_544), right)[0] < 1e-4
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=False))


def test_a_trainer_runs_lap_by_lap_and_its_last_words_are_heard(tmp_path):
    (tmp_path / "file").write_text("2")
    laps = "import sys\nfor n in range(1, 4):\n    print('noise'); print('LAP', 100*n, open('file').read(), flush=True)\n    if not sys.stdin.readline(): break\nprint('out of rows', file=sys.stderr)"
    with in_laps([sys.executable, "-c", laps], tmp_path) as lap:
        assert [lap(), lap()] == [100, 150]
        with pytest.raises(OctomedError, match="a trainer ended: out of rows"):
            lap()
    with (
        pytest.raises(OctomedError, match="a trainer ended: it said nothing"),
        in_laps([sys.executable, "-c", ""], tmp_path),
    ):
        pass


def test_trainers_that_cannot_be_made_are_rows_with_a_reason(places, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    for name in ("exported", "gradients", "speeds"):
        monkeypatch.setattr(benchmarks, name, lambda *a: [])
    rows = benchmarks.bench_trainers(peers=True)
    for r in rows:
        well_formed(r)
    assert [r["who"] for r in rows] == [
        "TRL",
        "octomed / TRL",
        "LLaMA-Factory",
        "octomed / LLaMA-Factory",
    ] and all("not measured, uv is not there" in r["what"] for r in rows)


@pytest.mark.parametrize("t", TRAINERS, ids=lambda t: t.name)
def test_fault_27_a_peer_in_one_micro_batch_agrees_with_the_definition(t, tmp_path):
    made = (
        root()
        / "outputs"
        / "store"
        / "peers"
        / f"{t.name.lower()}-{benchmarks.digest(t.requirements)}"
    )
    if not (made / "ready").exists():
        pytest.skip(f"the environment of {t.name} is not there: `octomed bench trainers` makes it")
    rows = exported(tmp_path / "few", 1)
    got, groups = peer_gradient(made / "bin" / "python", t, tmp_path / "few", rows, len(rows))
    model, processor = load_student(tmp_path / "few" / "student")
    assert (
        len(groups) == 1
        and beside(got, defined_gradient(model, processor, groups, Pixels(processor, 12_544)))[0]
        < 1e-4
    )
