"""Which code runs: hashes of its source files, so that a run is resumed by the code that began it."""

import ast
import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import ROOT

PACKAGE = Path(__file__).resolve().parents[1]
DRAWING = "figures"  # the sub-package that no result depends on: it reads result files, and nothing that makes them
# imports it (tests/test_house.py)
_computed: dict[str, dict[str, str]] = {}  # `source_hashes` by `code_hash`


def source_hashes(settings: Any = None) -> dict[str, str]:
    """SHA-256 of each source file that a result may depend on, by its path from the root of the repository.

    These are the files of this package except those that draw pictures, the script, and the modules in the script's
    folder that it imports, directly or through each other. A file outside the repository has its full path.

    Args:
        settings: the script's settings; the script is the file that defines their class. If that is unknown, it is the
            file that Python was started with.
    """
    script = _script_of(settings)
    files = {*_package_files(), *(_with_imported(script) if script is not None else ())}
    return {_name(path): _sha256(path) for path in sorted(files)}


def code_hash(settings: Any = None) -> str:
    """One SHA-256 for the files of `source_hashes`, the `code` of a run's provenance; `hashes_of` gives theirs."""
    hashes = source_hashes(settings)
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    _computed[digest] = hashes
    return digest


def hashes_of(code: str | None) -> dict[str, str]:
    """The hashes of files behind a hash that `code_hash` gave in this process; empty for any other."""
    return _computed.get(code, {})


def difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which source files differ, in words: the first three by name."""
    if not then:
        return "its source files are not recorded"
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} differ{'s' if len(names) == 1 else ''}"


def _script_of(settings: Any) -> Path | None:
    kind = type(settings) if dataclasses.is_dataclass(settings) else None
    for name in (kind.__module__ if kind else None, "__main__"):
        file = getattr(sys.modules.get(name), "__file__", None)
        path = Path(file or "").resolve()
        if path.is_file() and PACKAGE not in path.parents:
            return path
    return None  # a notebook that defines its settings itself, or an interactive session


@cache
def _with_imported(script: Path) -> frozenset[Path]:
    """A script and the modules in its folder that its source imports, directly or through each other.

    By the source and not by what is loaded: other scripts may have been imported in the same process.
    """
    found, waiting = set(), {script}
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            beside = (script.parent / f"{name.partition('.')[0]}.py" for name in names)
            waiting |= {one for one in beside if one.is_file() and one not in found}
    return frozenset(found)


@cache
def _package_files() -> tuple[Path, ...]:
    drawing = PACKAGE / DRAWING
    return tuple(path for path in PACKAGE.rglob("*.py") if drawing not in path.parents)


@cache  # the code that runs is what was read when the process began, so a file is hashed once
def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Start the script again.") from error


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else path.as_posix()
