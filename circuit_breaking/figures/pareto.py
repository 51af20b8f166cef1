"""The main figure of a comparison: toxicity against the rise of ordinary loss, for masks and baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from circuit_breaking.evaluation.pareto import family_of, point_of
from circuit_breaking.evaluation.result_files import REPORT, REPORT_HINT, read_models
from circuit_breaking.figures.style import (
    BLACK,
    DASHED,
    FAMILY_STYLES,
    figure,
    interval_ends,
    model_styles,
    plain_log,
    readable,
    symlog,
)
from circuit_breaking.runs.checked_json import CheckedJson

LINEAR = 0.03  # nats; the x axis is linear up to this rise of ordinary loss
TICKS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NO_CHANGE = {"value": 0.0, "low": 0.0, "high": 0.0}
OFFSETS = ((3.5, 3.5), (3.5, -8.0), (-8.0, 3.5), (-8.0, -8.0))  # points from a marker to its label, in order of choice
LABEL_SIZE = (9.0, 7.0)  # points; labels closer than this would overlap
Label = tuple[str, tuple[float, float], str]  # text, position in data coordinates, colour


@dataclass(frozen=True)
class Point:
    """A model in the figure: its rise of ordinary loss (x) and its toxicity (y), with their intervals."""

    name: str
    family: str
    budget: int | None
    rise: Mapping[str, float]
    toxicity: Mapping[str, float]

    @property
    def position(self) -> tuple[float, float]:
        return self.rise["value"], self.toxicity["value"]


def draw_pareto(folder: Path | str) -> Path:
    """Draw toxicity of continuations against the rise of ordinary loss, for all models of a report.

    Reads `report.json` and writes `pareto.png`. The rise is measured from the original on the same texts. Bars are 95%
    bootstrap intervals. Numbers beside masks and random edges are their budgets; random edges are means over seeds. Of
    masks of several seeds, the first seed is drawn. Near 0 the x axis is linear, beyond it is logarithmic.

    Raises:
        UserError: there is no report, it is damaged, or it holds no models.
    """
    folder = Path(folder)
    points = _read_points(folder)
    path = folder / "pareto.png"
    with figure(path, 7.2, 4.2) as drawn:
        axes = drawn.subplots()
        axes.axvline(0, color=BLACK, linewidth=0.7, linestyle=DASHED)
        styles = model_styles({point.name: point.family for point in points if point.family not in FAMILY_STYLES})
        for point in points:
            if point.family not in FAMILY_STYLES:
                size = 9 if point.family == "original" else 5
                _point(axes, point, label=readable(point.name), markersize=size, **styles[point.name])
        labels: list[Label] = []
        for family in FAMILY_STYLES:
            if members := [point for point in points if point.family == family]:
                labels += _line(axes, family, members)
        plain_log(axes, "y")
        axes.set(xlabel="rise of the loss on held-out ordinary text, nats per token", ylim=(None, 1.3))
        axes.set_ylabel("toxicity after toxic prompts, mean")
        symlog(axes, "x", LINEAR, TICKS)
        axes.set_xlim(1.3 * min(-LINEAR / 4, axes.dataLim.x0), 1.5 * max(LINEAR, axes.dataLim.x1))
        _write_labels(axes, labels)
        drawn.legend(loc="outside right upper", fontsize=7)
    return path


def _read_points(folder: Path) -> list[Point]:
    """The models that have both coordinates; of masks that differ in their seed only, the first."""
    models = read_models(folder, "kind")
    points = []
    for name, model in models.items():
        estimates = point_of(model)
        rise = estimates and (estimates[1].get("change") or (NO_CHANGE if model["kind"] == "original" else None))
        if rise is None or rise["value"] is None:
            continue
        family, seed = family_of(model), model.get("seed")
        if family in FAMILY_STYLES and model["kind"] == "mask" and seed not in (None, _first_seed(models, family)):
            continue
        budget = None
        if family in FAMILY_STYLES:
            budget = CheckedJson(model, folder / REPORT, REPORT_HINT, f"models.{name}")["budget"].integer()
        points.append(Point(name, family, budget, rise, estimates[0]))
    return points


def _first_seed(models: Mapping[str, Any], family: str) -> int | None:
    seeds = [model.get("seed") for model in models.values() if family_of(model) == family]
    return min((seed for seed in seeds if seed is not None), default=None)


def _point(axes: Axes, point: Point, **style: Any) -> None:
    """Draw one model with both of its intervals."""
    style = {"markersize": 5, "linestyle": "none", "elinewidth": 0.8, "zorder": 3, **style}
    axes.errorbar(*point.position, xerr=interval_ends(point.rise), yerr=interval_ends(point.toxicity), **style)


def _line(axes: Axes, family: str, points: list[Point]) -> list[Label]:
    """Draw one marker per budget, the mean over seeds, masks joined by a line; returns the labels of the markers."""
    style, is_mask = FAMILY_STYLES[family], family.startswith("mask")
    by_budget: dict[int, list[Point]] = {}
    for point in points:
        by_budget.setdefault(point.budget, []).append(point)
    budgets = sorted(by_budget)
    means = np.array([np.mean([point.position for point in by_budget[budget]], 0) for budget in budgets])
    axes.plot(*means.T, label=family, markersize=4.5, linewidth=1.0 if is_mask else 0.0, zorder=2, **style)
    for budget in budgets if is_mask else ():
        _point(axes, by_budget[budget][0], color=style["color"], marker="none", alpha=0.5)
    return [(str(budget), tuple(at), style["color"]) for budget, at in zip(budgets, means, strict=True)]


def _write_labels(axes: Axes, labels: list[Label]) -> None:
    """Write each label beside its marker where no earlier label is; a label without room is left out."""
    points_per_pixel = 72 / axes.figure.dpi
    taken: list[np.ndarray] = []
    for text, at, colour in labels:
        marker = axes.transData.transform(at) * points_per_pixel
        for offset in OFFSETS:
            place = marker + offset
            if all((np.abs(place - other) >= LABEL_SIZE).any() for other in taken):
                taken.append(place)
                axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=6, color=colour)
                break
