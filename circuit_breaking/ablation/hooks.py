"""Cut edges as hooks on a stock Hugging Face model (layer 2; `ablated.ablate` is the way in).

Reader j of the edge-masked transformer gets r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]. The model's own residual stream
is Σ_i x_i, so with a binary mask r_j is that stream minus Σ_{cut i -> j} (x_i - μ_i). Every x_i is computed by the
ablated run itself, so putting right what the readers of cut edges read is exact, and nobody else is touched:

- Sources of cut edges are written, as x_i - μ_i, into one stack [P, B, T, D] as the model computes them.
- MLP and `output` read through a norm of their own: a hook changes that norm's input.
- Heads of a layer share a norm and a projection. Those with cut edges get queries, keys and values of their own,
  which take the place of their columns in the projection's output; the other columns stay as the model made them.

Shapes: B batch, T position, N tokens = B * T, P sources of cut edges, S distinct reads of a layer's heads, H heads,
D width, K head width. A unit is the query, key or value of one head: K columns of a projection.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from circuit_breaking.graph import QKV
from circuit_breaking.models.hook_points import Layer, Model

Reads = dict[tuple[int, int], frozenset[int]]  # (0 query, 1 key, 2 value; head) -> rows of the stack it must not see


class Place(NamedTuple):
    """Where a unit comes from and goes to."""

    projection: int
    column: int  # in units of K, after keys and values were repeated if they are
    weight: Tensor  # [D, K]
    bias: Tensor  # [K]


def _share_keys(reads: Reads, share: int) -> tuple[bool, Reads]:
    """Whether query heads that share keys and values must get their own, and what is left to read if not.

    They share as long as all of them are cut off from the same sources.
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


def _place(unit: tuple[int, int], layer: Layer, heads: int, share: int, own_keys: bool) -> Place:
    part, head = unit
    if len(layer.projections) == 1:
        number, source = 0, part * heads + head if layer.fused_order == "part" else 3 * head + part
        column = source
    else:
        number, source = part, head // share if part else head
        column = head if own_keys else source
    projection = layer.projections[number]
    return Place(number, column, projection.weight[source], projection.bias[source])


class Run:
    """What one forward pass hands from hook to hook."""

    stack: Tensor | None = None  # [P, B, T, D]
    units: Tensor | None = None  # [N, units, K], corrected


class Start(nn.Module):
    """Begins a run at the first layer's norm: makes the stack, and puts `embed` into it where a cut edge needs it."""

    def __init__(self, run: Run, rows: int, embed: bool, mean: Tensor | None) -> None:
        super().__init__()
        self.run, self.rows, self.embed = run, rows, embed
        self.register_buffer("mean", mean, persistent=False)

    def hook(self, module: nn.Module, args: tuple) -> None:
        stream = args[0]
        self.run.stack = stream.new_empty(self.rows, *stream.shape)
        if self.embed:
            self.run.stack[0].copy_(stream if self.mean is None else stream - self.mean)


class HeadSources(nn.Module):
    """Writes the outputs of some heads of a layer into the stack."""

    def __init__(self, run: Run, row: int, heads: list[int], layer: Layer, means: Tensor | None) -> None:
        super().__init__()
        self.run, self.row, self.end = run, row, row + len(heads)
        self.count, self.head_width = layer.w_o.shape[:2]
        index = torch.tensor(heads, device=layer.w_o.device)
        constant = layer.w_o.new_zeros(len(heads), 1, layer.w_o.shape[2], dtype=torch.float64)
        if layer.b_o is not None:
            constant += layer.b_o.double() / self.count
        if means is not None:
            constant -= means.to(constant.device, torch.float64)[:, None]
        self.register_buffer("heads", index, persistent=False)
        self.register_buffer("weight", layer.w_o[index].contiguous(), persistent=False)
        self.register_buffer("constant", constant.to(layer.w_o.dtype), persistent=False)

    def hook(self, module: nn.Module, args: tuple) -> None:
        z = args[0].view(-1, self.count, self.head_width).index_select(1, self.heads).transpose(0, 1)
        rows = self.run.stack[self.row : self.end]
        rows.copy_(torch.baddbmm(self.constant, z, self.weight).view_as(rows))


