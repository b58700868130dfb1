"The clinic: its world, drawings and teachers hold what they state."

import math
import re
from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest

from octomed.clinic import drawings, teachers
from octomed.clinic import questions as clinic
from octomed.clinic.oracles import answer_by_composition, answer_by_one_fact, tabulate_oracles
from octomed.clinic.questions import SIZES, load_questions, look_up_truth
from octomed.clinic.teachers import (
    INSTRUCT,
    REASONER,
    SimulatedTeacher,
    is_reasoning_valid,
    respond,
)
from octomed.clinic.textbook import draw_atlas, list_vocabulary, write_textbook
from octomed.clinic.world import is_decisive, load_conditions
from octomed.core.identity import canonicalize
from octomed.core.paths import OctomedError
from octomed.data.sources import SOURCES, load
from octomed.generate.answers import judge
from octomed.generate.engines import load_teacher
from octomed.generate.samples import Request, Sampling


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OCTOMED_STORE", str(tmp_path_factory.mktemp("clinic")))
        yield


@pytest.fixture(scope="module")
def ward():
    return load_questions("clinic_ward", "train", limit=3000)


@pytest.fixture(scope="module")
def texts():
    return load_questions("clinic_ward", "test") + load_questions("clinic_boards", "test")


@pytest.fixture(scope="module")
def seen():
    return (
        load_questions("clinic_reading", "test", limit=160)
        + load_questions("clinic_rounds", "test", limit=200)
        + load_questions("clinic_grand", "test", limit=120)
    )


def test_conditions_are_decided_by_three_findings_and_not_by_one():
    cs = load_conditions().values()
    assert len(cs) == 28 and sum(bool(c.image) for c in cs) >= 8
    for c in cs:
        assert len(c.shows) == 4
        assert all(is_decisive(three) for three in combinations(c.shows, 3)), c.name
        assert any(not is_decisive((f,)) for f in c.shows), c.name


def test_a_factor_does_not_give_the_alternative_away():
    for factor in {c.factor for c in load_conditions().values()}:
        alternatives = [c.alternative for c in load_conditions().values() if c.factor == factor]
        assert len(alternatives) > 1 and len(set(alternatives)) == len(alternatives), factor


def sentences_of(response: str) -> list[str]:
    "A response without its tags, line by line."
    for mark in ("<think>", "</think>", "<answer>", "</answer>"):
        response = response.replace(mark, " ")
    return response.split("\n")


