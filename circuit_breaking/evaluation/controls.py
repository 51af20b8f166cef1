"""Controls: random edges for a choice of edges, and for learned constants the same constants without the cut.

A cut edge with a learned constant μ_i changes what its reader gets in two ways: what the node writes is removed, and a
constant is put in its place. With x̄_i, the mean output of node i, the change splits exactly:

    Σ_cut (μ_i - x_i)  =  Σ_cut (μ_i - x̄_i)  +  Σ_cut (x̄_i - x_i)
                          bias                  mean

`bias` adds the first part alone: each reader gets a constant vector, Σ_i x_i + Σ_cut (μ_i - x̄_i), and no edge is cut.
`mean` is the second part alone: mean ablation of the same edges. `added` adds the constants as they are, Σ_i x_i +
Σ_cut μ_i, so that the mean of what a reader gets is another one than with the mask.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

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


# what each control with a mask's edges is, and whether the edges are cut
OF_CONSTANTS = {
    "bias": ("what the constants of {} change on average, at the same readers, without the cut", False),
    "added": ("the constants of {} at the same readers, without the cut", False),
    "mean": ("mean ablation of the edges of {}, without its constants", True),
}


def control_values(name: str, constants: Tensor, means: Tensor) -> Tensor:
    """The values [P, D] of a control of `OF_CONSTANTS`, of a mask's learned constants and of mean outputs."""
    return {"bias": constants - means, "added": constants, "mean": means}[name]


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
