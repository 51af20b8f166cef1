"""Folders of the releases before ablated models had a model type: `ablation.json`, and the whole model in `base/`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import graph_of
from circuit_breaking.runs.files import read_json
from circuit_breaking.runs.records import Record

VERSION_1 = "edge-ablated model, version 1"  # in `edges.json`, before records had versions
ABLATION, EDGES = "ablation.json", "edges.json"
BASE = "base"
DATA_ONLY = {".json", ".safetensors", ".txt", ".jinja", ".model", ".md"}  # what may lie in an ablated model's folder


@dataclass(kw_only=True)
class AblatedModelRecord(Record):
    """`ablation.json` of a saved ablated model.

    Attributes:
        base: hub name of the base model, or `"tiny"`; None where its weights lie in `base/`.
        shape: of the base model (`shape_of`).
        edges: names of the cut edges.
        ablation: what they carry, zero or the means in `means.safetensors`.
        about: how the edges were found.
        results: measurements, for the card.
    """

    NAME: ClassVar[str] = "ablated model"
    base: str | None
    shape: dict[str, Any]
    edges: list[str]
    ablation: Literal["zero", "mean"]
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        if not isinstance(value, dict) or value.get("format") != VERSION_1:
            raise UserError(f"{path} describes no saved ablated model. {hint}")
        found = {key: value[key] for key in ("base", "shape", "edges", "about", "results") if key in value}
        return {**found, "ablation": value.get("cut_edges_carry")}


def old_file(folder: Path, hint: str) -> Path | None:
    """The file that makes a folder an ablated model of an older release, None in another folder."""
    if (folder / ABLATION).is_file():
        return folder / ABLATION
    if (folder / EDGES).is_file():
        record = read_json(folder / EDGES, hint)
        if isinstance(record, dict) and "format" in record:
            return folder / EDGES
    return None


def shape_of(config: Any) -> dict[str, Any]:
    """The shape of a model as these records have it, from its configuration."""
    keys = {"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "width": "hidden_size"}
    shape = {"model_type": config.model_type, **{key: getattr(config, name, None) for key, name in keys.items()}}
    return shape | ({"parallel": True} if graph_of(config).parallel else {})


def check_base(folder: Path) -> Path:
    """The folder of the whole model in an ablated model's. Raises a `UserError` if it holds files that are not data."""
    inside = folder / BASE
    other = [path for path in inside.rglob("*") if path.is_file() and path.suffix not in DATA_ONLY]
    if other:
        raise UserError(f"{other[0]} is no data file, so {folder} is not loaded. Remove it if you trust the rest.")
    return inside
