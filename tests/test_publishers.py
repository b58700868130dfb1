"Conventions that share a name, missing values, lost pictures, and files that are broken."

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from octomed.core.paths import OctomedError, shipped
from octomed.data import sources as module
from octomed.data.publishers import (
    _parse_options,
    from_medmcqa,
    from_medqa,
    from_mmlu_pro,
    from_pmc_vqa,
    from_rexvqa,
    read_medmcqa,
)
from octomed.data.sources import SOURCES, load, load_report, read_chats, read_open, tabulate_sources

EXAMPLES = shipped("examples")
NOISE = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(path, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    img = Image.fromarray(NOISE.integers(0, 256, (60, 60, 3), "uint8"))
    img.save(path, kind)
    return img


# two conventions under one name


def hub_row(n, cop):
    options = {"opa": "w", "opb": "x", "opc": "y", "opd": "z"}
    return {"id": f"i{n}", "question": f"Which {n}?", **options, "cop": cop}


def authors_row(n, cop):
    row = hub_row(n, cop)
    return {"question": row.pop("question"), "cop": row.pop("cop"), **row}


@pytest.mark.parametrize(
    "row, cops, answers",
    [
        (hub_row, [0, 1], "AB"),
        (hub_row, [1, 2, 0, 3], "BCAD"),
        (hub_row, [1, 2, 4], "ABD"),
        (authors_row, [1, 2, 4], "ABD"),
        (authors_row, [1, 2], "AB"),
        (authors_row, [3, 0], "DA"),
    ],
)
def test_medmcqa_is_numbered_as_its_file_is(tmp_path, row, cops, answers):
    rows = [row(n, cop) for n, cop in enumerate(cops)]
    write_lines(tmp_path / "medmcqa" / "dev.json", rows)
    assert [q.answer for q in load("medmcqa:dev", folder=tmp_path)] == list(answers)


def test_a_medmcqa_file_that_does_not_tell_is_refused(tmp_path):
    path = tmp_path / "medmcqa" / "dev.json"
    write_lines(path, [hub_row(0, 1), hub_row(1, 2)])
    with pytest.raises(OctomedError, match=r"dev\.json may count `cop` from 0.*or from 1"):
        load("medmcqa:dev", folder=tmp_path)
    for cops in ([4, 1, 0], [0, 1, 4]):
        write_lines(path, [authors_row(n, cop) for n, cop in enumerate(cops)])
        with pytest.raises(OctomedError, match="mixes the authors' rows with the hub's"):
            load("medmcqa:dev", folder=tmp_path)


def test_a_hub_row_without_a_label_is_no_answer(tmp_path):
    write_lines(tmp_path / "medmcqa" / "dev.json", [hub_row(0, -1), hub_row(1, 3)])
    r = load_report("medmcqa:dev", folder=tmp_path)
    assert r.reasons == {"no answer": 1} and [q.answer for q in r.questions] == ["D"]
    assert [row["first"] for _, row in read_medmcqa(tmp_path / "medmcqa" / "dev.json")] == [0, 0]


@pytest.mark.parametrize("cop, answer", [(2.0, "C"), (1.5, "?"), (float("nan"), None), ("1", "B")])
def test_numbers_of_a_table_with_gaps(cop, answer):
    assert from_medmcqa(hub_row(0, cop), first=0)["answer"] == answer


def test_headqa_never_counts_from_0(tmp_path):
    answers = [{"aid": i, "atext": t} for i, t in enumerate("xyz", 1)]
    row = {"qid": "1", "qtext": "Which?", "ra": "0", "answers": answers}
    exams = {"e": {"name": "E", "data": [row]}}
    (tmp_path / "headqa").mkdir()
    (tmp_path / "headqa" / "dev_HEAD_EN.json").write_text(json.dumps({"exams": exams}))
    with pytest.raises(OctomedError, match=r"question 1 of exam E .* has ra 0"):
        load("headqa:dev", folder=tmp_path)


MEDQA = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}


