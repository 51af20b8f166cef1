"""Texts of people's own files: a text file with one text per line, or one column of JSON Lines, JSON or CSV."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import CHECK, is_text, read_csv, read_json, read_jsonl, read_lines, read_text

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = {".jsonl", ".ndjson"}
TEXT_SUFFIXES = {".txt", ".text", ".json", *JSON_LINES, *CSV_DELIMITERS}  # names of files, not of data sets
SHOWN_COLUMNS = 12


def read_rows(path: Path | str, hint: str = CHECK) -> list[Any] | None:
    """The rows of a file with columns, or None for plain text.

    A file is CSV or JSON Lines by its name. A file of another name is also JSON if it reads as JSON.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in CSV_DELIMITERS:
        return read_csv(path, hint, CSV_DELIMITERS[suffix])
    if suffix in JSON_LINES:
        return read_jsonl(path, hint)
    text = read_text(path, hint)
    if re.match(r"\s*\[\s*\{", text) or (suffix == ".json" and text.lstrip().startswith("[")):
        return read_json(path, hint)
    first = [line for line in text[: 2**24].split("\n", 100) if line.strip()][:2]
    if suffix == ".json" or (first and all(_is_object(line) for line in first)):
        return read_jsonl(path, hint)
    return None


def read_texts(path: Path | str, column: str = "text", hint: str = CHECK) -> list[str]:
    """The texts of a file that are not blank: its lines, or, if it has columns, the values of one of them.

    Args:
        path: a UTF-8 text file, JSON Lines, JSON (a list of objects) or CSV (`.csv`, `.tsv`) with a header.
        column: column that holds the texts; plain text has none.
        hint: advice at the end of error messages.

    Raises:
        UserError: the file is missing, empty or damaged, or lacks the column.
    """
    rows = read_rows(path, hint)
    return read_lines(path, hint) if rows is None else column_texts(rows, column, str(path), hint)


def column_texts(rows: Iterable[Any], column: str, source: str, hint: str = CHECK) -> list[str]:
    """The values of a column that are not blank or null, without white space at their ends.

    Raises:
        UserError: a row lacks the column or holds something else than text there, or no text is left.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"{source}, row {number}: {type(row).__name__}, not an object with columns. {hint}")
        if column not in row:
            names = [repr(name) for name in row]
            shown = ", ".join(names[:SHOWN_COLUMNS]) + ", ..." * (len(names) > SHOWN_COLUMNS)
            raise UserError(
                f"{source}, row {number}: there is no column {column!r}; its columns are {shown or 'none'}. "
                "Give the one that holds the texts as text_column."
            )
        value = row[column]
        if value is not None and not is_text(value):
            raise UserError(f"{source}, row {number}: column {column!r} holds {describe_no_text(value)}. {hint}")
        if value and (text := value.strip()):
            texts.append(text)
    if not texts:
        raise UserError(f"{source} holds no text in column {column!r}. {hint}")
    return texts


def describe_no_text(value: Any) -> str:
    """What a field that should hold text holds instead, for error messages. See `files.is_text`."""
    if isinstance(value, str):
        return "text that UTF-8 cannot encode"  # half of a pair of surrogates, written as an escape in JSON
    return "null, not text" if value is None else f"{type(value).__name__}, not text"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
