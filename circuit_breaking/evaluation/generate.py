"""What a model writes after prompts: sampled continuations of a stock Hugging Face model (layer 2).

Shapes: n prompts, S samples a prompt, B batch, T position, V vocabulary.
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
    """How continuations are drawn. The same settings draw the same ones; another batch size draws others."""

    end: int  # token that ends a text
    samples: int = 5  # continuations of each prompt; 1 where they are greedy, for all would be the same
    new_tokens: int = 20  # most tokens of a continuation, the end's included
    batch_size: int = 32  # continuations at a time
    seed: int = 0
    greedy: bool = False  # the likeliest token each time, instead of a sample


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: TokenBatch, sampling: Sampling, tick: Callable = lambda: None
) -> list[list[int]]:
    """Continuations, n * S rows of tokens, prompt by prompt: sampled at temperature 1 from the whole distribution, or
    greedy.

    A row that ended has `sampling.end` as its last token. Every model sees the same random numbers, and the caller's
    random state is left as it was (on CPU and CUDA).

    Args:
        model: a Hugging Face causal language model.
        prompts: prompts behind the prefix token, padded on the right as everywhere.
        sampling: how many, how long, and the seed.
        tick: called after each batch.

    Raises:
        UserError: prompt and continuation are longer than the model allows.
        FloatingPointError: the model yields no probabilities.
    """
    longest, limit = prompts.tokens.shape[1] + sampling.new_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise UserError(f"prompts with continuations have up to {longest} tokens and the model {limit} positions.")
    end, size = sampling.end, sampling.batch_size
    # Names what a model's own settings might set too. Without top_k=0, `generate` takes the likeliest 50 only.
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
    with torch.random.fork_rng(cuda), own_settings_aside(model):
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
    """Tokens and attention mask, both int64 [B, T], with the padding moved from the right to the left."""
    length = batch.tokens.shape[1]
    place = torch.arange(length, device=batch.tokens.device) - (length - batch.lengths[:, None])
    return batch.tokens.gather(1, place.clamp(min=0)), (place >= 0).long()


@contextmanager
def own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Without the model's own generation settings, from which `generate` takes all that it is not told: penalties,
    banned tokens and the like, with which models could not be compared."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Finite(LogitsProcessor):
    """Stops where sampling would abort, on CUDA with the whole process's context."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.isfinite().all():
            raise FloatingPointError("the model yields no probabilities")
        return scores
