"The clinic: its world, drawings and teachers hold what they state."

import math
import re
from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest

from octomed.clinic import drawings, teachers
from octomed.clinic import questions as clinic
from octomed.clinic.manners import MANNERS, list_told_joins, tell_case
from octomed.clinic.oracles import answer_by_composition, answer_by_one_fact, tabulate_oracles
from octomed.clinic.questions import CATEGORY, SIZES, load_questions, look_up_truth
from octomed.clinic.students import build_tokenizer
from octomed.clinic.teachers import (
    HASTY,
    INSTRUCT,
    REASONER,
    TUTOR,
    SimulatedTeacher,
    is_reasoning_valid,
    respond,
)
from octomed.clinic.textbook import (
    collect_corpus,
    draw_atlas,
    list_entities,
    list_vocabulary,
    write_textbook,
)
from octomed.clinic.world import (
    REQUESTS,
    Join,
    divide_joins,
    is_decisive,
    load_conditions,
    may_train,
)
from octomed.core.identity import canonicalize
from octomed.core.paths import OctomedError, store_dir
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
    dev = load_questions("clinic_ward", "dev")
    for source in ("clinic_reading", "clinic_rounds"):
        dev += load_questions(source, "dev", limit=60)
    test = texts + seen + load_questions("clinic_scanner", "test", limit=32)
    assert not images_of(train) & images_of(test)
    assert not images_of(dev) & images_of(train + test)
    assert len({q.id for q in train + dev + test}) == len(train) + len(dev) + len(test)


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


def recall_by_factor(questions, times) -> float:
    "Accuracy of somebody who remembers which answer goes with which factor."
    right = []
    for q in questions:
        factor = look_up_truth(q.id).factor
        remembered = {option: times[factor, option] for option in q.options}
        right.append(q.answer_text == max(remembered, key=remembered.get))
    return np.mean(right)


def test_what_is_remembered_of_a_factor_does_not_help_where_the_join_is_new(ward, texts):
    treatments = [q for q in ward if q.tags["kind"] == "treat"]
    times = Counter((look_up_truth(q.id).factor, q.answer_text) for q in treatments)
    asked = [q for q in texts if q.source == "clinic_ward" and q.tags["kind"] == "treat"]
    new = [q for q in asked if q.tags["held_out"]]
    known = [q for q in asked if not q.tags["held_out"]]
    assert min(len(treatments) / 10, len(new), len(known)) > 50
    assert recall_by_factor(new, times) < 0.25 < recall_by_factor(known, times) < 0.75


def test_a_quarter_of_the_joins_is_held_out_for_test_and_an_eighth_for_dev():
    for form in REQUESTS:
        splits = [
            divide_joins()[Join(c.name, *form)] for c in load_conditions().values() if not c.held
        ]
        assert Counter(splits) == {"train": 13, "test": 6, "dev": 3}
    for join, split in divide_joins().items():
        if join.request == "treat" and not join.forbidden:
            assert split == divide_joins()[join._replace(request="first")]  # one answer
        if load_conditions()[join.condition].held:
            assert split == "test"


@pytest.mark.parametrize("source, split", SIZES)
def test_a_split_asks_for_its_own_joins(source, split):
    joins = [truth.join for _, _, truth, _ in clinic.load_plans(source, split, store_dir())]
    if CATEGORY[source] == "multimodal_classification":
        assert set(joins) == {None}
        return
    splits = Counter(divide_joins()[join] for join in joins)
    if split == "train" or source in clinic.OUT_OF_DISTRIBUTION:
        assert set(splits) == {split}
        return
    assert splits == {"train": 250, split: 250}
    first = [divide_joins()[join] for join in joins[:40]]
    assert Counter(first) == {"train": 20, split: 20}


def test_tags_tell_the_join_of_a_question(texts):
    for q in texts:
        join = look_up_truth(q.id).join
        assert q.tags["join"] == str(join)
        assert q.tags["held_out"] == (divide_joins()[join] == "test")
    (look,) = load_questions("clinic_reading", "test", limit=1)
    assert not {"join", "held_out"} & set(look.tags)


FOR_TRAINING = {str(join) for join in divide_joins() if may_train(join)}
CLINIC = {
    role: sorted(
        spec for spec, s in SOURCES.items() if spec.startswith("clinic_") and s.role == role
    )
    for role in ("train", "comparison")
}


def test_every_clinic_pool_is_looked_through():
    assert len(CLINIC["train"]) == 5 and len(CLINIC["comparison"]) == 4
    roles = {SOURCES[f"{name}:dev"].role for name, split in SIZES if split == "dev"}
    assert roles == {"benchmark"}  # so that no arm can be trained on it


@pytest.mark.parametrize("spec", CLINIC["train"])
def test_no_held_out_join_is_in_a_pool(spec):
    if spec.startswith("clinic_near"):
        truths = [look_up_truth(q.id) for q in load(spec)]
    else:
        truths = [truth for _, _, truth, _ in clinic.load_plans(*spec.split(":"), store_dir())]
    assert all(may_train(truth.join) for truth in truths)


