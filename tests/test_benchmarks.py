"What is measured beside peers: rows, intervals, commands, targets, and every small measurement."

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

from octomed.bench import ledger as bench_ledger_module
from octomed.bench import timing as bench_timing
from octomed.bench import trainers as bench_trainers_module
from octomed.bench.answers import bench_answers, write_traces
from octomed.bench.decontaminate import (
    bench_decontaminate,
    compare_contestants,
    draw_lengths,
    make_up_questions,
)
from octomed.bench.engines import bench_engines
from octomed.bench.formats import READERS, bench_formats
from octomed.bench.ledger import LOOK_UP, bench_ledger_index
from octomed.bench.packing import draw_recipe_lengths, pack_first_fit
from octomed.bench.targets import TARGETS, check_target, tabulate_rows
from octomed.bench.timing import (
    TIMINGS,
    compute_ratio,
    divide_turns,
    install_peer,
    make_repeated_row,
    make_timing_row,
    run_in_turns,
    run_timings,
    time_call,
    time_command,
    timing,
)
from octomed.bench.trainers import (
    TRAINERS,
    compare_gradients,
    compute_defined_gradient,
    compute_fitted_gradient,
    compute_peer_gradient,
    export_arm,
    run_in_laps,
)
from octomed.core.paths import OctomedError, UsageError, root
from octomed.data.decontaminate import decontaminate
from octomed.generate.render import PixelCache
from octomed.generate.render import render_row as row_of
from octomed.run.cli import main
from octomed.train.students import load_student

STEMS = [" ".join(f"w{i}_{k}" for k in range(60)) for i in range(40)]
KEYS = [
    "bench",
    "who",
    "what",
    "value",
    "unit",
    "interval",
]
LIBRARY = (
    "core",
    "data",
    "generate",
    "distill",
    "train",
    "evaluate",
    "run",
    "bench",
)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    return tmp_path


@pytest.fixture
def toy():
    @timing(size=1000)
    def bench_toy(size=3):
        return [make_timing_row("toy", "octomed", "steps", value=float(size), unit="s")]

    yield
    del TIMINGS["toy"]


@pytest.fixture
def no_uv(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)


def test_the_ratio_and_its_interval():
    r = compute_ratio([10.0, 20.0], [5.0, 5.0])
    assert (r.estimate, r.low, r.high) == (3, 2, 4)
    assert compute_ratio([1.0], [2.0]).interval == (0.5, 0.5)


def test_a_repeated_measure_is_its_median_from_the_least_to_the_most():
    measure = make_repeated_row("toy", "octomed", "steps", values=[5.0, 1.0, 3.0], unit="s")
    assert measure == make_timing_row(
        "toy", "octomed", "steps", value=3.0, unit="s", interval=[1.0, 5.0]
    )


def test_turns_alternate_and_a_call_is_timed_by_the_clock_given():
    order = []

    def count(who):
        order.append(who)
        return len(order)

    numbers = run_in_turns({who: functools.partial(count, who) for who in "abc"}, 3)
    assert "".join(order) == "cbaabccba"
    assert numbers == {"a": [3, 4, 9], "b": [2, 5, 8], "c": [1, 6, 7]}
    assert divide_turns([6, 1], [3, 2]) == [2, 0.5]
    assert (
        time_call(time.sleep, 0.05) >= 0.05 > time_call(time.sleep, 0.05, clock=time.process_time)
    )


def test_full_size_is_kept_with_a_card_and_small_size_is_not(places, toy):
    assert run_timings(["toy"], small=True)[0]["rows"][0]["value"] == 3
    assert not (places / "bench").exists()
    (result,) = run_timings(["toy"])
    kept = json.loads((places / "bench" / "toy.json").read_text())
    assert kept == json.loads(json.dumps(result))
    assert kept["rows"] == [make_timing_row("toy", "octomed", "steps", value=1000.0, unit="s")]
    assert kept["card"]["sizes"] == {"size": 1000}
    assert {"versions", "hardware", "commit", "minutes"} <= set(kept["card"])


