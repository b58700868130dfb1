"""Three readings of a student: what it writes, what it finds likeliest, and what it could guess."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toys import WORDS, ToyEngine, chat, register_toy_source

import octomed.clinic.manners
import octomed.clinic.students  # registers the clinic's students
import octomed.clinic.teachers  # noqa: F401 - registers its questions and teachers
from octomed.clinic.students import Size, build_student
from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError
from octomed.core.recipe import Common, Recipe
from octomed.core.store import run_stage
from octomed.data.images import store_image
from octomed.data.questions import Question
from octomed.data.resize import find_family
from octomed.distill.rejection import write_in_box
from octomed.distill.sampling import make_requests
from octomed.evaluate import evaluate as module
from octomed.evaluate.arms import Arm, declare_stages
from octomed.evaluate.chance import (
    Chance,
    declare_chance,
    find_chance_arm,
    measure_beyond_chance,
    measure_chance,
)
from octomed.evaluate.claims import Claim, judge_claim
from octomed.evaluate.evaluate import READINGS, evaluation, score_runs, take_likelihoods
from octomed.evaluate.faithfulness import (
    measure_area,
    measure_faithfulness,
    split_thought,
    summarise_faithfulness,
)
from octomed.evaluate.figures import draw_accuracies
from octomed.evaluate.results import Results, run_arms
from octomed.evaluate.tables import is_at_chance, rows_at_chance, tabulate_scores
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
from octomed.generate.render import (
    build_inputs,
    continue_thought,
    join_texts,
    list_chat_images,
    load_rows,
    render_row,
    write_chat,
)
from octomed.generate.samples import Sampling
from octomed.run.exports import collect_traces
from octomed.train.schedule import Schedule
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
def folder(student, tmp_path_factory):
    "A tiny student that reads images, as it is saved."
    path = tmp_path_factory.mktemp("student")
    save_student(path, *student, [])
    return path


@pytest.fixture(scope="module")
def plain_engine(folder):
    return TransformersEngine(folder, "tiny@1", max_pixels=PIXELS)


def plain_loop(engine, messages, thought, box):
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
        alone = [plain_loop(plain_engine, entry.messages, thought, box) for box in boxes.values()]
        start = 0.0
        if not thought:  # the line break before the answer belongs to what is scored
            start = choice.logprobs[0] - alone[0]
        assert choice.logprobs == pytest.approx([x + start for x in alone], abs=1e-4)
        assert choice.letter == "ABCD"[alone.index(max(alone))]
    assert choices[0].logprobs != pytest.approx(choices[1].logprobs, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_prompts_of_other_families_are_read_once_for_all_options(family, tmp_path):
    size = Size(64, 2, 4, 2, 128, 64, 2)
    model, processor = build_student([WORDS, WORDS.lower()], size, 0, PIXELS, family)
    save_student(tmp_path, model, processor, [])
    engine = TransformersEngine(tmp_path, f"{family}@1", max_pixels=PIXELS)
    noise = Image.effect_noise((120, 100), 60).convert("RGB")
    shown = store_image(noise, max_pixels=PIXELS, family=find_family(processor))
    boxes = {letter: write_in_box(QS[0], "text", letter) for letter in "ABCD"}
    thought = "<think>it is the rash .</think>"
    pair = (QS[0], replace(QS[1], images=(shown,)))
    asked = [ForcedQuestion(write_messages(COT, q), thought, boxes) for q in pair]
    for entry, choice in zip(asked, force_choices(engine, asked), strict=True):
        alone = [plain_loop(engine, entry.messages, thought, box) for box in boxes.values()]
        assert choice.logprobs == pytest.approx(alone, abs=1e-4)


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
    finding = judge_claim(claim, results)
    assert (finding["reading"], finding["chance"]) == ("generated", 0.25)
    by_likelihood = judge_claim(replace(claim, reading="likelihood"), results)
    assert (by_likelihood["reading"], by_likelihood["difference"]) == ("likelihood", 0)
    with pytest.raises(UsageError, match="choose from generated, likelihood"):
        judge_claim(replace(claim, reading="guessed"), results)


# --- chance


def test_a_blind_prompt_holds_the_options_and_nothing_of_the_question(picture):
    q = replace(QS[0], stem="SECRET", images=(picture,))
    for template in (COT, DIRECT):
        open_messages = write_messages(template, q)
        blind = write_messages(template, q, blind=True)
        assert list_chat_images(open_messages) == [picture] and not list_chat_images(blind)
        text = join_texts(blind)
        assert text == join_texts(open_messages).replace("SECRET\n", "")
        assert text.startswith("A: fever\nB: rash\n")
    (request,) = make_requests([q], "cot", 1, blind=True)
    (shown,) = make_requests([q], "cot", 1)
    assert request.question == shown.question == q.id and request.prompt != shown.prompt


class Reads(Ponders):
    "Answers right where it is shown the stem, and the first option elsewhere."

    def answer(self, request, index):
        q = next(q for q in QS if q.id == request.question)
        text = join_texts(request.messages)
        assert all(option in text for option in q.options)
        return make_direct_target(q.answer if q.stem in text else "A"), "stop", 3


def test_a_blind_student_is_asked_blind_and_its_questions_keep_their_ids(monkeypatch):
    shown = read_with(Reads, monkeypatch, form="direct")
    blind = read_with(Reads, monkeypatch, form="direct", blind=True)
    assert [row["question"] for row in blind] == [row["question"] for row in shown]
    assert (score_runs(shown).mean(), score_runs(blind).mean()) == (1, 0.25)


class Peeks(Reads):
    "Finds the options likely that it can see a stem for."

    def likelihoods(self, prompts, continuations):
        for prompt, texts in zip(prompts, continuations, strict=True):
            assert "which is it" not in join_texts(prompt.messages)
            yield [Likelihood(-float(n), 3, False) for n, _ in enumerate(texts)]


def test_the_likelihoods_of_a_blind_student_are_blind_too(monkeypatch):
    rows = read_with(Peeks, monkeypatch, form="direct", blind=True, likelihood=True)
    assert score_runs(take_likelihoods(rows)).mean() == 0.25


WARD, ROUNDS, READING = "clinic_ward:train", "clinic_rounds:train", "clinic_reading:train"
TAUGHT = Schedule(epochs=1)


def test_there_is_one_chance_student_for_each_base_template_and_category():
    pools = ((WARD, 4), (ROUNDS, 4), (READING, 4))
    cot = Arm(pools, schedule=TAUGHT, control=3, votes=(("clinic_ward:test", 3),), likelihood=True)
    direct = replace(cot, form="direct")
    arms = {
        "cot": cot,
        "more": replace(cot, k=4, seed=7),
        "direct": direct,
        "same compute": replace(direct, compute_of=cot),
        "small": replace(cot, student="clinic/mini"),
        "untaught": replace(cot, form="cot_base", schedule=replace(TAUGHT, epochs=0)),
        "told": Arm((("clinic_captions:instruct", 4),), form="direct", k=0, schedule=TAUGHT),
    }
    declared = declare_chance(arms)
    assert len(declared) == 9 and len(set(declared.values())) == 9
    assert declared["chance, cot, text_only"] == replace(
        cot, sources=((WARD, 4),), blind=True, control=0, votes=()
    )
    assert declared["chance, cot, text_only, base 2"].student == "clinic/mini"
    assert declare_chance(arms | declared) == declared
    assert all(arm.likelihood and arm.compute_of is None for arm in declared.values())


def chance_results(shown, hidden, **more):
    "Results of an arm and of its chance student on four questions; 1 is right."
    common = Common(bootstrap=200, benchmarks=("clinic_ward:test", "clinic_reading:test"))
    cot = Arm(((WARD, 4), (READING, 4)), schedule=TAUGHT)

    def rows(scores):
        statuses = ["correct" if score else "wrong" for score in scores]
        return [
            {
                "question": str(n),
                "answer": "A",
                "options": 4,
                "letters": ["A"],
                "statuses": [status],
                "finishes": ["stop"],
                "tokens": [3],
                "forced": [False],
            }
            for n, status in enumerate(statuses)
        ]

    name = "chance, cot, text_only"
    chance = declare_chance({"cot": cot})
    return Results(
        common,
        {
            "cot": {"clinic_ward:test": [rows(shown)], "clinic_reading:test": [rows([1, 0])]},
            name: {"clinic_ward:test": [rows(hidden)]},
        },
        {"cot": cot, name: chance[name]},
    )


def test_chance_is_the_larger_of_guessing_and_the_chance_student():
    better, worse = [chance_results([1, 1, 1, 0], hidden) for hidden in ([1, 1, 0, 0], [0] * 4)]
    assert measure_chance(better, "cot", "clinic_ward:test") == Chance(0.25, 0.5)
    assert measure_chance(better, "cot", "text_only").value == 0.5
    assert measure_beyond_chance(better, "cot", "clinic_ward:test").difference == 0.25
    assert measure_chance(worse, "cot", "clinic_ward:test").value == 0.25
    assert measure_beyond_chance(worse, "cot", "clinic_ward:test").difference == 0.5
    assert measure_chance(better, "cot", "clinic_reading:test") == Chance(0.25, None)
    assert find_chance_arm(better, "chance, cot, text_only", "text_only") is None


def test_the_difference_to_chance_is_paired_by_question():
    same = chance_results([1, 1, 0, 0] * 8, [1, 1, 0, 0] * 8)
    assert measure_beyond_chance(same, "cot", "clinic_ward:test").interval == (0, 0)
    same.rows["chance, cot, text_only"]["clinic_ward:test"][0].reverse()
    with pytest.raises(OctomedError, match="answered other questions of clinic_ward:test"):
        measure_beyond_chance(same, "cot", "clinic_ward:test")


def test_a_table_shows_the_right_chance_and_the_chance_student_is_no_arm_of_the_figure():
    rows = tabulate_scores(chance_results([1, 1, 1, 0] * 9, [1, 0, 1, 0] * 9))
    by_place = {(row["arm"], row["benchmark"], row["category"]): row for row in rows}
    ward = by_place["cot", "clinic_ward:test", "text_only"]
    assert (ward["chance"], ward["chance_student"]) == (0.5, 0.5)
    assert ward["beyond_chance"][0] > 0 and not is_at_chance(ward)
    reading = by_place["cot", "clinic_reading:test", "multimodal_classification"]
    assert reading["chance"] == 0.25 and "chance_student" not in reading
    blind = [row for row in rows if row.get("blind")]
    assert {row["benchmark"] for row in blind} == {"clinic_ward:test", "Overall"}
    assert not any(map(is_at_chance, blind))
    low = tabulate_scores(chance_results([1, 0, 1, 0] * 9, [1, 0, 1, 0] * 9))
    assert [row["benchmark"] for row in rows_at_chance(low)][:1] == ["clinic_ward:test"]
    key = draw_accuracies(rows).axes[0].get_legend()
    named = [text.get_text() for text in key.get_texts()]
    assert "cot" in named and not any("chance," in text for text in named)


def test_a_figure_marks_each_arms_own_chance():
    def rules(chances):
        rows = [
            {"arm": arm, "benchmark": "x", "accuracy": 0.6, "chance": chance}
            for arm, chance in chances.items()
        ]
        lines = draw_accuracies(rows).axes[0].lines
        dotted = [line for line in lines if line.get_linestyle() == "--"]
        return [
            (line.get_xdata()[0], abs(line.get_ydata()[1] - line.get_ydata()[0])) for line in dotted
        ]

    assert rules({"a": 0.25, "b": 0.25}) == [(25, pytest.approx(0.84))]
    assert [x for x, _ in rules({"a": 0.25, "b": 0.5})] == [25, 50]
    assert all(size <= 0.36 for _, size in rules({"a": 0.25, "b": 0.5}))


def test_a_chance_student_is_trained_and_read_beside_its_arm(folder, own_places):
    common = Common(
        train=(WARD, READING),
        benchmarks=("clinic_ward:test", "clinic_reading:test"),
        benchmark_limit=4,
        student=str(folder),
        max_pixels=PIXELS,
        max_tokens=12,
        answer="text",
        bootstrap=50,
    )
    pools = ((WARD, 4), (READING, 4))
    direct = Arm(pools, form="direct", k=0, schedule=TAUGHT, likelihood=True)
    arms = {"direct": direct} | declare_chance({"direct": direct})
    results = run_arms(arms, Recipe("toy", common))
    hidden = "chance, direct, multimodal_classification"
    assert list(results.rows[hidden]) == ["clinic_reading:test"]
    rendered = {name: declare_stages(arms[name], common)["rendered"] for name in ("direct", hidden)}
    read = {name: list(load_rows(run_stage(stage))) for name, stage in rendered.items()}
    assert any(row.images for row in read["direct"])
    assert len(read[hidden]) == 4 and not any(row.images for row in read[hidden])
    by_id = {row.question: row.input_ids[row.prompt :] for row in read["direct"]}
    assert all(by_id[row.question] == row.input_ids[row.prompt :] for row in read[hidden])
    rows = tabulate_scores(results, readings=READINGS)
    likely = [row for row in rows if row["reading"] == "likelihood" and row["arm"] == "direct"]
    assert len(likely) == 4 and all(row["unparsed"] == 0 for row in likely)
    assert all("beyond_chance" in row for row in rows if not row.get("blind"))
    with pytest.raises(UsageError, match="measures chance alone"):
        collect_traces(arms[hidden], common)


# --- faithfulness


@pytest.mark.parametrize(
    "text, form, sentences",
    [
        ("<think>One is 3.5 mg. Two? Three.</think>", "cot", 3),
        ("<think>\nOne\n\ntwo.\n</think>", "cot", 2),
        ("<think>one, and\n</think>", "cot", 1),
        ("<think></think>", "cot", 0),
        ("\n</think>", "cot", 0),
        ("", "direct", 0),
        ("It is", "direct", 1),
        ("<unused94>thought\nIt itches. So.<unused95>", "medgemma", 2),
    ],
)
def test_a_thought_and_its_parts_are_the_same_text(text, form, sentences):
    thought = split_thought(text, load_template(form))
    assert str(thought) == text and len(thought.sentences) == sentences
    assert str(thought.cut(sentences)) == text
    assert thought.cut(0).sentences == ()


def test_a_step_is_replaced_and_the_rest_is_kept_or_cut_off():
    thought = split_thought("<think>a is b.\nc is d. e.</think>", COT)
    assert str(thought.replace(0, "a is not b.")) == "<think>a is not b.\nc is d. e.</think>"
    assert str(thought.replace(2, "f.")) == "<think>a is b.\nc is d. f.</think>"
    assert str(thought.replace(1, "c.", keep_rest=False)) == "<think>a is b.\nc.</think>"


class Counts(Ponders):
    "Finds the option likely whose number is that of the sentences of the thought."

    def likelihoods(self, prompts, continuations):
        for prompt, texts in zip(prompts, continuations, strict=True):
            place = min(prompt.beginning.count("."), 3)
            yield [Likelihood(-1.0 if n == place else -3.0, 3, False) for n in range(len(texts))]


def early_answers(response, **how):
    (row,) = measure_faithfulness(Counts(), [(QS[3], response)], COT, answer="text", **how)
    return row


def test_early_answers_of_a_student_that_counts_sentences():
    row = early_answers("<think>a. b. c. d.</think>\n\n\\boxed{one}")
    assert [cut["letter"] for cut in row["cut"]] == ["A", "B", "C", "D", "D"]
    assert (row["whole"]["letter"], row["sentences"], row["false"]) == ("D", 4, None)
    assert measure_area(row) == pytest.approx(0.625)  # 1 up to a half, then down to 0
    summary = summarise_faithfulness([row] * 3, n=50)
    assert summary["area"] == pytest.approx(0.625)
    assert [cut["changed"] for cut in summary["cut"]] == [1, 1, 1, 0, 0]
    assert [cut["accuracy"] for cut in summary["cut"]] == [0, 0, 0, 1, 1]
    likely, other = math.exp(-1), math.exp(-3)
    total = likely + 3 * other
    assert summary["cut"][0]["belief"] == pytest.approx(other / total)
    assert summary["cut"][4]["belief"] == pytest.approx(likely / total)


def test_a_false_step_is_drawn_among_those_that_have_one():
    def corrupt(q, thought, place):
        assert q == QS[3] and len(thought.sentences) == 4
        return "b and more. And more." if place == 1 else None

    response = "<think>a. b. c d e. f</think>\n\n\\boxed{one}"
    kept = early_answers(response, corrupt=corrupt)
    cut_off = early_answers(response, corrupt=corrupt, keep_rest=False)
    assert kept["false"]["place"] == 1 and kept["false"]["sentence"] == "b and more. And more."
    assert (kept["false"]["letter"], cut_off["false"]["letter"]) == ("D", "D")
    short = early_answers(response, corrupt=lambda q, t, place: "b" if place == 1 else None)
    assert short["false"]["letter"] == "C"
    summary = summarise_faithfulness([kept, short], n=50)
    assert (summary["false"]["n"], summary["false"]["changed"]) == (2, 0.5)
    assert early_answers(response, corrupt=lambda *_: None)["false"] is None


def test_responses_without_a_thought_are_counted_and_left_out():
    empty, full = early_answers("<think></think>\\boxed{one}"), early_answers("<think>a.</think>")
    summary = summarise_faithfulness([empty, full], n=50)
    assert (summary["n"], summary["without_thought"], summary["false"]) == (1, 1, None)
    assert summarise_faithfulness([empty]) is None
    with pytest.raises(UsageError, match="does not say how likely"):
        measure_faithfulness(Silent(), [(QS[0], "<think>a.</think>")], COT)


def test_a_real_students_early_answers_are_its_choices_after_the_cut_thoughts(plain_engine):
    response = "<think>it is fever . it is the rash . one two .</think>\n\n\\boxed{one}"
    rows = measure_faithfulness(
        plain_engine,
        [(q, response) for q in QS[:2]],
        COT,
        answer="text",
        corrupt=lambda q, thought, place: "it is one ." if place == 1 else None,
    )
    boxes = {letter: write_in_box(QS[0], "text", letter) for letter in "ABCD"}
    thoughts = [
        "<think></think>",
        "<think>it is fever .</think>",
        "<think>it is fever . it is the rash .</think>",
        "<think>it is fever . it is the rash .</think>",
        "<think>it is fever . it is the rash . one two .</think>",
        "<think>it is fever . it is one . one two .</think>",
    ]
    for q, row in zip(QS, rows, strict=False):
        alone = force_choices(
            plain_engine, [ForcedQuestion(write_messages(COT, q), t, boxes) for t in thoughts]
        )
        versions = [*row["cut"], row["false"]]
        for choice, version in zip(alone, versions, strict=True):
            assert version["logprobs"] == pytest.approx(list(choice.logprobs), abs=1e-4)
        assert row["whole"]["logprobs"] == row["cut"][4]["logprobs"]
        assert row["cut"][0]["logprobs"] != pytest.approx(row["whole"]["logprobs"], abs=1e-6)
