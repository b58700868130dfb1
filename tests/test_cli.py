"The command line: exit codes, sentences, JSON shapes, and what a failed command leaves behind."

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toys import ToyEngine, write_notebook, write_results

import octomed
from octomed.core.paths import OctomedError, UsageError, root
from octomed.core.recipe import CATEGORIES, load_recipe
from octomed.core.workers import count_workers
from octomed.run import cli, environment, judge_file, report, terminal
from octomed.run.cli import main


@pytest.fixture(autouse=True)
def places(own_places, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    (tmp_path / "nbs").mkdir()


def call(capsys, *argv):
    "(exit code, stdout, stderr) of a command."
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def jsonl(path, *rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


COMMANDS = [
    "check",
    "plan",
    "run",
    "status",
    "report",
    "claim",
    "sources",
    "decontaminate",
    "judge",
    "traces",
    "distill",
    "train",
    "evaluate",
    "export",
    "bench",
    "completion",
]
ROW = {"id": "q1", "text": "so the answer is \\boxed{b}", "options": {"A": "yes", "B": "no"}}


# What is imported, and when.


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    f = jsonl(tmp_path / "r.jsonl", ROW)
    code = f"""
import sys
from octomed.run.cli import main
try: main(["--help"])
except SystemExit as e: assert e.code == 0
assert main(["judge", {str(f)!r}]) == 0
names = {{"torch", "transformers", "papermill", "pandas", "matplotlib", "datasets"}}
heavy = names & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and f"octomed {command}" in out and "Example:" in out
    assert max(map(len, out.splitlines())) <= 80


# Wrong usage is 2, with one sentence.


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["run"],
        ["judge", "a", "--n", "3"],
        ["decontaminate", "a"],
        ["decontaminate", "a", "--against", "b", "--n", "0"],
    ],
)
def test_wrong_arguments(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert code == 2 and not out and ("see `octomed" in err or "Usage: octomed" in err)


@pytest.mark.parametrize(
    "command", ["run", "plan", "status", "report", "distill --recipe", "train --recipe"]
)
def test_unknown_recipe(capsys, tmp_path, command):
    code, _out, err = call(capsys, *command.split(), "corse")
    assert (
        code == 2
        and err.startswith("octomed: there is no recipe corse: choose from ")
        and err.count("\n") == 1
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: [", "is not YAML"),
        ("comon: {}", "unknown key comon"),
        ("common: {lr: fast}", "lr must be a number above 0"),
        ("common: {batch: 1.5}", "batch must be a whole number"),
        ("sections: {42_formating: {}}", "42_formating, which has no notebook"),
        ("common: {speed: 3}", "unknown key speed"),
        ("[1, 2]", "is no recipe"),
        ("sections: [42_formatting]", "is no recipe"),
        ("sections: {42_formatting: 3}", "is no recipe"),
        ("common: {train: medqa}", "train must be a list"),
        ("common: {lr: 5e-5}", "runs no section"),
    ],
)
def test_malformed_recipe(capsys, tmp_path, text, sentence):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    code, _out, err = call(capsys, "run", tmp_path / "r.yaml")
    assert code == 2 and sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_unknown_section(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("sections: {}", encoding="utf-8")
    code, _, err = call(capsys, "run", tmp_path / "r.yaml", "--only", "42_formatting")
    assert code == 2 and "recipe r has no section 42_formatting" in err
    for command in ("run", "plan"):
        code, _, err = call(capsys, command, "smoke", "--only", ",")
        assert code == 2 and "--only , names no section" in err


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("run smoke --minutes 1 --rehearse", "--minutes is for sections that run on this machine"),
        ("run smoke --cluster x.yaml", "add --on slurm"),
        ("report smoke --html --json", "choose one"),
        ("report smoke --html --all", "the page always shows everything"),
        ("report smoke --html --only 42_formatting", "the page always shows everything"),
        ("export hub clinic_ward:train --out there --form hybrid", 'Invalid value "hybrid"'),
        ("export samples clinic_ward:train --out there --format csv", 'Invalid value "csv"'),
        ("export preferences clinic_ward:train --out there --pairs -1", "--pairs"),
        ("export lm-eval --recipe RECIPE --out there", "names no benchmark"),
        ("evaluate clinic/tiny --recipe RECIPE", "names no benchmark"),
        (
            "evaluate clinic/tiny clinic_ward:test --voted clinic_boards:test",
            "--voted names clinic_boards:test, which is not asked",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(capsys, tmp_path, monkeypatch, line, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "common: {plugins: [octomed.clinic.questions, octomed.clinic.students]}", encoding="utf-8"
    )
    code, _, err = call(capsys, *line.replace("RECIPE", "r.yaml").split())
    assert (
        code == 2
        and sentence in err
        and "Traceback" not in err
        and not (tmp_path / "there").exists()
        and not (tmp_path / "store" / "stages").exists()
    )


def test_data_folder_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("OCTOMED_DATA", "/no/such/folder")
    code, _, err = call(capsys, "sources")
    assert (
        code == 1
        and "OCTOMED_DATA names /no/such/folder, which is no folder: correct it or unset it" in err
    )


def test_store_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "file" / "store"))
    monkeypatch.setattr(environment, "list_checks", lambda: {"store": environment.check_store})
    code, out, _ = call(capsys, "check")
    assert (
        code == 1
        and out.startswith("[FAIL] store: cannot be written")
        and "point OCTOMED_STORE at a folder of your own" in out
    )


def test_check_tells_every_part(capsys, monkeypatch):
    def broken():
        raise ValueError("two\nlines")

    checks = {
        "python": environment.check_python,
        "nbdev": lambda: environment.check_version("nbdev"),
        "kernel": environment.check_kernel,
        "broken": broken,
    }
    monkeypatch.setattr(environment, "list_checks", lambda: checks)
    code, out, _ = call(capsys, "check")
    assert (
        code == 1
        and [line.split(":")[0] for line in out.splitlines()]
        == ["[OK]   python", "[OK]   nbdev", "[OK]   kernel", "[FAIL] broken"]
        and "lines" not in out
    )


# judge


def test_judge_rows_and_counts(capsys, tmp_path):
    f = jsonl(
        tmp_path / "r.jsonl",
        {**ROW, "answer": "B"},
        "",
        {**ROW, "id": 2},
        {**ROW, "id": "q3", "text": "I do not know"},
    )
    for flags in ([], ["--json"]):
        code, out, _ = call(capsys, "judge", f, *flags)
        assert code == 0 and [json.loads(line) for line in out.splitlines()] == [
            {"id": "q1", "letter": "B", "status": "correct"},
            {"id": 2, "letter": "B", "status": "parsed"},
            {"id": "q3", "letter": None, "status": "unparsed"},
            {"counts": {"correct": 1, "wrong": 0, "parsed": 1, "unparsed": 1, "truncated": 0}},
        ]
    code, out, _ = call(capsys, "judge", f, "--think-first")
    assert json.loads(out.splitlines()[-1])["counts"]["truncated"] == 3


@pytest.mark.parametrize(
    "bad, sentence",
    [
        ("{", "line 2 of r.jsonl is not JSON"),
        ("[1]", "line 2 of r.jsonl is no object"),
        ({"id": 1}, "line 2 of r.jsonl lacks text"),
        ({**ROW, "options": 4}, "line 2 of r.jsonl lacks options"),
        ({**ROW, "options": {"A": "yes", "B": None}}, "line 2 of r.jsonl: option B is missing"),
        ({**ROW, "options": {"A": "yes", "a": "no"}}, "line 2 of r.jsonl has two options for"),
        ({**ROW, "answer": "B", "answer_idx": "A"}, "line 2 of r.jsonl has two right answers"),
        ({**ROW, "text": ["a", "b"]}, "line 2 of r.jsonl lacks text"),
        ({**ROW, "id": 1.5}, "line 2 of r.jsonl: the id 1.5"),
        ('{"id": 1, "text": "a", "text": "b"}', "line 2 of r.jsonl has the key 'text' twice"),
        ({**ROW, "options": {}}, "line 2 of r.jsonl has no options"),
        ({**ROW, "answer": "E"}, "line 2 of r.jsonl: the answer 'E' is none of the options"),
        ({**ROW, "answer": 2}, "line 2 of r.jsonl: the answer 2"),
        ({**ROW, "options": {"AB": "x"}}, "line 2 of r.jsonl: an option is named 'AB'"),
        ({**ROW, "text": None}, "line 2 of r.jsonl lacks text"),
    ],
)
def test_judge_bad_row(capsys, tmp_path, bad, sentence):
    code, out, err = call(capsys, "judge", jsonl(tmp_path / "r.jsonl", ROW, bad))
    assert code == 1 and not out and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"options": ["yes", "no"]},
        {"options": ["A. yes", "B. no"]},
        {"options": [{"key": "A", "value": "yes"}, {"key": "B", "value": "no"}]},
        {"options": {"label": ["A", "B"], "text": ["yes", "no"]}},
        {"options": '{"A": "yes", "B": "no"}'},
        {"options": "['yes', 'no']"},
        {"text": ["\\boxed{B}"]},
        {"text": None, "response": "\\boxed{B}"},
        {"text": "so \boxed{B}"},
        {"text": [{"role": "assistant", "content": "\\boxed{B}"}]},
        {"answer": "(B)"},
        {"answer": "no"},
        {"answer": "B: no"},
        {"answer": None, "gold": "B"},
        {"answer": "no", "answer_idx": "B"},
    ],
)
def test_judge_reads_the_usual_forms(capsys, tmp_path, change):
    row = {**ROW, "answer": "B", **change}
    code, out, _ = call(capsys, "judge", jsonl(tmp_path / "r.jsonl", row))
    first = json.loads(out.splitlines()[0])
    assert code == 0 and first == {"id": "q1", "letter": "B", "status": "correct"}


@pytest.mark.parametrize(
    "key", ["response", "output", "generated_text", "completion", "prediction", "messages"]
)
def test_judge_reads_the_usual_names_and_numbers_rows_without_id(capsys, tmp_path, key):
    text = [{"role": "assistant", "content": "\\boxed{B}"}] if key == "messages" else "\\boxed{B}"
    row = {key: text, "options": ROW["options"], "answer": "B"}
    code, out, _ = call(capsys, "judge", jsonl(tmp_path / "r.jsonl", row, row))
    rows = [json.loads(line) for line in out.splitlines()[:2]]
    assert code == 0 and [(r["id"], r["status"]) for r in rows] == [(1, "correct"), (2, "correct")]


def test_judge_reads_tables_and_packed_files(capsys, tmp_path):
    import gzip

    import pandas as pd

    row = {"id": "q1", "response": "\\boxed{B}", "A": "yes", "B": "no", "answer": "B"}
    table = pd.DataFrame([row, row])
    table.to_csv(tmp_path / "r.csv", index=False)
    table.to_parquet(tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(json.dumps([row, row], indent=1))
    (tmp_path / "r").write_bytes(gzip.compress((json.dumps(row) + "\r\n").encode() * 2))
    (tmp_path / "r16.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-16")
    for file in filter(Path.is_file, tmp_path.iterdir()):
        code, out, _ = call(capsys, "judge", file)
        assert code == 0 and json.loads(out.splitlines()[-1])["counts"]["correct"] == 2, file


def test_judge_bad_file(capsys, tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        code, out, err = call(capsys, "judge", path)
        assert code == 1 and not out and "cannot be read" in err and "Traceback" not in err
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in call(capsys, "judge", tmp_path / "b.jsonl")[2]
    (tmp_path / "e.jsonl").write_text("", encoding="utf-8")
    assert json.loads(call(capsys, "judge", tmp_path / "e.jsonl")[1])["counts"]["correct"] == 0


# sources, decontaminate


def test_sources_shape(capsys):
    code, out, _ = call(capsys, "sources", "--json")
    rows = json.loads(out)
    assert (
        code == 0
        and len(rows) > 10
        and all(
            list(r) == ["source", "split", "category", "expected", "found", "where", "licence"]
            for r in rows
        )
    )
    assert {r["source"] for r in rows} >= {"medqa", "medmcqa", "headqa", "brain_tumor"} and {
        r["category"] for r in rows
    } == set(CATEGORIES)


def test_decontaminate_contract(capsys, tmp_path):
    words = " ".join(f"w{n}" for n in range(20))
    train = jsonl(
        tmp_path / "t.jsonl",
        {"question": f"before {words} after"},
        {"question": "What  is this?"},
        {"question": "another one"},
    )
    bench = jsonl(
        tmp_path / "b.jsonl", {"question": f"{words} again"}, {"question": "what is THIS?"}
    )
    code, out, _ = call(capsys, "decontaminate", train, "--against", bench, "--json")
    assert code == 0 and json.loads(out) == {
        "pairs": [
            {
                "train": str(train),
                "bench": str(bench),
                "n": 16,
                "rows": 3,
                "flagged": 1,
                "exact": 1,
                "blind": 1,
            }
        ]
    }
    assert "flagged" in call(capsys, "decontaminate", train, "--against", bench)[1]
    for argv, sentence in (
        ([train, "--against", tmp_path / "none"], "neither a JSONL file nor a registered source"),
        ([jsonl(tmp_path / "x.jsonl", {"q": 1}), "--against", bench], "has no text `question`"),
    ):
        code, out, err = call(capsys, "decontaminate", *argv)
        assert code == 1 and not out and sentence in err


# Errors of our own, and of others.


def test_unexpected_errors_have_a_traceback_without_secrets(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "canary-98765")

    def broken(*_, **__):
        raise ValueError("sent canary-98765")

    monkeypatch.setattr(judge_file, "judge_file", broken)
    code, _, err = call(capsys, "judge", tmp_path / "x")
    assert code == 1 and "Traceback" in err and "[MY_TOKEN]" in err and "98765" not in err


def test_interrupt(capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(judge_file, "judge_file", interrupted)
    assert call(capsys, "judge", tmp_path / "x") == (
        1,
        "",
        "octomed: stopped: run it again to go on\n",
    )


def test_a_student_that_is_not_there(capsys, tmp_path):
    code, _, err = call(capsys, "evaluate", "clinic/none", "clinic_ward:test", "--limit", "2")
    assert (
        code == 2
        and "no student is registered as clinic/none: choose from" in err
        and "Traceback" not in err
    )
    assert not list((tmp_path / "store").rglob("card.json"))


class Always(ToyEngine):
    "A simulated model that answers A with every question."

    model = "always@1"

    def answer(self, request, index):
        return "<think>x</think>\n\n\\boxed{A}" if index < 9 else "<think>so", "stop", 4


def test_evaluate_shows_single_samples_the_vote_and_both_overalls_at_120_columns(capsys, tmp_path):
    from octomed.data.questions import Question
    from octomed.data.sources import Source, register
    from octomed.generate.engines import register_teacher

    for name in ("alpha", "beta"):
        register(
            Source(
                f"{name}_of_a_long_name",
                "test",
                "multimodal_classification",
                "benchmark",
                revision="1",
                make=lambda name=name, **_: [
                    Question(
                        f"{name} {n}?",
                        ("one", "two"),
                        "AB"[n % 2],
                        f"{name}_of_a_long_name",
                        "test",
                        "multimodal_classification",
                    )
                    for n in range(6)
                ],
            )
        )
    register_teacher("toy/always", Always, "1")
    (tmp_path / "r.yaml").write_text("common: {bootstrap: 200}", encoding="utf-8")
    ask = [
        "evaluate",
        "toy/always",
        "alpha_of_a_long_name:test",
        "beta_of_a_long_name:test",
        "--recipe",
        tmp_path / "r.yaml",
        "--seeds",
        "5",
        "--vote",
        "10",
        "--voted",
        "alpha_of_a_long_name:test",
    ]
    code, out, _ = call(capsys, *ask, "--json")
    a, b, overall = json.loads(out)
    assert code == 0 and [r["benchmark"] for r in (a, b, overall)] == [
        "alpha_of_a_long_name:test",
        "beta_of_a_long_name:test",
        "Overall",
    ]
    assert (
        (a["accuracy"], a["vote"], a["votes"], a["seeds"], a["n"]) == (0.5, 0.5, 10, 5, 6)
        and "vote" not in b
        and (overall["accuracy"], overall["vote"]) == (0.5, 0.5)
    )
    assert {
        "interval",
        "unparsed",
        "truncated",
        "failed",
        "forced_exit",
        "ties",
        "mean_tokens",
        "chance",
    } <= set(overall)
    code, out, _ = call(capsys, *ask)
    assert (
        code == 0
        and max(map(len, out.splitlines())) <= 120
        and "by vote" in out
        and "Overall, multimodal classification" in out
        and "truncated" in out
    )
    assert (
        call(capsys, "evaluate", "OctoMed-7B")[2]
        == "octomed: OctoMed-7B is OctoMed/OctoMed-7B on the hub: pin its revision, "
        "transformers:OctoMed-7B@REVISION, or name a server that has it, "
        "openai:OctoMed-7B@SERVER\n"
    )
    assert call(capsys, *ask[:4], "--form", "none")[0] == 2


# Plan and report


@pytest.fixture
def results(tmp_path):
    "A recipe of one section with results, made elsewhere."
    (tmp_path / "r.yaml").write_text("sections: {42_b: {}}", encoding="utf-8")
    write_notebook(tmp_path / "nbs" / "42_b.ipynb")
    claim = {
        "text": "<b>one</b> beats two",
        "kind": "greater",
        "paper": "38 against 23",
        "a": "x",
        "b": "y",
        "benchmark": "text_only",
        "n": 1300,
        "training_seeds": 1,
        "difference": 0.125,
        "interval": [0.02, 0.2],
        "outcome": "agrees",
        "not_proved": "everything else",
    }
    row = {
        "arm": "x",
        "category": "text_only",
        "benchmark": "demo:test",
        "n": 1300,
        "seeds": 1,
        "accuracy": 0.5,
        "interval": [0.2, 0.55],
        "unparsed": 0.3,
        "truncated": 0.0,
        "forced_exit": 0.0,
        "ties": 0.0,
        "mean_tokens": 30.0,
        "chance": 0.25,
        "paper": 0.52,
    }

    def put(folder, code="old"):
        write_results(folder, [claim], [row], code)
        (folder / "figures" / "42_b.png").write_bytes(b"\x89PNG")
        (folder / "figures" / "42_b.svg").write_text("<svg/>", encoding="utf-8")
        return tmp_path / "r.yaml"

    return put


def test_report_needs_results(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("sections: {}", encoding="utf-8")
    code, out, err = call(capsys, "report", tmp_path / "r.yaml")
    assert code == 1 and not out and "has no results yet: run `octomed run" in err


def test_report_as_text_and_json(capsys, tmp_path, results):
    recipe = results(tmp_path / "out" / "r")
    code, out, _ = call(capsys, "report", recipe, "--all")
    assert (
        code == 0
        and "+12.5" in out
        and "+2.0 to +20.0" in out
        and "38 against 23" in out
        and "1,300" in out
        and "One training seed" in out
        and "Not shown to beat chance: x on demo:test" in out
    )
    found = json.loads(call(capsys, "report", recipe, "--json")[1])
    assert (
        found["sections"][0]["claims"][0]["difference"] == 0.125
        and found["sections"][0]["origin"] == "here"
        and found["missing"] == []
    )


def test_report_is_a_line_for_each_section_and_ends_on_counts_and_page(capsys, tmp_path, results):
    recipe = results(tmp_path / "out" / "r")
    code, out, _ = call(capsys, "report", recipe)
    *_, hint, counts, page = out.splitlines()
    assert code == 0 and "+12.5" not in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("42_b")] == [
        ["42_b", "1"]
    ]
    assert f"octomed report {recipe} --all" in hint
    assert counts == (
        "1 sections, 1 claims: of the paper's 1 agrees, 0 disagrees, 0 undecided, 0 not tested"
    )
    assert page == f"as a page: `octomed report {recipe} --html`"
    call(capsys, "report", recipe, "--html")
    page = call(capsys, "report", recipe)[1].splitlines()[-1]
    assert page == f"the page: {tmp_path / 'out' / 'r' / 'report.html'}"
    assert "+12.5" in call(capsys, "report", recipe, "--only", "42_b")[1]


def test_report_falls_back_to_the_reference_and_says_so(capsys, tmp_path, results):
    recipe = results(tmp_path / "out" / "reference" / "r")
    code, out, _ = call(capsys, "report", recipe)
    assert (
        code == 0
        and "Not run here, shown from the reference run that the project keeps: 42_b." in out
        and "The code has changed since these results were made" in out
    )
    from octomed.core.code import section_digest

    path = tmp_path / "out" / "reference" / "r" / "results" / "42_b.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace(
            '"old"', json.dumps(section_digest("42_b", tmp_path / "nbs"))
        ),
        encoding="utf-8",
    )
    assert "The code has changed" not in call(capsys, "report", recipe)[1]


def test_report_page_is_self_contained(capsys, tmp_path, results):
    recipe = results(tmp_path / "out" / "r")
    code, out, _ = call(capsys, "report", recipe, "--html")
    page = Path(out.strip()).read_text(encoding="utf-8")
    assert code == 0 and Path(out.strip()) == tmp_path / "out" / "r" / "report.html"
    assert (
        "&lt;b&gt;one&lt;/b&gt; beats two" in page
        and "Does not prove: everything else" in page
        and "Not medical advice" in page
        and "octomed run" in page
    )
    assert (
        page.count("data:image/") == 1
        and "<script" not in page
        and 'src="http' not in page
        and "<link" not in page
        and "viewport" in page
    )


def test_reference_is_kept_only_of_a_complete_run_on_a_clean_tree(tmp_path, results, monkeypatch):
    recipe = str(results(tmp_path / "out" / "r"))
    with pytest.raises(OctomedError, match=r"the run of r is not complete \(42_b\)"):
        report.keep_reference(recipe)
    import octomed.run.runner

    monkeypatch.setattr(
        octomed.run.runner, "status", lambda *a: [{"section": "42_b", "state": "done"}]
    )
    monkeypatch.setattr(report, "_dirty", lambda: True)
    with pytest.raises(OctomedError, match="the working tree has changes: commit them"):
        report.keep_reference(recipe)
    assert not (tmp_path / "out" / "reference").exists()
    monkeypatch.setattr(report, "_dirty", lambda: False)
    into = report.keep_reference(recipe)
    assert sorted(str(p.relative_to(into)) for p in into.rglob("*") if p.is_file()) == [
        "figures/42_b.png",
        "figures/42_b.svg",
        "results/42_b.json",
    ]


def test_plan_runs_nothing(capsys, tmp_path, results):
    recipe = results(tmp_path / "out" / "reference" / "r")
    kept = tmp_path / "out" / "reference" / "r" / "results" / "42_b.json"
    of_other_values = json.loads(call(capsys, "plan", recipe, "--json")[1])
    assert of_other_values[0]["minutes"] is None
    written = json.loads(kept.read_text(encoding="utf-8"))
    written["card"]["values"] = load_recipe(str(recipe)).identify("42_b")
    kept.write_text(json.dumps(written), encoding="utf-8")
    code, out, _ = call(capsys, "plan", recipe, "--json")
    rows = json.loads(out)
    assert (
        code == 0
        and rows[0]["section"] == "42_b"
        and rows[0]["arms"] == 0
        and rows[0]["minutes"] == 3.5
        and "2 cores" in rows[0]["basis"]
    )
    assert not (tmp_path / "store").exists() and "not known" not in out
    assert "42_b" in call(capsys, "plan", recipe)[1]
    assert json.loads(call(capsys, "status", recipe, "--json")[1]) == [
        {"section": "42_b", "state": "missing", "minutes": None, "when": None}
    ]


def test_columns_align():
    assert terminal.format_table(
        [{"a": "x", "n": 1}, {"a": "long word", "n": 1000}]
    ).splitlines() == [
        "a              n",
        "x              1",
        "long word  1,000",
    ]


# What a command finds around it: encodings, full disks, closed pipes, permissions.


def start(tmp_path, line, stdout=subprocess.PIPE, cwd=None, **environment):
    "A finished command in a process of its own."
    return subprocess.run(
        [sys.executable, "-m", "octomed", *line.split()],
        cwd=cwd or tmp_path,
        env={**os.environ, "PYTHONPATH": str(root()), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_all_text_is_utf8_whatever_the_locale(tmp_path, environment):
    (tmp_path / "ün").mkdir()
    jsonl(tmp_path / "ün" / "à.jsonl", {"question": "ob μ ≤ 3 × σ ist – «é»?", "options": ["ß"]})
    line = "decontaminate ün/à.jsonl --against ün/à.jsonl --drops ün/ö.jsonl --html ün/ö.html"
    done = start(tmp_path, line, **environment)
    assert done.returncode == 0, done.stderr
    assert "ün/à.jsonl" in done.stdout.decode("utf-8")
    assert "«é»" in (tmp_path / "ün" / "ö.jsonl").read_text(encoding="utf-8")
    assert "«é»" in (tmp_path / "ün" / "ö.html").read_text(encoding="utf-8")


def test_what_utf8_does_not_have_is_escaped(tmp_path):
    jsonl(tmp_path / "a.jsonl", '{"id": "\\ud83d", "text": "A", "options": {"A": "é"}}')
    done = start(tmp_path, "judge a.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["id"] == "\ud83d"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("line", ["judge a.jsonl", "run --help", "sources", "completion bash"])
def test_a_full_disk_under_the_output_is_one_sentence(tmp_path, line):
    jsonl(tmp_path / "a.jsonl", ROW)
    with open("/dev/full", "wb") as full:
        done = start(tmp_path, line, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "octomed: the output cannot be written (No space left on device): "
        "free some space, or send it elsewhere\n"
    )


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    jsonl(tmp_path / "a.jsonl", *[ROW] * 20_000)
    command = f"{shlex.quote(sys.executable)} -m octomed judge a.jsonl | head -1"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root())},
        capture_output=True,
        encoding="utf-8",
    )
    assert json.loads(done.stdout)["letter"] == "B"
    assert not done.stderr


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 2), ("2>&-", 2), ("2>/dev/null", 2), (">&- 2>&-", 2)]
)
def test_a_closed_stream_changes_no_exit_code(tmp_path, redirection, code):
    command = f"{shlex.quote(sys.executable)} -m octomed run nothing {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(root())}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == code
    assert not done.stdout


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x.jsonl"), "x.jsonl cannot be read"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x cannot be read or written"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"x"), "name another file"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "(Read-only file system)"),
        (OSError(errno.ENOSPC, "No space left on device"), "the output cannot be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "no space left to write x"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "is not UTF-8 text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_file_that_cannot_be_used_is_one_sentence(capsys, monkeypatch, tmp_path, error, sentence):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(judge_file, "judge_file", broken)
    monkeypatch.setattr(cli, "discard_output", lambda: None)
    code, out, err = call(capsys, "judge", tmp_path / "x")
    assert code == 1 and not out
    assert err.startswith("octomed: ") and sentence in err and len(err.splitlines()) == 1


def test_a_store_under_a_file_is_one_sentence(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "file" / "store"))
    code, _, err = call(capsys, "distill", "clinic_ward:train", "--limit", 2)
    assert code == 1 and "point OCTOMED_STORE at a folder of your own" in err
    assert "Traceback" not in err


def test_outputs_under_a_file_are_one_sentence(capsys, monkeypatch, tmp_path, results):
    recipe = results(tmp_path / "out" / "reference" / "r")
    (tmp_path / "out" / "r").write_text("", encoding="utf-8")
    code, _, err = call(capsys, "report", recipe, "--html")
    assert code == 1 and "point OCTOMED_OUTPUTS at a folder of your own" in err


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    program = "import sys; from octomed.run.cli import main; sys.exit(main())"
    command = f"cd gone && rmdir ../gone && {shlex.quote(sys.executable)} -c '{program}' plan smoke"
    environment = {**os.environ, "PYTHONPATH": str(root())}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 1
    assert "the folder in which you are is gone" in done.stderr.decode()


def test_a_devices_place_is_written_to(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"question": "What is this?"})
    line = "decontaminate a.jsonl --against a.jsonl --drops /dev/stdout --json"
    done = start(tmp_path, line)
    first, _, rest = done.stdout.decode().partition("\n")
    assert json.loads(first)["reason"]
    assert json.loads(rest)["pairs"][0]["exact"] == 1


@pytest.mark.parametrize("workers", ["abc", "0", "-1", "1.5"])
def test_a_number_of_workers_that_is_none(monkeypatch, workers):
    monkeypatch.setenv("OCTOMED_WORKERS", workers)
    with pytest.raises(UsageError, match=f"OCTOMED_WORKERS={workers} is no number of workers"):
        count_workers()


SETTINGS = {
    "OCTOMED_ENGINE=vlm": "OCTOMED_ENGINE=vlm is no engine: choose from transformers, vllm",
    "OCTOMED_WORKERS=abc": "OCTOMED_WORKERS=abc is no number of workers: write 1 to 9999",
    "OCTOMED_WORKERS=99999": "OCTOMED_WORKERS=99999 is no number of workers",
    "OCTOMED_BUDGET=lots": "OCTOMED_BUDGET=lots cannot be read: write money=5, tokens=1e6",
    "OCTOMED_BUDGET=money=-1": "OCTOMED_BUDGET=money=-1 cannot be read",
    "OCTOMED_TRAIN=pack=maybe": "OCTOMED_TRAIN: pack=maybe cannot be read: write 0 or 1",
    "OCTOMED_PRICES=there.yaml": "there.yaml cannot be read (No such file or directory)",
    "OCTOMED_PRICES=list.yaml": "list.yaml is no table of prices: write `models:` and below it",
    "OCTOMED_PRICES=row.yaml": "row.yaml line 2: gpt-4o is 5: write `models:`",
    "OCTOMED_PRICES=word.yaml": "word.yaml line 3: input of gpt-4o is 'cheap': write a price",
    "OCTOMED_PRICES=minus.yaml": "minus.yaml line 3: input of gpt-4o is -1: write a price",
}
TABLES = {
    "list.yaml": "models: [gpt-4o]\n",
    "row.yaml": "models:\n  gpt-4o: 5\n",
    "word.yaml": "models:\n  gpt-4o:\n    input: cheap\n    output: 1\n",
    "minus.yaml": "models:\n  gpt-4o:\n    input: -1\n    output: 1\n",
}
READ_SETTINGS = [
    "plan smoke",
    "run smoke",
    "run smoke --rehearse",
    "distill clinic_ward:train --limit 3",
    "train clinic_ward:train --limit 3",
    "evaluate nobody/x@1 clinic_ward:test",
    "export samples clinic_ward:train --limit 3 --out here",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_cannot_be_is_named_before_anything_is_done(
    monkeypatch, capsys, own_places, tmp_path, setting
):
    for name, text in TABLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(*setting.split("=", 1))
    for line in READ_SETTINGS:
        code, out, err = call(capsys, *line.split())
        assert (code, out) == (2, "") and SETTINGS[setting] in err, line
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "store").exists() and not (tmp_path / "out").exists()


def test_the_version_and_the_module(capsys, tmp_path):
    assert call(capsys, "--version")[:2] == (0, f"{octomed.__version__}\n")
    assert start(tmp_path, "--version").stdout.decode() == f"{octomed.__version__}\n"
