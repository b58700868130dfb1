"""Three readings of a student: what it writes, what it finds likeliest, and what it could guess."""

from dataclasses import replace

import pytest
import torch
from toys import ToyEngine, chat, register_toy_source

from octomed.core.files import read_jsonl
from octomed.core.paths import UsageError
from octomed.core.recipe import Common
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.distill.rejection import write_in_box
from octomed.evaluate import evaluate as module
from octomed.evaluate.claims import Claim, judge_claim
from octomed.evaluate.evaluate import evaluation, score_runs, take_likelihoods
from octomed.evaluate.results import Results
from octomed.evaluate.tables import tabulate_scores
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.engines import ChatPrompt, Likelihood
from octomed.generate.forced_choice import (
    ForcedQuestion,
    force_choices,
    keep_thought,
    write_continuations,
)
from octomed.generate.models import find_turn_end, tokenize_chat
from octomed.generate.prompts import (
    convert_to_boxed,
    load_template,
    make_direct_target,
    write_messages,
)
from octomed.generate.render import build_inputs, continue_thought, render_row, write_chat
from octomed.generate.samples import Sampling
from octomed.train.students import save_student

PIXELS = 12_544
COT, DIRECT = load_template("cot"), load_template("direct")
QS = [
    Question(
        stem=f"which is it ? {n}",
        options=("fever", "rash", "the rash", "one"),
        answer="ABCD"[n % 4],
        source="toyread",
        split="test",
        category="text_only",
    )
    for n in range(8)
]
register_toy_source("toyread", "test", "benchmark", QS)


# --- what is kept of a response


@pytest.mark.parametrize(
    "text, form, kept",
    [
        ("<think>x</think>\n\n\\boxed{A}", "cot", "<think>x</think>"),
        ("<think>x</think>\n\nIt is fever: \\boxed{A}", "cot", "<think>x</think>"),
        ("<think>x</think> y</think>\n\n\\boxed{A}", "cot", "<think>x</think> y</think>"),
        ("<think>x\n</think>\n\n", "cot", "<think>x\n</think>"),  # a forced exit
        ("<think>x, and", "cot", "<think>x, and\n</think>"),
        ("<think>so \\boxed{A}", "cot", "<think>so\n</think>"),
        ("", "cot", "\n</think>"),
        ("\\boxed{A}", "direct", ""),
        ("The answer is \\boxed{A}.", "direct", "The answer is"),
        ("fever", "direct", "fever"),
        ("", "direct", ""),
        ("<think>x</think>\\boxed{A}", "direct", "<think>x</think>"),
    ],
)
def test_the_thought_is_kept_and_the_answer_is_not(text, form, kept):
    assert keep_thought(text, QS[0].letters, load_template(form)) == kept


def test_another_end_of_thinking_is_kept_as_its_model_writes_it():
    template = load_template("medgemma")
    text = "<unused94>thought\nIt itches.<unused95>It is \\boxed{B}"
    assert keep_thought(text, QS[0].letters, template) == "<unused94>thought\nIt itches.<unused95>"


@pytest.mark.parametrize("answer", ["letter", "text"])
def test_what_is_scored_is_what_is_taught(answer):
    for letter in "ABCD":
        box = write_in_box(QS[0], answer, letter)
        target = convert_to_boxed("<think>It itches.</think> so: \\boxed{A}", box)
        thought = keep_thought(target, QS[0].letters, COT)
        explained = convert_to_boxed("<think>It itches.</think>\\boxed{A}", box)
        assert thought + write_continuations(thought, [box])[0] == explained
        direct = make_direct_target(box)
        thought = keep_thought(direct, QS[0].letters, DIRECT)
        assert thought + write_continuations(thought, [box])[0] == direct


# --- likelihoods of a student that reads images


@pytest.fixture(scope="module")
def plain_engine(student, tmp_path_factory):
    "An engine on a model that reads images."
    folder = tmp_path_factory.mktemp("student")
    save_student(folder, *student, [])
    return TransformersEngine(folder, "tiny@1", max_pixels=PIXELS)


def plain_loop(engine, q, messages, thought, box):
    "The log-probability of one answer, from the tokens that the student would be taught."
    target = thought + write_continuations(thought, [box])[0]
    row = render_row(engine.processor, messages, target, PIXELS)
    ids = row.input_ids[:-1]  # without the end of the turn
    text = write_chat(engine.processor, messages, PIXELS)
    start = len(tokenize_chat(engine.processor, text + continue_thought(text, thought)))
    inputs = build_inputs(
        engine.processor, rows=[ids], images=[row.images], max_pixels=PIXELS, left=False
    )
    with torch.no_grad():
        logits = engine.net(**inputs).logits[0].float().log_softmax(-1)
    assert row.input_ids[-1] == find_turn_end(engine.processor)
    return sum(float(logits[n - 1, ids[n]]) for n in range(start, len(ids)))


@pytest.mark.parametrize("thought", ["", "<think>it is the rash .</think>"])
def test_choices_are_those_of_a_plain_loop(plain_engine, picture, thought):
    template = COT if thought else DIRECT
    pictured = replace(QS[0], images=(picture,))
    boxes = {letter: write_in_box(QS[0], "text", letter) for letter in "ABCD"}
    asked = [ForcedQuestion(write_messages(template, q), thought, boxes) for q in (QS[0], pictured)]
    choices = force_choices(plain_engine, asked)
    for entry, choice in zip(asked, choices, strict=True):
        alone = [
            plain_loop(plain_engine, QS[0], entry.messages, thought, box) for box in boxes.values()
        ]
        start = 0.0
        if not thought:  # the line break before the answer belongs to what is scored
            start = choice.logprobs[0] - alone[0]
        assert choice.logprobs == pytest.approx([x + start for x in alone], abs=1e-4)
        assert choice.letter == "ABCD"[alone.index(max(alone))]
    assert choices[0].logprobs != pytest.approx(choices[1].logprobs, abs=1e-6)


