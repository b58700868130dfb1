"""What the report says beyond the numbers that it is given, and that its page is whole.

This is about signs of failure, other seeds, and the paper's own slips."""

import csv
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import nbformat
import pytest
from toys import write_notebook, write_results

from octomed.core.paths import OctomedError, UsageError, root, shipped
from octomed.core.recipe import Recipe, load_recipe
from octomed.run import report_html
from octomed.run.diagnostics import diagnose
from octomed.run.report import (
    compare_seeds,
    drop_empty_columns,
    find_inconsistencies,
    format_report,
    format_summary,
    gather_report,
    latest_results,
    mark_trial,
    rate_row,
    score_row,
    show_in_notebook,
)
from octomed.run.report_html import render_report, write_report_page


def line(arm="x", benchmark="demo:test", accuracy=0.5, **more):
    return {
        "arm": arm,
        "category": "text_only",
        "benchmark": benchmark,
        "n": 100,
        "seeds": 1,
        "accuracy": accuracy,
        "interval": [accuracy - 0.05, accuracy + 0.05],
        "unparsed": 0.0,
        "truncated": 0.0,
        "failed": 0.0,
        "forced_exit": 0.0,
        "ties": 0.0,
        "mean_tokens": 30.0,
        "chance": 0.25,
        "paper": None,
        **more,
    }


def signs(rows=(), reads=None, claims=(), **facts):
    return "\n".join(diagnose({"rows": list(rows), "claims": list(claims), **facts}, reads))


def claim(text="one beats two", outcome="agrees", difference=0.1):
    return {
        "text": text,
        "kind": "greater",
        "paper": "38 against 23",
        "a": "x",
        "b": "y",
        "benchmark": "text_only",
        "n": 100,
        "training_seeds": 2,
        "difference": difference,
        "interval": [difference - 0.05, difference + 0.05],
        "outcome": outcome,
        "not_proved": "much",
    }


# Signs of failure


@pytest.mark.parametrize(
    "rate, word",
    [
        ("unparsed", "could not be read"),
        ("truncated", "were cut"),
        ("failed", "were refused or failed"),
        ("forced_exit", "had to be forced"),
    ],
)
def test_a_rate_above_a_tenth_is_reported(rate, word):
    assert word in signs([line(**{rate: 0.2})])
    assert "x on demo:test 20%" in signs([line(**{rate: 0.2})])
    assert not signs([line(**{rate: 0.1})])


def test_chance_one_seed_and_flat_lengths():
    assert "Not shown to beat chance: x on demo:test." in signs([line(accuracy=0.28)])
    assert not signs([line(accuracy=0.31)])
    assert "One training seed" in signs(claims=[{"training_seeds": 1}])
    assert not signs(claims=[{"training_seeds": 2}])

    def several(*tokens):
        return [line(benchmark=f"{n}:test", mean_tokens=t) for n, t in enumerate(tokens)]

    assert "Response lengths hardly differ between tasks: x." in signs(several(100, 105, 110))
    assert not signs(several(100, 105, 130))
    assert not signs(several(4, 4, 4))


def test_fault_44_a_score_that_rests_on_the_order_is_reported_and_shown():
    r = line(in_order=0.8, shuffled=0.5, moved=0.6)
    assert (
        "falls by more than a tenth when the options are shuffled: x on demo:test 80% → 50%"
        in signs([r])
    )
    assert not signs([line(in_order=0.8, shuffled=0.75)])
    assert [rate_row(r)[k].strip() for k in ("in order", "shuffled", "moved")] == [
        "80.0",
        "50.0",
        "60.0",
    ]


def test_text_only_loss_is_of_arms_that_read_images_and_lies_outside_both_intervals():
    def over(arm, x):
        return line(arm, "Overall", x)

    rows = [over("before", 0.5), over("images", 0.3), over("text", 0.3), over("near", 0.42)]
    reads = {
        "before": set(),
        "images": {"multimodal_reasoning"},
        "text": {"text_only"},
        "near": {"multimodal_classification", "text_only"},
    }
    assert (
        signs(rows, reads)
        == "Text-only accuracy was lost by training with images: images 50.0 → 30.0."
    )
    assert not signs(rows)
    assert not signs(rows[1:], {k: v for k, v in reads.items() if v})


