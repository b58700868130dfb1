import base64
import gzip
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octomed.core.paths import OctomedError, shipped
from octomed.data import decontaminate as module
from octomed.data import decontaminate_files as files_module
from octomed.data.decontaminate import (
    RULES,
    Index,
    compare_rules,
    decontaminate,
    flag_by_ratio,
    normalise,
    split_words,
)
from octomed.data.decontaminate_files import (
    count_pairs,
    cut_pieces,
    decontaminate_sets,
    parse_rows,
    split_lines,
)
from octomed.data.decontaminate_report import count_drops, list_drops, render_page, write_page
from octomed.data.images import open_image, pixel_hash
from octomed.data.questions import Question
from octomed.data.sources import load
from octomed.data.twins import find_file_twins, find_question_twins, find_twins

DATA = os.environ.get("OCTOMED_DATA")
real = pytest.mark.skipif(not DATA, reason="OCTOMED_DATA is not set")


def rows(*stems):
    return [{"question": s} for s in stems]


def grams_of(stem, n):
    w = re.sub(r"\s+", " ", stem.lower().strip()).split(" ")
    return {" ".join(w[i : i + n]) for i in range(len(w) - n + 1)}


def plain(train, bench, n):
    "s1's rule as it is written there."
    seen = set().union(*(grams_of(b, n) for b in bench))
    return [i for i, t in enumerate(train) if grams_of(t, n) & seen]


text = st.builds(
    " ".join, st.lists(st.sampled_from(["a", "b", "A,", "a,", "é", "drug?"]), max_size=40)
)


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
        cut = bench[i % 50].split()[: int(rng.integers(n - 2, n + 3))]
        train[i] = train[i] + "  " + " ".join(cut).upper() + "\t" + train[i]
    expected = plain(train, bench, n)
    report = decontaminate(rows(*train), rows(*bench), n)
    assert report.flagged == expected and 0 < len(expected) < 67
    for m in report.matches:
        assert (
            m.text in " ".join(split_words(train[m.train]))
            and m.text in " ".join(split_words(bench[m.bench]))
            and len(m.text.split()) >= n
        )
        assert n / len(bench[m.bench].split()) <= m.share <= 1


