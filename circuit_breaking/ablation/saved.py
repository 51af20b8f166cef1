"""Ablated models in folders of data, without code."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.ablate import _check_means, _ends, ablate
from circuit_breaking.engine.ablation_values import read_means
from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV, Edge, EdgeGraph
from circuit_breaking.models.families import graph_of
from circuit_breaking.models.load import load_config, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.files import read_json, write_json, write_text
from circuit_breaking.runs.tensors import write_tensors

FORMAT = "edge-ablated model, version 1"
DATA_ONLY = {".json", ".safetensors", ".txt", ".jinja", ".model", ".md"}  # what may lie in `base/`


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
    record = {
        "format": FORMAT, "base": name, "shape": shape, "edges": edges, "cut_edges_carry": "mean" if means is not None
        else "zero", "about": about or {}, "results": results or {},
    }  # fmt: skip
    original = Path(getattr(config, "name_or_path", "")).name or config.model_type
    card = model_card(folder.name, record, original)
    (folder / "edges.json").unlink(missing_ok=True)  # it comes last: without it the folder is no model
    if hf is not None:
        save_hf_folder(folder / "base", hf, tokenizer)
    if means is not None:
        write_tensors(folder / "means.safetensors", {"means": means}, {"shape": shape})
    write_text(folder / "README.md", card)
    write_json(folder / "edges.json", record)


def _is_ours(folder: Path) -> bool:
    with suppress(UserError):
        record = read_json(folder / "edges.json")
        return isinstance(record, dict) and record.get("format") == FORMAT
    return False


def model_card(title: str, record: dict[str, Any], base: str) -> str:
    """The model card of a saved ablated model, in Markdown."""
    split = any(edge.rpartition(".")[2] in QKV for edge in record["edges"])
    count = len(replace(_graph(record["shape"]), split_qkv=split))
    source = record["base"] or f"{base} (weights in `base/`)"
    carried = "the mean output of its source" if record["cut_edges_carry"] == "mean" else "nothing (zero ablation)"

    def block(what: dict[str, Any], otherwise: str) -> str:
        return f"```json\n{json.dumps(what, indent=2, ensure_ascii=False, default=str)}\n```" if what else otherwise

    return f"""# {title}

{source} with {len(record["edges"])} of its {count:,} causal edges cut ({", ".join(record["edges"]) or "none"}).
A cut edge carries {carried}; all weights are those of the base model. Method: Li, Davies, Nadeau 2023,
"Circuit Breaking: Removing Model Behaviors with Targeted Ablation" (arXiv:2309.05973).

## Use

```python
from circuit_breaking.ablation.saved import load_ablated

model = load_ablated("path/to/this/folder")  # a stock Hugging Face model: model.generate(...)
```

The folder holds data only, no code.

## How the edges were found

{block(record["about"], "Not recorded.")}

## Results

{block(record["results"], "Not recorded.")}
"""


def read_ablated(folder: Path | str) -> dict[str, Any]:
    """The record in a saved ablated model's `edges.json`, checked; `base` is something that `models` can load.

    Raises:
        UserError: the folder is missing, damaged, or holds files that are not data.
    """
    folder = Path(folder).expanduser()
    record = read_json(folder / "edges.json", "Write an ablated model with save_ablated.")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder} is no saved ablated model. Write one with save_ablated.")
    edges, base = record.get("edges"), record.get("base")
    if not isinstance(edges, list) or not all(isinstance(edge, str) for edge in edges):
        raise UserError(f"{folder / 'edges.json'} holds no list of edges. Save the ablated model again.")
    if not isinstance(base, str | None) or record.get("cut_edges_carry") not in ("zero", "mean"):
        raise UserError(f"{folder / 'edges.json'} is damaged. Save the ablated model again.")
    if base is None:
        inside = folder / "base"
        other = [path for path in inside.rglob("*") if path.is_file() and path.suffix not in DATA_ONLY]
        if other:
            raise UserError(f"{other[0]} is no data file, so {folder} is not loaded. Remove it if you trust the rest.")
        record["base"] = str(inside)
    return record


def load_ablated(folder: Path | str, device: str = "auto", dtype: str | torch.dtype = "float32") -> nn.Module:
    """The ablated model that `save_ablated` wrote: a stock Hugging Face model in eval mode, edges cut.

    `model.edge_cuts.remove()` makes it the base model again. For its tokenizer:
    `load_tokenizer(read_ablated(folder)["base"])`.

    Raises:
        UserError: the folder or its base model is missing or damaged, or they do not fit each other.
    """
    record, folder = read_ablated(folder), Path(folder).expanduser()
    means = None
    if record["cut_edges_carry"] == "mean":
        means = read_means(folder / "means.safetensors", "Save the ablated model again.")[0]
    hf = load_hf_model(record["base"], device, dtype)
    if _shape(hf.config) != record.get("shape"):
        raise UserError(
            f"{folder} was made for a model of shape {record.get('shape')}, and {record['base']} is "
            f"{_shape(hf.config)}. Save the ablated model again with its base's weights."
        )
    ablate(hf, record["edges"], means)
    return hf
