"Readers, row functions, splits, patches and archives: each trap of each publisher once."

import io
import itertools
import json
import os
import stat
import tarfile
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from octomed.core.identity import digest
from octomed.core.paths import OctomedError, shipped
from octomed.data.archives import unpack
from octomed.data.file_readers import (
    _JsonCursor,
    _read_text,
    read_csv,
    read_exams,
    read_keyed,
    read_rows,
)
from octomed.data.publishers import (
    draw_for_training,
    from_chat,
    from_coronahack,
    from_fundus,
    from_ham10000,
    from_nejm,
    from_pmc_vqa,
    from_rexvqa,
    read_split,
)
from octomed.data.slides import TEST_SITES, TISSUES, cut_patches, divide_side, find_contour_boxes
from octomed.data.sources import load, load_report

DATA = os.environ.get("OCTOMED_DATA")
real = pytest.mark.skipif(not DATA, reason="OCTOMED_DATA is not set")
EXAMPLES = shipped("examples")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))


# reading

rows = st.lists(
    st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=9),
            lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
            max_leaves=4,
        ),
        max_size=4,
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_a_cursor_gives_what_json_gives_wherever_the_blocks_end(
    tmp_path_factory, items, size, ascii, indent
):
    path = tmp_path_factory.getbasetemp() / "cursor.json"
    path.write_text("x")
    for values, close in ((items, "]"), ({f"k{i}": r for i, r in enumerate(items)}, "}")):
        text = json.dumps(values, ensure_ascii=ascii, indent=indent)
        cursor = _JsonCursor(path)
        cursor.blocks = iter([text[i : i + size] for i in range(0, len(text), size)])
        cursor.next_character()
        assert list(cursor.read_items(close)) == (items if close == "]" else list(values.items()))


@settings(max_examples=80, deadline=None)
@given(rows.filter(len), st.data())
def test_a_broken_array_is_named_and_never_read_as_a_whole_one(tmp_path_factory, items, data):
    path, text = tmp_path_factory.getbasetemp() / "cut.json", json.dumps(items, indent=1)
    path.write_text(text[: data.draw(st.integers(1, len(text) - 1))])
    with pytest.raises(OctomedError, match=r"line \d+ of cut.json is not JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "text,line",
    [
        ("[{}, {]", 1),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ("[{},\n]", 2),
        ("[{}]\n\n{}", 3),
        ('[{"a": "b}]', 1),
        ("[", 1),
        ('[{"a": 1},\n{"a": 2', 2),
    ],
)
def test_what_is_no_array_names_its_line(tmp_path, text, line):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(OctomedError, match=f"line {line} of r.json is not JSON"):
        list(read_rows(tmp_path / "r.json"))


def test_rows_in_arrays_lines_and_objects(tmp_path):
    for name, text in (
        ("a", '\ufeff [ {"x": 1},\n {"x": 2} ] \n'),
        ("l", '{"x": 1}\n\n{"x": 2}'),
        ("k", '{"p": {"x": 1}, "q": {"x": 2}}'),
        ("e", "[]"),
        ("n", ""),
    ):
        (tmp_path / name).write_text(text)
    assert [r["x"] for _, r in read_rows(tmp_path / "a")] == [
        r["x"] for _, r in read_rows(tmp_path / "l")
    ] == [1, 2] and [p for p, _ in read_rows(tmp_path / "l")] == ["line 1 of l", "line 3 of l"]
    assert [r for _, r in read_keyed(tmp_path / "k")] == [
        {"id": "p", "x": 1},
        {"id": "q", "x": 2},
    ] and list(read_rows(tmp_path / "e")) == list(read_rows(tmp_path / "n")) == []
    with pytest.raises(OctomedError, match="line 1 of a is not JSON"):
        list(read_keyed(tmp_path / "a"))


@pytest.mark.parametrize("array", [True, False])
def test_a_large_file_is_never_held(tmp_path, array):
    line, n = json.dumps({"question": "é" * 500}, ensure_ascii=False), 12_000
    with open(tmp_path / "big.json", "w", encoding="utf-8") as f:
        f.write("[" + ",\n".join([line] * n) + "]" if array else (line + "\n") * n)
    assert (tmp_path / "big.json").stat().st_size > 12e6
    tracemalloc.start()
    try:
        assert (
            sum(len(r["question"]) for _, r in read_rows(tmp_path / "big.json")) == 500 * n
            and tracemalloc.get_traced_memory()[1] < 9e6
        )
    finally:
        tracemalloc.stop()


