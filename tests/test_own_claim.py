"A claim of a reader's own: its file, its stamp, what it rests on, its finding, a class's table."

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octomed.core.paths import OctomedError, UsageError, outputs_dir, root
from octomed.evaluate.results import Results
from octomed.evaluate.section_run import find_detectable
from octomed.evaluate.stats import adjust_holm
from octomed.run import own_claim
from octomed.run.claim_page import explain_outcome, judge_stamp, say_class, say_stamp
from octomed.run.cli import main
from octomed.run.own_claim import (
    claim_folder,
    compare_values,
    declare_own_arms,
    declare_own_claim,
    declare_own_evaluations,
    identify_claim,
    list_asked,
    list_claim_values,
    list_keys,
    make_claim,
    plan_claim,
    read_claim,
    run_claim,
    stamp_claim,
    tabulate_claims,
)

WARD = "clinic_ward:test"
TEXT = """
text: Four traces beat one
recipe: smoke
arms:
  four: {train: "clinic_ward:train", questions: 20, k: 4}
  one: {train: "clinic_ward:train", questions: 20}
compare: [four, one]
benchmark: clinic_ward:test
kind: greater
samples: 4
limit: 200
"""


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def write(tmp_path):
    "Write a claim's file, with changes; gives its path."

    def write_file(*changes, name="four-traces", text=TEXT):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def rows(right, n=200, unparsed=0):
    "Rows of an evaluation: the first are correct, the last unparsed."
    wrong = ["wrong"] * (n - right - unparsed)
    statuses = ["correct"] * right + wrong + ["unparsed"] * unparsed
    lists = {"letters": ["A"], "tokens": [9], "forced": [False]}
    return [
        {"question": str(i), "options": 4, "statuses": [status], **lists}
        for i, status in enumerate(statuses)
    ]


@pytest.fixture
def answered(monkeypatch):
    "Let the arms of a claim have been right so often, without training any."

    def answer(unparsed=0, **right):
        def run(arms, recipe, seeds, benchmarks):
            [place] = benchmarks
            by_arm = {
                name: {place: [rows(count, unparsed=unparsed)] * seeds}
                for name, count in right.items()
            }
            assert list(outputs_dir().rglob("stamp.json"))  # before anything is trained
            return Results(recipe.common, by_arm)

        monkeypatch.setattr(own_claim, "run_arms", run)

    return answer


# The digest.


def test_the_digest_ignores_comments_order_and_the_name_of_the_recipe(write, tmp_path):
    own = read_claim(write())
    lines = TEXT.strip().split("\n")
    arms, top = lines[3:5], lines[:2] + lines[5:]
    turned = "\n".join(["# mine", "arms:", *arms[::-1], *top[::-1]])
    assert identify_claim(read_claim(write(text=turned, name="turned"))) == identify_claim(own)
    (tmp_path / "mine.yaml").write_text("extends: smoke\n", encoding="utf-8")
    same = read_claim(write(("recipe: smoke", "recipe: mine.yaml"), name="other"))
    assert identify_claim(same) == identify_claim(own)
    arms = {"train": "clinic_ward:train", "questions": 20}
    in_python = make_claim(
        "four-traces",
        text="Four traces beat one",
        recipe="smoke",
        arms={"one": {**arms, "k": 1, "epochs": 1}, "four": {**arms, "k": 4}},
        compare=("four", "one"),
        benchmark=WARD,
        kind="greater",
        samples=4,
        limit=200,
    )
    assert identify_claim(in_python) == identify_claim(own)


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("Four traces beat", "Four traces win over", "text"),
        ("k: 4}", "k: 3}", "arms.four.k"),
        ("20}", "21}", "arms.one.questions"),
        ("[four, one]", "[one, four]", "compare"),
        ("kind: greater", "kind: equivalent\nmargin: 0.1", "margin"),
        ("limit: 200", "limit: 199", "recipe.benchmark_limit"),
        ("samples: 4", "samples: 5", "recipe.samples"),
        ("recipe: smoke", "recipe: smoke@1", "recipe.base_seed"),
        ("limit: 200", "limit: 200\njoins: seen", "joins"),
        ("limit: 200", "limit: 200\nseeds: 2", "seeds"),
        ("limit: 200", "limit: 200\nreading: likelihood", "reading"),
        ("ward:test", "boards:test", "benchmark"),
    ],
)
def test_every_value_that_matters_makes_another_claim(write, old, new, named):
    own, other = read_claim(write()), read_claim(write((old, new), name="other"))
    assert identify_claim(other) != identify_claim(own)
    changed = compare_values(list_claim_values(own), list_claim_values(other))
    assert named in [name for name, _, _ in changed]


