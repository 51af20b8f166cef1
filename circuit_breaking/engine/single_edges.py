"""The model with one edge cut, for every edge: exact activation patching of single edges, in batches.

If i -> j is the only edge that is cut, the whole model differs in one read: r_j is less by x_i - μ_i. All layers after
reader j read the residual stream as in the whole model. So the pass of each edge begins at its reader, and the passes
of many edges into one reader are one batch of residual streams.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, n edges at a time, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from circuit_breaking.engine.network import LayerBlock
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.engine.whole import write_mlp


class SingleEdges:
    """Final hidden states of the model with each edge cut alone, on one batch.

    What a cut edge carries is what the model's ablation values say, also inside `model.resampling`.

    Args:
        model: the model; its mask does not matter.
        tokens: int64 [B, T].
    """

    @torch.no_grad()
    def __init__(self, model: EdgeMaskedTransformer, tokens: Tensor) -> None:
        self.model, self.tokens, self.graph = model, tokens, model.graph
        run = model.new_pass(torch.ones_like(model.mask.weights), tokens)
        run.forward()
        # by device, of which there is one without `device_map`
        self.changes: list[Tensor] = []  # x - μ of the nodes up to the last layer there [P, N, D]
        self.rotary = [one.inputs.rotary for one in run.passes]
        self.device_of: list[int] = []  # number of the device of each layer, and of `output`
        for number, one in enumerate(run.passes):
            changes = one.buffers.node_outputs_3d.clone()
            changes.view(len(changes), *tokens.shape, -1)[:, :, : model.ablate_from] = 0
            self.changes.append(changes)
            self.device_of += [number for group in one.network.groups for _ in group.parts]
        self.device_of.append(len(run.passes) - 1)
        stream, self.streams = run.passes[0].network.embed(tokens), []
        run.release()
        for layer in range(self.graph.n_layers):
            self.streams.append(self._on_device(layer, stream))
            stream = self._layer(layer, stream)
        self.streams.append(stream)  # before each layer, and at the end: [N, D] each

    def whole(self) -> Tensor:
        """Final hidden state of the whole model, [B, T, D]."""
        return self._hidden(self.streams[-1])[0]

    @torch.no_grad()
    def cut(self, edges_at_once: int = 32) -> Iterator[tuple[slice, Tensor]]:
        """The edges in the graph's order, some at a time: which ones, and the final hidden state [n, B, T, D]."""
        edge = 0
        for reader, count in enumerate(self.model.n_read.tolist()):
            there = self.changes[self.device_of[reader // (self.graph.head_readers + 1)]]
            for start in range(0, count, edges_at_once):
                changes = there[start : min(start + edges_at_once, count)]
                found = self._hidden(self._from_reader(reader, changes))
                yield slice(edge + start, edge + start + len(changes)), found
            edge += count

    def _from_reader(self, reader: int, changes: Tensor) -> Tensor:
        """Final residual streams [n * N, D] if a reader gets less by each of some changes [n, N, D]."""
        copies = len(changes)
        layer, number = divmod(reader, self.graph.head_readers + 1)
        stream = self.streams[layer]
        if layer == self.graph.n_layers:  # `output`
            return (stream - changes).flatten(0, 1)
        block = self.model.blocks[layer]
        if number < self.graph.head_readers:
            qkv = block.qkv.of_stream(stream)[:, None].repeat(1, copies, 1, 1)  # [readers, n, N, K]
            read = (stream - changes).flatten(0, 1)
            qkv[number] = block.qkv.of_stream(read, slice(number, number + 1))[0].view_as(qkv[number])
            heads = self._heads(layer, qkv.flatten(1, 2))
            after = self._after_heads(block, stream.repeat(copies, 1), heads)
        else:
            heads = self._heads(layer, block.qkv.of_stream(stream))
            before = stream if self.graph.parallel else stream + heads
            read = (before - changes).flatten(0, 1)
            after = (stream + heads).repeat(copies, 1) + mlp_output(block, read)
        for later in range(layer + 1, self.graph.n_layers):
            after = self._layer(later, after)
        return after

    def _layer(self, layer: int, stream: Tensor) -> Tensor:
        """The residual streams [M, D] after a layer of the whole model."""
        block, stream = self.model.blocks[layer], self._on_device(layer, stream)
        return self._after_heads(block, stream, self._heads(layer, block.qkv.of_stream(stream)))

    def _on_device(self, layer: int, stream: Tensor) -> Tensor:
        return stream.to(self.changes[self.device_of[layer]].device)

    def _heads(self, layer: int, qkv: Tensor) -> Tensor:
        """What all heads of a layer write together [M, D], from queries, keys and values [readers, M, K]."""
        block, rotary = self.model.blocks[layer], self.rotary[self.device_of[layer]]
        texts = qkv.shape[1] // self.tokens.shape[1]
        z = block.attention(qkv, texts, rotary).transpose(0, 1).flatten(1)  # [M, H * K]
        weight, bias = block.w_o.flatten(0, 1), len(block.w_o) * block.b_o
        if block.attention_out_norm is None:
            return torch.addmm(bias, z, weight)
        out = z.new_empty(1, len(z), weight.shape[1])
        block.attention_out_norm.write(out, z[None], weight[None], bias)
        return out[0]

    def _after_heads(self, block: LayerBlock, stream: Tensor, heads: Tensor) -> Tensor:
        """The residual streams after a layer, from those before it and what its heads write, [M, D] each."""
        after = stream + heads
        return after + mlp_output(block, stream if self.graph.parallel else after)

    def _hidden(self, streams: Tensor) -> Tensor:
        return self.model.norm(streams.to(self.model.device)).view(-1, *self.tokens.shape, streams.shape[-1])


def mlp_output(block: LayerBlock, read: Tensor) -> Tensor:
    """What a layer's MLP writes, from what it reads, [M, D] each."""
    out = torch.empty_like(read)
    write_mlp(block, read, out)
    return out
