"""Completeness and minimality of a circuit (Wang et al. 2022, section 4), for circuits of few nodes or edges.

With m a metric of the kept edges, C the circuit and N the whole model, both measured without a set K of its parts:

    completeness  |m(C without K) - m(N without K)|, for many sets K. Large where the model has a part outside C that
                  takes over when K is cut.
    minimality    |m(C without K) - m(C without K and v)|, for each part v of C and the set K for which it is largest.
                  Small where the circuit does not need v.

A part is an edge, or a node with all its edges. Both checks cost a forward pass for each set.

Shapes: E edges, S sets.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.graph import edge_nodes
from circuit_breaking.runs.circuits import Circuit

KeptMetric = Callable[[Tensor], float]  # of the kept edges, bool [E]


@dataclass(frozen=True)
class Completeness:
    """One set of parts that is cut: the metric of the circuit and of the whole model without it."""

    without: tuple[str, ...]
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        """How far the two are from each other."""
        return abs(self.circuit - self.model)


def edge_parts(circuit: Circuit) -> dict[str, Tensor]:
    """Each kept edge as a part: its name, and the edge alone, bool [E]."""
    found = {}
    for index in circuit.kept.nonzero()[:, 0].tolist():
        found[str(circuit.graph.edges[index])] = one = torch.zeros_like(circuit.kept)
        one[index] = True
    return found


def node_parts(circuit: Circuit) -> dict[str, Tensor]:
    """Each head and MLP with a kept edge as a part: its name, and all edges of the graph in and out of it, bool [E]."""
    graph = circuit.graph
    sources, readers = graph.edge_sources, edge_nodes(graph)
    touched = torch.cat([sources[circuit.kept], readers[circuit.kept]]).unique().tolist()
    nodes = [node for node in touched if 0 < node < len(graph.sources)]  # neither embed nor output
    return {graph.sources[node]: (sources == node) | (readers == node) for node in nodes}


def random_sets(parts: Iterable[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """`count` random sets of parts, the first of them empty; each part is in a set with probability 1/2."""
    parts, draw = list(parts), random.Random(seed)
    return [(), *(tuple(part for part in parts if draw.random() < 0.5) for _ in range(count - 1))][:count]


def completeness(
    metric: KeptMetric, circuit: Circuit, parts: Mapping[str, Tensor], sets: Sequence[Sequence[str]]
) -> list[Completeness]:
    """Compare the circuit and the whole model without each set of parts.

    Args:
        metric: of the kept edges.
        circuit: the circuit.
        parts: the edges of each part, bool [E] (`edge_parts`, `node_parts`).
        sets: names of the parts that are cut together (`random_sets`).

    Raises:
        UserError: a set names something that is no part of the circuit.
    """
    everything = torch.ones_like(circuit.kept)
    rows = []
    for names in sets:
        cut = _union(parts, names, circuit)
        rows.append(Completeness(tuple(names), metric(circuit.kept & ~cut), metric(everything & ~cut)))
    return rows


def minimality(
    metric: KeptMetric, circuit: Circuit, parts: Mapping[str, Tensor], sets: Sequence[Sequence[str]] = ((),)
) -> dict[str, float]:
    """What each part adds to the circuit: the largest change of the metric that cutting it makes, over the sets.

    Args, raises: as `completeness`. By default nothing else is cut.
    """
    found = dict.fromkeys(parts, 0.0)
    for names in sets:
        kept = circuit.kept & ~_union(parts, names, circuit)
        without = metric(kept)
        for part, edges in parts.items():
            if part not in names:
                found[part] = max(found[part], abs(without - metric(kept & ~edges)))
    return found


def _union(parts: Mapping[str, Tensor], names: Sequence[str], circuit: Circuit) -> Tensor:
    cut = torch.zeros_like(circuit.kept)
    for name in names:
        if name not in parts:
            raise UserError(f"{name!r} is no part of the circuit; its parts are {', '.join(list(parts)[:5])}, ...")
        cut |= parts[name]
    return cut
