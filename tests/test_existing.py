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
from octomed.paper import datasets, formatting, sourcing


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
        assert list(made) == ["data", "rendered", "trained", "student"]
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
def test_all_start_from_one_student_and_read_equal_tokens_along_one_schedule(name):
    recipe, arms = declared(datasets, name)
    assert len(arms) == 1 + 4 * 3 + 1
    common = recipe.common
    assert all((arm.base, arm.student) == (None, "") for arm in arms.values())
    whole = arms[datasets.name(datasets.OURS, datasets.END)]
    points = (datasets.EARLY, 0.5, datasets.END)
    assert (*whole.points, 1.0) == points
    for other in datasets.OTHERS:
        along = [arms[datasets.name(other, point)] for point in points]
        assert [arm.at for arm in along] == list(points)
        assert len({declare_stages(arm, common)["trained"].key for arm in along}) == 1
        for arm in along:
            assert arm.compute_of == whole
            assert (arm.k, arm.form) == (0, "cot_base")
            assert {SOURCES[spec].role for spec, _ in arm.sources} == {"comparison"}
            assert {n for _, n in arm.sources} == {recipe.scalars("53_datasets")["cases"]}
    images = arms[datasets.IMAGES]
    assert images == replace(whole, sources=images.sources, points=())
    assert set(images.sources) < set(whole.sources)
    assert arms[datasets.BEFORE].schedule.epochs == 0


@RECIPES
def test_ours_is_the_student_of_42_at_each_point(name):
    recipe, arms = declared(datasets, name)
    cot = formatting.arms(recipe)["cot"]
    for point in (*cot.points, 1.0):
        ours = declare_stages(arms[datasets.name(datasets.OURS, point)], recipe.common)
        theirs = declare_stages(replace(cot, at=point), recipe.common)
        assert ours["student"] == theirs["student"]


def test_in_the_course_ours_without_text_is_the_student_that_41_teaches_both_kinds_of_images():
    recipe, arms = declared(datasets, "course")
    theirs = sourcing.arms(recipe)[sourcing.name("reasoning", "classification")]
    student = declare_stages(arms[datasets.IMAGES], recipe.common)["student"]
    assert student == declare_stages(theirs, recipe.common)["student"]


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


def test_each_dataset_is_claimed_about_alike_and_the_two_named_ones_also_below_the_start():
    def kinds(other):
        about = [claim for claim in datasets.claims() if other in claim.text]
        return [(claim.kind, claim.benchmark, bool(claim.paper)) for claim in about]

    captions, conversations, bare = map(kinds, datasets.OTHERS)
    assert captions == conversations
    assert set(captions) - set(bare) == {("greater", datasets.REASONING, True)}
    papers = [claim for claim in datasets.claims() if claim.paper]
    assert (len(papers), len(datasets.claims()) - len(papers)) == (6, 3)


def test_what_the_grader_read_stands_beside_the_parsers_accuracy_of_all_questions():
    row = {
        "arm": "a",
        "category": "text_only",
        "benchmark": "b",
        "joins": "all",
        "reading": "generated",
        "accuracy": 0.2,
    }
    unseen, likeliest = {**row, "joins": "unseen"}, {**row, "reading": "likelihood"}
    graded = [{**row, "accuracy": 0.6, "interval": [0.5, 0.7]}]
    read, *others = datasets.add_graded([row, unseen, likeliest], graded)
    assert (read["accuracy"], read["graded"], read["graded_interval"]) == (0.2, 0.6, [0.5, 0.7])
    assert others == [unseen, likeliest]


def answered(right: int, n: int = 8):
    "Rows of one training seed with so many right answers."
    return [
        {
            "question": str(i),
            "statuses": ["correct" if i < right else "wrong"],
            "options": 4,
        }
        for i in range(n)
    ]


def test_the_curves_are_means_over_categories_with_the_start_first():
    _, arms = declared(datasets, "smoke")
    right = {datasets.BEFORE: 2, datasets.name(datasets.OURS, 0.16): 6}
    rows = {arm: {"clinic_ward:test": [answered(n)]} for arm, n in right.items()}
    for arm, n in right.items():
        rows[arm]["clinic_rounds:test"] = [answered(n - 2, n=4)]
    along = datasets.measure_along(datasets.Tasks(Common(bootstrap=50), rows), arms)
    assert [(row["dataset"], row["point"]) for row in along] == [
        (datasets.BEFORE, 0.0),
        (datasets.OURS, 0.16),
    ]
    assert [row["accuracy"] for row in along] == [0.125, 0.875]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in along)


def test_the_figures_show_every_dataset_the_start_and_chance():
    every = (datasets.OURS, *datasets.OTHERS)
    ends = [datasets.name(dataset, datasets.END) for dataset in every]
    rows = [
        {
            "arm": arm,
            "category": category,
            "benchmark": "Overall",
            "joins": joins,
            "reading": "generated",
            "graded": 0.3,
            "graded_interval": [0.2, 0.4],
            "chance": 0.25,
        }
        for arm, category in product([datasets.BEFORE, datasets.IMAGES, *ends], CATEGORIES)
        for joins in ("all", "seen")
    ]
    point = {"accuracy": 0.3, "interval": [0.2, 0.4]}
    along = [{"dataset": datasets.BEFORE, "point": 0.0, **point}]
    along += [{"dataset": d, "point": x, **point} for d, x in product(every, (0.16, 0.5, 1.0))]
    ax = datasets.figure({"rows": rows, "along": along}).axes[0]
    assert {text.get_text() for text in ax.texts} == {*every, "start", "chance"}
    levels = [list(line.get_ydata()) for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [[30, 30], [25, 25]]
    assert all(len(line.get_xdata()) == 4 for line in ax.lines if len(line.get_xdata()) > 2)
    assert len(datasets.categories_figure({"rows": rows}).axes[0].get_yticklabels()) == 3
