"""The plain definition of an edge-masked transformer. Read this first.

A model is a graph of nodes: the embedding, the heads and the MLPs. Each node adds its output to the residual stream,
and each later reader reads that stream. Reader j of an edge-masked model gets, in place of Σ_i x_i,

    r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]

with x_i the output of node i, m_ij the weight of edge i -> j (0: cut) and μ_i the ablation value of node i: zero, or
its mean output (Li, Davies, Nadeau 2023, section 3). The sum is over all nodes that come before j. With `ablate_from`,
this holds from that position on, and at earlier ones r_j = Σ_i x_i whatever the mask says. Head j then computes

    q, k, v = norm(r_j) W_Q + b_Q, norm(r_j) W_K + b_K, norm(r_j) W_V + b_V
    x_j     = softmax(scale · q kᵀ + causal mask) v W_O + b_O / H

an MLP computes x_j = MLP(norm(r_j)), and the logits are norm(r_output) W_U. Where a norm comes after attention, a head
writes its share of the normed sum, x_j / σ · gain with σ² = mean((Σ_j x_j)²) + eps over the heads of its layer; an MLP
with a norm after it writes that norm's output. With `split_qkv`, a head's query, key and
value are three readers with separate edges, so q, k and v come from three different r_j.

This file computes just that: it keeps every node's output, reads them with one `einsum`, and runs Hugging Face's own
norms and MLPs one reader at a time, with autograd for the gradients. It is slow, shares no code with the engine, and is
what the engine is tested against.

Shapes: B batch, T position, P nodes so far, R readers that read at the same time, H heads, D model width, K head width,
V vocabulary.
"""

import torch
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.families.spec import LayerSpec, ModelSpec, NormSpec, ProjectionSpec, check_supported

OPTIONS = {  # of a description, those that are computed here
    "gate", "query_norm", "key_norm", "norms_all_heads", "softcap", "attention_out_norm", "mlp_out_norm",
    "rotary_kind", "multiplier", "window", "positions", "embedding_scale", "rotary", "unembedding_bias",
    "head", "parallel", "dropouts",
}  # fmt: skip
Rotary = tuple[Tensor, Tensor] | None  # cos and sin [1, T, r]


class ReferenceModel(nn.Module):
    """A Hugging Face model with a weight on every edge; `forward(tokens, mask, means, ablate_from)` returns logits."""

    def __init__(self, hf: nn.Module, split_qkv: bool = False) -> None:
        super().__init__()
        self.hf, self.split = hf.requires_grad_(False), split_qkv

    def forward(
        self, tokens: Tensor, mask: Tensor, means: Tensor | None = None, ablate_from: int = 0,
        counterfactual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, T, V].

        Args:
            tokens: int64 [B, T].
            mask: weight of each edge [E], in the order of `graph.edges`.
            means: ablation values [P, D], or [max T, P, D] by position; None for zero.
            ablate_from: first position at which cuts act.
            counterfactual: int64 [B, T], tokens on which the outputs of the nodes are the ablation values, in place of
                `means`.
        """
        if counterfactual is not None:
            with torch.no_grad():
                means = self.run(counterfactual, torch.ones_like(mask)).outputs
        nodes = self.run(tokens, mask, means, ablate_from)
        final = norm(describe(self.hf).final_norm, nodes.read(1)[0])
        assert nodes.used == len(mask), "every edge is read once"
        return unembed(describe(self.hf), final)

    def run(self, tokens: Tensor, mask: Tensor, means: Tensor | None = None, ablate_from: int = 0) -> "Nodes":
        """The outputs of all nodes, from which `output` is left to read; `means` may be [P, B, T, D] too."""
        model = describe(self.hf)
        check_supported(model, "the reference", OPTIONS, {"layer", "rms", "rms_offset", "none"})
        if tokens.shape[1] > model.max_positions:
            raise UserError(f"{tokens.shape[1]} tokens are more than the model's {model.max_positions} positions.")
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        embedding = model.embedding[tokens] * model.embedding_scale
        if model.positions is not None:
            embedding = embedding + model.positions[positions]
        nodes = Nodes(embedding, mask, means, ablate_from)
        for layer in model.layers:
            kind = () if layer.rotary_kind is None else (layer.rotary_kind,)
            rotary = None if model.rotary is None else model.rotary(embedding, positions, *kind)
            heads = self.heads(layer, nodes, rotary)
            if not model.parallel:  # else the MLP does not read the heads of its layer
                nodes.write(heads)
            mlp = layer.multiplier * layer.mlp(norm(layer.mlp_norm, nodes.read(1)[0]))
            if layer.mlp_out_norm is not None:
                mlp = norm(layer.mlp_out_norm, mlp)
            nodes.write([*heads, mlp] if model.parallel else [mlp])
        return nodes

    def heads(self, layer: LayerSpec, nodes: "Nodes", rotary: Rotary) -> list[Tensor]:
        """Outputs of a layer's heads, each [B, T, D]."""
        if self.split:
            reads = nodes.read(3 * layer.n_heads).unflatten(0, (layer.n_heads, 3))
        else:
            reads = nodes.read(layer.n_heads)[:, None].expand(-1, 3, -1, -1, -1)
        parts = [project_all(layer, index, *reads[index]) for index in range(layer.n_heads)]
        if layer.norms_all_heads:
            parts = norm_all_heads(layer, parts)
        outputs = [head(layer, index, *parts[index], rotary) for index in range(layer.n_heads)]
        if layer.attention_out_norm is not None:  # each head's share of the normed sum
            total = sum(outputs)
            divisor = (total.square().mean(-1, keepdim=True) + layer.attention_out_norm.eps).sqrt()
            outputs = [gain(layer.attention_out_norm) * output / divisor for output in outputs]
        return outputs


