"""An ablated model that runs like any Hugging Face model: cut edges, KV cache, save and load (layer 2).

    with ablate(hf_model, ["a3.7->m5", "embed->a0.1"]):
        hf_model.generate(...)

Everything that the model can do works on: sampling, beams, left-padded batches, caches, bfloat16, `torch.compile`.
See `cuts.py` for how. A saved ablated model is a folder of data, without code:

    edges.json          base model's name (or null), shape, names of the cut edges, how they came to be, results
    means.safetensors   what cut edges carry, if not zero
    base/               weights, configuration and tokenizer, where the base is not to be had by a name
    README.md           model card
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from circuit_breaking.cli import UserError
from circuit_breaking.cuts import Cuts
from circuit_breaking.files import read_json, write_json, write_tensors, write_text
from circuit_breaking.graph import QKV, Edge, EdgeGraph
from circuit_breaking.means import read_means
from circuit_breaking.models import load_config, load_hf_model, load_tokenizer
from circuit_breaking.places import find_places, graph_of
from circuit_breaking.transformer import check_means

ATTRIBUTE = "edge_cuts"  # under which an ablated model holds its `Ablation`
FORMAT = "edge-ablated model, version 1"
DATA_ONLY = {".json", ".safetensors", ".txt", ".jinja", ".model", ".md"}  # what may lie in `base/`


class Ablation(nn.Module):
    """Edges cut in a model; also a context manager that removes the cuts at its end.

    Attributes:
        edges: names of the cut edges, each once, in the order given.
    """

    def __init__(self, hf: nn.Module, edges: list[Edge], cuts: Cuts | None) -> None:
        super().__init__()
        self.edges, self.cuts = edges, cuts
        self._model = (hf,)  # in a tuple, since a module may not be its own descendant
        self._handles: list[Any] = []
        self._shares: list[tuple[nn.Module, int]] = []

    def _attach(self) -> None:
        self._model[0].add_module(ATTRIBUTE, self)
        if self.cuts is None:
            return
        for module, hook in self.cuts.before:
            self._handles.append(module.register_forward_pre_hook(hook))
        for module, hook in self.cuts.after:
            self._handles.append(module.register_forward_hook(hook))
        for attention in self.cuts.own_keys:
            self._shares.append((attention, attention.num_key_value_groups))
            attention.num_key_value_groups = 1

    def remove(self) -> None:
        """Make the model what it was before. Doing so twice is no error."""
        while self._handles:
            self._handles.pop().remove()
        while self._shares:
            attention, share = self._shares.pop()
            attention.num_key_value_groups = share
        if getattr(self._model[0], ATTRIBUTE, None) is self:
            delattr(self._model[0], ATTRIBUTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _ends(graph: EdgeGraph, edge: str) -> tuple[str, str]:
    """Source and reader of an edge by name. Raises `UserError` if there is none such.

    The names are taken apart rather than looked up in `graph.edges`, which for a large model holds a million.
    """
    source, _, reader = str(edge).partition("->")
    node, dot, part = reader.rpartition(".")
    split = bool(dot) and part in QKV
    with suppress(ValueError):
        at = graph.sources.index(source)
        node = node if split else reader
        readable = graph.sources.index(node) if node != "output" else len(graph.sources)
        if node.startswith("a") or (graph.parallel and node.startswith("m")):  # which read no node of their own layer
            readable = graph.layers[int(node[1:].partition(".")[0])].sources
        if at < readable and node != "embed" and not (split and node[0] != "a"):
            return source, reader
    if split:
        graph = replace(graph, split_qkv=True)
    graph.index(edge)  # says what is wrong
    raise AssertionError(f"{edge} is in the graph")


def _check_means(means: Tensor, nodes: int, width: int) -> None:
    if means.dim() == 3:
        raise UserError(
            "these means are per position, which generation cannot use: a text that is generated has no fixed "
            "positions, once batches are padded on the left and windows slide. Give one mean a node (toxicity/"
            "compute_means.py --kind mean)."
        )
    check_means(means, nodes, width)


def ablate(hf: nn.Module, edges: Iterable[str], means: Tensor | None = None, trainable: bool = False) -> Ablation:
    """Cut edges in a stock Hugging Face model of a family in `places.FAMILIES`, in place.

    The logits are those of `EdgeMaskedTransformer` with 0 at these edges and 1 elsewhere, in eval mode (dropout is
    not part of the graph). The cost grows with the edges cut. Copies of the weights of heads that read or write a
    cut edge are taken now and move with the model; weights changed later are not seen.

    Where query heads share keys and values (grouped-query attention) and are cut off from different sources, that
    layer keeps keys and values for every query head, also in the cache. So a cache that was filled before cannot be
    used after, and the other way round.

    Args:
        hf: the model, changed in place until `remove()` or the end of the `with`.
        edges: names, `"a0.3->m5"`, or `"m0->a3.7.q"` for a head's query, key or value alone. Both kinds may mix.
        means: what a cut edge carries: None (zero), or [P, D], a mean for every node in the order of
            `graph.sources`.
        trainable: let gradients of one forward pass reach the weights through the cuts too. Weights that change have
            to be cut anew.

    Returns:
        The `Ablation`: `remove()` restores the model bit for bit.

    Raises:
        UserError: an edge does not exist, means do not fit or are per position, the model is of another family,
            quantised, offloaded, or has cut edges already.
    """
    with torch.set_grad_enabled(trainable):
        return _ablate(hf, edges, means)


def _ablate(hf: nn.Module, edges: Iterable[str], means: Tensor | None) -> Ablation:
    if hasattr(hf, ATTRIBUTE):
        raise UserError("this model has cut edges already. Remove those first, or cut all edges in one call.")
    model = find_places(hf)
    graph = model.graph
    if isinstance(edges, str):
        raise UserError(f"edges are a list of names, not one text. Write [{str(edges)!r}].")
    edges = list(dict.fromkeys(Edge(edge) for edge in edges))
    ends = [_ends(graph, edge) for edge in edges]
    if means is not None:
        _check_means(means, len(graph.sources), model.width)
    handle = Ablation(hf, edges, Cuts(model, ends, means) if ends else None)
    handle._attach()
    return handle


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
        _store_base(folder, hf, tokenizer)
    if means is not None:
        write_tensors(folder / "means.safetensors", {"means": means}, {"shape": shape})
    write_text(folder / "README.md", card)
    write_json(folder / "edges.json", record)


def _is_ours(folder: Path) -> bool:
    with suppress(UserError):
        record = read_json(folder / "edges.json")
        return isinstance(record, dict) and record.get("format") == FORMAT
    return False


def _store_base(folder: Path, hf: nn.Module, tokenizer: Any) -> None:
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".base."))
        hf.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if (folder / "base").exists():
            shutil.rmtree(folder / "base")
        temporary.chmod(folder.stat().st_mode)  # mkdtemp makes folders that only their owner can read
        temporary.rename(folder / "base")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}. Choose another folder.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


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
from circuit_breaking.ablated import load_ablated

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
