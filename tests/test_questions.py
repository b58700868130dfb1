import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from octomed.core.paths import OctomedError, UsageError, shipped
from octomed.data import sources as module
from octomed.data.publishers import (
    from_brain_tumor,
    from_headqa,
    from_medmcqa,
    from_medqa,
    from_medxpertqa,
    from_mmlu_pro,
    from_mmmu_pro,
)
from octomed.data.questions import (
    SCHEMA,
    Question,
    check_conserved,
    dedupe,
    draw_balanced,
    find_flaw,
)
from octomed.data.sources import (
    NAMED,
    SOURCES,
    Source,
    explain_traces,
    find_image_files,
    identify_source,
    load,
    load_report,
    read_chats,
    register,
    stream,
    tabulate_sources,
)

DATA = os.environ.get("OCTOMED_DATA")
real = pytest.mark.skipif(not DATA, reason="OCTOMED_DATA is not set")
EXAMPLES = shipped("examples")
Q = Question("Which?", ("yes", "no"), "A", "demo", "train", "text_only")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))


@pytest.fixture
def here(tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "data")
    return tmp_path / "data"


# identity


def test_ids_are_golden():
    assert SCHEMA == 1
    assert Q.id == "c419c7efa8ab044e"
    assert replace(Q, stem="Éclair?", images=("0" * 32,)).id == "39de812d8fb4cc53"


def test_id_follows_what_is_shown_and_nothing_else():
    assert {
        replace(Q, answer=None).id,
        replace(
            Q, source="x", split="test", origin="7", tags={"a": 1}, category="multimodal_reasoning"
        ).id,
    } == {Q.id}
    others = [
        replace(Q, stem="Which ?"),
        replace(Q, options=("no", "yes")),
        replace(Q, images=("a",)),
        replace(Q, options=("yes", "no", "both")),
    ]
    assert len({Q.id, *(o.id for o in others)}) == 5
    assert replace(Q, stem="e\u0301").id == replace(Q, stem="\u00e9").id
    assert replace(Q, options=("ab", "c")).id != replace(Q, options=("a", "bc")).id


def test_json_round_trip_and_a_changed_row():
    q = replace(Q, images=("a", "b"), tags={"modality": "MRI"})
    d = json.loads(json.dumps(q.to_json()))
    assert Question.from_json(d) == q and d["id"] == q.id and hash(q) == hash(Question.from_json(d))
    with pytest.raises(OctomedError, match="changed by hand"):
        Question.from_json({**d, "stem": "Another?"})


# faults


@pytest.mark.parametrize(
    "changed,reason",
    [
        ({"stem": "  "}, "empty stem"),
        ({"options": ()}, "fewer than two options"),
        ({"options": ("yes",)}, "fewer than two options"),
        ({"options": tuple(f"o{i}" for i in range(27))}, "more than 26 options"),
        ({"options": ("yes", " ")}, "empty option"),
        ({"options": ("yes", "yes ")}, "duplicate options"),
        ({"options": ("e\u0301", "\u00e9")}, "duplicate options"),
        ({"answer": None}, "no answer"),
        ({"answer": ""}, "no answer"),
        ({"answer": "C"}, "answer outside the options"),
        ({"answer": "?"}, "answer outside the options"),
    ],
)
def test_fault_23_flaws_have_reasons(changed, reason):
    assert find_flaw(replace(Q, **changed)) == reason


def test_fault_23_no_flaw_where_there_is_none():
    assert find_flaw(Q) is None and find_flaw(replace(Q, options=("Aa", "aa"))) is None
    assert find_flaw(replace(Q, options=tuple(f"o{i}" for i in range(26)), answer="Z")) is None


def write(folder, rows, name="medqa/phrases_no_exclude_test.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_fault_23_bad_rows_are_dropped_with_a_reason_and_never_crash(here):
    base = {
        "question": "Which?",
        "answer": "x",
        "options": {"A": "x", "B": "y"},
        "meta_info": "step1",
        "answer_idx": "A",
    }
    bad = {
        "no answer": [{"answer_idx": ""}, {"answer_idx": None}],
        "answer outside the options": [{"answer_idx": "C"}, {"answer_idx": "AB"}],
        "empty option": [{"options": {"A": "x", "B": ""}}],
        "more than 26 options": [{"options": [f"o{i}" for i in range(30)]}],
        "fewer than two options": [{"options": {}}],
        "empty stem": [{"question": " "}],
    }
    rows = [{**base, **b} for bs in bad.values() for b in bs]
    write(here, [base, *rows])
    r = load_report("medqa:test", folder=here)
    assert (
        r.reasons == {k: len(v) for k, v in bad.items()}
        and len(r.questions) == 1
        and r.rows == 1 + len(rows)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "qid": st.integers(),
                "qtext": st.text(max_size=5),
                "ra": st.one_of(st.text(max_size=2), st.integers(-1, 30), st.none()),
                "image": st.none(),
                "answers": st.lists(st.text(max_size=3), max_size=30).map(
                    lambda ts: [{"aid": i, "atext": t} for i, t in enumerate(ts, 1)]
                ),
            }
        ),
        max_size=6,
    )
)
def test_fault_23_25_any_headqa_rows_are_kept_or_dropped(rows):
    module.register(
        Source(
            "fuzz",
            "x",
            "text_only",
            "train",
            files=("rows",),
            read=lambda p: ((str(i), r) for i, r in enumerate(rows)),
            normal=from_headqa,
        )
    )
    try:
        find_local = module._find_local
        module._find_local = lambda s, folder: (s.forms[0], [None])
        r = load_report("fuzz:x")
        assert r.rows == len(rows) == len(r.questions) + len(r.dropped) and all(
            find_flaw(q) is None for q in r.questions
        )
    finally:
        module._find_local = find_local
        del SOURCES["fuzz:x"]


