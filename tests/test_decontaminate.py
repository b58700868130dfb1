import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from octomed import decontaminate as module
from octomed.core import OctomedError, shipped
from octomed.decontaminate import decontaminate, file_twins, pairs, question_twins, twins, words
from octomed.images import open_image, pixel_hash
from octomed.questions import Question, load

DATA = os.environ.get("OCTOMED_DATA")
real = pytest.mark.skipif(not DATA, reason="OCTOMED_DATA is not set")
rows = lambda *stems: [{"question": s} for s in stems]

def plain(train, bench, n):
    "s1's rule as it is written there."
    import re
    normal = lambda t: re.sub(r"\s+", " ", t.lower().strip())
    grams = lambda t: [" ".join(w[i:i+n]) for w in [normal(t).split(" ")] for i in range(len(w) - n + 1)]
    seen = {g for b in bench for g in grams(b)}
    return [i for i, t in enumerate(train) if any(g in seen for g in grams(t))]

text = st.builds(" ".join, st.lists(st.sampled_from(["a", "b", "A,", "a,", "é", "drug?"]), max_size=40))
@settings(max_examples=120, deadline=None)
@given(st.lists(text, max_size=8), st.lists(text, max_size=8), st.sampled_from([8, 13, 16]))
def test_equals_the_plain_rule(train, bench, n):
    assert decontaminate(rows(*train), rows(*bench), n).flagged == plain(train, bench, n)

@pytest.mark.parametrize("n", [8, 13, 16])
def test_equals_the_plain_rule_on_planted_overlaps(n):
    rng = np.random.default_rng(n)
    vocab = [f"w{i}" for i in range(50)]
    bench = [" ".join(rng.choice(vocab, rng.integers(1, 60))) for _ in range(50)]
    train = [" ".join(rng.choice(vocab, rng.integers(1, 60))) for _ in range(200)]
    for i in range(0, 200, 3):
        cut = bench[i % 50].split()[:int(rng.integers(n - 2, n + 3))]
        train[i] = train[i] + "  " + " ".join(cut).upper() + "\t" + train[i]
    want = plain(train, bench, n)
    report = decontaminate(rows(*train), rows(*bench), n)
    assert report.flagged == want and 0 < len(want) < 67
    for m in report.matches:
        assert m.text in " ".join(words(train[m.train])) and m.text in " ".join(words(bench[m.bench])) and len(m.text.split()) >= n
        assert n/len(bench[m.bench].split()) <= m.share <= 1

def test_a_hash_collision_never_flags(monkeypatch):
    grams_of = module.grams_of
    def colliding(*a, **k):
        g = grams_of(*a, **k); g.hashes[:] = 7
        return g
    monkeypatch.setattr(module, "grams_of", colliding)
    assert decontaminate(rows("a b c d e", "b c d"), rows("e d c b a", "a b c"), 3).flagged == [0]

def test_fault_24_short_questions_are_counted_as_blind():
    r = decontaminate(rows("one two three", "one two three four"), rows("one two three", "one two three four"), 4)
    assert (r.flagged, r.blind, r.blind_train, sorted(r.exact)) == ([1], [0], [0], [0, 1])

@pytest.mark.parametrize("variant", ["WHICH ORGAN MAKES URINE?", "  Which organ\n makes\turine? ", "Ｗhich organ makes urine?", "Which organ makes\u00a0urine?"])
def test_fault_24_variants_are_found_by_the_exact_rule(variant):
    assert list(decontaminate(rows(variant), rows("Which organ makes urine?"), 16).exact) == [0]

def test_fault_24_ligature_hides_from_the_ngram_rule_only():
    stem = "in this long question of nineteen words the ﬁrst sign is a rash with fever and neck stiffness today"
    r = decontaminate(rows(stem), rows(stem.replace("ﬁ", "fi")), 16)
    assert r.flagged == [] and list(r.exact) == [0]

def test_fault_24_template_overlap_is_reported_as_boilerplate_not_as_exact():
    stock = "Which of the following is the most likely diagnosis in this patient given the findings on examination above today?"
    bench = [f"{' '.join(f'case{i}word{j}' for j in range(40))} {stock}" for i in range(5)]
    r = decontaminate(rows(f"Another story altogether. {stock}", bench[2]), rows(*bench), 16)
    assert r.flagged == [0, 1] and list(r.exact) == [1]
    stock_match, leak = r.matches
    assert stock_match.likely_boilerplate and stock_match.bench_rows == 5 and stock_match.text == stock.lower()
    assert not leak.likely_boilerplate and leak.bench == 2 and leak.share == 1

