"""From a plan to modules: which module of a stock model takes which class, with which state.

Shapes: B batch, T position, D width, H heads, P nodes that write, R reads, U units of a projection's output.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.layer_norms import PartReader, SeparateKeyNorm, SharedNorm
from circuit_breaking.ablation.modules import (
    FEW_HEADS,
    FEW_TERMS,
    AblatedLayer,
    HeadOutputs,
    MLPOutput,
    OutputNorm,
    ReaderNorm,
    SharedDropout,
    StreamReader,
    UnitProjection,
)
from circuit_breaking.ablation.plan import LayerPlan, Plan, Read, read_constants, read_matrix, read_terms
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.models.families.spec import NO_NORM, LayerSpec, ModelSpec, NormSpec, check_supported

State = dict[str, int | Tensor | tuple | None]

# the options of a description that cutting edges supports; modules are called as they are, so most need no code
OPTIONS = (
    "gate", "query_norm", "key_norm", "norms_all_heads", "softcap", "attention_out_norm", "mlp_out_norm",
    "rotary_kind", "multiplier", "window", "positions", "embedding_scale", "rotary", "unembedding_bias",
    "head", "parallel", "dropouts",
)  # fmt: skip
NORMS = ("layer", "rms", "rms_offset", "none")


def check_cuttable(spec: ModelSpec) -> None:
    """Raise a `UserError` if edges cannot be cut in a model."""
    check_supported(spec, "cutting edges in a Hugging Face model", OPTIONS, NORMS)
    for layer in spec.layers:
        made_by = {layer.query.module, layer.key.module, layer.value.module}
        side_by_side = len({one.step for one in (layer.query, layer.key, layer.value)}) == 1 and layer.query.step == 1
        if layer.queries_per_key > 1 and len(made_by) < 3 and not (len(made_by) == 1 and side_by_side):
            raise UserError(
                "cutting edges in a Hugging Face model does not support keys that are shared by several heads and "
                f"computed between the queries, as in this {spec.family} model."
            )
        if layer.mlp_norm is not NO_NORM and layer.mlp_norm.module is layer.attention_norm.module:  # it reads for one
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


def wire(spec: ModelSpec, plan: Plan, means: Tensor | None, ablate_from: int = 0) -> Wiring:
    """The changes that make a model follow a plan.

    Args:
        spec: the model.
        plan: what its layers do.
        means: the ablation values [P, D], or [P, B, T, D] for one batch; None for zero.
        ablate_from: the first position at which cuts act.
    """
    check_cuttable(spec)
    wiring, graph, limited = Wiring(), spec.graph(), ablate_from > 0
    if means is not None and means.dim() == 2:
        means = means.detach().to(spec.embedding.device, torch.float64)
    limited_output = limited and plan.output_read is not None
    for number, (layer, layer_plan) in enumerate(zip(spec.layers, plan.layers, strict=True)):
        limited_after = limited_output and number == graph.n_layers - 1
        if limited_after or not layer_plan.is_plain:
            LayerWiring(spec, layer, number, layer_plan, graph, means, limited, limited_after).add_to(wiring)
    if plan.output_read is not None:
        reads, like = [plan.output_read], spec.final_norm.weight
        state = {
            "d": spec.width,
            **reads_as_state(reads, plan.output_carried, like, int(limited)),
            "constants": constants_like(read_constants(reads, means), like),
            "limited": limited,
        }
        wiring.modules.append((spec.final_norm.module, OutputNorm, state))
    return wiring


def reads_as_state(reads: list[Read], carried: list[int], like: Tensor, more: int = 0) -> State:
    """How a module makes reads of the stream and the carried outputs: part by part if they are few, else as a matrix
    over them and `more` parts that are not read, of the type and on the device of `like`."""
    terms = read_terms(reads, carried)
    if terms is not None and sum(len(needs) for _, needs in terms) - len(terms) <= FEW_TERMS:
        return {"terms": terms, "matrix": None}
    return {"terms": None, "matrix": torch.nn.functional.pad(read_matrix(reads, carried), (0, more)).to(like)}


def constants_like(constants: Tensor | None, like: Tensor) -> Tensor | None:
    """Constants of reads, [R, D] or [R, B, T, D], of the type and on the device of `like`: [R, D] or [B, T, R, D]."""
    return None if constants is None else constants.movedim(0, -2).to(like)


class LayerWiring:
    """The changes of one layer, whose hidden state has the parts of its plan."""

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, number: int, plan: LayerPlan, graph: EdgeGraph, means: Tensor | None,
        limited: bool, limited_after: bool,
    ) -> None:  # fmt: skip
        self.spec, self.layer, self.number, self.plan, self.means = spec, layer, number, plan, means
        self.limited_after = limited_after  # whether the final norm needs to know where cuts act
        self.first_head = graph.layers[number].n_earlier_nodes
        self.like = layer.out.weight
        self.parts = plan.parts(limited)

    def add_to(self, wiring: Wiring) -> None:
        layer, parts, d = self.layer, self.parts, self.spec.width
        whole = getattr(layer.layer, "_orig_mod", layer.layer)  # of a layer that was compiled by itself
        like = (layer.out.module,)
        if not self.plan.changes_modules:
            for norm, block in ((layer.attention_norm, layer.attention), (layer.mlp_norm, layer.mlp)):
                wiring.modules.append((block if norm is NO_NORM else norm.module, StreamReader, {"like": like}))
            wiring.modules.append((whole, AblatedLayer, {**self._layer(), "like": like, "inside": ()}))
            return
        ablated = parts.count - 1 if parts.ablated else None
        norm = {"d": d, "like": like}
        before = {"first": 0, "count": 1 + parts.reads, "ablated": ablated if parts.reads else None}
        changes: list[tuple[nn.Module, type, State]] = [reader(layer.attention_norm, layer.attention, norm | before)]
        if self.plan.reads:
            changes += self._projections(wiring)
        changes.append((layer.out.module, HeadOutputs, self._head_outputs()))
        mlp = {"first": 1 + parts.reads, "ablated": ablated} if parts.mlp_read else {"first": 0, "ablated": None}
        changes.append(reader(layer.mlp_norm, layer.mlp, norm | mlp | {"count": 1}))
        changes.append((layer.down.module, MLPOutput, {"adds": parts.mlp_adds}))
        for after in (layer.attention_out_norm, layer.mlp_out_norm):
            if after is not None:
                changes.append((after.module, SharedNorm, norm | written_out(after)))
        changes += [(dropout, SharedDropout, {"d": d}) for dropout in layer.dropouts]
        changed = {module for module, *_ in changes}
        inside = tuple(
            (parent, name, child)
            for parent in layer.layer.modules()
            for name, child in parent.named_children()
            if child in changed
        )
        wiring.modules += [*changes, (whole, AblatedLayer, {**self._layer(), "like": like, "inside": inside})]

    def _layer(self) -> State:
        plan, parts = self.plan, self.parts
        stream = Read(frozenset(), frozenset({0}))
        reads = plan.reads + [plan.mlp_read or stream] * parts.mlp_read
        constants = read_constants(reads, self.means)
        if constants is not None and plan.mlp_cut_heads:  # whose outputs the MLP's read lacks after attention
            constants[-1] += self.means[[self.first_head + head for head in plan.mlp_cut_heads]].sum(0)
        carried = [1 + at for at, node in enumerate(plan.carried_in) if node in plan.carried_out]
        return {
            "d": self.spec.width,
            "needs_embed": self.number == 0 and bool(plan.carried_in),
            **reads_as_state(reads, plan.carried_in, self.like),
            "constants": constants_like(constants, self.like),
            "exports": parts.exports,
            "written": _runs([0, *range(parts.first_export, parts.first_export + parts.exports)]),
            "carried": _runs(carried),
            "wide_after": bool(plan.carried_out),
            "limited": parts.ablated or self.limited_after,
            "limited_inside": parts.ablated,
            "limited_after": self.limited_after,
        }

    def _long(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.like.device)

    def _head_outputs(self) -> State:
        """Which heads are computed one by one: those that later layers need, and the cut ones of the MLP's read or the
        kept ones, whichever are fewer."""
        plan, n_heads = self.plan, self.spec.n_heads
        cut = frozenset(plan.mlp_cut_heads)
        read = Read(cut, frozenset(range(n_heads)) - cut, plan.removes)  # of this layer's heads
        summed = sorted(read.needs)
        for_mlp = "mlp" if summed else "nothing" if read.sums_kept else "all"
        heads = sorted({*plan.export_heads, *summed})
        every = len(heads) > FEW_HEADS
        at = list(range(n_heads)) if every else heads
        return {
            "n_heads": n_heads,
            "heads": tuple(heads),
            "every": every,
            "computed": self._long(at),
            "exports": tuple(at.index(head) for head in plan.export_heads),
            "summed": tuple(at.index(head) for head in summed),
            "sums_kept": read.sums_kept,
            "adds": tuple(for_mlp if name == "mlp" else name for name in self.parts.attention_adds),
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
            if layer.norms_all_heads:
                state = {"width": layer.head_width, **written_out(layer.key_norm)}
                yield layer.key_norm.module, SeparateKeyNorm, state
        fused = separate and layer.query.module is layer.key.module
        units: dict[nn.Module, list[Unit]] = {}
        for part, reads in enumerate(self.plan.units):
            projection = (layer.query, layer.key, layer.value)[part]
            first, step = projection.first, projection.step
            at_first = part * self.spec.n_heads if fused else first
            shared = self.spec.n_heads // len(projection.weight)
            heads = range(0, self.spec.n_heads, 1 if separate else shared)
            units.setdefault(projection.module, []).extend(
                Unit(at_first + step * at, first + step * (head // shared), reads[head], head, part)
                for at, head in enumerate(heads)
            )
        for module, its_units in units.items():
            yield module, UnitProjection, self._units(sorted(its_units, key=lambda unit: unit.at))

    def _units(self, units: list["Unit"]) -> State:
        # of a head that reads the same for some of query, key and value; those lie evenly unless keys are shared
        own: dict[tuple[int, int, int], list[Unit]] = {}
        for unit in units:
            if unit.read is not None:
                part = unit.part if self.layer.queries_per_key > 1 else 0
                own.setdefault((unit.read, unit.head, part), []).append(unit)
        return {
            "n": 1 + self.parts.reads,
            "width": self.layer.head_width,
            "own": tuple(
                (1 + read, _steps([unit.at for unit in some]), _steps([unit.weight for unit in some]))
                for (read, *_), some in own.items()
            ),
            "reads": self._long([0 if unit.read is None else 1 + unit.read for unit in units]),
            "units": self._long([unit.weight for unit in units]),
            "separate": any(unit.at != unit.weight for unit in units),
        }


class Unit(NamedTuple):
    """A unit of a projection's output: where it is, which unit of the weights makes it, from which of the layer's reads
    (None: the stream), for which head, and for its query (0), key (1) or value (2)."""

    at: int
    weight: int
    read: int | None
    head: int
    part: int


def reader(norm: NormSpec, block: nn.Module, state: State) -> tuple[nn.Module, type, State]:
    """What takes the reads of attention or of the MLP, `block`: the norm before it, or where there is none itself."""
    return (block, PartReader, state) if norm is NO_NORM else (norm.module, ReaderNorm, state)


def written_out(norm: NormSpec) -> State:
    """What a module needs that writes out an RMSNorm."""
    return {"eps": norm.eps, "offset": float(norm.kind == "rms_offset")}


def _runs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Rising numbers as the first and end of each run of neighbours."""
    firsts = [at for at in numbers if at - 1 not in numbers]
    ends = [at + 1 for at in numbers if at + 1 not in numbers]
    return tuple(zip(firsts, ends, strict=True))


def _steps(numbers: list[int]) -> tuple[int, int, int]:
    """Evenly spaced numbers as first, end and step."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    assert numbers == list(range(numbers[0], numbers[-1] + 1, step))
    return numbers[0], numbers[-1] + 1, step
