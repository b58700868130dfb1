"Answers in words: their scores, published sets that ask for them, and an evaluation."

import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from toys import ToyEngine
from transformers import PreTrainedTokenizerFast

from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError
from octomed.core.recipe import Common
from octomed.core.store import run_stage
from octomed.data.sources import load_in_words
from octomed.evaluate import open_evaluation
from octomed.generate.open_answers import (
    GPT2,
    compare_answers,
    compare_tokens,
    credit_anywhere,
    load_f1_tokenizer,
    match_exactly,
    match_normalised,
    normalise_answer,
    normalise_words,
    read_final,
    recall_words,
)

WORDS = st.lists(st.sampled_from(["lung", "left", "the", "a", "mass", "2"]), max_size=6)


@pytest.fixture(scope="module")
def byte_pieces(tmp_path_factory):
    "The folder of a small tokenizer of GPT-2's kind."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["lung", "right lung", "left lung", "right", "left"] * 4, trainer)
    folder = tmp_path_factory.mktemp("pieces")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("text", "think_first", "final"),
    [
        ("pleural fluid", False, "pleural fluid"),
        (r"<think>\boxed{a}</think> so \boxed{ the liver }", True, "the liver"),
        ("<think>a</think> <answer>liver</answer>", True, "liver"),
        ("<think>liver", True, None),
        ("<think>a</think>", True, ""),
    ],
)
def test_the_answer_is_what_stands_in_the_box_or_all_words_after_the_thinking(
    text, think_first, final
):
    assert read_final(text, think_first) == final


def test_squads_rule_takes_case_signs_and_articles_away():
    assert normalise_answer(" The  X-ray, of a lung. ") == "xray of lung"
    assert match_normalised("An aorta!", "aorta") and not match_exactly("An aorta!", "aorta")
    assert not match_normalised("the", "a")  # nothing is left of either


def test_the_vqa_rule_splits_words_at_marks_unless_a_blank_stands_beside_one():
    assert normalise_words("left-sided") == ["left", "sided"]
    assert normalise_words("left- sided, two") == ["left", "sided", "2"]
    assert normalise_words("1.5 cm.") == ["1.5", "cm"]


def test_recall_counts_as_llava_med_does():
    assert recall_words("the right lung and the liver", "right lung") == 1.0
    assert recall_words("lung", "right lung") == 0.5
    assert recall_words("lung lung", "right lung") == pytest.approx(2 / 3)  # its own count
    assert recall_words("", "right lung") == 0.0
    assert credit_anywhere("it is normal", "no") and not credit_anywhere("it is well", "no")


@settings(deadline=None)
@given(answer=WORDS, reference=WORDS)
def test_the_overlap_is_that_of_counted_tokens(answer, reference):
    overlap = compare_tokens(answer, reference)
    assert 0 <= overlap.f1 <= 1
    back = compare_tokens(reference, answer)
    assert (overlap.precision, overlap.recall) == (back.recall, back.precision)
    assert overlap.f1 == pytest.approx(back.f1)
    assert (overlap.f1 == pytest.approx(1)) == (sorted(answer) == sorted(reference) != [])


def test_token_f1_is_that_of_pieces_with_their_blanks(byte_pieces):
    pieces = load_f1_tokenizer(byte_pieces)
    assert compare_answers(" Right lung", "right lung ", pieces).f1 == 1.0
    half = compare_answers("right lung", "left lung", pieces)
    assert (half.f1, half.precision, half.recall) == (0.5, 0.5, 0.5)
    assert compare_answers("right lung", "lung", pieces).f1 == 0.0  # a blank makes another piece


def test_the_published_tokenizer_is_pinned_and_its_absence_is_said():
    name, _, revision = GPT2.partition("@")
    assert name == "openai-community/gpt2" and len(revision) == 40
    with pytest.raises(OctomedError, match="fetch it from the hub first, or give the folder"):
        load_f1_tokenizer("octomed-nobody/no-such-tokenizer@" + "0" * 40)


def encode(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (60, 60, 3), "uint8")
    Image.fromarray(noise).save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A few rows of VQA-RAD and of SLAKE, as their publishers write them."
    rows = [
        {"image": encode(0), "question": "is there a mass?", "answer": "no"},
        {"image": encode(1), "question": "what organ is shown?", "answer": "Right lung"},
        {"image": encode(2), "question": "where is it?", "answer": "left lung"},
    ]
    folder = tmp_path / "vqa_rad" / "data"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    row = {"q_lang": "en", "img_name": "xmlab1/source.jpg", "modality": "CT", "location": "Lung"}
    asked = [
        {"qid": 1, "question": "Is it CT?", "answer": "Yes", "answer_type": "CLOSED"},
        {"qid": 2, "question": "Lung or liver?", "answer": "Lung", "answer_type": "CLOSED"},
        {"qid": 3, "question": "What is it?", "answer": "Right Lung", "answer_type": "OPEN"},
        {"qid": 4, "question": "这是肺吗", "answer": "是", "answer_type": "CLOSED", "q_lang": "zh"},
        {"qid": 5, "question": "What?", "answer": "", "answer_type": "OPEN"},
    ]
    picture = tmp_path / "slake" / "imgs" / "xmlab1" / "source.jpg"
    picture.parent.mkdir(parents=True)
    Image.effect_noise((64, 64), 50).convert("RGB").save(picture)
    file = tmp_path / "slake" / "test.json"
    file.write_text(json.dumps([row | own for own in asked]))
    monkeypatch.setenv("OCTOMED_DATA", str(tmp_path))


