"""Losses, toxicity and incoherence of every model of a report."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, MARKERS, figure, from_results
from circuit_breaking.runs.files import read_json


@from_results
def draw_report(folder: Path | str) -> Path:
    """Losses, toxic share and incoherence of every model of a report, with 95% intervals.

    Reads `report.json` (what `toxicity/evaluation.py` writes), writes `report.png`, both in `folder`.

    Raises:
        UserError: there is no report, or it holds no models.
    """
    folder = Path(folder)
    report = read_json(folder / "report.json", "Make one with toxicity/evaluation.py.")
    models = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{folder / 'report.json'} holds no models. Make it with toxicity/evaluation.py.")
    path = folder / "report.png"
    with figure(path, 7.2, 2.4 + 0.2 * math.ceil(len(models) / 4)) as drawn:
        axes = drawn.subplots(1, 3)
        after = {
            measure: {
                name: {key: about[measure] for key, about in one["continuations"].items()}
                for name, one in models.items()
            }
            for measure in ("toxic_share", "perplexity")
        }
        _points(axes[0], {name: one["losses"] for name, one in models.items()}, "{}\ntext")
        axes[0].set(title="next-token loss", ylabel="nats per token")
        _points(axes[1], after["toxic_share"], "{}\nprompts")
        axes[1].set(title="toxic continuations", ylim=(-0.03, 1.03))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, 0))
        _points(axes[2], after["perplexity"], "{}\nprompts")
        axes[2].set(title="incoherence of continuations", ylabel=f"perplexity under {report['reference']}")
        axes[2].set_ylim(bottom=0)
        handles, names = axes[0].get_legend_handles_labels()
        labels = [_label(name, models[name].get("edges_cut")) for name in names]
        drawn.legend([points for points, *_ in handles], labels, loc="outside lower center", ncols=min(len(labels), 4))
    return path


def _label(name: str, edges: int | None) -> str:
    return f"{name} ({edges} edge{'s' * (edges != 1)} cut)" if edges else name


def _points(axes: Any, models: Mapping[str, Mapping[str, Any]], label: str) -> None:
    """A point with its interval for every model (colour) and every set (place on the x axis)."""
    keys = list(dict.fromkeys(key for sets in models.values() for key in sets))
    step = min(0.16, 0.8 / len(models))
    for number, (name, sets) in enumerate(models.items()):
        places = np.arange(len(keys)) + step * (number - (len(models) - 1) / 2)
        values = np.array([_numbers(sets.get(key)) for key in keys]).reshape(-1, 3)
        axes.errorbar(
            places,
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=4.5,
            elinewidth=1.2,
            capsize=2,
            label=name,
            clip_on=False,
        )
    axes.set_xticks(range(len(keys)), [label.format(key) for key in keys])
    axes.set_xlim(-0.5, max(len(keys), 1) - 0.5)
    axes.tick_params(axis="x", length=0)


def _numbers(entry: Mapping[str, Any] | None) -> list[float]:
    numbers = [(entry or {}).get(name) for name in ("value", "low", "high")]
    return [np.nan if number is None else number for number in numbers]  # NaN is not drawn