def test_the_command(places, toy, capsys):
    assert main(["bench", "toy", "--small", "--json"]) == 0
    steps = make_timing_row("toy", "octomed", "steps", value=3.0, unit="s")
    assert json.loads(capsys.readouterr().out) == [steps]
    assert main(["bench", "toy", "nonsense"]) == 2
    assert "there is no measurement nonsense: choose from" in capsys.readouterr().err
    with pytest.raises(UsageError):
        run_timings(["nonsense"])


def test_made_up_questions_are_seeded_and_as_long_as_real_ones():
    questions = list(make_up_questions(3000, STEMS, 1))
    assert questions == list(make_up_questions(3000, STEMS, 1))
    assert questions != list(make_up_questions(3000, STEMS, 2))
    assert list(questions[0]) == ["question", "options", "answer"]
    n = draw_lengths(200_000, np.random.default_rng(0))
    assert 8 <= np.median(n) <= 10
    assert 17 < n.mean() < 21
    assert n.max() > 200
    assert n.min() >= 2
    report = decontaminate(questions, [{"question": stem} for stem in STEMS])
    assert 2 <= len(report.exact) <= 9
    assert 5 < len(report.flagged) < 30


CHILD = "x = bytearray(60_000_000); y = sum(range(5_000_000)); import time; time.sleep(.5)"
PARENT = f"""
import subprocess
import sys

command = [sys.executable, "-c", {CHILD!r}]
children = [subprocess.Popen(command) for _ in range(2)]
for child in children:
    child.wait()
print(7)
"""


def test_memory_and_processor_time_of_children_are_counted():
    result = time_command([sys.executable, "-c", PARENT])
    assert result.out == "7\n"
    assert result.cpu > 0.1
    assert result.seconds > 0.5
    assert result.peak > 120e6


def test_a_failed_command_says_its_last_words():
    with pytest.raises(OctomedError, match="failed: ValueError: no such thing"):
        time_command([sys.executable, "-c", "raise ValueError('no such thing')"])


def test_a_peer_that_cannot_be_made_is_a_row_with_a_reason(places, no_uv):
    with pytest.raises(OctomedError, match="uv is not there"):
        install_peer("datatrove", "datatrove==0.10.1")

    def absent(folder):
        return install_peer("datatrove", "datatrove==0.10.1")

    what = "10 of them: not measured, uv is not there: install it with `pip install uv`"
    rows = compare_contestants({"datatrove": absent}, "10 of them", 1)
    assert rows == [make_timing_row("decontaminate", "datatrove", what, value=None, unit="s")]


def test_a_peer_is_made_once_and_again_after_a_failure(places, monkeypatch):
    calls, code = [], 1

    class Done:
        stderr = "error: no route to the index"

        @property
        def returncode(self):
            return code

    def run(arguments, **kw):
        calls.append(arguments)
        return Done()

    monkeypatch.setattr(shutil, "which", lambda *a, **k: "uv")
    monkeypatch.setattr(bench_timing.subprocess, "run", run)
    with pytest.raises(OctomedError, match="no route to the index"):
        install_peer("thing", "thing==1")
    code = 0
    folder = bench_timing.store_dir() / "peers" / f"thing-{bench_timing.digest(('thing==1',))}"
    folder.mkdir(parents=True)
    assert install_peer("thing", "thing==1") == folder / "bin" / "python"
    assert len(calls) == 3
    install_peer("thing", "thing==1")
    assert len(calls) == 3