def test_fault_14_duplicate_ids_are_dropped_and_conflicts_reported():
    copy, other, unlabelled = (
        replace(Q, source="elsewhere"),
        replace(Q, stem="Another?"),
        replace(Q, stem="Another?", answer=None),
    )
    kept, dropped = dedupe([Q, unlabelled, copy, other])
    assert kept == [Q, other] and [(q, r) for q, r in dropped] == [
        (unlabelled, "duplicate"),
        (copy, "duplicate"),
    ]
    kept, dropped = dedupe([Q, other, replace(Q, answer="B"), Q])
    assert (
        kept == [other]
        and {r for _, r in dropped} == {"conflicting answers A, B"}
        and len(dropped) == 3
    )
    same = [Q] * 3
    assert len(dedupe(same)[0]) == 1 and len(dedupe(same)[1]) == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda s, a: replace(Q, stem=s, answer=a),
            st.sampled_from("xyz"),
            st.sampled_from(["A", "B", None]),
        ),
        max_size=12,
    )
)
def test_fault_14_25_dedupe_conserves_rows(qs):
    kept, dropped = dedupe(qs)
    assert len(kept) + len(dropped) == len(qs) and len({q.id for q in kept}) == len(kept)
    assert dedupe(kept) == (kept, [])


def test_fault_25_a_lost_row_is_an_error_at_run_time():
    check_conserved(3, 2, 1, "x")
    with pytest.raises(OctomedError, match="lost or doubled"):
        check_conserved(3, 2, 0, "x")
    with pytest.raises(OctomedError, match="lost or doubled"):
        module.Loaded("x:y", "", 2, [Q], [])


# formats: examples, each trap once

READ = sorted(
    s
    for s, v in SOURCES.items()
    if v.normal and v.role != "comparison" and module.find_source_files(s, EXAMPLES)
)  # the others have tests of their own, which make their files


@pytest.mark.parametrize("spec", READ)
def test_every_reader_reads_its_example(spec):
    r = load_report(spec, folder=EXAMPLES, max_pixels=12_544)
    assert r.questions and all(
        q.answer in q.letters and q.stem == q.stem.strip() and q.category == SOURCES[spec].category
        for q in r.questions
    )
    assert len({q.id for q in r.questions}) == len(r.questions)
    assert not r.reasons


def answers(spec):
    return [q.answer_text for q in load(spec, folder=EXAMPLES, images=False)]


def test_trap_medqa_letters_differ_between_4_and_5_options():
    four, five = load("medqa:test", folder=EXAMPLES), load("medqa:test5", folder=EXAMPLES)
    assert [q.stem for q in four] == [q.stem for q in five] and answers("medqa:test") == answers(
        "medqa:test5"
    ) == ["Vitamin C", "Iodine"]
    assert [q.answer for q in four] != [q.answer for q in five] and {
        len(q.options) for q in five
    } == {5}


def test_trap_medqa_dev_letters_are_inside_the_options():
    (q,) = load("medqa:dev", folder=EXAMPLES)
    assert q.options[0] == "Vitamin A" and q.answer == "A"
    keep = from_medqa({"question": "Which?", "options": ["A. x", "Vitamin B"], "answer": "A. x"})
    assert keep["options"] == ("A. x", "Vitamin B") and keep["answer"] == "A"


def test_trap_json_lines_under_a_json_name_and_an_array_under_a_jsonl_name():
    assert answers("medqa:train") == ["Vitamin A", "Descend"] and load(
        "medqa:train", folder=EXAMPLES
    )[0].stem.startswith("A child who")
    assert (
        answers("medmcqa:train") == ["Kidney", "Biceps"]
        and load("medmcqa:train", folder=EXAMPLES)[0].stem == "Which organ makes urine?"
    )


def test_trap_headqa_counts_from_1_in_a_string_and_names_a_picture_that_is_not_here():
    qs = load("headqa:train", folder=EXAMPLES)
    assert [q.answer_text for q in qs] == ["The femur.", "The stapes.", "The patella."] and {
        len(q.options) for q in qs
    } == {5}
    assert [q.at_hand for q in qs] == [True, True, False] and qs[2].images == (
        "name:X-2000-img1.png",
    )
    assert [q.origin for q in load("headqa:test", folder=EXAMPLES)] == [
        "Cuaderno_2002_1_X/1",
        "Cuaderno_2002_1_Y/1",
    ]