# What is refused.


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (TEXT, "", "wrong.yaml is empty"),
        (TEXT, "[1, 2]", "wrong.yaml holds no names and values"),
        ("kind: greater\n", "", "wrong.yaml lacks kind: write kind: greater"),
        ("kind: greater", "knid: greater", "line 9 has an unknown key knid: did you mean kind?"),
        ("kind: greater", "kind: better", "line 9: kind must be one of greater, equivalent"),
        ("kind: greater", "kind: equivalent", "line 9: an equivalence needs a margin above 0"),
        ("limit: 200", "margin: 0.1", "line 11: margin is of kind equivalent alone"),
        ("limit: 200", "along: [1, 2]", "line 11: along is of kind trend alone"),
        ("limit: 200", "limit: -1", "line 11: limit must be a whole number of at least 0"),
        ("kind: greater", "kind: trend", "line 7: a trend needs three arms"),
        ("recipe: smoke", "recipe: smok", "line 3: there is no recipe smok"),
        ("k: 4}", "k: four}", "line 5: arms.four.k must be a whole number of at least 0"),
        ("k: 4}", "kk: 4}", "line 5 has an unknown key kk in arms.four"),
        ("k: 4}", "k: 5}", "line 5: arm four keeps 5 traces of a question"),
        ("k: 4}", "teacher: nobody}", "line 5: arm four: no teacher is registered as nobody"),
        ("k: 4}", "filter: mood}", "line 5: arm four has no filter mood"),
        ("k: 4}", "compute_of: four}", "line 5: arm four reads as many tokens as four"),
        ("k: 4}", "k: 1}", "line 7: four is compared with an arm that is the same"),
        ('train: "clinic_ward:train", questions: 20}', "k: 1}", "line 6 lacks train in arms.one"),
        ("questions: 20}", "questions: 12_001}", "line 6: the versions of YAML"),
        ("questions: 20}", "questions: 12001}", "line 6: arm one asks for 12,001 questions"),
        ("ward:train", "ward:tran", "line 5: arm four: there is no source clinic_ward:tran"),
        ("ward:train", "ward:test", "line 5: arm four trains on clinic_ward:test, which is a"),
        ("  one:", "  chance:", "line 6: chance is named as chance students are"),
        ("[four, one]", "[four, two]", "line 7: there is no arm two"),
        ("[four, one]", "[four]", "line 7: compare names two arms"),
        ("[four, one]", "[four, four]", "line 7: compare has four twice"),
        ("ward:test", "ward:train", "line 8: benchmark: clinic_ward:train is trained on"),
        ("ward:test", "wards:test", "line 8: benchmark: there is no source clinic_wards:test"),
    ],
)
def test_an_error_is_one_sentence_with_the_file_and_the_key(write, capsys, old, new, sentence):
    path = write((old, new), name="wrong")
    assert main(["claim", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and sentence in err
    assert err.startswith("octomed: wrong.yaml") and err.count("\n") == 1
    assert not (outputs_dir() / "claims").exists()


def test_an_arm_that_is_not_compared_is_refused_unless_it_is_a_measure(write):
    third = '  six: {train: "clinic_ward:train", questions: 20, k: 2}\ncompare:'
    with pytest.raises(UsageError, match="line 7: arm six is not compared"):
        read_claim(write(("compare:", third)))
    own = read_claim(write(("compare:", third), ("questions: 20}", "compute_of: six}")))
    arms = declare_own_arms(own)
    assert arms["one"].compute_of.k == 2 and "six" not in arms


def test_names_of_claims_and_files(write, tmp_path):
    with pytest.raises(UsageError, match="cannot name a claim"):
        read_claim(write(name="my claim"))
    with pytest.raises(UsageError, match="is no claim: name a YAML file"):
        read_claim(tmp_path / "claim.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_claim(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"^claim mine lacks text"):
        make_claim("mine", recipe="smoke")


def test_every_key_is_explained():
    for kind in (own_claim.OwnClaim, own_claim.OwnArm):
        assert all(list_keys(kind)["meaning"])


# What is declared.


def test_the_claim_is_one_of_ours_over_the_recipes_own_chance(write):
    own = read_claim(write(("recipe: smoke", "recipe: course")))
    claim, arms = declare_own_claim(own), declare_own_arms(own)
    assert (claim.a, claim.b, claim.whose, claim.margin) == ("four", "one", "ours", None)
    assert list(arms) == ["four", "one", "chance, cot, text_only"]
    assert arms["chance, cot, text_only"].k == 4  # of the arm that reads most
    assert own.common.samples == 4 and own.common.benchmark_limit == 200
    shared = declare_own_evaluations(own)["one"][WARD][0].params
    assert shared["limit"] == 200 and shared["likelihood"]


def test_a_category_is_the_recipes_benchmarks_of_it(write):
    own = read_claim(write(("clinic_ward:test", "text_only")))
    assert list_asked(own) == (WARD, "clinic_boards:test")


def test_a_trend_rises_from_its_first_arm_to_its_last(write):
    third = '  two: {train: "clinic_ward:train", questions: 20, k: 2}\ncompare:'
    changes = [("compare:", third), ("[four, one]", "[one, two, four]"), ("greater", "trend")]
    own = read_claim(write(*changes, ("limit:", "along: [0, 1, 2]\nlimit:")))
    claim = declare_own_claim(own)
    assert (claim.b, claim.a) == ("one", "four")
    assert claim.along == (("one", 0.0), ("two", 1.0), ("four", 2.0))
    without = read_claim(write(*changes, name="without"))
    assert declare_own_claim(without).along == claim.along


def test_more_questions_and_seeds_detect_less(write):
    own = declare_own_claim(read_claim(write()))
    assert find_detectable(own, 400, 1) == pytest.approx(find_detectable(own, 100, 1) / 2)
    assert find_detectable(own, 100, 1) == pytest.approx(0.198, abs=0.001)
    equal = read_claim(write(("kind: greater", "kind: equivalent\nmargin: 0.05"), name="equal"))
    assert find_detectable(declare_own_claim(equal), 100, 1) == pytest.approx(0.229, abs=0.001)
    independent = find_detectable(own, 100, 4, runs=4, seed_sd=0.0)
    assert independent == pytest.approx(find_detectable(own, 100, 1) / 2)


# The stamp.


def finish(stage, seconds):
    "Let a stage be finished at a time."
    stage.folder.mkdir(parents=True)
    card = json.dumps({"finished": seconds, "files": {}})
    (stage.folder / "card.json").write_text(card, encoding="utf-8")


def test_a_claim_is_stamped_before_it_runs_and_once(write, answered):
    own = read_claim(write())
    answered(four=150, one=100)
    result = run_claim(own)
    stamp = json.loads((claim_folder(own) / "stamp.json").read_text(encoding="utf-8"))
    assert result["stamp"] == stamp and stamp["digest"] == identify_claim(own)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp["card"]["made"])
    assert judge_stamp(stamp) == "yes" and not stamp["earlier"]
    assert stamp["values"]["recipe"]["student"] == "clinic/tiny"
    again = run_claim(own)
    assert again["stamp"] == stamp and again["claim"] == result["claim"]
    assert result["claim"]["outcome"] == "holds"
    assert "The whole interval is above 0" in (claim_folder(own) / "claim.md").read_text("utf-8")


def test_a_changed_claim_is_a_new_one_and_the_first_stamp_stays(write, answered):
    answered(four=150, one=100)
    first = run_claim(read_claim(write()))
    own = read_claim(write(("k: 4}", "k: 3}")))
    before = sorted(outputs_dir().rglob("stamp.json"))
    second = run_claim(own)
    assert set(before) < set(outputs_dir().rglob("stamp.json"))
    [earlier] = second["stamp"]["earlier"]
    assert earlier["digest"] == first["digest"] and earlier["outcome"] == "holds"
    assert earlier["changed"] == [["arms.four.k", 4, 3]]
    page = (claim_folder(own) / "claim.md").read_text(encoding="utf-8")
    assert "This is a new claim: four-traces was stamped as" in page
    assert "judged holds; since then arms.four.k went from 4 to 3" in page
    back = run_claim(read_claim(write()))
    assert back["stamp"] == first["stamp"]


def test_a_changed_claim_that_was_never_run_says_so(write, answered):
    answered(four=150, one=100)
    stamp_claim(read_claim(write()))
    result = run_claim(read_claim(write(("k: 4}", "k: 3}"))))
    assert "and never run; since then" in " ".join(say_stamp(result["stamp"]))


def test_students_that_were_there_before_are_no_prediction(write, monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    own = read_claim(write())
    by_arm = declare_own_evaluations(own)
    assert judge_stamp(stamp_claim(own)) == "yes"
    finish(by_arm["one"][WARD][0].params["student"], time.time())
    in_part = stamp_claim(read_claim(write(("Four traces", "Four good traces"))))
    assert judge_stamp(in_part) == "in part" and list(in_part["known"]) == ["one"]
    assert "Students of one were trained before the claim was stamped" in say_stamp(in_part)[1]
    finish(by_arm["four"][WARD][0].params["student"], time.time())
    known = stamp_claim(read_claim(write(("Four traces", "Four very good traces"))))
    assert judge_stamp(known) == "no"
    assert any("it is not a prediction" in sentence for sentence in say_stamp(known))
    # the first was stamped before they were trained, and stays a prediction
    assert judge_stamp(stamp_claim(own)) == "yes"


def test_a_stamp_or_result_that_was_changed_by_hand_is_refused(write, answered):
    answered(four=150, one=100)
    own = read_claim(write())
    run_claim(own)
    path = claim_folder(own) / "result.json"
    text = path.read_text(encoding="utf-8")
    assert '"outcome": "holds"' in text
    path.write_text(text.replace('"outcome": "holds"', '"outcome": "fails"'), encoding="utf-8")
    with pytest.raises(OctomedError, match="was changed after it was written"):
        tabulate_claims()
    path = claim_folder(own) / "stamp.json"
    stamp = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stamp, "seconds": 0}), encoding="utf-8")
    with pytest.raises(OctomedError, match="was changed after it was written"):
        stamp_claim(own)


