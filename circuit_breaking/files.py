"""Run folders, atomic writes, and the record that every result carries (layer 0).

Tensors go into safetensors, tables into JSON, JSON Lines or CSV. No pickle is read or written anywhere.
"""

import csv
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuit_breaking.cli import UserError

ROOT = Path(__file__).resolve().parent.parent  # default paths hang on it, so scripts run from any folder
DATA = ROOT / "data"

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
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
        # mkstemp makes files that only their owner can read; results are shared
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Nothing was left half-written.") from error
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold a run folder for this process; a `UserError` if another process holds it.

    The lock is the kernel's (flock on `.lock`), so that a killed run leaves none behind.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing to {folder}. Wait for it, or choose another name with --run."
                ) from None
            yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder in the settings.") from error


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON atomically; dataclasses and paths are allowed, NaN is not."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> int:
    """Write one JSON value a line atomically, streaming; returns how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")
            count += 1
    return count


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows atomically as CSV, under the names of all their columns; None is an empty cell, NaN is not allowed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if any(isinstance(value, float) and value != value for row in rows for value in row.values()):
        raise ValueError(f"a NaN does not go into {path}")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path | str, hint: str = "Check the path in the settings.") -> list[dict[str, str]]:
    """Read a CSV file with a header; a missing or damaged one is a `UserError`."""
    path = require_file(path, hint)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV ({error}). {hint}") from error
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


def require_file(path: Path | str, hint: str = "Check the path in the settings.") -> Path:
    """`path` as a Path if a file is there, else a `UserError` that ends with `hint` (what to do)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}. {hint}")
    return path


def read_json(path: Path | str, hint: str = "Check the path in the settings.") -> Any:
    """Read a JSON file; a missing or damaged one is a `UserError`."""
    path = require_file(path, hint)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). {hint}") from error


def read_jsonl(path: Path | str, hint: str = "Check the path in the settings.") -> list[Any]:
    """Read JSON Lines; a missing file or a damaged line is a `UserError` that names the line."""
    path = require_file(path, hint)
    rows, number = [], 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except UnicodeDecodeError as error:  # decoded in blocks, so the line is not known
        raise UserError(f"{path} is not UTF-8 text ({error}). {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}). {hint}") from error
    return rows


def write_tensors(path: Path | str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Write tensors and a JSON-able `about` (kept in the header's metadata) to a safetensors file atomically."""
    header = {"about": json.dumps(about or {}, default=plain)}  # of two entries the order would be left to chance
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary, header)


def read_tensors(
    path: Path | str, hint: str = "Check the path in the settings."
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on CPU) and the `about` of a safetensors file; a missing or damaged file is a `UserError`."""
    path = require_file(path, hint)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}). {hint}") from error


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(settings: Any = None, inputs: Iterable[Path | str] = (), **more: Any) -> dict[str, Any]:
    """What every result carries: settings, hashes of the files read, package versions, git commit."""
    return {
        "settings": dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings,
        "inputs": {str(path): sha256(path) for path in inputs},
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": git_commit(),
        **more,
    }


@lru_cache
def git_commit() -> str | None:
    """The commit of this checkout, with `+` where the tree differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
