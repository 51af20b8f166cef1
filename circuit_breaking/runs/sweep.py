"""The jobs of a sweep: how they run, and the results that they leave."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from circuit_breaking.runs.files import read_csv, read_json, read_jsonl
from circuit_breaking.runs.tensors import read_tensors


def run_job(command: list[str], log: str) -> dict[str, Any]:
    """Run one job's command with its output in the file `log`; its exit code and seconds. Never raises."""
    start = time.perf_counter()
    try:
        with Path(log).open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        return {"exit_code": 1, "seconds": 0.0, "error": str(error)}
    return {"exit_code": code, "seconds": round(time.perf_counter() - start, 2)}


def command_of(script: Path, fixed: dict[str, str], job: dict[str, str], folder: Path, name: str) -> list[str]:
    """The command line of one job, whose results go into `folder/name`."""
    options = [f"--{key}={value}" for key, value in {**fixed, **job}.items()]
    return [sys.executable, str(script), *options, f"--out={folder}", f"--run={name}"]


def results_of(folder: Path) -> dict[str, Any]:
    """The numbers that a run left: of its report.json, its mask's record, and the last row of its metrics.jsonl."""
    found: dict[str, Any] = {}
    if (folder / "metrics.jsonl").is_file():
        rows = read_jsonl(folder / "metrics.jsonl")
        found |= flatten(rows[-1], "last") if rows else {}
    if (folder / "edges.json").is_file():
        edges = read_json(folder / "edges.json")
        found["edges_cut"] = len(edges) if isinstance(edges, list) else None
    if (folder / "mask.safetensors").is_file():
        _, about = read_tensors(folder / "mask.safetensors")
        found |= flatten(about.get("losses", {}), "loss")
    if (folder / "report.json").is_file():
        report = flatten(read_json(folder / "report.json"))
        found |= {key: value for key, value in report.items() if not key.startswith("settings.")}
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, float | int]:
    """The numbers in nested JSON objects, by dotted name; lists and texts are left out."""
    if isinstance(value, bool) or not isinstance(value, dict | int | float):
        return {}
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, float | int] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a sweep's table, numbers as numbers."""
    return [{key: _number(value) for key, value in row.items()} for row in read_csv(path)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text
