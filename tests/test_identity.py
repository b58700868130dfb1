"""Names that must not change by accident: questions, samples, stages, and the clinic's world.

Also what a stage's key holds of its code."""

import importlib
import sys
from dataclasses import replace

import pytest

from octomed.core.code import code_digest, modules_digest
from octomed.core.identity import canonicalize, digest, seed_for, unkeyed
from octomed.core.paths import OctomedError
from octomed.data.questions import Question
from octomed.evaluate.arms import Arm, declare_stages
from octomed.generate.samples import Sampling, make_sample_key
from octomed.train.schedule import Schedule

CLINIC_SETS = (
    "clinic_ward:train",
    "clinic_ward:test",
    "clinic_boards:test",
    "clinic_rounds:test",
    "clinic_grand:test",
    "clinic_reading:test",
    "clinic_scanner:test",
)


def test_golden_digests():
    assert digest({"k": 4, "teacher": "reasoner"}) == "42d372be46fb8502"
    assert seed_for("sample", 0, "q", 1) == 3801977092
    assert Sampling().key == "d626b68608a730cf"
    assert make_sample_key("q", "m", "p", "s", 0).hex() == "4e42d58d66eb7b5d96dd3cbccbdfc1e9"


def test_a_question_is_its_content_and_not_its_label_or_source():
    question = Question(
        "Which?",
        ("yes", "no"),
        "A",
        source="one",
        split="train",
        category="text_only",
    )
    elsewhere = replace(question, answer="B", source="other", split="test", tags={"modality": "CT"})
    assert question.id == elsewhere.id
    assert question.id != replace(question, options=("no", "yes")).id
    assert question.id != replace(question, images=("00",)).id


def test_the_clinic_is_fixed():
    "The world may not change once results rest on it: that would change every course result."
    from octomed.clinic.questions import load_questions
    from octomed.clinic.textbook import write_textbook

    ids = {}
    for name in CLINIC_SETS:
        source, split = name.split(":")
        ids[name] = digest([q.id for q in load_questions(source, split, limit=50, max_pixels=None)])
    assert digest(ids) == "2c8dd023e99aba9d"
    assert digest(write_textbook(0)) == "151d2a783e082144"


def test_equal_arms_are_the_same_stages(tmp_path):
    import octomed.clinic.students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers
    from octomed.core.recipe import Common

    common = Common(train=("clinic_ward:train",), benchmarks=("clinic_ward:test",))
    arm = Arm((("clinic_ward:train", 10),))
    first, second = declare_stages(arm, common), declare_stages(replace(arm), common)
    assert {n: s.key for n, s in first.items()} == {n: s.key for n, s in second.items()}
    longer = declare_stages(replace(arm, schedule=Schedule(epochs=9)), common)
    assert longer["rendered"] == first["rendered"]
    assert longer["student"] != first["student"]
    more = declare_stages(replace(arm, k=4), common)
    assert more["samples"] == first["samples"]
    assert more["accepted"] != first["accepted"]
    other = declare_stages(arm, replace(common, base_seed=1))
    assert other["data"] != first["data"]


def test_an_arm_is_serialisable():
    arm = Arm((("clinic_ward:train", 10),), compute_of=Arm((("clinic_ward:train", 10),), "cot"))
    assert canonicalize(arm) == canonicalize(replace(arm))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    "Writes a module of a user's own and imports it; each call has another name."
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def write(text):
        name = f"user_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return write


def test_the_code_of_a_stage_is_part_of_its_key_and_its_prose_is_not(user_module):
    def code(prose, value, helper="x"):
        text = f'def aid(x): return {helper}\ndef f(out):\n    "{prose}"\n    return aid({value})\n'
        return code_digest(user_module(text).f)

    assert code("Says one.", 1) == code("Says the same in other words.", 1)
    assert code("Says one.", 1) != code("Says one.", 2)
    assert code("Says one.", 1) != code("Says one.", 1, helper="x + 1")


