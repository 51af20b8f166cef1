"""Cut edges in a stock Hugging Face model: `ablate`.

    with ablate(hf_model, ["a3.7->m5", "embed->a0.1"]):
        hf_model.generate(...)

The ablated model runs like any Hugging Face model: sampling, beams, left-padded batches, KV cache, bfloat16 and
`torch.compile` all work. `hooks` explains how; `saved` writes ablated models to disk.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from circuit_breaking.ablation.hooks import EdgeHooks
from circuit_breaking.engine.ablation_values import check_means
from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV, Edge, EdgeGraph
from circuit_breaking.models.families import describe, require_loaded

ATTRIBUTE = "edge_cuts"  # under which an ablated model holds its `Ablation`


class Ablation(nn.Module):
    """Edges cut in a model; also a context manager that removes the cuts at its end.

    Attributes:
        edges: names of the cut edges, each once, in the order given.
    """

    def __init__(self, hf: nn.Module, edges: list[Edge], hooks: EdgeHooks | None) -> None:
        super().__init__()
        self.edges, self.hooks = edges, hooks
        self._model = (hf,)  # in a tuple, since a module must not be its own descendant
        self._handles: list[RemovableHandle] = []
        self._shares: list[tuple[nn.Module, int]] = []

    def _attach(self) -> None:
        self._model[0].add_module(ATTRIBUTE, self)
        if self.hooks is None:
            return
        for module, hook in self.hooks.before:
            self._handles.append(module.register_forward_pre_hook(hook))
        for module, hook in self.hooks.after:
            self._handles.append(module.register_forward_hook(hook))
        for attention in self.hooks.separate_keys:
            self._shares.append((attention, attention.num_key_value_groups))
            attention.num_key_value_groups = 1

    def remove(self) -> None:
        """Restore the model as it was before. A second call does nothing."""
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


def ablate(hf: nn.Module, edges: Iterable[str], means: Tensor | None = None, trainable: bool = False) -> Ablation:
    """Cut edges in a stock Hugging Face model, in place.

    The logits are those of `EdgeMaskedTransformer` with 0 at these edges and 1 elsewhere, in eval mode (dropout is
    not part of the graph). The cost grows with the number of cut edges. Copies of the weights of heads that read or
    write a cut edge are taken now and move with the model; weights changed later have no effect on them.

    Where query heads share keys and values (grouped-query attention) and are cut off from different sources, that
    layer stores keys and values for every query head, also in the KV cache. So a cache that was filled before cannot be
    used after, and the other way round.

    Args:
        hf: the model, changed in place until `remove()` or the end of the `with` block.
        edges: names, `"a0.3->m5"`, or `"m0->a3.7.q"` for a head's query, key or value alone. Both kinds may mix.
        means: ablation values, [P, D] in the order of `graph.sources`; None for zero ablation.
        trainable: let gradients of one forward pass reach the weights through the cuts too. After the weights change,
            remove the cuts and cut the edges again.

    Returns:
        The `Ablation`: its `remove()` restores the model bit for bit.

    Raises:
        UserError: an edge does not exist, the means do not fit or are per position, or the model is of an unknown
            family (see `models.families`), quantised, offloaded, or has cut edges already.
    """
    with torch.set_grad_enabled(trainable):
        return _ablate(hf, edges, means)


def _ablate(hf: nn.Module, edges: Iterable[str], means: Tensor | None) -> Ablation:
    if hasattr(hf, ATTRIBUTE):
        raise UserError("this model has cut edges already. Remove those first, or cut all edges in one call.")
    model = describe(hf)
    require_loaded(hf)
    graph = model.graph()
    if isinstance(edges, str):
        raise UserError(f"edges are a list of names, not one text. Write [{str(edges)!r}].")
    edges = list(dict.fromkeys(Edge(edge) for edge in edges))
    ends = [_ends(graph, edge) for edge in edges]
    if means is not None:
        _check_means(means, len(graph.sources), model.width)
    handle = Ablation(hf, edges, EdgeHooks(model, ends, means) if ends else None)
    handle._attach()
    return handle
