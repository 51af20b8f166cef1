"""Which node outputs the layers of an ablated model hand on, and what each reader makes of them.

A reader with cut edges reads r_j = Σ_kept x_i + Σ_cut μ_i. The model's residual stream is Σ_i x_i, so

    r_j = stream - Σ_cut x_i + Σ_cut μ_i       where fewer nodes are cut than kept
    r_j = Σ_kept x_i + Σ_cut μ_i               otherwise: what is left of a stream after almost all of it was
                                               subtracted would be rounding errors

A control removes nothing: there r_j = stream + Σ_cut μ_i.

The outputs x_i that appear on the right are carried from the layer that writes them to the last layer that needs them.
`LayerPlan` says what a layer does for this, and `Parts` where things are in its hidden state meanwhile.

Shapes: P nodes that write, D width, C carried outputs, R reads of a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.graph import QKV, EdgeGraph


@dataclass(frozen=True)
class Read:
    """What readers get that are cut off from the same nodes of earlier layers.

    Attributes:
        cut, kept: nodes of earlier layers whose edges are cut, and the others, by number.
        removes: whether the outputs of the cut nodes are removed; otherwise their ablation values are only added.
    """

    cut: frozenset[int]
    kept: frozenset[int]
    removes: bool = True

    @property
    def sums_kept(self) -> bool:
        """Whether the read is the sum of the kept nodes, rather than the stream less the cut ones."""
        return self.removes and len(self.kept) < len(self.cut)

    @property
    def needs(self) -> frozenset[int]:
        """The nodes whose outputs it is made of."""
        if not self.removes:
            return frozenset()
        return self.kept if self.sums_kept else self.cut


@dataclass(frozen=True)
class Parts:
    """The parts of the hidden state inside a layer, each of the model's width, in this order:

    part           how many                                   attention adds          the MLP adds
    stream         1                                          all heads               its output
    reads          of heads that do not read the stream       nothing of use          nothing of use
    MLP read       1 if the MLP does not read the stream      heads not cut from it   its output, which nobody reads
    heads          those that later layers need               that head               nothing
    MLP            1 if later layers need it                  nothing                 its output
    ablated        1 if cuts act at some positions only       nothing                 nothing

    The last is 1 at positions where cuts act and 0 at others.
    """

    reads: int
    mlp_read: bool
    heads: int
    mlp: bool
    ablated: bool

    @property
    def first_export(self) -> int:
        """Where the outputs are that later layers need; the stream and the reads come before."""
        return 1 + self.reads + self.mlp_read

    @property
    def exports(self) -> int:
        """How many outputs of the layer later layers need."""
        return self.heads + self.mlp

    @property
    def count(self) -> int:
        return self.first_export + self.exports + self.ablated

    @property
    def attention_adds(self) -> tuple[str | int, ...]:
        """What attention adds to each part: "all" heads, those that the "mlp" reads, "nothing", or a head by number
        among `heads`."""
        mlp = ("mlp",) * self.mlp_read
        return (*("all",) * (1 + self.reads), *mlp, *range(self.heads), *("nothing",) * (self.mlp + self.ablated))

    @property
    def mlp_adds(self) -> tuple[bool, ...]:
        """Whether the MLP adds its output to each part."""
        return (True,) * self.first_export + (False,) * self.heads + (True,) * self.mlp + (False,) * self.ablated


@dataclass(frozen=True)
class LayerPlan:
    """What an ablated layer does besides its usual work.

    Attributes:
        carried_in: nodes whose outputs come with the stream, in order.
        reads: the distinct reads of heads with cut edges.
        units: for queries, keys and values, the read of each head: the i-th of `reads`, None for the stream. Three
            lists.
        mlp_read: the read of the MLP from earlier layers, None for the stream.
        mlp_cut_heads: heads of this layer that are cut from its own MLP.
        export_heads, export_mlp: nodes of this layer that later readers need: heads by number, and whether its MLP is.
        carried_out: nodes whose outputs go to the next layer with the stream: those of this layer, then the older ones,
            in the order in which they came.
        removes: as for `Read`, of the heads of this layer.
    """

    carried_in: list[int]
    reads: list[Read]
    units: list[list[int | None]]
    mlp_read: Read | None
    mlp_cut_heads: list[int]
    export_heads: list[int]
    export_mlp: bool
    carried_out: list[int]
    removes: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.carried_in or self.carried_out or self.changes_modules)

    @property
    def changes_modules(self) -> bool:
        """Whether its modules read or write something else; if not, it only carries outputs past them."""
        return bool(self.reads or self.mlp_read or self.mlp_cut_heads or self.export_heads or self.export_mlp)

    def parts(self, ablated: bool) -> Parts:
        """The parts of its hidden state. `ablated`: cuts act at some positions only."""
        mlp_read = self.mlp_read is not None or bool(self.mlp_cut_heads)
        return Parts(
            len(self.reads), mlp_read, len(self.export_heads), self.export_mlp, ablated and self.changes_modules
        )


@dataclass(frozen=True)
class Plan:
    """What an ablated model does: for every layer, and before the final norm."""

    layers: list[LayerPlan]
    output_read: Read | None
    output_carried: list[int]


def plan_cuts(graph: EdgeGraph, ends: Iterable[tuple[str, str]], removes: bool = True) -> Plan:
    """The plan for cut edges, given by the names of their source and reader; `removes` as for `Read`."""
    number = {name: index for index, name in enumerate(graph.sources)}
    cut: dict[str, set[int]] = {}
    for source, reader in ends:
        is_head = reader.startswith("a") and not reader.endswith(tuple(f".{part}" for part in QKV))
        for name in [f"{reader}.{part}" for part in QKV] if is_head else [reader]:
            cut.setdefault(name, set()).add(number[source])

    def read_of(reader: str, before: int) -> Read | None:
        nodes = frozenset(node for node in cut.get(reader, ()) if node < before)
        return Read(nodes, frozenset(range(before)) - nodes, removes) if nodes else None

    heads, n_layers = range(graph.n_heads), graph.n_layers
    last_need: dict[int, int] = {}  # node -> the last layer that needs it; `output` is the layer after the last
    found: list[tuple[list[Read], list[list[int]], Read | None, list[int]]] = []
    for layer, part in enumerate(graph.layers):
        before, reads, units = part.n_earlier_nodes, [], []
        for letter in QKV:
            row = [read_of(f"a{layer}.{head}.{letter}", before) for head in heads]
            reads += [read for read in dict.fromkeys(row) if read is not None and read not in reads]
            units.append([None if read is None else reads.index(read) for read in row])
        mlp_read = read_of(f"m{layer}", before)
        own = [node - before for node in sorted(cut.get(f"m{layer}", ())) if node >= before]
        for read in [*reads, *filter(None, [mlp_read])]:
            last_need |= dict.fromkeys(read.needs, layer)
        found.append((reads, units, mlp_read, own))
    output_read = read_of("output", len(number))
    last_need |= dict.fromkeys(output_read.needs if output_read else (), n_layers)

    layers, carried = [], [0] if 0 in last_need else []
    for layer, (reads, units, mlp_read, own) in enumerate(found):
        first = graph.layers[layer].n_earlier_nodes
        exports = [node for node in range(graph.n_heads + 1) if last_need.get(first + node, layer) > layer]
        heads = [node for node in exports if node < graph.n_heads]
        out = [first + node for node in exports] + [node for node in carried if last_need[node] > layer]
        layers.append(
            LayerPlan(carried, reads, units, mlp_read, own, heads, graph.n_heads in exports, out, removes)
        )  # fmt: skip
        carried = out
    return Plan(layers, output_read, carried)


def read_matrix(reads: list[Read], carried: list[int]) -> Tensor:
    """The reads as a matrix over the stream and the carried outputs: [R, 1 + C]."""
    matrix = torch.zeros(len(reads), 1 + len(carried))
    at = {node: 1 + index for index, node in enumerate(carried)}
    for row, read in zip(matrix, reads, strict=True):
        row[0] = 0.0 if read.sums_kept else 1.0
        row[[at[node] for node in read.needs]] = 1.0 if read.sums_kept else -1.0
    return matrix


def read_terms(reads: list[Read], carried: list[int]) -> tuple[tuple[bool, tuple[int, ...]], ...] | None:
    """The reads as numbers of parts: 0 is the stream, and the carried outputs follow.

    Returns:
        for each read, whether the parts after the first are subtracted from it or added to it, and the parts; None if
        a read has no parts at all.
    """
    at = {node: 1 + index for index, node in enumerate(carried)}
    terms = []
    for read in reads:
        needs = tuple(sorted(at[node] for node in read.needs))
        terms.append((not read.sums_kept, needs if read.sums_kept else (0, *needs)))
    return tuple(terms) if all(needs for _, needs in terms) else None


def read_constants(reads: list[Read], means: Tensor | None) -> Tensor | None:
    """The sum of the ablation values [P, ...] of each read's cut nodes: [R, ...]; None for zero ablation."""
    if means is None or not reads:
        return None
    return torch.stack([means[sorted(read.cut)].sum(0) for read in reads])
