"The clinic: its world, drawings and teachers hold what they state."

import math
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from octomed.clinic import drawings, teachers, world
from octomed.clinic.oracles import full_oracle, one_fact_oracle
from octomed.clinic.questions import SIZES, questions, reference
from octomed.clinic.teachers import INSTRUCT, REASONER, SimulatedTeacher, reasoning_valid, respond
from octomed.clinic.world import conditions
from octomed.core.identity import canonical
from octomed.core.paths import OctomedError
from octomed.data.sources import SOURCES, load
from octomed.generate.answers import judge
from octomed.generate.engines import Request, Sampling, teacher


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OCTOMED_STORE", str(tmp_path_factory.mktemp("clinic")))
        yield


@pytest.fixture(scope="module")
def ward():
    return questions("clinic_ward", "train", limit=3000)


@pytest.fixture(scope="module")
def texts():
    return questions("clinic_ward", "test") + questions("clinic_boards", "test")


@pytest.fixture(scope="module")
def seen():
    return (
        questions("clinic_reading", "test", limit=160)
        + questions("clinic_rounds", "test", limit=200)
        + questions("clinic_grand", "test", limit=120)
    )


def test_conditions_are_decided_by_three_findings_and_not_by_one():
    cs = conditions().values()
    assert len(cs) == 28 and sum(bool(c.image) for c in cs) >= 8
    for c in cs:
        assert len(c.shows) == 4
        assert all(world.decides(three) for three in combinations(c.shows, 3)), c.name
        assert any(not world.decides((f,)) for f in c.shows), c.name


def test_a_factor_does_not_give_the_alternative_away():
    for factor in {c.factor for c in conditions().values()}:
        alternatives = [c.alternative for c in conditions().values() if c.factor == factor]
        assert len(alternatives) > 1 and len(set(alternatives)) == len(alternatives), factor


