"Existing datasets: chats as what an arm reads, their counterparts in the clinic, and the judge."

import json
import re
from dataclasses import replace

import pytest

import octomed.clinic.graders  # noqa: F401 - registers the grader
import octomed.clinic.students  # noqa: F401 - registers the students
from octomed.clinic import others as O
from octomed.clinic import world
from octomed.core.paths import UsageError
from octomed.core.recipe import CATEGORIES, Common, load_recipe
from octomed.core.store import run
from octomed.data.questions import Question
from octomed.data.sources import SOURCES, Source, identity_of, load, read_chats, register
from octomed.distill.traces import turns
from octomed.evaluate.arms import Arm, stages
from octomed.paper import datasets as D

RECIPES = pytest.mark.parametrize("name", ["smoke", "course"])


@pytest.fixture(scope="module")
def cases():
    "A case that reasons and one that only looks."
    return [world.questions(pool, "train", limit=1)[0] for pool in O.POOLS]


@pytest.fixture
def talk():
    "A small source of chats."

    def say(role, text):
        return {"role": role, "content": text}

    made = [
        {
            "messages": [
                say("user", f"which {i}?"),
                say("assistant", f"one {i}"),
                say("user", "is it?"),
                say("assistant", "fever"),
            ],
            "images": (),
            "origin": str(i),
        }
        for i in range(6)
    ]
    yield register(
        Source(
            "talk",
            "turns",
            "multimodal_reasoning",
            "comparison",
            expected=6,
            make=lambda limit, max_pixels: made,
            revision="1",
        )
    )
    del SOURCES["talk:turns"]


def test_every_answer_is_learnt_after_what_was_said_before_it(talk):
    c = next(read_chats("talk:turns"))
    (first, a), (second, b) = turns(c)
    assert (first, a) == (c["messages"][:1], "one 0") and (second, b) == (
        c["messages"][:3],
        "fever",
    )


def test_fault_25_chats_are_counted_nested_and_rendered_an_answer_a_row(talk, student, tmp_path):
    from octomed.generate.render import load_rows

    _model, processor = student
    processor.save_pretrained(tmp_path / "base")
    common, drawn = Common(student=str(tmp_path / "base")), {}
    for n in (2, 4):
        s = stages(Arm((("talk:turns", n),), k=0, form="cot_base"), common)
        assert list(s) == ["data", "rendered", "student"]
        rows, funnel = (
            load_rows(run(s["rendered"])),
            json.loads((s["data"].folder / "funnel.json").read_text()),
        )
        assert funnel == {"in": 6, "over the amount": 6 - n, "kept": n} and len(rows) == 2 * n
        drawn[n] = [
            json.loads(l)["origin"]
            for l in (s["data"].folder / "chats.jsonl").read_text().splitlines()
        ]
    assert drawn[4][:2] == drawn[2]
    said = (
        [processor.tokenizer.decode(r.input_ids[: r.prompt]) for r in rows],
        [processor.tokenizer.decode(r.input_ids[r.prompt :]) for r in rows],
    )
    assert (
        all(x.endswith("<|im_start|>assistant\n") for x in said[0])
        and said[0][1].count("<|im_start|>assistant") == 2
        and said[1][1] == "fever<|im_end|>"
    )


def test_an_arm_of_chats_asks_for_nothing_that_chats_do_not_have(talk):
    one = Arm((("talk:turns", 2),), k=0)
    for bad in (
        replace(one, k=1),
        replace(one, filter=("student", 0, 1)),
        replace(one, sources=(*one.sources, ("clinic_ward:train", 2))),
        replace(one, against=(("clinic_ward:test", "text"),)),
    ):
        with pytest.raises(UsageError, match="an arm of their own"):
            stages(bad, Common())


def test_the_publishers_own_chats_are_read_by_the_same_stages():
    for spec in ("pubmedvision:alignment", "llava_med:instruct"):
        assert SOURCES[spec].role == "comparison"
    with pytest.raises(UsageError, match="read_chats"):
        load("clinic_bare:bare")


def test_each_manner_tells_the_truth_of_its_case_and_no_more(cases):
    reasons, looks = cases
    for q in cases:
        t = world.reference(q.id)
        ((ask, answer),) = O.said(q, "bare")
        assert answer == q.answer_text and all(o in ask for o in q.options)
        ((ask, answer),) = O.said(q, "instruct")
        assert (
            ask == q.stem
            and q.answer_text in answer
            and not any(o in ask + answer for o in q.options if o != q.answer_text)
        )
        ((ask, answer),) = O.said(q, "alignment")
        assert answer.count(t.image) == 2 and "option" not in answer
    assert len(O.said(reasons, "turns")) == 4 and len(O.said(looks, "turns")) == 2


def test_what_conversations_say_is_true_of_the_world(cases):
    from octomed.clinic.teachers import stated, true_of

    t, told = world.reference(cases[0].id), [a for _, a in O.said(cases[0], "turns")]
    facts = stated(" ".join(told))
    assert [k for k, _ in facts] == ["look", "dx", "test", "first"] and all(
        true_of(t, k, s) for k, s in facts
    )


def test_every_word_is_one_that_the_students_read(cases):
    text = " ".join(x for q in cases for m in O.MANNERS for pair in O.said(q, m) for x in pair)
    assert set(re.findall(r"[A-Za-z]+", text)) <= set(world.vocabulary())