@pytest.mark.parametrize(
    "a, word", [(0.29, "low: 29%"), (0.99, "suspiciously high: 99%"), (0.3, ""), (0.98, "")]
)
def test_acceptance(a, word):
    row = {"source": "s", "teacher": "t", "acceptance": a}
    assert (f"The acceptance of t on s is {word}." in signs(statistics=[row])) == bool(word)
    assert word in signs(funnel={"acceptance": a}) if word else not signs(funnel={"acceptance": a})


def test_what_the_teachers_disagree_about_and_what_all_of_them_fail():
    two = signs(
        statistics=[
            {"source": "s", "teacher": "t", "acceptance": 0.9},
            {"source": "s", "teacher": "u", "acceptance": 0.6},
        ],
        correlation=0.2,
        failed=[
            {
                "fails on": "every sample",
                "t": 3,
                "u": 40,
                "both": 3,
                "both, if independent": 1.2,
                "of": 400,
            }
        ],
    )
    assert "not accepted alike: t on s 90%, u on s 60%." in two
    assert "correlate by 0.20: they disagree" in two
    assert (
        "Fails on every sample: t 3, u 40, both 3, both, if independent 1.2, of 400 questions."
        in two
    )


def test_what_was_skipped_is_counted():
    skipped_signs = signs(
        sources=[
            {"source": "a", "split": "train", "found": None},
            {"source": "b", "split": "test", "found": 7.0},
        ],
        skipped=["no GPU here"],
    )
    assert "not at hand: 1 of 2 sources (a:train)." in skipped_signs
    assert "Skipped: no GPU here" in skipped_signs


# The paper's own tables


def test_inconsistencies_are_those_that_a_plain_sum_finds():
    found = {(r["table"], r["category"], r["column"]): r for r in find_inconsistencies()}
    for n in (1, 2):
        rows = list(csv.DictReader(shipped("paper", f"table{n}.csv").open()))
        for o in (r for r in rows if r["task"] == "Overall"):
            for column in [k for k in o if k not in ("category", "task")]:
                cells = [
                    r[column]
                    for r in rows
                    if r["category"] == o["category"] and r["task"] != "Overall"
                ]
                if o[column] and all(cells):
                    assert ((n, o["category"], column) in found) == (
                        abs(sum(map(float, cells)) / len(cells) - float(o[column])) > 0.0101
                    )
    assert found[2, "multimodal_classification", "HuatuoGPT-Vision-7B"]["mean"] == 39.65


# Other seeds


