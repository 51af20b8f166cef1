"""Loss of each model against the toxicity of the text: the paper's figure."""

from pathlib import Path

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import running_mean
from circuit_breaking.evaluation.pareto import MAX_EDGES, family_of
from circuit_breaking.evaluation.result_files import REPORT, UNIFORM, read_models
from circuit_breaking.figures.style import figure, model_styles, readable
from circuit_breaking.runs.files import read_csv

HINT = "Make it with toxicity/evaluation.py."
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
    toxicity, losses = _read_losses(folder / UNIFORM)
    names = names or tuple(_chosen(folder, list(losses)))
    if missing := [name for name in names if name not in losses]:
        raise UserError(f"{folder / UNIFORM} has no column {missing[0]!r}; there are {', '.join(losses)}.")
    styles = model_styles(_families(folder, names))
    at, path = np.linspace(0, 1, 51), folder / "loss_by_toxicity.png"
    with figure(path, 5.6, 3.4) as drawn:
        axes = drawn.subplots()
        for name in names:
            finite = ~np.isnan(losses[name])
            if not finite.any():
                continue
            mean, low, high = running_mean(toxicity[finite], losses[name][finite], at, width)
            colour = styles[name]["color"]
            axes.plot(at, mean, color=colour, label=readable(name))
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel="toxicity of the text", ylabel="loss, nats per token", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        drawn.legend(loc="outside right upper")
    return path


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


def _families(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Families of the models, which have their styles; without a report only the original is known."""
    models = read_models(folder, "kind") if (folder / REPORT).is_file() else {"original": {"kind": "original"}}
    return {name: family_of(models.get(name, {})) for name in names}


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
            best = largest.get(family_of(model))
            if best is None or model["edges_cut"] > models[best]["edges_cut"]:
                largest[family_of(model)] = name
    return [name for name in names if models[name]["kind"] != "mask" or name in largest.values()]