def test_a_chat_names_its_case_and_shows_its_picture_once(cases):
    for m in O.MANNERS:
        c = O.chat(cases[0], m)
        assert c["origin"] == cases[0].id and [
            p["image"] for p in c["messages"][0]["content"] if p["type"] == "image"
        ] == list(cases[0].images)
        assert [x["role"] for x in c["messages"]] == ["user", "assistant"] * (
            len(c["messages"]) // 2
        ) and O.chat(cases[0], m) == c
    assert len({identity_of(f"{source}:{m}") for m, source in O.MANNERS.items()}) == 4


def declared(name):
    recipe = D.scope(load_recipe(name))
    return recipe, D.arms(recipe)


@RECIPES
def test_all_start_from_one_student_and_read_equal_tokens_at_each_point(name):
    recipe, arms = declared(name)
    assert len(arms) == 1 + 4 * 3 + 1 and len({a.base for a in arms.values()}) == 1
    for at in D.POINTS:
        ours = arms[D.name(D.OURS, at)]
        for o in D.OTHERS:
            a = arms[D.name(o, at)]
            assert (
                a.compute_of == ours
                and a.k == 0
                and a.form == "cot_base"
                and {SOURCES[s].role for s, _ in a.sources} == {"comparison"}
                and {n for _, n in a.sources} == {recipe.of("53_datasets")["cases"]}
            )
    assert [arms[D.name(D.OURS, at)].schedule.epochs for at in D.POINTS] == pytest.approx(
        [0.48, 1.5, 3]
    )
    whole = arms[D.name(D.OURS, 1)]
    assert arms[D.IMAGES] == replace(
        whole, sources=arms[D.IMAGES].sources, compute_of=whole
    ) and set(arms[D.IMAGES].sources) < set(whole.sources)


def test_at_the_end_ours_is_the_student_that_51_has_trained():
    from octomed.paper import scaling as S

    for name in ("smoke", "course"):
        r51, r53 = S.scope(load_recipe(name)), D.scope(load_recipe(name))
        assert (
            stages(D.arms(r53)[D.name(D.OURS, 1)], r53.common)["student"]
            == stages(S.arms(r51)[S.CENTRE], r51.common)["student"]
        )


def test_a_dataset_without_a_source_is_left_out():
    r = load_recipe("smoke")
    some = r.having("53_datasets", **{**r.of("53_datasets"), "bare": ""})
    assert not any(n.startswith("bare") for n in D.arms(some)) and D.name("captions", 1) in D.arms(
        some
    )


def test_the_judge_reads_what_the_parser_cannot_and_nothing_else(monkeypatch):
    q = Question("which is it?", ("fever", "rash"), "B", "clinic_ward", "test", "text_only")

    def row(statuses):
        return {"question": q.id, "statuses": statuses}

    results = D.Tasks(
        Common(),
        {"a": {"clinic_ward:test": [[row(["unparsed", "wrong"]), row(["correct", "truncated"])]]}},
    )
    seen = []

    class Template:
        think_first = False

    monkeypatch.setattr(
        D,
        "unread",
        lambda e, rows: [
            (r, n, q, "it is a rash", Template)
            for r in rows
            for n, s in enumerate(r["statuses"])
            if s == "unparsed"
        ],
    )
    monkeypatch.setattr(
        D,
        "open_ended",
        lambda items, grader, thinks, reasoning: (
            seen.extend(items) or [D.Claim and type("V", (), {"status": "correct"}) for _ in items]
        ),
    )
    got = D.graded(results, {"a": {"clinic_ward:test": [None]}}, "clinic/grader")
    assert [r["statuses"] for r in got.rows["a"]["clinic_ward:test"][0]] == [
        ["correct", "wrong"],
        ["correct", "truncated"],
    ] and seen == [(q, "B: rash", "it is a rash")]
    assert results.rows["a"]["clinic_ward:test"][0][0]["statuses"] == ["unparsed", "wrong"], (
        "the parser's own verdicts stay"
    )


def test_reasoning_is_both_kinds_and_everywhere_is_all():
    r = D.Tasks(
        Common(),
        {"a": {b: [] for b in ("clinic_ward:test", "clinic_rounds:test", "clinic_reading:test")}},
    )
    assert (
        r.within(D.REASONING) == ["clinic_ward:test", "clinic_rounds:test"]
        and len(r.within(D.EVERYWHERE)) == 3
        and r.within("multimodal_classification") == ["clinic_reading:test"]
    )


def test_each_dataset_is_claimed_about_alike():
    of = {o: [(c.kind, c.benchmark, c.margin) for c in D.claims() if o in c.text] for o in D.OTHERS}
    assert len({tuple(v) for v in of.values()}) == 1 and len(of["bare"]) == 5


def test_the_figures_show_every_dataset_and_the_start():
    rows = [
        {
            "arm": a,
            "category": c,
            "benchmark": "Overall",
            "graded": 0.3,
            "graded_interval": [0.2, 0.4],
        }
        for a in (
            D.BEFORE,
            D.IMAGES,
            *(D.name(d, p) for d in (D.OURS, *D.OTHERS) for p in D.POINTS),
        )
        for c in CATEGORIES
    ]
    assert {t.get_text() for t in D.figure({"rows": rows}).axes[0].texts} == {
        D.OURS,
        *D.OTHERS,
        "start",
    }
    assert len(D.categories_figure({"rows": rows}).axes[0].get_yticklabels()) == 3
