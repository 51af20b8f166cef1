"""The comparison of ways to find edges, as a picture and a table, from its file only (layer 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.report_markdown import grid
from circuit_breaking.figures.style import COLOURS, apart, figure, from_results
from circuit_breaking.runs.files import read_json

FILE = "methods.json"
HINT = "Make it with toxicity/compare_methods.py."
ALONE = " alone"  # end of the name of a method that was not refined
GREY = "#8C8C8C"
STYLES = {  # a method refined and alone have one colour
    "clamped": {"color": COLOURS[0], "marker": "o"},
    "hard-concrete": {"color": COLOURS[1], "marker": "s"},
    "attribution": {"color": COLOURS[2], "marker": "D"},
    "random": {"color": GREY, "marker": "x"},
}
LINEAR = 0.2  # nats to either side of 0 up to which axes are linear
TICKS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@from_results
def draw_methods(folder: Path | str) -> Path:
    """Gain of the objective, and rise of both losses, by budget: a line a method, the mean over seeds, and their range.

    Reads `methods.json` (`original`, and `masks`: rows of method, budget, toxic, ordinary, gain), writes `methods.png`,
    both in `folder`. Close to 0 the y axes are linear, beyond it logarithmic.

    Raises:
        UserError: the file is missing, damaged, or holds no masks.
    """
    folder = Path(folder)
    original, methods = _read(folder)
    budgets = sorted({budget for rows in methods.values() for budget in rows})
    panels = {
        "gain of the objective, nats": lambda row: row["gain"],
        "rise of toxic loss, nats": lambda row: row["toxic"] - original["toxic"],
        "rise of ordinary loss, nats": lambda row: row["ordinary"] - original["ordinary"],
    }
    path = folder / "methods.png"
    with figure(path, 7.4, 3.5) as drawn:
        for axes, (label, value) in zip(drawn.subplots(1, 3), panels.items(), strict=True):
            axes.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)  # first, so that margins are those of this scale
            axes.axhline(0, color="#000000", linewidth=0.7)
            for name, rows in methods.items():
                values = [[value(row) for row in rows[budget]] for budget in sorted(rows)]
                style = {
                    **STYLES[name.removesuffix(ALONE)],
                    "markersize": 4,
                    "label": _label(name),
                    "clip_on": False,
                }
                if name.endswith(ALONE):
                    style |= {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
                axes.plot(sorted(rows), [np.mean(each) for each in values], **style)
                ends = [[end(each) for each in values] for end in (min, max)]
                axes.fill_between(sorted(rows), *ends, color=style["color"], alpha=0.1, linewidth=0)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(apart(budgets)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
            axes.yaxis.set_major_locator(FixedLocator([*(-tick for tick in TICKS), 0.0, *TICKS]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set(xlabel="edges cut at most", title=label)
        handles, labels = axes.get_legend_handles_labels()
        # a column a method, what it does refined above what it does alone
        paired = [at for name in STYLES for at, label in enumerate(labels) if label.removesuffix(ALONE) == _label(name)]
        columns = len({labels[at].removesuffix(ALONE) for at in paired})
        drawn.legend(
            [handles[at] for at in paired], [labels[at] for at in paired], loc="outside lower center", ncols=columns
        )
    return path


def table(folder: Path | str) -> str:
    """Toxic and ordinary loss of every method and budget, means over seeds, as a Markdown table."""
    original, methods = _read(Path(folder))
    budgets = sorted({budget for rows in methods.values() for budget in rows})
    lines = [["original", *[f"{original['toxic']:.3f} / {original['ordinary']:.3f}"] * len(budgets)]]
    for name, rows in methods.items():
        means = {b: [np.mean([row[key] for row in rows[b]]) for key in ("toxic", "ordinary")] for b in rows}
        lines.append([_label(name), *("{:.3f} / {:.3f}".format(*means[b]) if b in means else "" for b in budgets)])
    return grid(["toxic / ordinary loss", *(str(budget) for budget in budgets)], lines)


def _label(name: str) -> str:
    return "random edges" if name == "random" else name


def _read(folder: Path) -> tuple[Mapping[str, float], dict[str, dict[int, list[Mapping[str, Any]]]]]:
    """The original's row, and each method's rows by budget."""
    about = read_json(folder / FILE, HINT)
    methods: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    try:
        original = {key: float(about["original"][key]) for key in ("toxic", "ordinary")}
        for row in about["masks"]:
            if row["method"].removesuffix(ALONE) not in STYLES or not {"toxic", "ordinary", "gain"} <= set(row):
                raise KeyError(row["method"])
            methods.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / FILE} lacks what is to be drawn ({error!r}). {HINT}") from error
    if not methods:
        raise UserError(f"{folder / FILE} holds no masks. {HINT}")
    return original, methods
