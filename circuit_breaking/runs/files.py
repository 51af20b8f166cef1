"""JSON, JSON Lines, CSV and text files: written atomically, validated when they are read.

Files are validated before use: first that it is a regular file of a possible size, then its content. Tensors are in
`tensors.py`. No pickle is read or written anywhere.
"""

import codecs
import csv
import dataclasses
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from circuit_breaking.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]  # default paths start here, so that scripts run from any folder
DATA = ROOT / "data"

CHECK = "Check the path in the settings."  # the advice at the end of error messages, unless a caller gives another
MAX_JSON = 2**28  # bytes of a JSON or CSV file; the largest report has a few MB
MAX_LINES = 2**30  # bytes of a file of lines
MAX_LINE = 2**24  # bytes of a line of JSON
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip


@contextmanager
def atomic_path(path: Path | str, keep: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`. It is renamed to `path` if the block ends without an error, else removed.

    The file is first flushed to the disk, because some disks report only then that they are full. With `keep`, the file
    that was at `path` is moved there.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder in the settings.") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes files only that are open for writing
            os.fsync(file.fileno())
        # files of mkstemp are readable by their owner only; results are shared
        temporary.chmod(0o666 & ~_umask())
        if keep is not None and path.is_file():
            path.replace(keep)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path}: {why}. Nothing was left half-written.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@lru_cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically. A lone surrogate, as in a path that is not UTF-8, becomes an escape."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON atomically; dataclasses and paths are allowed, NaN is not."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> int:
    """Write one JSON value per line atomically, as they come; returns how many there were."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")
            count += 1
    return count


def end_at_whole_line(path: Path) -> None:
    """Remove an incomplete line that a full disk left at the end of a file. Raises no error of the disk."""
    with suppress(OSError), path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LINE))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically. The header names all columns; None is an empty cell, NaN is not allowed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if any(isinstance(value, float) and value != value for row in rows for value in row.values()):
        raise ValueError(f"a NaN does not go into {path}")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path | str, hint: str = CHECK, delimiter: str = ",") -> list[dict[str, str]]:
    """Read a CSV file with a header. A missing or damaged file is a `UserError`."""
    path = require_file(path, hint, MAX_JSON)
    csv.field_size_limit(MAX_LINE)  # a cell may hold a long text
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, hint), newline=""), delimiter=delimiter)
        rows, names = list(reader), reader.fieldnames or []
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error}). {hint}") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of one name. {hint}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{path}, row {number}: not as many cells as there are columns. {hint}")
    return rows


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of torch or numpy
        return value.item()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def finite(value: Any) -> Any:
    """A JSON-able value with None for each number that is not finite."""
    return json.loads(json.dumps(value, default=plain), parse_constant=lambda name: None)


def require_file(path: Path | str, hint: str = CHECK, at_most: int | None = None) -> Path:
    """`path` as a `Path`, if it is a regular file.

    A pipe or a device is refused: reading one might wait for ever, or never end.

    Args:
        path: the file.
        hint: advice at the end of error messages.
        at_most: largest size in bytes.

    Raises:
        UserError: it is missing, too large or no regular file.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}. {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {str(path)[:200]!r}: {why}. {hint}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for is_one, kind in KINDS.items() if is_one(found.st_mode)), "something else")
        raise UserError(f"there is no file {path}, but {kind}. {hint}")
    if at_most is not None and found.st_size > at_most:
        raise UserError(f"{path} has {found.st_size:,} bytes, more than the {at_most:,} that are read here. {hint}")
    return path


def _integer(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"a whole number of {len(text)} digits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number that is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name}, which is no number")


def parse_json(text: str | bytes, nan: bool = False) -> Any:
    """The value of a JSON text. Whole numbers must fit 64 bits; NaN and Infinity are refused unless `nan` is set.

    Raises:
        ValueError: the text is not JSON of this kind.
        RecursionError: it is nested too deeply.
    """
    constant = None if nan else _constant
    return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=constant)


def read_json(
    path: Path | str, hint: str = CHECK, parse: Callable[[str], Any] = parse_json, at_most: int = MAX_JSON
) -> Any:
    """Read a JSON file of at most `at_most` bytes with `parse`. A missing or damaged file is a `UserError`."""
    path = require_file(path, hint, at_most)
    try:
        return parse(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). {hint}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {hint}") from error


def read_jsonl(path: Path | str, hint: str = CHECK) -> list[Any]:
    """Read JSON Lines. A missing file or a damaged line is a `UserError`, which names the line.

    NaN is allowed: the log of a run that diverged holds it.
    """
    path = require_file(path, hint, MAX_LINES)
    rows, number = [], 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE:,} bytes in one line")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    rows.append(parse_json(line.decode(), nan=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason}). {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}). {hint}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {hint}") from error
    return rows


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can encode. JSON can hold lone surrogates, which no tokenizer accepts."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_text(path: Path | str, hint: str = CHECK) -> str:
    """A UTF-8 text file without its byte order mark. Line endings stay as they are.

    Raises:
        UserError: the file is missing, too large, no UTF-8 text, or holds NUL characters as binary files do.
    """
    path = require_file(path, hint, MAX_LINES)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {hint}") from error
    # in UTF-16, every second byte of a line feed and of most letters is zero
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        kind = "UTF-16 or UTF-32 text" if len(data) % 2 == 0 and _is_utf16(data) else "a binary file"
        raise UserError(f"{path} is not UTF-8 text but {kind}. Save it as UTF-8, or set the path of another file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). {hint}") from error


def _is_utf16(data: bytes) -> bool:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    return any(half.count(0) > len(half) // 4 for half in (data[:1000:2], data[1:1000:2]))


def read_lines(path: Path | str, hint: str = CHECK) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without white space at their ends.

    A line ends in `\\n`, `\\r\\n` or `\\r` and nowhere else: U+2028, U+0085 and form feeds are part of a text.

    Raises:
        UserError: the file is missing, empty or no UTF-8 text.
    """
    # files that were joined may have a byte order mark at the start of any line
    lines = [line.lstrip("\ufeff").strip() for line in re.split(r"\r\n|\r|\n", read_text(path, hint))]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} holds no text. {hint}")
    return lines
