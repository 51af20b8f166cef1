"""The whole model, with every edge kept: what its nodes write, and what the model does with a changed residual stream.

All readers of a layer read the same residual stream then, so it is normalised once a layer instead of once a reader.
That makes a pass about as fast as the Hugging Face model's own. Nothing here is differentiable.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, H heads, D width, K head width.
"""

import torch
from torch import Tensor

from circuit_breaking.engine.network import LayerBlock, Network, Rotary


@torch.no_grad()
def whole_outputs(
    network: Network, tokens: Tensor, rotary: Rotary | None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs of all nodes [P, N, D] on tokens [B, T], with every edge kept, and the residual stream after them [N, D].

    Of a network that is one of several devices' share, only the nodes that write there. `before` is then the residual
    stream before its layers, for every device but the first; it is overwritten.
    """
    graph, stream = network.graph, network.embed(tokens) if before is None else before
    start = 0 if before is None else network.first_node
    nodes = stream.new_empty(network.n_nodes - start, *stream.shape)
    if before is None:
        nodes[0] = stream
    layers = [one for group in network.groups for one in enumerate(group.parts, group.first)]
    for layer, part in layers:
        block, first = network.blocks[layer], part.n_earlier_nodes - start
        mlp = first + graph.n_heads
        z = block.attention(block.qkv.of_stream(stream), len(tokens), rotary)
        write_heads(block, z, nodes[first:mlp])
        if graph.parallel:
            write_mlp(block, stream, nodes[mlp])
            stream += nodes[first : mlp + 1].sum(0)
        else:
            stream += nodes[first:mlp].sum(0)
            write_mlp(block, stream, nodes[mlp])
            stream += nodes[mlp]
    return nodes, stream


def write_heads(block: LayerBlock, z: Tensor, out: Tensor) -> None:
    """Set `out` [H, N, D] to the outputs of a layer's heads, from their attention-weighted values z [H, N, K]."""
    if block.attention_out_norm is None:
        torch.baddbmm(block.b_o, z, block.w_o, out=out)
    else:
        block.attention_out_norm.write(out, z, block.w_o, block.b_o)


def write_mlp(block: LayerBlock, read: Tensor, out: Tensor) -> None:
    """Set `out` [N, D] to the output of a layer's MLP, from what it reads [N, D]."""
    hidden = block.mlp(read)
    if block.mlp_out_norm is None:
        torch.addmm(block.b_down, hidden, block.w_down, out=out)
    else:
        block.mlp_out_norm.write(out[None], hidden[None], block.w_down[None], block.b_down)
