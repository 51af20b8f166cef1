"""Cut edges in a stock Hugging Face model: `ablate`.

    with ablate(hf_model, ["a3.7->m5", "embed->a0.1"]):
        hf_model.generate(...)

The ablated model runs like any Hugging Face model: sampling, beams, left-padded batches, KV cache, threads, training,
gradient checkpointing, `torch.compile`. `modules` explains how; `saved` writes ablated models to disk.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from circuit_breaking.ablation.ablated_model import AblatedModel, hub_name
from circuit_breaking.ablation.cuts_of_file import read_cuts
from circuit_breaking.ablation.install import install, subclass, uninstall
from circuit_breaking.ablation.modules import AblatedBody
from circuit_breaking.ablation.plan import plan_cuts
from circuit_breaking.ablation.resampling import whole_outputs_of
from circuit_breaking.ablation.wiring import Wiring, wire
from circuit_breaking.engine.ablation_values import check_means
from circuit_breaking.engine.arguments import check_ablate_from
from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV, Edge, EdgeGraph
from circuit_breaking.models.families import describe, require_loaded

ATTRIBUTE = "edge_cuts"  # of an ablated model: its `Ablation`


class Ablation:
    """Edges cut in a model; also a context manager that removes the cuts at its end, and cuts again at its beginning.

    Attributes:
        edges: names of the cut edges, each once, in the order given.
        means: their ablation values [P, D], None for zero.
        ablate_from: the first position at which cuts act.
        removes: whether the edges are cut. If not, their ablation values are only added.
        base_model: name of the whole model on the hub, "" where it is unknown; for model cards.
        about: how the edges were found, JSON-able; it is saved with the model.
        resampled: whether cut edges carry outputs on a counterfactual batch at the moment (`resampling`).
        saved_as: folder or hub name that the model was loaded from with its cuts, "" if none. It is the model's
            `name_or_path` while edges are cut, so that an adapter trained then does not name the whole model as base.
    """

    def __init__(
        self, hf: PreTrainedModel, edges: list[Edge], means: Tensor | None, ablate_from: int, removes: bool,
        wiring: Wiring,
    ) -> None:  # fmt: skip
        self.edges, self.means, self.ablate_from, self.removes = edges, means, ablate_from, removes
        self.base_model, self.about, self.saved_as = hub_name(hf.config), {}, ""
        self.resampled = False
        self._model, self._wiring = hf, wiring
        self._whole_name = hf.name_or_path
        self._installed: list[torch.nn.Module] = []
        self._shares: list[tuple[torch.nn.Module, int]] = []

    def _attach(self) -> None:
        if hasattr(self._model, ATTRIBUTE):
            raise UserError("this model has cut edges already. Remove those first, or cut all edges in one call.")
        setattr(self._model, ATTRIBUTE, self)
        if self.edges:
            self._model.__class__ = subclass(AblatedModel, type(self._model))
            self._model.name_or_path = self.saved_as
        try:
            for module, mixin, state in self._wiring.modules:
                install(module, mixin, **state)
                self._installed.append(module)
            for attention in self._wiring.separate_keys:
                self._shares.append((attention, attention.num_key_value_groups))
                attention.num_key_value_groups = 1
                if hasattr(attention, "num_key_value_heads"):  # by which Phi-3 finds its keys
                    attention.num_key_value_heads *= self._shares[-1][1]
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model as it was before. A second call does nothing."""
        while self._installed:
            uninstall(self._installed.pop())
        while self._shares:
            attention, share = self._shares.pop()
            attention.num_key_value_groups = share
            if hasattr(attention, "num_key_value_heads"):
                attention.num_key_value_heads //= share
        if getattr(self._model, ATTRIBUTE, None) is self:
            delattr(self._model, ATTRIBUTE)
            if isinstance(self._model, AblatedModel):
                self._model.__class__ = type(self._model).stands_for
                self._model.name_or_path = self._whole_name

    @contextmanager
    def resampling(self, counterfactual: Tensor) -> Iterator[None]:
        """Within the block, cut edges carry what their source writes in the whole model on a counterfactual batch, at
        the same text and position (resample ablation), in place of `means`.

        Texts cannot be generated inside the block, and the model cannot be saved.

        Args:
            counterfactual: tokens, int64 [B, T], padded on the right if at all. Every batch inside the block has the
                same shape, and its texts have the same numbers of tokens.

        Raises:
            UserError: no edges are cut at the moment, the tokens do not fit the model, or a batch inside the block has
                another shape, is padded on the left or continues a text in a KV cache.
        """
        hf, before = self._model, self._wiring
        if getattr(hf, ATTRIBUTE, None) is not self:
            raise UserError("the cuts were removed, so that nothing carries outputs on a counterfactual batch.")
        self.remove()
        try:
            values = whole_outputs_of(hf, counterfactual)
            self._wiring = wiring_of(hf, self.edges, values, self.ablate_from, self.removes)
            self._attach()
            self.resampled = True
            yield
        finally:
            self.remove()
            self._wiring, self.resampled = before, False
            self._attach()

    def __enter__(self) -> Self:
        if getattr(self._model, ATTRIBUTE, None) is not self:
            self._attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _ends(graph: EdgeGraph, edge: str) -> tuple[str, str]:
    """Source and reader of an edge by name. Raises `UserError` if the graph has no such edge.

    The name is parsed rather than looked up in `graph.edges`, which for a large model holds a million names.
    """
    source, _, reader = str(edge).partition("->")
    node, dot, part = reader.rpartition(".")
    split = bool(dot) and part in QKV
    with suppress(ValueError):
        at = graph.sources.index(source)
        node = node if split else reader
        readable = graph.sources.index(node) if node != "output" else len(graph.sources)
        if node.startswith("a") or (graph.parallel and node.startswith("m")):  # which read no node of their own layer
            readable = graph.layers[int(node[1:].partition(".")[0])].n_earlier_nodes
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
            "positions, because batches are padded on the left and windows slide. Give one mean for each node "
            "(toxicity/compute_means.py --kind mean)."
        )
    check_means(means, nodes, width)