@settings(max_examples=200, deadline=None)
@given(st.lists(text, max_size=4), st.lists(text, max_size=4), st.integers(1, 17))
def test_equals_the_plain_rule_for_any_n(train, bench, n):
    r = decontaminate(rows(*train), rows(*bench), n)

    def grams(t):
        return {" ".join(w[i : i + n]) for w in [t.lower().split()] for i in range(len(w) - n + 1)}

    seen = set().union(*map(grams, bench))
    assert r.flagged == [i for i, t in enumerate(train) if grams(t) & seen]
    assert sorted(r.exact) == [
        i for i, t in enumerate(train) if normalise(t) and normalise(t) in map(normalise, bench)
    ]
    assert (r.blind, r.blind_train) == (
        [i for i, b in enumerate(bench) if len(b.split()) < n],
        sum(len(t.split()) < n for t in train),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(text, min_size=1, max_size=6),
    st.lists(text, min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_a_match_is_the_item_that_shares_most(train, bench, n):
    def grams(t):
        return [t.lower().split()[i : i + n] for i in range(len(t.split()) - n + 1)]

    for m in decontaminate(rows(*train), rows(*bench), n).matches:
        mine = grams(train[m.train])
        counts = [sum(g in grams(b) for g in mine) for b in bench]
        assert (
            m.bench == counts.index(max(counts))
            and m.bench_rows == sum(map(bool, counts))
            and m.question == train[m.train]
        )
        item = bench[m.bench].split()
        covered = {
            k for i, g in enumerate(grams(bench[m.bench])) if g in mine for k in range(i, i + n)
        }
        assert m.share == len(covered) / len(item) and m.likely_boilerplate == (m.share < 0.5)


odd = st.sampled_from(
    [
        "a",
        "b",
        "A",
        "ﬁ",
        "fi",
        "FI",
        "\u212a",
        "k",
        "ß",
        "ss",
        "\u00b4",
        "\u0301",
        "e\u0301",
        "é",
        "\uff57",
        "w",
        "\u0130",
        "i\u0307",
        "x\u00a0y",
        "\u1e9e",
        "\u03c2",
        "\u03a3",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(odd, max_size=9), min_size=1, max_size=4), st.integers(1, 6), st.data())
def test_fault_24_the_exact_rule_is_equality_of_normal_forms_whatever_the_letters(items, n, data):
    bench = [" ".join(i) for i in items]
    variants = {
        "a": "A",
        "fi": "ﬁ",
        "k": "\u212a",
        "ss": "ß",
        "é": "e\u0301",
        "w": "\uff57",
        "A": "a",
        "ﬁ": "FI",
        "\u212a": "k",
    }
    train = [
        " ".join(variants.get(w, w) if data.draw(st.booleans()) else w for w in i) for i in items
    ] + bench
    r = decontaminate(rows(*train), rows(*bench), n)
    keys = [normalise(b) for b in bench]
    assert r.exact == {
        i: keys.index(normalise(t))
        for i, t in enumerate(train)
        if normalise(t) and normalise(t) in keys
    }
    assert r.flagged == [
        i
        for i, t in enumerate(train)
        if any(
            set(zip(*(split_words(t)[k:] for k in range(n)), strict=False))
            & set(zip(*(split_words(b)[k:] for k in range(n)), strict=False))
            for b in bench
        )
    ]


def test_an_ascii_row_equals_an_item_in_other_letters():
    stem = " ".join(f"word{i}" for i in range(30))
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in stem)
    r = decontaminate(rows(stem, stem + " more"), rows(wide), 16)
    assert list(r.exact) == [0] and r.flagged == []


def test_fault_24_short_questions_are_counted_as_blind():
    r = decontaminate(
        rows("one two three", "one two three four"), rows("one two three", "one two three four"), 4
    )
    assert (r.flagged, r.blind, r.blind_train, sorted(r.exact)) == ([1], [0], 1, [0, 1])


@pytest.mark.parametrize(
    "variant",
    [
        "WHICH ORGAN MAKES URINE?",
        "  Which organ\n makes\turine? ",
        "\uff37hich organ makes urine?",  # full-width W
        "Which organ makes\u00a0urine?",
    ],
)
def test_fault_24_variants_are_found_by_the_exact_rule(variant):
    assert list(decontaminate(rows(variant), rows("Which organ makes urine?"), 16).exact) == [0]


def test_fault_24_ligature_hides_from_the_ngram_rule_only():
    stem = (
        "in this long question of nineteen words the \ufb01rst sign is a rash "
        "with fever and neck stiffness today"
    )
    r = decontaminate(rows(stem), rows(stem.replace("\ufb01", "fi")), 16)
    assert r.flagged == [] and list(r.exact) == [0]


def test_fault_24_template_overlap_is_reported_as_boilerplate_not_as_exact():
    stock = (
        "Which of the following is the most likely diagnosis in this patient "
        "given the findings on examination above today?"
    )
    bench = [f"{' '.join(f'case{i}word{j}' for j in range(40))} {stock}" for i in range(5)]
    r = decontaminate(rows(f"Another story altogether. {stock}", bench[2]), rows(*bench), 16)
    assert r.flagged == [0, 1] and list(r.exact) == [1]
    stock_match, leak = r.matches
    assert (
        stock_match.likely_boilerplate
        and stock_match.bench_rows == 5
        and stock_match.text == stock.lower()
    )
    assert not leak.likely_boilerplate and leak.bench == 2 and leak.share == 1


def test_options_distinguish_an_item_from_a_stock_stem():
    bench = [{"question": "Which is true?", "options": {"A": "Salt", "B": "Iron"}}]
    train = [
        {"question": "which is TRUE?", "options": ["iron", "salt"]},
        {"question": "Which is true?", "options": ["one", "two"]},
    ]
    r = decontaminate(train, bench)
    assert list(r.exact) == [0, 1] and list(r.exact_options) == [0]


def test_the_same_stem_under_another_picture_is_another_question():
    def q(image, split):
        return Question(
            "What is shown?", ("a", "b"), "A", "x", split, "multimodal_classification", (image,)
        )

    train, test = [q("p1", "train"), q("p2", "train")], [q("p2", "test")]
    assert list(decontaminate(train, test).exact) == [1]
    assert find_question_twins(train, test).train == (1,) and find_question_twins(
        train, test
    ).test == (0,)


def test_fault_25_rows_are_conserved_and_the_order_is_kept():
    train = rows(*(f"row {i}" for i in range(10)), "row 3")
    r = decontaminate(train, rows("ROW 3", "row 7"))
    kept, dropped = r.split(train)
    assert len(kept) + len(dropped) == 11 and kept == [
        t for t in train if t["question"] not in ("row 3", "row 7")
    ]
    assert {why for _, why in dropped} == {"same stem and options as a benchmark item"}
    with pytest.raises(OctomedError, match="about 11 rows and 10"):
        r.split(train[:-1])


def test_empty_sides_and_wrong_n():
    assert decontaminate([], rows("a")).rows == 0 and decontaminate(rows("a b"), []).flagged == []
    assert decontaminate(rows("", " "), rows(""), 1).flagged == []
    with pytest.raises(OctomedError, match="at least 1"):
        decontaminate([], [], 0)


def test_pairs_reads_files_and_sources(tmp_path):
    f = tmp_path / "mine.jsonl"
    f.write_text(
        json.dumps(
            {
                "question": "Which organ makes urine",
                "options": ["Kidney", "Liver", "Lung", "Spleen"],
            }
        )
        + "\n"
        + json.dumps({"question": "Other?"})
        + "\n"
    )
    by_pair = decontaminate_sets([str(f)], ["medmcqa:dev"], folder=shipped("examples"))
    (row,) = count_pairs(by_pair)["pairs"]
    assert row == {
        "train": str(f),
        "bench": "medmcqa:dev",
        "n": 16,
        "rows": 2,
        "flagged": 0,
        "exact": 1,
        "blind": 3,
    }


def test_reports_say_what_is_wrong(tmp_path):
    f = tmp_path / "mine.jsonl"
    for bad, message in (
        (b'{"question": "a"}\nno json\n', "line 2 of mine.jsonl"),
        (b'{"stem": "a"}\n', "no text `question`"),
        (b'{"question": "a", "options": 3}\n', "options"),
        (b"[1]\n", "no text"),
    ):
        f.write_bytes(bad)
        with pytest.raises(OctomedError, match=message):
            decontaminate_sets([str(f)], [str(f)])
    f.write_text('{"question": "a"}')
    with pytest.raises(OctomedError, match="neither a JSONL file nor a registered source"):
        decontaminate_sets(["nowhere.jsonl"], [str(f)])


def test_a_gz_that_is_cut_short_or_none_is_named(tmp_path):
    whole = gzip.compress(b'{"question": "a"}\n' * 500)
    for data in (whole[:-6], whole[:20] + bytes(30), b"plain text"):
        (tmp_path / "t.jsonl.gz").write_bytes(data)
        with pytest.raises(OctomedError, match=r"t\.jsonl\.gz is no whole gzip file"):
            decontaminate_sets([str(tmp_path / "t.jsonl.gz")], [str(tmp_path / "t.jsonl.gz")])


def jsonl(path, items, packed=False):
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in items).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return str(path)


