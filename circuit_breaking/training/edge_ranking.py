"""Edges in the order in which they are worth cutting: one result for every budget, and its file.

Shapes: E edges.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge, EdgeGraph, describe, from_description
from circuit_breaking.runs.ranking_record import RankingRecord
from circuit_breaking.runs.tensors import is_real, read_tensors, write_tensors

HINT = "Make one with toxicity/train_mask.py."


@dataclass(frozen=True)
class EdgeRanking:
    """The edges that may be cut, in the order in which they are worth cutting.

    Attributes:
        graph: the graph of the edges.
        order: indices of the edges, int64 [number of ranked edges] on the CPU: the edge to cut first comes first.
        scores: their scores, in the same order, so they never rise.
    """

    graph: EdgeGraph
    order: Tensor
    scores: Tensor

    @classmethod
    def of_scores(cls, graph: EdgeGraph, scores: Tensor) -> "EdgeRanking":
        """The ranking by scores [E]; edges with a score of minus infinity are left out.

        Equal scores stay in the order of the graph.
        """
        scores = scores.detach().cpu()
        order = scores.sort(descending=True, stable=True).indices
        order = order[scores[order] > float("-inf")]
        return cls(graph, order, scores[order])

    def __len__(self) -> int:
        return len(self.order)

    @property
    def edges(self) -> list[Edge]:
        """The ranked edges, the one to cut first at the beginning."""
        return [self.graph.edges[index] for index in self.order.tolist()]

    def mask(self, count: int) -> Tensor:
        """A binary mask [E], on the CPU, that cuts the first `count` edges.

        Raises:
            UserError: `count` is negative, or more edges than are ranked.
        """
        if not 0 <= count <= len(self):
            raise UserError(f"{count} edges cannot be cut: the ranking holds {len(self):,}. Give 0 to {len(self):,}.")
        mask = torch.ones(len(self.graph))
        mask[self.order[:count]] = 0.0
        return mask


def save_ranking(
    path: Path | str, model: EdgeMaskedTransformer, ranking: EdgeRanking, record: RankingRecord | None = None
) -> None:
    """Write a ranking to a safetensors file: `order` and `scores`.

    Args:
        path: the file, usually `ranking.safetensors`.
        model: the model whose edges they are.
        ranking: the ranking.
        record: how it was made. The model's name, graph and `ablate_from` are filled in.
    """
    record = record or RankingRecord()
    record = replace(record, model=model.name or "", graph=describe(model.graph), ablate_from=model.ablate_from)
    write_tensors(path, {"order": ranking.order, "scores": ranking.scores}, record.to_json())


def load_ranking(path: Path | str, hint: str = HINT) -> tuple[EdgeRanking, RankingRecord]:
    """The ranking in a file and the file's record. Needs no model.

    Raises:
        UserError: the file is missing or damaged, or holds no ranking.
    """
    tensors, header = read_tensors(path, hint)
    record = RankingRecord.from_json(header, path, hint)
    try:
        graph = from_description(record.graph)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {hint}") from None
    order, scores = tensors.get("order"), tensors.get("scores")
    fits = order is not None and is_real(scores) and order.shape == scores.shape and order.dim() == 1
    if not fits or order.dtype != torch.int64 or len(order.unique()) < len(order):
        raise UserError(f"{path} holds no ranking of edges. {hint}")
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(graph):
        raise UserError(f"{path} ranks edges that its graph does not have. {hint}")
    return EdgeRanking(graph, order, scores), record
