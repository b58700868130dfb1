"Names that must not change by accident: questions, samples, sampling, stages, and the clinic's world."

import importlib
from dataclasses import replace

from octomed.core.code import code_digest
from octomed.core.identity import canonical, digest, seed_for
from octomed.data.questions import Question
from octomed.evaluate.arms import Arm, stages
from octomed.generate.engines import Sampling
from octomed.generate.ledger import sample_key
from octomed.train.schedule import Schedule


def test_golden_digests():
    assert digest({"k": 4, "teacher": "reasoner"}) == "42d372be46fb8502"
    assert seed_for("sample", 0, "q", 1) == 3801977092
    assert Sampling().key == "d626b68608a730cf"
    assert sample_key("q", "m", "p", "s", 0).hex() == "4e42d58d66eb7b5d96dd3cbccbdfc1e9"


def test_a_question_is_its_content_and_not_its_label_or_source():
    q = Question("Which?", ("yes", "no"), "A", "one", "train", "text_only")
    assert q.id == replace(q, answer="B", source="other", split="test", tags={"modality": "CT"}).id
    assert q.id != replace(q, options=("no", "yes")).id and q.id != replace(q, images=("00",)).id


def test_the_clinic_is_fixed():
    "The world may not change once results rest on it: a change here is a change of every course result."
    import octomed.clinic.questions as world

    ids = {
        s: digest([q.id for q in world.questions(*s.split(":"), limit=50, max_pixels=None)])
        for s in (
            "clinic_ward:train",
            "clinic_ward:test",
            "clinic_boards:test",
            "clinic_rounds:test",
            "clinic_grand:test",
            "clinic_reading:test",
            "clinic_scanner:test",
        )
    }
    assert digest(ids) == "9bfcdd367bc8b230"
    assert digest(world.textbook(0)) == "4ae2c2223bd6239d"


def test_equal_arms_are_the_same_stages(tmp_path):
    import octomed.clinic.students  # noqa: F401 - registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers
    from octomed.core.recipe import Common

    common = Common(train=("clinic_ward:train",), benchmarks=("clinic_ward:test",))
    arm = Arm((("clinic_ward:train", 10),))
    a, b = stages(arm, common), stages(replace(arm), common)
    assert {n: s.key for n, s in a.items()} == {n: s.key for n, s in b.items()}
    longer = stages(replace(arm, schedule=Schedule(epochs=9)), common)
    assert longer["rendered"] == a["rendered"] and longer["student"] != a["student"]
    more = stages(replace(arm, k=4), common)
    assert more["samples"] == a["samples"] and more["accepted"] != a["accepted"]
    other = stages(arm, replace(common, base_seed=1))
    assert other["data"] != a["data"]


def test_an_arm_is_serialisable():
    arm = Arm((("clinic_ward:train", 10),), compute_of=Arm((("clinic_ward:train", 10),), "cot"))
    assert canonical(arm) == canonical(replace(arm))


def test_the_code_of_a_stage_is_part_of_its_key_and_its_prose_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def code(name, prose, value, helper="x"):
        (tmp_path / f"{name}.py").write_text(
            f'def aid(x): return {helper}\ndef f(out):\n    "{prose}"\n    return aid({value})\n'
        )
        return code_digest(importlib.import_module(name).f)

    assert code("one", "Says one.", 1) == code("prose", "Says it otherwise.", 1)
    assert code("one", "Says one.", 1) != code("two", "Says one.", 2)
    assert code("one", "Says one.", 1) != code("deep", "Says one.", 1, helper="x + 1")
