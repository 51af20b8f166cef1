"""What `ablate` cuts when it is given a file: the edges, what they carry, and from which position on."""

from pathlib import Path

from torch import Tensor

from circuit_breaking.engine.ablation_values import read_value
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.graph import Edge, EdgeGraph
from circuit_breaking.runs.circuit_files import read_edges_to_cut


def read_cuts(
    path: Path | str, graph: EdgeGraph, means: Tensor | None, ablate_from: int | None
) -> tuple[list[Edge], Tensor | None, int | None]:
    """The edges to cut, their ablation values and the first position at which the cuts act.

    The file of a mask says all three. Other files of circuits name edges only.

    Args:
        path: the file of a circuit (`runs.circuit_files`).
        graph: the graph of the model.
        means: ablation values [P, D] in place of those that a mask's file names. None: those of the file.
        ablate_from: first position in place of that of a mask's file. None: that of the file.

    Raises:
        UserError: the file is missing or damaged or of a graph of another shape; or the ablation values of a mask are
            missing, have changed since its training, or were made for another first position.
    """
    edges = read_edges_to_cut(path, graph)
    if Path(path).suffix != ".safetensors":
        return edges, means, ablate_from
    record = read_mask_record(path)
    ablate_from = record.ablate_from if ablate_from is None else ablate_from
    if means is None:
        means = read_value(record.ablation_value, path, ablate_from)
    return edges, means, ablate_from
