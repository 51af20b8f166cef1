"""Continuations of prompts by a stock Hugging Face model, sampled or greedy.

Shapes: n prompts, S samples per prompt, B batch, T position.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch


@dataclass(frozen=True)
class Sampling:
    """How continuations are sampled. The same settings give the same continuations; another batch size gives others."""

    end: int  # token that ends a text
    samples: int = 5  # continuations of each prompt; use 1 with `greedy`, which always gives the same one
    new_tokens: int = 20  # most tokens of a continuation, including the end token
    batch_size: int = 32  # continuations per batch
    seed: int = 0
    greedy: bool = False  # take the most likely token at each position instead of sampling


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: TokenBatch, sampling: Sampling, tick: Callable = lambda: None
) -> list[list[int]]:
    """Continue each prompt, sampling at temperature 1 from the whole distribution, or greedily.

    All models see the same random numbers. The caller's random state is restored (on CPU and CUDA).

    Args:
        model: a Hugging Face causal language model.
        prompts: prompts with the prefix token before them, padded on the right.
        sampling: number and length of continuations, and the seed.
        tick: called after each batch.

    Returns:
        n * S rows of tokens without the prompt, in the order of prompts. A row that ended early has `sampling.end` as
        its last token.

    Raises:
        UserError: a prompt with its continuation is longer than the model allows.
        FloatingPointError: the model returned logits that are not finite.
    """
    longest, limit = prompts.tokens.shape[1] + sampling.new_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise UserError(f"prompts with continuations have up to {longest} tokens and the model {limit} positions.")
    end, size = sampling.end, sampling.batch_size
    # set explicitly, as defaults differ: without top_k=0, `generate` samples from the 50 most likely tokens only
    config = GenerationConfig(
        **(
            {"do_sample": False}
            if sampling.greedy
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ),
        max_new_tokens=sampling.new_tokens,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    order = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
    cuda = [model.device] if model.device.type == "cuda" else []
    rows: list[list[int]] = []
    with torch.random.fork_rng(cuda), default_generation_config(model):
        for start in range(0, len(order), size):
            tokens, attention = pad_left(prompts[order[start : start + size]].to(model.device))
            torch.manual_seed(sampling.seed + start)
            sampled = model.generate(
                tokens,
                attention_mask=attention,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Finite()]),
            )
            for row in sampled[:, tokens.shape[1] :].tolist():
                rows.append(row[: row.index(end) + 1] if end in row else row)
            tick()
    return rows


def pad_left(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Move the padding from the right to the left: tokens and attention mask, both int64 [B, T]."""
    length = batch.tokens.shape[1]
    position = torch.arange(length, device=batch.tokens.device) - (length - batch.lengths[:, None])
    return batch.tokens.gather(1, position.clamp(min=0)), (position >= 0).long()


@contextmanager
def default_generation_config(model: nn.Module) -> Iterator[None]:
    """Replace the model's generation settings (penalties, banned tokens) by the defaults while the block lasts.

    `generate` falls back to them for all that its configuration leaves open, so that models could not be compared.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Finite(LogitsProcessor):
    """Raises an error before sampling from non-finite logits, which on CUDA would end the process's context."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.isfinite().all():
            raise FloatingPointError("the model yields no probabilities")
        return scores
