"""Perplexity of any Hugging Face causal language model over a long text, with a sliding window."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError


class Perplexity(NamedTuple):
    """Loss and perplexity of a model on a text."""

    loss: float  # mean negative log-likelihood of a token, nats
    perplexity: float  # exp(loss)
    tokens: int  # number of predicted tokens


def windows(predicted: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, scored) of each window: inputs begin..end-1 predict tokens to `end`, the last `scored` are new."""
    found, done = [], 0
    while done < predicted:
        end = min(predicted, done + (stride if done else window))
        found.append((max(0, end - window), end, end - done))
        done = end
    return found


@torch.no_grad()
def perplexity(hf: nn.Module, tokens: Tensor, window: int = 0, stride: int = 0) -> Perplexity:
    """Perplexity over a text of any length; each token is predicted once.

    Windows of `window` tokens advance by `stride`. A window scores only the tokens that the previous window did not,
    so that after the first window each token is predicted from at least `window - stride` tokens before it (as in
    Hugging Face's guide and the rolling log-likelihoods of lm-eval).

    Args:
        hf: the model, with or without cut edges.
        tokens: int64 [n] with n >= 2; the first token is input only.
        window: input tokens of a forward pass; 0 for the number of positions of the model, at most 1024.
        stride: tokens that a window advances; 0 for half a window.

    Raises:
        UserError: the text has fewer than 2 tokens, or the window does not fit the model or the stride.
    """
    positions = hf.config.max_position_embeddings
    window = window or min(positions, 1024)
    stride = stride or max(1, window // 2)
    if tokens.dim() != 1 or len(tokens) < 2:
        raise UserError(f"a text of {tokens.numel()} tokens leaves nothing to predict. Give a longer one.")
    if not 1 <= window <= positions:
        raise UserError(f"a window of {window} tokens does not fit the model's {positions} positions.")
    if not 1 <= stride <= window:
        raise UserError(f"a stride of {stride} does not fit a window of {window}: tokens would be left out.")
    device = next(hf.parameters()).device
    tokens = tokens.to(device)
    total = 0.0
    for begin, end, scored in windows(len(tokens) - 1, window, stride):
        logits = hf(tokens[None, begin:end], use_cache=False, logits_to_keep=scored).logits[0]
        targets = tokens[end + 1 - scored : end + 1].to(logits.device)
        total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
    loss = total / (len(tokens) - 1)
    return Perplexity(loss, float(torch.tensor(loss, dtype=torch.float64).exp()), len(tokens) - 1)
