"Files of rows: read whatever their format, packing and encoding, or refused in one sentence."

import bz2
import gzip
import json
import lzma
import os
import threading

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from octomed.core.paths import OctomedError
from octomed.data.row_files import list_row_files, read_row_set

ROWS = [{"question": "Why,\nthen?"}, {"question": 'Über "all"'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def read(path):
    return [row for _, row in read_row_set(path)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(
    "text",
    [
        LINES.encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.encode("utf-16"),
        LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    ],
)
def test_json_is_read_in_every_packing_and_encoding(tmp_path, pack, text):
    (tmp_path / "rows").write_bytes(pack(text))
    assert read(tmp_path / "rows") == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.CSV.GZ", "a.tsv", "a.csv.bz2", "a.parquet"])
def test_tables_are_read(tmp_path, name):
    table, lower = pd.DataFrame(ROWS), name.lower()
    if lower.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        text = table.to_csv(index=False, sep="\t" if "tsv" in lower else ",").encode()
        packs = {".gz": gzip.compress, ".bz2": bz2.compress}
        (tmp_path / name).write_bytes(packs.get(lower[lower.rindex(".") :], bytes)(text))
    assert read(tmp_path / name) == ROWS


def test_zstd_and_arrow_are_read(tmp_path):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(LINES.encode()))
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "rows.jsonl.zst") == read(tmp_path / "a.arrow") == ROWS


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    data = gzip.compress(LINES.encode(), mtime=0)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert read(tmp_path / "pipe") == ROWS
    writer.join()


@pytest.mark.parametrize(
    "name, data, sentence",
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        ("a.jsonl", b"<!DOCTYPE html><p>", "an HTML page"),
        ("a.jsonl", b"PK\x03\x04" + bytes(50), "a zip archive or a workbook"),
        ("a.jsonl", b"SQLite format 3\0" + bytes(50), "an SQLite database"),
        ("a.jsonl", b"\x80\x04\x95" + bytes(50), "a pickle, which is not opened"),
        ("a.gz", b'{"question": "a"}', "no whole gzip file"),
        ("a", gzip.compress(LINES.encode(), mtime=0)[:-6], "no whole gzip file"),
        ("a", bz2.compress(LINES.encode())[:-6], "no whole bzip2 file"),
        ("a.jsonl", '{"question": "ü"}'.encode("latin1"), "is not UTF-8 text"),
        ("a.csv", "question\nü\n".encode("latin1"), "is not UTF-8 text"),
        ("a.csv", b"question\na,b\n", "does not have the cells of the header"),
        ("a.csv", b"question,question\na,b\n", "the column 'question' twice"),
        ("a.csv", b'question\n"never closed\n', "cannot be read as CSV"),
        ("a.parquet", b"PAR1" + bytes(50), "a damaged parquet file"),
        ("a.json", b'[{"a": 1}, {"a": 2, "a": 3}]', "row 2 of a.json has the key 'a' twice"),
        ("a.json", b'[{"a": 1}, {"a": 2]', "row 2 of a.json is not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_file_of_rows_is_named(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OctomedError) as error:
        read(tmp_path / name)
    assert sentence in str(error.value) and name in str(error.value)


def test_an_absent_option_of_arrow_is_absent_and_class_numbers_are_names(tmp_path):
    options = [{"A": "x", "B": "y", "C": None}, {"A": "x", "B": "y", "C": "z"}]
    features = {"answer": {"_type": "ClassLabel", "names": ["A", "B"]}}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"options": options, "answer": [0, 1]}).replace_schema_metadata(note)
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"options": {"A": "x", "B": "y"}, "answer": "A"},
        {"options": {"A": "x", "B": "y", "C": "z"}, "answer": "B"},
    ]


def test_a_folder_is_one_split_or_names_its_splits(tmp_path):
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for split in ("train", "test"):
        table = pa.table({"question": [split]})
        pq.write_table(table, hub / f"{split}-00000-of-00001.parquet")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    with pytest.raises(OctomedError, match=r"several sets \(test, train\)"):
        list_row_files(tmp_path / "hub")
    assert read(f"{tmp_path / 'hub'}:test") == [{"question": "test"}]
    (hub / "test-00000-of-00001.parquet").unlink()
    assert read(tmp_path / "hub") == [{"question": "train"}]
    with pytest.raises(OctomedError, match="no split dev"):
        read(f"{tmp_path / 'hub'}:dev")