@pytest.mark.parametrize("manner", MANNERS)
def test_no_held_out_join_is_in_a_chat(manner):
    for i in range(600):
        stem, truth, _ = clinic.draft_question("clinic_rounds", "train", i)
        q = clinic.build_question(
            "clinic_rounds", "train", i, stem=stem, truth=truth, image=f"name:chat{i}"
        )
        told = list_told_joins(q, manner)
        assert len(told) == len(set(told)) and set(told) <= FOR_TRAINING
        for _, answer in tell_case(q, manner) if manner == "turns" else ():
            for kind, slots in teachers.read_facts(answer):
                if kind != "look":
                    assert str(Join(slots["c"], kind)) in told


def test_no_paragraph_of_the_textbook_chains_two_facts_of_a_condition():
    paragraphs = 0
    for paragraph in write_textbook(1, 1200, 0, words=0):
        named = Counter(slots["c"] for _, slots in teachers.read_facts(paragraph) if "c" in slots)
        assert max(named.values(), default=0) <= 1, paragraph
        paragraphs += bool(named)
    assert paragraphs > 1000


@pytest.mark.parametrize("who", [REASONER, INSTRUCT, HASTY], ids=lambda t: t.label)
def test_no_trace_for_training_reasons_by_a_held_out_join(who, ward):
    errors = 0
    for q, seed in product(ward[:1500], (0, 1)):
        truth, text = look_up_truth(q.id), respond(who, q.id, seed)[0]
        facts = teachers.read_facts(text)
        named = [slots["c"] for kind, slots in facts if kind == "dx"]
        status = judge(text, q.letters, q.answer, think_first=True).status
        if not named or (status != "correct" and truth.kind == "dx"):
            continue  # a wrong diagnosis is an option that the question offers
        treats = truth.kind in ("treat", "harm")
        weighed = [kind for kind, _ in facts if kind in ("contra", "allowed")]
        if treats and not weighed:
            continue  # cut off, or a false first treatment
        stated = Join(named[0], truth.kind, treats and weighed[0] == "contra")
        assert may_train(stated), text
        errors += stated != truth.join
    assert errors > 50


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


def test_the_tutor_never_errs_and_says_nothing_beside_the_chain(ward, seen):
    for q in ward[:200]:
        text, finish = respond(TUTOR, q.id, 3)
        assert finish == "stop"
        assert is_reasoning_valid(q, text)
        assert f"<answer>{q.answer}: {q.answer_text}</answer>" in text
    assert median_words(TUTOR, ward[:200]) < median_words(REASONER, ward[:200])
    assert {respond(TUTOR, q.id, 0)[1] for q in seen[:20]} == {"refused"}


def test_the_hasty_teacher_leaves_out_what_forbids_a_treatment_as_stated(ward):
    may, named, weighed = 0, 0, 0
    for q in ward[:3000]:
        truth, option = look_up_truth(q.id), teachers.find_forbidden_option(look_up_truth(q.id))
        assert bool(option) == truth.forbidden
        if not truth.forbidden or not teachers._may_skip(truth):
            continue
        text = respond(HASTY, q.id, 7)[0]
        verdict = judge(text, q.letters, q.answer, think_first=True)
        if verdict.status not in ("correct", "wrong"):
            continue
        kinds = [kind for kind, _ in teachers.read_facts(text)]
        may += 1
        if q.letters[verdict.letter] == option and not {"contra", "allowed"} & set(kinds):
            named += 1
            assert truth.factor not in text
            assert not is_reasoning_valid(q, text)
        weighed += "contra" in kinds
    assert may > 400
    assert within(named, may, HASTY.leaves_out)
    assert weighed > 0.1 * may


def test_where_nothing_is_forbidden_the_hasty_teacher_errs_as_the_reasoner_does(ward):
    wrong = {}
    for who in (HASTY, REASONER):
        statuses = []
        for q in ward[:2400]:
            if not look_up_truth(q.id).forbidden:
                text = respond(who, q.id, 13)[0]
                statuses.append(judge(text, q.letters, q.answer, think_first=True).status)
        wrong[who.label] = statuses.count("wrong") / len(statuses)
    assert abs(wrong["clinic/hasty"] - wrong["clinic/reasoner"]) < 0.03


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


def test_a_name_of_several_words_is_one_token(texts):
    names = list_entities()
    tokenizer = build_tokenizer(collect_corpus(), names=names)
    assert len(names) == 203
    for name in names:
        for text in (name, f" {name}"):
            assert tokenizer.tokenize(text) == [text]
    for q in texts[::5]:
        text = f"{q.stem}\n{', '.join(q.options)}.\n{respond(REASONER, q.id, 0)[0]}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    # The words of a name are known apart, and no longer word is cut.
    assert tokenizer.tokenize("heart surgery of the heart") == [
        "heart surgery",
        " of",
        " the",
        " heart",
    ]
    assert tokenizer.tokenize("heart surgerys")[0] == "heart"