def corpus(n=400):
    rng = np.random.default_rng(5)
    bench = rows(
        *(
            " ".join(rng.choice([f"w{i}" for i in range(300)], rng.integers(1, 40)))
            for _ in range(60)
        )
    )
    train = rows(
        *(
            " ".join(rng.choice([f"w{i}" for i in range(300)], rng.integers(1, 30)))
            for _ in range(n)
        )
    )
    for i in range(0, n, 7):
        train[i]["question"] += " " + bench[i % 60]["question"].upper()
    for i in range(3, n, 50):
        train[i] = {"question": "  " + bench[i % 60]["question"], "options": ["a", "b"]}
    return train, bench


@pytest.mark.parametrize("packed", [False, True])
def test_files_in_pieces_and_processes_equal_memory(tmp_path, monkeypatch, packed):
    train, bench = corpus()
    t, b = (
        jsonl(tmp_path / ("t.jsonl" + ".gz" * packed), train, packed),
        jsonl(tmp_path / "b.jsonl", bench),
    )
    expected = decontaminate(train, bench, 8)
    monkeypatch.setattr(files_module, "LARGE", 1)
    monkeypatch.setattr(files_module.cut_pieces, "__defaults__", (700,))
    assert len(list(cut_pieces(Path(t)))) > 20
    for workers in (1, 2):
        assert decontaminate_sets([t], [b], 8, workers=workers)[t, b] == expected
    assert len(expected.flagged) > 40 and len(expected.exact) >= 8


