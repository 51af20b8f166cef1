"""The picture of a sweep, drawn from its table (layer 3)."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, MARKERS, figure, from_results
from circuit_breaking.runs.sweep import read_table

OUTCOME = ("exit_code", "seconds")  # the columns between settings and results
MOST_LINES = len(COLOURS)


@from_results
def draw_sweep(folder: Path, x: str, y: str = "") -> Path | None:
    """Draw a result against a setting: a point a job, a line through the means, one for each of the other settings.

    Reads `sweep.csv`, writes `sweep.png`, both in `folder`. Seeds other than along `x` are points of one line.

    Args:
        folder: the sweep's folder.
        x: a column with numbers or names.
        y: a column with numbers; "" for the first of the results, a loss if there is one.

    Returns:
        the picture; None where no job left a number to draw.

    Raises:
        UserError: there is no such column.
    """
    table = read_table(folder / "sweep.csv")
    if table and not {x, *OUTCOME} <= set(table[0]):
        raise UserError(f"{folder / 'sweep.csv'} lacks the columns {x}, {', '.join(OUTCOME)}. Make it with sweep.py.")
    rows = [row for row in table if row["exit_code"] == 0]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    results = columns[columns.index("seconds") + 1 :] if rows else []
    numeric = [c for c in results if any(isinstance(row[c], int | float) for row in rows)]
    if not numeric:
        return None
    y = y or next((c for c in numeric if "loss" in c), numeric[0])
    for name in (x, y):
        if name not in columns:
            raise UserError(f"the sweep has no column {name!r}; there are {', '.join(columns)}.")
    settings = columns[: columns.index(OUTCOME[0])]
    others = [c for c in settings if c not in (x, "seed") and len({row[c] for row in rows}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if isinstance(row[y], int | float):
            lines.setdefault(", ".join(f"{name} {row[name]}" for name in others), []).append(row)
    path = folder / "sweep.png"
    names = all(isinstance(row[x], int | float) for row in rows)
    with figure(path, 4.6, 3.2) as drawn:
        axes = drawn.add_subplot()
        for number, (label, members) in enumerate(list(lines.items())[:MOST_LINES]):
            colour, marker = COLOURS[number], MARKERS[number]
            places = [row[x] if names else str(row[x]) for row in members]
            axes.plot(places, [row[y] for row in members], marker, color=colour, alpha=0.45, markersize=4)
            by_place: dict[Any, list[float]] = {}
            for place, row in zip(places, members, strict=True):
                by_place.setdefault(place, []).append(row[y])
            ordered = sorted(by_place) if names else list(by_place)
            means = [sum(by_place[place]) / len(by_place[place]) for place in ordered]
            axes.plot(ordered, means, color=colour, label=label or None)
        if names and all(isinstance(row[x], int) for row in rows):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if others:
            axes.legend(title=f"the first {MOST_LINES} of {len(lines)}" if len(lines) > MOST_LINES else None)
    return path
