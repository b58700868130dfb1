"Near copies of pictures and of words, and what is not one."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from octomed.data import near_duplicates as near


def draw(seed: int) -> Image.Image:
    "Random grey blocks, so that much is in the low frequencies that a hash keeps."
    blocks = np.random.default_rng(seed).integers(0, 256, (12, 12), "uint8")
    return Image.fromarray(blocks).resize((192, 192), Image.Resampling.BICUBIC)


CASE = (
    "A 52-year-old baker has had a dry cough and night sweats for three weeks. His temperature "
    "is 38.4 °C. A radiograph shows a cavity in the right upper lobe. Which drug is given first?"
)
RETOLD = (
    "Night sweats and a dry cough have troubled a 52-year-old baker for three weeks. The "
    "radiograph shows a right upper lobe cavity; his temperature is 38.4 °C. "
    "Which drug is given first?"
)
OTHERS = [{"question": f"Which of the following is true about organ {i}?"} for i in range(30)]


def test_a_picture_in_another_size_is_the_same_picture(tmp_path):
    draw(0).save(tmp_path / "a.png")
    draw(0).resize((90, 90)).convert("L").save(tmp_path / "b.jpg", quality=80)
    draw(1).save(tmp_path / "c.png")
    here = [(3, tmp_path / "b.jpg"), (4, tmp_path / "c.png")]
    copies, unread = near.find_near_pictures(here, [(7, tmp_path / "a.png")])
    assert [(c.row, c.other, c.kind) for c in copies] == [(3, 7, "same picture")]
    assert unread == {}


def test_pictures_of_one_colour_and_missing_ones_match_nothing_and_are_counted(tmp_path):
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    here = [(0, black), (1, tmp_path / "none.png"), (2, {"path": "x.png"})]
    copies, unread = near.find_near_pictures(here, [(0, black), (1, white), (2, draw(0))])
    assert copies == [] and sorted(unread) == [0, 1, 2]
    assert unread[0] == "the picture has one colour only"
    assert "none.png" in unread[1]


def test_a_case_that_is_told_again_is_near_and_passes_the_exact_rule():
    train = [{"question": RETOLD}, *OTHERS[:15]]
    bench = [{"question": CASE}, *OTHERS[15:]]
    report = near.report_near(train, [bench[0]])
    assert [(c.row, c.other, c.kind) for c in report.copies] == [(0, 0, "words")]
    from octomed.data.decontaminate import decontaminate

    assert decontaminate(train, bench).drop == set()
    assert near.report_near(train, bench[:1], dropped={0}).passed == []


@pytest.mark.parametrize("stem", ["", "?", " … "])
def test_a_stem_without_words_is_near_to_nothing(stem):
    assert near.find_near_stems([(0, stem)], [(0, stem), (1, "Which organ?")]) == []


def test_rows_with_pictures_are_compared_by_their_pictures():
    stem = "Which tumour does this image show?"
    train = [{"question": stem, "images": [draw(i)]} for i in range(3)]
    bench = [{"question": stem, "images": [draw(2).resize((64, 64))]}]
    report = near.report_near(train, bench)
    assert [(c.row, c.kind) for c in report.copies] == [(2, "same picture")]


def test_punctuation_order_and_width_do_not_count():
    stem = "In eukaryotes, introns of group II are present in genes:"
    same = "In eukaryotes introns of group \uff29\uff29 are present, in genes?"
    [copy] = near.find_near_stems([(0, same)], [(0, stem)])
    assert copy.score == 1.0


def test_candidates_hold_every_pair_that_all_comparisons_find():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    bench = [list(rng.choice(words, 40, replace=False)) for _ in range(60)]
    train = [[*stem[:30], *rng.choice(words, 6)] for stem in bench]
    here = [(i, " ".join(stem)) for i, stem in enumerate(train)]
    there = [(i, " ".join(stem)) for i, stem in enumerate(bench)]
    assert {(c.row, c.other) for c in near.find_near_stems(here, there)} == {
        (i, i) for i in range(60)
    }


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def decontaminate(*words: str):
    from octomed.run.cli import main

    try:
        main(["decontaminate", *words])
    except SystemExit as end:
        assert not end.code


