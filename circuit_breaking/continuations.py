"""What a model writes after prompts: sampled continuations of a stock Hugging Face model (layer 2).

Shapes: n prompts, S samples a prompt, B batch, T position.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuit_breaking.cli import UserError
from circuit_breaking.text import TokenBatch


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. The same settings draw the same ones; another batch size draws others."""

    end: int  # token that ends a text
    samples: int = 5  # continuations of each prompt
    new_tokens: int = 20  # most tokens of a continuation, the end's included
    batch_size: int = 32  # continuations at a time
    seed: int = 0


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: TokenBatch, sampling: Sampling, tick: Callable = lambda: None
) -> list[list[int]]:
    """Continuations sampled at temperature 1 from the whole distribution: n * S rows of tokens, prompt by prompt.

    A row that ended has `sampling.end` as its last token. Every model sees the same random numbers.

    The loop is written out because `generate` takes what it is not told from each model's own generation settings
    (temperature, penalties, top-k), which would make models incomparable.

    Raises:
        UserError: prompt and continuation are longer than the model allows.
        FloatingPointError: the model yields no probabilities.
    """
    longest, limit = prompts.tokens.shape[1] + sampling.new_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise UserError(f"prompts with continuations have up to {longest} tokens and the model {limit} positions.")
    order = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
    rows: list[list[int]] = []
    for start in range(0, len(order), sampling.batch_size):
        batch = prompts[order[start : start + sampling.batch_size]].to(model.device)
        generator = torch.Generator(model.device).manual_seed(sampling.seed + start)
        sampled = _sample(model, *pad_left(batch), sampling.end, sampling.new_tokens, generator)
        rows += [row[: row.index(sampling.end) + 1] if sampling.end in row else row for row in sampled.tolist()]
        tick()
    return rows


def pad_left(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, both int64 [B, T], with the padding moved from the right to the left."""
    length = batch.tokens.shape[1]
    place = torch.arange(length, device=batch.tokens.device) - (length - batch.lengths[:, None])
    return batch.tokens.gather(1, place.clamp(min=0)), (place >= 0).long()


def _sample(
    model: nn.Module, tokens: Tensor, attention: Tensor, end: int, new_tokens: int, generator: torch.Generator
) -> Tensor:
    """Sampled tokens [B, at most new_tokens]; rows that have ended go on with `end`."""
    cache, sampled = None, []
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(new_tokens):
        output = model(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1)
        if not probabilities.isfinite().all():
            raise FloatingPointError("the model yields no probabilities")
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        tokens[ended] = end
        sampled.append(tokens)
        ended = ended | (tokens[:, 0] == end)
        if ended.all():
            break
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(sampled, 1)
