"""Records of a ranking of edges, and of the curve of losses by budget."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from circuit_breaking.runs.mask_record import AblationValueRecord
from circuit_breaking.runs.records import Record
from circuit_breaking.runs.results import Results

RANKING, CURVE = "ranking.safetensors", "curve.json"


@dataclass(kw_only=True)
class RankingRecord(Record):
    """How a ranking of edges was made; lies in the header of `ranking.safetensors`.

    Attributes:
        model, graph, method, seed, ablation_value, ablate_from, provenance: as for `MaskRecord`.
    """

    NAME: ClassVar[str] = "ranking"
    model: str = ""
    graph: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    seed: int | None = None
    ablation_value: AblationValueRecord = field(default_factory=AblationValueRecord)
    ablate_from: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Curve(Results):
    """`curve.json`: held-out losses by budget.

    Attributes:
        original: losses with all edges, by set of texts ("toxic", "ordinary").
        rows: a row for each budget: `budget`, the largest number of edges to cut; `edges_cut`, how many are; these
            losses; and `gain`, by how much the objective is lower than with all edges.
    """

    NAME: ClassVar[str] = "curve"
    original: dict[str, float]
    rows: list[dict[str, float]]
