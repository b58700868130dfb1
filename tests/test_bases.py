"""Base students: what they read, how they are made, what they can do."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from octomed.clinic.bases import (
    BASES,
    MIXTURE,
    base,
    count_weights,
    declare_base,
    render_lesson,
    render_lessons,
)
from octomed.clinic.gate import GATE, gate, read_gate, read_modalities, read_shipped_gate
from octomed.clinic.lessons import (
    ASKED,
    Lesson,
    ask_copy,
    ask_fact,
    ask_option,
    ask_record,
    draft_chain,
    write_lessons,
)
from octomed.clinic.questions import CATEGORY, PICTURES, SIZES, identify_world, load_plans
from octomed.clinic.students import SHIPPED, build_for_clinic, find_shipped_student
from octomed.clinic.teachers import is_true, read_facts
from octomed.clinic.towers import begin_with_contrast, find_patch_layer
from octomed.clinic.world import Truth, divide_joins, load_conditions, may_train
from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError, shipped, store_dir
from octomed.core.recipe import Common
from octomed.core.store import run_stage
from octomed.generate.answers import judge
from octomed.train.students import find_base_student

PIXELS = 12_544
LIMIT = 24_000_000  # bytes of all base students


@pytest.fixture(scope="module")
def lessons():
    return write_lessons(seed=5, n=600, max_pixels=PIXELS, chains=0.2)


@pytest.fixture(scope="module")
def processor():
    return build_for_clinic("mini", seed=0, max_pixels=PIXELS, family="qwen2_5_vl")[1]


def taught(items, *kinds):
    return [
        item for item in items if isinstance(item, Lesson) and (item.kind in kinds or not kinds)
    ]


def test_the_mixture_is_read_by_its_shares(lessons):
    assert sum(MIXTURE.values()) == pytest.approx(1)
    amounts = {kind: len(taught(lessons, kind)) for kind in ("fact", "look", "chain")}
    for kind, amount in amounts.items():
        share = 0.2 if kind == "chain" else 0.8 * MIXTURE[kind]
        assert amount == pytest.approx(600 * share, abs=4 * np.sqrt(600 * share))


def test_the_same_seed_gives_the_same_lessons():
    first, again, other = (write_lessons(seed, n=60, max_pixels=PIXELS) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_answer_is_right_and_every_thought_true(lessons):
    for lesson in taught(lessons, "fact"):
        facts = read_facts(lesson.thought)
        assert len(facts) == 1, lesson
        [(kind, slots)] = facts
        if kind == "dx":
            assert set(re.split(", | and ", slots["f"])) <= set(load_conditions()[slots["c"]].shows)
        else:
            assert is_true(Truth("dx", 1, "", findings=()), kind, slots)
        assert lesson.answer in slots.values()


def test_an_answer_is_read_as_its_option(lessons):
    for lesson in taught(lessons):
        question = lesson.question
        if question.options:
            assert len(set(question.options)) == len(question.options)
            verdict = judge(rf"\boxed{{{lesson.answer}}}", question.letters, question.answer)
            assert verdict.status == "correct"


def test_a_factor_that_forbids_two_treatments_has_one_of_them_among_the_options():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lesson = ask_fact(rng, "forbids")
        factor = read_facts(lesson.thought)[0][1]["r"]
        forbidden = {c.first for c in load_conditions().values() if c.factor == factor}
        assert len(forbidden & set(lesson.question.options)) == 1


@pytest.mark.parametrize("kind", ASKED)
def test_a_kind_of_fact_is_asked_by_its_name(kind):
    lesson = ask_fact(np.random.default_rng(0), kind)
    assert 2 <= len(lesson.question.options) <= 4
    assert lesson.question.answer_text == lesson.answer


def test_records_hold_what_is_restated():
    rng = np.random.default_rng(0)
    for style in ("ward", "boards"):
        for _ in range(50):
            lesson = ask_record(rng, style, asks_factor=False)
            assert lesson.answer in lesson.question.stem
            assert lesson.answer in lesson.thought
    asked = [ask_record(rng, "ward", asks_factor=True) for _ in range(20)]
    assert all(lesson.answer in lesson.question.stem for lesson in asked)


def test_no_lesson_is_a_question_of_the_clinic(lessons):
    stems = set()
    for source, split in SIZES:
        if CATEGORY[source] != "multimodal_classification":
            stems |= {stem for _, stem, *_ in load_plans(source, split, store_dir())}
    asked = {lesson.question.stem for lesson in taught(lessons) if lesson.kind != "look"}
    assert asked and not asked & stems


def test_only_chains_join_facts_and_no_join_that_is_held_out():
    rng = np.random.default_rng(3)
    joins = {draft_chain(rng)[1].join for _ in range(300)}
    assert joins and all(may_train(join) for join in joins)
    held_out = {join for join, split in divide_joins().items() if split != "train"}
    assert held_out and not joins & held_out


def test_no_paragraph_of_the_lessons_tells_two_facts_of_one_join():
    "Four sentences of a paragraph are of four conditions."
    paragraphs = [
        item for item in write_lessons(7, n=900, max_pixels=PIXELS) if isinstance(item, str)
    ]
    facts = [read_facts(text) for text in paragraphs]
    told = [[slots["c"] for _, slots in each if "c" in slots] for each in facts]
    assert any(len(conditions) > 1 for conditions in told)
    assert all(len(set(conditions)) == len(conditions) for conditions in told)


def test_no_single_lesson_asks_for_what_a_vignette_asks():
    "A lesson with a condition's findings asks for the condition, never for what follows from it."
    rng = np.random.default_rng(0)
    makers = (ask_fact, ask_record, ask_copy, ask_option)
    for make in makers:
        for _ in range(100):
            lesson = make(rng)
            assert len(read_facts(lesson.thought)) <= 1


def test_lessons_have_drawings_of_their_own():
    assert PICTURES["atlas"] >= 300
    images = [lesson.question.images[0] for lesson in taught(write_lessons(0, 200, PIXELS), "look")]
    from octomed.clinic.questions import load_questions

    asked = set()
    for source, split in (("clinic_reading", "train"), ("clinic_reading", "dev")):
        for question in load_questions(source, split, 200, max_pixels=PIXELS):
            asked |= set(question.images)
    assert images and not asked & set(images)


def test_every_word_of_clinic_and_lessons_is_a_token(processor, lessons):
    tokenizer = processor.tokenizer
    for lesson in taught(lessons):
        row = render_lesson(processor, lesson, "cot", max_pixels=PIXELS)
        assert tokenizer.unk_token_id not in row.input_ids
        assert tokenizer.decode(row.input_ids[row.prompt :]).endswith("}<|im_end|>")
    for source, split in SIZES:
        for _, stem, truth, _ in load_plans(source, split, store_dir())[:200]:
            for text in (stem, *truth.options):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_a_lesson_is_taught_as_an_arm_is(processor):
    lesson = ask_fact(np.random.default_rng(0), "test")
    cot = render_lesson(processor, lesson, "cot", max_pixels=PIXELS)
    direct = render_lesson(processor, lesson, "direct", max_pixels=PIXELS)
    texts = [processor.tokenizer.decode(row.input_ids[row.prompt :]) for row in (cot, direct)]
    box = rf"\boxed{{{lesson.answer}}}<|im_end|>"
    assert texts == [f"<think>{lesson.thought}</think>\n\n{box}", box]


def test_chains_are_always_asked_with_their_thought(processor, lessons):
    chains = taught(lessons, "chain")
    for row in render_lessons(processor, chains, seed=0, max_pixels=PIXELS):
        text = processor.tokenizer.decode(row.input_ids[row.prompt :])
        assert text.startswith("<think>") and len(read_facts(text)) >= 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_the_first_layer_sees_contrast_and_a_part_of_it_brightness(family):
    model, _ = build_for_clinic("mini", seed=0, max_pixels=PIXELS, family=family)
    begin_with_contrast(model, seed=0)
    weight = find_patch_layer(model)[1].weight.detach()
    even = weight.flatten(2).std(2)  # of each filter and colour: 0 if it sees brightness alone
    sums = weight.flatten(2).sum(2).abs()
    bright = len(weight) // 8
    assert even[:bright].max() < 1e-6 and sums[:bright].max() > 0.05
    assert even[bright:].min() > 0 and sums[bright:].max() < 1e-4


def make(monkeypatch, store, how):
    monkeypatch.setenv("OCTOMED_STORE", str(store))
    return run_stage(base(how=how, max_pixels=PIXELS, world=identify_world()))


def test_a_base_is_the_same_when_it_is_made_again(monkeypatch, tmp_path):
    "The first 200 steps; its first layer stays as it began."
    how = replace(BASES["mini"], tower_steps=40, steps=200)
    first, again = (make(monkeypatch, tmp_path / name, how) for name in "ab")
    weights = [load_file(folder / "model.safetensors") for folder in (first, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert {str(weight.dtype) for weight in weights[0].values()} == {"torch.bfloat16"}
    model, _ = build_for_clinic("mini", seed=0, max_pixels=PIXELS, family="qwen2_5_vl")
    begin_with_contrast(model, seed=0)
    name, layer = find_patch_layer(model)
    kept = weights[0][f"{name.removeprefix('model.')}.weight"]
    assert (kept == layer.weight.detach().to(kept.dtype)).all()
    assert len(read_jsonl(first / "log.jsonl")) == 200


def test_a_base_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="there is no base huge: choose from mini, tiny"):
        declare_base("huge")


def test_a_base_without_weights_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr("octomed.clinic.students.shipped", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(OctomedError, match="octomed base tiny --out"):
        find_base_student(Common())


def test_other_seeds_start_from_another_main_base():
    def start(name, seed):
        return find_base_student(Common(student=name, base_seed=seed)).path.name

    assert [start("clinic/tiny", seed) for seed in (0, 1, 2)] == ["tiny", "tiny-other", "tiny"]
    assert start("clinic/mini", 1) == "mini"


def test_what_is_written_about_a_model_is_no_part_of_its_identity(tmp_path):
    import shutil

    from octomed.distill.sampling import student_identity

    shutil.copytree(find_shipped_student("mini").path, tmp_path / "mini")
    before = (
        find_base_student(Common(student=str(tmp_path / "mini"))).key,
        student_identity(tmp_path / "mini"),
    )
    (tmp_path / "mini" / "README.md").write_text("another card")
    (tmp_path / "mini" / "gate.json").unlink()
    after = (
        find_base_student(Common(student=str(tmp_path / "mini"))).key,
        student_identity(tmp_path / "mini"),
    )
    assert before == after
    (tmp_path / "mini" / "config.json").write_text("{}")
    assert find_base_student(Common(student=str(tmp_path / "mini"))).key != before[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_base_passed_its_gate_and_its_card_says_so(name):
    folder = shipped("students", name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    weights = folder / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert f"{count_weights(weights):,} parameters" in card
    lines = read_shipped_gate(folder)
    wanted = [line.name for line in GATE if line.of_reasoners or not BASES[name].chains]
    assert [line["line"] for line in lines] == [*wanted, "unparsed or truncated"]
    for line in lines:
        assert line["passed"], line
        assert f"{100 * line['share']:.1f}" in card
        assert line["n"] >= 500


def test_the_shipped_bases_are_small():
    sizes = {
        name: sum(f.stat().st_size for f in shipped("students", name).iterdir()) for name in SHIPPED
    }
    assert sum(sizes.values()) <= LIMIT, sizes


def test_a_shipped_base_still_takes_its_single_steps():
    "As generated here, on the weights as shipped; all items are read in the long checks."
    student = find_shipped_student("tiny")
    answers = run_stage(gate(student=student, max_pixels=PIXELS, world=identify_world(), n=60))
    shares = {row["line"]: row["share"] for row in read_gate(read_jsonl(answers / "answers.jsonl"))}
    for line in GATE:
        if line.least:
            assert shares[line.name] > line.least - 0.1, shares
    assert shares["unparsed or truncated"] < 0.1


def test_the_gate_is_read_line_by_line():
    def answer(line, status, group="mri"):
        return {"line": line.name, "status": status, "group": group}

    rows = []
    for line in GATE:
        rows += [answer(line, "correct")] * (30 if line.most < 1 else 96)
        rows += [answer(line, "wrong")] * (70 if line.most < 1 else 4)
    assert all(row["passed"] for row in read_gate(rows))
    rows += [answer(GATE[0], "truncated")] * 20
    failed = [row["line"] for row in read_gate(rows) if not row["passed"]]
    assert failed == [GATE[0].name, "unparsed or truncated"]
    with pytest.raises(OctomedError, match="was not asked"):
        read_gate(rows[:5])
    assert [row["line"] for row in read_modalities(rows)] == ["mri"]


def test_the_bounds_are_those_that_were_declared():
    bounds = {line.name: (line.least, line.most) for line in GATE}
    assert bounds == {
        "facts, with a thought": (0.95, 1.0),
        "facts, directly": (0.95, 1.0),
        "findings of a ward stem": (0.95, 1.0),
        "findings of a boards stem": (0.95, 1.0),
        "the option that a letter names": (0.95, 1.0),
        "image classes": (0.85, 1.0),
        "chains of three steps or more": (0.0, 0.40),
    }


def test_a_base_that_reasons_is_not_asked_for_ignorance():
    assert [line.name for line in GATE if not line.of_reasoners] == [
        "chains of three steps or more"
    ]
    asked = [{"line": line.name, "status": "correct"} for line in GATE if line.of_reasoners]
    assert all(row["passed"] for row in read_gate(asked, reasons=True))
    with pytest.raises(OctomedError, match="was not asked"):
        read_gate(asked)
    assert read_shipped_gate(shipped("clinic")) is None
