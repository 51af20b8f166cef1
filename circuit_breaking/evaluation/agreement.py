"""How far circuits agree: with a known circuit, and with each other.

Shapes: E edges, n circuits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.runs.circuits import Circuit


def auroc(scores: Tensor, known: Tensor, absolute: bool = False) -> float:
    """Area under the ROC curve of scores against a known circuit.

    It is the probability that an edge of the known circuit has a higher score than an edge outside it; equal scores
    count one half. 0.5 is chance, 1 a perfect ranking. (MIB reports the trapezoidal area through ten points of this
    curve; this is the area of the whole curve.)

    Args:
        scores: of the edges [E].
        known: the edges of the known circuit, bool [E].
        absolute: whether scores far below zero count as high.

    Raises:
        UserError: no edge or every edge is in the known circuit.
    """
    scores = (scores.abs() if absolute else scores).detach().cpu().double()
    known = known.cpu().bool()
    inside, outside = int(known.sum()), int((~known).sum())
    if not inside or not outside:
        raise UserError(f"the known circuit has {inside:,} of {len(known):,} edges, so that no ROC curve is defined.")
    # mean rank of each score, from 1: ranks of equal scores are averaged (Mann and Whitney 1947)
    _, group, count = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = (last - (count - 1) / 2)[group]
    return float((rank[known].sum() - inside * (inside + 1) / 2) / (inside * outside))


@dataclass(frozen=True)
class Overlap:
    """Overlap of circuits or masks, in the order of `names`.

    Attributes:
        names: of the circuits.
        shared: number of edges that both keep, int64 [n, n]; on the diagonal each one's own number.
        jaccard: shared edges, as a share of the edges that either keeps, float64 [n, n]; 1 for two empty circuits.
        recall: shared edges, as a share of the edges that the first (the row) keeps, float64 [n, n]; NaN for none.
    """

    names: tuple[str, ...]
    shared: Tensor
    jaccard: Tensor
    recall: Tensor


def overlap_matrix(circuits: Mapping[str, Circuit]) -> Overlap:
    """The overlap of every two circuits by the edges that they keep. For masks that cut few, give `complement()`s.

    Raises:
        UserError: there is no circuit, or the circuits are of different graphs (see `Circuit.of_graph`).
    """
    if not circuits:
        raise UserError("there is no circuit to compare. Give at least one.")
    first = next(iter(circuits.values())).graph
    for name, circuit in circuits.items():
        if circuit.graph != first:
            raise UserError(
                f"{name} is of {circuit.graph}, and the others are of {first}. Compare one model's circuits."
            )
    kept = torch.stack([circuit.kept for circuit in circuits.values()]).double()  # [n, E]
    shared = kept @ kept.T
    sizes = shared.diagonal()
    either = sizes[:, None] + sizes - shared
    jaccard = torch.where(either > 0, shared / either, 1.0)
    return Overlap(tuple(circuits), shared.long(), jaccard, shared / sizes[:, None])
