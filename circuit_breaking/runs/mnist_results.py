"""Records of results that the MNIST scripts write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.runs.records import Record
from circuit_breaking.runs.results import Results

MNIST_REPORT, MASKS, EDGES_BY_MASK = "mnist_report.json", "masks.safetensors", "edges_by_mask.json"


@dataclass(kw_only=True)
class MnistReport(Results):
    """`mnist_report.json` of `mnist/main.py` and `mnist/old.py`.

    Attributes:
        script: path of the script in the repository.
        source, side: where the images come from, and their width in pixels.
        groups, target_class, target_group, mates: the task.
        edges, images: how many edges each layer has, and how many images each set.
        test_accuracy: of the network before anything is cut.
        results: by variant, its last accuracies and number of cut edges.
        seconds: what each part of the run took.
        device: where it ran.
    """

    NAME: ClassVar[str] = "MNIST report"
    script: str
    source: str
    side: int
    groups: list[list[int]]
    target_class: int
    target_group: int
    mates: list[int]
    edges: dict[str, int]
    images: dict[str, int]
    test_accuracy: float
    results: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    device: str

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        found = super().from_old(value, path, hint)
        return found | ({"test_accuracy": value["test accuracy"]} if "test accuracy" in value else {})


@dataclass(kw_only=True)
class NetworkRecord(Results):
    """Header of `network.safetensors` of the MNIST scripts: the network that edges are cut in.

    Attributes:
        source, side: as for `MnistReport`.
        seed, target_class, n_bad: what decides which images it was trained on.
    """

    NAME: ClassVar[str] = "MNIST network"
    source: str | None = None
    side: int | None = None
    seed: int | None = None
    target_class: int | None = None
    n_bad: int | None = None

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        found = super().from_old(value, path, hint)
        settings = found["provenance"].get("settings") or {}
        return {**{name: settings[name] for name in ("seed", "target_class", "n_bad") if name in settings}, **found}


@dataclass(kw_only=True)
class MnistMasks(Results):
    """Header of `masks.safetensors` of the MNIST scripts, which holds one mask for each variant."""

    NAME: ClassVar[str] = "MNIST masks"


@dataclass(kw_only=True)
class EdgesByMask(Record):
    """`edges_by_mask.json` of the MNIST scripts: names of the cut edges by variant."""

    NAME: ClassVar[str] = "edges by mask"
    masks: dict[str, list[str]]

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        return {"masks": value}
