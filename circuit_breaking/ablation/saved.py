"""Ablated models in folders of data, without code."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.ablate import _check_means, _ends, ablate
from circuit_breaking.engine.ablation_values import read_means
from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV, Edge, EdgeGraph
from circuit_breaking.models.families import graph_of
from circuit_breaking.models.load import load_config, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.files import read_json, write_text
from circuit_breaking.runs.mask_record import MEANS, MeansRecord
from circuit_breaking.runs.records import Record
from circuit_breaking.runs.tensors import write_tensors

OLD_FORMAT = "edge-ablated model, version 1"  # in `edges.json`, before records had versions
ABLATION, OLD_NAME = "ablation.json", "edges.json"
HINT = "Write an ablated model with save_ablated."
DATA_ONLY = {".json", ".safetensors", ".txt", ".jinja", ".model", ".md"}  # what may lie in `base/`


@dataclass(kw_only=True)
class AblatedModelRecord(Record):
    """`ablation.json` of a saved ablated model.

    Attributes:
        base: hub name of the base model, or `"tiny"`; None where its weights lie in `base/`.
        shape: of the base model (`_shape`).
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
        if not isinstance(value, dict) or value.get("format") != OLD_FORMAT:
            raise UserError(f"{path} describes no saved ablated model. {hint}")
        found = {key: value[key] for key in ("base", "shape", "edges", "about", "results") if key in value}
        return {**found, "ablation": value.get("cut_edges_carry")}


def ablation_file(folder: Path) -> Path | None:
    """The file that makes a folder a saved ablated model, None in another folder."""
    if (folder / ABLATION).is_file():
        return folder / ABLATION
    old = folder / OLD_NAME
    if old.is_file():
        record = read_json(old, HINT)
        if isinstance(record, dict) and "format" in record:
            return old
    return None


