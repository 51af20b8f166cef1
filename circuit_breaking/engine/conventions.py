"""What a cut edge takes with it: attention's output bias and learned positions, inside the nodes or left in the stream.

Here the output bias of attention is part of its heads, each with an equal share, and learned positions are part of
`embed`, as in the published code of targeted edge ablation and in Edge-Pruning. A cut edge takes its share with it.
TransformerLens' `hook_result` and EAP-IG leave the bias in the residual stream, and EAP-IG leaves the positions there
too: every reader gets them whatever is cut. That is the same as ablation values that hold them, so it takes no other
model. docs/methods.md has the table of conventions.

Shapes: P nodes that write, T position, D width.
"""

from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError


def values_left_in_stream(
    model: EdgeMaskedTransformer, attention_bias: bool = True, positions: bool = False, length: int | None = None
) -> Tensor | None:
    """Ablation values like the model's own, with which a cut leaves more in the residual stream.

    Args:
        model: the model; set its `means` to the result. Counterfactual values need nothing: the bias is the same on
            both texts, and so are the positions.
        attention_bias: leave the output bias of attention in the stream. With means nothing changes, because the mean
            of a head holds its share. A norm after attention (Gemma 2, OLMo 2) leaves no bias to speak of.
        positions: leave learned position embeddings in the stream.
        length: the most tokens of a text; None: the positions of the model, which may take much memory.

    Returns:
        [P, D]; [T, P, D] by position if learned positions are left in the stream; None if nothing changes zero
        ablation.

    Raises:
        UserError: the model's means [P, D] hold the mean of the positions, which cannot be told from them.
    """
    means = model.means
    if means is None and attention_bias:
        means = model.embedding.new_zeros(len(model.graph.sources), model.embedding.shape[1])
        for block, part in zip(model.blocks, model.graph.layers, strict=True):
            first = part.n_earlier_nodes
            means[first : first + model.graph.n_heads] = block.constants[0]
    if not positions or model.positions is None or (means is not None and means.dim() == 3):
        return means
    if model.means is not None:
        raise UserError(
            "means [nodes, width] of embed are taken over positions too, so that these cannot be left in the stream. "
            "Compute means by position, or leave positions in embed."
        )
    length = model.max_positions if length is None else length
    base = model.embedding.new_zeros(len(model.graph.sources), model.embedding.shape[1]) if means is None else means
    by_position = base.repeat(length, 1, 1)
    by_position[:, 0] = model.positions[:length]
    return by_position