@pytest.mark.parametrize("size", [1, 40, 1 << 20])
def test_pieces_hold_whole_lines_and_count_them(tmp_path, size):
    data = (
        b'\xef\xbb\xbf{"question": "one"}\r\n\n{"question": "t\\u00fcwo"}\n   \n'
        b'{"question": "three"}'
    )
    (tmp_path / "x.jsonl").write_bytes(data)
    results = list(cut_pieces(tmp_path / "x.jsonl", size))
    assert b"".join(p for _, p, _ in results) == data[3:] and results[-1][2] == len(data)
    assert [first for first, _, _ in results] == [
        1 + b"".join(p for _, p, _ in results[:i]).count(b"\n") for i in range(len(results))
    ]
    read = [
        (n, r["question"])
        for first, p, _ in results
        for n, r in parse_rows(split_lines(first, p), "x")
    ]
    assert read == [(0, "one"), (2, "tüwo"), (4, "three")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(files_module, "LARGE", 1)
    monkeypatch.setattr(files_module.cut_pieces, "__defaults__", (900,))
    train, bench = corpus(200)
    b, t = jsonl(tmp_path / "b.jsonl", bench), tmp_path / "t.jsonl"
    lines = [json.dumps(r).encode() for r in train]
    for bad, message in (
        (b'{"question": "a"', "line 151 of t.jsonl is not JSON"),
        (b"\xff", "line 151 of t.jsonl is not JSON"),
        (b"[" * 100_000, "line 151 of t.jsonl is not JSON"),
        (b"null", "line 151 of t.jsonl has no text"),
        (b'{"question": null}', "line 151 of t.jsonl has no text"),
        (b'{"question": "a", "options": "b"}', "line 151 of t.jsonl has options that are neither"),
    ):
        t.write_bytes(b"\n".join([*lines[:150], bad, *lines[150:180], b"worse"]))
        with pytest.raises(OctomedError, match=message):
            decontaminate_sets([str(t)], [b], workers=workers)


def test_what_only_the_standard_parser_reads_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"question": "is it \\ud800 here", "x": NaN}\n')
    r = decontaminate_sets(
        [str(tmp_path / "t.jsonl")], [jsonl(tmp_path / "b.jsonl", rows("no"))], 2
    )
    assert [x.rows for x in r.values()] == [1]
    same = decontaminate_sets([str(tmp_path / "t.jsonl")], [str(tmp_path / "t.jsonl")], 2)
    assert write_page(same, tmp_path / "x.html").read_text().count("is it ? here") == 2


def test_fault_25_a_lost_or_doubled_row_is_refused(tmp_path, monkeypatch):
    train, bench = corpus(60)
    t, b = jsonl(tmp_path / "t.jsonl", train), jsonl(tmp_path / "b.jsonl", bench)
    honest = module.look_up_rows

    def losing(index, pairs):
        part = honest(index, pairs)
        part.rows -= 1
        part.clean -= 1
        return part

    def doubling(index, pairs):
        part = honest(index, pairs)
        part.findings.append(part.findings[0])
        part.rows += 1
        return part

    for broken in (losing, doubling):
        monkeypatch.setattr(module, "look_up_rows", broken)
        monkeypatch.setattr(files_module, "look_up_rows", broken)
        with pytest.raises(OctomedError, match="lost or doubled"):
            decontaminate_sets([t], [b], 8)
    with pytest.raises(OctomedError, match="lost or doubled"):
        decontaminate(train, bench, 8)


def test_fault_25_the_funnel_adds_up_and_gives_one_reason_a_row(tmp_path):
    train, bench = corpus()
    t, b, c = (
        jsonl(tmp_path / "t.jsonl", train),
        jsonl(tmp_path / "b.jsonl", bench[:30]),
        jsonl(tmp_path / "c.jsonl", bench[20:]),
    )
    by_pair = decontaminate_sets([t], [b, c], 8)
    f = count_drops(by_pair.values())
    assert f["rows"] == 400 == sum(v for k, v in f.items() if k != "rows") and f[
        "kept"
    ] == 400 - len(set().union(*(r.drop for r in by_pair.values())))
    assert set(f) == {
        "rows",
        "kept",
        "same stem as a benchmark item",
        "shares 8 words in a row with a benchmark item",
    }
    listed = list(list_drops(by_pair))
    assert (
        len(listed) == sum(len(r.drop) for r in by_pair.values())
        and len({d["line"] for d in listed}) == 400 - f["kept"]
    )
    for d in listed:
        assert (
            d["text"] in " ".join(split_words(train[d["line"] - 1]["question"]))
            and 0 < d["share"] <= 1
        )


def test_the_page_shows_each_drop_and_runs_nothing(tmp_path):
    stock = "Which of the following is the most likely diagnosis in this patient?"
    bench = rows(
        *(f"{' '.join(f'case{i}word{j}' for j in range(40))} {stock}" for i in range(3)),
        "short one?",
    )
    train = rows(
        f"<script>alert(1)</script> & more. {stock}", bench[2]["question"], "SHORT one?", "innocent"
    )
    by_pair = {("train.jsonl", "bench.jsonl"): decontaminate(train, bench, 8)}
    html = write_page(by_pair, tmp_path / "x.html").read_text()
    assert (
        "<script>alert" not in html
        and "&lt;script&gt;" in html
        and "http" not in html
        and "src=" not in html
    )
    assert (
        html.count("<tr class=stock>") == 1
        and html.count("<tr class=leak>") == 2
        and html.count(f"<mark>{stock}</mark>") == 2
        and "<mark>SHORT one?</mark>" not in html
    )
    assert re.findall(r'<td class="n[^"]*">(\d+)</td>', html.split("</tbody>")[0]) == [
        "4",
        "2",
        "0",
        "1",
        "1",
        "1",
        "4",
        "1",
    ]
    cut = render_page(by_pair, most=1)
    assert cut.count("<tr class=leak>") == 1 and "The first 1 of 3" in cut
    assert "Nothing is dropped" in render_page({("a", "b"): decontaminate(rows("x"), rows("y"))})


