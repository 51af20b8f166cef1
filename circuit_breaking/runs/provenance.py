"""The record that every result carries: settings, hashes of inputs, package versions, git commit."""

import dataclasses
import hashlib
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from circuit_breaking.runs.files import ROOT

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


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
