"""What the clinic's declared revisions stand for, as digests.

The clinic states what it is by constants: WORLD_IDENTITY, SPEECH_REVISION, GRADING_REVISION and
their like. They are part of model names, seeds and stage keys, so the code that they stand for
must not change under them. Each pin below is a digest of what the clinic gave when its revision
was declared. If a test here fails, either the change was not meant, or the behaviour is new: then
declare a new revision in the notebook first, and set new pins afterwards."""

import hashlib
import json

import pytest
from toys import chat

from octomed.clinic.drawings import CLASSES, draw_picture
from octomed.clinic.graders import Grader, SimulatedGrader
from octomed.clinic.manners import MANNERS, build_chat, write_wordings
from octomed.clinic.questions import SIZES, load_questions
from octomed.clinic.teachers import HASTY, INSTRUCT, REASONER, TUTOR, SimulatedTeacher
from octomed.clinic.textbook import draw_atlas, write_textbook
from octomed.data.images import pixel_hash
from octomed.generate.samples import Request, Sampling
from octomed.paper.calibration import OneLength

QUESTIONS = {
    "clinic_ward:train": "0d35ef6b7aeb3c3f",
    "clinic_ward:dev": "56993f7bb52bd4c7",
    "clinic_ward:test": "92d9398f52ac8377",
    "clinic_boards:test": "af7b15ad99ef98ef",
    "clinic_reading:train": "39429de6892dd5b1",
    "clinic_reading:dev": "9fc866db3f8b46ec",
    "clinic_reading:test": "68e5e4de85dff3be",
    "clinic_scanner:test": "9120343f3495f73d",
    "clinic_rounds:train": "8edf33fc2515a080",
    "clinic_rounds:dev": "6a49855c8022fec1",
    "clinic_rounds:test": "5922c6cb7ae15a7b",
    "clinic_grand:test": "22779c4b4f0ae390",
}
DRAWINGS = {
    "fundus a": "d325b30996fe0be3",
    "fundus b": "9e27fcbe4293328c",
    "mri a": "15d4a9123be30cd5",
    "mri b": "3b20be101ebef6da",
    "xray a": "bfea8a338d37d2a5",
    "xray b": "3c35dd0ec5b74177",
    "histology a": "640ba6f4a14d9027",
    "histology b": "c2eaf54d474439fc",
}
RUBRICS = {
    "Answer with <rating> and </rating>.": "2d8da1f75b3f196c",
    "<response>\n{response}\n</response> Answer with <verdict> and </verdict>.": "c853bc38d1cdc95d",
    "Answer with <modality> and <region>.": "58471294c53780da",
}
TEXTBOOK = "84e6cdc529c898e7"
ATLAS = "47c0529d2d581263"
TEACHERS = {
    "clinic/reasoner": "3f05880d9e50eebd",
    "clinic/instruct": "787452cea458ef46",
    "clinic/tutor": "f13c51aa8e276bba",
    "clinic/hasty": "ecb9596929199334",
}
WORDINGS = "ccccf593e027322b"
CHATS = {
    "alignment": "a1f29a97a2223133",
    "instruct": "f77d8bb8656c4d8c",
    "turns": "36cf0d3d210fb2aa",
    "bare": "4886ce5fb7773e7c",
}
MODELS = [
    "clinic/reasoner@40976ff9",
    "clinic/instruct@a9ea6f2b",
    "clinic/grader@9c4503a7",
    "clinic/one-length@3233c657",
]


def pin(value) -> str:
    "A short digest of a value that JSON can hold."
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_questions(name: str, limit: int) -> list:
    "The first questions of a split, whose pictures may have any size in the store."
    source, split = name.split(":")
    return load_questions(source, split, limit=limit, max_pixels=None)


def chats_of(manner: str) -> list[dict]:
    cases = first_questions("clinic_rounds:train", 10) + first_questions("clinic_reading:train", 10)
    return [build_chat(case, manner) for case in cases]


def grades_of(rubric: str) -> list[list]:
    "Thirty questions, graded twice each; what is graded is right for every other one."
    engine = SimulatedGrader()
    cases = first_questions("clinic_ward:test", 15) + first_questions("clinic_rounds:test", 15)
    grades = []
    for number, question in enumerate(cases):
        response = question.options[0] if number % 2 else question.answer_text
        text = rubric.replace("{response}", response)
        request = Request(question.id, chat(text), "rubric", (0, 1))
        for sample in engine.generate([request], Sampling()):
            grades.append([sample.text, sample.finish, sample.tokens, sample.seed])
    return grades


def test_every_split_and_every_class_is_pinned():
    assert set(QUESTIONS) == {f"{source}:{split}" for source, split in SIZES}
    assert set(DRAWINGS) == {f"{modality} {scanner}" for modality in CLASSES for scanner in "ab"}
    assert set(CHATS) == set(MANNERS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_questions_are_those_of_the_declared_world(name):
    rows = [[q.id, q.stem, q.options, q.answer, q.tags] for q in first_questions(name, 200)]
    assert len(rows) == 200
    assert pin(rows) == QUESTIONS[name]


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_drawings_are_those_of_their_revision(name):
    modality, scanner = name.split()
    hashes = []
    for cls in CLASSES[modality]:
        for seed in (0, 1, 2, 100_007, 300_011):
            hashes.append(pixel_hash(draw_picture(modality, cls, seed, scanner)))
    assert pin(hashes) == DRAWINGS[name]


def test_the_textbook_is_that_of_the_declared_world():
    assert pin(write_textbook(0)) == TEXTBOOK


def test_the_atlas_is_that_of_the_declared_world():
    assert pin(draw_atlas(0, per_class=2)) == ATLAS


@pytest.mark.parametrize(
    "teacher", [REASONER, INSTRUCT, TUTOR, HASTY], ids=lambda teacher: teacher.label
)
def test_the_teachers_speak_as_their_revision_says(teacher):
    names = (
        "clinic_ward:train",
        "clinic_boards:test",
        "clinic_rounds:train",
        "clinic_reading:test",
    )
    engine = SimulatedTeacher(teacher)
    samples = []
    for name in names:
        requests = [
            Request(question.id, [], "pinned", (0, 1, 5, 15, 40))
            for question in first_questions(name, 10)
        ]
        for sample in engine.generate(requests, Sampling()):
            samples.append([sample.text, sample.finish, sample.tokens, sample.seed])
    assert len(samples) == 200
    assert pin(samples) == TEACHERS[teacher.label]


@pytest.mark.parametrize("rubric", RUBRICS)
def test_the_grader_grades_as_its_revision_says(rubric):
    grades = grades_of(rubric)
    assert len(grades) == 60
    assert pin(grades) == RUBRICS[rubric]


def test_the_wordings_are_those_of_their_revision():
    families = [write_wordings(question) for question in first_questions("clinic_ward:train", 20)]
    rows = [[q.id, q.stem, q.options, q.answer, q.tags] for family in families for q in family]
    assert pin(rows) == WORDINGS


@pytest.mark.parametrize("manner", CHATS)
def test_the_chats_are_those_of_their_revision(manner):
    chats = chats_of(manner)
    assert len(chats) == 20
    assert pin(chats) == CHATS[manner]


def test_the_models_keep_their_names():
    assert [m.model for m in (REASONER, INSTRUCT, Grader(), OneLength())] == MODELS
