"""The trace browser: its index, what it says of a sample, its page, and the page in a browser."""

import base64
import gzip
import json
import re
import shutil
import struct

import numpy as np
import pytest
from toys import ToyEngine

import octomed.clinic.questions
import octomed.clinic.teachers  # noqa: F401 - the imports register what the clinic has
from octomed.clinic.teachers import check_reasoning, locate_facts, read_facts
from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError, shipped
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.data.sources import load
from octomed.distill.pools import questions as questions_stage
from octomed.distill.pools import take_subset
from octomed.distill.rejection import name_status
from octomed.distill.sampling import samples as samples_stage
from octomed.generate.answers import Verdict, explain_verdict, judge
from octomed.generate.engines import find_teacher_revision, register_teacher
from octomed.generate.samples import Sampling
from octomed.generate.steps import Reasoning, Step, check_steps, register_step_check
from octomed.run.cli import main
from octomed.run.trace_index import (
    STATUS_NAMES,
    SampleSet,
    describe_question,
    find_stage_folder,
    mark_segments,
    open_samples,
    pack_pieces,
    read_shown,
)
from octomed.run.trace_page import (
    MARKS,
    render_plain,
    section_page,
    write_section_pages,
    write_trace_page,
)

HOSTILE = "<script>window.harmed = true</script><image> \U0001d518 </mark><b>bold</b>"


class Talker(ToyEngine):
    "Answers in ways that a page may stumble over; what it says depends on the index alone."

    model, name = "tests/talker@1", "toy"

    def answer(self, request, index):
        texts = [
            ("<think>It is A.</think>\n\n<answer>A</answer>", "stop"),
            (f"<think>{HOSTILE}</think><answer>B</answer>", "stop"),
            ("<think>It never ends", "length"),
            ("<think>Well.</think>I would rather not say.", "stop"),
            ("I cannot help.", "refused"),
        ]
        text, finish = texts[index % len(texts)]
        return text, finish, 10 * (index + 1)


register_teacher("tests/talker", Talker, revision="1")


def declare_samples(spec, amount, teacher, form="r1", n=5):
    "A stage of samples of a source's questions."
    from octomed.evaluate.arms import identify_source

    pool = questions_stage(
        sources=((spec, amount, identify_source(spec)),), against=(), seed=0, max_pixels=12_544
    )
    row = (teacher, find_teacher_revision(teacher), form)
    return samples_stage(
        questions=pool,
        teachers={"text": row, "image": row},
        n=n,
        sampling=Sampling(max_tokens=200),
        max_pixels=12_544,
    )


@pytest.fixture(scope="module")
def drawn():
    "The stages of two teachers' samples of the same twelve questions."
    stages = [
        declare_samples("clinic_rounds:test", 12, "tests/talker"),
        declare_samples("clinic_rounds:test", 12, "clinic/instruct", form="gpt4o"),
    ]
    for stage in stages:
        run_stage(stage)
    return stages


@pytest.fixture(scope="module")
def page(drawn, tmp_path_factory):
    "A page of ten of the twelve questions, with both teachers side by side."
    file = tmp_path_factory.mktemp("page") / "traces.html"
    return write_trace_page(open_samples(*drawn), file, limit=10)


# Why a verdict


@pytest.mark.parametrize(
    "text, rule, read",
    [
        (r"So \boxed{B}. Done.", "boxed", r"\boxed{B}"),
        ("<answer>B</answer> and so on", "answer", "<answer>B</answer>"),
        ("First.\nThe answer is B.\nBye", "phrase", "The answer is B."),
        ("  B: no  ", "whole", "B: no"),
        ("I looked.\nIt is (B) no", "whole", "It is (B) no"),
        (r"<think>\boxed{A}</think> \boxed{B}", "boxed", r"\boxed{B}"),
    ],
)
def test_the_characters_that_were_read(text, rule, read):
    why = explain_verdict(text, ["yes", "no"], "B")
    assert (why.verdict.letter, why.rule, text[why.start : why.end]) == ("B", rule, read)


@pytest.mark.parametrize(
    "text, reason",
    [
        (r"It is not \boxed{B}.", "take it back"),
        (r"\boxed{A} or \boxed{B}", "another letter is joined"),
        (r"\boxed{maybe}", "holds no option, or several"),
        ("The answer is unclear.", "names no option beyond doubt"),
        ("Who knows?", "no box, tag or phrase"),
    ],
)
def test_why_nothing_was_read(text, reason):
    why = explain_verdict(text, ["yes", "no"], "B")
    assert why.verdict == Verdict(None, "unparsed") and reason in why.reason


