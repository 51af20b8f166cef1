"""The one style of all figures: colours, greys, markers, line styles, log axes, legends, readable names.

Each `draw_*` function of this room reads its result files into plain values and checks them; what is wrong with a file
is a `UserError`. It draws afterwards, so that an exception in drawing code is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from circuit_breaking.runs.files import atomic_path

# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, DARK_GREY, GREY, LIGHT_GREY, FAINT_GREY = "#000000", "#555555", "#8C8C8C", "#BDBDBD", "#DADADA"
NAVY, BROWN, PURPLE = "#0B3C5D", "#7A4B00", "#7B4FA3"
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK, GREY)
MARKERS = "osD^vP*X"
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.2))

RC_PARAMS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # a prompt or a name with "$" in it is shown as it is
    "savefig.dpi": 200,
}

FAMILY_STYLES = {  # of masks and random edges, by `family_of`
    "mask, zero ablation": {"color": BLUE, "marker": "o"},
    "mask, mean ablation": {"color": SKY, "marker": "s"},
    "mask, optimal ablation": {"color": NAVY, "marker": "^"},
    "random edges, zero ablation": {"color": GREY, "marker": "x"},
    "random edges, mean ablation": {"color": LIGHT_GREY, "marker": "+"},
    "random edges, optimal ablation": {"color": DARK_GREY, "marker": "1"},
}
ORIGINAL_STYLE = {"color": BLACK, "marker": "*"}
BASELINE_COLOURS = (VERMILION, GREEN, PINK, ORANGE, BROWN, PURPLE, GREY)
BASELINE_MARKERS = "DvPX<>h"


def model_styles(families: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each model, so that a model looks the same in all figures of a comparison.

    Args:
        families: by model, its family as `family_of` says it.

    Returns:
        The original and the first model of each family of masks have fixed styles. All other models take the styles of
        baselines in turn, those of no family first.
    """
    styles = {}
    for name, family in families.items():
        style = ORIGINAL_STYLE if family == "original" else FAMILY_STYLES.get(family)
        if style is not None and style not in styles.values():
            styles[name] = style
    rest = sorted((name for name in families if name not in styles), key=lambda name: families[name] in FAMILY_STYLES)
    for number, name in enumerate(rest):
        at = number % len(BASELINE_COLOURS)
        styles[name] = {"color": BASELINE_COLOURS[at], "marker": BASELINE_MARKERS[at]}
    return styles


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` by `height` inches in the project's style, written to a PNG file when the block ends."""
    with context(["default", RC_PARAMS]):
        drawn = Figure(figsize=(width, height), layout="constrained")  # without pyplot: no display, no global state
        yield drawn
        with atomic_path(path) as temporary:
            drawn.savefig(temporary, format="png")


def readable(name: str) -> str:
    """The name of a model's folder as a figure shows it."""
    return name.replace("_", " ")


def interval_ends(entry: Mapping[str, float]) -> np.ndarray:
    """Distances [2, 1] from an estimate's value to the ends of its interval, as `Axes.errorbar` takes them."""
    return np.abs([[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]])


def spaced(values: Iterable[float], ratio: float = 1.4) -> list[float]:
    """The ascending values that have enough space between them on a log axis: each at least `ratio` times the last."""
    found: list[float] = []
    for value in values:
        if not found or value >= ratio * found[-1]:
            found.append(float(value))
    return found


def log_counts(axes: Axes, which: str, counts: Iterable[float]) -> None:
    """Make the axis `which` ("x" or "y") logarithmic, with ticks at the counts that occur."""
    getattr(axes, f"set_{which}scale")("log")
    _set_ticks(getattr(axes, f"{which}axis"), spaced(counts), "{:,.0f}")


def plain_log(axes: Axes, which: str, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """Make the axis `which` logarithmic, with plain numbers at `subs` times each power of ten."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def symlog(axes: Axes, which: str, linear: float, ticks: Iterable[float]) -> None:
    """Make the axis `which` linear within `linear` of 0 and logarithmic beyond, with ticks at 0 and +/- `ticks`."""
    getattr(axes, f"set_{which}scale")("symlog", linthresh=linear, linscale=1.5)
    ticks = sorted(ticks)
    _set_ticks(getattr(axes, f"{which}axis"), [*(-tick for tick in reversed(ticks)), 0.0, *ticks], "{:g}")


def _set_ticks(axis: Axis, ticks: list[float], label: str) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label.format(value)))


def legend_below(drawn: Figure, axes: Axes, columns: int | None = None, **options: Any) -> None:
    """The legend of some axes under the whole figure, each label once, in `columns` columns or else in one row."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    drawn.legend(once.values(), once.keys(), loc="outside lower center", ncols=columns or max(1, len(once)), **options)