def test_bytes_that_are_no_utf8_are_named_by_their_place(tmp_path):
    (tmp_path / "t").write_bytes(b"a" * (1 << 20) + "é".encode() + b"bc\xff")
    with pytest.raises(OctomedError, match=f"not UTF-8 text at byte {(1 << 20) + 4}"):
        list(_read_text(tmp_path / "t"))
    (tmp_path / "t").write_bytes(b"a\xc3")
    with pytest.raises(OctomedError, match="not UTF-8 text at byte 1"):
        list(_read_text(tmp_path / "t"))


def test_csv_keeps_line_breaks_and_refuses_ragged_rows(tmp_path):
    (tmp_path / "t.csv").write_bytes('\ufeffa,b\r\n"x\r\ny, ""z""",1\r\n\r\nw,2'.encode())
    assert [(p, r) for p, r in read_csv(tmp_path / "t.csv")] == [
        ("line 3 of t.csv", {"a": 'x\r\ny, "z"', "b": "1"}),
        ("line 5 of t.csv", {"a": "w", "b": "2"}),
    ]
    for text in ("a,b\nx,1\ny\n", "a,b\nx,1\ny,2,3\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(
            OctomedError, match=r"line 3 of t\.csv does not have the fields of its header"
        ):
            list(read_csv(tmp_path / "t.csv"))


# traps of the sets with images

PMC = {
    "Figure_path": "PMC1_f1.jpg",
    "Question": "Which?",
    "Answer": "y",
    "Choice A": " A:x ",
    "Choice B": " B:y ",
    "Choice C": " C:z ",
    "Choice D": " D:w ",
    "Answer_label": "B",
}


def test_trap_pmc_vqa_choices_carry_their_letter_and_the_answer_comes_twice():
    f = from_pmc_vqa(PMC)
    assert (f["options"], f["answer"], f["images"], f["origin"]) == (
        ("x", "y", "z", "w"),
        "B",
        ("name:PMC1_f1.jpg",),
        "PMC1_f1.jpg",
    )
    bare = {k: v for k, v in PMC.items() if k != "Answer_label"}
    assert from_pmc_vqa(bare)["answer"] == from_pmc_vqa({**bare, "Answer": "B"})["answer"] == "B"
    assert from_pmc_vqa({**PMC, "Choice A": " A:B: cells "})["options"][0] == "B: cells"
    assert from_pmc_vqa({**PMC, "Choice A": "x"})["options"] == ("x", "y", "z", "w")


def test_trap_pmc_vqa_one_figure_serves_several_questions():
    qs = load("pmc_vqa:train", folder=EXAMPLES)
    assert (
        len({q.images for q in qs}) == 2
        and len({q.id for q in qs}) == 3
        and qs[2].options[0] == "B: a disc on a dark ground"
    )


def test_fault_23_pmc_vqa_answers_that_name_no_option(tmp_path):
    import csv

    (tmp_path / "pmc_vqa").mkdir()
    with open(tmp_path / "pmc_vqa" / "train.csv", "w", newline="") as f:
        w = csv.DictWriter(f, list(PMC))
        w.writeheader()
        w.writerows(
            [
                PMC,
                {**PMC, "Answer_label": "E"},
                {**PMC, "Answer_label": ""},
                {**PMC, "Choice C": " C: "},
                {**PMC, "Choice C": " C:y "},
                {**PMC, "Question": " "},
            ]
        )
    r = load_report("pmc_vqa:train", folder=tmp_path)
    assert (
        r.reasons
        == {
            "answer outside the options": 1,
            "no answer": 1,
            "empty option": 1,
            "duplicate options": 1,
            "empty stem": 1,
        }
        and r.rows == 6
        and len(r.questions) == 1
    )


def test_rexvqa_answers_as_letters_or_texts_and_views_by_their_names():
    row = {
        "id": "q",
        "question": "Which?",
        "options": ["A. x", "B. y"],
        "ImagePath": ["../deid/a/1.png", "2.png"],
    }
    assert [
        from_rexvqa({**row, "correct_answer": a})["answer"]
        for a in ("B", "B.", "B. y", "y", "C", "", None, "z")
    ] == ["B", "B", "B", "B", "?", None, None, "?"]
    f = from_rexvqa({**row, "correct_answer": "A", "options": ["x", "y"]})
    assert (f["options"], f["answer"], f["images"]) == (
        ("x", "y"),
        "A",
        ("name:1.png", "name:2.png"),
    )
    assert [q.answer_text for q in load("rexvqa:train", folder=EXAMPLES)] == ["No", "Left"]