def ablate(
    hf: PreTrainedModel, edges: Iterable[str] | Path | str, means: Tensor | None = None, ablate_from: int = 0,
    removes: bool = True,
) -> Ablation:  # fmt: skip
    """Cut edges in a stock Hugging Face model, in place.

    The logits are those of `EdgeMaskedTransformer` with 0 at these edges and 1 elsewhere. Gradients reach all weights,
    and weights that change later count. The cost grows with the number of cut edges; without any there is none.

    Where query heads share keys and values (grouped-query attention) and are cut off from different sources, that
    layer stores keys and values for every query head, also in the KV cache. So a cache that was filled before edges
    were cut cannot be used after, and the other way round.

    Args:
        hf: the model, changed in place until `remove()` or the end of the `with` block.
        edges: names, `"a0.3->m5"`, or `"m0->a3.7.q"` for a head's query, key or value alone. Both kinds may mix. Or the
            file of a circuit, of which all edges outside are cut: a graph of EAP-IG (`.json`), a table (`.csv`,
            `.parquet`), or `mask.safetensors`, `edges.json` or `kept_edges.json` of a run (`runs.circuit_files`).
        means: ablation values, [P, D] in the order of `graph.sources`. None: those that a mask's file names; else zero.
        ablate_from: first position at which cuts act; before it every reader reads everything, as in the whole model.
            Positions are counted from each text's own first token: padding on the left does not count, tokens in a KV
            cache do. Give 1 to leave the first token alone, where many models have an attention sink. The file
            of a mask says its own, and another one given beside it is refused.
        removes: False for a control in which nothing is cut: the readers of these edges get `means` in addition,
            r_j = Σ_i x_i + Σ_cut μ_i. Such a model is not saved.

    Returns:
        The `Ablation`: its `remove()` restores the model bit for bit.

    Raises:
        UserError: an edge does not exist, a file is missing, damaged or of a graph of another shape, the means do not
            fit or are per position, or the model is of an unknown family (see `models.families`), quantised, has
            adapters that are not merged, or has cut edges already.
    """
    check_ablate_from(ablate_from)
    spec = describe(hf)
    require_loaded(hf)
    graph = spec.graph()
    if isinstance(edges, str) and "->" in edges:
        raise UserError(f"edges are a list of names, not one text. Write [{str(edges)!r}].")
    if isinstance(edges, Path | str):
        edges, means, ablate_from = read_cuts(edges, graph, means, ablate_from)
    edges = list(dict.fromkeys(Edge(edge) for edge in edges))
    if means is not None:
        _check_means(means, len(graph.sources), spec.width)
        means = means.detach().clone()
    handle = Ablation(hf, edges, means, ablate_from, removes, wiring_of(hf, edges, means, ablate_from, removes))
    handle._attach()
    return handle


def wiring_of(
    hf: PreTrainedModel, edges: list[Edge], means: Tensor | None, ablate_from: int, removes: bool = True
) -> Wiring:
    """What to change in a model so that edges are cut; means may be those of one batch, [P, B, T, D]."""
    spec = describe(hf)
    graph = spec.graph()
    wiring = wire(spec, plan_cuts(graph, [_ends(graph, edge) for edge in edges], removes), means, ablate_from)
    if edges:
        body = {
            "d": spec.width,
            "key": _key(edges, means, ablate_from) + ("" if removes else " added"),
            "arguments": tuple(signature(hf.base_model.forward).parameters),
            "ablate_from": ablate_from,
            "batch": tuple(means.shape[1:3]) if means is not None and means.dim() == 4 else None,
            "n_layers": graph.n_layers,
        }
        wiring.modules.append((hf.base_model, AblatedBody, body))
    return wiring


def _key(edges: list[Edge], means: Tensor | None, ablate_from: int) -> str:
    """Tells what is cut, for KV caches: two caches with the same key were filled by the same ablated model."""
    digest = sha256("\n".join([*sorted(edges), str(ablate_from)]).encode())
    if means is not None and means.dim() == 4:
        digest.update(b"one batch")  # which fills no cache that another one continues
    elif means is not None:
        digest.update(means.float().cpu().numpy().tobytes())
    return digest.hexdigest()
