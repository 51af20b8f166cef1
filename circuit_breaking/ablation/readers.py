"""The readers of cut edges: they read the model's residual stream minus the sources that they are cut off from.

Other hooks (`hooks`) write the sources of cut edges into one stack; a reader subtracts its rows of that stack.

Shapes: B batch, T position, N tokens = B * T, P sources of cut edges, S distinct reads of a layer's heads, D width,
K head width. A unit is the query, key or value of one head: K columns of a projection.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.models.families.spec import LayerSpec, NormSpec

NORMS: dict[str, Callable[[Tensor, nn.Module, float], Tensor]] = {
    # Functions, because calling the module would run its hooks. The engine's own RMSNorm has a frozen gain and would
    # round differently from the model; this one is a single kernel that also gives the gain a gradient.
    "layer": lambda x, module, eps: F.layer_norm(x, module.weight.shape, module.weight, module.bias, eps),
    "rms": lambda x, module, eps: F.rms_norm(x, module.weight.shape, module.weight, eps),
}

Reads = dict[tuple[int, int], frozenset[int]]  # (0 query, 1 key, 2 value; head) -> rows of the stack cut from it


class RunState:
    """What one forward pass hands from hook to hook."""

    stack: Tensor | None = None  # [P, B, T, D]
    units: Tensor | None = None  # [N, units, K], corrected


def normalise(x: Tensor, norm: NormSpec) -> Tensor:
    """Compute a norm of the model without running the hooks on it."""
    return NORMS[norm.kind](x, norm.module, norm.eps)


class Reader(nn.Module):
    """Base of the readers: computes what they read in place of the residual stream."""

    def __init__(self, state: RunState, sets: list[frozenset[int]], like: Tensor) -> None:
        super().__init__()
        self.state, self.last = state, False
        self.rows = 1 + max(map(max, sets))  # of the stack; later ones are not written yet
        minus = like.new_zeros(len(sets), self.rows)
        for number, rows in enumerate(sets):
            minus[number, sorted(rows)] = -1
        self.register_buffer("minus", minus, persistent=False)

    def read(self, stream: Tensor) -> Tensor:
        """The stream [B, T, D] without the cut sources, once for every set: [S, B * T * D]."""
        stack, minus = self.state.stack[: self.rows], self.minus
        if self.last:
            self.state.stack = None
        # with a model spread over devices, stream and stack may still be on the previous layer's device
        stream, stack = stream.to(minus.device), stack.to(minus.device)
        return torch.addmm(stream.reshape(1, -1), minus, stack.view(self.rows, -1))


class NormReader(Reader):
    """An MLP or `output`, whose norm has no other user."""

    def hook(self, module: nn.Module, args: tuple) -> tuple:
        return (self.read(args[0]).view(args[0].shape), *args[1:])


class UnitSlot(NamedTuple):
    """A unit's weights, and its place in a projection's output."""

    module: nn.Module  # the projection
    column: int  # in units of K columns, counted after keys and values were repeated if they are
    weight: Tensor  # [D, K]
    bias: Tensor  # [K]


def _share_keys(reads: Reads, share: int) -> tuple[bool, Reads]:
    """Whether query heads that share keys and values need separate ones, and the reads to compute.

    They can go on sharing as long as all heads of a group are cut off from the same sources; then one read of a key
    serves the group.
    """
    groups: dict[tuple[int, int], set[frozenset[int]]] = {}
    members: dict[tuple[int, int], int] = {}
    for (part, head), rows in reads.items():
        if part:
            groups.setdefault((part, head // share), set()).add(rows)
            members[part, head // share] = members.get((part, head // share), 0) + 1
    if any(len(groups[group]) > 1 or members[group] < share for group in groups):
        return True, reads
    return False, {(part, head): rows for (part, head), rows in reads.items() if not part or head % share == 0}


def _slot(unit: tuple[int, int], layer: LayerSpec, separate_keys: bool) -> UnitSlot:
    """Where a unit is written. `separate_keys`: the projection's keys and values are repeated for every query head."""
    part, head = unit
    one = (layer.query, layer.key, layer.value)[part]
    source = head // layer.queries_per_key if part else head  # the head of the projection that the unit is computed by
    column = one.first + one.step * (head if separate_keys else source)
    weight = one.weight[source]
    return UnitSlot(
        one.module, column, weight, weight.new_zeros(weight.shape[1]) if one.bias is None else one.bias[source]
    )