def test_key_and_text_that_disagree_are_dropped(tmp_path):
    rows = [
        MEDQA,
        {**MEDQA, "answer": " Y "},
        {**MEDQA, "answer": "x"},
        {**MEDQA, "answer": "z"},
        {**MEDQA, "options": {"A": "x", "a": "y"}, "answer_idx": "A"},
        {**MEDQA, "options": {"a": "x", "b": "y"}},
    ]
    write_lines(tmp_path / "medqa" / "phrases_no_exclude_test.jsonl", rows)
    r = load_report("medqa:test", folder=tmp_path)
    assert r.reasons == {"answer's key and text disagree": 2, "two options under one letter": 1}
    assert [q.answer for q in r.questions] == ["B"] * 3


def test_key_number_and_text_of_other_sets():
    row = {"question_id": 1, "question": "Which?", "options": ["x", "y"], "answer": "B"}
    assert "flaw" not in from_mmlu_pro({**row, "answer_index": 1})
    assert from_mmlu_pro({**row, "answer_index": 0})["flaw"] == "answer's key and number disagree"
    choices = {
        f"Choice {letter}": f" {letter}:{text} "
        for letter, text in zip("ABCD", "xyzw", strict=True)
    }
    pmc = {"Figure_path": "f.jpg", "Question": "Which?", **choices, "Answer_label": "B"}
    assert "flaw" not in from_pmc_vqa({**pmc, "Answer": "y"})
    assert from_pmc_vqa({**pmc, "Answer": "z"})["flaw"] == "answer's key and text disagree"
    rex = {"id": "q", "question": "Which?", "options": ["A. x", "B. y"]}
    assert from_rexvqa({**rex, "correct_answer": "A. y"})["answer"] == "?"


# missing values


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, ""])
def test_a_missing_option_is_never_a_text(missing):
    assert _parse_options(["x", missing]) == {"A": "x", "B": ""}
    assert _parse_options({"A": "x", "B": missing, "C": "z"}) == {"A": "x", "B": "", "C": "z"}
    assert _parse_options([{"key": "A", "value": missing}]) == {"A": ""}
    row = {**MEDQA, "options": ["x", missing, "z"], "answer_idx": "A", "answer": "x"}
    assert from_medqa(row)["options"] == ("x", "", "z")


def test_the_words_none_and_na_are_options():
    words = ["None", "NA", "nan", "null", "N/A"]
    assert from_medqa({**MEDQA, "options": words})["options"] == tuple(words)
    assert _parse_options(np.array(words, dtype=object)) == dict(zip("ABCDE", words, strict=True))
    assert _parse_options([1, 0.5]) == {"A": "1", "B": "0.5"}


def test_a_question_with_a_missing_option_is_counted(tmp_path):
    rows = [{**authors_row(0, 4), "opd": None}, {**authors_row(1, 4), "opb": float("nan")}]
    rows += [{**authors_row(2, 4), "opb": "None"}, {**authors_row(3, 4), "question": None}]
    write_lines(tmp_path / "medmcqa" / "dev.json", rows)
    r = load_report("medmcqa:dev", folder=tmp_path)
    assert r.reasons == {"empty option": 2, "empty stem": 1}
    assert [q.options[1] for q in r.questions] == ["None"]


# pictures in folders


def test_every_file_among_class_folders_is_read_or_counted(tmp_path):
    folder = tmp_path / "brain_tumor" / "Testing"
    for name in ("a.jpg", "b.JPG", "c.webp", "d.gif", "e.bmp", "f.tif", "deep/er/g.png"):
        draw(folder / "no_tumor" / name)
    draw(folder / "GLIOMA_TUMOR" / "h.jfif", "JPEG")
    draw(folder / "other" / "i.png")
    draw(folder / "loose.png")
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "notes.txt", "scan.dcm", "bare"):
        (folder / "no_tumor" / name).write_bytes(b"x")
    r = load_report("brain_tumor:test", folder=tmp_path, max_pixels=12_544)
    assert sorted(q.answer for q in r.questions) == ["A"] + ["C"] * 7
    assert r.reasons == {
        "hidden file": 3,
        "no image file (.txt)": 1,
        "no image file (.dcm)": 1,
        "no image file (no ending)": 1,
        "image in no class folder": 1,
        "answer outside the options": 1,
    }
    assert r.rows == 16
    row = find_row(tmp_path, "brain_tumor", "test")
    assert row["found"] == 9 and "left out: 3 × hidden file" in row["where"]


