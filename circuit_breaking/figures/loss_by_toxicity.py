"""Loss of each model against the toxicity of the text: the paper's figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import running_mean
from circuit_breaking.evaluation.pareto import MAX_EDGES, family_of, in_sweep
from circuit_breaking.evaluation.result_files import ORIGINAL, REPORT, UNIFORM, read_models
from circuit_breaking.figures.style import comparison_styles, figure, readable
from circuit_breaking.runs.files import read_csv

HINT = "Make it with toxicity/evaluation.py."
FAR = 2.0  # times the highest curve of the masks, from which on fine-tuned models have another panel
MOST_LINES = 8  # more models than this are reduced to the most telling ones


def draw_loss_by_toxicity(folder: Path | str, names: tuple[str, ...] | None = None, width: float = 0.15) -> Path:
    """Draw each model's loss against the toxicity of a text: a running mean and its 95% bootstrap band.

    Reads `uniform.csv` (one row per text: its toxicity, and the loss per token of each model) and, for the families of
    the models, `report.json` if it is there; with more than 8 models it must be there. Writes `loss_by_toxicity.png`.

    Args:
        folder: the run folder.
        names: the models to draw; None draws all if they are at most 8, and otherwise the original, the fine-tuned
            models, and of each ablation the largest mask of at most 12 edges.
        width: half the width of the running mean's triangular kernel, in units of toxicity.

    Raises:
        UserError: the file is missing, damaged or empty.
    """
    folder = Path(folder)
    at, curves, about = read_curves(folder, names, width)
    styles, path = comparison_styles(folder, about), folder / "loss_by_toxicity.png"
    panels = _panels(curves, {name for name in about if about[name].get("kind") == "finetuned"})
    with figure(path, 3.2 * len(panels) + 2.4, 3.4) as drawn:
        drawn_axes = drawn.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, shown) in zip(drawn_axes, panels.items(), strict=True):
            for name in shown:
                mean, low, high = curves[name]
                style = {key: styles[name][key] for key in ("color", "linestyle")}
                axes.plot(at, mean, label=readable(name), **style)
                axes.fill_between(at, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.set(xlabel="toxicity of the text", xlim=(0, 1), title=title)
            if len(panels) == 1:
                axes.set_ylim(bottom=0)
        drawn_axes[0].set_ylabel("loss, nats per token")
        handles = {}
        for axes in drawn_axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        drawn.legend(handles.values(), handles.keys(), loc="outside right upper")
    return path


def read_curves(
    folder: Path, names: tuple[str, ...] | None = None, width: float = 0.15
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The running means of `draw_loss_by_toxicity`, whose arguments and errors these are.

    Returns:
        The toxicities [51] at which the means are; by model the mean loss and the ends of its interval, [3, 51]; and
        what the report says of each model.
    """
    toxicity, losses = _read_losses(folder / UNIFORM)
    names = names or tuple(_chosen(folder, list(losses)))
    if missing := [name for name in names if name not in losses]:
        raise UserError(f"{folder / UNIFORM} has no column {missing[0]!r}; there are {', '.join(losses)}.")
    at, curves = np.linspace(0, 1, 51), {}
    for name in names:
        finite = ~np.isnan(losses[name])
        if finite.any():
            curves[name] = running_mean(toxicity[finite], losses[name][finite], at, width)
    return at, curves, _about(folder, names)


def _panels(curves: Mapping[str, np.ndarray], tuned: set[str]) -> dict[str, list[str]]:
    """Names of the models of each panel, by title: all in one, or fine-tuned ones apart from masks on another scale."""
    others = [name for name in curves if name not in tuned]
    highest = {name: np.nanmax(curve[0], initial=0.0) for name, curve in curves.items()}
    if len(others) < 2 or max((highest[name] for name in tuned & set(curves)), default=0) <= FAR * max(
        highest[name] for name in others
    ):
        return {"": list(curves)}
    beside = [name for name in curves if name in tuned or name == ORIGINAL]
    return {"masks": others, "fine-tuned models": beside}


def _read_losses(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Toxicity of each text [n], and by model the loss per token of each text [n], NaN where it was not finite."""
    rows = read_csv(path, HINT)
    if not rows:
        raise UserError(f"{path} holds no rows. {HINT}")
    try:
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
        return columns.pop("toxicity"), columns
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of loss by toxicity ({error!r}). {HINT}") from error


def _about(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What the report says of the models; nothing where there is none."""
    models = read_models(folder, "kind") if (folder / REPORT).is_file() else {}
    return {name: models.get(name, {}) for name in names}


def _chosen(folder: Path, names: list[str]) -> list[str]:
    """The models to draw: not masks of every budget, only the largest of each ablation within `MAX_EDGES`."""
    if len(names) <= MOST_LINES:
        return names
    models = read_models(folder, "kind", "edges_cut")
    if missing := [name for name in names if name not in models]:
        raise UserError(f"{folder / REPORT} lacks the model {missing[0]} of {UNIFORM}. {HINT}")
    largest: dict[str, str] = {}
    for name in names:
        model = models[name]
        if model["kind"] == "mask" and model["edges_cut"] <= MAX_EDGES:
            family = family_of(model) if in_sweep(model) else name  # a mask that was trained by itself is drawn
            best = largest.get(family)
            if best is None or model["edges_cut"] > models[best]["edges_cut"]:
                largest[family] = name
    return [name for name in names if models[name]["kind"] != "mask" or name in largest.values()]
