"""Figures of the indirect-object scripts, drawn from result files only (layer 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, MARKERS, apart, figure, from_results
from circuit_breaking.runs.files import read_json

PANELS = {  # what a report shows, with its axis's label
    "logit_difference": "logit difference",
    "accuracy": "IO first, share",
    "probability": "probability of IO",
    "ordinary_loss": "ordinary loss, nats",
}


@from_results
def draw_comparison(folder: Path | str) -> Path:
    """Logit difference and ordinary loss by number of edges cut, a line a method; random masks as mean and range.

    Reads `comparison.json` (`original` and `methods`: name -> rows of n_cut, logit_difference, ordinary_loss), writes
    `comparison.png`, both in `folder`.
    """
    folder = Path(folder)
    path, hint = folder / "comparison.json", "Make it with ioi/compare.py."
    about = read_json(path, hint)
    try:
        original = about["original"]
        methods = {
            name: np.array([[row["n_cut"], row["logit_difference"], row["ordinary_loss"]] for row in rows], float)
            for name, rows in about["methods"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} lacks what is to be drawn ({error!r}). {hint}") from error
    out = folder / "comparison.png"
    with figure(out, 7.2, 3.1) as drawn:
        panels = drawn.subplots(1, 2)
        labels = {"logit_difference": "logit difference, IO - S", "ordinary_loss": "loss on ordinary text, nats"}
        for column, (axes, (key, label)) in enumerate(zip(panels, labels.items(), strict=True), 1):
            axes.axhline(original[key], color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), label="original")
            for number, (name, rows) in enumerate(methods.items()):
                counts = np.unique(rows[:, 0])
                values = [rows[rows[:, 0] == count, column] for count in counts]
                style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
                axes.plot(counts, [each.mean() for each in values], label=name, **style)
                if any(len(each) > 1 for each in values):
                    lows, highs = [each.min() for each in values], [each.max() for each in values]
                    axes.fill_between(counts, lows, highs, color=COLOURS[number], alpha=0.18, linewidth=0)
            axes.set_xscale("log")
            counts = np.unique(max(methods.values(), key=len)[:, 0]) if methods else [1]  # those of the most masks
            axes.xaxis.set_major_locator(FixedLocator(apart(counts)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
            axes.set(xlabel="edges cut", ylabel=label)
        handles, names = panels[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=len(names))
    return out


@from_results
def draw_stages(folder: Path | str) -> Path:
    """Share of the logit difference that is left by number of edges kept, along the pruning of a sufficient mask.

    Reads `stages.json` (`faithful`, `stages`: rows of kept and share), writes `stages.png`, both in `folder`.
    """
    folder = Path(folder)
    path, hint = folder / "stages.json", "Make it with ioi/alternative_masks.py --kind sufficient."
    about = read_json(path, hint)
    try:
        rows = np.array([[row["kept"], row["share"]] for row in about["stages"]], float).reshape(-1, 2)
        least = float(about["faithful"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks what is to be drawn ({error!r}). {hint}") from error
    out = folder / "stages.png"
    with figure(out, 4.0, 2.6) as drawn:
        axes = drawn.subplots()
        axes.plot(rows[:, 0], rows[:, 1], color=COLOURS[0], marker=MARKERS[0], markersize=4)
        axes.axhline(least, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(f"{least:.0%}", (1, least), xycoords=("axes fraction", "data"), fontsize=8, va="center")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(apart(np.unique(rows[:, 0]))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.invert_xaxis()
        axes.set(xlabel="edges kept", ylabel="logit difference left")
    return out


@from_results
def draw_models(folder: Path | str) -> Path:
    """Every model of a report, a row a model and a panel a measure, with 95% intervals.

    Reads `report.json` (what `ioi/evaluation.py` writes), writes `report.png`, both in `folder`.
    """
    folder = Path(folder)
    path, hint = folder / "report.json", "Make it with ioi/evaluation.py."
    report = read_json(path, hint)
    models: Mapping[str, Any] = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{path} holds no models. {hint}")
    out = folder / "report.png"
    with figure(out, 7.2, 1.1 + 0.32 * len(models)) as drawn:
        panels = drawn.subplots(1, len(PANELS), sharey=True)
        rows = np.arange(len(models))
        for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
            for row, one in zip(rows, models.values(), strict=True):
                entry = one["measures"].get(key) or {}
                if entry.get("value") is None:
                    continue
                value, low, high = (entry[name] for name in ("value", "low", "high"))
                colour = COLOURS[row % len(COLOURS)]
                axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(value, row, color=colour, marker=MARKERS[row % len(MARKERS)], markersize=5, clip_on=False)
            axes.set_title(label)
            axes.grid(axis="x", visible=True)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(axis="y", length=0)
            if key in ("accuracy", "probability"):
                axes.set_xlim(-0.04, 1.04)
        panels[0].axvline(0, color="#8C8C8C", linewidth=0.7)
        panels[0].set_yticks(rows, [_label(name, one) for name, one in models.items()])
        panels[0].set_ylim(len(models) - 0.5, -0.5)
    return out


def _label(name: str, one: Mapping[str, Any]) -> str:
    return f"{name} ({one['edges_cut']:,} cut)" if one.get("edges_cut") else name