def test_rules_of_other_projects_are_compared_with_ours():
    item = (
        "An old man coughs blood every single morning since the spring "
        "and has lost much weight; what is it?"
    )
    train = rows(
        item,
        item.replace(";", ",").replace("single", ""),
        item[:-5] + "now?",
        "something else entirely",
    )
    assert flag_by_ratio(train, rows(item)) == [0, 1, 2] and flag_by_ratio(
        train, rows(item), 100
    ) == [0]
    table = {r["rule"]: r for r in compare_rules(train, rows(item))}
    assert list(table) == list(RULES) and table["16 words"] == {
        "rule": "16 words",
        "flagged": 2,
        "common": 2,
        "only": 0,
        "missed": 0,
    }
    assert table["ratio ≥ 95"] == {
        "rule": "ratio ≥ 95",
        "flagged": 3,
        "common": 2,
        "only": 1,
        "missed": 0,
    }
    commas = rows(item.replace("every", ", every").replace("since", "since,"))
    assert RULES["13 words"](commas, rows(item)) == [] and RULES["13 words, no punctuation"](
        commas, rows(item)
    ) == [0]


def test_the_command_writes_page_and_drops(tmp_path, capsys):
    from octomed.run.cli import main

    train, bench = corpus()
    t, b = jsonl(tmp_path / "t.jsonl.gz", train, packed=True), jsonl(tmp_path / "b.jsonl", bench)
    assert (
        main(
            [
                "decontaminate",
                t,
                "--against",
                b,
                "--n",
                "8",
                "--json",
                "--html",
                str(tmp_path / "r.html"),
                "--drops",
                str(tmp_path / "d.jsonl"),
            ]
        )
        == 0
    )
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    expected = decontaminate(train, bench, 8)
    assert pair == {
        "train": t,
        "bench": b,
        "n": 8,
        "rows": 400,
        "flagged": len(expected.flagged),
        "exact": len(expected.exact),
        "blind": len(expected.blind),
    }
    lines = (tmp_path / "d.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] - 1 for line in lines] == sorted(expected.drop)
    assert f"{len(expected.drop):,} dropped" in (tmp_path / "r.html").read_text()
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"question": "a"\n')
    assert main(["decontaminate", str(tmp_path / "bad.jsonl"), "--against", b]) == 1
    assert (
        capsys.readouterr().err == "octomed: line 2 of bad.jsonl is not JSON: mend or remove it\n"
    )


def test_an_index_serves_several_benchmarks_at_once():
    train, bench = corpus()
    index = Index({"first": bench[:25], "second": bench[25:]}, 8)
    both = module.report_parts(index, [module.look_up_rows(index, enumerate(train))])
    assert both == {
        "first": decontaminate(train, bench[:25], 8),
        "second": decontaminate(train, bench[25:], 8),
    }


def test_fault_21_twins_by_pixels_see_through_the_encoding(tmp_path):
    from PIL import Image

    img = Image.effect_noise((20, 30), 50).convert("RGB")
    img.save(tmp_path / "a.png")
    img.save(tmp_path / "b.bmp")
    assert find_file_twins([tmp_path / "a.png"], [tmp_path / "b.bmp"]).train == ()
    assert find_file_twins(
        [tmp_path / "a.png"], [tmp_path / "b.bmp"], key=lambda p: pixel_hash(open_image(p))
    ).train == (0,)
    assert find_twins("abca", "xca").train == (0, 2, 3) and find_twins("abca", "xca").test == (1, 2)


# Time by repeats: the work is at most a constant times the text, whatever the text is.


def count_steps(train, bench, n):
    """Instructions of the interpreter in the module while rows are compared.

    Each touches at most n words or one place, so this bounds the visits of tokens."""
    steps = 0

    def count(frame, event, _):
        nonlocal steps
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        decontaminate(rows(*train), rows(*bench), n)
    finally:
        sys.settrace(before)
    return steps


unit = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)
periodic = st.builds(
    lambda parts: " ".join(" ".join(words * times) for words, times in parts),
    st.lists(st.tuples(unit, st.integers(1, 60)), max_size=3),
)
STEPS = 400  # for each word, at 4 visits a word


