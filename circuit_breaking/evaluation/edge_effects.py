"""Evidence for each cut edge: the effect of restoring it or of cutting it alone; and how stable the choice is."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from torch import nn

from circuit_breaking.evaluation.bootstrap import Sums, estimate
from circuit_breaking.evaluation.compared_models import ComparedModel
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.models.tokens import TokenBatch


def leave_one_out(
    compared: ComparedModel,
    hf: nn.Module,
    texts: Mapping[str, TokenBatch],
    batch_size: int = 32,
    seed: int = 0,
    tick: Callable = lambda: None,
) -> dict[str, Any]:
    """Measure how each cut edge changes the loss on each set of texts.

    Args:
        compared: the model of a mask.
        hf: the original model.
        texts: sets of texts by name.
        batch_size: texts per forward pass.
        seed: of the bootstrap resamples.
        tick: called after each pass over all texts; there are 2 + 2 * len(compared.edges) passes.

    Returns:
        A JSON-able report. `together` holds, by set of texts, the change of the loss when all edges are cut. `edges`
        holds one row per edge: its name, and by set of texts its `restore_effect` (how far the loss falls when only
        this edge is restored and the others stay cut) and its `single_cut_effect` (how far the loss rises when only
        this edge is cut). All changes are in nats, with 95% bootstrap intervals paired by text.
    """

    def losses(cut: list[str]) -> dict[str, Sums]:
        with compared.cut(hf, cut):
            found = {name: text_losses(hf, batch, batch_size) for name, batch in texts.items()}
        tick()
        return found

    def change(after: dict[str, Sums], before: dict[str, Sums]) -> dict[str, Any]:
        return {name: estimate(*after[name], seed, before[name])["change"] for name in texts}

    edges = compared.edges
    original, together = losses([]), losses(edges)
    rows = []
    for edge in edges:
        without = losses([other for other in edges if other != edge])
        rows.append(
            {
                "edge": edge,
                "restore_effect": change(together, without),
                "single_cut_effect": change(losses([edge]), original),
            }
        )
    return {"together": change(together, original), "edges": rows}


def stability(models: list[ComparedModel]) -> list[dict[str, Any]]:
    """Compare masks that were trained with the same budget, ablation and method and with different seeds.

    Masks of different sweeps are not compared with each other.

    Returns:
        One row per budget, ablation, sweep and method with at least two masks: these four (sweep and method where they
        are known), names and numbers of edges of the masks, `jaccard` (mean Jaccard similarity over all pairs of
        masks), `by_chance` (its expectation for as many edges drawn at random), and `chosen_by` (the number of masks
        that cut each edge).
    """
    groups: dict[tuple, list[ComparedModel]] = {}
    for model in models:
        if model.kind == "mask":
            key = ("ablation", "budget", "sweep", "method")
            groups.setdefault(tuple(model.about.get(name) for name in key), []).append(model)
    rows = []
    for (ablation, budget, sweep, method), members in groups.items():
        if len(members) < 2:
            continue
        counts = Counter(edge for model in members for edge in model.edges)
        sizes, n_edges = [len(model.edges) for model in members], members[0].about["n_edges"]
        pairs = list(combinations(sizes, 2))
        rows.append(
            {
                "ablation": ablation,
                "budget": budget,
                **{name: value for name, value in (("sweep", sweep), ("method", method)) if value is not None},
                "masks": [model.name for model in members],
                "sizes": sizes,
                "jaccard": jaccard(model.edges for model in members),
                "by_chance": sum(jaccard_by_chance(a, b, n_edges) for a, b in pairs) / len(pairs),
                "chosen_by": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            }
        )
    return rows


def jaccard(sets: Iterable[Iterable[str]]) -> float | None:
    """Mean Jaccard similarity over all pairs of sets; None for fewer than two sets."""
    pairs = list(combinations([frozenset(members) for members in sets], 2))
    if not pairs:
        return None
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def jaccard_by_chance(a: int, b: int, n: int) -> float:
    """Expected Jaccard similarity of two random sets of a and b out of n elements."""
    total = comb(n, b)
    shared = range(max(0, a + b - n), min(a, b) + 1)
    return sum(comb(a, k) * comb(n - a, b - k) / total * (k / (a + b - k) if a + b else 1.0) for k in shared)