def test_trap_medmcqa_counts_from_1_here_and_from_0_on_the_hub():
    row = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "id": "1"}
    assert [from_medmcqa({**row, "cop": c}, 1)["answer"] for c in (0, 1, 4, 5)] == [
        None,
        "A",
        "D",
        "E",
    ]
    assert [from_medmcqa({**row, "cop": c}, 0)["answer"] for c in (-1, 0, 3, 4)] == [
        None,
        "A",
        "D",
        "E",
    ]
    assert answers("medmcqa:dev") == ["Four", "Kidney", "Oxygen", "Vitamin C"]


def test_trap_medxpertqa_stem_repeats_its_options():
    for spec in ("medxpertqa_text:test", "medxpertqa_mm:test"):
        assert not any("Answer Choices" in q.stem for q in load(spec, folder=EXAMPLES))
    (q,) = load("medxpertqa_mm:test", folder=EXAMPLES)
    assert (
        q.images == ("name:MM-0-a.jpeg", "name:MM-0-b.jpeg")
        and q.answer_text == "Patella"
        and q.tags["region"] == "Skeletal"
    )


def test_trap_mmmu_pro_options_are_python_in_a_string_and_only_health_counts():
    qs = load("mmmu_pro_health:test", folder=EXAMPLES)
    assert (
        [q.tags["subject"] for q in qs] == ["Pharmacy", "Clinical_Medicine"]
        and qs[0].options[3] == 'Pyrrole\'s "ring"'
        and len(qs[1].images) == 2
    )


# formats: the hub's columns, from rows made here


def test_hub_rows_normalise():
    assert (
        from_medqa(
            {
                "question": "Which?",
                "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}],
                "answer_idx": "B",
                "answer": "y",
                "meta_info": "step1",
            }
        )["answer"]
        == "B"
    )
    assert (
        from_medqa(
            {
                "question": "Which?",
                "options": {"A": "x", "B": "y", "C": "z", "D": "w"},
                "answer_idx": "D",
                "answer": "w",
                "meta_info": "",
                "metamap_phrases": [],
            }
        )["answer"]
        == "D"
    )
    for answers in (
        [{"aid": 1, "atext": "x"}, {"aid": 2, "atext": "y"}],
        {"aid": [1, 2], "atext": ["x", "y"]},
    ):
        f = from_headqa(
            {
                "name": "Exam",
                "qid": 3,
                "qtext": "Which?",
                "ra": 2,
                "answers": answers,
                "image": None,
            }
        )
        assert (f["answer"], f["options"], f["origin"]) == ("B", ("x", "y"), "Exam/3")
    picture = Image.new("RGB", (3, 3))
    assert from_headqa(
        {"name": "Exam", "qid": 3, "qtext": "Which?", "ra": 2, "answers": answers, "image": picture}
    )["images"] == (picture,)
    m = {
        "question_id": 1,
        "question": "Which?",
        "options": ["x", "y", "z"],
        "answer": "C",
        "answer_index": 2,
        "category": "health",
        "src": "s",
    }
    assert from_mmlu_pro(m)["answer"] == "C" and from_mmlu_pro({**m, "category": "law"}) is None
    x = from_medxpertqa(
        {
            "id": "MM-1",
            "question": "Which?\nAnswer Choices: (A) x (B) y",
            "options": {"A": "x", "B": "y", "C": None},
            "label": "B",
            "images": ["MM-1-a.png"],
            "medical_task": "t",
            "body_system": "b",
            "question_type": "q",
        }
    )
    assert (x["stem"], x["options"], x["answer"], x["images"]) == (
        "Which?",
        ("x", "y"),
        "B",
        ("name:MM-1-a.png",),
    )
    p = from_mmmu_pro(
        {
            "id": "t_1",
            "question": "See <image 1>",
            "options": "['x', 'y']",
            "image_1": picture,
            "image_2": None,
            "answer": "A",
            "subject": "Pharmacy",
            "img_type": "['MRI']",
        }
    )
    assert p["images"] == (picture,) and p["answer"] == "A"


class FakeHub:
    def __init__(self, rows):
        self.rows, self.asked = rows, None

    def __call__(self, *a, **k):
        self.asked = (a, k)
        return self.rows


def test_hub_is_asked_at_the_given_revision_and_counts_from_0(monkeypatch, tmp_path):
    import datasets

    hub = FakeHub(
        [
            {
                "id": "1",
                "question": "Which?",
                "opa": "a",
                "opb": "b",
                "opc": "c",
                "opd": "d",
                "cop": 0,
                "choice_type": "single",
                "exp": None,
                "subject_name": "S",
                "topic_name": None,
            }
        ]
    )
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    r = load_report("medmcqa:dev", revision="abc")
    assert (
        hub.asked
        == (("openlifescienceai/medmcqa", None), {"split": "validation", "revision": "abc"})
        and r.questions[0].answer == "A"
        and r.where.endswith("@abc")
    )
    assert identify_source("medmcqa:dev", revision="abc") != identify_source(
        "medmcqa:dev", revision="abd"
    )


