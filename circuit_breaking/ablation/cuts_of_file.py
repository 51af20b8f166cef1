"""What `ablate` cuts when it is given a file: the edges, what they carry, and from which position on."""

from pathlib import Path

from torch import Tensor

from circuit_breaking.engine.ablation_values import read_value
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge, EdgeGraph
from circuit_breaking.runs.circuit_files import read_edges_to_cut


def read_cuts(
    path: Path | str, graph: EdgeGraph, means: Tensor | None, ablate_from: int
) -> tuple[list[Edge], Tensor | None, int]:
    """The edges to cut, their ablation values and the first position at which the cuts act.

    The file of a mask says all three. Other files of circuits name edges only.

    Args:
        path: the file of a circuit (`runs.circuit_files`).
        graph: the graph of the model.
        means: ablation values [P, D] in place of those that a mask's file names. None: those of the file.
        ablate_from: first position at which the cuts act. 0 with the file of a mask: that of the mask.

    Raises:
        UserError: the file is missing or damaged or of a graph of another shape; or the ablation values of a mask are
            missing, have changed since its training, or were made for another first position; or `ablate_from` differs
            from the mask's.
    """
    edges = read_edges_to_cut(path, graph)
    if Path(path).suffix != ".safetensors":
        return edges, means, ablate_from
    record = read_mask_record(path)
    if ablate_from not in (0, record.ablate_from):
        raise UserError(
            f"{path} was made with ablate_from {record.ablate_from}, and {ablate_from} is given. Do not give "
            "ablate_from with this file."
        )
    if means is None:
        means = read_value(record.ablation_value, path, record.ablate_from)
    return edges, means, record.ablate_from
