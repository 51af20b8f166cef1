"""A graph and two of its edges, for records of masks."""

from circuit_breaking.graph import EdgeGraph, describe

EDGES = ["embed->a1.0", "a0.1->m1"]
SHAPE = describe(EdgeGraph(3, 3))