def test_options_tell_an_item_from_a_stock_stem():
    bench = [{"question": "Which is true?", "options": {"A": "Salt", "B": "Iron"}}]
    train = [{"question": "which is TRUE?", "options": ["iron", "salt"]}, {"question": "Which is true?", "options": ["one", "two"]}]
    r = decontaminate(train, bench)
    assert list(r.exact) == [0, 1] and list(r.exact_options) == [0]

def test_the_same_stem_under_another_picture_is_another_question():
    def q(image, split): return Question("What is shown?", ("a", "b"), "A", "x", split, "multimodal_classification", (image,))
    train, test = [q("p1", "train"), q("p2", "train")], [q("p2", "test")]
    assert list(decontaminate(train, test).exact) == [1]
    assert question_twins(train, test).train == (1,) and question_twins(train, test).test == (0,)

def test_fault_25_rows_are_conserved_and_the_order_is_kept():
    train = rows(*(f"row {i}" for i in range(10)), "row 3")
    r = decontaminate(train, rows("ROW 3", "row 7"))
    kept, dropped = r.split(train)
    assert len(kept) + len(dropped) == 11 and kept == [t for t in train if t["question"] not in ("row 3", "row 7")]
    assert {why for _, why in dropped} == {"same stem and options as a benchmark item"}
    with pytest.raises(OctomedError, match="about 11 rows and 10"): r.split(train[:-1])

def test_empty_sides_and_wrong_n():
    assert decontaminate([], rows("a")).rows == 0 and decontaminate(rows("a b"), []).flagged == []
    assert decontaminate(rows("", " "), rows(""), 1).flagged == []
    with pytest.raises(OctomedError, match="at least 1"): decontaminate([], [], 0)

def test_pairs_reads_files_and_sources(tmp_path):
    f = tmp_path/"mine.jsonl"
    f.write_text(json.dumps({"question": "Which organ makes urine", "options": ["Kidney", "Liver", "Lung", "Spleen"]}) + "\n" + json.dumps({"question": "Other?"}) + "\n")
    (row,) = pairs([str(f)], ["medmcqa:dev"], folder=shipped("examples"))["pairs"]
    assert row == {"train": str(f), "bench": "medmcqa:dev", "n": 16, "rows": 2, "flagged": 0, "exact": 1, "blind": 3}

def test_pairs_says_what_is_wrong(tmp_path):
    f = tmp_path/"mine.jsonl"
    for bad, message in ((b'{"question": "a"}\nno json\n', "line 2 of mine.jsonl"), (b'{"stem": "a"}\n', "no text `question`"), (b'{"question": "a", "options": 3}\n', "options"), (b'[1]\n', "no text")):
        f.write_bytes(bad)
        with pytest.raises(OctomedError, match=message): pairs([str(f)], [str(f)])
    f.write_text('{"question": "a"}')
    with pytest.raises(OctomedError, match="neither a JSONL file nor a registered source"): pairs(["nowhere.jsonl"], [str(f)])

def test_fault_21_twins_by_pixels_see_through_the_encoding(tmp_path):
    from PIL import Image
    img = Image.effect_noise((20, 30), 50).convert("RGB")
    img.save(tmp_path/"a.png"); img.save(tmp_path/"b.bmp")
    assert file_twins([tmp_path/"a.png"], [tmp_path/"b.bmp"]).train == ()
    assert file_twins([tmp_path/"a.png"], [tmp_path/"b.bmp"], key=lambda p: pixel_hash(open_image(p))).train == (0,)
    assert twins("abca", "xca").train == (0, 2, 3) and twins("abca", "xca").test == (1, 2)

@real
def test_real_medqa_equals_the_plain_rule():
    train, bench = load("medqa:train"), load("medqa:test")
    for n in (8, 16):
        assert decontaminate(train, bench, n).flagged == plain([q.stem for q in train], [q.stem for q in bench], n)

@real
def test_real_brain_tumor_twins():
    files = [sorted((Path(DATA)/"brain_tumor"/f).glob("*/*.jpg")) for f in ("Training", "Testing")]
    both = file_twins(*files)
    assert (len(files[0]), len(files[1]), len(both.train), len(both.test)) == (2_870, 394, 83, 88)

@real
def test_real_brain_tumor_twins_by_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    files = [sorted((Path(DATA)/"brain_tumor"/f).glob("*/*.jpg")) for f in ("Training", "Testing")]
    both = file_twins(*files, key=lambda p: pixel_hash(open_image(p)))
    assert (len(both.train), len(both.test)) == (244, 251)
    assert sum(files[1][i].parent.name == "no_tumor" for i in both.test) == 105