class MLPSource(nn.Module):
    """Writes the output of an MLP into the stack."""

    def __init__(self, run: Run, row: int, mean: Tensor | None) -> None:
        super().__init__()
        self.run, self.row = run, row
        self.register_buffer("mean", mean, persistent=False)

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.run.stack[self.row].copy_(output if self.mean is None else output - self.mean)


class Reader(nn.Module):
    """Base of the readers: what they read in place of the residual stream."""

    def __init__(self, run: Run, sets: list[frozenset[int]], like: Tensor) -> None:
        super().__init__()
        self.run, self.last = run, False
        self.rows = 1 + max(map(max, sets))  # of the stack; later ones are not written yet
        minus = like.new_zeros(len(sets), self.rows)
        for number, rows in enumerate(sets):
            minus[number, sorted(rows)] = -1
        self.register_buffer("minus", minus, persistent=False)

    def read(self, stream: Tensor) -> Tensor:
        """The stream [B, T, D] without the cut sources, once for every set: [S, B * T * D]."""
        stack, minus = self.run.stack[: self.rows], self.minus
        if self.last:
            self.run.stack = None
        # with a model spread over devices, stream and stack may still be where the layer before is
        stream, stack = stream.to(minus.device), stack.to(minus.device)
        return torch.addmm(stream.reshape(1, -1), minus, stack.view(self.rows, -1))


class NormReader(Reader):
    """An MLP or `output`: reads through a norm of its own."""

    def hook(self, module: nn.Module, args: tuple) -> tuple:
        return (self.read(args[0]).view(args[0].shape), *args[1:])


