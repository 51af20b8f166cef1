"""Whether the behaviour comes back: toxicity during relearning, and with toxic examples in the context."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from circuit_breaking.evaluation.result_files import read_relearning, relearned
from circuit_breaking.figures.style import (
    comparison_styles,
    figure,
    interval_ends,
    legend_below,
    readable,
)

CONTEXTS = {"without": "prompt alone", "with": "after examples"}


def draw_relearning(folder: Path | str) -> Path:
    """Draw toxicity by step of relearning, one panel per number of examples; and with examples in the context.

    Reads `relearning.json` and writes `relearning.png`.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    models = read_relearning(folder)["models"]
    found = relearned(models)
    with_context = any(model.get("few_shot") for model in models.values())
    styles = comparison_styles(folder, models)
    path = folder / "relearning.png"
    with figure(path, 2.4 * max(len(found), 1) + (2.6 if with_context else 0), 3.3 + 0.1 * len(models)) as drawn:
        panels = drawn.subplots(1, max(len(found) + with_context, 1), squeeze=False)[0]
        for axes, (examples, by_model) in zip(panels, found.items(), strict=False):
            for name, all_rows in by_model.items():
                rows = [row for row in all_rows if row["toxicity"]["value"] is not None]
                steps, values = [row["step"] for row in rows], [row["toxicity"]["value"] for row in rows]
                axes.plot(steps, values, markersize=3.5, linewidth=1.1, label=readable(name), **styles[name])
            axes.set(xlabel="step of relearning", title=f"from {examples}", ylim=(-0.03, 1.03))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        if with_context:
            _draw_contexts(panels[-1], models, styles)
        panels[0].set_ylabel("toxicity after toxic prompts, mean")
        legend_below(drawn, panels[0], 4, fontsize=7)
    return path


def _draw_contexts(axes: Axes, models: Mapping[str, Any], styles: Mapping[str, dict[str, str]]) -> None:
    for number, (name, model) in enumerate(models.items()):
        for at, context in enumerate(CONTEXTS):
            entry = (model.get("few_shot") or {}).get(context)
            if entry is not None and entry["value"] is not None:
                axes.errorbar(
                    at + 0.05 * (number - len(models) / 2), entry["value"], yerr=interval_ends(entry), markersize=4,
                    elinewidth=0.8, **{**styles[name], "linestyle": "none"},
                )  # fmt: skip
    axes.set(title="toxic examples in the context", xlim=(-0.6, 1.6), ylim=(-0.03, 1.03))
    axes.set_xticks([0, 1], list(CONTEXTS.values()))