PINNED = {
    "GBaker/MedQA-USMLE-4-options",
    "openlifescienceai/medmcqa",
    "TIGER-Lab/MMLU-Pro",
    "TsinghuaC3I/MedXpertQA",
    "MMMU/MMMU_Pro",
    "RadGenome/PMC-VQA",
}


def test_a_pinned_revision_is_what_the_hub_is_asked_for(monkeypatch):
    import re

    import datasets

    hub = FakeHub([{"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "B"}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    assert (
        load("medqa:test")[0].answer == "B"
        and hub.asked[1]["revision"] == SOURCES["medqa:test"].revision
    )
    assert {s.hub for s in SOURCES.values() if s.revision and not s.make} == PINNED and all(
        re.fullmatch("[0-9a-f]{40}", s.revision) for s in SOURCES.values() if s.hub in PINNED
    )
    assert len({s.revision for s in SOURCES.values() if s.hub in PINNED}) == len(PINNED)


def test_one_table_of_a_hub_that_holds_several(monkeypatch):
    import datasets

    row = {
        "Figure_path": "f.jpg",
        "Question": "Which?",
        "Answer": "y",
        **{f"Choice {a}": f" {a}:{t} " for a, t in zip("ABCD", "xyzw", strict=False)},
        "Answer_label": "B",
    }
    monkeypatch.setattr(datasets, "load_dataset", hub := FakeHub([row]))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    (q,) = load("pmc_vqa:test")
    assert q.answer_text == "y" and hub.asked[1]["data_files"] == "test_clean.csv"
    assert identify_source("pmc_vqa:test") != identify_source("pmc_vqa:train")


def test_a_loading_script_says_which_revision_to_give(monkeypatch):
    import datasets

    def refused(*a, **k):
        raise RuntimeError("Dataset scripts are no longer supported, but found head_qa.py")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    with pytest.raises(OctomedError, match="refs/convert/parquet"):
        load("headqa:dev", revision="main")


def test_hub_pictures_enter_the_store(monkeypatch):
    import datasets

    picture = Image.effect_noise((40, 40), 9).convert("RGB")
    rows = [
        {
            "id": "t_1",
            "question": "See <image 1>",
            "options": "['x', 'y']",
            "image_1": picture,
            "answer": "A",
            "subject": "Pharmacy",
            "img_type": "[]",
        }
    ] * 1
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(rows))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    (q,) = load("mmmu_pro_health:test", revision="abc", max_pixels=12_544)
    from octomed.data.images import load_image, pixel_hash

    assert q.images == (pixel_hash(picture),) and load_image(q.images[0], 12_544).size == (56, 56)


def test_no_network_is_one_sentence(monkeypatch):
    import datasets

    def down(*a, **k):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", down)
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    with pytest.raises(
        OctomedError,
        match=r"check the network and the revision, or put medmcqa/dev\.json under OCTOMED_DATA",
    ):
        load("medmcqa:dev", revision="abc")


# what is missing or malformed


def test_missing_files_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    with pytest.raises(
        OctomedError,
        match=r"put headqa/dev_HEAD_EN.json from dvilares/head_qa under the folder that "
        r"OCTOMED_DATA names, or load the hub.s dvilares/head_qa in Python, with the revision",
    ):
        load("headqa:dev")
    with pytest.raises(OctomedError, match=r"kaggle\.com/datasets/sartajbhuvaji"):
        load("brain_tumor:train", folder=tmp_path)
    with pytest.raises(OctomedError, match=r"octomed\.data\.publishers\.from_nejm describes"):
        load("nejm:test")
    register(Source("counted", "test", "text_only", "benchmark", 7, hub="a page"))
    try:
        with pytest.raises(OctomedError, match="registered for its counts only"):
            load("counted:test")
    finally:
        del SOURCES["counted:test"]
    with pytest.raises(UsageError, match="choose from medqa:train"):
        load("medqa:nothing")
    with pytest.raises(OctomedError, match="not at hand"):
        identify_source("brain_tumor:test", folder=tmp_path)


def test_malformed_files_name_file_and_line(here):
    f = here / "medqa" / "phrases_no_exclude_test.jsonl"
    f.write_text(f.read_text() + "{broken\n")
    with pytest.raises(OctomedError, match=r"line 3 of phrases_no_exclude_test\.jsonl is not JSON"):
        load("medqa:test", folder=here)
    write(
        here,
        [
            {"question": "Which?", "options": {"A": "x"}, "answer_idx": "A"},
            {"question": "Which?", "answer_idx": "A"},
        ],
    )
    with pytest.raises(
        OctomedError, match=r"line 2 of phrases_no_exclude_test\.jsonl has no column 'options'"
    ):
        load("medqa:test", folder=here)
    write(here, ["no object"])
    with pytest.raises(
        OctomedError, match=r"line 1 of phrases_no_exclude_test\.jsonl is not a row"
    ):
        load("medqa:test", folder=here)
    (here / "medmcqa" / "selfbiorag_medmc_qa_train_gpt4.jsonl").write_text("[\nnothing]")
    with pytest.raises(OctomedError, match="line 2 of selfbiorag"):
        load("medmcqa:train", folder=here)
    (here / "headqa" / "dev_HEAD_EN.json").write_text('{"language": "en"}')
    with pytest.raises(OctomedError, match="not a HeadQA file"):
        load("headqa:dev", folder=here)
    (here / "mmlu_pro_health" / "test.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OctomedError, match="not UTF-8"):
        load("mmlu_pro_health:test", folder=here)


def test_a_malformed_file_does_not_stop_the_table(here):
    (here / "medqa" / "phrases_no_exclude_test.jsonl").write_text("{broken\n")
    row = next(r for r in tabulate_sources(here) if (r["source"], r["split"]) == ("medqa", "test"))
    assert row["found"] is None and "line 1 of" in row["where"]


# pictures, limits, registration


def test_fault_18_a_bad_picture_is_dropped_with_a_reason(here):
    (here / "brain_tumor" / "Testing" / "no_tumor" / "image(1).jpg").write_bytes(b"")
    r = load_report("brain_tumor:test", folder=here, max_pixels=12_544)
    assert r.reasons == {"image cannot be read": 1} and r.rows == 4 and len(r.questions) == 3


def test_brain_tumor_by_folder():
    qs = load("brain_tumor:train", folder=EXAMPLES, max_pixels=12_544)
    assert (
        Counter(q.answer for q in qs) == {"A": 2, "B": 2, "C": 2, "D": 2}
        and qs[0].origin == "Training/glioma_tumor/image(1).jpg"
    )
    assert len({q.id for q in load("brain_tumor:train", folder=EXAMPLES, images=False)}) == 8
    assert from_brain_tumor({"file": "x/other/1.jpg", "label": "other"})["answer"] == "?"


def test_limit_is_nested_repeatable_and_spread():
    two, five = (load("brain_tumor:train", limit=n, folder=EXAMPLES, images=False) for n in (2, 5))
    assert (
        len(two) == 2
        and {q.id for q in two} < {q.id for q in five}
        and [q.id for q in two]
        == [q.id for q in load("brain_tumor:train", 2, folder=EXAMPLES, images=False)]
    )
    assert load("medqa:test", limit=0, folder=EXAMPLES) == []


def test_a_package_registers_its_own_source():
    def made(limit, max_pixels):
        return [Q, replace(Q, stem="Other?", answer="C")][:limit]

    register(
        Source(
            "mine",
            "train",
            "text_only",
            "train",
            expected=2,
            make=made,
            revision="1",
            licence="CC0",
        )
    )
    try:
        r = load_report("mine:train")
        assert r.questions == [Q] and r.reasons == {"answer outside the options": 1}
        row = next(r for r in tabulate_sources() if r["source"] == "mine")
        assert row == {
            "source": "mine",
            "split": "train",
            "category": "text_only",
            "expected": 2,
            "found": 2,
            "where": "made here",
            "licence": "CC0",
        }
        with pytest.raises(UsageError, match="category"):
            register(replace(SOURCES["mine:train"], category="other"))
        with pytest.raises(UsageError, match="role"):
            register(replace(SOURCES["mine:train"], role="other"))
    finally:
        del SOURCES["mine:train"]


def test_identity_follows_the_bytes(here):
    before = (
        identify_source("medqa:test", folder=here),
        identify_source("brain_tumor:test", folder=here),
    )
    assert identify_source("medqa:test", folder=EXAMPLES) == before[0]
    f = here / "medqa" / "phrases_no_exclude_test.jsonl"
    f.write_text(f.read_text().replace("sailor", "soldier"))
    f = here / "brain_tumor" / "Testing" / "no_tumor" / "image(1).jpg"
    f.write_bytes(f.read_bytes() + b" ")
    after = (
        identify_source("medqa:test", folder=here),
        identify_source("brain_tumor:test", folder=here),
    )
    assert after[0] != before[0] and after[1] != before[1]


# streaming


def medmcqa_row(i, cop):
    "A row of MedMCQA; `cop` is the place of its right option, -1 where it has none."
    return {
        "id": str(i),
        "question": f"Which {i}?",
        "opa": "a",
        "opb": "b",
        "opc": "c",
        "opd": "d",
        "cop": cop,
    }


def counted(n, taken):
    for i in range(n):
        taken.append(i)
        yield medmcqa_row(i, i % 5 - 1) | {
            "choice_type": "single",
            "exp": None,
            "subject_name": "S",
            "topic_name": None,
        }


def test_fault_25_a_stream_holds_a_block_and_conserves_its_rows(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", hub := FakeHub(counted(1000, taken := [])))
    monkeypatch.delenv("OCTOMED_DATA", raising=False)
    tally = Counter()
    qs = stream("medmcqa:train", tally=tally, block=50)
    first = next(qs)
    assert first.answer == "A" and len(taken) == 50 and hub.asked[1]["streaming"] is True
    assert 1 + sum(1 for _ in qs) == 800 and tally == {"rows": 1000, "kept": 800, "no answer": 200}


def test_a_stream_and_a_load_give_the_same_questions():
    for spec in READ:
        assert [q.to_json() for q in stream(spec, folder=EXAMPLES, block=2)] == [
            q.to_json() for q in load(spec, folder=EXAMPLES, images=False)
        ]
    for spec in ("pmc_vqa:train", "rexvqa:train"):
        assert [q.id for q in stream(spec, images=True, folder=EXAMPLES, block=1)] == [
            q.id for q in load(spec, folder=EXAMPLES)
        ]


def test_a_stream_that_loses_a_row_says_so(monkeypatch):
    def judge_rows(s, rows, **options):
        return [(place, "no answer") for place, _ in rows[1:]]

    monkeypatch.setattr(module, "_judge_rows", judge_rows)
    with pytest.raises(OctomedError, match="lost or doubled"):
        list(stream("medqa:test", folder=EXAMPLES))


# images beside their labels


def test_images_are_taken_in_where_they_are_at_hand(here):
    named, taken = (
        load("pmc_vqa:train", folder=here, images=False),
        load("pmc_vqa:train", folder=here),
    )
    assert [q.images for q in named] == [
        ("name:PMC0000001_f1.jpg",),
        ("name:PMC0000001_f1.jpg",),
        ("name:PMC0000002_f1.jpg",),
    ] and not any(q.at_hand for q in named)
    assert all(q.at_hand for q in taken) and taken[0].images == taken[1].images != taken[2].images
    (here / "pmc_vqa" / "images" / "PMC0000002_f1.jpg").unlink()
    assert [q.at_hand for q in load("pmc_vqa:train", folder=here)] == [True, True, False]
    test = load("coronahack:test", folder=here)
    assert [q.at_hand for q in test] == [True, False] and load("messidor2:train", folder=here) != []


def test_names_are_found_whatever_their_case_and_folder(here):
    eyes = {q.origin: q for s in ("train", "test") for q in load(f"messidor2:{s}", folder=here)}
    assert (
        eyes["IM000000.JPG"].at_hand
        and sum(q.at_hand for q in eyes.values()) == 1
        and len(eyes) == 12
    )


def test_image_files_are_the_publishers(here, monkeypatch):
    monkeypatch.setenv("OCTOMED_DATA", str(here))
    module._open_album.cache_clear()
    q = next(q for s in ("train", "test") for q in load(f"aptos:{s}") if q.at_hand)
    assert [f.name for f in find_image_files(q)] == [q.origin + ".png"]
    (q,) = [q for q in load("rexvqa:train", images=False) if q.origin == "q_002"]
    assert [f.name for f in find_image_files(q)] == ["1.3.1.png"]
    with pytest.raises(OctomedError, match="load the source with images=False"):
        find_image_files(load("rexvqa:train")[0])
    assert find_image_files(load("brain_tumor:test")[0])[0].is_file()


def test_identity_follows_the_images(here):
    before = (
        identify_source("pmc_vqa:train", folder=here),
        identify_source("medqa:test", folder=here),
    )
    f = here / "pmc_vqa" / "images" / "PMC0000002_f1.jpg"
    f.write_bytes(f.read_bytes() + b" ")
    assert (
        identify_source("pmc_vqa:train", folder=here) != before[0]
        and identify_source("medqa:test", folder=here) == before[1]
    )


def test_the_table_says_which_images_are_missing(here):
    def where():
        return {f"{r['source']}:{r['split']}": r["where"] for r in tabulate_sources(here)}

    w = where()
    assert (
        w["pmc_vqa:train"] == "pmc_vqa/train.csv"
        and w["coronahack:train"].endswith("; its images are not at hand")
        and w["coronahack:test"].endswith("; 1 of its rows lack their image")
    )
    shutil.rmtree(here / "pmc_vqa" / "images")
    assert where()["pmc_vqa:train"] == "pmc_vqa/train.csv; its images are not at hand"


def test_the_fuller_form_counts_before_the_partial_one(here):
    rows = [medmcqa_row(i, cop=4) for i in range(3)]
    assert load_report("medmcqa:train", folder=here).rows == 2
    write(here, rows, "medmcqa/train.json")
    assert [q.answer for q in load("medmcqa:train", folder=here)] == ["D"] * 3
    write(
        here,
        [{"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}],
        "medqa/dev.jsonl",
    )
    (here / "medqa" / "tadsligar_medqa_5opt_dev.json").unlink()
    assert [q.answer_text for q in load("medqa:dev", folder=here)] == ["x"]


# comparison sets


def test_chats_are_messages_with_their_images():
    (a,), i = (
        read_chats("pubmedvision:alignment", folder=EXAMPLES),
        list(read_chats("pubmedvision:instruct", images=True, folder=EXAMPLES)),
    )
    assert (
        a["messages"][0]["content"]
        == [
            {"type": "image", "image": "name:pmc_9_0.jpg"},
            {"type": "text", "text": "What is in the picture?"},
        ]
        and a["messages"][1]["role"] == "assistant"
    )
    assert (
        len(i) == 2
        and len(i[0]["images"]) == 2
        and not i[0]["images"][0].startswith("name:")
        and i[0]["images"][1] == "name:pmc_9_1.jpg"
    )
    (chat,) = read_chats("llava_med:instruct", folder=EXAMPLES)
    assert [m["role"] for m in chat["messages"]] == ["user", "assistant"] * 2
    assert "<image>" not in json.dumps(chat)
    from octomed.generate.render import list_chat_images

    assert list_chat_images(i[0]["messages"]) == list(i[0]["images"])


def test_chats_are_no_questions_and_questions_no_chats():
    with pytest.raises(UsageError, match="read_chats"):
        load("llava_med:instruct", folder=EXAMPLES)
    with pytest.raises(UsageError, match="read_chats"):
        list(stream("llava_med:instruct", folder=EXAMPLES))
    with pytest.raises(UsageError, match="load or stream"):
        next(read_chats("medqa:test", folder=EXAMPLES))


def test_fault_25_empty_chats_are_counted(here):
    good, empty, dumb = (
        [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": a}]
        for a in ("This.", " ", "That.")
    )
    (here / "llava_med" / "llava_med_instruct_60k_inline_mention.json").write_text(
        json.dumps(
            [
                {"id": n, "image": "x.jpg", "conversatons": c}
                for n, c in enumerate([good, empty, [], dumb])
            ]
        )
    )
    tally = Counter()
    assert len(list(read_chats("llava_med:instruct", folder=here, tally=tally))) == 2 and tally == {
        "rows": 4,
        "kept": 2,
        "empty turn": 1,
        "no turns": 1,
    }
    (here / "llava_med" / "llava_med_instruct_60k_inline_mention.json").write_text(
        json.dumps([{"id": 1, "image": "x.jpg", "conversatons": dumb[::-1]}])
    )
    with pytest.raises(OctomedError, match="row 1 of llava_med"):
        list(read_chats("llava_med:instruct", folder=here))


# balance


def classes(**sizes):
    return [
        replace(Q, stem=f"{c} {i}", options=tuple(sizes), answer="ABCDEFG"[list(sizes).index(c)])
        for c, n in sizes.items()
        for i in range(n)
    ]


def test_fault_26_a_class_smaller_than_its_quota_gives_all_and_is_reported():
    picked, report = draw_balanced(classes(many=50, some=20, few=3), 30)
    assert (
        Counter(q.answer_text for q in picked) == {"many": 14, "some": 13, "few": 3}
        and report["short"] == {"few": 7}
        and report["said"] == "few has 3 of the 10 asked for"
    )
    assert (report["in"], report["picked"], report["left"]) == (73, 30, 43)
    picked, report = draw_balanced(classes(many=50, some=20, few=3), {"many": 10, "few": 10})
    assert (
        Counter(q.answer_text for q in picked) == {"many": 10, "few": 3}
        and report["short"] == {"few": 7}
        and report["classes"]["some"] == {"there": 20, "asked": 0, "picked": 0}
    )
    picked, report = draw_balanced(classes(a=2, b=2), 10)
    assert len(picked) == 4 and report["short"] == {"a": 3, "b": 3}
    with pytest.raises(UsageError, match="no class fwe: choose from few, many, some"):
        draw_balanced(classes(many=5, some=2, few=3), {"fwe": 1})


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 9), min_size=1),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_fault_25_26_balanced_sampling_is_even_seeded_and_conserving(sizes, n, seed):
    qs = classes(**sizes)
    picked, report = draw_balanced(qs, n, seed)
    counts = Counter(q.answer_text for q in picked)
    assert (
        len(picked) == min(n, len(qs)) == report["picked"]
        and report["picked"] + report["left"] == len(qs)
        and picked == [q for q in qs if q in picked]
    )
    full = [counts[c] for c in sizes if counts[c] < sizes[c]]
    assert not full or max(counts.values(), default=0) - min(full) <= 1
    assert [q.id for q in draw_balanced(qs[::-1], n, seed)[0]] == [q.id for q in picked][::-1]
    assert {q.id for q in picked} <= {q.id for q in draw_balanced(qs, n + 1, seed)[0]}


def test_balanced_by_another_class_and_another_seed():
    qs = [replace(q, tags={"site": "ab"[i % 2]}) for i, q in enumerate(classes(x=40))]
    picked, _report = draw_balanced(qs, 10, by=lambda q: q.tags["site"])
    assert Counter(q.tags["site"] for q in picked) == {"a": 5, "b": 5}
    assert {q.id for q in picked} != {
        q.id for q in draw_balanced(qs, 10, 1, by=lambda q: q.tags["site"])[0]
    }


# what the registry says


def test_every_set_that_the_paper_names_is_registered():
    names = {
        "medqa",
        "headqa",
        "medmcqa",
        "mmlu_pro_health",
        "medxpertqa_text",
        "medxpertqa_mm",
        "pmc_vqa",
        "mmmu_pro_health",
        "nejm",
        "brain_tumor",
        "coronahack",
        "aptos",
        "messidor2",
        "bcss",
        "rexvqa",
        "ham10000",
        "pubmedvision",
        "llava_med",
    }
    assert names <= {s.name for s in SOURCES.values()} and all(
        SOURCES[s].role == "train" for s in NAMED
    )
    counts = {
        "pmc_vqa:train": 227_000,
        "pmc_vqa:test": 2_000,
        "nejm:test": 947,
        "coronahack:train": 5_284,
        "coronahack:test": 624,
        "aptos:train": 2_929,
        "aptos:test": 733,
        "messidor2:train": 1_394,
        "messidor2:test": 350,
    }
    assert {s: SOURCES[s].expected for s in counts} == counts
    assert all(
        s.normal and s.hub and s.licence and s.files for s in SOURCES.values() if s.name in names
    )


@pytest.mark.parametrize("spec", [s for s, v in SOURCES.items() if v.columns])
def test_columns_are_those_of_the_example(spec):
    s = SOURCES[spec]
    if not (f := EXAMPLES / s.files[0]).exists():
        pytest.skip("the examples hold the other form of this set")
    assert set(s.columns) <= set(next(iter(s.read(f)))[1])


def test_what_the_named_sets_explain():
    rows = {r["source"]: r for r in explain_traces()}
    assert rows["medqa:train"]["traces"] == 10_178 * 16 and rows["bcss:train"]["traces"] is None
    assert (
        rows["all of these"]["questions"] == sum(SOURCES[s].expected or 0 for s in NAMED) == 437_772
        and rows["all of these"]["traces"] == 7_004_352
    )
    assert (
        rows["left unexplained"]["traces"] == 995_648
        and abs(rows["left unexplained"]["share"] - 0.124456) < 1e-9
    )
    assert explain_traces("medqa:train", samples=1, acceptance=0.5, paper=10_178)[-1] == {
        "source": "left unexplained",
        "questions": None,
        "traces": 5_089,
        "share": 0.5,
    }
    with pytest.raises(UsageError):
        explain_traces("nothing:train")


# the real files

EXPECTED = {
    "medqa:train": (10_178, 1_000),
    "medqa:train4": (10_178, 1_030),
    "medqa:dev": (1_272,) * 2,
    "medqa:test": (1_273,) * 2,
    "medqa:test5": (1_273,) * 2,
    "headqa:train": (2_657,) * 2,
    "headqa:dev": (1_366,) * 2,
    "headqa:test": (2_742,) * 2,
    "medmcqa:train": (182_822, 1_000),
    "medmcqa:dev": (4_183,) * 2,
    "mmlu_pro_health:test": (818,) * 2,
    "medxpertqa_text:test": (2_450,) * 2,
    "medxpertqa_text:dev": (5,) * 2,
    "medxpertqa_mm:test": (2_000,) * 2,
    "mmmu_pro_health:test": (286,) * 2,
    "brain_tumor:train": (2_870,) * 2,
    "brain_tumor:test": (394,) * 2,
    "coronahack:train": (5_284,) * 2,
    "coronahack:test": (624,) * 2,
    "aptos:train": (2_929,) * 2,
    "aptos:test": (733,) * 2,
    "messidor2:train": (1_394,) * 2,
    "messidor2:test": (350,) * 2,
}


@real
def test_real_counts():
    table = {f"{r['source']}:{r['split']}": (r["expected"], r["found"]) for r in tabulate_sources()}
    assert {k: table[k] for k in EXPECTED} == EXPECTED
    where = {f"{r['source']}:{r['split']}": r["where"] for r in tabulate_sources()}
    assert (
        all(
            "not at hand" in where[s]
            for s in ("aptos:train", "messidor2:test", "coronahack:train", "medxpertqa_mm:test")
        )
        and "68 of its rows" in where["headqa:train"]
    )


@real
@pytest.mark.parametrize(
    "spec,reasons",
    [
        ("medqa:train", {}),
        ("medqa:train4", {}),
        ("medqa:dev", {}),
        ("medqa:test", {}),
        ("medqa:test5", {}),
        ("headqa:train", {"duplicate options": 4}),
        ("headqa:dev", {"duplicate options": 2}),
        ("headqa:test", {}),
        ("medmcqa:train", {"duplicate options": 2}),
        ("medmcqa:dev", {}),
        ("mmlu_pro_health:test", {}),
        ("medxpertqa_text:test", {}),
        ("medxpertqa_text:dev", {}),
        ("medxpertqa_mm:test", {}),
        ("mmmu_pro_health:test", {}),
    ],
)
def test_real_rows_normalise(spec, reasons):
    r = load_report(spec)
    assert r.reasons == reasons and r.rows == EXPECTED[spec][1]
    assert not any(
        "Answer Choices:" in q.stem
        or q.stem.startswith(("Question:", "QUESTION:"))
        or (spec == "medqa:dev" and q.options[0].startswith("A. "))
        for q in r.questions
    )


@real
def test_real_medqa_answers_agree_between_4_and_5_options():
    five = {q.stem: q.answer_text for q in load("medqa:test5")}
    assert all(five[q.stem] == q.answer_text for q in load("medqa:test"))


@real
def test_real_headqa_pictures_are_not_at_hand():
    assert [sum(not q.at_hand for q in load(f"headqa:{s}")) for s in ("train", "dev", "test")] == [
        68,
        30,
        67,
    ]


def test_fault_23_duplicate_options_leave_training_and_stay_in_a_benchmark():
    twice = replace(Q, options=("yes", "yes"))
    assert (find_flaw(twice), find_flaw(twice, benchmark=True)) == ("duplicate options", None)