def test_nejm_is_read_from_a_users_own_copy():
    qs = load("nejm:test", folder=EXAMPLES)
    assert [(q.answer_text, len(q.options), q.at_hand) for q in qs] == [
        ("Coin", 5, True),
        ("Watch", 5, False),
    ]
    with pytest.raises(KeyError):
        from_nejm({"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "A"})


@pytest.mark.parametrize(
    "label,level,dataset,answer",
    [
        ("Normal", "", "TRAIN", "A"),
        ("Pnemonia", "bacteria", "TRAIN", "B"),
        ("Pnemonia", "Virus", "TRAIN", "C"),
        ("Pnemonia", "Stress-Smoking", "TRAIN", None),
        ("Pnemonia", "", "TRAIN", None),
        ("Normal", "", "TEST", None),
    ],
)
def test_trap_coronahack_sorts_pneumonia_by_its_cause(label, level, dataset, answer):
    f = from_coronahack(
        {
            "X_ray_image_name": "x.jpeg",
            "Label": label,
            "Dataset_type": dataset,
            "Label_1_Virus_category": level,
            "Label_2_Virus_category": "",
        },
        "TRAIN",
    )
    assert (f and f["answer"]) == answer


def test_fundus_grades_under_either_name():
    assert [
        from_fundus(r)["answer"]
        for r in (
            {"id_code": "a", "diagnosis": "0"},
            {"image_id": "b.jpg", "adjudicated_dr_grade": "4.0"},
            {"id_code": "a", "diagnosis": "7"},
        )
    ] == ["A", "E", "?"]
    assert from_fundus({"image_id": "b.JPG", "adjudicated_dr_grade": "1"})["images"] == (
        "name:b.JPG",
    ) and from_fundus({"id_code": "a", "diagnosis": 1})["images"] == ("name:a.png",)


def test_ham10000_classes():
    qs = load("ham10000:train", folder=EXAMPLES)
    assert (
        [q.answer for q in qs] == list("ABCDEFG")
        and [q.at_hand for q in qs].count(True) == 1
        and from_ham10000({"image_id": "x", "dx": "unknown"})["answer"] == "?"
    )


def test_chats_must_take_turns():
    def turn(who):
        return {"from": who, "value": "<image>\nWell?"}

    assert [
        m["content"]
        for m in from_chat(
            {"id": 1, "image": ["a/b.jpg"], "conversations": [turn("human"), turn("gpt")]}
        )["messages"]
    ] == ["Well?"] * 2
    for turns in (["human"], ["gpt", "human"], ["human", "human"]):
        with pytest.raises(ValueError):
            from_chat({"id": 1, "image": [], "conversations": [turn(t) for t in turns]})


# splits


def test_the_draw_is_pandas_own():
    import pandas as pd

    labels = list(np.random.default_rng(0).choice(list("abc"), 200))
    frame = pd.DataFrame({"label": labels, "n": range(200)})
    theirs = {
        n
        for c in "abc"
        for n in frame.loc[frame.label == c]
        .sample(int(0.8 * (frame.label == c).sum()), random_state=0)
        .n
    }
    assert draw_for_training(labels) == theirs and draw_for_training(labels, seed=1) != theirs


def test_fault_25_a_split_conserves_its_rows_and_leaves_the_ungradable_out(tmp_path):
    f = EXAMPLES / "messidor2" / "messidor_data.csv"
    parts = {p: [r["id_code"] for _, r in read_split(f, p)] for p in ("train", "test")}
    assert (
        len(parts["train"]) + len(parts["test"]) + 1 == sum(1 for _ in read_csv(f)) == 13
        and not set(parts["train"]) & set(parts["test"])
        and "IM000099.JPG" not in parts["train"] + parts["test"]
    )
    grades = {r["id_code"]: r["diagnosis"] for _, r in read_csv(f)}
    sizes = Counter(grades[n] for n in parts["train"] + parts["test"])
    assert Counter(grades[n] for n in parts["train"]) == {g: int(0.8 * n) for g, n in sizes.items()}


def test_a_split_does_not_depend_on_the_order_of_the_rows_and_takes_either_header(tmp_path):
    names, grades = [f"{i:03d}.jpg" for i in range(40)], [i % 5 for i in range(40)]
    for name, head, order in (
        ("a", "id_code,diagnosis", 1),
        ("b", "image_id,adjudicated_dr_grade", -1),
    ):
        (tmp_path / name).write_text(
            "\n".join(
                [head, *(f"{n},{g}" for n, g in list(zip(names, grades, strict=False))[::order])]
            )
            + "\n"
        )
    assert [from_fundus(r)["origin"] for _, r in read_split(tmp_path / "a", "test")] == [
        from_fundus(r)["origin"] for _, r in read_split(tmp_path / "b", "test")
    ]


def test_labels_give_the_split_without_any_image(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "messidor_data.csv").write_text(
        (EXAMPLES / "messidor2" / "messidor_data.csv").read_text()
    )
    alone, beside = (load("messidor2:train", folder=f, images=False) for f in (tmp_path, EXAMPLES))
    assert [q.id for q in alone] == [q.id for q in beside] and not any(
        q.at_hand for q in load("messidor2:train", folder=tmp_path)
    )


SPLITS = {
    "coronahack:train": (5_284, "d561d409d997876e"),
    "coronahack:test": (624, "8d4ba1cc49bacadf"),
    "aptos:train": (2_929, "d23665028fea4011"),
    "aptos:test": (733, "935d69556e202237"),
    "messidor2:train": (1_394, "5a2cab3b64e422dc"),
    "messidor2:test": (350, "881e88816a4da669"),
}


@real
@pytest.mark.parametrize("name,out", [("coronahack", 2), ("aptos", 0), ("messidor2", 0)])
def test_the_papers_splits(name, out):
    "Counts as the paper states them, and the images' names, whatever their order."
    parts = {s: load_report(s, images=False) for s in (f"{name}:train", f"{name}:test")}
    assert {
        s: (r.rows, digest(sorted(q.origin for q in r.questions))) for s, r in parts.items()
    } == {s: SPLITS[s] for s in parts} and not any(r.dropped for r in parts.values())
    names = [{q.origin for q in r.questions} for r in parts.values()]
    assert not names[0] & names[1]
    from octomed.data.sources import _find_local, find_source

    (path,) = _find_local(find_source(f"{name}:train"), None)[1]
    assert len(names[0]) + len(names[1]) + out == sum(1 for _ in read_csv(path))


# traps of the text sets


def test_traps_of_size_on_the_examples():
    assert {
        s: sorted({len(q.options) for q in load(s, folder=EXAMPLES, images=False)})
        for s in (
            "headqa:train",
            "headqa:dev",
            "headqa:test",
            "medqa:dev",
            "medqa:train4",
            "medxpertqa_text:test",
            "medxpertqa_mm:test",
        )
    } == {
        "headqa:train": [5],
        "headqa:dev": [4],
        "headqa:test": [4],
        "medqa:dev": [5],
        "medqa:train4": [4],
        "medxpertqa_text:test": [10],
        "medxpertqa_mm:test": [5],
    }
    assert len({len(q.options) for q in load("mmlu_pro_health:test", folder=EXAMPLES)}) > 1
    assert {q.stem for q in load("medqa:train", folder=EXAMPLES)} & {
        q.stem for q in load("medqa:train4", folder=EXAMPLES)
    }
    assert {q.tags["type"] for q in load("medmcqa:dev", folder=EXAMPLES)} == {"single", "multi"}


@real
def test_real_headqa_answers_by_split():
    assert [
        {len(q.options) for q in load(f"headqa:{s}", images=False)}
        for s in ("train", "dev", "test")
    ] == [{5}, {4}, {4}]
    ras = [
        r["ra"]
        for s in ("train", "dev", "test")
        for _, r in read_exams(os.path.join(DATA, "headqa", f"{s}_HEAD_EN.json"))
    ]
    assert {type(r) for r in ras} == {str} and min(map(int, ras)) == 1


@real
def test_real_medmcqa_counts_from_1_and_marks_several_answers():
    raw = [r for _, r in read_rows(os.path.join(DATA, "medmcqa", "dev.json"))]
    assert {r["cop"] for r in raw} == {1, 2, 3, 4} and {r.get("choice_type") for r in raw} >= {
        "single",
        "multi",
    }
    assert [q.answer for q in load("medmcqa:dev")] == ["ABCD"[r["cop"] - 1] for r in raw]


@real
def test_real_medqa_partial_files_share_stems():
    stems = [{q.stem for q in load(s)} for s in ("medqa:train", "medqa:train4")]
    assert len(stems[0] & stems[1]) == 105
    assert [len({q.stem for q in load(f"medqa:{s}")}) for s in ("test", "test5")] == [1_273] * 2


@real
def test_real_option_and_image_counts():
    sizes = {len(q.options) for q in load("mmlu_pro_health:test")}
    assert min(sizes) == 3 and max(sizes) == 10
    images = {len(q.images) for q in load("medxpertqa_mm:test", images=False)}
    assert (
        min(images) == 1
        and max(images) == 6
        and {len(q.options) for q in load("medxpertqa_mm:test", images=False)} == {5}
    )
    assert {len(q.options) for q in load("medxpertqa_text:test")} == {10} and max(
        len(q.options) for q in load("mmmu_pro_health:test", images=False)
    ) == 10


# BCSS


def outer_boxes(mask) -> set:
    "Plain reference: flood the outside through its edges, then collect the rest, 8-connected."
    h, w = mask.shape

    def flood(start, ok, steps):
        seen, todo = set(start), list(start)
        while todo:
            y, x = todo.pop()
            for dy, dx in steps:
                p = y + dy, x + dx
                if -1 <= p[0] <= h and -1 <= p[1] <= w and p not in seen and ok(p):
                    seen.add(p)
                    todo.append(p)
        return seen

    def inside(p):
        return 0 <= p[0] < h and 0 <= p[1] < w

    four = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    eight = [*four, (1, 1), (1, -1), (-1, 1), (-1, -1)]
    outside = flood([(-1, -1)], lambda p: not inside(p) or not mask[p], four)
    left, boxes = set(itertools.product(range(h), range(w))) - outside, set()
    while left:
        part = flood([next(iter(left))], left.__contains__, eight)
        ys, xs = [y for y, _ in part], [x for _, x in part]
        boxes.add((min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1))
        left -= part
    return boxes


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 0.5, 0.6, 0.75]),
)
def test_contour_boxes_equal_a_plain_flood(h, w, seed, p):
    mask = np.random.default_rng(seed).random((h, w)) < p
    boxes = find_contour_boxes(mask)
    assert set(boxes) == outer_boxes(mask) and all(
        mask[y : y + b, x : x + a].any() for x, y, a, b in boxes
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 50), st.integers(1, 9000))
def test_tiles_cover_a_side_evenly(start, length):
    parts = divide_side(start, length)
    assert (
        parts[0][0] == start
        and all(n == min(length, 1024) for _, n in parts)
        and start + length - 1 <= parts[-1][0] + parts[-1][1] <= start + length
    )
    assert all(a + n - b >= 128 for (a, n), (b, _) in itertools.pairwise(parts))
    assert (len(parts) == 1) == (length <= 1024) and len(parts) <= 1 + length // 512