def test_a_thought_that_the_template_opened_is_ended_before_a_direct_answer(plain_engine):
    processor = plain_engine.processor
    written = processor.chat_template
    processor.chat_template = written.replace(
        "assistant\n{% endif %}", "assistant\n<think>{% endif %}"
    )
    try:
        opened = write_chat(processor, chat("which is it ?"), PIXELS)
        prompts = [ChatPrompt(chat("which is it ?"), ends_thought=True)]
        prompts.append(opened + "\n</think>\n\n")
        direct, begun = plain_engine.likelihoods(prompts, [["\\boxed{fever}"]] * 2)
    finally:
        processor.chat_template = written
    assert opened.endswith("<think>")
    assert direct[0].logprob == pytest.approx(begun[0].logprob, abs=1e-4)


# --- the evaluation


class Ponders(ToyEngine):
    "Names the right option in its thought, and never answers. It believes its thought."

    finish = "stop"

    def __init__(self, *_, **__):
        self.model = f"{type(self).__name__}@1"

    def answer(self, request, index):
        q = next(q for q in QS if q.id == request.question)
        named = q.answer_text if index == 0 else q.options[0]
        return f"<think>It is [{named}].</think>\n\n", self.finish, 5

    def likelihoods(self, prompts, continuations):
        for prompt, texts in zip(prompts, continuations, strict=True):
            boxes = [text.split("\\boxed{")[1].rstrip("}") for text in texts]
            yield [
                Likelihood(-0.25 if f"[{box}]" in prompt.beginning else -2.0, 3, False)
                for box in boxes
            ]


class Refuses(Ponders):
    finish = "refused"


class Silent(ToyEngine):
    model = "silent@1"

    def __init__(self, *_, **__):
        pass


def read_with(engine, monkeypatch, form="cot", **more):
    monkeypatch.setattr(module, "TransformersEngine", engine)
    monkeypatch.setattr(module, "student_identity", lambda s: engine.__name__)
    stage = evaluation(
        student=engine.__name__,
        benchmark="toyread:test",
        limit=None,
        form=form,
        seeds=2,
        sampling=Sampling(),
        max_pixels=PIXELS,
        data="1",
        answer="text",
        **more,
    )
    rows = read_jsonl(run_stage(stage) / "rows.jsonl")
    return sorted(rows, key=lambda row: [q.id for q in QS].index(row["question"]))


def test_an_unfinished_answer_is_read_by_likelihood(monkeypatch):
    rows = read_with(Ponders, monkeypatch, likelihood=True)
    assert score_runs(rows).mean() == 0
    read = take_likelihoods(rows)
    assert score_runs(read)[:, 0].mean() == 1  # the first thought names the answer
    assert score_runs(read)[:, 1].mean() == 0.25  # the second always the first option
    assert [row["letters"][0] for row in read] == [q.answer for q in QS]
    assert rows[0]["likelihood"]["logprobs"] == [[-0.25, -2.0, -2.0, -2.0]] * 2
    assert all(row["tokens"] == [5, 5] for row in read)


def test_a_run_that_does_not_want_it_pays_nothing(monkeypatch):
    def never(self, prompts, continuations):
        raise AssertionError("nothing is to be scored")

    monkeypatch.setattr(Ponders, "likelihoods", never)
    rows = read_with(Ponders, monkeypatch)
    assert all("likelihood" not in row for row in rows)
    with pytest.raises(UsageError, match="likelihood=True in its arm"):
        take_likelihoods(rows)


def test_a_refusal_has_no_thought_and_no_choice(monkeypatch):
    rows = read_with(Refuses, monkeypatch, likelihood=True)
    assert rows[0]["likelihood"] == {"letters": [None, None], "logprobs": [None, None]}
    assert take_likelihoods(rows)[0]["statuses"] == ["refused", "refused"]


def test_an_engine_without_likelihoods_says_so_before_anything_is_drawn(monkeypatch):
    with pytest.raises(UsageError, match="silent@1 does not say how likely given texts are"):
        read_with(Silent, monkeypatch, likelihood=True)


def both_readings(monkeypatch):
    rows = read_with(Ponders, monkeypatch, likelihood=True)
    return Results(Common(bootstrap=100), {arm: {"toyread:test": [rows]} for arm in ("a", "b")})


def test_tables_and_claims_name_their_reading(monkeypatch):
    results = both_readings(monkeypatch)
    rows = tabulate_scores(
        results, {("a", "toyread:test"): 0.5}, readings=("generated", "likelihood")
    )
    shown = {(r["arm"], r["benchmark"], r["reading"]): (r["accuracy"], r["paper"]) for r in rows}
    assert shown["a", "toyread:test", "generated"] == (0, 0.5)
    assert shown["a", "toyread:test", "likelihood"] == (0.625, None)
    claim = Claim("a beats b", a="a", b="b", benchmark="toyread:test")
    assert judge_claim(claim, results)["reading"] == "generated"
    by_likelihood = judge_claim(replace(claim, reading="likelihood"), results)
    assert (by_likelihood["reading"], by_likelihood["difference"]) == ("likelihood", 0)
    with pytest.raises(UsageError, match="choose from generated, likelihood"):
        judge_claim(replace(claim, reading="guessed"), results)
