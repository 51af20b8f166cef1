"""Sections on results without a module of their own: comparison of methods, sweeps, MNIST, benchmarks."""

import base64
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from circuit_breaking.evaluation.tables import number
from circuit_breaking.figures.browser.parts import Part, Picture, Plot, Plots, Section, Table, Text
from circuit_breaking.figures.browser.traces import DASHES, SYMBOLS, axes, band, level, line
from circuit_breaking.figures.methods import ALONE, FILE, PANELS, STYLES, label_of, read_methods, table
from circuit_breaking.figures.mnist import CURVES, EDGES_CUT, read_run
from circuit_breaking.figures.style import COLOURS, readable
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.files import read_json
from circuit_breaking.runs.mnist_results import MNIST_REPORT
from circuit_breaking.runs.sweep import main_columns, read_table

MOST_PICTURES = 300_000  # bytes of the pictures of a page, so that it stays below 2 MB
MOST_COLUMNS = 12  # of the table of a sweep


def methods(folder: Path) -> Section | None:
    """The gain of the objective and the rise of both losses by budget, a line for each method."""
    if not (folder / FILE).is_file():
        return None
    original, found = read_methods(folder)
    budgets = sorted({budget for rows in found.values() for budget in rows})
    x = {"type": "log", "tickvals": budgets, "ticktext": [f"{budget:,}" for budget in budgets]}
    plots = []
    for title, value in PANELS.items():
        traces: list[Mapping[str, Any]] = []
        for name, rows in found.items():
            style, label, counts = STYLES[name.removesuffix(ALONE)], label_of(name), sorted(rows)
            groups = [[value(row, original) for row in rows[count]] for count in counts]
            traces += band(label, counts, list(map(min, groups)), list(map(max, groups)), style["color"])
            marker = {"size": 7, "symbol": SYMBOLS[style["marker"]]}
            dash = {"dash": DASHES[1] if name.endswith(ALONE) else DASHES[0]}
            means = list(map(fmean, groups))
            traces.append(line(label, counts, means, style["color"], marker=marker, line=dash, legendgroup=label))
        plots.append(Plot(title, traces, axes("edges cut at most", "", xaxis=x, **level(0.0))))
    header, rows = table(folder)
    return Section("Methods that choose edges", [Plots(plots), Table(header, rows, "Means over seeds")])


def sweep(folder: Path) -> Section | None:
    """The main columns of a sweep's table, or the first of them if they are none, and its picture."""
    if not (folder / "sweep.csv").is_file():
        return None
    rows = read_table(folder / "sweep.csv")
    names = list(dict.fromkeys(name for row in rows for name in row))[:MOST_COLUMNS]
    if not names:
        return None
    if "exit_code" in names:
        names = main_columns(rows, names[: names.index("exit_code")])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    header = [readable(name).replace(".", " ") for name in names]
    table = Table(header, cells, f"{len(rows)} jobs; all columns are in sweep.csv")
    return Section("Sweep", [table, *_pictures(folder, "sweep.png")])


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else "" if value is None else str(value)


def mnist(folder: Path) -> Section | None:
    """Accuracies of each variant by step and at the end, and the pictures of the cut edges."""
    if not (folder / MNIST_REPORT).is_file():
        return None
    run = read_run(folder)
    plots = []
    for name, rows in run.rows.items():
        traces = [
            line(run.labels[key], run.steps[name], [row[key] for row in rows], COLOURS[at % len(COLOURS)])
            for at, key in enumerate(CURVES)
            if key in rows[0]
        ]
        y = {"tickformat": ".0%", "range": [-0.03, 1.03]}
        plots.append(Plot(name, traces, axes("step", "share in its group", yaxis=y)))
    found = {key for row in run.results.values() for key in row}
    columns = [key for key in (EDGES_CUT, *CURVES) if key in found]
    cells = [[name, *(_accuracy(key, row.get(key)) for key in columns)] for name, row in run.results.items()]
    header = ["variant", *(run.labels.get(key, key) for key in columns)]
    accuracies = Table(header, cells, "At the end: images that are put into their group")
    parts: list[Part] = [Text(f"Images: {run.source}."), accuracies, Plots(plots)]
    return Section("Accuracy", [*parts, *_pictures(folder, "pixels.png", "comparison.png")])


def _accuracy(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{int(value):,}" if key == EDGES_CUT else f"{value:.1%}"


def _pictures(folder: Path, *names: str) -> list[Picture]:
    found, left = [], MOST_PICTURES
    for name in names:
        path = folder / name
        if path.is_file() and path.stat().st_size <= left:
            data = path.read_bytes()
            left -= len(data)
            source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
            found.append(Picture(source, readable(path.stem)))
    return found


def harness(folder: Path) -> Section | None:
    """Results of lm-evaluation-harness: the metrics of each task, with the cut edges and without."""
    path = folder / "harness.json"
    if not path.is_file():
        return None
    report = CheckedJson(read_json(path), path, "Make it with evaluate_harness.py.")
    found: dict[str, dict[str, str]] = {}
    for model, tasks in report["models"].items():
        for task, metrics in tasks["results"].items():
            for name, value in metrics.items() if isinstance(metrics.value, dict) else ():
                if isinstance(value.value, int | float) and "_stderr" not in name:
                    error = metrics.value.get(name.replace(",", "_stderr,", 1))
                    spread = f" ± {number(float(error))}" if isinstance(error, int | float) else ""
                    found.setdefault(f"{task}, {name}", {})[model] = number(float(value.value)) + spread
    names = [name for name, _ in report["models"].items()]
    rows = [[task, *(cells.get(name, "–") for name in names)] for task, cells in found.items()]
    about = Text("Metrics of lm-evaluation-harness, with their standard errors.")
    return Section("Benchmarks", [about, Table(["", *names], rows)]) if rows else None