def test_vocabulary_is_small_and_holds_every_word(texts, seen):
    words = list_vocabulary()
    assert len(words) <= 700
    lines = write_textbook(5, 300, 100, words=50) + [
        caption for _, caption in draw_atlas(1, per_class=1)
    ]
    for q in texts + seen:
        lines += [q.stem, *q.options]
    for who, q, seed in product((REASONER, INSTRUCT), texts[::4] + seen[::4], (0, 1)):
        lines += sentences_of(respond(who, q.id, seed)[0])
    occurring = set()
    for line in lines:
        occurring.update(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", line))
    assert occurring <= set(words)


def median_words(who, questions) -> float:
    return np.median([len(respond(who, q.id, 0)[0].split()) for q in questions])


def test_stems_and_traces_have_the_stated_length(texts):
    assert all(25 <= len(q.stem.split()) <= 60 for q in texts)
    reasoner, instruct = median_words(REASONER, texts), median_words(INSTRUCT, texts)
    assert 45 <= reasoner <= 90
    assert 20 <= instruct < reasoner


def images_of(questions) -> set[str]:
    return set().union(*(q.images for q in questions))


def test_splits_share_no_question(ward, texts, seen):
    train = (
        ward
        + load_questions("clinic_reading", "train", limit=60)
        + load_questions("clinic_rounds", "train", limit=60)
    )
    test = texts + seen + load_questions("clinic_scanner", "test", limit=32)
    assert not {q.id for q in train} & {q.id for q in test}
    assert not images_of(train) & images_of(test)
    assert len({q.id for q in train + test}) == len(train) + len(test)


def test_picture_pools_are_disjoint_and_no_two_drawings_are_equal():
    keys = []
    for pool, n in clinic.PICTURES.items():
        keys += [clinic.choose_picture(pool, "mri", "dural mass", k=k) for k in range(n)]
    assert len(set(keys)) == len(keys)
    assert len(set(clinic.draw_pictures(keys[:30]))) == 30


def test_held_out_conditions_stay_out_of_training(ward):
    held = {c.name for c in load_conditions().values() if c.held}
    assert len(held) == 6
    rounds = [clinic.draft_question("clinic_rounds", "train", i)[1] for i in range(500)]
    assert not held & ({q.tags["condition"] for q in ward} | {t.condition for t in rounds})
    assert not held & set().union(*(q.options for q in ward))
    assert {q.tags["condition"] for q in load_questions("clinic_boards", "test")} == held


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
    if source in ("clinic_ward", "clinic_boards"):
        letters = Counter(q.answer for q in load_questions(source, split, n))
    else:
        letters = Counter(clinic.draft_question(source, split, i)[1].letter for i in range(n))
    places, limit = (5, 18.47) if source == "clinic_boards" else (4, 16.27)
    expected = n / places
    chi2 = sum((count - expected) ** 2 / expected for count in letters.values())
    assert len(letters) == places
    assert chi2 < limit  # of fair worlds, 0.1 % are beyond it


def test_full_oracle_is_always_right(ward, texts, seen):
    for q in ward[:600] + texts + seen:
        assert answer_by_composition(q, look_up_truth(q.id).image) == q.answer, q


def test_one_fact_oracle_solves_one_step_and_no_more(texts):
    for source in ("clinic_ward", "clinic_boards"):
        table = tabulate_oracles([q for q in texts if q.source == source])
        chance = 0.25 if source == "clinic_ward" else 0.2
        assert table[1]["one_fact"] > 0.9
        assert table[3]["one_fact"] < 0.05  # it takes the shortcut
        for steps in (2, 4):
            error = math.sqrt(chance * (1 - chance) / table[steps]["n"])
            assert table[steps]["one_fact"] < chance + 3.1 * error


def test_the_factor_does_not_give_the_answer_away(ward):
    truths = [look_up_truth(q.id) for q in ward]
    treatments = [t for t in truths if t.kind == "treat"]
    known, new = treatments[::2], treatments[1::2]
    times = Counter((t.factor, t.answer) for t in known)
    right = []
    for t in new:
        remembered = {option: times[t.factor, option] for option in t.options}
        right.append(t.answer == max(remembered, key=remembered.get))
    assert len(new) > 250
    assert np.mean(right) < 0.45


def test_questions_with_images_need_the_image(seen):
    rounds = [q for q in seen if q.source == "clinic_rounds"]
    for q in rounds:
        t = look_up_truth(q.id)
        with pytest.raises(OctomedError):
            answer_by_composition(q)  # without it the condition is open
        assert t.image == load_conditions()[t.condition].image
    assert np.mean([answer_by_one_fact(q) == q.answer for q in rounds]) < 0.5


def test_the_shortcut_is_among_the_options(ward):
    for q in ward[:1000]:
        t, c = look_up_truth(q.id), load_conditions()[q.tags["condition"]]
        if t.kind == "treat":
            assert {c.first, c.alternative} <= set(q.options)


def test_a_question_is_the_same_every_time(ward):
    again = load_questions("clinic_ward", "train", limit=50)
    assert [canonicalize(q.to_json()) for q in again] == [
        canonicalize(q.to_json()) for q in ward[:50]
    ]
    assert (
        write_textbook(3, 50, 50, words=5)
        == write_textbook(3, 50, 50, words=5)
        != write_textbook(4, 50, 50, words=5)
    )


def test_reference_is_rebuilt_from_an_id(texts, seen):
    for q in (texts[7], seen[-1]):
        truth = look_up_truth(q.id)
        clinic.TRUTHS.pop(q.id)
        clinic._recall_text.cache_clear()
        clinic._recall_images.cache_clear()
        assert look_up_truth(q.id) == truth and truth.letter == q.answer


def test_sources_are_registered():
    assert {f"{n}:{s}" for n, s in SIZES} <= set(SOURCES)
    qs = load("clinic_boards:test")
    assert len(qs) == SIZES["clinic_boards", "test"] and all(len(q.options) == 5 for q in qs)


@pytest.mark.parametrize("modality", list(drawings.CLASSES))
def test_every_class_of_drawing_is_visible(modality):
    means = []
    for cls in drawings.CLASSES[modality]:
        pictures = [np.asarray(drawings.draw_picture(modality, cls, k), float) for k in range(10)]
        small = [picture.reshape(14, 8, 14, 8, 3).mean((1, 3)) for picture in pictures]
        means.append(np.mean(small, 0))
    normal, *others = means
    noise = np.asarray(drawings.GRAIN["a"]) / math.sqrt(64 * 10)
    for other in others:
        assert np.abs(other - normal).max() > 20 * noise  # somewhere the mean picture differs
    assert drawings.measure_nearest_mean(modality, n=10) > 0.35


def contrast(scanner: str) -> float:
    "Standard deviation of a normal chest, on average."
    pictures = [drawings.draw_picture("xray", "normal chest", k, scanner=scanner) for k in range(6)]
    return np.mean([np.asarray(picture, float).std() for picture in pictures])


def test_scanner_b_is_another_machine():
    assert contrast("b") < 0.9 * contrast("a")
    with pytest.raises(OctomedError):
        drawings.draw_picture("xray", "ring lesion", 0)


def test_a_drawing_is_the_same_every_time():
    assert (
        drawings.draw_picture("fundus", "new vessels", 3).tobytes()
        == drawings.draw_picture("fundus", "new vessels", 3).tobytes()
        != drawings.draw_picture("fundus", "new vessels", 4).tobytes()
    )


def within(count, n, p, z=3.9):
    return abs(count - n * p) <= z * math.sqrt(n * p * (1 - p)) + 1  # about 1 in 10,000


@pytest.mark.parametrize("who", [REASONER, INSTRUCT], ids=lambda t: t.label)
def test_teachers_err_as_stated(who, ward):
    rows = {}
    for q in ward[:2400]:
        text, finish = respond(who, q.id, 11)
        status = judge(text, q.letters, q.answer, think_first=True).status
        lucky = status == "correct" and not is_reasoning_valid(q, text)
        rows.setdefault(q.tags["steps"], []).append((finish, status, lucky))
    everything = list(chain.from_iterable(rows.values()))
    finishes = [finish for finish, *_ in everything]
    assert within(finishes.count("refused"), len(everything), who.refused)
    assert within(finishes.count("length"), len(everything), who.truncated)
    for steps, samples in rows.items():
        read = [status for _, status, _ in samples if status in ("correct", "wrong")]
        assert within(read.count("wrong"), len(read), who.answer_wrong[steps - 1]), steps
    lucky = [lucky for _, status, lucky in everything if status == "correct"]
    assert within(sum(lucky), len(lucky), who.reasoning_wrong)


def test_the_instruct_teacher_misreads_images_as_stated():
    for i in range(600):
        stem, truth, _ = clinic.draft_question("clinic_reading", "train", i)
        clinic.build_question(
            "clinic_reading", "train", i, stem=stem, truth=truth, image=f"name:{i}"
        )
    looks = [(key, t) for key, t in clinic.TRUTHS.items() if t.kind == "look"][-600:]
    read = []
    for key, t in looks:
        letters = dict(zip("ABCD", t.options, strict=True))
        verdict = judge(respond(INSTRUCT, key, 5)[0], letters, t.letter, think_first=True)
        if verdict.status in ("correct", "wrong"):
            read.append(verdict.status)
    assert within(read.count("wrong"), len(read), INSTRUCT.look_wrong)


def test_the_reasoner_refuses_images(seen):
    assert {respond(REASONER, q.id, s)[1] for q in seen[:50] for s in range(2)} == {"refused"}


def test_right_chains_are_valid_and_wrong_ones_are_not(texts, seen):
    rng = np.random.default_rng(0)

    def response(who, t, facts):
        thought = teachers.speak_thought(rng, who, t, facts=facts, letter=t.letter)
        return f"<think>{thought}</think>\n\n<answer>{t.letter}</answer>"

    for q in texts[::5] + seen[::5]:
        t = look_up_truth(q.id)
        for who in (INSTRUCT,) if q.images else (REASONER, INSTRUCT):
            good = response(who, t, t.facts)
            bad = response(who, t, teachers.choose_lucky_chain(rng, t))
            assert is_reasoning_valid(q, good), good
            assert not is_reasoning_valid(q, bad), bad
        assert not is_reasoning_valid(q, f"<think>so.</think>\n\n<answer>{t.letter}</answer>")


def sample(engine, question_id, indices=(0,), sampling=None):
    request = Request(question_id, [], "demo", indices=indices)
    return list(engine.generate([request], sampling or Sampling()))


def test_a_request_never_carries_the_answer(texts):
    q = texts[3]
    messages = [{"role": "user", "content": [{"type": "text", "text": q.stem}]}]
    request = Request(q.id, messages, "demo", indices=(0, 1))
    assert "answer" not in set(request.__dataclass_fields__)
    engine = load_teacher("clinic/reasoner")
    asked = [s.text for s in engine.generate([request], Sampling())]
    # It looks the question up by the id, so an empty request gives the same.
    assert asked == [s.text for s in sample(engine, q.id, indices=(0, 1))]


def test_an_unknown_question_is_an_error_sample():
    samples = sample(load_teacher("clinic/instruct"), "f" * 16, indices=(0, 1))
    assert [s.finish for s in samples] == ["error"] * 2
    assert "does not know" in samples[0].text


def test_fault_13_sixteen_samples_are_distinct_and_seeded(texts):
    engine = SimulatedTeacher(REASONER)
    for q in texts[:10]:
        samples = sample(engine, q.id, indices=tuple(range(16)))
        assert len({s.text for s in samples}) >= 14
        assert len({s.seed for s in samples}) == 16
        assert [s.text for s in sample(engine, q.id, indices=(5,))] == [samples[5].text]
        (other,) = sample(engine, q.id, sampling=Sampling(seed=1))
        assert samples[0].text != other.text


def test_a_budget_cuts_a_response_off(texts):
    (cut,) = sample(SimulatedTeacher(REASONER), texts[0].id, sampling=Sampling(max_tokens=10))
    assert cut.tokens <= 10
    assert cut.finish in ("length", "refused")