class Product(nn.Module):
    """Units of readers that have equally many, as one product: [s, N, D] -> [N, s * units, K]."""

    def __init__(self, units: list[list[Place]], head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        weight = torch.stack([torch.cat([place.weight for place in mine], -1) for mine in units])
        bias = torch.stack([torch.cat([place.bias for place in mine]) for mine in units])[:, None]
        self.register_buffer("weight", weight, persistent=False)  # [s, D, units * K]
        self.register_buffer("bias", bias, persistent=False)  # [s, 1, units * K]

    def forward(self, x: Tensor) -> Tensor:
        units = torch.baddbmm(self.bias, x, self.weight)
        return units.transpose(0, 1).reshape(x.shape[1], -1, self.head_width)


class HeadReader(Reader):
    """Those heads of a layer that have cut edges."""

    def __init__(self, run: Run, reads: Reads, layer: Layer, model: Model) -> None:
        share = getattr(layer.attention, "num_key_value_groups", 1)  # query heads for each key
        own_keys, reads = _share_keys(reads, share)
        places = {unit: _place(unit, layer, model.heads, share, own_keys) for unit in reads}
        by_set: dict[frozenset[int], list[Place]] = {}
        for unit in sorted(reads):
            by_set.setdefault(reads[unit], []).append(places[unit])
        by_count: dict[int, list[frozenset[int]]] = {}
        for rows, units in by_set.items():
            by_count.setdefault(len(units), []).append(rows)
        sets = [rows for same in by_count.values() for rows in same]
        super().__init__(run, sets, layer.w_o)
        self.width, self.normalise, self.head_width = model.width, model.normalise, layer.w_o.shape[1]
        self.repeat = share if own_keys else 1  # of each key and value
        self.sizes = [len(same) for same in by_count.values()]
        self.products = nn.ModuleList(
            Product([by_set[rows] for rows in same], self.head_width) for same in by_count.values()
        )
        self._aim([place for rows in sets for place in by_set[rows]], layer)

    def _aim(self, units: list[Place], layer: Layer) -> None:
        """Work out which unit goes into which column of which projection."""
        self.writers: list[tuple[nn.Module, int, int]] = []  # module, number, repeat
        for number, projection in enumerate(layer.projections):
            mine = [(at, place.column) for at, place in enumerate(units) if place.projection == number]
            repeat = self.repeat if number else 1
            if not mine and repeat == 1:
                continue
            index = torch.tensor(mine, dtype=torch.long, device=layer.w_o.device).view(-1, 2)
            at = None if len(mine) == len(units) else index[:, 0].contiguous()
            self.register_buffer(f"at_{number}", at, persistent=False)
            self.register_buffer(f"columns_{number}", index[:, 1].contiguous(), persistent=False)
            self.writers.append((projection.module, number, repeat))
        self.final_writer = self.writers[-1][1]

    def hook(self, module: nn.Module, args: tuple) -> None:
        reads = self.read(args[0]).view(len(self.minus), -1, self.width)
        x = self.normalise(reads, module)
        if len(self.sizes) == 1:
            self.run.units = self.products[0](x)
        else:
            parts = zip(self.products, x.split(self.sizes), strict=True)
            self.run.units = torch.cat([product(part) for product, part in parts], 1)

    def write(self, number: int, repeat: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Put the corrected units into a projection's output, repeated first for every query head if need be."""
        units, at, columns = self.run.units, getattr(self, f"at_{number}"), getattr(self, f"columns_{number}")
        if number == self.final_writer:
            self.run.units = None
        by_unit = output.view(len(units), -1, self.head_width)
        if repeat > 1:
            by_unit = by_unit.repeat_interleave(repeat, 1)
        by_unit.index_copy_(1, columns, units if at is None else units.index_select(1, at))
        return by_unit.view(*output.shape[:-1], -1)


class Cuts(nn.Module):
    """All hooks of a set of cut edges, with the tensors they need, which move with the model they are attached to."""

    def __init__(self, model: Model, ends: Iterable[tuple[str, str]], means: Tensor | None) -> None:
        super().__init__()
        graph = model.graph
        run = Run()
        self.parts = nn.ModuleList()
        self.before: list[tuple[nn.Module, Callable]] = []
        self.after: list[tuple[nn.Module, Callable]] = []
        self.own_keys: list[nn.Module] = []  # attention modules whose keys are no longer shared
        ends = list(ends)
        number = {name: place for place, name in enumerate(graph.sources)}
        needed = sorted({number[source] for source, _ in ends})
        row = {graph.sources[source]: place for place, source in enumerate(needed)}
        cut_from: dict[str, set[int]] = {}
        for source, reader in ends:
            cut_from.setdefault(reader, set()).add(row[source])

        def add(part: nn.Module, place: nn.Module, after: bool = False) -> None:
            self.parts.append(part)
            (self.after if after else self.before).append((place, part.hook))

        def mean(source: str, like: Tensor) -> Tensor | None:
            return None if means is None else means[number[source]].to(like)

        add(Start(run, len(needed), "embed" in row, mean("embed", model.layers[0].w_o)), model.layers[0].norm)
        readers: list[Reader] = []
        for index, layer in enumerate(model.layers):
            reads = {}
            for head in range(model.heads):
                whole = cut_from.get(f"a{index}.{head}", set())
                for part, letter in enumerate(QKV):
                    if rows := whole | cut_from.get(f"a{index}.{head}.{letter}", set()):
                        reads[part, head] = frozenset(rows)
            if reads:
                reader = HeadReader(run, reads, layer, model)
                readers.append(reader)
                add(reader, layer.norm)
                self.after += [(place, partial(reader.write, which, times)) for place, which, times in reader.writers]
                if reader.repeat > 1:
                    self.own_keys.append(layer.attention)
            if heads := [head for head in range(model.heads) if f"a{index}.{head}" in row]:
                names = [f"a{index}.{head}" for head in heads]
                theirs = None if means is None else means[[number[name] for name in names]]
                add(HeadSources(run, row[names[0]], heads, layer, theirs), layer.out)
            if rows := cut_from.get(f"m{index}"):
                readers.append(NormReader(run, [frozenset(rows)], layer.w_o))
                add(readers[-1], layer.mlp_norm)
            if f"m{index}" in row:
                add(MLPSource(run, row[f"m{index}"], mean(f"m{index}", layer.w_o)), layer.mlp, after=True)
        if rows := cut_from.get("output"):
            readers.append(NormReader(run, [frozenset(rows)], model.norm.weight))
            add(readers[-1], model.norm)
        readers[-1].last = True  # it lets the stack go
