"""A naive edge-masked model to judge the engine by: the definition, written out with autograd and nothing clever.

It keeps every node's output in a growing stack, computes what each reader gets with an einsum over that stack, and
runs Hugging Face's own modules (norms, projections, MLPs) one reader at a time. It shares no code with the engine.
"""

import torch
from torch import Tensor, nn


class NaiveEdgeMasked(nn.Module):
    """GPT-2, GPT-NeoX, Llama or Qwen with masks; `forward(tokens, mask, means)` -> logits [B, T, V]."""

    def __init__(self, hf: nn.Module, split_qkv: bool = False) -> None:
        super().__init__()
        self.hf, self.split = hf.requires_grad_(False), split_qkv
        self.gpt2 = hf.config.model_type == "gpt2"
        self.neox = hf.config.model_type == "gpt_neox"
        self.parallel = self.neox and hf.config.use_parallel_residual
        self.heads = hf.config.num_attention_heads
        self.body = hf.transformer if self.gpt2 else hf.gpt_neox if self.neox else hf.model
        self.layers = self.body.h if self.gpt2 else self.body.layers

    def forward(self, tokens: Tensor, mask: Tensor, means: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        self.positions = torch.arange(length, device=tokens.device)[None]
        if self.gpt2:
            embedding = self.body.wte(tokens) + self.body.wpe(self.positions)
        else:
            embedding = self.body.embed_in(tokens) if self.neox else self.body.embed_tokens(tokens)
            self.cos, self.sin = self.body.rotary_emb(embedding, self.positions)
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
            before = read(1)[0] if self.parallel else None  # its MLP does not see its heads
            stack = torch.cat([stack, torch.stack(new)])
            stack = torch.cat([stack, self.mlp(layer, before if self.parallel else read(1)[0])[None]])
        final = read(1)[0]
        assert used == len(mask)
        if self.gpt2:
            return self.hf.lm_head(self.body.ln_f(final))
        return self.hf.lm_head(self.body.final_layer_norm(final) if self.neox else rms(self.body.norm, final))

    def mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.gpt2:
            return layer.mlp(layer.ln_2(x))
        norm = layer.post_attention_layernorm
        return layer.mlp(norm(x) if self.neox else rms(norm, x))

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
            w_out, b_out = attention.c_proj.weight[h * k : (h + 1) * k], attention.c_proj.bias
            scale = k**-0.5 if attention.scale_attn_weights else 1.0
            if attention.scale_attn_by_inverse_layer_idx:
                scale /= attention.layer_idx + 1
        elif self.neox:
            attention, k = layer.attention, rq.shape[-1] // self.heads
            # of every head the query, the key and the value, each k wide
            parts = [
                attention.query_key_value(layer.input_layernorm(stream)).unflatten(-1, (self.heads, 3, k))[..., h, i, :]
                for i, stream in enumerate((rq, rk, rv))
            ]
            q, key, v = self.rotate(parts[0]), self.rotate(parts[1]), parts[2]
            w_out, b_out = attention.dense.weight.t()[h * k : (h + 1) * k], attention.dense.bias
            scale = k**-0.5
        else:
            attention = layer.self_attn
            k, group = attention.head_dim, h // attention.num_key_value_groups

            def part(linear: nn.Linear, stream: Tensor, index: int) -> Tensor:
                return linear(rms(layer.input_layernorm, stream))[..., index * k : (index + 1) * k]

            q, key = part(attention.q_proj, rq, h), part(attention.k_proj, rk, group)
            if self.hf.config.model_type == "qwen3":
                q, key = rms(attention.q_norm, q), rms(attention.k_norm, key)
            q, key = self.rotate(q), self.rotate(key)
            v = part(attention.v_proj, rv, group)
            w_out, b_out = attention.o_proj.weight.t()[h * k : (h + 1) * k], attention.o_proj.bias
            scale = k**-0.5
        scores = q @ key.transpose(-1, -2) * scale
        length = scores.shape[-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return weights @ v @ w_out + (0 if b_out is None else b_out / self.heads)

    def rotate(self, x: Tensor) -> Tensor:
        """Turns the first components of x, as many as there are cosines, and leaves the others."""
        n = self.cos.shape[-1]
        a, b = x[..., : n // 2], x[..., n // 2 : n]
        return torch.cat([x[..., :n] * self.cos + torch.cat([-b, a], -1) * self.sin, x[..., n:]], -1)


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in the precision of x; Hugging Face's module goes through float32 even in float64."""
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
