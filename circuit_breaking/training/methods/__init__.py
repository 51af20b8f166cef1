"""Ways to find the edges that are worth cutting: one file each, and one line in `METHODS`.

First file to read: `base`, the interface. This file is read before torch is imported, for the choices of `--method`.
"""

from importlib import import_module

HERE = "circuit_breaking.training.methods"

# name -> "module:class", or the class itself
METHODS: dict[str, str | type] = {
    "ranking": f"{HERE}.ranking:EdgeScores",
    "clamped": f"{HERE}.clamped:ClampedWeights",
    "hard-concrete": f"{HERE}.hard_concrete:HardConcreteGates",
    "ugs": f"{HERE}.ugs:UniformGradientSampling",
    "attribution": f"{HERE}.attribution:Attribution",
}
GIVEN = "given"  # for code alone: cuts all edges that may be cut, so scripts that look for edges do not offer it


def method_class(name: str) -> type:
    """The class of a method of `METHODS`, or of `GIVEN`: a `MaskMethod`."""
    entry = f"{HERE}.given:GivenEdges" if name == GIVEN else METHODS[name]
    if isinstance(entry, str):
        module, attribute = entry.split(":")
        entry = getattr(import_module(module), attribute)
    return entry