def test_the_command_writes_near_copies_and_warns(tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", {"question": RETOLD})
    bench = write_rows(tmp_path / "bench.jsonl", {"question": CASE})
    out = tmp_path / "near.jsonl"
    decontaminate(train, "--against", bench, "--near", str(out))
    [row] = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert (row["row"], row["item"], row["kind"]) == (1, 1, "words")
    assert "1 kept row is a near copy" in capsys.readouterr().err


def test_small_sets_are_looked_through_unasked_and_large_ones_say_how(
    tmp_path, capsys, monkeypatch
):
    from octomed.run import cli

    train = write_rows(tmp_path / "train.jsonl", {"question": RETOLD})
    bench = write_rows(tmp_path / "bench.jsonl", {"question": CASE})
    decontaminate(train, "--against", bench)
    assert "1 kept row is a near copy of a benchmark item: --near" in capsys.readouterr().err
    monkeypatch.setattr(cli, "NEAR_ROWS", 1)
    decontaminate(train, "--against", bench)
    assert "near copies were not looked for" in capsys.readouterr().err


def test_pictures_of_files_are_compared_and_those_that_are_gone_are_counted(tmp_path, capsys):
    from base64 import b64encode

    for i in range(3):
        draw(i).save(tmp_path / f"{i}.png")
    draw(0).resize((90, 90)).save(tmp_path / "small.jpg", quality=80)
    draw(1).resize((80, 80)).save(tmp_path / "b.png")
    stem = "What is shown?"
    encoded = b64encode((tmp_path / "b.png").read_bytes()).decode()
    train = write_rows(
        tmp_path / "train.jsonl",
        {"question": stem, "image": "small.jpg"},
        {"question": stem, "images": [{"bytes": encoded, "path": None}]},
        {"question": stem, "image_path": "gone.png"},
        {"question": stem, "image": "2.png"},
    )
    bench = write_rows(
        tmp_path / "bench.jsonl",
        {"question": stem, "image": "0.png"},
        {"question": stem, "image": "1.png"},
    )
    out = tmp_path / "near.jsonl"
    decontaminate(train, "--against", bench, "--near", str(out))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["item"], row["kind"]) for row in rows] == [
        (2, 2, "same picture"),
        (1, 1, "same picture"),
    ]  # the nearest first
    errors = capsys.readouterr().err
    assert "the pictures of 1 row were not compared" in errors and "row 3" in errors


def test_parts_without_a_class_in_common_have_no_scores():
    from types import SimpleNamespace

    from octomed.paper.dataset import score_parts

    test = [SimpleNamespace(answer_text=label, images=[label]) for label in ("glioma", "normal")]
    assert score_parts(np.array([1.0, 0.0]), test, ["same pixels", "no twin"]) == []
    assert score_parts(np.array([1.0, 0.0]), test, ["no twin", "no twin"]) == []


@pytest.mark.parametrize(
    "image",
    [
        "https://bucket.example/a.png?signature=" + "a" * 400,
        "a" * 600,
        "a\0b.png",
        ".",
        "",
    ],
)
def test_a_picture_that_no_file_can_be_costs_nothing_but_its_comparison(tmp_path, capsys, image):
    train = write_rows(tmp_path / "t.jsonl", {"question": "What is shown?", "image": image})
    bench = write_rows(tmp_path / "b.jsonl", {"question": "Who is it?"})
    decontaminate(train, "--against", bench, "--near", str(tmp_path / "near.jsonl"))
    assert (tmp_path / "near.jsonl").read_text(encoding="utf-8") == ""
    assert ("pictures of 1 row " in capsys.readouterr().err) == bool(image)
