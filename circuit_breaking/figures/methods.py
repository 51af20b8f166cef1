"""The comparison of methods that choose edges, as a figure and as a table."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import (
    BLACK,
    BLUE,
    DASHED,
    GREEN,
    GREY,
    PINK,
    VERMILION,
    figure,
    legend_under,
    log_counts,
    symlog,
)
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.records import read_value
from circuit_breaking.runs.results import MethodComparison

FILE = "methods.json"
HINT = "Make it with toxicity/compare_methods.py."
ALONE = " alone"  # end of the name of a method without refinement
STYLES = {  # a method has one colour, with refinement and without
    "ranking": {"color": BLACK, "marker": "^"},
    "clamped": {"color": BLUE, "marker": "o"},
    "hard-concrete": {"color": VERMILION, "marker": "s"},
    "ugs": {"color": PINK, "marker": "v"},
    "attribution": {"color": GREEN, "marker": "D"},
    "random": {"color": GREY, "marker": "x"},
}
LINEAR = 0.2  # nats; the y axes are linear within this of 0
TICKS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
FIGURES = ("toxic", "ordinary", "gain")
Row = dict[str, float]  # of one mask: held-out losses and gain of the objective, in nats
PANELS = {
    "gain of the objective, nats": lambda row, original: row["gain"],
    "rise of toxic loss, nats": lambda row, original: row["toxic"] - original["toxic"],
    "rise of ordinary loss, nats": lambda row, original: row["ordinary"] - original["ordinary"],
}


def draw_methods(folder: Path | str) -> Path:
    """Draw the gain of the objective and the rise of both losses by budget: one line per method, the mean over seeds.

    Reads `methods.json` (`original`, and `masks`: one row per mask with method, budget, toxic, ordinary, gain) and
    writes `methods.png`, both in `folder`. Bands show the range over seeds. Near 0 the y axes are linear, beyond it
    logarithmic.

    Raises:
        UserError: the file is missing or damaged, or holds no masks.
    """
    folder = Path(folder)
    original, methods = read_methods(folder)
    budgets = sorted({budget for rows in methods.values() for budget in rows})
    path = folder / "methods.png"
    with figure(path, 7.4, 3.5) as drawn:
        for axes, (label, value) in zip(drawn.subplots(1, 3), PANELS.items(), strict=True):
            symlog(axes, "y", LINEAR, TICKS)  # before drawing, so that the margins are those of this scale
            axes.axhline(0, color=BLACK, linewidth=0.7)
            for name, rows in methods.items():
                _line(axes, name, {budget: [value(row, original) for row in rows[budget]] for budget in sorted(rows)})
            log_counts(axes, "x", budgets)
            axes.set(xlabel="edges cut at most", title=label)
        handles, labels = axes.get_legend_handles_labels()
        # one column per method if there is room: with refinement above, without below
        plain = [label.removesuffix(ALONE) for label in labels]
        order = [at for name in STYLES for at, label in enumerate(plain) if label == label_of(name)]
        columns = len({plain[at] for at in order})
        legend_under(drawn, [handles[at] for at in order], [labels[at] for at in order], columns)
    return path


def _line(axes: Axes, name: str, values: dict[int, list[float]]) -> None:
    """Draw the mean over seeds by budget as a line, and the range over seeds as a band."""
    style = {**STYLES[name.removesuffix(ALONE)], "markersize": 4, "label": label_of(name), "clip_on": False}
    if name.endswith(ALONE):
        style |= {"linestyle": DASHED, "markerfacecolor": "white"}
    axes.plot(list(values), [np.mean(each) for each in values.values()], **style)
    lows, highs = [min(each) for each in values.values()], [max(each) for each in values.values()]
    axes.fill_between(list(values), lows, highs, color=style["color"], alpha=0.1, linewidth=0)


def table(folder: Path | str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of toxic and ordinary loss by method and budget, means over seeds."""
    original, methods = read_methods(Path(folder))
    budgets = sorted({budget for rows in methods.values() for budget in rows})
    lines = [["original", *[f"{original['toxic']:.3f} / {original['ordinary']:.3f}"] * len(budgets)]]
    for name, rows in methods.items():
        means = {b: [np.mean([row[key] for row in rows[b]]) for key in ("toxic", "ordinary")] for b in rows}
        lines.append([label_of(name), *("{:.3f} / {:.3f}".format(*means[b]) if b in means else "" for b in budgets)])
    return ["toxic / ordinary loss", *(f"{budget} edges" for budget in budgets)], lines


def label_of(name: str) -> str:
    return "random edges" if name == "random" else name


def read_methods(folder: Path) -> tuple[Row, dict[str, dict[int, list[Row]]]]:
    """Losses of the original model, and the rows of each method by budget."""
    path = folder / FILE
    report = CheckedJson(read_value(path, HINT, MethodComparison), path, HINT)
    original = {name: report["original"][name].number() for name in ("toxic", "ordinary")}
    methods: dict[str, dict[int, list[Row]]] = {}
    for row in report["masks"].rows():
        method, budget = row["method"].text(), row["budget"].integer()
        if method.removesuffix(ALONE) not in STYLES:
            row["method"].refuse(f"one of {', '.join(STYLES)}")
        methods.setdefault(method, {}).setdefault(budget, []).append({name: row[name].number() for name in FIGURES})
    if not methods:
        raise UserError(f"{path} holds no masks. {HINT}")
    return original, methods
