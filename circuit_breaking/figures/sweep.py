"""The figure of a sweep over settings, from its table."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, MARKERS, figure
from circuit_breaking.runs.sweep import read_table

OUTCOME = ("exit_code", "seconds")  # the columns between settings and results
MOST_LINES = len(COLOURS)
Lines = dict[str, list[tuple[Any, float]]]  # by label, the points of each line


def draw_sweep(folder: Path, x: str, y: str = "") -> Path | None:
    """Draw a result against a setting: one point per job, and a line through the means for each of the other settings.

    Reads `sweep.csv` and writes `sweep.png`, both in `folder`. Jobs that differ in their seed only are points of one
    line, unless `x` is the seed.

    Args:
        folder: the sweep's folder.
        x: a column with numbers or names.
        y: a column with numbers; "" for the first of the results, a loss if there is one.

    Returns:
        The path of the figure; None where no job left a number to draw.

    Raises:
        UserError: there is no table, or it lacks a column.
    """
    found = read_lines(folder / "sweep.csv", x, y)
    if found is None:
        return None
    y, lines, has_settings = found
    path = folder / "sweep.png"
    places = [place for points in lines.values() for place, _ in points]
    numeric = all(isinstance(place, int | float) for place in places)
    with figure(path, 4.6, 3.2) as drawn:
        axes = drawn.add_subplot()
        for number, (label, points) in enumerate(list(lines.items())[:MOST_LINES]):
            points = points if numeric else [(str(place), value) for place, value in points]
            _line(axes, label, points, numeric, number)
        if numeric and all(isinstance(place, int) for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if has_settings:
            axes.legend(title=f"the first {MOST_LINES} of {len(lines)}" if len(lines) > MOST_LINES else None)
    return path


def read_lines(path: Path, x: str, y: str) -> tuple[str, Lines, bool] | None:
    """The column to draw, the points of each line, whether lines differ in a setting; None if there is no number."""
    table = read_table(path)
    if table and not {x, *OUTCOME} <= set(table[0]):
        raise UserError(f"{path} lacks the columns {x}, {', '.join(OUTCOME)}. Make it with sweep.py.")
    rows = [row for row in table if row["exit_code"] == 0]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    results = columns[columns.index("seconds") + 1 :] if rows else []
    numeric = [name for name in results if any(isinstance(row[name], int | float) for row in rows)]
    if not numeric:
        return None
    y = y or next((name for name in numeric if "loss" in name), numeric[0])
    for name in (x, y):
        if name not in columns:
            raise UserError(f"the sweep has no column {name!r}; there are {', '.join(columns)}.")
    settings = columns[: columns.index(OUTCOME[0])]
    others = [name for name in settings if name not in (x, "seed") and len({row[name] for row in rows}) > 1]
    lines: Lines = {}
    for row in rows:
        if isinstance(row[y], int | float):
            label = ", ".join(f"{name} {row[name]}" for name in others)
            lines.setdefault(label, []).append((row[x], row[y]))
    return y, lines, bool(others)


def _line(axes: Axes, label: str, points: list[tuple[Any, float]], numeric: bool, number: int) -> None:
    """Draw each job as a pale point, and a line through the mean at each place."""
    axes.plot(*zip(*points, strict=True), MARKERS[number], color=COLOURS[number], alpha=0.45, markersize=4)
    by_place: dict[Any, list[float]] = {}
    for place, value in points:
        by_place.setdefault(place, []).append(value)
    ordered = sorted(by_place) if numeric else list(by_place)
    means = [sum(by_place[place]) / len(by_place[place]) for place in ordered]
    axes.plot(ordered, means, color=COLOURS[number], label=label or None)
