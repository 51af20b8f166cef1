"""The provenance that every result carries: settings, hashes of inputs and code, package versions, git commit."""

import dataclasses
import hashlib
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from circuit_breaking.runs.code import code_hash
from circuit_breaking.runs.files import ROOT

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def sha256(path: Path | str) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(settings: Any = None, inputs: Iterable[Path | str] = (), **more: Any) -> dict[str, Any]:
    """The provenance of a result, JSON-able.

    Args:
        settings: a script's settings, a dataclass.
        inputs: the files that were read; their hashes are recorded.
        more: further entries, such as `texts`, a description of the data that was drawn.
    """
    return {
        "settings": dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings,
        "inputs": {str(path): sha256(path) for path in inputs},
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "code": code_hash(settings),
        **more,
    }


@lru_cache
def git_commit() -> str | None:
    """The commit of this checkout, followed by `+` if tracked files differ from it.

    None outside a checkout, without git, and where git refuses a checkout of another user. It says where the code came
    from; whether two runs had the same code is told by the hash `code`.
    """

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
