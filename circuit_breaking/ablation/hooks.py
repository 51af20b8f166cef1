"""Cut edges as hooks on a stock Hugging Face model. `ablate.ablate` attaches them.

Reader j of the edge-masked transformer gets r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]. The model's own residual stream
is Σ_i x_i, so with a binary mask r_j is that stream minus Σ_{cut i -> j} (x_i - μ_i). The ablated run computes every
x_i itself, so subtracting this from what the readers of cut edges read is exact, and all other readers are untouched:

- As the model computes the sources of cut edges, hooks write them, as x_i - μ_i, into one stack [P, B, T, D].
- The MLP and `output` each have a norm that nothing else uses: a hook changes that norm's input.
- The heads of a layer share a norm and projections. For heads with cut edges, a hook computes queries, keys and values
  from the corrected stream and writes them over their columns of the projections' output; the other columns stay.

Shapes: B batch, T position, N tokens = B * T, P sources of cut edges, S distinct reads of a layer's heads, H heads,
D width, K head width. A unit is the query, key or value of one head: K columns of a projection.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV
from circuit_breaking.models.families.spec import LayerSpec, ModelSpec, NormSpec, check_supported

OPTIONS = {  # of a description, those that the hooks support
    "gate", "query_norm", "key_norm", "window",
    "positions", "rotary", "unembedding_bias", "parallel",
}  # fmt: skip
NORMS: dict[str, Callable[[Tensor, nn.Module, float], Tensor]] = {
    # Functions, because calling the module would run its hooks. The engine's own RMSNorm has a frozen gain and would
    # round differently from the model; this one is a single kernel that also gives the gain a gradient.
    "layer": lambda x, module, eps: F.layer_norm(x, module.weight.shape, module.weight, module.bias, eps),
    "rms": lambda x, module, eps: F.rms_norm(x, module.weight.shape, module.weight, eps),
}

Reads = dict[tuple[int, int], frozenset[int]]  # (0 query, 1 key, 2 value; head) -> rows of the stack cut from it


def check_hooks(model: ModelSpec) -> None:
    """Raise a `UserError` if the hooks do not fit a model."""
    check_supported(model, "cutting edges in a Hugging Face model", OPTIONS, NORMS)
    for layer in model.layers:
        if layer.queries_per_key > 1 and len({layer.query.module, layer.key.module, layer.value.module}) < 3:
            raise UserError(
                "cutting edges in a Hugging Face model does not support keys that are shared by several heads and come "
                f"from one module with the queries, as in this {model.family} model."
            )
        if layer.mlp_norm.module is layer.attention_norm.module:  # a hook on it would change what both read
            raise UserError(
                "cutting edges in a Hugging Face model does not support one norm for attention and MLP, as in this "
                f"{model.family} model."
            )


def normalise(x: Tensor, norm: NormSpec) -> Tensor:
    """Compute a norm of the model without running the hooks on it."""
    return NORMS[norm.kind](x, norm.module, norm.eps)


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


class RunState:
    """What one forward pass hands from hook to hook."""

    stack: Tensor | None = None  # [P, B, T, D]
    units: Tensor | None = None  # [N, units, K], corrected


class StackStart(nn.Module):
    """Allocates the stack at the first layer's norm, and writes `embed` into it if one of its edges is cut."""

    def __init__(self, state: RunState, rows: int, embed: bool, mean: Tensor | None) -> None:
        super().__init__()
        self.state, self.rows, self.embed = state, rows, embed
        self.register_buffer("mean", mean, persistent=False)

    def hook(self, module: nn.Module, args: tuple) -> None:
        stream = args[0]
        self.state.stack = stream.new_empty(self.rows, *stream.shape)
        if self.embed:
            self.state.stack[0].copy_(stream if self.mean is None else stream - self.mean)