def find_row(folder, name, split):
    table = tabulate_sources(folder)
    return next(row for row in table if (row["source"], row["split"]) == (name, split))


def write_pmc(folder, file):
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    (folder / "pmc_vqa").mkdir(exist_ok=True)
    (folder / "pmc_vqa" / file).write_text(f"{head}\nx.jpg,Which?,y,A:w,B:y,C:z,D:v,B\n")


def test_pictures_of_one_name_in_two_splits_stay_apart(tmp_path):
    for file in ("train.csv", "test_clean.csv"):
        write_pmc(tmp_path, file)
    hashes = {}
    for split in ("train", "test"):
        draw(tmp_path / "pmc_vqa" / split / "x.jpg")
        hashes[split] = module.store_image(tmp_path / "pmc_vqa" / split / "x.jpg")
    for split in ("train", "test"):
        assert load(f"pmc_vqa:{split}", folder=tmp_path)[0].images == (hashes[split],)
    shutil.rmtree(tmp_path / "pmc_vqa" / "train")
    assert load("pmc_vqa:train", folder=tmp_path)[0].images == ("name:x.jpg",)


def test_a_name_that_several_pictures_have_is_counted(tmp_path):
    write_pmc(tmp_path, "train.csv")
    draw(tmp_path / "pmc_vqa" / "one" / "x.jpg")
    shutil.copytree(tmp_path / "pmc_vqa" / "one", tmp_path / "pmc_vqa" / "copy")
    assert load("pmc_vqa:train", folder=tmp_path)[0].at_hand
    draw(tmp_path / "pmc_vqa" / "two" / "x.jpg")
    r = load_report("pmc_vqa:train", folder=tmp_path)
    assert r.reasons == {"several images of this name": 1}
    assert "several images of this name" in find_row(tmp_path, "pmc_vqa", "train")["where"]


def test_a_row_that_names_the_folder_gets_its_own_picture(tmp_path):
    rows = {}
    for study in ("a", "b"):
        draw(tmp_path / "rexvqa" / "png" / study / "1.png")
        rows[study] = {
            "question": "Which?",
            "options": ["x", "y"],
            "correct_answer": "A",
            "ImagePath": [f"../png/{study}/1.png"],
        }
    (tmp_path / "rexvqa" / "train_vqa_data.json").write_text(json.dumps(rows))
    questions = load("rexvqa:train", folder=tmp_path)
    assert [q.images for q in questions] == [
        (module.store_image(tmp_path / "rexvqa" / "png" / study / "1.png"),) for study in "ab"
    ]


def test_the_table_of_aptos_names_images_of_its_training_folder(tmp_path):
    names = [f"e{i}" for i in range(10)]
    for part in ("train_images", "test_images"):
        for name in names:
            draw(tmp_path / "aptos" / part / f"{name}.png")
    lines = ["id_code,diagnosis", *(f"{name},{i % 5}" for i, name in enumerate(names))]
    (tmp_path / "aptos" / "train.csv").write_text("\n".join(lines) + "\n")
    images = [module.store_image(tmp_path / "aptos" / "train_images" / f"{n}.png") for n in names]
    for split in ("train", "test"):
        for q in load(f"aptos:{split}", folder=tmp_path):
            assert q.images == (images[names.index(q.origin)],)


def test_chats_find_their_pictures_by_their_folders(tmp_path):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    rows = [{"id": s, "image": [f"{s}/1.jpg"], "conversations": turns} for s in "ab"]
    for study in "ab":
        draw(tmp_path / "pubmedvision" / "images" / study / "1.jpg")
    file = tmp_path / "pubmedvision" / "PubMedVision_Alignment_VQA.json"
    file.write_text(json.dumps(rows))
    first, second = read_chats("pubmedvision:alignment", images=True, folder=tmp_path)
    assert first["images"] != second["images"] and not first["images"][0].startswith("name:")