def test_vocabulary_is_small_and_holds_every_word(texts, seen):
    words = world.vocabulary()
    assert len(words) <= 700
    said = [
        respond(t, q.id, s)[0]
        for t in (REASONER, INSTRUCT)
        for q in texts[::4] + seen[::4]
        for s in (0, 1)
    ]
    said = [
        w
        for x in said
        for w in x.replace("<think>", " ")
        .replace("</think>", " ")
        .replace("<answer>", " ")
        .replace("</answer>", " ")
        .split("\n")
    ]
    lines = (
        said
        + [q.stem for q in texts + seen]
        + [o for q in texts + seen for o in q.options]
        + world.textbook(5, 300, 100, 50)
        + [c for _, c in world.atlas(1, per_class=1)]
    )
    assert {w for x in lines for w in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", x)} <= set(words)


def test_stems_and_traces_have_the_stated_length(texts):
    assert all(25 <= len(q.stem.split()) <= 60 for q in texts)
    reasoner, instruct = (
        np.median([len(respond(t, q.id, 0)[0].split()) for q in texts])
        for t in (REASONER, INSTRUCT)
    )
    assert 45 <= reasoner <= 90 and 20 <= instruct < reasoner


def test_splits_share_no_question(ward, texts, seen):
    train = (
        ward
        + questions("clinic_reading", "train", limit=60)
        + questions("clinic_rounds", "train", limit=60)
    )
    test = texts + seen + questions("clinic_scanner", "test", limit=32)
    assert not {q.id for q in train} & {q.id for q in test}
    assert not {i for q in train for i in q.images} & {i for q in test for i in q.images}
    assert len({q.id for q in train + test}) == len(train) + len(test)


def test_picture_pools_are_disjoint_and_no_two_drawings_are_equal():
    keys = [
        world.picture_key(p, "mri", "dural mass", k)
        for p, n in world.PICTURES.items()
        for k in range(n)
    ]
    assert len(set(keys)) == len(keys)
    assert len(set(world.pictures(keys[:30]))) == 30


def test_held_out_conditions_stay_out_of_training(ward):
    held = {c.name for c in conditions().values() if c.held}
    assert len(held) == 6
    rounds = [world.plan("clinic_rounds", "train", i)[1] for i in range(500)]
    assert not held & ({q.tags["condition"] for q in ward} | {t.condition for t in rounds})
    assert not held & {o for q in ward for o in q.options}
    assert {q.tags["condition"] for q in questions("clinic_boards", "test")} == held


@pytest.mark.parametrize(
    "source, split",
    [
        ("clinic_ward", "train"),
        ("clinic_boards", "test"),
        ("clinic_rounds", "train"),
        ("clinic_reading", "train"),
    ],
)
def test_positions_of_the_answer_are_uniform(source, split):
    n = SIZES[source, split] if source == "clinic_boards" else 2400
    letters = (
        Counter(q.answer for q in questions(source, split, n))
        if source in ("clinic_ward", "clinic_boards")
        else Counter(world.plan(source, split, i)[1].letter for i in range(n))
    )
    k = 5 if source == "clinic_boards" else 4
    chi2 = sum((c - n / k) ** 2 / (n / k) for c in letters.values())
    assert (
        len(letters) == k and chi2 < {4: 16.27, 5: 18.47}[k]
    )  # 0.1 % of a fair world is beyond it


def test_full_oracle_is_always_right(ward, texts, seen):
    for q in ward[:600] + texts + seen:
        assert full_oracle(q, reference(q.id).image) == q.answer, q


def test_one_fact_oracle_solves_one_step_and_no_more(texts):
    for source in ("clinic_ward", "clinic_boards"):
        table = world.oracle_table([q for q in texts if q.source == source])
        chance = 0.25 if source == "clinic_ward" else 0.2
        assert table[1]["one_fact"] > 0.9
        assert table[3]["one_fact"] < 0.05  # it takes the shortcut
        for k in (2, 4):
            assert table[k]["one_fact"] < chance + 3.1 * math.sqrt(
                chance * (1 - chance) / table[k]["n"]
            )


def test_the_factor_does_not_give_the_answer_away(ward):
    ts = [t for q in ward if (t := reference(q.id)).kind == "treat"]
    known, new = ts[::2], ts[1::2]
    heart = Counter((t.factor, t.answer) for t in known)
    assert (
        len(new) > 250
        and np.mean([t.answer == max(t.options, key=lambda o: heart[t.factor, o]) for t in new])
        < 0.45
    )


def test_questions_with_images_need_the_image(seen):
    rounds = [q for q in seen if q.source == "clinic_rounds"]
    for q in rounds:
        t = reference(q.id)
        with pytest.raises(OctomedError):
            full_oracle(q)  # without it the condition is open
        assert t.image == conditions()[t.condition].image
    assert np.mean([one_fact_oracle(q) == q.answer for q in rounds]) < 0.5


def test_the_shortcut_is_among_the_options(ward):
    for q in ward[:1000]:
        t, c = reference(q.id), conditions()[q.tags["condition"]]
        if t.kind == "treat":
            assert {c.first, c.alternative} <= set(q.options)


def test_a_question_is_the_same_every_time(ward):
    again = questions("clinic_ward", "train", limit=50)
    assert [canonical(q.to_json()) for q in again] == [canonical(q.to_json()) for q in ward[:50]]
    assert (
        world.textbook(3, 50, 50, 5) == world.textbook(3, 50, 50, 5) != world.textbook(4, 50, 50, 5)
    )


def test_reference_is_rebuilt_from_an_id(texts, seen):
    for q in (texts[7], seen[-1]):
        truth = reference(q.id)
        world.TRUTHS.pop(q.id)
        world._recall_text.cache_clear()
        world._recall_images.cache_clear()
        assert reference(q.id) == truth and truth.letter == q.answer


def test_sources_are_registered():
    assert {f"{n}:{s}" for n, s in SIZES} <= set(SOURCES)
    qs = load("clinic_boards:test")
    assert len(qs) == SIZES["clinic_boards", "test"] and all(len(q.options) == 5 for q in qs)


@pytest.mark.parametrize("modality", list(drawings.CLASSES))
def test_every_class_of_drawing_is_visible(modality):
    means = {
        c: np.mean(
            [
                np.asarray(drawings.draw(modality, c, k), float)
                .reshape(14, 8, 14, 8, 3)
                .mean((1, 3))
                for k in range(10)
            ],
            0,
        )
        for c in drawings.CLASSES[modality]
    }
    normal, *others = means.values()
    noise = np.asarray(drawings.GRAIN["a"]) / math.sqrt(64 * 10)
    for o in others:
        assert np.abs(o - normal).max() > 20 * noise  # somewhere the mean picture differs
    assert drawings.nearest_mean(modality, n=10) > 0.35


def test_scanner_b_is_another_machine():
    a, b = (
        np.mean(
            [np.asarray(drawings.draw("xray", "normal chest", k, s), float).std() for k in range(6)]
        )
        for s in "ab"
    )
    assert b < 0.9 * a
    with pytest.raises(OctomedError):
        drawings.draw("xray", "ring lesion", 0)


def test_a_drawing_is_the_same_every_time():
    assert (
        drawings.draw("fundus", "new vessels", 3).tobytes()
        == drawings.draw("fundus", "new vessels", 3).tobytes()
        != drawings.draw("fundus", "new vessels", 4).tobytes()
    )


def within(count, n, p, z=3.9):
    return abs(count - n * p) <= z * math.sqrt(n * p * (1 - p)) + 1  # about 1 in 10,000


@pytest.mark.parametrize("who", [REASONER, INSTRUCT], ids=lambda t: t.label)
def test_teachers_err_as_stated(who, ward):
    rows = {}
    for q in ward[:2400]:
        text, finish = respond(who, q.id, 11)
        v = judge(text, q.letters, q.answer, think_first=True).status
        rows.setdefault(q.tags["steps"], []).append(
            (finish, v, v == "correct" and not reasoning_valid(q, text))
        )
    everything = [x for r in rows.values() for x in r]
    assert within(sum(f == "refused" for f, *_ in everything), len(everything), who.refused)
    assert within(sum(f == "length" for f, *_ in everything), len(everything), who.truncated)
    for steps, r in rows.items():
        read = [v for f, v, _ in r if v in ("correct", "wrong")]
        assert within(read.count("wrong"), len(read), who.answer_wrong[steps - 1]), steps
    right = [lucky for _, v, lucky in everything if v == "correct"]
    assert within(sum(right), len(right), who.reasoning_wrong)


def test_the_instruct_teacher_misreads_images_as_stated():
    for i in range(600):
        world.asked(
            "clinic_reading", "train", i, *world.plan("clinic_reading", "train", i)[:2], f"name:{i}"
        )
    ids = [(k, t) for k, t in world.TRUTHS.items() if t.kind == "look"][-600:]
    out = [
        judge(
            respond(INSTRUCT, k, 5)[0],
            dict(zip("ABCD", t.options, strict=False)),
            t.letter,
            think_first=True,
        ).status
        for k, t in ids
    ]
    read = [v for v in out if v in ("correct", "wrong")]
    assert within(read.count("wrong"), len(read), INSTRUCT.look_wrong)


def test_the_reasoner_refuses_images(seen):
    assert {respond(REASONER, q.id, s)[1] for q in seen[:50] for s in range(2)} == {"refused"}


def test_right_chains_are_valid_and_wrong_ones_are_not(texts, seen):
    rng = np.random.default_rng(0)
    for q in texts[::5] + seen[::5]:
        t = reference(q.id)
        for who in (INSTRUCT,) if q.images else (REASONER, INSTRUCT):
            good = teachers.thought(rng, who, t, t.facts, t.letter)
            bad = teachers.thought(rng, who, t, teachers.lucky_chain(rng, t), t.letter)
            assert reasoning_valid(q, f"<think>{good}</think>\n\n<answer>{t.letter}</answer>"), good
            assert not reasoning_valid(q, f"<think>{bad}</think>\n\n<answer>{t.letter}</answer>"), (
                bad
            )
        assert not reasoning_valid(q, f"<think>so.</think>\n\n<answer>{t.letter}</answer>")


def test_a_request_never_carries_the_answer(texts):
    q = texts[3]
    plain = Request(
        q.id, [{"role": "user", "content": [{"type": "text", "text": q.stem}]}], "demo", (0, 1)
    )
    assert "answer" not in set(plain.__dataclass_fields__)
    engine = teacher("clinic/reasoner")

    def texts_of(r):
        return [s.text for s in engine.generate([r], Sampling())]

    assert texts_of(plain) == texts_of(
        Request(q.id, [], "demo", (0, 1))
    )  # it looks its own world up by the id


def test_an_unknown_question_is_an_error_sample():
    s = list(
        teacher("clinic/instruct").generate([Request("f" * 16, [], "demo", (0, 1))], Sampling())
    )
    assert [x.finish for x in s] == ["error"] * 2 and "does not know" in s[0].text


def test_fault_13_sixteen_samples_are_distinct_and_seeded(texts):
    for q in texts[:10]:
        s = list(
            SimulatedTeacher(REASONER).generate(
                [Request(q.id, [], "demo", tuple(range(16)))], Sampling()
            )
        )
        assert len({x.text for x in s}) >= 14 and len({x.seed for x in s}) == 16
        assert [
            x.text
            for x in SimulatedTeacher(REASONER).generate(
                [Request(q.id, [], "demo", (5,))], Sampling()
            )
        ] == [s[5].text]
        assert (
            s[0].text
            != next(
                SimulatedTeacher(REASONER).generate(
                    [Request(q.id, [], "demo", (0,))], Sampling(seed=1)
                )
            ).text
        )


def test_a_budget_cuts_a_response_off(texts):
    s = next(
        SimulatedTeacher(REASONER).generate(
            [Request(texts[0].id, [], "demo")], Sampling(max_tokens=10)
        )
    )
    assert s.tokens <= 10 and s.finish in ("length", "refused")