def test_a_thought_that_does_not_end_is_explained():
    why = explain_verdict(r"<think>\boxed{B}", ["yes", "no"], "B", think_first=True)
    assert why.rule is None and "</think>" in why.reason


def test_a_further_question_is_marked_as_unread():
    text = "Answer: B\n\nQuestion: Which nerve is it?\nAnswer: A"
    why = explain_verdict(text, ["yes", "no"], "B")
    segments = mark_segments(text, why, None)
    assert "".join(s["text"] for s in segments) == text
    assert segments[-1] == {"text": text[why.stop :], "part": "unread"}


def test_the_explanation_has_the_verdict_of_the_parser():
    for case in read_jsonl(shipped("answers", "golden.jsonl")):
        how = {"think_first": case["think_first"]}
        how |= {"forms": case["forms"]} if "forms" in case else {}
        why = explain_verdict(case["text"], case["options"], answer=case["answer"], **how)
        assert why.verdict == judge(case["text"], case["options"], answer=case["answer"], **how)


# Steps


def test_steps_are_the_facts_of_the_clinic():
    q = take_subset(load("clinic_ward:test"), 1)[0]
    stage = declare_samples("clinic_ward:test", 1, "clinic/reasoner", n=16)
    run_stage(stage)
    [shown] = read_shown(SampleSet([stage]), 0, 1)
    for entry in shown:
        text = entry.sample.text
        assert [fact for _, _, fact in locate_facts(text)] == read_facts(text)
        reasoning = check_reasoning(q.id, text)
        if reasoning.is_valid:
            assert all(step.is_true for step in reasoning.steps)
    assert {entry.status for entry in shown} & {"wrong"}


def test_steps_only_where_somebody_knows_the_world():
    q = Question("stem", ("a", "b"), "A", source="medqa", split="test", category="text_only")
    assert check_steps(q, "It is A.") is None
    unknown = Question("?", ("a", "b"), "A", "clinic_ward", split="test", category="text_only")
    assert check_steps(unknown, "It is A.") is None


def test_a_step_is_one_segment():
    text = "<think>a b. c d.</think>A"
    reasoning = Reasoning((Step(7, 10, "first", is_true=True),), is_valid=False, note="")
    why = explain_verdict(text, ["a", "b"], "A", think_first=True)
    segments = mark_segments(text, why, reasoning)
    assert [s["text"] for s in segments if s.get("step") == 0] == ["a b"]


def test_a_check_can_be_registered():
    register_step_check("tests_world", lambda id, text: Reasoning((), is_valid=True, note=id))
    q = Question("stem", ("a", "b"), "A", source="tests_world", split="test", category="text_only")
    assert check_steps(q, "").note == q.id


# The index


def test_the_index_has_every_sample(drawn):
    samples = open_samples(*drawn)
    [piece] = pack_pieces(samples)
    [size] = struct.unpack("<I", piece[:4])
    head, n = json.loads(piece[4 : 4 + size]), samples.count_samples()
    assert n == 12 * 10 and len(piece) == 4 + size + 6 * n and size % 4 == 0
    tokens = np.frombuffer(piece, "<u4", count=n, offset=4 + size)
    statuses = np.frombuffer(piece, "u1", count=n, offset=4 + size + 4 * n)
    columns = np.frombuffer(piece, "u1", count=n, offset=4 + size + 5 * n)
    shown = [entry for own in read_shown(samples, 0, 12) for entry in own]
    assert tokens.tolist() == [entry.sample.tokens for entry in shown]
    assert [STATUS_NAMES[status] for status in statuses] == [entry.status for entry in shown]
    assert columns.tolist() == ([0] * 5 + [1] * 5) * 12
    assert head["counts"] == [10] * 12
    assert [row[0] for row in head["questions"]] == [q.id for q in samples.questions]


def test_every_status_has_a_mark_in_python_and_in_the_browser():
    script = shipped("browser", "traces.js").read_text(encoding="utf-8")
    block = re.search(r"const MARKS = \{(.*?)\};", script, re.DOTALL)[1]
    assert dict(re.findall(r'(\w+): "(.)"', block)) == MARKS
    assert set(MARKS) == set(STATUS_NAMES)


def test_a_question_in_full(drawn):
    samples = open_samples(drawn[0])
    described = describe_question(samples, 0)
    statuses = [sample["status"] for sample in described["samples"]]
    assert statuses[2:] == ["truncated", "unparsed", "refused"]
    assert described["images"][0]["alt"].endswith("image 1 of 1 of this question")
    hostile = described["samples"][1]
    assert HOSTILE in "".join(segment["text"] for segment in hostile["segments"])
    read = [segment["text"] for segment in hostile["segments"] if segment.get("read")]
    assert read == ["<answer>B</answer>"] and "Rule “answer”" in hostile["reason"]
    assert "reasoning" not in described["samples"][4]