@pytest.mark.parametrize("files", [1, 2])
def test_decontamination_agrees_with_plain_python_on_its_own_corpus(places, files):
    rows = bench_decontaminate(questions=20_000, a_file=20_000 // files, peer_files=files)
    flagged = {r["who"]: r["value"] for r in rows if r["what"].endswith("flagged")}
    assert flagged["octomed"] == flagged["plain Python"] > 0
    assert len(list(places.glob("store/stages/corpus-*/part-*.jsonl"))) == files
    assert all(set(r) == set(KEYS) and r["value"] > 0 for r in rows)
    assert [r["unit"] for r in rows if "peak memory" in r["what"]] == ["GB"]
    assert {r["what"] for r in rows if r["unit"] == "×"} == {
        "20,000 of them: time over octomed's",
        "20,000 of them: processor time over octomed's",
    }


@functools.cache
def measured_rows(name):
    "The rows of a measurement at its small size, taken once for all tests."
    return run_timings([name], small=True)[0]["rows"]


def check_form(r):
    "A row has a number inside its interval, or the reason why there is none."
    assert list(r) == KEYS, r
    assert all(isinstance(r[k], str) and r[k] for k in ("bench", "who", "what", "unit")), r
    if r["value"] is None:
        assert "not measured, " in r["what"], r
        assert r["interval"] is None, r
        return
    assert math.isfinite(r["value"]), r
    if r["interval"] is not None:
        assert r["interval"][0] <= r["value"] <= r["interval"][1], r


@pytest.mark.parametrize("name", list(TIMINGS))
def test_every_measurement_runs_small_and_its_rows_are_well_formed(name):
    rows = measured_rows(name)
    for r in rows:
        check_form(r)
    assert rows
    assert {r["bench"] for r in rows} == {name}
    assert len({(r["who"], r["what"], r["unit"]) for r in rows}) == len(rows)
    assert json.loads(json.dumps(rows)) == rows
    if all(r["value"] is None for r in rows):
        pytest.skip(rows[0]["what"])
    assert all(r["value"] > 0 for r in rows if r["value"] is not None and "memory" not in r["what"])


@pytest.mark.parametrize("name", list(TIMINGS))
def test_the_full_size_names_arguments_and_is_larger(name):
    f, full = TIMINGS[name]
    small = dict(zip(f.__code__.co_varnames, f.__defaults__, strict=False))
    assert full
    assert set(full) <= set(small)
    assert all(full[k] > small[k] for k in full)


def write_python(folder, script):
    "A command that replaces the Python of an environment."
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)


def engine_row(bench, what):
    return make_timing_row(
        bench, "VLLMEngine", what, value=3.0, unit="µs a sample", interval=[2.0, 4.0]
    )


def test_vllm_is_measured_in_its_own_environment_or_a_row_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_VLLM", str(tmp_path))
    (absent,) = bench_engines(vllm=True)
    check_form(absent)
    assert absent["value"] is None
    assert "make it with `python tests/vllm_env.py`" in absent["what"]
    rows = [engine_row("engines, an image", "16 tokens")]
    write_python(tmp_path, f"echo starting; echo 'ROWS {json.dumps(rows)}'")
    assert bench_engines(vllm=True) == [engine_row("engines", "an image: 16 tokens")]
    write_python(tmp_path, "echo 'no kernel for this processor' >&2; exit 1")
    (failed,) = bench_engines(vllm=True)
    assert failed["value"] is None
    assert "not measured, python failed: no kernel for this processor" in failed["what"]


def test_expressions_that_read_wrongly_say_so_and_the_parser_reads_every_form():
    what = {}
    for r in bench_answers(n=1, rounds=1):
        form = r["what"].split(",")[1].split(" (")[0]
        what[r["who"], form] = r["what"]
    assert "reads" in what["MMLU-Pro's expressions", " no answer"]
    assert not any("reads" in text for (who, _), text in what.items() if who == "octomed")
    assert {len(text) for text, _ in write_traces(2000).values()} == {2000}


def test_a_reader_that_loses_rows_is_no_result(monkeypatch):
    monkeypatch.setitem(READERS, ("array.json", "json.load"), "def read(p): return [1, 2]")
    with pytest.raises(OctomedError, match=r"json.load counts 2 of 5 rows in array.json"):
        bench_formats(rows=5)


def test_a_ledger_that_finds_wrong_keys_is_no_result(monkeypatch):
    wrong = LOOK_UP.replace("(ledger.has, absent)", "(ledger.has, present)")
    assert wrong != LOOK_UP
    monkeypatch.setattr(bench_ledger_module, "LOOK_UP", wrong)
    with pytest.raises(OctomedError, match=r"look at Ledger.has"):
        bench_ledger_index(n=20, rows=10)


