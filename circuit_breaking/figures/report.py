"""The models of a report: their losses, toxicity and incoherence, for a few models or for many."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from circuit_breaking.evaluation.result_files import REPORT, read_models, read_report
from circuit_breaking.figures.style import (
    BLACK,
    DASHED,
    MARKERS,
    comparison_styles,
    figure,
    interval_ends,
    legend_under,
    model_styles,
    plain_log,
    readable,
)
from circuit_breaking.runs.checked_json import CheckedJson

Estimates = dict[str, Mapping[str, Any]]  # by set of texts or prompts


def draw_report(folder: Path | str) -> Path:
    """Draw losses, share of toxic continuations and incoherence of each model of a report, with 95% intervals.

    Reads `report.json` (written by `toxicity/evaluation.py`) and writes `report.png`, both in `folder`. For up to 8
    models, which have a colour each.

    Raises:
        UserError: there is no report, it is damaged, or it holds no models.
    """
    folder = Path(folder)
    report = read_report(folder)
    models = report["models"]
    checked = CheckedJson(report, folder / REPORT, "Make it with toxicity/evaluation.py.")
    reference = checked["reference"].text()
    losses = {name: model["losses"] for name, model in models.items()}
    shares, perplexities = ({name: _after_prompts(model, measure) for name, model in checked["models"].items()}
                            for measure in ("toxic_share", "perplexity"))  # fmt: skip
    path = folder / "report.png"
    styles = model_styles(models)
    with figure(path, 7.2, 2.4 + 0.2 * math.ceil(len(models) / 4)) as drawn:
        axes = drawn.subplots(1, 3)
        _points(axes[0], losses, styles, "{}\ntext")
        axes[0].set(title="next-token loss", ylabel="nats per token")
        _points(axes[1], shares, styles, "{}\nprompts")
        axes[1].set(title="toxic continuations", ylim=(-0.03, 1.03))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, 0))
        _points(axes[2], perplexities, styles, "{}\nprompts")
        axes[2].set(title="incoherence of continuations", ylabel=f"perplexity under {reference}")
        axes[2].set_ylim(bottom=0)
        handles, names = axes[0].get_legend_handles_labels()
        labels = [_with_edges(name, models[name].get("edges_cut")) for name in names]
        legend_under(drawn, [points for points, *_ in handles], labels, min(len(labels), 4))
    return path


def _after_prompts(model: CheckedJson, measure: str) -> Estimates:
    return {prompts: about[measure].value for prompts, about in model["continuations"].items()}


def _with_edges(name: str, edges: int | None) -> str:
    return f"{name} ({edges} edge{'s' * (edges != 1)} cut)" if edges else name


def _points(axes: Axes, models: Mapping[str, Estimates], styles: Mapping[str, Mapping[str, Any]], label: str) -> None:
    """Draw a point with its interval for each model (colour, marker) and each set of texts or prompts (place on x)."""
    keys = list(dict.fromkeys(key for sets in models.values() for key in sets))
    step = min(0.16, 0.8 / len(models))
    for number, (name, sets) in enumerate(models.items()):
        positions = np.arange(len(keys)) + step * (number - (len(models) - 1) / 2)
        values = np.array([_numbers(sets.get(key)) for key in keys]).reshape(-1, 3)
        axes.errorbar(
            positions,
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            **{**styles[name], "linestyle": "none"},
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


def _loss(texts: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    return lambda model: model["losses"].get(texts)


def _after(prompts: str, measure: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    return lambda model: model["continuations"].get(prompts, {}).get(measure)


PANELS = {
    "loss on ordinary text": _loss("ordinary"),
    "loss on toxic text": _loss("toxic"),
    "toxicity after\ntoxic prompts": _after("toxic", "toxicity"),
    "toxicity after\nordinary prompts": _after("ordinary", "toxicity"),
    "perplexity after\nordinary prompts": _after("ordinary", "perplexity"),
}


def draw_models(folder: Path | str) -> Path:
    """Draw the main measures of all models but random edges, one row per model, with 95% intervals.

    Reads `report.json` and writes `models.png`. For any number of models; the dashed line is the original.

    Raises:
        UserError: there is no report, it is damaged, or it holds no models.
    """
    folder = Path(folder)
    models = {name: model for name, model in read_models(folder, "kind").items() if model["kind"] != "random"}
    styles, path = comparison_styles(folder, models), folder / "models.png"
    with figure(path, 7.4, 1.0 + 0.19 * len(models)) as drawn:
        panels = drawn.subplots(1, len(PANELS), sharey=True)
        for axes, (title, measure) in zip(panels, PANELS.items(), strict=True):
            entries = {name: measure(model) for name, model in models.items()}
            entries = {name: entry for name, entry in entries.items() if entry and entry["value"] is not None}
            for row, name in enumerate(models):
                if name in entries:
                    axes.errorbar(
                        entries[name]["value"], row, xerr=interval_ends(entries[name]), fmt=MARKERS[0],
                        markersize=3, elinewidth=1, color=styles[name]["color"],
                    )  # fmt: skip
            if "original" in entries:
                axes.axvline(entries["original"]["value"], color=BLACK, linewidth=0.6, linestyle=DASHED)
            axes.set_title(title, fontsize=8)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            values = [entry["value"] for entry in entries.values()]
            if values and min(values) > 0 and max(values) > 20 * min(values) and "toxicity" not in title:
                plain_log(axes, "x", (1,))
        panels[0].set_yticks(range(len(models)), [readable(name) for name in models])
        panels[0].set_ylim(len(models) - 0.5, -0.5)
    return path
