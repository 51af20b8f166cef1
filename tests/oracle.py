"""A naive edge-masked model to judge the engine by: the definition, written out with autograd and nothing clever.

It keeps every node's output in a growing stack, computes what each reader gets with an einsum over that stack, and
runs Hugging Face's own modules (norms, projections, MLPs) one reader at a time. It shares no code with the engine.
"""

import torch
from torch import Tensor, nn


class NaiveEdgeMasked(nn.Module):
    """GPT-2 or Llama with masks; `forward(tokens, mask, means)` -> logits [B, T, V]."""

    def __init__(self, hf: nn.Module, split_qkv: bool = False) -> None:
        super().__init__()
        self.hf, self.split = hf.requires_grad_(False), split_qkv
        self.gpt2 = hf.config.model_type == "gpt2"
        self.heads = hf.config.num_attention_heads
        self.layers = hf.transformer.h if self.gpt2 else hf.model.layers

    def forward(self, tokens: Tensor, mask: Tensor, means: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        self.positions = torch.arange(length)[None]
        if self.gpt2:
            embedding = self.hf.transformer.wte(tokens) + self.hf.transformer.wpe(self.positions)
        else:
            embedding = self.hf.model.embed_tokens(tokens)
            self.cos, self.sin = self.hf.model.rotary_emb(embedding, self.positions)
        stack = embedding[None]  # [nodes so far, B, T, D]
        if means is not None:  # [all nodes, T or 1, D]
            means = means[:, None] if means.dim() == 2 else means[:length].transpose(0, 1)
        used = 0

        def read(count: int) -> Tensor:
            nonlocal used
            weights = mask[used : used + len(stack) * count].view(count, len(stack))
            used += len(stack) * count
            out = torch.einsum("rs,sbtd->rbtd", weights, stack)
            if means is not None:
                out = (
                    out + torch.einsum("rs,std->rtd", 1 - weights, means[: len(stack)].expand(-1, length, -1))[:, None]
                )
            return out

        for layer in self.layers:
            reads = read(self.heads * (3 if self.split else 1))
            reads = reads.view(self.heads, -1, *reads.shape[1:])
            new = [self.head(layer, h, *(reads[h] if self.split else reads[h].expand(3, -1, -1, -1)))
                   for h in range(self.heads)]  # fmt: skip
            stack = torch.cat([stack, torch.stack(new)])
            stack = torch.cat([stack, self.mlp(layer, read(1)[0])[None]])
        final = read(1)[0]
        assert used == len(mask)
        final = self.hf.transformer.ln_f(final) if self.gpt2 else rms(self.hf.model.norm, final)
        return self.hf.lm_head(final)

    def mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer.mlp(layer.ln_2(x) if self.gpt2 else rms(layer.post_attention_layernorm, x))

    def head(self, layer: nn.Module, h: int, rq: Tensor, rk: Tensor, rv: Tensor) -> Tensor:
        """Output of head h [B, T, D] whose query, key and value read the given streams."""
        if self.gpt2:
            attention, d = layer.attn, rq.shape[-1]
            k = d // self.heads
            weight, bias = attention.c_attn.weight, attention.c_attn.bias

            def project(part: int, stream: Tensor) -> Tensor:
                at = slice(part * d + h * k, part * d + (h + 1) * k)
                return layer.ln_1(stream) @ weight[:, at] + bias[at]

            q, key, v = project(0, rq), project(1, rk), project(2, rv)
            w_out = attention.c_proj.weight[h * k : (h + 1) * k]
            b_out = attention.c_proj.bias / self.heads
        else:
            attention = layer.self_attn
            k, group = attention.head_dim, h // attention.num_key_value_groups

            def part(linear: nn.Linear, stream: Tensor, index: int) -> Tensor:
                return linear(rms(layer.input_layernorm, stream))[..., index * k : (index + 1) * k]

            q = self.rotate(part(attention.q_proj, rq, h))
            key = self.rotate(part(attention.k_proj, rk, group))
            v = part(attention.v_proj, rv, group)
            w_out = attention.o_proj.weight.t()[h * k : (h + 1) * k]
            b_out = 0 if attention.o_proj.bias is None else attention.o_proj.bias / self.heads
        scores = q @ key.transpose(-1, -2) / k**0.5
        length = scores.shape[-1]
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
        return scores.softmax(-1) @ v @ w_out + b_out

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in the precision of x; Hugging Face's module goes through float32 even in float64."""
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