# Which stage


def test_stages_by_name_key_and_folder(drawn):
    stage = drawn[0]
    for name in (stage, stage.folder, str(stage.folder), stage.folder.name, stage.key[:10]):
        assert find_stage_folder(name) == stage.folder.resolve()


def test_a_stage_that_cannot_be_shown_says_what_to_do(drawn):
    with pytest.raises(UsageError, match="octomed traces"):
        find_stage_folder("nothing-like-it")
    with pytest.raises(UsageError, match="stands for"):
        find_stage_folder("samples-")
    with pytest.raises(UsageError, match="holds no samples"):
        open_samples(drawn[0].params["questions"])
    with pytest.raises(OctomedError, match="not made yet"):
        open_samples(declare_samples("clinic_rounds:test", 3, "tests/talker"))
    with pytest.raises(UsageError, match="no stage is named"):
        open_samples()


def test_a_ledger_that_lacks_samples_says_so(drawn, tmp_path, monkeypatch):
    samples = open_samples(drawn[0])
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    with pytest.raises(OctomedError, match="ledger lacks"):
        read_shown(samples, 0, 1)


def test_an_evaluation_is_shown_with_its_own_verdicts(drawn):
    from octomed.evaluate.arms import identify_source
    from octomed.evaluate.evaluate import Respondent, evaluation

    stage = evaluation(
        student=Respondent("tests/talker"),
        benchmark="clinic_reading:test",
        limit=4,
        form="cot",
        seeds=5,
        sampling=Sampling(max_tokens=200),
        max_pixels=12_544,
        data=identify_source("clinic_reading:test"),
    )
    rows = {row["question"]: row for row in read_jsonl(run_stage(stage) / "rows.jsonl")}
    samples = open_samples(stage.folder)
    assert len(samples) == 4
    for q, own in zip(samples.questions, read_shown(samples, 0, 4), strict=True):
        statuses = [name_status(entry.sample, entry.verdict) for entry in own]
        assert statuses == rows[q.id]["statuses"]
    report = {"recipe": "smoke", "sections": [{"section": "s", "card": {"parents": [stage.key]}}]}
    assert write_section_pages(report, "smoke", limit=2) == {"s": section_page("smoke", "s")}
    assert json.loads(unpack(section_page("smoke", "s"), "summary"))["held"] == 2


# The page


def unpack(page, name):
    text = page.read_text(encoding="utf-8")
    return re.search(rf'id="octomed-{name}">(.*?)</script>', text, re.DOTALL)[1]


def test_the_page_says_how_much_it_holds(page):
    summary = json.loads(unpack(page, "summary"))
    assert (summary["held"], summary["total"]) == (10, 12)
    assert (summary["held_samples"], summary["samples"]) == (100, 120)
    described = json.loads(gzip.decompress(base64.b64decode(unpack(page, "chunk-0"))))
    assert [question["place"] for question in described] == list(range(10))


def test_markup_of_a_response_is_text(page, drawn):
    assert "<script>window.harmed" not in page.read_text(encoding="utf-8")
    plain = render_plain(open_samples(drawn[0]))
    assert "&lt;script&gt;window.harmed" in plain and "<script" not in plain
    assert "<image>" not in plain and 'alt="' in plain


def test_the_command_lists_stages_and_writes_a_page(drawn, tmp_path, capsys):
    assert main(["traces"]) == 0
    assert drawn[0].folder.name in capsys.readouterr().out
    file = tmp_path / "page.html"
    assert main(["traces", drawn[0].folder.name, "--html", str(file), "--limit", "3"]) == 0
    assert "3 of 12 questions" in capsys.readouterr().out and file.exists()
    assert main(["traces", drawn[0].folder.name]) == 2
    assert main(["traces", "--html", str(file)]) == 2


# The widget


@pytest.fixture
def browser(drawn):
    "A widget, and what it sends."
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    from octomed.run.traces import browse

    widget = browse(*drawn)
    widget.wait()
    sent = []
    widget.send = lambda message, buffers=(): sent.append((message, list(buffers)))
    return widget, sent


def test_the_widget_answers(browser):
    widget, sent = browser
    name = widget.samples.questions[0].images[0]
    for message in (
        {"kind": "pieces"},
        {"kind": "question", "to": "question 2", "place": 2},
        {"kind": "image", "to": f"image {name}", "name": name},
        {"kind": "image", "to": "image none", "name": "name:none"},
    ):
        widget._answer(widget, message, [])
    kinds = [message["kind"] for message, _ in sent]
    assert kinds == ["piece", "question", "image", "image"]
    assert sent[0][1] == list(pack_pieces(widget.samples))
    assert sent[1][0]["question"] == describe_question(widget.samples, 2)
    assert sent[2][1][0].startswith(b"\x89PNG") and sent[3][1] == []