class Nodes:
    """The outputs x_i of all nodes so far, [P, B, T, D], in the graph's order, and the reads of the next readers."""

    def __init__(self, embedding: Tensor, mask: Tensor, means: Tensor | None, ablate_from: int) -> None:
        self.ablated = torch.arange(embedding.shape[1], device=embedding.device)[:, None] >= ablate_from  # [T, 1]
        self.outputs, self.mask, self.used = embedding[None], mask, 0
        self.means = means  # [all nodes, 1 or B, 1 or T, D]
        if means is not None and means.dim() < 4:
            by_node = means[None] if means.dim() == 2 else means[: embedding.shape[1]]
            self.means = by_node.transpose(0, 1)[:, None]

    def read(self, readers: int) -> Tensor:
        """What the next R readers get, [R, B, T, D], if they read all nodes so far."""
        count = len(self.outputs)
        m = self.mask[self.used : self.used + readers * count].view(readers, count)
        self.used += readers * count
        r = torch.einsum("ji,ibtd->jbtd", m, self.outputs)
        if self.means is not None:
            r = r + torch.einsum("ji,ibtd->jbtd", 1 - m, self.means[:count].expand(-1, *r.shape[1:3], -1))
        return torch.where(self.ablated, r, self.outputs.sum(0))

    def write(self, outputs: list[Tensor]) -> None:
        """Add the outputs of the next nodes."""
        self.outputs = torch.cat([self.outputs, torch.stack(outputs)])


def project_all(layer: LayerSpec, index: int, r_q: Tensor, r_k: Tensor, r_v: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value, [B, T, K] each, of a head that reads the streams r_q, r_k and r_v [B, T, D] for them."""
    group = index // layer.queries_per_key  # heads may share keys and values
    q = project(layer, layer.query, index, r_q)
    k = project(layer, layer.key, group, r_k)
    v = project(layer, layer.value, group, r_v)
    if layer.query_norm is not None and not layer.norms_all_heads:
        q = norm(layer.query_norm, q)
    if layer.key_norm is not None and not layer.norms_all_heads:
        k = norm(layer.key_norm, k)
    return q, k, v


def norm_all_heads(layer: LayerSpec, parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Queries and keys divided by the root mean square over all heads of a layer, and times their own gains.

    A key that several heads share counts once for each of them, since each makes it from its own stream.
    """
    normed = []
    for spec, one, share in ((layer.query_norm, 0, 1), (layer.key_norm, 1, layer.queries_per_key)):
        gains = gain(spec).unflatten(0, (-1, layer.head_width))
        squares = torch.stack([part[one].square().mean(-1, keepdim=True) for part in parts])  # [H, B, T, 1]
        divisor = (squares.mean(0) + spec.eps).sqrt()
        normed.append([gains[index // share] * part[one] / divisor for index, part in enumerate(parts)])
    return [(q, k, part[2]) for q, k, part in zip(*normed, parts, strict=True)]


def head(layer: LayerSpec, index: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
    """Output [B, T, D] of a head, before a norm after attention, from its query, key and value [B, T, K]."""
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    scores = q @ k.transpose(-1, -2) * layer.scale  # [B, T, T]
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    at = torch.arange(scores.shape[-1], device=scores.device)
    distance = at[:, None] - at  # from each token back to each token that it may attend to, [T, T]
    hidden = distance < 0
    if layer.window is not None:
        hidden = hidden | (distance >= layer.window)
    pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    bias = 0 if layer.out.bias is None else layer.out.bias / layer.n_heads  # all heads together add it once
    return layer.multiplier * (pattern @ v @ layer.w_o[index] + bias)


def project(layer: LayerSpec, one: ProjectionSpec, index: int, read: Tensor) -> Tensor:
    """A head's query, key or value [B, T, K]."""
    x = norm(layer.attention_norm, read) @ one.weight[index]
    return x if one.bias is None else x + one.bias[index]


def norm(spec: NormSpec, x: Tensor) -> Tensor:
    """A norm of the model over [..., D].

    LayerNorm is Hugging Face's module. RMSNorm is written out, because that module computes in float32 even in float64.
    """
    if spec.kind == "layer":
        return spec.module(x)
    if spec.kind == "none":
        return x
    return gain(spec) * x / (x.square().mean(-1, keepdim=True) + spec.eps).sqrt()


def gain(spec: NormSpec) -> Tensor:
    """The factors of what an RMSNorm has divided."""
    return 1 + spec.weight if spec.kind == "rms_offset" else spec.weight


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of [B, T, K]: turns the first r components, and leaves the others as they are."""
    cos, sin = rotary
    r = cos.shape[-1]
    a, b = x[..., : r // 2], x[..., r // 2 : r]
    return torch.cat([x[..., :r] * cos + torch.cat([-b, a], -1) * sin, x[..., r:]], -1)


def unembed(model: ModelSpec, final: Tensor) -> Tensor:
    """Logits [B, T, V] of the final hidden state [B, T, D]."""
    logits = final @ model.unembedding.t()
    if model.unembedding_bias is not None:
        logits = logits + model.unembedding_bias
    logits, cap = logits / model.head.divisor, model.head.softcap
    return logits if cap is None else cap * (logits / cap).tanh()