# The finding.


@pytest.mark.parametrize(
    "right, unparsed, outcome, why",
    [
        ((100, 150), 0, "fails", "The whole interval is below 0"),
        ((101, 100), 0, "undecided", "The interval holds 0"),
        ((55, 50), 0, "not tested", "no arm is shown to beat chance: the best, four"),
        ((150, 100), 40, "not tested", "20.0 % of the responses of"),
        ((199, 198), 0, "not tested", "all arms are at the ceiling: even one is right on 99.0 %"),
    ],
)
def test_an_outcome_says_why(write, answered, right, unparsed, outcome, why):
    answered(four=right[0], one=right[1], unparsed=unparsed)
    finding = run_claim(read_claim(write()))["claim"]
    assert finding["outcome"] == outcome and why in explain_outcome(finding)


def test_an_equivalence_says_why(write, answered):
    answered(four=104, one=100)
    for margin, outcome in ((0.1, "holds"), (0.03, "undecided"), (0.001, "fails")):
        text = f"kind: equivalent\nmargin: {margin}"
        finding = run_claim(read_claim(write(("kind: greater", text))))["claim"]
        assert finding["outcome"] == outcome and "margin" in explain_outcome(finding)


# A class.


def test_a_class_is_corrected_for_the_number_of_its_tested_claims(write, answered, monkeypatch):
    for name, right in (("anna", 117), ("ben", 150), ("carl", 104), ("dora", 52)):
        monkeypatch.setenv("OCTOMED_OUTPUTS", str(Path(write().parent) / "class" / name))
        answered(four=right, one=50 if name == "dora" else 100)
        run_claim(read_claim(write(("Four traces", f"{name} says that four traces"))))
    stamp_claim(read_claim(write(("Four traces", "Four traces, never run,"))))
    table = tabulate_claims(write().parent / "class")
    assert [row["who"] for row in table] == ["anna", "ben", "carl", "dora", "dora"]
    outcomes = [row["outcome"] for row in table]
    assert outcomes == ["holds", "holds", "holds", "not tested", "not run"]
    tested = table[:3]
    assert [row["p_holm"] for row in tested] == adjust_holm([row["p"] for row in tested])
    assert [row["p_holm"] for row in table[3:]] == [None, None]
    assert table[-1]["version"] == "2 of 2"
    said = say_class(table)
    assert said.startswith("Of 3 tested claims") and "1 not tested, 1 not run" in said


