"""Random edges, the control for a choice of edges: as many are cut, drawn evenly from all."""

import random

from circuit_breaking.errors import UserError
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
