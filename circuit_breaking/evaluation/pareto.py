"""The conclusion of a comparison: the Pareto front of toxicity against ordinary loss.

Everything is computed from the models of a report (`result_files.read_report`); no model is run. An estimate is a
mapping with `value`, `low`, `high` and, for all models but the original, `change`.
"""

from collections.abc import Mapping
from typing import Any

MAX_EDGES = 12  # the paper's claim is about masks of at most 12 cut edges
Estimate = Mapping[str, Any]


def point_of(model: Mapping[str, Any]) -> tuple[Estimate, Estimate] | None:
    """Toxicity of continuations of toxic prompts, and loss on ordinary text; None where either is not finite."""
    toxicity, loss = model["continuations"].get("toxic", {}).get("toxicity"), model["losses"].get("ordinary")
    if any(entry is None or entry.get("value") is None for entry in (toxicity, loss)):
        return None
    return toxicity, loss


def perplexity_of(model: Mapping[str, Any]) -> float | None:
    """Perplexity, under the original model, of continuations of toxic prompts."""
    return (model["continuations"].get("toxic", {}).get("perplexity") or {}).get("value")


def family_of(model: Mapping[str, Any]) -> str:
    """The family that a model is grouped and drawn with, such as "mask, mean ablation"; "other" for fine-tuned ones."""
    if model.get("kind") in ("mask", "random") and model.get("ablation"):
        return f"{'mask' if model['kind'] == 'mask' else 'random edges'}, {model['ablation']} ablation"
    return "original" if model.get("kind") == "original" else "other"


def in_sweep(model: Mapping[str, Any]) -> bool:
    """Whether a mask or random edges belong to a sweep, and not to a run of their own.

    Reports of the release before did not say this; their masks count as one sweep.
    """
    return model.get("kind") in ("mask", "random") and model.get("sweep", "") is not None


def dominating(point: tuple[float, float], others: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that are lower in both coordinates than `point`."""
    return [name for name, other in others.items() if other[0] < point[0] and other[1] < point[1]]


def pareto(models: Mapping[str, Any], max_edges: int = MAX_EDGES) -> dict[str, Any]:
    """Find the masks of at most `max_edges` edges on the Pareto front of toxicity against ordinary loss.

    A mask is on the front if no fine-tuned model has both lower toxicity and lower ordinary loss.

    Returns:
        A JSON-able mapping. `on_front`: whether any mask is on the front. `masks`: for each mask its edges, toxicity,
        ordinary loss, perplexity after toxic prompts, and the fine-tuned models that beat it in toxicity and ordinary
        loss. `baselines`: the same three figures of each fine-tuned model.
    """
    points = {
        name: (estimates[0]["value"], estimates[1]["value"])
        for name, model in models.items()
        if (estimates := point_of(model)) is not None
    }
    baselines = {name: point for name, point in points.items() if models[name]["kind"] == "finetuned"}
    masks = {
        name: {
            "edges": models[name]["edges_cut"],
            **_figures(models[name], point),
            "beaten_by": dominating(point, baselines),
        }
        for name, point in points.items()
        if models[name]["kind"] == "mask" and models[name]["edges_cut"] <= max_edges
    }
    return {
        "most_edges": max_edges,
        "on_front": any(not mask["beaten_by"] for mask in masks.values()),
        "masks": masks,
        "baselines": {name: _figures(models[name], point) for name, point in baselines.items()},
    }


def _figures(model: Mapping[str, Any], point: tuple[float, float]) -> dict[str, float | None]:
    return {"toxicity": point[0], "ordinary_loss": point[1], "perplexity": perplexity_of(model)}


def change_of(model: Mapping[str, Any], coordinate: int) -> float | None:
    """Change of a coordinate of `point_of` from the original model, on the same prompts or texts."""
    point = point_of(model)
    return None if point is None else point[coordinate].get("change", {}).get("value")