def test_the_same_claim_of_two_counts_once_and_a_changed_one_twice(write, answered, monkeypatch):
    answered(four=150, one=100)
    for name in ("anna", "ben"):
        monkeypatch.setenv("OCTOMED_OUTPUTS", str(Path(write().parent) / "class" / name))
        run_claim(read_claim(write()))
    run_claim(read_claim(write(("k: 4}", "k: 3}"))))
    table = tabulate_claims(write().parent / "class")
    assert [(row["who"], row["claim"]) for row in table] == [
        ("anna", "four-traces"),
        ("ben", "four-traces"),
    ]
    assert table[0]["p_holm"] == 2 * table[0]["p"]


def test_the_command_line(write, answered, capsys):
    path = write()
    answered(four=150, one=100)
    assert main(["claim", str(path), "--plan"]) == 0
    out, _ = capsys.readouterr()
    assert "It detects differences of 14 points or more, on 200 questions." in out
    assert f"Its digest is {identify_claim(read_claim(path))}." in out
    assert not (outputs_dir() / "claims").exists()
    assert main(["claim", "table", str(path)]) == 2
    assert "is not stamped: run `octomed claim" in capsys.readouterr().err
    assert main(["claim", str(path), "--stamp"]) == 0
    assert capsys.readouterr().out.startswith("Stamped as ")
    assert not list(outputs_dir().rglob("result.json"))
    assert main(["claim", str(path), "--plan", "--stamp"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert main(["claim", "table"]) == 0
    assert "No claim was tested: 1 not run." in capsys.readouterr().out


def test_the_command_line_after_the_run(write, answered, capsys):
    path = write()
    answered(four=150, one=100)
    assert main(["claim", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.index("Stamped as") < out.index("Outcome: holds, for these students.")
    assert "claim.md" in err
    assert main(["claim", "table", str(path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["outcome"] == "holds" and row["p_holm"] == row["p"]
    assert main(["claim", "table", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_a_plan_reads_no_data_that_is_not_at_hand(write, monkeypatch):
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    changes = [("clinic_ward:train", "medqa:train"), ("clinic_ward:test", "medqa:test")]
    plan = plan_claim(read_claim(write(*changes)))
    assert plan["units"] == 200 and plan["evaluations"] >= 2


# The course's page.


def test_the_page_of_the_course_runs_from_top_to_bottom(tmp_path):
    "Two small students are trained for it."
    code = f"""
import sys
sys.path.insert(0, {str(root() / "tests")!r})
import pages
shown, error = pages.run_notebook("course/60_your_claim.ipynb")
assert error is None, error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    pages = [path.read_text(encoding="utf-8") for path in outputs_dir().rglob("claim.md")]
    [changed] = [page for page in pages if "This is a new claim" in page]
    assert len(pages) == 2 and "it is not a prediction" in changed
