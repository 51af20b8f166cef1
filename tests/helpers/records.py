"""A graph and two of its edges, for records of masks; and damage to records of ablated models."""

from circuit_breaking.graph import EdgeGraph, describe

EDGES = ["embed->a1.0", "a0.1->m1"]
SHAPE = describe(EdgeGraph(3, 3))


def damage_record(refused, where=""):
    """Damage the record of a saved ablated model, of any release.

    `refused(message, **changes)` writes the record with changes, and checks that it is refused with this message.
    """
    refused(f"{where}holds a record of 'other'", record="other")
    refused("is version 2 of the format", version=2)
    refused("is version None of the format", version=None)
    refused("holds a record of 'kept edges'", record="kept edges")
    refused("holds 'more', which the format does not have", more=1)
    refused("damaged: its 'edges' is not list", edges="m0->m1")
    refused("damaged: its 'edges' is not list", edges=[1])
    refused("damaged", ablation="something")
    refused("no edge 'm9->m1'", edges=["m9->m1"])