def test_vqa_rad_is_asked_in_words_and_closed_where_the_answer_is_yes_or_no(published):
    asked, dropped = load_in_words("vqa_rad:test", max_pixels=12_544)
    assert [(each.reference, each.is_closed) for each in asked] == [
        ("No", True),
        ("Right lung", False),
        ("left lung", False),
    ]
    assert not dropped and all(each.question.at_hand for each in asked)
    assert {(each.question.options, each.question.answer) for each in asked} == {((), None)}


def test_slakes_own_word_says_what_is_closed(published):
    asked, dropped = load_in_words("slake:test", max_pixels=12_544)
    assert [(each.reference, each.is_closed) for each in asked] == [
        ("Yes", True),
        ("Lung", True),
        ("Right Lung", False),
    ]
    assert [reason for _, reason in dropped] == ["no stem or no reference"]


def test_only_sets_that_are_read_are_asked_in_words():
    import octomed.clinic.questions  # noqa: F401 - registers the clinic

    with pytest.raises(UsageError, match="name a source that is read"):
        load_in_words("clinic_ward:test")


class Speaker(ToyEngine):
    "Says the same of every question, with its prompt kept."

    def __init__(self, text, finish="stop"):
        self.text, self.finish, self.model = text, finish, f"speaker@{text}{finish}"
        self.asked = []

    def answer(self, request, index):
        self.asked.append(request.messages[-1]["content"][-1]["text"])
        return self.text, self.finish, 2


def evaluate(monkeypatch, engine, benchmark, tokenizer):
    "The rows of an evaluation in words by this engine, and their table."
    monkeypatch.setattr(open_evaluation, "engine_of", lambda student, max_pixels: engine)
    common = Common(bootstrap=200, max_pixels=12_544)
    declared = open_evaluation.declare_open_evaluation(
        engine.model, benchmark, common, tokenizer=tokenizer
    )
    rows = read_jsonl(run_stage(declared) / "rows.jsonl")
    table = open_evaluation.tabulate_in_words(benchmark, rows, resamples=200)
    return rows, {(row["questions"], row["score"]): row for row in table}


def test_an_evaluation_in_words_gives_every_published_score(published, byte_pieces, monkeypatch):
    engine = Speaker("The right lung.")
    rows, table = evaluate(monkeypatch, engine, "vqa_rad:test", byte_pieces)
    assert all(text.endswith("\nAnswer in a short word or phrase.") for text in engine.asked)
    assert not any("A: Yes" in text for text in engine.asked) and len(rows) == 3
    value = {key: row["value"] for key, row in table.items()}
    assert value["open", "exact match"] == 0.0
    assert value["open", "normalised match"] == 0.5
    assert value["open", "recall of words (LLaVA-Med)"] == 0.75
    assert 0 < value["open", "token F1"] < 1
    assert value["closed", "accuracy"] == 0.0
    assert table["open", "token F1"]["card"] == 0.6423
    assert table["closed", "accuracy"]["n"] == 1


def test_a_cut_off_answer_has_nothing_and_without_a_tokenizer_there_is_no_f1(
    published, monkeypatch
):
    rows, table = evaluate(monkeypatch, Speaker("No", "length"), "slake:test", "")
    assert {row["answer"] for row in rows} == {None}
    assert ("open", "token F1") not in table
    assert {row["value"] for row in table.values()} == {0.0}


def test_the_command_asks_in_words(published, monkeypatch, capsys):
    from octomed.run import cli

    monkeypatch.setattr(open_evaluation, "engine_of", lambda *_: Speaker("yes"))
    monkeypatch.setattr("octomed.evaluate.evaluate.check_images", lambda *_: None)
    options = cli.EvaluationOptions(in_words=True, tokenizer="", json=True)
    cli.evaluate("clinic/tiny", "slake:test", options=options)
    rows = json.loads(capsys.readouterr().out)
    assert {row["score"]: row["value"] for row in rows if row["questions"] == "closed"} == {
        "accuracy": 0.5,
        "credit anywhere (LLaVA-Med)": 0.5,
    }