@pytest.fixture
def bcss(tmp_path):
    """Three slides.

    The first has a tumour with a stroma in its hole and a speck, the second a wide necrosis, and
    the third, of the test set, an inflammation."""
    from PIL import ImageDraw

    def slide(name, size, *boxes):
        mask = Image.new("L", size, 0)
        d = ImageDraw.Draw(mask)
        for code, box in boxes:
            d.rectangle(box, fill=code)
        for kind, im in (
            ("masks", mask),
            ("images", Image.merge("RGB", [mask.point(lambda v: v * 50), mask, mask])),
        ):
            (tmp_path / "bcss" / kind).mkdir(parents=True, exist_ok=True)
            im.save(tmp_path / "bcss" / kind / name)

    slide(
        "TCGA-A1-A0SK-DX1.png",
        (600, 500),
        (1, (10, 20, 509, 419)),
        (2, (100, 100, 349, 349)),
        (1, (520, 5, 590, 15)),
        (5, (560, 300, 599, 400)),
    )
    slide("TCGA-A2-A04P-DX1.png", (2100, 300), (4, (0, 0, 2047, 249)))
    slide("TCGA-OL-A5D6-DX1.png", (300, 300), (3, (0, 0, 250, 299)), (1, (280, 0, 299, 299)))
    return tmp_path


