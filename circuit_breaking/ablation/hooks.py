"""Cut edges as hooks on a stock Hugging Face model. `ablate.ablate` attaches them.

Reader j of the edge-masked transformer gets r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]. The model's own residual stream
is Σ_i x_i, so with a binary mask r_j is that stream minus Σ_{cut i -> j} (x_i - μ_i). The ablated run computes every
x_i itself, so subtracting this from what the readers of cut edges read is exact, and all other readers are untouched:

- As the model computes the sources of cut edges, hooks write them, as x_i - μ_i, into one stack [P, B, T, D].
- The MLP and `output` each have a norm that nothing else uses: a hook changes that norm's input.
- The heads of a layer share a norm and projections. For heads with cut edges, a hook computes queries, keys and values
  from the corrected stream and writes them over their columns of the projections' output; the other columns stay.

This file writes the stack and decides where hooks go; `readers` computes what the readers of cut edges read.

Shapes: B batch, T position, P sources of cut edges, H heads, D width, K head width.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.readers import NORMS, HeadReader, NormReader, Reader, RunState
from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV
from circuit_breaking.models.families.spec import LayerSpec, ModelSpec, check_supported

OPTIONS = {  # of a description, those that the hooks support
    "gate", "query_norm", "key_norm", "window",
    "positions", "rotary", "unembedding_bias", "parallel",
}  # fmt: skip


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