@settings(max_examples=60, deadline=None)
@given(
    st.lists(periodic, max_size=4),
    st.lists(periodic, max_size=4),
    st.integers(1, 20),
    st.sampled_from([1, 2, 8, 16]),
)
def test_fault_61_steps_are_at_most_a_constant_times_the_text(train, bench, copies, n):
    train, bench = train * copies, bench * copies
    words = sum(len(text.split()) + 1 for text in [*train, *bench])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VISITS", 4)
        assert count_steps(train, bench, n) <= STEPS * (words + 10)


def sparse(size):
    "One phrase many times over, always between other words."
    return " ".join(f"p1 p2 p3 p4 p5 p6 p7 p8 x{i}" for i in range(size))


REPEATS = {
    "one token": lambda size: (["say " + "the " * size], ["x " + "the " * size]),
    "a period of two": lambda size: (["a b " * size], ["b a " * size]),
    "one token in many rows": lambda size: (["0.0 " * 9] * size, ["0.0 " * 10] * size),
    "a phrase in many rows": lambda size: (
        [f"r{i} q1 q2 q3 q4 q5 q6 q7 q8 q9" for i in range(size)],
        [f"q1 q2 q3 q4 q5 q6 q7 q8 q9 i{i}" for i in range(size)],
    ),
    "short rows and a long item": lambda size: (["the " * 8] * size, ["the " * 8 * size]),
    "a phrase that an item repeats": lambda size: (
        ["p1 p2 p3 p4 p5 p6 p7 p8"] * size,
        [sparse(size)],
    ),
    "equal short stems": lambda size: (["What is shown?"] * size, ["what is shown?"] * size),
}


@pytest.mark.parametrize("name", REPEATS)
def test_fault_61_twice_the_text_takes_twice_the_steps(monkeypatch, name):
    monkeypatch.setattr(module, "VISITS", 4)
    small, large = (count_steps(*REPEATS[name](size), 8) for size in (150, 300))
    assert large <= 2.3 * small


def test_fault_61_repeated_words_are_matched_as_they_were():
    train = rows("looping output: " + "the " * 300, "a b " * 40 + "end")
    bench = rows("x " + "the " * 500, "b a " * 30, "the " * 8)
    report = decontaminate(train, bench, 8)
    assert [(m.bench, m.bench_rows) for m in report.matches] == [(0, 2), (1, 1)]
    assert report.matches[0].share == 500 / 501 and report.matches[1].share == 1
    assert report.matches[0].text == ("the " * 300).strip()


def test_a_phrase_of_very_many_items_is_counted_up_to_the_budget(monkeypatch):
    bench = rows(*(f"q1 q2 q3 q4 item{i}" for i in range(50)))
    monkeypatch.setattr(module, "VISITS", 3)
    (match,) = decontaminate(rows("q1 q2 q3 q4"), bench, 4).matches
    assert (match.bench, match.bench_rows) == (0, 12)


# Pictures, and stems without a word.

PICTURES = {
    "image": "{}.png",
    "images": ["{}.png"],
    "image_path": "{}.png",
    "image_paths": ["{}.png", "x.png"],
    "img": "{}.jpg",
    "img_path": "{}.jpg",
    "img_name": "{}.jpg",
    "Figure_path": "{}.jpg",
    "figure_path": "{}.jpg",
    "ImagePath": ["{}.png"],
    "picture": {"path": "{}.png"},
    "image_1": {"bytes": None, "path": "{}.png"},
    "question_image": {"url": "http://x/{}"},
    "image_url": "http://x/{}",
    "image_id": "{}",
    "pixel_values": [[0.1, "{}"]],
}


