"""Rows of CSV and Parquet files, and of data sets on the hub or in a folder.

The last two are read by the packages `pyarrow` and `datasets`, which the extra `data` brings.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from toolkit.errors import DataError, MissingError, UnsupportedError

CSV = {".csv": ",", ".tsv": "\t"}
"""Delimiter by suffix."""

PARQUET = ".parquet"
_LONGEST_FIELD = 2**31 - 1
"""Characters; Python's own limit is 131072."""

Numbered = Iterator[tuple[Mapping[str, Any], str]]
"""Rows, each with its place."""


def read_csv(path: Path, delimiter: str) -> Numbered:
    """Yield the rows of a CSV file with a header; its place is the line on which a row begins.

    Raises:
        DataError: text that is not UTF-8 or no CSV, or a row of more or fewer fields than the header.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            names = reader.fieldnames or ()
            line = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}:{line}: expected {len(names)} fields, as the header has, got {_width(row)}"
                    )
                yield row, f"{path}:{line}"
                line = reader.line_num + 1
        except UnicodeDecodeError:
            raise DataError(f"{path}:{line}: not UTF-8 text, here or a little below") from None
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV ({error})") from None


def _width(row: Mapping[Any, Any]) -> int:
    return sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())


def read_parquet(path: Path) -> Numbered:
    """Yield the rows of a Parquet file, a few thousand in memory at a time; places count from row 1.

    Raises:
        DataError: no Parquet file.
        UnsupportedError: pyarrow is not installed.
    """
    arrow, parquet = _needed("pyarrow"), _needed("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:row {number}"
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def read_dataset(source: str, *, split: str, subset: str | None, streaming: bool = False) -> Numbered:
    """Yield the rows of a split of a data set, from the hub or from a folder that holds one.

    Args:
        source: hub id or folder.
        split: of the data set.
        subset: of one that has several.
        streaming: fetch rows as they are asked for; a folder that `datasets` saved is read from the disk anyway.

    Raises:
        MissingError: no such data set, subset or split.
        UnsupportedError: datasets is not installed.
    """
    datasets = _needed("datasets")
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if (Path(source) / "state.json").is_file():
            found = datasets.load_from_disk(source)
        elif (Path(source) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(source)[split]
        else:
            found = datasets.load_dataset(source, subset, split=split, streaming=streaming)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        told = " ".join(str(error).split())[:200]
        raise MissingError(
            f"{source}: no file, and no data set that can be read, with the split {split!r} ({told})"
        ) from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    for number, row in enumerate(found, start=1):
        yield row, f"{source}[{split}]:row {number}"


def _needed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this data needs {error.name}: pip install 'composition-toolkit[data]', or give JSONL or CSV"
        ) from None
