"""From a plan to modules: which module of a stock model takes which class, with which state.

Shapes: D width, H heads, P nodes that write, U units of a projection's output.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.modules import (
    AblatedLayer,
    HeadOutputs,
    MLPOutput,
    OutputNorm,
    ReaderNorm,
    UnitProjection,
)
from circuit_breaking.ablation.plan import LayerPlan, Plan, Read, read_constants, read_matrix
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.models.families.spec import LayerSpec, ModelSpec, check_supported

State = dict[str, int | Tensor | tuple | None]

# the options of a description that cutting edges supports; modules are called as they are, so most need no code
OPTIONS = (
    "gate", "query_norm", "key_norm", "multiplier", "window",
    "positions", "embedding_scale", "rotary", "unembedding_bias", "logit_divisor", "parallel",
)  # fmt: skip
NORMS = ("layer", "rms", "rms_offset")


def check_cuttable(spec: ModelSpec) -> None:
    """Raise a `UserError` if edges cannot be cut in a model."""
    check_supported(spec, "cutting edges in a Hugging Face model", OPTIONS, NORMS)
    for layer in spec.layers:
        if layer.queries_per_key > 1 and len({layer.query.module, layer.key.module, layer.value.module}) < 3:
            raise UserError(
                "cutting edges in a Hugging Face model does not support keys that are shared by several heads and come "
                f"from one module with the queries, as in this {spec.family} model."
            )
        if layer.mlp_norm.module is layer.attention_norm.module:  # one module cannot read for both
            raise UserError(
                "cutting edges in a Hugging Face model does not support one norm for attention and MLP, as in this "
                f"{spec.family} model."
            )


@dataclass
class Wiring:
    """What to change in a model.

    Attributes:
        modules: each module with the class that it takes and its state.
        separate_keys: attention modules whose heads no longer share keys and values.
    """

    modules: list[tuple[nn.Module, type, State]] = field(default_factory=list)
    separate_keys: list[nn.Module] = field(default_factory=list)


def wire(spec: ModelSpec, plan: Plan, means: Tensor | None) -> Wiring:
    """The changes that make a model follow a plan. `means` are the ablation values [P, D], None for zero."""
    check_cuttable(spec)
    wiring, graph = Wiring(), spec.graph()
    if means is not None:
        means = means.detach().to(spec.embedding.device, torch.float64)
    for number, (layer, layer_plan) in enumerate(zip(spec.layers, plan.layers, strict=True)):
        if not layer_plan.is_plain:
            LayerWiring(spec, layer, number, layer_plan, graph, means).add_to(wiring)
    if plan.output_read is not None:
        reads, like = [plan.output_read], spec.final_norm.weight
        matrix, constants = read_matrix(reads, plan.output_carried), read_constants(reads, means)
        state = {"d": spec.width, "matrix": matrix.to(like), "constants": _like(constants, like)}
        wiring.modules.append((spec.final_norm.module, OutputNorm, state))
    return wiring


def _like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)


class LayerWiring:
    """The changes of one layer. Its hidden state holds, one after another: the stream, the reads of heads, the read of
    the MLP if it is not the stream, the heads and then the MLP that later layers need."""

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, number: int, plan: LayerPlan, graph: EdgeGraph, means: Tensor | None
    ) -> None:
        self.spec, self.layer, self.number, self.plan, self.means = spec, layer, number, plan, means
        self.first_head = graph.layers[number].n_earlier_nodes
        self.like = layer.out.weight
        self.mlp_has_part = plan.mlp_read is not None or bool(plan.mlp_cut_heads)
        self.n_head_reads = 1 + len(plan.reads)  # the stream is one
        self.n_exports = len(plan.export_heads) + plan.export_mlp

    def add_to(self, wiring: Wiring) -> None:
        layer, n_parts = self.layer, self.n_head_reads + self.mlp_has_part + self.n_exports
        whole = getattr(layer.layer, "_orig_mod", layer.layer)  # of a layer that was compiled by itself
        if n_parts == 1:  # it only carries what others need past its own modules
            wiring.modules.append((whole, AblatedLayer, {**self._layer(), "inside": ()}))
            return
        norm = {"d": self.spec.width, "first": 0, "count": self.n_head_reads}
        changes: list[tuple[nn.Module, type, State]] = [(layer.attention_norm.module, ReaderNorm, norm)]
        if self.plan.reads:
            changes += self._projections(wiring)
        changes.append((layer.out.module, HeadOutputs, self._head_outputs()))
        mlp = {"d": self.spec.width, "first": self.n_head_reads if self.mlp_has_part else 0, "count": 1}
        changes.append((layer.mlp_norm.module, ReaderNorm, mlp))
        changes.append((layer.down.module, MLPOutput, {"n_parts": n_parts, "export": self.plan.export_mlp}))
        changed = {module for module, *_ in changes}
        inside = tuple(
            (parent, name, child)
            for parent in layer.layer.modules()
            for name, child in parent.named_children()
            if child in changed
        )
        wiring.modules += [*changes, (whole, AblatedLayer, {**self._layer(), "inside": inside})]

    def _layer(self) -> State:
        plan, reads = self.plan, list(self.plan.reads)
        if self.mlp_has_part:
            reads.append(plan.mlp_read or Read(frozenset(), frozenset({0})))  # the stream, which own heads then miss
        carry_on = [1 + plan.carried_in.index(node) for node in plan.carried_out if node in plan.carried_in]
        return {
            "d": self.spec.width,
            "embed": self.number == 0 and 0 in plan.carried_in,
            "matrix": read_matrix(reads, plan.carried_in).to(self.like),
            "constants": _like(read_constants(reads, self.means), self.like),
            "exports": self.n_exports,
            "carry_on": torch.tensor(carry_on, dtype=torch.long, device=self.like.device),
        }

    def _head_outputs(self) -> State:
        """Which sums of heads go to the MLP's part, if it misses some, and to the parts of exported heads."""
        plan, n_heads = self.plan, self.spec.n_heads
        cut, kept = plan.mlp_cut_heads, [head for head in range(n_heads) if head not in plan.mlp_cut_heads]
        sums_kept = len(kept) < len(cut)
        summed = (kept if sums_kept else cut) if cut else []
        heads = sorted({*plan.export_heads, *summed})
        mix = torch.zeros(bool(cut) + len(plan.export_heads), 1 + len(heads))  # of all heads' sum, and of single heads
        if cut:
            mix[0, 0] = 0.0 if sums_kept else 1.0
            mix[0, [1 + heads.index(head) for head in summed]] = 1.0 if sums_kept else -1.0
        for row, head in zip(mix[bool(cut) :], plan.export_heads, strict=True):
            row[1 + heads.index(head)] = 1.0
        constants = None
        if cut and self.means is not None:
            constants = self.means.new_zeros(len(mix), self.spec.width)
            # the layer multiplies what it writes
            constants[0] = self.means[[self.first_head + head for head in cut]].sum(0) / self.layer.multiplier
        return {
            "plain": self.n_head_reads + (self.mlp_has_part and not cut),
            "n_heads": n_heads,
            "heads": torch.tensor(heads, dtype=torch.long, device=self.like.device),
            "mix": mix.to(self.like),
            "constants": _like(constants, self.like),
            "pad": int(plan.export_mlp),
        }

    def _projections(self, wiring: Wiring) -> Iterator[tuple[nn.Module, type, State]]:
        """The projections to queries, keys and values. Heads share keys and values as long as they read the same."""
        layer, share = self.layer, self.layer.queries_per_key
        separate = any(
            len(set(row[start : start + share])) > 1
            for row in self.plan.units[1:]
            for start in range(0, self.spec.n_heads, share)
        )
        if separate:
            wiring.separate_keys.append(layer.attention)
        units: dict[nn.Module, list[tuple[int, int, int]]] = {}  # unit of the output, unit of the weights, read
        for projection, reads in zip((layer.query, layer.key, layer.value), self.plan.units, strict=True):
            at_first, step = projection.first, projection.step
            shared = self.spec.n_heads // len(projection.weight)
            heads = range(0, self.spec.n_heads, 1 if separate else shared)
            units.setdefault(projection.module, []).extend(
                (at_first + step * at, at_first + step * (head // shared), reads[head]) for at, head in enumerate(heads)
            )
        for module, rows in units.items():
            yield module, UnitProjection, self._units(sorted(rows))

    def _units(self, rows: list[tuple[int, int, int]]) -> State:
        def long(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.like.device)

        state: State = {
            "n": self.n_head_reads,
            "width": self.layer.head_width,
            "units": long([unit for _, unit, _ in rows]),
            "reads": long([read for *_, read in rows]),
        }
        for read in range(1, self.n_head_reads):
            mine = [(at, unit) for at, (_, unit, its) in enumerate(rows) if its == read]
            state |= {f"to_{read}": long([at for at, _ in mine]), f"from_{read}": long([unit for _, unit in mine])}
        return state