def fill(value, name):
    if isinstance(value, str):
        return value.replace("{}", name)
    if isinstance(value, list):
        return [fill(item, name) for item in value]
    return {k: fill(v, name) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("key", PICTURES)
def test_fault_50_pictures_under_every_usual_key_tell_questions_apart(key):
    def q(name):
        return {"question": "What modality is shown?", key: fill(PICTURES[key], name)}

    report = decontaminate([q("one"), q("two")], [q("two")])
    assert list(report.exact) == [1] and report.picture_keys == ()


@pytest.mark.parametrize("nothing", [None, "", [], float("nan"), {"bytes": None, "path": None}])
def test_fault_50_no_picture_is_no_picture_whatever_it_is_written_as(nothing):
    train = [{"question": "Why?", "image": nothing}, {"question": "Why?", "image": "a.png"}]
    assert list(decontaminate(train, rows("why?")).exact) == [0]


def test_fault_50_one_picture_in_several_forms_is_one():
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
    text = base64.b64encode(png).decode()
    forms = [
        {"image": png},
        {"image": {"bytes": png, "path": "elsewhere.png"}},
        {"images": [text], "image_path": "other.png", "image_id": 4},
        {"img": {"url": f"data:image/png;base64,{text}"}},
        {"jpg": png},
        {"scan": text},
    ]
    train = [{"question": "Why?", **form} for form in forms]
    assert len(decontaminate(train, train[:1]).exact) == len(forms)


def test_fault_50_an_unknown_key_that_looks_like_a_picture_is_reported_once(tmp_path, capsys):
    from octomed.run.cli import main

    train = [{"question": "Why?", "scan": f"ct/{i}.png", "note": "see x"} for i in range(5)]
    bench = [{"question": "Why?", "mri_slice": {"bytes": None, "path": "b.dcm"}}]
    t, b = jsonl(tmp_path / "t.jsonl", train), jsonl(tmp_path / "b.jsonl", bench)
    assert main(["decontaminate", t, "--against", b, b, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pairs"][0]["exact"] == 0
    assert err.count("`scan`") == err.count("`mri_slice`") == 1 and "note" not in err


def test_fault_50_a_value_that_is_no_picture_is_refused_by_key(tmp_path):
    for value in (5, True, 1.5):
        t = jsonl(tmp_path / "t.jsonl", [{"question": "Why?", "images": value}])
        with pytest.raises(OctomedError, match=r"line 1 of t\.jsonl has `images`"):
            decontaminate_sets([t], [t])


def test_fault_45_empty_questions_match_nothing_and_are_counted(tmp_path, capsys):
    from octomed.run.cli import main

    report = decontaminate(rows("", " \t", "real one"), rows("", "real one"))
    assert (list(report.exact), report.empty_train, report.empty) == ([2], 2, 1)
    t = jsonl(tmp_path / "t.jsonl", rows("", " ", "real"))
    assert main(["decontaminate", t, "--against", t]) == 0
    out, err = capsys.readouterr()
    table = dict(zip(out.splitlines()[0].split(), out.splitlines()[1].split(), strict=True))
    assert table["exact"] == "1" and table["kept"] == "2" and table["empty"] == "4"
    assert "2 rows have an empty question" in err and err.count("\n") == 1


def test_fault_45_missing_options_are_no_texts():
    train = [{"question": "Why?", "options": {"A": "x", "B": None}}]
    for options in ({"A": "x"}, ["x", float("nan")], "['x']", [{"key": "A", "value": "x"}]):
        report = decontaminate(train, [{"question": "Why?", "options": options}])
        assert list(report.exact_options) == [0]
    assert not decontaminate(train, [{"question": "Why?", "options": ["x", "None"]}]).exact_options


# Punctuation, and the table of a terminal.


def test_no_punctuation_compares_letters_and_digits_only(tmp_path, capsys):
    from octomed.run.cli import main

    stem = "A man, 45-years old; coughs: blood?"
    train = rows("a man 45 YEARS old coughs blood", "A man... 45 years old (coughs) well")
    assert decontaminate(train, rows(stem), 5).drop == set()
    report = decontaminate(train, rows(stem), 5, punctuation=False)
    assert report.flagged == [0, 1] and list(report.exact) == [0]
    t, b = jsonl(tmp_path / "t.jsonl", train), jsonl(tmp_path / "b.jsonl", rows(stem))
    page = str(tmp_path / "x.html")
    command = ["decontaminate", t, "--against", b, "--n", "5", "--no-punctuation", "--html", page]
    assert main(command) == 0
    assert "no punctuation" in capsys.readouterr().out
    html = Path(page).read_text()
    assert "<mark>A man... 45 years old (coughs)</mark> well" in html and "no punctuation" in html


def test_the_table_says_what_each_column_counts(tmp_path, capsys):
    from octomed.run.cli import main

    train, bench = corpus()
    t, b = jsonl(tmp_path / "t.jsonl", train), jsonl(tmp_path / "b.jsonl", bench)
    assert main(["decontaminate", t, "--against", b, "--n", "8"]) == 0
    head, row, *legend = capsys.readouterr().out.splitlines()
    counts = dict(zip(head.split(), row.split(), strict=True))
    report = decontaminate(train, bench, 8)
    assert counts["kept"] == str(400 - len(report.drop)) and counts["items"] == "60"
    assert (counts["train"], counts["bench"]) == (t, b)
    explained = [line.split()[0] for line in legend if line]
    assert explained[:-1] == [name for name in counts if name not in ("train", "bench", "n")]
    assert any("items under 8 words" in line for line in legend)


# Files of other formats.


def test_every_format_gives_the_same_reports(tmp_path, monkeypatch):
    train, bench = corpus(120)
    b = jsonl(tmp_path / "b.jsonl", bench)
    plain = [{"question": row["question"]} for row in train]
    expected = decontaminate(plain, bench, 8)
    table = pd.DataFrame(plain)
    text = "".join(json.dumps(row) + "\n" for row in plain)
    (tmp_path / "t.json").write_text(json.dumps(plain, indent=1))
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t16.jsonl").write_text(text, encoding="utf-16")
    (tmp_path / "tcr.jsonl").write_bytes(text.replace("\n", "\r").encode())
    (tmp_path / "shards").mkdir()
    table[:50].to_parquet(tmp_path / "shards" / "train-00000-of-00002.parquet")
    table[50:].to_parquet(tmp_path / "shards" / "train-00001-of-00002.parquet")
    monkeypatch.setattr(files_module.cut_pieces, "__defaults__", (700,))
    for name in ("t.json", "t.csv", "t.parquet", "t16.jsonl", "tcr.jsonl", "shards"):
        t = str(tmp_path / name)
        assert decontaminate_sets([t], [b], 8)[t, b] == expected, name
        assert decontaminate_sets([b], [t], 8)[b, t].bench_rows == 120


def test_pictures_in_a_parquet_file_are_told_apart_by_their_bytes(tmp_path):
    def write(name, *pictures):
        cells = [{"bytes": p, "path": "x.png"} for p in pictures]
        stems = ["What is shown?"] * len(cells)
        pq.write_table(pa.table({"question": stems, "image": cells}), tmp_path / name)
        return str(tmp_path / name)

    t, b = write("t.parquet", b"one", b"two"), write("b.parquet", b"two", b"three")
    assert decontaminate_sets([t], [b])[t, b].exact == {1: 0}


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"question": "a", "question": "b"}', "the key 'question' twice"),
        ('{"question": 12}', "no text `question` but 12"),
        ('{"prompt": "a"}', "its keys are prompt"),
        ('{"question": "a", "options": 4}', "options that are neither a list nor an object"),
        ("[" * 5000, "nested too deeply"),
        ('{"question": "a", "x": ' + "9" * 5000 + "}", "too many digits"),
        ("\0\0\0", "NUL bytes"),
    ],
)
def test_a_bad_line_has_a_sentence_of_its_own(tmp_path, line, sentence):
    (tmp_path / "t.jsonl").write_text('{"question": "a"}\n' + line + "\n")
    with pytest.raises(OctomedError, match=f"line 2 of t.jsonl.*{re.escape(sentence)}"):
        decontaminate_sets([str(tmp_path / "t.jsonl")], [str(tmp_path / "t.jsonl")])


