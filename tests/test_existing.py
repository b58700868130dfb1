"Existing datasets: chats as what an arm reads, their counterparts in the clinic, and the judge."

import json
import re
from dataclasses import replace
from itertools import chain, product
from types import SimpleNamespace

import pytest
from declarations import RECIPES, declared

import octomed.clinic.graders
import octomed.clinic.students  # noqa: F401 - registers the students
from octomed.clinic import manners
from octomed.clinic.questions import load_questions as clinic_questions
from octomed.clinic.questions import look_up_truth
from octomed.clinic.textbook import list_vocabulary
from octomed.clinic.world import Join, may_train
from octomed.core.paths import UsageError
from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.data.sources import SOURCES, Source, identify_source, load, read_chats, register
from octomed.distill.traces import split_turns
from octomed.evaluate.arms import Arm, declare_stages
from octomed.paper import datasets


@pytest.fixture(scope="module")
def cases():
    "A case that reasons and one that only looks."
    return [clinic_questions(pool, "train", limit=1)[0] for pool in manners.POOLS]


@pytest.fixture
def talk():
    "A small source of chats."

    def say(role, text):
        return {"role": role, "content": text}

    def make_chat(i):
        messages = [
            say("user", f"which {i}?"),
            say("assistant", f"one {i}"),
            say("user", "is it?"),
            say("assistant", "fever"),
        ]
        return {"messages": messages, "images": (), "origin": str(i)}

    made = [make_chat(i) for i in range(6)]
    source = Source(
        name="talk",
        split="turns",
        category="multimodal_reasoning",
        role="comparison",
        expected=6,
        make=lambda limit, max_pixels: made,
        revision="1",
    )
    yield register(source)
    del SOURCES["talk:turns"]


def test_every_answer_is_learnt_after_what_was_said_before_it(talk):
    chat = next(read_chats("talk:turns"))
    first, second = split_turns(chat)
    assert first == (chat["messages"][:1], "one 0")
    assert second == (chat["messages"][:3], "fever")


def test_fault_25_chats_are_counted_nested_and_rendered_an_answer_a_row(talk, student, tmp_path):
    from octomed.generate.render import load_rows

    _model, processor = student
    processor.save_pretrained(tmp_path / "base")
    common, drawn = Common(student=str(tmp_path / "base")), {}
    for n in (2, 4):
        made = declare_stages(Arm((("talk:turns", n),), k=0, form="cot_base"), common)
        assert list(made) == ["data", "rendered", "student"]
        rows = load_rows(run_stage(made["rendered"]))
        funnel = json.loads((made["data"].folder / "funnel.json").read_text())
        assert funnel == {"in": 6, "over the amount": 6 - n, "kept": n}
        assert len(rows) == 2 * n
        lines = (made["data"].folder / "chats.jsonl").read_text().splitlines()
        drawn[n] = [json.loads(line)["origin"] for line in lines]
    assert drawn[4][:2] == drawn[2]
    prompts = [processor.tokenizer.decode(row.input_ids[: row.prompt]) for row in rows]
    answers = [processor.tokenizer.decode(row.input_ids[row.prompt :]) for row in rows]
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert prompts[1].count("<|im_start|>assistant") == 2
    assert answers[1] == "fever<|im_end|>"


def test_an_arm_of_chats_asks_for_nothing_that_chats_do_not_have(talk):
    one = Arm((("talk:turns", 2),), k=0)
    for bad in (
        replace(one, k=1),
        replace(one, filter=("student", 0, 1)),
        replace(one, sources=(*one.sources, ("clinic_ward:train", 2))),
        replace(one, against=(("clinic_ward:test", "text"),)),
    ):
        with pytest.raises(UsageError, match="an arm of their own"):
            declare_stages(bad, Common())


def test_the_publishers_own_chats_are_read_by_the_same_stages():
    for spec in ("pubmedvision:alignment", "llava_med:instruct"):
        assert SOURCES[spec].role == "comparison"
    with pytest.raises(UsageError, match="read_chats"):
        load("clinic_bare:bare")