def test_the_lengths_that_are_packed():
    n = draw_recipe_lengths(50_000)
    assert len(n) == 50_000
    assert n.min() >= 1
    assert n.max() <= 8192
    assert 800 < n.mean() < 900
    assert pack_first_fit([6, 5, 3, 2], 8) == [8, 8]
    assert pack_first_fit([8, 8], 8) == [8, 8]


def octomed_row(bench, what, value, unit):
    return make_timing_row(bench, "octomed", what, value=value, unit=unit)


def test_targets_hold_for_lines_of_the_full_size_only():
    def packed(n, value, unit):
        what = f"{n:,} lengths, mean 840, bins of 8,192"
        return check_target(octomed_row("packing", what, value=value, unit=unit))["met"]

    def read(form):
        what = f"{form}, 4096 characters"
        return check_target(octomed_row("answers", what, value=50_000.0, unit="traces/s/core"))

    assert packed(8_000_000, 60.0, "s") is True
    assert packed(8_000_000, 61.0, "s") is False
    assert packed(8_000_000, 0.994, "useful share") is False
    assert packed(20_000, 61.0, "s") is None
    slow, first = read("thinking never ended"), read("think first, boxed")
    assert slow["met"] is True
    assert first["met"] is False
    assert first["target"] == "≥ 100,000 traces/s"
    full = "appends, not measured, the disk is full"
    assert check_target(octomed_row("ledger", full, value=None, unit="samples/s"))["met"] is False


FULL_SIZE = {
    "5,000 questions": "8,000,000 questions",
    "2,000 samples": "10,000,000 samples",
    "20,000 lengths": "8,000,000 lengths",
}


@pytest.mark.parametrize("name", sorted({target.bench for target in TARGETS}))
def test_every_target_is_a_line_that_its_measurement_gives(name):
    rows = measured_rows(name)
    for small, large in FULL_SIZE.items():
        rows = [{**r, "what": r["what"].replace(small, large)} for r in rows]
    for target in TARGETS:
        if target.bench == name:
            same = [r for r in rows if (r["who"], r["unit"]) == (target.who, target.unit)]
            assert [r for r in same if re.fullmatch(target.what, r["what"])], target.what


def test_the_table_of_everything_measured(tmp_path, places):
    assert tabulate_rows(tmp_path / "nowhere") == []
    (places / "bench").mkdir()
    lengths = "8,000,000 lengths, mean 840, bins of 8,192"
    lines = {
        "packing": make_timing_row(
            "packing", "octomed", lengths, value=21.0, unit="s", interval=[20.0, 22.0]
        ),
        "images": octomed_row("images", "counting, processes", value=1.9, unit="× with 2 workers"),
        "another": make_timing_row("another", "somebody", "something", value=1.0, unit="s"),
    }
    for name, r in lines.items():
        text = json.dumps({"bench": name, "rows": [r], "card": {}})
        (places / "bench" / f"{name}.json").write_text(text)
    expected = [
        {**lines["images"], "target": None, "met": None},
        {**lines["packing"], "target": "8 million lengths ≤ 60 s, ≥ 99.5 %", "met": True},
        {**lines["another"], "target": None, "met": None},
    ]
    assert tabulate_rows() == expected
    assert tabulate_rows(places / "bench") == expected


def imported_names(path):
    "What a file imports, as dotted names."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


@pytest.mark.parametrize("folder", LIBRARY)
def test_no_library_module_imports_a_section_or_the_clinic(folder):
    files = sorted((root() / "octomed" / folder).glob("*.py"))
    assert files
    for path in files:
        names = list(imported_names(path))
        assert not [n for n in names if {"clinic", "paper"} & set(n.split("."))], path.name


def chat_of(text, *images):
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def uneven(student, picture):
    "A student, its processor, and three rows of which one has an image and another is short."
    model, processor = student
    responses = {
        (): "one two three fever",
        (picture,): "rash",
    }
    rows = [
        row_of(processor, chat_of("which is it ?", *images), response, max_pixels=12_544)
        for images, response in responses.items()
    ]
    long = "two three one two three one two"
    rows.append(row_of(processor, chat_of("which is it ?"), long, max_pixels=12_544))
    return model, processor, rows