# The real sets.

TRAIN, BENCH = (
    ("medqa:train", "medqa:train4", "medqa:dev", "headqa:train", "headqa:dev", "medmcqa:train"),
    ("medqa:test", "headqa:test", "medmcqa:dev", "mmlu_pro_health:test", "medxpertqa_text:test"),
)


@real
@pytest.mark.parametrize("n", [8, 13, 16])
def test_real_text_sets_equal_the_plain_rule(n):
    train, bench = ({s: [q.stem for q in load(s)] for s in specs} for specs in (TRAIN, BENCH))
    index = Index({b: rows(*stems) for b, stems in bench.items()}, n)
    seen, flagged = (
        {b: set().union(*(grams_of(s, n) for s in stems)) for b, stems in bench.items()},
        0,
    )
    for t, stems in train.items():
        results = module.report_parts(index, [module.look_up_rows(index, enumerate(rows(*stems)))])
        grams = [grams_of(s, n) for s in stems]
        for b in BENCH:
            assert results[b].flagged == [
                i for i, g in enumerate(grams) if not g.isdisjoint(seen[b])
            ], (t, b)
        flagged += sum(len(r.flagged) for r in results.values())
    assert flagged > 100


@real
def test_real_brain_tumor_twins():
    files = [
        sorted((Path(DATA) / "brain_tumor" / f).glob("*/*.jpg")) for f in ("Training", "Testing")
    ]
    both = find_file_twins(*files)
    assert (len(files[0]), len(files[1]), len(both.train), len(both.test)) == (2_870, 394, 83, 88)


@real
def test_real_brain_tumor_twins_by_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    files = [
        sorted((Path(DATA) / "brain_tumor" / f).glob("*/*.jpg")) for f in ("Training", "Testing")
    ]
    both = find_file_twins(*files, key=lambda p: pixel_hash(open_image(p)))
    assert (len(both.train), len(both.test)) == (244, 251)
    assert sum(files[1][i].parent.name == "no_tumor" for i in both.test) == 105