def allowed_turns(case) -> list[str]:
    "What a conversation may ask: the requests whose join is not held out."
    joins = [Join(case.tags["condition"], kind) for kind in ("dx", "test", "first")]
    return [join.request for join in joins if may_train(join)]


def test_each_manner_tells_the_truth_of_its_case_and_no_more(cases):
    reasons, looks = cases
    for q in cases:
        t = look_up_truth(q.id)
        ((ask, answer),) = manners.tell_case(q, "bare")
        assert answer == q.answer_text
        assert all(option in ask for option in q.options)
        ((ask, answer),) = manners.tell_case(q, "instruct")
        assert ask == q.stem
        assert q.answer_text in answer
        others = [option for option in q.options if option != q.answer_text]
        assert not any(option in ask + answer for option in others)
        ((ask, answer),) = manners.tell_case(q, "alignment")
        assert answer.count(t.image) == 2
        assert "option" not in answer
    assert len(manners.tell_case(reasons, "turns")) == 1 + len(allowed_turns(reasons))
    assert len(manners.tell_case(looks, "turns")) == 2


def test_what_conversations_say_is_true_of_the_world(cases):
    from octomed.clinic.teachers import is_true, read_facts

    truth = look_up_truth(cases[0].id)
    answers = [answer for _, answer in manners.tell_case(cases[0], "turns")]
    facts = read_facts(" ".join(answers))
    assert [kind for kind, _ in facts] == ["look", *allowed_turns(cases[0])]
    assert all(is_true(truth, kind, slots) for kind, slots in facts)


def test_every_word_is_one_that_the_students_read(cases):
    pairs = [manners.tell_case(q, manner) for q, manner in product(cases, manners.MANNERS)]
    text = " ".join(chain.from_iterable(chain.from_iterable(pairs)))
    assert set(re.findall(r"[A-Za-z]+", text)) <= set(list_vocabulary())


def test_a_chat_names_its_case_and_shows_its_picture_once(cases):
    case = cases[0]
    for manner in manners.MANNERS:
        chat = manners.build_chat(case, manner)
        messages = chat["messages"]
        assert chat["origin"] == case.id
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        assert images == list(case.images)
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(messages) // 2)
        assert manners.build_chat(case, manner) == chat
    specs = [f"{source}:{manner}" for manner, source in manners.MANNERS.items()]
    assert len(set(map(identify_source, specs))) == 4


@RECIPES
def test_all_start_from_one_student_and_read_equal_tokens_at_each_point(name):
    recipe, arms = declared(datasets, name)
    assert len(arms) == 1 + 4 * 3 + 1
    assert len({arm.base for arm in arms.values()}) == 1
    for at in datasets.POINTS:
        ours = arms[datasets.name(datasets.OURS, at)]
        for o in datasets.OTHERS:
            arm = arms[datasets.name(o, at)]
            assert arm.compute_of == ours
            assert (arm.k, arm.form) == (0, "cot_base")
            assert {SOURCES[spec].role for spec, _ in arm.sources} == {"comparison"}
            assert {n for _, n in arm.sources} == {recipe.scalars("53_datasets")["cases"]}
    along = [arms[datasets.name(datasets.OURS, at)] for at in datasets.POINTS]
    assert [arm.schedule.epochs for arm in along] == pytest.approx([0.48, 1.5, 3])
    whole, images = arms[datasets.name(datasets.OURS, 1)], arms[datasets.IMAGES]
    assert images == replace(whole, sources=images.sources, compute_of=whole)
    assert set(images.sources) < set(whole.sources)