class GroupedProjection(nn.Module):
    """The units of readers that have equally many, as one batched product: [s, N, D] -> [N, s * units, K]."""

    def __init__(self, units: list[list[UnitSlot]], head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        weight = torch.stack([torch.cat([slot.weight for slot in mine], -1) for mine in units])
        bias = torch.stack([torch.cat([slot.bias for slot in mine]) for mine in units])[:, None]
        self.register_buffer("weight", weight, persistent=False)  # [s, D, units * K]
        self.register_buffer("bias", bias, persistent=False)  # [s, 1, units * K]

    def forward(self, x: Tensor) -> Tensor:
        units = torch.baddbmm(self.bias, x, self.weight)
        return units.transpose(0, 1).reshape(x.shape[1], -1, self.head_width)


class HeadReader(Reader):
    """The heads of a layer that have cut edges."""

    def __init__(self, state: RunState, reads: Reads, layer: LayerSpec) -> None:
        separate_keys, reads = _share_keys(reads, layer.queries_per_key)
        by_set: dict[frozenset[int], list[UnitSlot]] = {}
        for unit in sorted(reads):
            by_set.setdefault(reads[unit], []).append(_slot(unit, layer, separate_keys))
        by_count: dict[int, list[frozenset[int]]] = {}
        for rows, units in by_set.items():
            by_count.setdefault(len(units), []).append(rows)
        sets = [rows for same in by_count.values() for rows in same]
        super().__init__(state, sets, layer.out.weight)
        self.norm, self.head_width = layer.attention_norm, layer.head_width
        self.repeat = layer.queries_per_key if separate_keys else 1  # how often each key and value is repeated
        self.sizes = [len(same) for same in by_count.values()]
        self.products = nn.ModuleList(
            GroupedProjection([by_set[rows] for rows in same], self.head_width) for same in by_count.values()
        )
        self._aim([slot for rows in sets for slot in by_set[rows]], layer)

    def _aim(self, units: list[UnitSlot], layer: LayerSpec) -> None:
        """Work out which unit is written to which columns of which projection."""
        self.writers: list[tuple[nn.Module, int, int]] = []  # module, its number, repeat
        modules = list(dict.fromkeys(one.module for one in (layer.query, layer.key, layer.value)))
        device = layer.out.weight.device
        for number, module in enumerate(modules):
            mine = [(at, slot.column) for at, slot in enumerate(units) if slot.module is module]
            repeat = self.repeat if number else 1
            if not mine and repeat == 1:
                continue
            index = torch.tensor(mine, dtype=torch.long, device=device).view(-1, 2)
            at = None if len(mine) == len(units) else index[:, 0].contiguous()
            self.register_buffer(f"at_{number}", at, persistent=False)
            self.register_buffer(f"columns_{number}", index[:, 1].contiguous(), persistent=False)
            self.writers.append((module, number, repeat))
        self.final_writer = self.writers[-1][1]

    def hook(self, module: nn.Module, args: tuple) -> None:
        reads = self.read(args[0]).view(len(self.minus), -1, args[0].shape[-1])
        x = normalise(reads, self.norm)
        if len(self.sizes) == 1:
            self.state.units = self.products[0](x)
        else:
            parts = zip(self.products, x.split(self.sizes), strict=True)
            self.state.units = torch.cat([product(part) for product, part in parts], 1)

    def write(self, number: int, repeat: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Put the corrected units into a projection's output, repeated first for every query head if needed."""
        units, at, columns = self.state.units, getattr(self, f"at_{number}"), getattr(self, f"columns_{number}")
        if number == self.final_writer:
            self.state.units = None
        by_unit = output.view(len(units), -1, self.head_width)
        if repeat > 1:
            by_unit = by_unit.repeat_interleave(repeat, 1)
        by_unit.index_copy_(1, columns, units if at is None else units.index_select(1, at))
        return by_unit.view(*output.shape[:-1], -1)
