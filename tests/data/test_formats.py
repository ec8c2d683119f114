"""Rows of every format are the same rows, and a fault of any names its place."""

from __future__ import annotations

import csv

import pytest

from toolkit.data.rows import read_rows, read_source, write_rows
from toolkit.errors import DataError, MissingError, UnsupportedError

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": 'two\nlines, "quoted"', "completion": "naïve 東京 🎉"},
    {"prompt": "last", "completion": ""},
]


def written(kind: str, folder):
    from pyarrow import Table, parquet

    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        parquet.write_table(Table.from_pylist(ROWS), path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    else:
        path.mkdir()
        write_rows(path / "train.jsonl", ROWS)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "saved", "splits", "folder"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    path = written(kind, tmp_path)
    assert [dict(row.data) for row in read_rows(path)] == ROWS


def test_places_are_lines_or_rows(tmp_path):
    path = written("csv", tmp_path)
    assert [row.place for row in read_rows(path)] == [f"{path}:2", f"{path}:3", f"{path}:5"]
    path = written("parquet", tmp_path)
    assert [row.place for row in read_rows(path)] == [f"{path}:row {n}" for n in (1, 2, 3)]
    path = written("saved", tmp_path)
    assert next(iter(read_source(path))).place == f"{path}[train]:row 1"


def test_fields_can_be_renamed(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"question": "q", "answer": "a", "id": 3}])
    (row,) = read_source(path, fields={"prompt": "question", "completion": "answer"})
    assert row.data == {"prompt": "q", "completion": "a", "id": 3}
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'qestion'; did you mean 'question'\?"):
        list(read_source(path, fields={"prompt": "qestion"}))


def test_fields_can_be_exchanged(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": "p", "completion": "c"}])
    (row,) = read_source(path, fields={"prompt": "completion", "completion": "prompt"})
    assert row.data == {"prompt": "c", "completion": "p"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file has no rows"),
        ("a.csv", b"prompt,completion\n", "the file has no rows"),
        ("a.csv", b"prompt,completion\nx,y\nz\n", r"a\.csv:3: expected 2 fields, as the header has, got 1"),
        ("a.csv", b"prompt,completion\nx,y,z,w\n", r"a\.csv:2: expected 2 fields, as the header has, got 4"),
        ("a.csv", b'prompt,completion\nx,"y\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", b"prompt,completion\nx,\xe9\n", r"a\.csv:\d+: not UTF-8"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet: not a Parquet file"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_long_fields_are_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert len(read_rows(tmp_path / "a.csv")[0].data["text"]) == 300_000


def test_data_sets_that_are_not_there(tmp_path):
    with pytest.raises(MissingError, match=r"nobody/nothing: no file, and no data set that can be read"):
        read_rows("nobody/nothing")
    with pytest.raises(MissingError, match="no such data file"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(MissingError, match="with the split 'tset'"):
        list(read_source(written("folder", tmp_path), split="tset"))


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = written("parquet", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"this data needs pyarrow: pip install 'composition-toolkit\[data\]'"):
        read_rows(path)