@pytest.mark.parametrize(
    "helper",
    ["run", "made", "card", "stage", "progress", "versions", "hardware", "commit", "disk_error"],
)
def test_fault_71_a_helper_counts_whatever_its_name_is(user_module, helper):
    def code(value):
        text = f"def {helper}(x): return x + {value}\ndef f(out): return {helper}(1)\n"
        return code_digest(user_module(text).f)

    assert code(1) == code(1)
    assert code(1) != code(2)


@pytest.mark.parametrize("name", ["run", "card", "stage"])
def test_fault_71_a_stage_counts_whatever_its_own_name_is(user_module, name):
    text = "from octomed.core.store import stage as declare\n@declare\ndef {}(out): return {}\n"
    codes = [getattr(user_module(text.format(name, value)), name).code for value in (1, 1, 2)]
    assert codes[0] == codes[1] != codes[2]


def test_a_decorator_counts_whatever_its_name_is_and_stage_does_not(user_module):
    text = """
import functools
from octomed.core.store import stage

def staged(function):
    @functools.wraps(function)
    def wrapper(*args): return function(*args) + {}
    return wrapper

@staged
def f(out): return 1

@stage{}
def g(out): return 1
"""
    first, same, other = (
        user_module(text.format(*parts)) for parts in ((1, ""), (1, "(resumable=True)"), (2, ""))
    )
    assert code_digest(first.f) == code_digest(same.f) != code_digest(other.f)
    assert first.g.code == same.g.code == other.g.code


UNKEYED = """
import functools
from octomed.core.identity import unkeyed

def noted(function):
    @functools.wraps(function)
    def wrapper(*args): return function(*args)
    return wrapper

{decorators}
def show(x): print({value}, x)

def f(out): return show(1)
"""


@pytest.mark.parametrize(
    "decorators",
    [
        "@unkeyed",
        "@unkeyed\n@functools.lru_cache",
        "@functools.lru_cache\n@unkeyed",
        "@noted\n@unkeyed",
        "@unkeyed\n@noted",
    ],
)
def test_what_is_declared_unkeyed_does_not_count(user_module, decorators):
    codes = {
        code_digest(user_module(UNKEYED.format(decorators=decorators, value=value)).f)
        for value in (1, 2)
    }
    assert len(codes) == 1


def test_a_class_that_inherits_from_an_unkeyed_one_counts(user_module):
    text = """
from octomed.core.identity import unkeyed

@unkeyed
class Shown:
    def draw(self): return 1

class Computed(Shown):
    def total(self): return {}

def f(out): return Computed().total()
"""
    assert code_digest(user_module(text.format(1)).f) != code_digest(user_module(text.format(2)).f)


def test_what_octomed_itself_leaves_out_is_declared():
    from octomed.core.files import disk_error, progress
    from octomed.core.identity import (
        describe_hardware,
        find_commit,
        is_unkeyed,
        list_versions,
        make_card,
    )
    from octomed.core.store import is_finished, run_stage, stage

    shown = (
        progress,
        disk_error,
        make_card,
        list_versions,
        describe_hardware,
        find_commit,
        stage,
        run_stage,
        is_finished,
    )
    assert all(is_unkeyed(function) for function in shown)


def test_a_method_that_is_patched_onto_a_class_counts(user_module):
    text = """
from dataclasses import dataclass
from fastcore.basics import patch

@dataclass(frozen=True)
class Total:
    a: int = 1
    def half(self): return self.whole / 2

@patch(as_prop={as_prop})
def whole(self: Total): return self.a + {value}

def f(out): return Total().half()
"""
    for as_prop in (True, False):
        codes = {
            code_digest(user_module(text.format(as_prop=as_prop, value=value)).f)
            for value in (1, 2)
        }
        assert len(codes) == 2


