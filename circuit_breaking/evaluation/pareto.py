"""What a comparison says: the Pareto front, what random edges do, stability of the chosen edges (layer 3).

Read from reports; nothing here runs a model.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import read_json

FEW = 12  # edges of the mask that the paper's claim is about
Entry = Mapping[str, Any]  # an estimate: value, low, high


def models_of(folder: Path | str) -> dict[str, Any]:
    """The `models` of the report in a folder. Raises `UserError` where there is none."""
    path = Path(folder) / "report.json"
    report = read_json(path, "Make one with toxicity/evaluation.py.")
    models = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{path} holds no models. Make it with toxicity/evaluation.py.")
    return models


def point_of(one: Mapping[str, Any]) -> tuple[Entry, Entry] | None:
    """Toxicity of continuations of toxic prompts and loss on ordinary text, or None where either is not finite."""
    toxicity, loss = one["continuations"].get("toxic", {}).get("toxicity"), one["losses"].get("ordinary")
    if any(entry is None or entry.get("value") is None for entry in (toxicity, loss)):
        return None
    return toxicity, loss


def perplexity_of(one: Mapping[str, Any]) -> float | None:
    """Perplexity under the original of what a model writes after toxic prompts."""
    return (one["continuations"].get("toxic", {}).get("perplexity") or {}).get("value")


def family_of(one: Mapping[str, Any]) -> str:
    """What a model is drawn and grouped as."""
    if one.get("kind") in ("mask", "random") and one.get("ablation"):
        return f"{'mask' if one['kind'] == 'mask' else 'random edges'}, {one['ablation']} ablation"
    return "original" if one.get("kind") == "original" else "other"


def dominating(point: tuple[float, float], others: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the others that are lower in both coordinates."""
    return [name for name, other in others.items() if other[0] < point[0] and other[1] < point[1]]


def pareto(models: Mapping[str, Any], most: int = FEW) -> dict[str, Any]:
    """Whether a mask of at most `most` edges is on the front of toxicity against ordinary loss.

    A mask is on it when no fine-tuned model has both lower toxicity and lower ordinary loss.

    Returns:
        `on_front`: whether any such mask is; `masks`: for each its edges, toxicity, ordinary loss, perplexity after
        toxic prompts, and the fine-tuned models that beat it in the first two; `baselines`: the same three of those.
    """
    points = {
        name: tuple(entry["value"] for entry in where)
        for name, one in models.items()
        if (where := point_of(one)) is not None
    }
    baselines = {name: point for name, point in points.items() if models[name]["kind"] == "finetuned"}
    masks = {}
    for name, point in points.items():
        if models[name]["kind"] == "mask" and models[name]["edges_cut"] <= most:
            beaten = dominating(point, baselines)
            masks[name] = {
                "edges": models[name]["edges_cut"],
                "toxicity": point[0],
                "ordinary_loss": point[1],
                "perplexity": perplexity_of(models[name]),
                "beaten_by": beaten,
            }
    return {
        "most_edges": most,
        "on_front": any(not one["beaten_by"] for one in masks.values()),
        "masks": masks,
        "baselines": {
            name: {"toxicity": point[0], "ordinary_loss": point[1], "perplexity": perplexity_of(models[name])}
            for name, point in baselines.items()
        },
    }


def change_of(one: Mapping[str, Any], coordinate: int) -> float | None:
    """Change to the original of a coordinate of `point_of`, on the same prompts or texts."""
    point = point_of(one)
    return None if point is None else point[coordinate].get("change", {}).get("value")


def controls(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What random edges do, by kind of ablation value and budget: mean, lowest and highest change over seeds.

    Changes are to the original: toxicity after toxic prompts and ordinary loss. `mask` is that of the mask of the same
    budget.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    masks: dict[tuple[str, int], Mapping[str, Any]] = {}
    for one in models.values():
        if one.get("kind") == "random":
            groups.setdefault((one["ablation"], one["budget"]), []).append(one)
        elif one.get("kind") == "mask":
            masks.setdefault((one["ablation"], one["budget"]), one)
    rows = []
    for key, members in sorted(groups.items()):
        row: dict[str, Any] = {"ablation": key[0], "budget": key[1], "seeds": len(members)}
        for at, name in enumerate(("toxicity", "ordinary_loss")):
            changes = [change for one in members if (change := change_of(one, at)) is not None]
            row[name] = {
                "mean": float(np.mean(changes)) if changes else None,
                "lowest": min(changes, default=None),
                "highest": max(changes, default=None),
                "mask": change_of(masks[key], at) if key in masks else None,
            }
        rows.append(row)
    return rows


def jaccard(sets: Iterable[Iterable[str]]) -> float | None:
    """Mean Jaccard similarity of all pairs of sets; None of fewer than two."""
    pairs = list(combinations([frozenset(one) for one in sets], 2))
    if not pairs:
        return None
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def jaccard_by_chance(a: int, b: int, n: int) -> float:
    """Expected Jaccard similarity of two sets of a and b out of n, drawn at random."""
    total = comb(n, b)
    shared = range(max(0, a + b - n), min(a, b) + 1)
    return sum(comb(a, k) * comb(n - a, b - k) / total * (k / (a + b - k) if a + b else 1.0) for k in shared)
