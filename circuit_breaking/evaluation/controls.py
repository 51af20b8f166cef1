"""Random edges, the control for a choice of edges: as many are cut, drawn evenly from all."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.pareto import change_of, in_sweep
from circuit_breaking.graph import Edge, EdgeGraph


def random_edges(graph: EdgeGraph, count: int, seed: int, budget: int | None = None) -> list[Edge]:
    """Draw `count` different edges of a graph, each with the same probability.

    Args:
        graph: the graph.
        count: how many edges the mask cuts that this is a control for.
        seed: another seed, other edges.
        budget: budget of that mask, so that masks of different budgets get independent controls; None: `count`.

    Raises:
        UserError: the graph has fewer edges.
    """
    if count > len(graph):
        raise UserError(f"{count} random edges were asked for, and {graph} has fewer.")
    return random.Random(f"{seed} {count if budget is None else budget}").sample(graph.edges, count)


def controls(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Summarise the random edges of each sweep, kind of ablation and budget, from the models of a report.

    Returns:
        A row for each: `sweep`, `ablation`, `budget`, the number of `seeds`, and for `toxicity` (after toxic prompts)
        and `ordinary_loss` (in nats) the mean, lowest and highest change from the original model over these seeds, and
        as `mask` the change by the trained mask that the random edges are a control for: that of the same sweep,
        ablation and budget, and of several seeds the first. It is None where there is no such mask, or where the sweep
        compares several methods.
    """
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for model in models.values():
        if model.get("kind") == "random":
            groups.setdefault(_group(model), []).append(model)
    rows = []
    for key, members in sorted(groups.items()):
        row: dict[str, Any] = {"sweep": key[0], "ablation": key[1], "budget": key[2], "seeds": len(members)}
        mask = _mask_of(key, models)
        for coordinate, name in enumerate(("toxicity", "ordinary_loss")):
            changes = [change for model in members if (change := change_of(model, coordinate)) is not None]
            row[name] = {
                "mean": float(np.mean(changes)) if changes else None,
                "lowest": min(changes, default=None),
                "highest": max(changes, default=None),
                "mask": None if mask is None else change_of(mask, coordinate),
            }
        rows.append(row)
    return rows


def _group(model: Mapping[str, Any]) -> tuple[str, str, int]:
    return model.get("sweep") or "", model["ablation"], model["budget"]


def _mask_of(key: tuple[str, str, int], models: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The trained mask that random edges are a control for."""
    masks = [one for one in models.values() if one.get("kind") == "mask" and in_sweep(one) and _group(one) == key]
    if len({one.get("method") for one in masks}) != 1:
        return None
    return min(masks, key=lambda one: one.get("seed") or 0)