@pytest.fixture
def places(own_places, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_NOTEBOOKS", str(tmp_path / "nbs"))
    (tmp_path / "nbs").mkdir()
    write_notebook(tmp_path / "nbs" / "42_b.ipynb")
    (tmp_path / "smoke.yaml").write_text("sections: {42_b: {}, 42_c: {}}", encoding="utf-8")
    write_notebook(tmp_path / "nbs" / "42_c.ipynb")
    return tmp_path


def put(folder, claims, code="old", section="42_b", rows=(), **facts):
    write_results(folder, claims, list(rows), code, section, **facts)
    for part in ("", "-findings"):
        (folder / "figures" / f"{section}{part}.png").write_bytes(b"\x89PNG")


def test_outcomes_that_changed_under_other_seeds_are_named(places):
    out = places / "out"
    put(out / "smoke", [claim("a"), claim("b"), claim("only here")])
    put(out / "smoke@1", [claim("a"), claim("b", "undecided", 0.02)])
    put(out / "reference" / "smoke@2", [claim("a", "disagrees", -0.3)], code="new")
    put(out / "smoker@1", [claim("a", "disagrees")])
    found = gather_report(str(places / "smoke.yaml"))
    assert found["other_seeds"] == [
        {
            "recipe": "smoke@1",
            "claims": 2,
            "other_code": [],
            "changed": [
                {"section": "42_b", "claim": "b", "here": "agrees +10.0", "there": "undecided +2.0"}
            ],
        },
        {"recipe": "smoke@2", "claims": 0, "other_code": ["42_b"], "changed": []},
    ]
    text = format_report(str(places / "smoke.yaml"))
    assert "Run again with other seeds as `smoke@1`: 1 of 2 outcomes changed." in text
    assert "42_b: b: agrees +10.0, as smoke@1 undecided +2.0" in text
    assert "not compared, since their code differs: 42_b" in text
    assert "undecided +2.0" in render_report(found)
    assert "<details open><summary>Outcomes that changed" in render_report(found)


def test_values_that_the_recipe_gave_otherwise_are_reported(places):
    out = places / "out" / "smoke"
    put(out, [claim("a")])
    (out / "cards").mkdir()
    common = json.loads(json.dumps(asdict(load_recipe(str(places / "smoke.yaml")).common)))

    def card(**changed):
        return (out / "cards" / "42_b.json").write_text(
            json.dumps({"params": {"common": common | changed, "scalars": {}}}), encoding="utf-8"
        )

    card()
    assert not gather_report(str(places / "smoke.yaml"))["sections"][0]["values_moved"]
    card(batch=32)
    assert gather_report(str(places / "smoke.yaml"))["sections"][0]["values_moved"] == [
        "batch 32, now 8"
    ]
    assert (
        "The recipe gave other values when these results were made: 42_b (batch 32, now 8)."
        in " ".join(format_report(str(places / "smoke.yaml")).split())
    )


def test_a_file_of_older_code_has_its_verdicts_read_as_outcomes(places):
    old = claim("a", "undecided", 0.02)
    old["verdict"] = old.pop("outcome")
    put(places / "out" / "smoke", [old])
    read = gather_report(str(places / "smoke.yaml"))["sections"][0]["claims"][0]
    assert read["outcome"] == "undecided"
    assert "verdict" not in read


def test_a_recipe_with_other_seeds_is_compared_with_the_first(places):
    put(places / "out" / "smoke", [claim("a")])
    put(places / "out" / "smoke@1", [claim("a", "undecided", 0)])
    there = latest_results(Recipe("smoke@1"), "42_b")[2]
    assert compare_seeds(Recipe("smoke@1"), [there])[0]["changed"] == [
        {"section": "42_b", "claim": "a", "here": "undecided +0.0", "there": "agrees +10.0"}
    ]


def test_other_seeds_move_every_seed_and_nothing_else():
    import octomed.clinic.students  # noqa: F401 - registers the students
    from octomed.evaluate.arms import Arm, declare_evaluation
    from octomed.evaluate.results import give_seeds

    a, b = load_recipe("smoke"), load_recipe("smoke@3")
    assert b.name == "smoke@3"
    assert b.common.base_seed == 3
    assert b.sections == a.sections
    one = Arm(((a.common.train[0], 4),))
    first, second = (
        declare_evaluation(give_seeds(one, 1, r.common)[0], r.common.benchmarks[0], r.common).params
        for r in (a, b)
    )
    assert first["sampling"].seed != second["sampling"].seed
    assert first["student"].params["seed"] != second["student"].params["seed"]
    assert first["data"] == second["data"]
    with pytest.raises(UsageError, match="there is no recipe smke"):
        load_recipe("smke@3")


# The page


class Page(HTMLParser):
    "Counts tags, keeps images, and sees that every tag is closed by its own."

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.images, self.ids, self.links = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.seen.append(tag)
        if tag == "img":
            self.images.append(a)
        if "id" in a:
            self.ids.append(a["id"])
        if tag == "a":
            self.links.append(a["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_shows_everything(places):
    cost = [{"model": "m<1>", "tokens": 12345, "money": None, "per_sample": {"tokens": 7.5}}]
    put(
        places / "out" / "smoke",
        [claim("a")],
        rows=[
            line(
                vote=0.7,
                vote_interval=[0.6, 0.8],
                votes=10,
                graded=0.55,
                graded_interval=[0.5, 0.6],
            ),
            line("z", in_order=0.5, shuffled=0.5, moved=0.0),
        ],
        cost=cost,
        filters={"student": {"in": 9, "kept": 4}},
        correlation=0.4,
        statistics=[["named", "9"]],
    )
    text = write_report_page(str(places / "smoke.yaml")).read_text(encoding="utf-8")
    p = Page()
    p.feed(text)
    assert not p.open
    assert len(p.images) == 2
    assert all(i["src"].startswith("data:image/") for i in p.images)
    assert len({i["alt"] for i in p.images}) == 2
    assert all(link[1:] in p.ids for link in p.links if link.startswith("#"))
    assert "42_b" in p.ids
    assert not {"script", "link", "iframe"} & set(p.seen)
    for words in (
        "70.0 (60.0–80.0)",
        "55.0 (50.0–60.0)",
        "12,345",
        "m&lt;1&gt;",
        "What each filter keeps and drops",
        "tokens 7.5",
        "octomed run",
        "--only 42_b",
        "Does not prove: much",
        "No results yet of 1 of 2 sections: 42_c",
        "prints 46.39 as HuatuoGPT-Vision-7B",
    ):
        assert words in text, words
    assert text.index("the main figure") < text.index("difference with its interval and outcome")


def test_the_text_is_read_at_120_columns(places):
    put(
        places / "out" / "smoke",
        [
            claim(
                "a claim that goes on for quite a while, "
                "until it has filled more than one line of the terminal"
            )
        ],
        rows=[
            line(
                benchmark=b,
                vote=0.7,
                vote_interval=[0.6, 0.8],
                votes=10,
                paper=0.4,
                in_order=0.5,
                shuffled=0.5,
                moved=0.0,
            )
            for b in ("medxpertqa_text:test", "Overall")
        ],
    )
    text = format_report(str(places / "smoke.yaml"))
    tables = [row for row in text.splitlines() if re.match(r"(arm|x|claim|a claim) ", row)]
    assert tables
    assert max(map(len, tables)) <= 120
    assert "Does not prove: much" in text
    assert "made by: octomed run" in text


def test_rows_without_a_vote_have_no_column_for_it():
    rows = [score_row(line()), score_row(line(benchmark="Overall"))]
    assert list(drop_empty_columns(rows)[0]) == [
        "arm",
        "benchmark",
        "n",
        "runs",
        "accuracy",
        "interval",
        "chance",
    ]
    assert rows[1]["benchmark"] == "Overall, text only"


def test_a_vote_shows_both_overalls():
    shown = score_row(
        line(benchmark="Overall", accuracy=0.678, vote=0.71, vote_interval=[0.7, 0.72], votes=10)
    )
    assert (shown["accuracy"].strip(), shown["by vote"].strip()) == ("67.8", "71.0 (70.0–72.0)")


def test_the_reference_that_is_kept_makes_a_whole_page(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "nowhere"))
    kept = sorted((root() / "outputs" / "reference" / "course" / "results").glob("*.json"))
    text = write_report_page("course").read_text(encoding="utf-8")
    p = Page()
    p.feed(text)
    assert not p.open
    assert {f.stem for f in kept} <= set(p.ids)
    assert len(p.images) >= 2 * len(kept)
    spoken = [i["alt"] for i in p.images if "each claim" in i["alt"]]
    assert spoken and all(
        re.search(r"\d+ (agrees|disagrees|holds|fails|undecided|not tested)", s) for s in spoken
    )
    assert str(root()) not in text


def test_a_committed_section_shows_what_its_run_showed_and_its_pictures_have_words(tmp_path):
    from octomed.run.sections import Section

    picture = nbformat.v4.new_output("display_data", {"image/png": "…"})
    progress = nbformat.v4.new_output("stream", text="40 of 600", name="stderr")
    cells = [
        nbformat.v4.new_code_cell('section = start_section("44_samples", recipe, out)'),
        nbformat.v4.new_code_cell("section.judge()"),
        nbformat.v4.new_code_cell("an edited cell"),
    ]
    path = tmp_path / "44_samples.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for cell in cells[1:]:
        cell.outputs = [progress, picture]
    cells[2].source = "what the run had"
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run / "44_samples.ipynb")
    card = {"commit": "0123abc", "hardware": "2 cores", "minutes": 8.2}
    results = {"section": "44_samples", "recipe": "course", "card": card}
    (run / "results" / "44_samples.json").write_text(json.dumps(results))

    show_in_notebook(Section("44_samples", path), run)

    kept = [cell["outputs"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert "commit 0123abc" in "".join(kept[0][0]["data"]["text/markdown"])
    assert [o["metadata"]["image/png"]["alt"][:11] for o in kept[1]] == ["44_samples:"]
    assert kept[2] == []  # the run had other code


def test_a_table_of_scores_names_split_prompt_pixels_and_sampling():
    from octomed.core.recipe import load_recipe
    from octomed.run.report import describe_scoring
    from octomed.run.sections import find_sections

    recipe = load_recipe("smoke")
    section = next(s for s in find_sections(recipe) if s.name.startswith("42"))
    caption = describe_scoring(section, recipe)
    common = recipe.common
    assert f"images of at most {common.max_pixels:,} pixels" in caption
    assert f"temperature {common.temperature}, top-p {common.top_p}" in caption
    assert "prompt cot, direct" in caption and "named with its split" in caption


# A recipe that only tries the code.


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("smoke", "smoke: not a finding"),
        ("smoke@2", "smoke: not a finding"),
        ("/my/smoke.yaml", "smoke: not a finding"),
        ("course-rehearsal", "rehearsal: not a finding"),
        ("course", ""),
        ("smoker", ""),
    ],
)
def test_which_recipes_only_try_the_code(name, mark):
    assert mark_trial(name) == mark


def test_smokes_outcomes_do_not_look_like_results(places):
    put(places / "out" / "smoke", [claim("a"), claim("b", "disagrees", -0.2)])
    name = str(places / "smoke.yaml")
    page = write_report_page(name).read_text(encoding="utf-8")
    body = page.partition("<body>")[2]
    assert body.count("smoke: not a finding") >= 4  # two claims, the link, the summary
    assert '<main class="trial">' in body
    assert not re.search(r"agrees|undecided|interval of the difference", body)
    for text in (format_report(name), format_summary(name)):
        assert "smoke: not a finding" in text
        assert not re.search(r"\b(agrees|disagrees|undecided)\b", text)
    assert "octomed report course --html" in body


def test_smokes_page_links_the_page_of_the_reference_run(places, monkeypatch):
    put(places / "out" / "smoke", [claim("a")])
    put(places / "out" / "reference" / "course", [claim("found by the course")])
    course = places / "course.yaml"
    course.write_text("sections: {42_b: {}}", encoding="utf-8")
    real = report_html.gather_report
    monkeypatch.setattr(
        report_html,
        "gather_report",
        lambda name, *rest: real(str(course) if name == "course" else name, *rest),
    )
    page = write_report_page(str(places / "smoke.yaml"))
    parsed = Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    [link] = [link for link in parsed.links if link.endswith("report.html")]
    linked = (page.parent / link).read_text(encoding="utf-8")
    assert "found by the course" in linked
    assert "not a finding" not in linked


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not JSON in line 1"),
        ('{\n<<<<<<< HEAD\n"claims": []}', "is not JSON in line 2"),
        ("{}", "lacks section, claims, rows, card"),
        ("[]", "lacks section, claims, rows, card"),
    ],
)
def test_results_that_cannot_be_read_are_named(places, text, sentence):
    put(places / "out" / "smoke", [claim("a")])
    path = places / "out" / "smoke" / "results" / "42_b.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OctomedError) as caught:
        gather_report(str(places / "smoke.yaml"))
    assert str(caught.value).startswith(f"{path} {sentence}")
    assert "remove it and run its section again" in str(caught.value)


def test_results_with_a_byte_order_mark_are_read(places):
    put(places / "out" / "smoke", [claim("a")])
    path = places / "out" / "smoke" / "results" / "42_b.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert gather_report(str(places / "smoke.yaml"))["sections"][0]["claims"]


def test_a_section_with_facts_about_traces_has_no_link_made_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "nowhere"))
    page = Page()
    page.feed(write_report_page("course").read_text(encoding="utf-8"))
    assert page.links and all(len(link) < 200 and "{" not in link for link in page.links)