def test_fault_27_the_gradient_by_definition_and_the_mean_of_means(uneven):
    model, processor, rows = uneven
    pixels, each = PixelCache(processor, 12_544), [[r] for r in rows]

    def gradient(groups, means=False):
        return compute_defined_gradient(model, processor, groups, pixels=pixels, means=means)

    right, of_means = gradient([rows]), gradient(each, means=True)
    assert compare_gradients(gradient(each), right)[0] < 1e-5
    assert compare_gradients(gradient([rows], means=True), right)[0] < 1e-5
    far, size = compare_gradients(of_means, right)
    assert far > 0.05
    assert size != 1
    alone = [gradient([group]) for group in each]
    mean = {}
    for name, value in right.items():
        mean[name] = sum(g[name] if name in g else 0 * value for g in alone) / 3
    assert compare_gradients(mean, of_means)[0] < 1e-5
    with pytest.raises(OctomedError, match="look at what is frozen"):
        compare_gradients(alone[0], right)  # a row without an image trains no vision tower


def test_fault_27_our_loop_hands_the_defined_gradient_to_the_optimiser(uneven):
    model, processor, rows = uneven
    right = compute_defined_gradient(model, processor, [rows], pixels=PixelCache(processor, 12_544))
    before = [p.detach().clone() for p in model.parameters()]
    for budget in (10_000, max(len(r.input_ids) for r in rows)):
        fitted = compute_fitted_gradient(model, processor, rows, budget=budget, max_pixels=12_544)
        assert compare_gradients(fitted, right)[0] < 1e-4
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))


LAPS = """
import sys

for n in range(1, 4):
    print("noise")
    print("LAP", 100 * n, open("file").read(), flush=True)
    if not sys.stdin.readline():
        break
print("out of rows", file=sys.stderr)
"""


def test_a_trainer_runs_lap_by_lap_and_its_last_words_are_heard(tmp_path):
    (tmp_path / "file").write_text("2")
    with run_in_laps([sys.executable, "-c", LAPS], tmp_path) as lap:
        assert [lap(), lap()] == [100, 150]
        with pytest.raises(OctomedError, match="a trainer ended: out of rows"):
            lap()
    with (
        pytest.raises(OctomedError, match="a trainer ended: it said nothing"),
        run_in_laps([sys.executable, "-c", ""], tmp_path),
    ):
        pass


def test_trainers_that_cannot_be_made_are_rows_with_a_reason(places, no_uv, monkeypatch):
    for name in ("export_arm", "measure_gradients", "measure_speeds"):
        monkeypatch.setattr(bench_trainers_module, name, lambda *a, **k: [])
    rows = bench_trainers_module.bench_trainers(peers=True)
    for r in rows:
        check_form(r)
    assert [r["who"] for r in rows] == [
        "TRL",
        "octomed / TRL",
        "LLaMA-Factory",
        "octomed / LLaMA-Factory",
    ]
    assert all("not measured, uv is not there" in r["what"] for r in rows)


@pytest.mark.parametrize("t", TRAINERS, ids=lambda t: t.name)
def test_fault_27_a_peer_in_one_micro_batch_agrees_with_the_definition(t, tmp_path):
    environment = f"{t.name.lower()}-{bench_timing.digest(t.requirements)}"
    folder = root() / "outputs" / "store" / "peers" / environment
    if not (folder / "ready").exists():
        pytest.skip(f"the environment of {t.name} is not there: `octomed bench trainers` makes it")
    few = tmp_path / "few"
    rows = export_arm(few, 1)
    python = folder / "bin" / "python"
    gradient, groups = compute_peer_gradient(python, t, few, rows=rows, micro=len(rows))
    model, processor = load_student(few / "student")
    right = compute_defined_gradient(model, processor, groups, pixels=PixelCache(processor, 12_544))
    assert len(groups) == 1
    assert compare_gradients(gradient, right)[0] < 1e-4