def test_at_the_end_ours_is_the_student_that_51_has_trained():
    from octomed.paper import scaling

    for name in ("smoke", "course"):
        r51, r53 = scaling.scope(load_recipe(name)), datasets.scope(load_recipe(name))
        ours = datasets.arms(r53)[datasets.name(datasets.OURS, 1)]
        centre = scaling.arms(r51)[scaling.CENTRE]
        student = declare_stages(ours, r53.common)["student"]
        assert student == declare_stages(centre, r51.common)["student"]


def test_a_dataset_without_a_source_is_left_out():
    r = load_recipe("smoke")
    some = r.with_scalars("53_datasets", **{**r.scalars("53_datasets"), "bare": ""})
    arms = datasets.arms(some)
    assert not any(name.startswith("bare") for name in arms)
    assert datasets.name("captions", 1) in arms


def test_the_judge_reads_what_the_parser_cannot_and_nothing_else(monkeypatch):
    q = Question("which is it?", ("fever", "rash"), "B", "clinic_ward", "test", "text_only")

    def row(statuses):
        return {"question": q.id, "statuses": statuses}

    results = datasets.Tasks(
        Common(),
        {"a": {"clinic_ward:test": [[row(["unparsed", "wrong"]), row(["correct", "truncated"])]]}},
    )
    asked = []
    template = SimpleNamespace(think_first=True, end_of_think="[/THINK]")

    def unread(evaluated, rows):
        return [
            (row, run, q, "it is a rash", template)
            for row in rows
            for run, status in enumerate(row["statuses"])
            if status == "unparsed"
        ]

    def open_ended(items, grader, think_first, reasoning, end_of_think):
        assert think_first and end_of_think == "[/THINK]"
        asked.extend(items)
        return [SimpleNamespace(status="correct") for _ in items]

    monkeypatch.setattr(datasets, "find_unread", unread)
    monkeypatch.setattr(datasets, "judge_open_ended", open_ended)
    graded = datasets.grade_unread(results, {"a": {"clinic_ward:test": [None]}}, "clinic/grader")
    statuses = [row["statuses"] for row in graded.rows["a"]["clinic_ward:test"][0]]
    assert statuses == [["correct", "wrong"], ["correct", "truncated"]]
    assert asked == [(q, "B: rash", "it is a rash")]
    assert results.rows["a"]["clinic_ward:test"][0][0]["statuses"] == ["unparsed", "wrong"], (
        "the parser's own verdicts stay"
    )


def test_reasoning_is_both_kinds_and_everywhere_is_all():
    benchmarks = ("clinic_ward:test", "clinic_rounds:test", "clinic_reading:test")
    r = datasets.Tasks(Common(), {"a": {benchmark: [] for benchmark in benchmarks}})
    assert r.benchmarks_of(datasets.REASONING) == ["clinic_ward:test", "clinic_rounds:test"]
    assert len(r.benchmarks_of(datasets.EVERYWHERE)) == 3
    assert r.benchmarks_of("multimodal_classification") == ["clinic_reading:test"]


def test_each_dataset_is_claimed_about_alike():
    def kinds(other):
        about = [claim for claim in datasets.claims() if other in claim.text]
        return [(claim.kind, claim.benchmark, claim.margin) for claim in about]

    captions, conversations, bare = map(kinds, datasets.OTHERS)
    assert captions == conversations == bare
    assert len(bare) == 5


def test_the_figures_show_every_dataset_and_the_start():
    every = (datasets.OURS, *datasets.OTHERS)
    along = [datasets.name(dataset, point) for dataset, point in product(every, datasets.POINTS)]
    arms = [datasets.BEFORE, datasets.IMAGES, *along]
    rows = [
        {
            "arm": arm,
            "category": category,
            "benchmark": "Overall",
            "graded": 0.3,
            "graded_interval": [0.2, 0.4],
        }
        for arm, category in product(arms, CATEGORIES)
    ]
    labels = {text.get_text() for text in datasets.figure({"rows": rows}).axes[0].texts}
    assert labels == {*every, "start"}
    assert len(datasets.categories_figure({"rows": rows}).axes[0].get_yticklabels()) == 3
