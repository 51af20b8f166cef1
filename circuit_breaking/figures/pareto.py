"""The main figure of a comparison: toxicity against the rise of ordinary loss, for masks and baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from circuit_breaking.evaluation.pareto import family_of, in_sweep, point_of
from circuit_breaking.evaluation.result_files import ORIGINAL, REPORT, REPORT_HINT, read_models
from circuit_breaking.figures.style import (
    BLACK,
    DASHED,
    FAMILY_STYLES,
    MARKERS,
    comparison_styles,
    figure,
    interval_ends,
    plain_log,
    readable,
    symlog,
)
from circuit_breaking.runs.checked_json import CheckedJson

LINEAR = 0.03  # nats; the x axis is linear up to this rise of ordinary loss
TICKS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NO_CHANGE = {"value": 0.0, "low": 0.0, "high": 0.0}
OFFSETS = ((3.5, 3.5), (3.5, -8.0), (-8.0, 3.5), (-8.0, -8.0))  # points from a marker to its label, in order of choice
MARKER_SIZE = 5.0  # points from the middle of a label to another marker, at least
LABEL_SIZE = (9.0, 7.0)  # points; labels closer than this would overlap
Label = tuple[str, tuple[float, float], str]  # text, position in data coordinates, colour


@dataclass(frozen=True)
class Point:
    """A model in the figure: its rise of ordinary loss (x) and its toxicity (y), with their intervals.

    `series` names the line that it is a point of: masks, or random edges, of one sweep, ablation and method. It is None
    for a model by itself.
    """

    name: str
    series: tuple[str, str, str] | None
    seed: int | None
    budget: int | None
    rise: Mapping[str, float]
    toxicity: Mapping[str, float]

    @property
    def position(self) -> tuple[float, float]:
        return self.rise["value"], self.toxicity["value"]


def draw_pareto(folder: Path | str) -> Path:
    """Draw toxicity of continuations against the rise of ordinary loss, for all models of a report.

    Reads `report.json` and writes `pareto.png`. The rise is measured from the original on the same texts. Bars are 95%
    bootstrap intervals. Masks of a sweep are joined by a line; a mask that was trained by itself is a point. Numbers
    beside masks and random edges are their budgets; random edges are means over seeds. Of masks of a sweep with several
    seeds, the first seed is drawn. Near 0 the x axis is linear, beyond it is logarithmic.

    Raises:
        UserError: there is no report, it is damaged, or it holds no models.
    """
    folder = Path(folder)
    points = read_points(folder)
    path = folder / "pareto.png"
    with figure(path, 7.2, 4.2) as drawn:
        axes = drawn.subplots()
        axes.axvline(0, color=BLACK, linewidth=0.7, linestyle=DASHED)
        labels: list[Label] = []
        alone = [point for point in points if point.series is None]
        styles = comparison_styles(folder, {point.name: {} for point in alone})
        for point in alone:
            style = {key: value for key, value in styles[point.name].items() if key != "linestyle"}
            size = 9 if point.name == ORIGINAL else 5
            _point(axes, point, label=readable(point.name), markersize=size, **style)
            if point.budget is not None:
                labels.append((str(point.budget), point.position, style["color"]))
        series = {point.series: None for point in points if point.series is not None}
        for key in sorted(series, key=lambda key: (list(FAMILY_STYLES).index(key[0]), key[1:])):
            members = [point for point in points if point.series == key]
            labels += _line(axes, key, members, [other for other in series if other[0] == key[0]])
        plain_log(axes, "y")
        axes.set(xlabel="rise of the loss on held-out ordinary text, nats per token", ylim=(None, 1.3))
        axes.set_ylabel("toxicity after toxic prompts, mean")
        symlog(axes, "x", LINEAR, TICKS)
        axes.set_xlim(1.3 * min(-LINEAR / 4, axes.dataLim.x0), 1.5 * max(LINEAR, axes.dataLim.x1))
        _write_labels(axes, labels, [point.position for point in alone])
        drawn.legend(loc="outside right upper", fontsize=7)
    return path


def read_points(folder: Path) -> list[Point]:
    """The models that have both coordinates; of masks that differ in their seed only, the first."""
    models = read_models(folder, "kind")
    points = []
    for name, model in models.items():
        estimates = point_of(model)
        rise = estimates and (estimates[1].get("change") or (NO_CHANGE if model["kind"] == "original" else None))
        if rise is None or rise["value"] is None:
            continue
        series, checked = _series_of(model), CheckedJson(model, folder / REPORT, REPORT_HINT, f"models.{name}")
        budget = checked["budget"].integer() if series is not None else model.get("budget")
        points.append(Point(name, series, model.get("seed"), budget, rise, estimates[0]))
    first = {  # of the seeds of each line of masks
        series: min(point.seed for point in points if point.series == series and point.seed is not None)
        for series in {point.series for point in points if point.series is not None and point.seed is not None}
    }
    return [
        point for point in points
        if models[point.name]["kind"] != "mask" or point.seed in (None, first.get(point.series, point.seed))
    ]  # fmt: skip


def _series_of(model: Mapping[str, Any]) -> tuple[str, str, str] | None:
    family = family_of(model)
    if not in_sweep(model) or family not in FAMILY_STYLES:
        return None
    return family, model.get("sweep") or "", model.get("method") or ""


def _point(axes: Axes, point: Point, **style: Any) -> None:
    """Draw one model with both of its intervals."""
    style = {"markersize": 5, "linestyle": "none", "elinewidth": 0.8, "zorder": 3, **style}
    axes.errorbar(*point.position, xerr=interval_ends(point.rise), yerr=interval_ends(point.toxicity), **style)


def _line(
    axes: Axes, series: tuple[str, str, str], points: list[Point], alike: list[tuple[str, str, str]]
) -> list[Label]:
    """Draw one marker per budget, the mean over seeds, masks joined by a line; returns the labels of the markers.

    `alike` are the series of the same family, which have the same colour: their names and markers tell them apart.
    """
    family, number = series[0], alike.index(series)
    style, is_mask = dict(FAMILY_STYLES[family]), family.startswith("mask")
    if number:
        style |= {"marker": MARKERS[number % len(MARKERS)], "markerfacecolor": "white", "linestyle": DASHED}
    differing = [part for part, *others in zip(series, *alike, strict=True) if part and set(others) != {part}]
    by_budget: dict[int, list[Point]] = {}
    for point in points:
        by_budget.setdefault(point.budget, []).append(point)
    budgets = sorted(by_budget)
    means = np.array([np.mean([point.position for point in by_budget[budget]], 0) for budget in budgets])
    label = ", ".join([family, *map(readable, differing)])
    axes.plot(*means.T, label=label, markersize=4.5, linewidth=1.0 if is_mask else 0.0, zorder=2, **style)
    for budget in budgets if is_mask else ():
        _point(axes, by_budget[budget][0], color=style["color"], marker="none", alpha=0.5)
    return [(str(budget), tuple(at), style["color"]) for budget, at in zip(budgets, means, strict=True)]


def _write_labels(axes: Axes, labels: list[Label], others: list[tuple[float, float]]) -> None:
    """Write each label beside its marker, away from earlier labels and other markers; one without room is left out."""
    points_per_pixel = 72 / axes.figure.dpi
    markers = [axes.transData.transform(at) * points_per_pixel for at in [*(at for _, at, _ in labels), *others]]
    taken: list[np.ndarray] = []
    for (text, at, colour), marker in zip(labels, markers, strict=False):
        for offset in OFFSETS:
            place = marker + offset
            free = all((np.abs(place - other) >= LABEL_SIZE).any() for other in taken)
            middle = place + np.array([2.0 * len(text), 2.0])  # of the text
            if free and all(np.abs(middle - other).max() >= MARKER_SIZE for other in markers if other is not marker):
                taken.append(place)
                axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=6, color=colour)
                break