def test_bcss_patches_are_cut_once_by_class_and_site(bcss):
    counts = cut_patches(bcss / "bcss")
    assert counts == {
        "regions": 6,
        "too_small": 2,
        "used": 4,
        "patches": {
            "train/Tumor": 1,
            "train/Stroma": 1,
            "train/Necrosis": 3,
            "test/Inflammatory": 1,
        },
    }
    names = sorted(f.name for f in (bcss / "bcss" / "patches" / "train").glob("*/*"))
    assert names == [f"TCGA-A1-A0SK-DX1_{n}.png" for n in ("100_100_250_250", "10_20_500_400")] + [
        f"TCGA-A2-A04P-DX1_{x}_0_1024_250.png" for x in (0, 1024, 512)
    ]
    with pytest.raises(OctomedError, match="remove the folder `patches`"):
        cut_patches(bcss / "bcss")
    train, test = (load(f"bcss:{s}", folder=bcss, max_pixels=12_544) for s in ("train", "test"))
    assert (
        Counter(q.answer_text for q in train) == {"Tumor": 1, "Stroma": 1, "Necrosis": 3}
        and [q.answer_text for q in test] == ["Inflammatory"]
        and all(q.at_hand and q.options == tuple(TISSUES.values()) for q in train + test)
    )
    tumour = Image.open(
        bcss / "bcss" / "patches" / "train" / "Tumor" / "TCGA-A1-A0SK-DX1_10_20_500_400.png"
    )
    assert (
        tumour.size == (500, 400)
        and tumour.getpixel((0, 0)) == (50, 1, 1)
        and tumour.getpixel((100, 100)) == (100, 2, 2)
    )
    assert "TCGA-OL-A5D6"[5:7] in TEST_SITES and {"A1", "A2"}.isdisjoint(TEST_SITES)


