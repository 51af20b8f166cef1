"""The results that the jobs of a sweep leave, and their commands. `jobs.py` runs them."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuit_breaking.runs.files import read_csv, read_json, read_jsonl
from circuit_breaking.runs.ioi_results import IOI_REPORT, IOIReport
from circuit_breaking.runs.mask_record import CUT_EDGES, KEPT_EDGES, MASK, CutEdges, KeptEdges, MaskRecord
from circuit_breaking.runs.mnist_results import MNIST_REPORT, MnistReport
from circuit_breaking.runs.results import REPORT, Report
from circuit_breaking.runs.tensors import read_tensors

REPORTS = {REPORT: Report, IOI_REPORT: IOIReport, MNIST_REPORT: MnistReport}


def command_of(script: Path, fixed: dict[str, str], job: dict[str, str], folder: Path, name: str) -> list[str]:
    """The command line of one job, which writes its results to `folder/name`."""
    options = [f"--{key}={value}" for key, value in {**fixed, **job}.items()]
    return [sys.executable, str(script), *options, f"--out={folder}", f"--run={name}"]


def results_of(folder: Path) -> dict[str, Any]:
    """The numbers in a run folder: of its reports, its mask's record, and the last row of its metrics.jsonl.

    Raises:
        UserError: a file is damaged, of an unknown version, or a list of kept edges lies under the name of cut ones.
    """
    found: dict[str, Any] = {}
    if (folder / "metrics.jsonl").is_file():
        rows = read_jsonl(folder / "metrics.jsonl")
        found |= flatten(rows[-1], "last") if rows else {}
    for name, kind, column in ((CUT_EDGES, CutEdges, "edges_cut"), (KEPT_EDGES, KeptEdges, "edges_kept")):
        if (folder / name).is_file() and not _of_old_mnist(value := read_json(folder / name)):
            found[column] = len(kind.from_json(value, folder / name).edges)
    if (folder / MASK).is_file() and not _of_old_mnist(header := read_tensors(folder / MASK)[1]):
        found |= flatten(MaskRecord.from_json(header, folder / MASK).losses, "loss")
    for name, kind in REPORTS.items():
        if (folder / name).is_file():
            value = read_json(folder / name)  # another project's script may write any JSON here
            ours = isinstance(value, dict) and "record" in value
            report = flatten(kind.from_json(value, folder / name).to_json() if ours else value)
            skipped = ("settings.", "provenance.", "version")
            found |= {key: number for key, number in report.items() if not key.startswith(skipped)}
    return found


def _of_old_mnist(value: Any) -> bool:
    """Whether this is what an older release wrote under the same file names for several masks over an MLP."""
    return isinstance(value, dict) and "record" not in value and "graph" not in value


def flatten(value: Any, prefix: str = "") -> dict[str, float | int]:
    """The numbers in nested JSON objects, by dotted names. Lists and strings are left out."""
    if isinstance(value, bool) or not isinstance(value, dict | int | float):
        return {}
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, float | int] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's table, with numbers as numbers."""
    return [{key: _number(value) for key, value in row.items()} for row in read_csv(path)]


def main_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The columns of a sweep's table that are worth seeing first: the settings `names`, the outcome, losses, edges."""
    found = dict.fromkeys(key for row in rows for key in row)
    return [*names, "exit_code", "seconds", *(key for key in found if key.startswith("loss.") or key == "edges_cut")]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text
