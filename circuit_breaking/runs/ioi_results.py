"""Records of results that the indirect-object scripts write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from circuit_breaking.graph import EdgeGraph, describe
from circuit_breaking.runs.records import Record
from circuit_breaking.runs.results import Results

IOI_REPORT, IOI_COMPARISON = "ioi_report.json", "ioi_comparison.json"
MASK_GRADIENTS = "integrated mask gradients"
OLD_NAMES = {"EAP-IG": MASK_GRADIENTS}  # of ways to score edges, in version 1 of the records


def renamed(by_way: Any) -> Any:
    """A mapping from ways to score edges, with their present names."""
    return {OLD_NAMES.get(name, name): by_way[name] for name in by_way} if isinstance(by_way, dict) else by_way


@dataclass(kw_only=True)
class IOIReport(Results):
    """`ioi_report.json` of `ioi/evaluation.py`.

    Attributes:
        models: by name: edges cut, edges of the graph, and every measure with its 95% bootstrap interval.
        measured_on: how many held-out prompts and texts.
    """

    NAME: ClassVar[str] = "IOI report"
    models: dict[str, Any]
    measured_on: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class IOIComparison(Results):
    """`ioi_comparison.json` of `ioi/compare.py`.

    Attributes:
        original: measures with all edges.
        methods: by way of choosing edges, a row for each budget.
        n_edges: edges of the graph.
        seconds: what attribution took.
    """

    NAME: ClassVar[str] = "IOI comparison"
    VERSION: ClassVar[int] = 2
    OLDER: ClassVar[tuple[int, ...]] = (1,)
    original: dict[str, Any]
    methods: dict[str, list[dict[str, Any]]]
    n_edges: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def renew(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Integrated mask gradients were called EAP-IG."""
        return {name: renamed(fields[name]) if name in ("methods", "seconds") else fields[name] for name in fields}


@dataclass(kw_only=True)
class Faithfulness(Results):
    """`faithfulness.json` of `ioi/faithfulness.py`.

    Attributes:
        task: the behaviour.
        n_edges: edges of the graph.
        num_prompts: how many held-out prompts were measured.
        circuits: by name: `cpr`, `cmd`, the `seconds` that scoring the edges took (None for a file), and `curves`: the
            fields of `evaluation.faithfulness.Curve` and the faithfulness, with edges ranked by score ("cpr") and by
            absolute score ("cmd").
    """

    NAME: ClassVar[str] = "faithfulness"
    VERSION: ClassVar[int] = 2
    OLDER: ClassVar[tuple[int, ...]] = (1,)
    task: str
    n_edges: int
    num_prompts: int
    circuits: dict[str, Any]

    @classmethod
    def renew(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Integrated mask gradients were called EAP-IG."""
        return {name: renamed(fields[name]) if name == "circuits" else fields[name] for name in fields}


@dataclass(kw_only=True)
class GraphRecord(Record):
    """`graph.json` of a run: the edges that it is about, for its pictures.

    Attributes:
        graph: the graph, as `graph.describe` gives it.
        what: whether the run cuts those edges, or keeps no others.
        edges: importance of each, in the graph's order.
        measure: what the importance is, with its unit.
    """

    NAME: ClassVar[str] = "graph"
    graph: dict[str, Any]
    what: Literal["cut", "kept"] = "cut"
    edges: dict[str, float]
    measure: str = "importance"

    @classmethod
    def of(
        cls,
        graph: EdgeGraph,
        edges: Mapping[str, float],
        what: Literal["cut", "kept"] = "cut",
        measure: str = "importance",
    ) -> "GraphRecord":
        """The record of a graph and the importance of some of its edges."""
        return GraphRecord(graph=describe(graph), what=what, edges=dict(edges), measure=measure)


@dataclass(kw_only=True)
class KnownCircuit(GraphRecord):
    """`known_circuit.json` of `ioi/known_circuit.py`: a run's edges beside a published circuit.

    Attributes:
        classes: heads of the published circuit by class.
        in_circuit: those of the run's edges that are in it.
        overlap: precision and recall of edges and heads, and heads by class.
        provenance: as for `Results`.
    """

    NAME: ClassVar[str] = "known circuit"
    classes: dict[str, list[str]]
    in_circuit: list[str]
    overlap: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class NextTokens(Record):
    """`next_tokens.json` of a run: the likeliest tokens after one prompt.

    Attributes:
        prompt, IO, S: the prompt and the two names that may follow.
        models: by name, rows of token and probability.
    """

    NAME: ClassVar[str] = "next tokens"
    prompt: str = ""
    IO: str
    S: str
    models: dict[str, list[dict[str, Any]]]


@dataclass(kw_only=True)
class Stages(Record):
    """`stages.json` of a sufficient circuit: how pruning went.

    Attributes:
        faithful: share of the logit difference that had to stay.
        n_edges: edges of the graph.
        stages: rows of edges kept and share of the logit difference left.
    """

    NAME: ClassVar[str] = "pruning stages"
    faithful: float
    n_edges: int | None = None
    stages: list[dict[str, Any]]


@dataclass(kw_only=True)
class Covering(Results):
    """`covering.json` of `ioi/alternative_masks.py`: masks that each break the behaviour, and what their union does."""

    NAME: ClassVar[str] = "covering"
    before: dict[str, Any]
    masks: list[dict[str, Any]]
    union: dict[str, Any]