PACKAGE = {
    "__init__.py": "",
    "deep/__init__.py": "from .inner import give\n",
    "deep/inner.py": "LIMIT = 1\ndef give(): return 1\n",
    "deep/other.py": "from . import inner\nfrom .inner import LIMIT\ndef more(): return LIMIT\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Writes a user's package `nested` of two folders, with these files changed, and forgets it."
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in [m for m in sys.modules if m.split(".")[0] == "nested"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def write(main, changed=None):
        for path, text in {**PACKAGE, "main.py": main, **(changed or {})}.items():
            file = tmp_path / "nested" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        forget()

    yield write
    forget()


MAINS = {
    "import inside": "def f(out):\n from .deep.inner import give\n return give()\n",
    "module inside": "def f(out):\n from .deep import inner\n return inner.give()\n",
    "dotted inside": "def f(out):\n import nested.deep.inner\n return nested.deep.inner.give()\n",
    "renamed inside": "def f(out):\n import nested.deep.inner as m\n return m.give()\n",
    "dotted": "import nested.deep.inner\ndef f(out): return nested.deep.inner.give()\n",
    "module": "from .deep import inner\ndef f(out): return inner.give()\n",
    "through the package": "from . import deep\ndef f(out): return deep.inner.give()\n",
    "not imported yet": "import nested.deep\ndef f(out): return nested.deep.other.more()\n",
    "from the package": "from .deep import give\ndef f(out): return give()\n",
}


@pytest.mark.parametrize("main", MAINS.values(), ids=MAINS)
def test_names_are_followed_into_the_modules_of_packages(package, main):
    def code(value):
        package(main, {"deep/inner.py": f"LIMIT = {value}\ndef give(): return {value}\n"})
        return code_digest(importlib.import_module("nested.main").f)

    assert code(1) == code(1)
    assert code(1) != code(2)


@pytest.mark.parametrize(
    "main",
    [
        "def f(out):\n from .deep.inner import gone\n return gone()\n",
        "def f(out):\n from .deep import gone\n return gone()\n",
        "def f(out):\n import nested.gone\n return nested.gone.x()\n",
        "def f(out):\n from .gone import x\n return x()\n",
    ],
)
def test_an_import_of_ones_own_that_leads_nowhere_is_an_error(package, main):
    package(main)
    with pytest.raises(OctomedError, match=r"gone (is imported but|cannot be imported)"):
        code_digest(importlib.import_module("nested.main").f)
    with pytest.raises(OctomedError, match=r"gone is imported but does not exist: correct"):
        modules_digest({"nested.main"})


@pytest.mark.parametrize("file", ["deep/__init__.py", "deep/inner.py", "deep/other.py", "main.py"])
def test_the_modules_of_a_plugins_package_count(package, file):
    main = "from .deep.other import more\n"
    package(main)
    before = modules_digest({"nested.main"})
    assert modules_digest({"nested.main"}) == before
    text = main if file == "main.py" else PACKAGE[file]
    package(main, {file: text + "X = 2\n"})
    assert modules_digest({"nested.main"}) != before


def test_a_plugin_that_is_nowhere_is_an_error():
    with pytest.raises(OctomedError, match=r"octomed\.nowhere is imported but does not exist"):
        modules_digest({"octomed.nowhere"})


def test_names_that_a_package_loads_late_are_followed(package):
    late = """
def __getattr__(name):
    if name == "give":
        from .inner import give
        return give
    raise AttributeError(name)
"""
    main = "from .deep import give\n"
    package(main, {"deep/__init__.py": late})
    before = modules_digest({"nested.main"})
    package(main, {"deep/__init__.py": late, "deep/inner.py": "def give(): return 3\n"})
    assert modules_digest({"nested.main"}) != before
    package("from .deep import gone\n", {"deep/__init__.py": late})
    with pytest.raises(OctomedError, match=r"deep\.gone is imported but does not exist"):
        modules_digest({"nested.main"})


def test_unkeyed_gives_the_function_itself():
    def show():
        return 1

    assert unkeyed(show) is show