def _shape(config: Any) -> dict[str, Any]:
    keys = {"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "width": "hidden_size"}
    shape = {"model_type": config.model_type, **{key: getattr(config, name, None) for key, name in keys.items()}}
    return shape | ({"parallel": True} if graph_of(config).parallel else {})


def _graph(shape: dict[str, Any]) -> EdgeGraph:
    return EdgeGraph(shape["n_layers"], shape["n_heads"], parallel=shape.get("parallel", False))


def save_ablated(
    folder: Path | str,
    base: str | Path | nn.Module,
    edges: Iterable[str],
    means: Tensor | None = None,
    about: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write an ablated model as a folder that `load_ablated` and `toxicity/generate.py` take anywhere.

    Args:
        folder: where to; an ablated model that was saved there before is replaced.
        base: hub name or `"tiny"`, of which only the name is kept; or a folder, a `.gguf` or a loaded Hugging Face
            model (with or without cut edges), whose weights are stored.
        edges: names of the edges to cut.
        means: [P, D], or None for zero.
        about: JSON-able record of how the edges were found and on what data (see `files.provenance`).
        results: JSON-able measurements, for the card.
        tokenizer: to be stored with the weights of a loaded model; that of a folder is found by itself.

    Raises:
        UserError: as `ablate` does, or the folder cannot be written or holds something else.
    """
    folder, name = Path(folder), None
    edges = list(dict.fromkeys(Edge(edge) for edge in edges))
    if isinstance(base, nn.Module):
        config, hf = base.config, base
    elif str(base) == "tiny" or not Path(base).expanduser().exists():
        name, config, hf = str(base), load_config(base), None
    else:
        hf = load_hf_model(base, "cpu", load_config(base).dtype or "float32")  # stored as precise as it was
        config, tokenizer = hf.config, tokenizer or load_tokenizer(base)
    shape = _shape(config)
    graph = _graph(shape)
    for edge in edges:
        _ends(graph, edge)
    if means is not None:
        _check_means(means, len(graph.sources), shape["width"])
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise UserError(f"{folder} holds other files already. Choose an empty folder for the ablated model.")
    record = AblatedModelRecord(
        base=name, shape=shape, edges=edges, ablation="zero" if means is None else "mean", about=about or {},
        results=results or {},
    )  # fmt: skip
    original = Path(getattr(config, "name_or_path", "")).name or config.model_type
    card = model_card(folder.name, record, original)
    for name in (ABLATION, OLD_NAME):  # the record is written last: without it the folder is no model
        (folder / name).unlink(missing_ok=True)
    if hf is not None:
        save_hf_folder(folder / "base", hf, tokenizer)
    if means is not None:
        write_tensors(folder / MEANS, {"means": means}, MeansRecord(model=record.base).to_json())
    write_text(folder / "README.md", card)
    record.write(folder / ABLATION)


def _is_ours(folder: Path) -> bool:
    with suppress(UserError):
        path = ablation_file(folder)
        return path is not None and bool(AblatedModelRecord.read(path))
    return False


def model_card(title: str, record: AblatedModelRecord, base: str) -> str:
    """The model card of a saved ablated model, in Markdown."""
    split = any(edge.rpartition(".")[2] in QKV for edge in record.edges)
    count = len(replace(_graph(record.shape), split_qkv=split))
    source = record.base or f"{base} (weights in `base/`)"
    carried = "the mean output of its source" if record.ablation == "mean" else "nothing (zero ablation)"

    def block(what: dict[str, Any], otherwise: str) -> str:
        return f"```json\n{json.dumps(what, indent=2, ensure_ascii=False, default=str)}\n```" if what else otherwise

    return f"""# {title}

{source} with {len(record.edges)} of its {count:,} causal edges cut ({", ".join(record.edges) or "none"}).
A cut edge carries {carried}; all weights are those of the base model. Method: Li, Davies, Nadeau 2023,
"Circuit Breaking: Removing Model Behaviors with Targeted Ablation" (arXiv:2309.05973).

## Use

```python
from circuit_breaking.ablation.saved import load_ablated

model = load_ablated("path/to/this/folder")  # a stock Hugging Face model: model.generate(...)
```

The folder holds data only, no code.

## How the edges were found

{block(record.about, "Not recorded.")}

## Results

{block(record.results, "Not recorded.")}
"""


def read_ablated(folder: Path | str) -> AblatedModelRecord:
    """The record of a saved ablated model; `base` becomes something that `load_hf_model` can load.

    Raises:
        UserError: the folder is missing, damaged, or holds files that are not data.
    """
    folder = Path(folder).expanduser()
    record = AblatedModelRecord.read(ablation_file(folder) or folder / ABLATION, HINT)
    if record.base is None:
        inside = folder / "base"
        other = [path for path in inside.rglob("*") if path.is_file() and path.suffix not in DATA_ONLY]
        if other:
            raise UserError(f"{other[0]} is no data file, so {folder} is not loaded. Remove it if you trust the rest.")
        record.base = str(inside)
    return record


def load_ablated(folder: Path | str, device: str = "auto", dtype: str | torch.dtype = "float32") -> nn.Module:
    """The ablated model that `save_ablated` wrote: a stock Hugging Face model in eval mode, edges cut.

    `model.edge_cuts.remove()` makes it the base model again. For its tokenizer:
    `load_tokenizer(read_ablated(folder).base)`.

    Raises:
        UserError: the folder or its base model is missing or damaged, or they do not fit each other.
    """
    record, folder = read_ablated(folder), Path(folder).expanduser()
    means = None
    if record.ablation == "mean":
        means = read_means(folder / MEANS, "Save the ablated model again.")[0]
    hf = load_hf_model(record.base, device, dtype)
    if _shape(hf.config) != record.shape:
        raise UserError(
            f"{folder} was made for a model of shape {record.shape}, and {record.base} is "
            f"{_shape(hf.config)}. Save the ablated model again with its base's weights."
        )
    ablate(hf, record.edges, means)
    return hf