def test_bcss_says_what_is_missing_and_leaves_nothing_half_done(bcss):
    folder = bcss / "bcss"
    (folder / "masks" / "TCGA-OL-A5D6-DX1.png").unlink()
    with pytest.raises(OctomedError, match=r"TCGA-OL-A5D6-DX1\.png has no mask"):
        cut_patches(folder)
    Image.new("L", (9, 9)).save(folder / "masks" / "TCGA-OL-A5D6-DX1.png")
    with pytest.raises(OctomedError, match="another size than its slide"):
        cut_patches(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["images", "masks"]
    with pytest.raises(OctomedError, match="no slides"):
        cut_patches(bcss)
    (folder / "images" / "TCGA-OL-A5D6-DX1.png").unlink()
    with pytest.raises(OctomedError, match="no region of BCSS"):
        cut_patches(folder, smallest=5000)
    assert sorted(p.name for p in folder.iterdir()) == ["images", "masks"]


# archives


def zipped(path, *members):
    "members: (name, bytes, unix mode or None, flag)"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode:
                info.external_attr = mode << 16
            z.writestr(info, data)
    return path


def tarred(path, *members, mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, data, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data)
            t.addfile(info, io.BytesIO(data))
    return path


GOOD = ("images/a.png", b"pixels", None)
EVIL = {
    "dots": ("../a.png", b"x", None),
    "dots inside": ("a/../../b", b"x", None),
    "absolute": ("/a.png", b"x", None),
    "drive": ("C:a.png", b"x", None),
    "backslash": ("..\\a.png", b"x", None),
    "link": ("a.png", b"/etc/passwd", stat.S_IFLNK | 0o777),
    "device": ("a.png", b"", stat.S_IFCHR | 0o666),
    "pipe": ("a.png", b"", stat.S_IFIFO | 0o666),
    "bomb": ("a.png", bytes(60 << 20), None),
    "twice": ("images/A.png", b"x", None),
}


def refused(archive, folder, match):
    before = sorted(str(p) for p in folder.parent.parent.rglob("*"))
    with pytest.raises(OctomedError, match=match):
        unpack(archive, folder)
    assert sorted(str(p) for p in folder.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("what", EVIL)
def test_fault_22_a_zip_that_is_unsafe_writes_nothing(tmp_path, what):
    (tmp_path / "in" / "here").mkdir(parents=True)
    refused(
        zipped(tmp_path / "in" / "z.zip", GOOD, EVIL[what]),
        tmp_path / "in" / "here" / "out",
        "z.zip is not unpacked, since",
    )


@pytest.mark.parametrize(
    "name,data,kind,link",
    [
        ("../a.png", b"x", tarfile.REGTYPE, ""),
        ("/a.png", b"x", tarfile.REGTYPE, ""),
        ("a.png", b"", tarfile.SYMTYPE, "/etc/passwd"),
        ("a.png", b"", tarfile.LNKTYPE, "images/a.png"),
        ("a.png", b"", tarfile.CHRTYPE, ""),
        ("a.png", b"", tarfile.BLKTYPE, ""),
        ("a.png", b"", tarfile.FIFOTYPE, ""),
        ("a.png", bytes(60 << 20), tarfile.REGTYPE, ""),
    ],
)
def test_fault_22_a_tar_that_is_unsafe_writes_nothing(tmp_path, name, data, kind, link):
    (tmp_path / "in" / "here").mkdir(parents=True)
    refused(
        tarred(
            tmp_path / "in" / "t.tar.gz",
            ("images/a.png", b"pixels", tarfile.REGTYPE, ""),
            (name, data, kind, link),
        ),
        tmp_path / "in" / "here" / "out",
        "t.tar.gz is not unpacked, since",
    )


def test_fault_22_a_zip_whose_header_lies_about_its_size_is_damaged(tmp_path):
    (tmp_path / "in" / "here").mkdir(parents=True)
    path = zipped(tmp_path / "in" / "z.zip", ("a.png", bytes(5 << 20), None))
    raw = path.read_bytes()
    path.write_bytes(raw.replace((5 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    refused(path, tmp_path / "in" / "here" / "out", "cut short or damaged|not unpacked")


def test_fault_22_damaged_and_absent_archives(tmp_path):
    (tmp_path / "in" / "here").mkdir(parents=True)
    folder = tmp_path / "in" / "here" / "out"
    noise = np.random.default_rng(0).bytes(300_000)
    for path in (
        zipped(tmp_path / "in" / "z.zip", GOOD, ("b", noise, None)),
        tarred(tmp_path / "in" / "t.tar.gz", ("b", noise, tarfile.REGTYPE, "")),
        tarred(tmp_path / "in" / "t.tar", ("b", noise, tarfile.REGTYPE, ""), mode="w"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(path, folder, "cut short or damaged")
        if path.suffix != ".tar":
            path.write_bytes(whole[:1000] + b"\0" * 50 + whole[1050:])
            refused(path, folder, "cut short or damaged")
    (tmp_path / "in" / "n.zip").write_bytes(b"nothing")
    refused(tmp_path / "in" / "n.zip", folder, "no archive")
    refused(tmp_path / "in" / "absent.zip", folder, "there is no archive absent.zip")
    refused(
        zipped(tmp_path / "in" / "c.zip", ("a", b"x", None), ("a/b", b"x", None)),
        folder,
        "cut short or damaged",
    )


def test_fault_22_an_encrypted_zip_is_refused(tmp_path):
    (tmp_path / "in" / "here").mkdir(parents=True)
    path = zipped(tmp_path / "in" / "z.zip", GOOD)
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    refused(path, tmp_path / "in" / "here" / "out", "is encrypted")


def test_safe_archives_are_unpacked_whole(tmp_path):
    members = [("images/a.png", b"1"), ("images/deep/b.png", b"2"), ("./c.txt", b"3")]
    archives = [
        zipped(
            tmp_path / "z.zip",
            ("images/", b"", None),
            *((n, d, stat.S_IFREG | 0o600) for n, d in members),
        ),
        tarred(
            tmp_path / "t.tgz",
            ("images", b"", tarfile.DIRTYPE, ""),
            *((n, d, tarfile.REGTYPE, "") for n, d in members),
        ),
    ]
    for a in archives:
        out = tmp_path / f"{a.stem}-out"
        assert unpack(a, out) == 3 and {
            str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()
        } == {"images/a.png": b"1", "images/deep/b.png": b"2", "c.txt": b"3"}
        with pytest.raises(OctomedError, match="is not empty"):
            unpack(a, out)
    (tmp_path / "empty").mkdir()
    assert unpack(archives[0], tmp_path / "empty") == 3
    big = zipped(tmp_path / "big.zip", ("zeros", bytes(60 << 20), None))
    assert (
        unpack(big, tmp_path / "big", ratio=2000) == 1
        and (tmp_path / "big" / "zeros").stat().st_size == 60 << 20
    )
