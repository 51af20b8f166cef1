"""Sections on training: the losses by step, the curve of a ranking, checkpoints of fine-tuning."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from circuit_breaking.figures.browser.about import settings_of
from circuit_breaking.figures.browser.parts import Plot, Plots, Section
from circuit_breaking.figures.browser.traces import SYMBOLS, axes, level, line, points
from circuit_breaking.figures.edge_curve import LINES, read_curve
from circuit_breaking.figures.style import BLACK, BLUE, COLOURS, DARK_GREY, GREY, VERMILION, readable
from circuit_breaking.figures.training import COLUMNS, METRICS, learning_rates, phase_starts, read_finetuning, smoothed
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.ranking_record import CURVE

NEAR = 0.25  # of the steps: the name of a phase takes up to as much
MOST_STEPS = 2000  # points of a line; of longer trainings every second step is shown, or every third, ...
SMOOTH = 9  # steps over which lines average
COUNTS = {"n_cut": "edges cut", "n_masked": "units masked"}


def training(folder: Path) -> Section | None:
    """Losses and edges cut by step, from the rows of `metrics.jsonl`."""
    if not (folder / METRICS).is_file():
        return None
    rows = read_jsonl(folder / METRICS)
    count = next((name for name in COUNTS if rows and name in rows[0]), None)
    if count is None or any(name not in rows[0] for name in COLUMNS):
        return None
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in (*COLUMNS, count)}
    by_logits = settings_of(folder).get("objective") == "logit_difference"
    broken = ("logit difference (to fall)", -1.0) if by_logits else ("loss to raise", 1.0)
    every = slice(None, None, -(-len(rows) // MOST_STEPS))
    phases = [str(row.get("phase", "")) for row in rows]
    marks = _marks(columns["step"], phases)
    plots = []
    for title, values, colour in (
        (broken[0], broken[1] * columns["break_loss"], VERMILION),
        ("loss on ordinary text (to stay)", columns["keep_loss"], BLUE),
    ):
        x = columns["step"][every]
        traces = [
            line("one batch", x, values[every], colour, opacity=0.3, line={"width": 1}),
            line(f"mean of {SMOOTH} steps", x, _smoothed(values, phases)[every], colour),
        ]
        plots.append(
            Plot(
                title, traces, axes("step", "" if by_logits and values is not columns["keep_loss"] else "nats", **marks)
            )
        )
    traces = [line(COUNTS[count], columns["step"][every], columns[count][every], BLACK, line={"shape": "hv"})]
    plots.append(Plot(COUNTS[count], traces, axes("step", "", yaxis={"rangemode": "tozero"}, **marks)))
    return Section("Training", [Plots(plots)])


def _smoothed(values: np.ndarray, phases: list[str]) -> np.ndarray:
    """Running means within each phase, [n]."""
    starts = phase_starts(phases)
    parts = zip(starts, [*starts[1:], len(phases)], strict=True)
    return np.concatenate([smoothed(values[start:end], SMOOTH) for start, end in parts])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _marks(steps: np.ndarray, phases: list[str]) -> dict[str, Any]:
    """A line before the first step of each phase, and the name of the phase, below the last one if that is near."""
    starts = phase_starts(phases)
    if len(starts) < 2:
        return {}
    style = {"color": GREY, "width": 1, "dash": "dot"}
    lines = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": steps[at] - 0.5, "x1": steps[at] - 0.5, "line": style}
        for at in starts[1:]
    ]
    rows = [0]
    for before, at in pairwise(starts):
        rows.append(rows[-1] + 1 if steps[at] - steps[before] < NEAR * (steps[-1] - steps[0]) else 0)
    names = [
        {"x": steps[at], "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top", "yshift": -14 * row,
         "text": phases[at], "showarrow": False, "font": {"size": 11, "color": GREY}}
        for at, row in zip(starts, rows, strict=True)
    ]  # fmt: skip
    return {"shapes": lines, "annotations": names}


def curve(folder: Path) -> Section | None:
    """Held-out losses and gain of the objective by the budget, the largest number of edges to cut."""
    if not (folder / CURVE).is_file():
        return None
    original, rows = read_curve(folder)
    budgets = [row["budget"] for row in rows]
    x = {"type": "log", "tickvals": budgets, "ticktext": [f"{budget:,.0f}" for budget in budgets]}
    plots = []
    for name, (label, colour, marker) in LINES.items():
        trace = line(label, budgets, [row[name] for row in rows], colour, marker={"size": 7, "symbol": SYMBOLS[marker]})
        layout = axes("most edges to cut", "nats per token", xaxis=x, **level(original[name], "all edges", colour))
        plots.append(Plot(f"held-out loss on {label}", [trace], layout))
    trace = line("gain", budgets, [row["gain"] for row in rows], BLACK, marker={"size": 7, "symbol": SYMBOLS["D"]})
    plots.append(Plot("gain of the objective", [trace], axes("most edges to cut", "nats", xaxis=x, **level(0.0))))
    return Section("Edges in the order of the ranking", [Plots(plots)])


def finetuning(folder: Path) -> Section | None:
    """Losses of each checkpoint of fine-tuning by step, or of each candidate, a plot for each method and loss."""
    found = [read_finetuning(path.parent) for path in sorted(folder.glob("finetuned/*/finetuning.json"))]
    if not found:
        return None
    plots = []
    for name, rows, kept in found:
        for text in ("toxic", "ordinary"):
            traces = []
            for at, lr in enumerate(learning_rates(rows)):
                mine = [row for row in rows if row.lr == lr]
                x, y = [row.step for row in mine], [getattr(row, text) for row in mine]
                traces.append(line(f"lr {lr:g}", x, y, COLOURS[at % 6], line={"width": 1.2}))
            candidates = [row for row in rows if not row.trained]
            if candidates:
                x, y = [row.step for row in candidates], [getattr(row, text) for row in candidates]
                traces.append(points("candidates", x, y, DARK_GREY))
            star = {"type": "scatter", "mode": "markers", "name": "kept", "x": [kept.step], "y": [getattr(kept, text)],
                    "marker": {"symbol": "star", "size": 11, "color": BLACK}}  # fmt: skip
            layout = axes("candidate" if candidates else "step", "nats per token")
            plots.append(Plot(f"{readable(name)}: {text} loss", [*traces, star], layout))
    return Section("Fine-tuning", [Plots(plots)])