# broken files


BROKEN = {
    "medqa/phrases_no_exclude_test.jsonl": ["[1, 2]", "7\n", '"text"\n', "[" * 100_000, "\0"],
    "headqa/test_HEAD_EN.json": [
        '{"exams": []}',
        '{"exams": {"e": []}}',
        '{"exams": {"e": {"name": "E"}}}',
        '{"exams": {"e": {"name": "E", "data": [3]}}}',
        "[" * 100_000,
    ],
    "rexvqa/test_vqa_data.json": ['{"q": 3}', "[]", '{"q": {"id": 1}}', '{"q": '],
    "medmcqa/dev.json": ["[null]", "[[]]", '{"cop": "B"}'],
    "aptos/train.csv": ["id_code\na\n", "a,b\n1\n"],
    "mmmu_pro/gpt-4o_standard_10opt_cot.jsonl": ['{"subject": "Pharmacy", "options": "["}'],
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_broken_file_costs_its_own_row_which_says_why(tmp_path, file):
    shutil.copytree(EXAMPLES, tmp_path / "data")
    path = tmp_path / "data" / file
    whole = tabulate_sources(tmp_path / "data")
    for text in BROKEN[file]:
        path.write_text(text)
        table = tabulate_sources(tmp_path / "data")
        changed = [row for row, old in zip(table, whole, strict=True) if row != old]
        name = file.split("/")[0]
        assert changed and {row["source"].split("_")[0] for row in changed} == {name.split("_")[0]}
        assert all(row["found"] is None and path.name in row["where"] for row in changed)
        with pytest.raises(OctomedError, match=path.name.replace(".", r"\.")):
            load(f"{changed[0]['source']}:{changed[0]['split']}", folder=tmp_path / "data")


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    shutil.copytree(EXAMPLES, tmp_path / "data")
    file = tmp_path / "data" / "medqa" / "phrases_no_exclude_test.jsonl"
    file.unlink()
    file.mkdir()
    assert (
        "cannot be read (Is a directory)" in find_row(tmp_path / "data", "medqa", "test")["where"]
    )
    shutil.rmtree(tmp_path / "data" / "brain_tumor" / "Testing")
    (tmp_path / "data" / "brain_tumor" / "Testing").write_text("x")
    assert "Testing is no folder" in find_row(tmp_path / "data", "brain_tumor", "test")["where"]

    def refuse(place, onerror, **options):
        onerror(PermissionError(13, "Permission denied", str(place)))

    monkeypatch.setattr("os.walk", refuse)
    where = find_row(tmp_path / "data", "brain_tumor", "train")["where"]
    assert where == "the folder Training cannot be read (Permission denied): check it"


# sets since the paper


def encode(seed):
    img = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 60, 3), "uint8"))
    img.save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


def test_vqa_rad_asks_closed_questions_and_counts_the_open_ones(tmp_path):
    rows = [
        {"image": encode(0), "question": "is there a mass?", "answer": "Yes"},
        {"image": encode(1), "question": "is there a mass?", "answer": "no"},
        {"image": encode(1), "question": "what organ is shown?", "answer": "the liver"},
    ]
    write_parquet(tmp_path / "vqa_rad" / "data" / "test-00000-of-00001-a1.parquet", rows)
    r = load_report("vqa_rad:test", folder=tmp_path, max_pixels=12_544)
    assert [(q.options, q.answer) for q in r.questions] == [
        (("Yes", "No"), "A"),
        (("Yes", "No"), "B"),
    ]
    assert r.reasons == {"open-ended: the answer is free text": 1} and r.questions[0].at_hand
    named = load("vqa_rad:test", folder=tmp_path, images=False)
    assert len({q.id for q in named}) == 2
    (question,) = read_open("vqa_rad:test", folder=tmp_path)
    assert (question["stem"], question["answer"]) == ("what organ is shown?", "the liver")
    row = find_row(tmp_path, "vqa_rad", "test")
    assert (row["expected"], row["found"]) == (451, 3) and "1 × open-ended" in row["where"]


