"""Texts of people's own files: a text file with one text per line, or one column of JSON Lines, JSON or CSV."""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import CHECK, MAX_LINE, is_text, read_csv, read_json, read_jsonl, read_lines, read_text

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = {".jsonl", ".ndjson"}
TEXT_SUFFIXES = {".txt", ".text", ".json", *JSON_LINES, *CSV_DELIMITERS}  # names of files, not of data sets
SHOWN_COLUMNS = 12
DELIMITERS = ",\t;|"  # of tables under another name
TABLE_ROWS, TABLE_HEAD = 20, 2**20  # rows and characters of a text file that are looked at: is it a table?
COLUMN_NAME = re.compile(r"[^\W\d][\w.-]*|")  # the first column of a table of pandas has no name


def read_rows(path: Path | str, hint: str = CHECK) -> list[Any] | None:
    """The rows of a file with columns, or None for plain text.

    A file is CSV or JSON Lines by its name. A file of another name is also JSON if it reads as JSON.

    Raises:
        UserError: the file is missing or damaged, or it is plain text by its name and looks like a table.
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
    if names := _table_columns(text):
        raise UserError(
            f"{path} looks like a table: its first line names the columns {_shown(names)}, and the lines below have as "
            "many cells. Save it as .csv (commas) or .tsv (tabs), or write one text per line."
        )
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
            raise UserError(
                f"{source}, row {number}: there is no column {column!r}; its columns are {_shown(row) or 'none'}. "
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


def _shown(columns: Iterable[str]) -> str:
    names = [repr(name) for name in columns]
    return ", ".join(names[:SHOWN_COLUMNS]) + ", ..." * (len(names) > SHOWN_COLUMNS)


def _table_columns(text: str) -> list[str]:
    """The columns of a text that looks like a table, or none: its first line has nothing but two or more different
    names, each one word, and every further row has as many cells."""
    head = text[:TABLE_HEAD]
    csv.field_size_limit(MAX_LINE)  # as of files that are named CSV
    for delimiter in DELIMITERS:
        try:
            rows = list(islice(csv.reader(StringIO(head, newline=""), delimiter=delimiter), TABLE_ROWS + 1))
        except csv.Error:
            continue
        if len(head) < len(text) and 2 < len(rows) <= TABLE_ROWS:
            rows.pop()  # the head may end within it
        names, cells = rows[0] if rows else [], {len(row) for row in rows[1:] if row}
        distinct = len(set(names)) == len(names) > 1
        if distinct and all(map(COLUMN_NAME.fullmatch, names)) and cells == {len(names)}:
            return names
    return []


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
