"""Read rows from JSONL, CSV and Parquet files and from data sets; every fault names the file and the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoints.writer import write_text
from toolkit.data.formats import CSV, PARQUET, Numbered, read_csv, read_dataset, read_parquet
from toolkit.errors import DataError, MissingError
from toolkit.names import did_you_mean

FORMS = "prompt and completion, messages, or text"


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        data: its fields.
        place: `file:line`, for messages.
    """

    data: Mapping[str, Any]
    place: str


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """Read every row of one or more files or data sets, in order.

    Raises:
        MissingError: no such file or data set.
        DataError: a line that is no JSON object of plain text and numbers, text that is not UTF-8, or a file
            without rows.
        UnsupportedError: a package that its format needs is not installed.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    return [row for file in files for row in read_source(file)]


def read_source(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    fields: Mapping[str, str] | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Yield the rows of one file or data set.

    Args:
        source: a JSONL, CSV or Parquet file, by its suffix; or a folder or a hub id that `datasets` reads.
        split: of a data set.
        subset: of a data set that has several; also called its configuration.
        fields: the source's own name of a field, by the name that it gets; other fields keep theirs.
        streaming: fetch a data set of the hub as its rows are asked for, instead of all of it first.

    Raises:
        As `read_rows`, and DataError where a field is not there.
    """
    path = Path(source).expanduser()
    found = False
    for data, place in _numbered(str(source), path, split, subset, streaming):
        found = True
        yield Row(_renamed(data, fields, place) if fields else data, place)
    if not found:
        raise DataError(f"{path}: the file has no rows")


def _numbered(source: str, path: Path, split: str, subset: str | None, streaming: bool) -> Numbered:
    if path.is_dir() or (not path.exists() and _is_hub_id(source)):
        name = str(path) if path.is_dir() else source
        return read_dataset(name, split=split, subset=subset, streaming=streaming)
    if not path.is_file():
        raise MissingError(f"{path}: no such data file")
    if path.suffix.lower() in CSV:
        return read_csv(path, CSV[path.suffix.lower()])
    return read_parquet(path) if path.suffix.lower() == PARQUET else _read_jsonl(path)


def _is_hub_id(text: str) -> bool:
    """Tell whether a text may be `owner/name`; a name with a data file's suffix is a file's."""
    suffixes = (*CSV, PARQUET, ".jsonl", ".json")
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith(suffixes)


def _renamed(data: Mapping[str, Any], fields: Mapping[str, str], place: str) -> dict[str, Any]:
    for theirs in fields.values():
        if theirs not in data:
            raise DataError(f"{place}: no field {theirs!r}{did_you_mean(theirs, data)}")
    kept = {key: value for key, value in data.items() if key not in fields.values()}
    return kept | {ours: data[theirs] for ours, theirs in fields.items()}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def user_text(row: Row) -> str:
    """Return what a user asked in a row: the prompt, the last user message, or the text.

    Raises:
        DataError: the row has none of these.
    """
    if isinstance(row.data.get("prompt"), str):
        return row.data["prompt"]
    if "messages" in row.data:
        asked = [m["content"] for m in messages(row) if m["role"] == "user"]
        if asked:
            return asked[-1]
        raise DataError(f"{row.place}: no message of the role user")
    if isinstance(row.data.get("text"), str):
        return row.data["text"]
    raise DataError(f"{row.place}: expected {FORMS}, got {_fields(row)}")


def messages(row: Row) -> list[dict[str, str]]:
    """Return the messages of a chat row, checked.

    Raises:
        DataError: not a list of `{role, content}` texts.
    """
    found = row.data.get("messages")
    if not isinstance(found, list) or not found:
        raise DataError(f"{row.place}: messages is not a list of messages")
    for index, message in enumerate(found):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{row.place}: messages[{index}] is not {{role, content}} with two texts")
    return found


def split_answer(row: Row) -> tuple[list[dict[str, str]] | str, str]:
    """Split a row into what is asked (chat messages, or a prompt text) and the expected answer.

    Raises:
        DataError: no answer in the row.
    """
    if "messages" in row.data:
        chat = messages(row)
        if chat[-1]["role"] != "assistant":
            raise DataError(f"{row.place}: the last message is not the assistant's, so there is no answer to compare")
        return chat[:-1], chat[-1]["content"]
    prompt, completion = row.data.get("prompt"), row.data.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{row.place}: expected prompt and completion, or messages, got {_fields(row)}")
    return prompt, completion


def _read_jsonl(path: Path) -> Numbered:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, f"{path}:{number}"), f"{path}:{number}"


def _parse(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        data = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    except ValueError:  # Python's own limit of digits
        raise DataError(f"{place}: a number of too many digits; write it as text") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply") from None
    if not isinstance(data, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(data).__name__}")
    if b"\\u" in line and not _is_text(data):
        raise DataError(f"{place}: half of a character (a lone surrogate, \\ud800 to \\udfff), which is no text")
    return data


def _is_text(data: Mapping[str, Any]) -> bool:
    """Tell whether every text of a row can be written; JSON can spell halves of characters, UTF-8 cannot."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _fields(row: Row) -> str:
    return ", ".join(row.data) or "no fields"