def test_the_widget_reports_what_is_missing(browser, tmp_path, monkeypatch):
    widget, sent = browser
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    widget._answer(widget, {"kind": "question", "to": "question 2", "place": 2}, [])
    assert sent[0][0]["kind"] == "error" and "ledger lacks" in sent[0][0]["text"]


# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    "A browser without a window."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            # the sandbox needs rights that a container lacks, and the page is our own file
            launched = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no chromium is here: {str(error).splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture
def opened(chromium, page):
    "The page, opened from its file without a network, and the errors of its script."
    tab = chromium.new_page(viewport={"width": 1300, "height": 900})
    errors = []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.route("http*://**", lambda route: route.abort())
    tab.goto(page.as_uri())
    tab.wait_for_selector(".ot-card")
    yield tab
    assert not errors
    tab.close()


def heading(tab):
    return tab.inner_text(".ot-panel h3")


def wait_for_question(tab, number):
    tab.wait_for_function(
        "n => document.querySelector('.ot-panel h3')?.innerText === `Question ${n}`", arg=number
    )


def test_the_page_works_by_keyboard(opened):
    assert "10 of 12 questions, 100 of 120 samples, 2 models are on this page" in (
        opened.inner_text(".ot-amounts")
    )
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    wait_for_question(opened, 3)
    opened.keyboard.press("ArrowLeft")
    wait_for_question(opened, 2)
    opened.keyboard.press("Escape")
    opened.keyboard.press("End")
    wait_for_question(opened, 10)
    opened.keyboard.press("ArrowUp")
    wait_for_question(opened, 9)
    chosen = opened.get_attribute(".ot-list", "aria-activedescendant")
    assert opened.get_attribute(f"#{chosen}", "aria-selected") == "true"
    opened.keyboard.press("/")
    assert opened.evaluate("document.activeElement.type") == "search"
    opened.keyboard.type("no question says this")
    assert "No question matches" in opened.inner_text(".ot-panel")
    opened.keyboard.press("Escape")
    assert opened.get_attribute(":focus", "role") == "listbox"


def test_filters(opened):
    def count():
        return int(opened.inner_text(".ot-count").split()[0])

    assert count() == 10
    opened.get_by_label("A sample is").select_option(label="⊘ refused")
    assert count() == 10 and opened.locator(".ot-card").count() < 10
    assert set(opened.locator(".ot-status").all_inner_texts()) == {"⊘ refused"}
    opened.get_by_role("button", name="Show all 10").click()
    assert opened.locator(".ot-card").count() == 10
    opened.get_by_role("button", name="Clear filters").click()
    opened.wait_for_function("document.querySelectorAll('.ot-card').length === 10")
    opened.get_by_label("of", exact=True).select_option(label="tests/talker · r1")
    opened.get_by_label("Tokens of a sample, at least").fill("50")
    opened.wait_for_function("document.querySelectorAll('.ot-card').length === 1")
    opened.get_by_label("Tokens of a sample, at least").fill("51")
    assert count() == 0
    opened.get_by_label("Tokens of a sample, at least").fill("")
    opened.get_by_label("Correct samples, at least").fill("1")
    right = count()
    opened.get_by_label("Correct samples, at least").fill("")
    opened.get_by_label("Correct samples, at most").fill("0")
    assert right + count() == 10


def test_a_response_is_never_markup(opened):
    text = opened.locator(".ot-text", has_text="window.harmed").first
    assert HOSTILE in text.inner_text()
    assert opened.evaluate("window.harmed === undefined")
    assert opened.locator(".ot-text script, .ot-text b, .ot-text image").count() == 0


def test_nothing_is_said_by_colour_alone(opened):
    for status in opened.locator(".ot-card .ot-status").all():
        mark, word = status.inner_text().split()
        assert MARKS[word] == mark
    assert opened.locator("mark").count() == opened.get_by_text("read here").count() > 0
    assert opened.locator(".ot-asked img").get_attribute("alt")
    steps = opened.locator(".ot-step").count()
    tags = opened.get_by_text(re.compile(r"\(true step: |false: ")).count()
    assert steps == tags > 0


def test_a_phone_has_nothing_wider_than_its_screen(opened):
    opened.set_viewport_size({"width": 390, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_a_script_the_first_question_is_there(chromium, page):
    tab = chromium.new_context(java_script_enabled=False).new_page()
    tab.goto(page.as_uri())
    assert "Question 1 of 12" in tab.inner_text("main")
    tab.locator("summary").nth(1).click()
    assert HOSTILE in tab.inner_text("main")
