"""Evidence for each cut edge: what its cut does within the mask and alone; how stable the choice is (layer 3)."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.evaluation.bootstrap import Sums, estimate
from circuit_breaking.evaluation.compared_models import ComparedModel
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.evaluation.pareto import jaccard, jaccard_by_chance
from circuit_breaking.models.tokens import TokenBatch


def leave_one_out(
    hf: nn.Module,
    edges: list[str],
    means: Tensor | None,
    texts: Mapping[str, TokenBatch],
    batch_size: int = 32,
    seed: int = 0,
    tick: Callable = lambda: None,
) -> dict[str, Any]:
    """Measure how each cut edge changes the loss on each set of texts.

    Returns:
        A JSON-able report. `together` holds, by set of texts, the change of the loss when all edges are cut. `edges`
        holds one row per edge: its name, and by set of texts its `restore_effect` (how far the loss falls when only
        this edge is restored and the others stay cut) and its `single_cut_effect` (how far the loss rises when only
        this edge is cut). All changes are in nats, with 95% bootstrap intervals paired by text.
    """

    def losses(cut: list[str]) -> dict[str, Sums]:
        with ablate(hf, cut, means):
            found = {name: text_losses(hf, batch, batch_size) for name, batch in texts.items()}
        tick()
        return found

    def change(after: dict[str, Sums], before: dict[str, Sums]) -> dict[str, Any]:
        return {name: estimate(*after[name], seed, before[name])["change"] for name in texts}

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


def stability(variants: list[ComparedModel]) -> list[dict[str, Any]]:
    """How alike the masks of one budget and ablation are, over the seeds of their training.

    Returns:
        For each budget and ablation of which there are two masks or more: their names and numbers of edges, `jaccard`
        (the mean over all pairs), `by_chance` (that of as many edges drawn at random), and how many of the masks cut
        each edge.
    """
    groups: dict[tuple[str, int], list[ComparedModel]] = {}
    for one in variants:
        if one.kind == "mask":
            groups.setdefault((one.about["ablation"], one.about["budget"]), []).append(one)
    rows = []
    for (ablation, budget), members in groups.items():
        if len(members) < 2:
            continue
        counts = Counter(edge for one in members for edge in one.edges)
        sizes, n = [len(one.edges) for one in members], members[0].about["n_edges"]
        pairs = [(a, b) for i, a in enumerate(sizes) for b in sizes[i + 1 :]]
        rows.append(
            {
                "ablation": ablation,
                "budget": budget,
                "masks": [one.name for one in members],
                "sizes": sizes,
                "jaccard": jaccard(one.edges for one in members),
                "by_chance": sum(jaccard_by_chance(a, b, n) for a, b in pairs) / len(pairs),
                "chosen_by": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            }
        )
    return rows