class HeadSources(nn.Module):
    """Writes the outputs of some heads of a layer into the stack."""

    def __init__(self, state: RunState, row: int, heads: list[int], layer: LayerSpec, means: Tensor | None) -> None:
        super().__init__()
        self.state, self.row, self.end = state, row, row + len(heads)
        w_o, b_o = layer.w_o, layer.out.bias
        self.n_heads, self.head_width = w_o.shape[:2]
        index = torch.tensor(heads, device=w_o.device)
        constant = w_o.new_zeros(len(heads), 1, w_o.shape[2], dtype=torch.float64)
        if b_o is not None:
            constant += b_o.double() / self.n_heads
        if means is not None:
            constant -= means.to(constant.device, torch.float64)[:, None]
        self.register_buffer("heads", index, persistent=False)
        self.register_buffer("weight", w_o[index].contiguous(), persistent=False)
        self.register_buffer("constant", constant.to(w_o.dtype), persistent=False)

    def hook(self, module: nn.Module, args: tuple) -> None:
        z = args[0].view(-1, self.n_heads, self.head_width).index_select(1, self.heads).transpose(0, 1)
        rows = self.state.stack[self.row : self.end]
        rows.copy_(torch.baddbmm(self.constant, z, self.weight).view_as(rows))


class MLPSource(nn.Module):
    """Writes the output of an MLP into the stack."""

    def __init__(self, state: RunState, row: int, mean: Tensor | None) -> None:
        super().__init__()
        self.state, self.row = state, row
        self.register_buffer("mean", mean, persistent=False)

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.state.stack[self.row].copy_(output if self.mean is None else output - self.mean)


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


class EdgeHooks(nn.Module):
    """All hooks of a set of cut edges, with the tensors they need, which move with the model they are attached to.

    Attributes:
        before, after: pairs of a module and a hook that runs before or after it.
        separate_keys: attention modules whose query heads no longer share keys and values.
    """

    def __init__(self, model: ModelSpec, ends: Iterable[tuple[str, str]], means: Tensor | None) -> None:
        super().__init__()
        check_hooks(model)
        graph = model.graph()
        state = RunState()
        self.parts = nn.ModuleList()
        self.before: list[tuple[nn.Module, Callable]] = []
        self.after: list[tuple[nn.Module, Callable]] = []
        self.separate_keys: list[nn.Module] = []
        ends = list(ends)
        number = {name: at for at, name in enumerate(graph.sources)}
        needed = sorted({number[source] for source, _ in ends})
        row = {graph.sources[source]: at for at, source in enumerate(needed)}
        cut_from: dict[str, set[int]] = {}
        for source, reader in ends:
            cut_from.setdefault(reader, set()).add(row[source])

        def add(part: nn.Module, module: nn.Module, after: bool = False) -> None:
            self.parts.append(part)
            (self.after if after else self.before).append((module, part.hook))

        def mean(source: str, like: Tensor) -> Tensor | None:
            return None if means is None else means[number[source]].to(like)

        first = model.layers[0]
        start = StackStart(state, len(needed), "embed" in row, mean("embed", first.out.weight))
        add(start, first.attention_norm.module)
        readers: list[Reader] = []
        for index, layer in enumerate(model.layers):
            reads = {}
            for head in range(model.n_heads):
                whole = cut_from.get(f"a{index}.{head}", set())
                for part, letter in enumerate(QKV):
                    if rows := whole | cut_from.get(f"a{index}.{head}.{letter}", set()):
                        reads[part, head] = frozenset(rows)
            if reads:
                reader = HeadReader(state, reads, layer)
                readers.append(reader)
                add(reader, layer.attention_norm.module)
                self.after += [(module, partial(reader.write, which, times)) for module, which, times in reader.writers]
                if reader.repeat > 1:
                    self.separate_keys.append(layer.attention)
            if heads := [head for head in range(model.n_heads) if f"a{index}.{head}" in row]:
                names = [f"a{index}.{head}" for head in heads]
                theirs = None if means is None else means[[number[name] for name in names]]
                add(HeadSources(state, row[names[0]], heads, layer, theirs), layer.out.module)
            if rows := cut_from.get(f"m{index}"):
                readers.append(NormReader(state, [frozenset(rows)], layer.out.weight))
                add(readers[-1], layer.mlp_norm.module)
            if f"m{index}" in row:
                add(MLPSource(state, row[f"m{index}"], mean(f"m{index}", layer.out.weight)), layer.mlp, after=True)
        if rows := cut_from.get("output"):
            readers.append(NormReader(state, [frozenset(rows)], model.final_norm.weight))
            add(readers[-1], model.final_norm.module)
        readers[-1].last = True  # it releases the stack
