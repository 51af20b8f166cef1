"""The mask over a model's edges: one flat parameter, its budget, and its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge, EdgeGraph, describe, from_description
from circuit_breaking.runs.mask_record import MaskRecord
from circuit_breaking.runs.tensors import is_real, read_tensors, write_tensors

HINT = "Make one with toxicity/train_mask.py, or set the path of one."


class EdgeMask(nn.Module):
    """One weight for each edge of a graph, `weights` [E]: 1 keeps the edge, 0 cuts it. All weights are 1 at first."""

    def __init__(self, graph: EdgeGraph, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.graph = graph
        self.weights = nn.Parameter(torch.ones(len(graph), dtype=dtype))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp all weights to [0, 1]."""
        self.weights.clamp_(0, 1)

    @torch.no_grad()
    def round_(self, threshold: float = 0.5) -> None:
        """Set each weight to 1 if it is at least `threshold`, else to 0."""
        self.weights.copy_(self.weights >= threshold)

    @torch.no_grad()
    def keep_budget_(self, max_edges: int) -> None:
        """Make the mask binary: cut the `max_edges` lowest of the weights below 0.5, and keep all other edges."""
        self.weights.copy_(lowest_cut(self.weights, max_edges, threshold=0.5))

    @torch.no_grad()
    def cut_(self, edges: list[str] | list[Edge]) -> None:
        """Cut the named edges and leave all others unchanged. Raises `UserError` if an edge does not exist."""
        self.weights[[self.graph.index(edge) for edge in edges]] = 0.0

    @torch.no_grad()
    def reset_(self) -> None:
        """Keep every edge."""
        self.weights.fill_(1.0)

    def n_cut(self) -> int:
        """Number of edges that `round_` would cut."""
        return int((self.weights < 0.5).sum())

    def cut_edges(self) -> list[Edge]:
        """Names of the edges that `round_` would cut, in the order of the graph."""
        return [self.graph.edges[index] for index in (self.weights < 0.5).nonzero()[:, 0].tolist()]


def lowest_cut(scores: Tensor, count: int, threshold: float = float("inf")) -> Tensor:
    """A binary mask [E] that cuts the `count` edges with the lowest scores [E], of those below `threshold`.

    Among equal scores, the edge that comes first in the graph is cut first.
    """
    mask = torch.ones_like(scores)
    order = lowest(scores, count)
    mask[order[scores[order] < threshold]] = 0.0
    return mask


def lowest(scores: Tensor, count: int) -> Tensor:
    """Indices [count] of the lowest scores [E], in rising order; equal scores stay in the order of the edges."""
    # a stable sort, because the choice of topk among equal scores differs between devices
    return scores.sort(stable=True).indices[: max(count, 0)]


def save_mask(path: Path | str, model: Any, record: MaskRecord | None = None) -> None:
    """Write the model's mask weights to a safetensors file.

    Args:
        path: the file, usually `mask.safetensors`.
        model: an `EdgeMaskedTransformer`.
        record: how the mask was made. The model's name, graph and `ablate_from` are filled in; without `record` the
            file has only those.

    Raises:
        UserError: the model has ablation values and the record says that they are zero, or the other way round; or one
            of them says that they are outputs on counterfactuals, and the other one does not.
    """
    record = record or MaskRecord()
    record = replace(record, model=model.name or "", graph=describe(model.graph), ablate_from=model.ablate_from)
    kind, has_means = record.ablation_value.kind, record.ablation_value.path is not None
    if model.resample != (kind == "counterfactual"):
        raise UserError(
            f"the record of {path} says that cut edges carry {kind}, and model.resample is {model.resample}. Give "
            f"MaskRecord(ablation_value=value_in(file, resample={model.resample})), where file holds model.means."
        )
    if (model.means is None) == (has_means if model.resample else kind != "zero"):
        raise UserError(
            f"the record of {path} says that cut edges carry {kind}, and model.means says "
            "otherwise. Write means to a file with save_means and give MaskRecord(ablation_value=value_in(file))."
        )
    write_tensors(path, {"weights": model.mask.weights}, record.to_json())


def read_mask_record(path: Path | str, hint: str = HINT) -> MaskRecord:
    """How the mask in a file was made. Raises `UserError` if the file is missing, damaged, or holds no mask."""
    return MaskRecord.from_json(read_tensors(path, hint)[1], path, hint)


def read_cut_edges(path: Path | str, hint: str = HINT) -> tuple[list[Edge], MaskRecord]:
    """Names of the edges that the mask in a file cuts, in the graph's order, and the file's record. Needs no model.

    Raises:
        UserError: the file is missing or damaged, or holds no mask.
    """
    tensors, header = read_tensors(path, hint)
    record, weights = MaskRecord.from_json(header, path, hint), tensors.get("weights")
    if not is_real(weights):
        raise UserError(f"{path} holds no edge mask. {hint}")
    if weights.shape != (record.graph.get("n_edges"),):
        raise UserError(f"{path} holds a mask of another shape than its graph. {hint}")
    try:
        graph = from_description(record.graph)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {hint}") from None
    return [graph.edges[index] for index in (weights < 0.5).nonzero()[:, 0].tolist()], record


def load_mask(path: Path | str, model: Any) -> MaskRecord:
    """Read a mask and its `ablate_from` into the model, and return the file's record.

    The model's ablation values stay unchanged.

    Raises:
        UserError: the file is missing or damaged, or was made for a model of another shape, or its `ablate_from`
            differs from that of a model which has ablation values, because these were made for the model's.
    """
    tensors, header = read_tensors(path, HINT)
    weights, ours = tensors.get("weights"), describe(model.graph)
    if weights is None:
        raise UserError(f"{path} holds no edge mask. {HINT}")
    record = MaskRecord.from_json(header, path, HINT)
    theirs = record.graph
    if theirs != ours or weights.shape != model.mask.weights.shape:
        differing = [f"{key} {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]]
        raise UserError(
            f"{path} was made for another model ({record.model}: {', '.join(differing) or 'another count'}). "
            "Load that model, or make a mask for this one."
        )
    if not is_real(weights) or weights.min() < 0 or weights.max() > 1:
        raise UserError(f"{path} holds weights outside [0, 1]. {HINT}")
    if record.ablate_from != model.ablate_from and model.means is not None:
        raise UserError(
            f"{path} was made with ablate_from {record.ablate_from}, and the model's means for {model.ablate_from}. "
            "Load the mask before the means, and means that were made for it."
        )
    try:
        model.ablate_from = record.ablate_from
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    with torch.no_grad():
        model.mask.weights.copy_(weights)
    return record
