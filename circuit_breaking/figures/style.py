"""The one style of all figures: colours, greys, markers, line styles, log axes, legends, readable names.

Each `draw_*` function of this room reads its result files into plain values and checks them; what is wrong with a file
is a `UserError`. It draws afterwards, so that an exception in drawing code is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from circuit_breaking.evaluation.pareto import family_of, in_sweep
from circuit_breaking.evaluation.result_files import REPORT, read_models
from circuit_breaking.runs.files import atomic_path

# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, DARK_GREY, GREY, LIGHT_GREY, FAINT_GREY = "#000000", "#555555", "#8C8C8C", "#BDBDBD", "#DADADA"
NAVY, BROWN, PURPLE, TEAL, WINE, OLIVE = "#0B3C5D", "#7A4B00", "#7B4FA3", "#44AA99", "#882255", "#8A8A2B"
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

FAMILY_STYLES = {  # of masks and random edges of a sweep, by `family_of`
    "mask, zero ablation": {"color": BLUE, "marker": "o"},
    "mask, mean ablation": {"color": SKY, "marker": "s"},
    "mask, optimal ablation": {"color": NAVY, "marker": "^"},
    "random edges, zero ablation": {"color": GREY, "marker": "x"},
    "random edges, mean ablation": {"color": LIGHT_GREY, "marker": "+"},
    "random edges, optimal ablation": {"color": DARK_GREY, "marker": "1"},
}
NAMED_STYLES = {  # of the original, and of models that are fine-tuned by the methods of finetune_gpt2.py
    "original": {"color": BLACK, "marker": "*"},
    "joint": {"color": VERMILION, "marker": "D"},
    "ascent": {"color": ORANGE, "marker": "v"},
    "task_arithmetic": {"color": BROWN, "marker": "<"},
    "npo": {"color": GREEN, "marker": "P"},
    "rmu": {"color": PINK, "marker": "X"},
}
OTHER_COLOURS = (PURPLE, TEAL, WINE, OLIVE)  # of all other models, before those of `NAMED_STYLES` that are not used
MORE_MARKERS = "<>dPX*"  # none that looks like a circle where it is small
LINES = ("-", DASHED, DOTTED, (0, (6, 1.5, 1, 1.5)))


def model_styles(
    models: Mapping[str, Mapping[str, Any]], shown: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each model of a comparison.

    Args:
        models: by name, what a report says of each: its kind, and of masks the sweep and the kind of ablation. The
            colour of a model depends on all of them.
        shown: names of the models that are in one picture; None for all.

    Returns:
        `Line2D` properties of the models that are shown. The original, masks of sweeps (by their ablation) and the
        methods of `finetune_gpt2.py` have a fixed colour. Models of one colour that are shown together have different
        markers and lines, as long as there are some.
    """
    fixed = {name: NAMED_STYLES.get(name) or _family_style(model) for name, model in models.items()}
    used = {style["color"] for style in fixed.values() if style is not None}
    free = [*OTHER_COLOURS, *(style["color"] for style in NAMED_STYLES.values() if style["color"] not in used)]
    others = [name for name, style in fixed.items() if style is None]
    for number, name in enumerate(others):
        fixed[name] = {"color": free[number % len(free)], "marker": MORE_MARKERS[number % len(MORE_MARKERS)]}
    styles: dict[str, dict[str, Any]] = {}
    for name in models if shown is None else shown:
        alike = sum(known["color"] == fixed[name]["color"] for known in styles.values())
        color, own = fixed[name]["color"], fixed[name]["marker"]
        markers = [own, *(marker for marker in MARKERS if marker != own)]
        styles[name] = {"color": color, "marker": markers[alike % len(markers)], "linestyle": LINES[alike % len(LINES)]}
    return styles


def _family_style(model: Mapping[str, Any]) -> dict[str, str] | None:
    return FAMILY_STYLES.get(family_of(model)) if in_sweep(model) else None


def comparison_styles(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`model_styles` of the models in a picture of a run, with colours that are the same in every picture of the run.

    Models of the run's report count first for the colours, whether they are in this picture or not.
    """
    known = read_models(folder) if (folder / REPORT).is_file() else {}
    every = {**known, **{name: model for name, model in models.items() if name not in known}}
    return model_styles(every, models)


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
    """As `legend_under`, of some axes, each label once; without `columns` in one row."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    legend_under(drawn, list(once.values()), list(once), columns or max(1, len(once)), **options)


def legend_under(drawn: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int, **options: Any) -> None:
    """A legend under the whole figure, in `columns` columns or as many as there is room for."""
    for count in range(columns, 0, -1):
        legend = drawn.legend(handles, labels, loc="outside lower center", ncols=count, **options)
        if count == 1 or legend.get_window_extent().width <= drawn.bbox.width:
            return
        legend.remove()