def test_pieces_of_parquet_are_all_there_or_refused(tmp_path):
    row = {"image": encode(0), "question": "is it?", "answer": "yes"}
    folder = tmp_path / "vqa_rad" / "data"
    write_parquet(folder / "train-00000-of-00002.parquet", [row])
    with pytest.raises(OctomedError, match=r"1 of the 2 pieces of .* are at hand"):
        load("vqa_rad:train", folder=tmp_path)
    write_parquet(folder / "train-00001-of-00002.parquet", [{**row, "question": "was it?"}])
    assert len(load("vqa_rad:train", folder=tmp_path)) == 2
    whole = (folder / "train-00001-of-00002.parquet").read_bytes()
    (folder / "train-00001-of-00002.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in find_row(tmp_path, "vqa_rad", "train")["where"]


def test_slake_is_read_in_english_and_finds_its_pictures(tmp_path):
    row = {"q_lang": "en", "img_name": "xmlab1/source.jpg", "question": "Is it?", "answer": "Yes"}
    rows = [
        {**row, "qid": 1},
        {**row, "qid": 2, "img_name": "xmlab2/source.jpg"},
        {**row, "qid": 3, "answer": "Lung"},
        {**row, "qid": 4, "q_lang": "zh"},
    ]
    (tmp_path / "slake").mkdir()
    (tmp_path / "slake" / "test.json").write_text(json.dumps(rows))
    for place in ("xmlab1", "xmlab2"):
        draw(tmp_path / "slake" / "imgs" / place / "source.jpg")
    r = load_report("slake:test", folder=tmp_path, max_pixels=12_544)
    assert r.rows == 3 and r.reasons == {"open-ended: the answer is free text": 1}
    assert len({q.images for q in r.questions}) == 2 and all(q.at_hand for q in r.questions)
    assert "before any cut" in SOURCES["slake:test"].note


def test_medreason_and_the_sets_of_medical_reasoning(tmp_path):
    row = {"dataset_name": "s", "id_in_dataset": 7, "question": "Which?", "reasoning": "So."}
    options = "Answer Choices:\nA. Heart\nB. Lung"
    rows = [{**row, "options": options, "answer": a} for a in ("B", "Lung.", "B. Lung", "A. Lung")]
    rows.append({**row, "options": "", "answer": "free text"})
    write_lines(tmp_path / "medreason" / "any.jsonl", rows)
    r = load_report("medreason:train", folder=tmp_path)
    assert [q.answer_text for q in r.questions] == ["Lung"] * 3
    assert r.reasons == {
        "answer outside the options": 1,
        "open-ended: the answer is free text": 1,
    }
    omr = {"image": encode(0), "question": "Which?\nA. Heart\nB. Lung", "answer": "B"}
    folder = tmp_path / "openmedreason" / "data"
    write_parquet(folder / "test-00000-of-00001.parquet", [{**omr, "reasoning": ""}])
    (q,) = load("openmedreason:test", folder=tmp_path, max_pixels=12_544)
    assert (q.stem, q.answer_text, q.at_hand) == ("Which?", "Lung", True)
    syn = {"images": [encode(1)], "question": "<image>Which?", "options": list("vwxyz")}
    folder = tmp_path / "medsynvqa_1k" / "data"
    write_parquet(folder / "train-00000-of-00001.parquet", [{**syn, "answer": "E"}])
    (q,) = load("medsynvqa_1k:train", folder=tmp_path, max_pixels=12_544)
    assert (q.stem, q.answer_text, len(q.images)) == ("Which?", "z", 1)


def test_a_set_whose_files_were_not_seen_says_what_it_would_need(tmp_path):
    write_lines(tmp_path / "medreason" / "a.jsonl", [{"question": "Which?", "answer": "x"}])
    with pytest.raises(OctomedError) as e:
        load("medreason:train", folder=tmp_path)
    assert str(e.value) == (
        "line 1 of a.jsonl has no column 'options', so it is not medreason:train as its card "
        "describes it: this loader needs the columns dataset_name, id_in_dataset, question, "
        "answer, options"
    )
