"""Records of what is cut: masks over edges, the means that cut edges carry, masks over weights, lists of edges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import CHECK, read_json
from circuit_breaking.runs.records import Record, old_provenance

MASK = "mask.safetensors"  # the file of a mask in a run folder
MEANS = "means.safetensors"  # of the ablation values that were learned with it
MEAN_OUTPUTS = "mean_outputs.safetensors"  # of the mean outputs that these started from, if no file gave them
CONTROL = "control.json"  # of a control in which a mask's constants are used in another way
CUT_EDGES, KEPT_EDGES = "edges.json", "kept_edges.json"
# settings of the data that a mask was trained on; scripts that measure it take them where their own are not set
DATA_SETTINGS = ("toxic_train", "toxic_test", "ordinary", "text_column", "length", "train", "test", "prompts", "task")


@dataclass(frozen=True)
class AblationValueRecord:
    """The ablation value: what a cut edge carries in place of its source's output.

    Attributes:
        kind: `"zero"`; `"mean"` of the source's outputs; `"position"`, a mean for each position; `"optimal"`, an
            ablation constant that was learned with the mask (Li and Janson 2024); or `"counterfactual"`, the source's
            output on the counterfactual of each prompt (resample ablation).
        path: file of the means or constants; for `"counterfactual"`, of the means for texts without a counterfactual.
            None for zero.
        sha256: SHA-256 of the tensor in that file (`tensors.digest_of`), None where it was not recorded.
    """

    kind: Literal["zero", "mean", "position", "optimal", "counterfactual"] = "zero"
    path: str | None = None
    sha256: str | None = None


@dataclass(kw_only=True)
class MaskRecord(Record):
    """How a mask over edges was made; lies in the header of `mask.safetensors`.

    Attributes:
        model: what `load_model` loads: a hub name, a folder, or `"tiny"`.
        graph: the graph that the mask belongs to, as `graph.describe` gives it.
        role: `"mask"`, or `"random"` for a control whose edges were drawn at random.
        method: how the edges were found.
        budget: most edges that it was allowed to cut. None where there was no limit.
        seed: of the training, or of the draw.
        ablation_value: what cut edges carry.
        ablate_from: first position at which the cuts act.
        losses: losses before and after.
        results: other measurements, and what a script wants to note.
        data: settings of the data that it was trained on (`DATA_SETTINGS`).
        made_from: fingerprint of the settings, data and code, by which a script that is started again recognizes its
            own results (`run_folder.is_up_to_date`).
        provenance: settings of the script, hashes of the files read, package versions, git commit. For people only.
    """

    NAME: ClassVar[str] = "mask"
    model: str = ""
    graph: dict[str, Any] = field(default_factory=dict)
    role: Literal["mask", "random"] = "mask"
    method: str | None = None
    budget: int | None = None
    seed: int | None = None
    ablation_value: AblationValueRecord = AblationValueRecord()
    ablate_from: int = 0
    losses: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    made_from: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def split_qkv(self) -> bool:
        """Whether the graph has separate readers for queries, keys and values."""
        return bool(self.graph.get("split_qkv"))

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        """Fields from a header that held the settings of `train_mask.py`, or settings in that form."""
        if not isinstance(value, dict) or not isinstance(value.get("graph"), dict):
            raise UserError(f"{path} holds no edge mask. {hint}")
        settings = value["settings"] if isinstance(value.get("settings"), dict) else {}
        means = settings.get("means")
        if not isinstance(means, str | None):
            raise UserError(f"{path} names no file of means, but {means!r}. {hint}")
        learned = settings.get("means_lr") or settings.get("constants_lr")
        kind = "zero" if means is None else value.get("carry") or ("optimal" if learned else "mean")
        return {
            "model": settings.get("model") or value.get("model") or "",
            "graph": value["graph"],
            "role": value.get("kind") or "mask",
            "method": value.get("method") or settings.get("method"),
            "budget": settings.get("max_edges"),
            "seed": settings.get("seed"),
            "ablation_value": {"kind": kind, "path": means},
            "losses": value.get("losses") or {},
            "results": value.get("results") or {},
            "data": data_of(settings),
            "provenance": old_provenance(value),
        }


@dataclass(kw_only=True)
class MeansRecord(Record):
    """How means were computed or learned; lies in the header of their file.

    Attributes:
        model, graph: as for `MaskRecord`. Means serve graphs with and without `split_qkv`.
        num_texts: number of texts that they are averages over. None where they were learned.
        ablate_from: first position that they are averages over, or at which cuts acted while they were learned.
        made_from, provenance: as for `MaskRecord`.
    """

    NAME: ClassVar[str] = "means"
    model: str | None = None
    graph: dict[str, Any] = field(default_factory=dict)
    num_texts: int | None = None
    ablate_from: int = 0
    made_from: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ControlRecord(Record):
    """`control.json`: a control for a mask with learned constants; its values are in `means.safetensors` beside it.

    Attributes:
        about: what it is, in a few words.
        edges: names of the mask's edges.
        removes: whether they are cut; if not, the values are only added where they are read.
        ablate_from: first position at which this acts.
        budget, seed: those of the mask.
        made_from, provenance: as for `MaskRecord`.
    """

    NAME: ClassVar[str] = "control"
    about: str
    edges: list[str]
    removes: bool
    ablate_from: int = 0
    budget: int | None = None
    seed: int | None = None
    made_from: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class CutEdges(Record):
    """`edges.json`: names of the edges that a run cuts, in the graph's order."""

    NAME: ClassVar[str] = "cut edges"
    edges: list[str]

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        """A bare list, unless `graph.json` beside it says that those edges are kept."""
        edges = _bare_list(value, path, hint)
        if _old_list_is_kept(Path(path)):
            raise UserError(f"{path} holds edges that a sufficient circuit keeps, and edges to cut are needed. {hint}")
        return {"edges": edges}


@dataclass(kw_only=True)
class KeptEdges(Record):
    """`kept_edges.json`: names of the edges that a sufficient circuit keeps; all others are cut."""

    NAME: ClassVar[str] = "kept edges"
    edges: list[str]

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        return {"edges": _bare_list(value, path, hint)}


def _bare_list(value: Any, path: Path | str, hint: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(edge, str) for edge in value):
        raise UserError(f"{path} holds no list of edges. {hint}")
    return value


def _old_list_is_kept(path: Path) -> bool:
    graph = path.parent / "graph.json"
    if not graph.is_file():
        return False
    about = read_json(graph)
    return isinstance(about, dict) and about.get("what") == "kept"


def read_edges_of_interest(folder: Path, hint: str = CHECK) -> list[str]:
    """Names of the edges that a run is about: those that it cuts, or that its sufficient circuit keeps."""
    if (folder / KEPT_EDGES).is_file():
        return KeptEdges.read(folder / KEPT_EDGES, hint).edges
    path = folder / CUT_EDGES
    kept = path.is_file() and isinstance(read_json(path, hint), list) and _old_list_is_kept(path)
    return (KeptEdges if kept else CutEdges).read(path, hint).edges


def write_edges(folder: Path, edges: list[str], kept: bool = False) -> None:
    """Write the list of a run's edges, those that it cuts or, with `kept`, keeps; an earlier run's other list goes."""
    record, name, other = (KeptEdges, KEPT_EDGES, CUT_EDGES) if kept else (CutEdges, CUT_EDGES, KEPT_EDGES)
    record(edges=[str(edge) for edge in edges]).write(folder / name)
    (folder / other).unlink(missing_ok=True)


def data_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a script's settings that name the data."""
    return {name: settings[name] for name in DATA_SETTINGS if settings.get(name) is not None}
