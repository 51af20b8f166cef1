"""Losses of next-token predictions, in nats. Every next-token loss of the project is computed here.

Shapes: M predictions, D width, V vocabulary, E edges.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.models.causal_model import CausalModel
from circuit_breaking.models.families import head_of
from circuit_breaking.models.families.spec import PLAIN_HEAD, Head
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.devices import without_autocast

# Logits in memory at a time: at most 64 MB in float32. Multiples of a cache line keep matrix products at full speed.
WORDS_AT_ONCE = PREDICTIONS_AT_ONCE = 1 << 12


class _SavedGradient(torch.autograd.Function):
    """A loss of each prediction, of which `forward` saves the gradient in its first argument, the hidden state."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


class _ChunkedCrossEntropy(_SavedGradient):
    """Cross entropy over chunks of the vocabulary, with a running maximum and sum, as in FlashAttention over keys.

    All predictions use one chunk of the unembedding while it is in the cache. This is much faster than chunks of
    predictions, each of which would read the whole unembedding.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        # The loss of a prediction depends on its own hidden state alone, so its gradient can be computed here, from the
        # same logits; the backward pass only scales it.
        want = ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if want else None
        for start in range(0, len(hidden), PREDICTIONS_AT_ONCE):
            part = slice(start, start + PREDICTIONS_AT_ONCE)
            at = None if gradient is None else gradient[part]
            with without_autocast(hidden.device):  # each logit in the model's own type
                losses[part] = losses_of_part(hidden[part], unembedding, bias, targets[part], losses.dtype, at, softcap)
        ctx.save_for_backward(gradient)
        return losses


def losses_of_part(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    gradient: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Losses [M] of at most `PREDICTIONS_AT_ONCE` predictions.

    If `gradient` [M, D] is given, it is set to the gradient of each loss in its own hidden state. With `softcap` c,
    logits x are capped to c · tanh(x / c), whose derivative is 1 - tanh².
    """
    peak = hidden.new_full((len(hidden), 1), float("-inf"), dtype=dtype)
    total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
    mean = (
        None if gradient is None else torch.zeros_like(gradient, dtype=dtype)
    )  # sum of unembedding · exp(logit - peak)
    for start in range(0, len(unembedding), WORDS_AT_ONCE):
        words = slice(start, start + WORDS_AT_ONCE)
        logits = F.linear(hidden, unembedding[words], None if bias is None else bias[words]).to(dtype)
        if softcap is not None:
            tanh = logits.div_(softcap).tanh_()
            logits = tanh * softcap
        index = targets[:, None] - start  # of the target within the chunk
        inside = (index >= 0) & (index < logits.shape[1])
        chosen = torch.where(inside, logits.gather(1, index.clamp(0, logits.shape[1] - 1)), chosen)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        shrink = (peak - higher).exp_()
        exponentials = logits.sub_(higher).exp_()
        total = total * shrink + exponentials.sum(1, keepdim=True)
        peak = higher
        if mean is not None:
            mean *= shrink
            if softcap is not None:
                exponentials = exponentials * (1 - tanh.square())
            if dtype == hidden.dtype:
                mean.addmm_(exponentials, unembedding[words])
            else:
                mean += exponentials.to(hidden.dtype) @ unembedding[words]
    if mean is not None:
        of_target = unembedding[targets]
        if softcap is not None:
            of_target = (of_target * (1 - (chosen / softcap).square())).to(of_target.dtype)
        torch.sub((mean / total).to(hidden.dtype), of_target, out=gradient)
    return (total.log() + peak - chosen)[:, 0]


def cross_entropy_of_hidden(
    hidden: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor, head: Head = PLAIN_HEAD
) -> Tensor:
    """Cross entropy of every prediction, computed without all logits in memory at once.

    Args:
        hidden: last hidden states [M, D]; gradients flow to them.
        unembedding: [V, D]; no gradient flows to it.
        bias: [V], or None; no gradient flows to it.
        targets: the right tokens, int64 [M].
        head: what makes logits of the product.

    Returns:
        losses [M] in nats, float32 or better.
    """
    if head.divisor != 1:
        hidden, bias = hidden / head.divisor, None if bias is None else bias / head.divisor
    return _ChunkedCrossEntropy.apply(hidden, unembedding, bias, targets, head.softcap)


def prediction_losses(model: CausalModel, batch: TokenBatch, mask: Tensor | None = None) -> Tensor:
    """Next-token loss of every prediction in a batch, text by text, without padding.

    Args:
        model: the model, whose output embedding is treated as a constant.
        batch: the texts; `batch.predicted` marks the predictions.
        mask: mask weights [E] to use instead of the model's own; gradients flow to it.

    Returns:
        losses [M] in nats.
    """
    batch = batch.to(model.device)
    where = batch.predicted
    if model.head is None:
        return losses_of_logits(lambda tokens: model(tokens, mask=mask), batch, len(model.unembedding))
    hidden, targets = model.hidden(batch.tokens, mask=mask)[where], batch.tokens.roll(-1, 1)[where]
    return cross_entropy_of_hidden(hidden, model.unembedding, model.unembedding_bias, targets, model.head)


class _Divergence(_SavedGradient):
    """KL divergence of predictions, over a few predictions at a time: the logits of all are never in memory at once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, original: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
        # as for the cross entropy, the gradient is computed here, from the same logits
        want, dtype = ctx.needs_input_grad[0], torch.promote_types(hidden.dtype, torch.float32)
        divergences = hidden.new_empty(len(hidden), dtype=dtype)
        gradient = torch.empty_like(hidden) if want else None
        rows = max(1, WORDS_AT_ONCE * PREDICTIONS_AT_ONCE // len(unembedding))
        for part in (slice(start, start + rows) for start in range(0, len(hidden), rows)):
            with without_autocast(hidden.device):
                there, here = (
                    F.log_softmax(F.linear(states[part], unembedding, bias).to(dtype), -1)
                    for states in (original, hidden)
                )
                probabilities = there.exp()
                divergences[part] = (probabilities * (there - here)).sum(-1)
                if want:
                    gradient[part] = (here.exp_() - probabilities).to(hidden.dtype) @ unembedding
        ctx.save_for_backward(gradient)
        return divergences


def prediction_divergences(model: CausalModel, batch: TokenBatch, mask: Tensor) -> Tensor:
    """KL(original || ablated) of every next-token prediction in a batch, text by text, without padding.

    Args:
        model: the model. With all edges kept it is the original, whose predictions are treated as constants.
        batch: the texts; `batch.predicted` marks the predictions.
        mask: mask weights [E] of the ablated model; gradients flow to it.

    Returns:
        divergences [M] in nats.
    """
    batch = batch.to(model.device)
    where, whole = batch.predicted, torch.ones_like(mask)
    if model.plain_head:
        with torch.no_grad():
            original = model.hidden(batch.tokens, mask=whole)[where]
        hidden = model.hidden(batch.tokens, mask=mask)[where]
        return _Divergence.apply(hidden, original, model.unembedding, model.unembedding_bias)
    with torch.no_grad():
        there = model(batch.tokens, mask=whole)[where]
    here = model(batch.tokens, mask=mask)[where]
    dtype = torch.promote_types(here.dtype, torch.float32)
    there, here = (F.log_softmax(logits.to(dtype), -1) for logits in (there, here))
    return F.kl_div(here, there, reduction="none", log_target=True).sum(-1)


def losses_of_logits(logits_of: Callable[[Tensor], Tensor], batch: TokenBatch, vocabulary: int) -> Tensor:
    """Losses [M] from the logits [B, T, V] of a model's own forward pass, for a few texts at a time.

    Args:
        logits_of: tokens [B, T] -> logits [B, T, V].
        batch: the texts, on the model's device.
        vocabulary: V, which decides how many texts are computed together.
    """
    texts = max(1, WORDS_AT_ONCE * PREDICTIONS_AT_ONCE // (batch.tokens.shape[1] * vocabulary))
    losses = []
    for rows in (slice(first, first + texts) for first in range(0, len(batch), texts)):
        tokens, where = batch.tokens[rows], batch.predicted[rows]
        logits = logits_of(tokens)[where]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, tokens.roll(-1, 1)[where], reduction="none"))
    return torch.cat(losses)


def trainable_prediction_losses(hf: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The same losses of a stock Hugging Face model, differentiable in all its weights, the output embedding included.

    All logits [M, V] are in memory at once. The model may be of any family.

    Returns:
        losses [M] in nats, and the number of the text that each belongs to, int64 [M].
    """
    batch = batch.to(hf.device)
    where = batch.predicted
    head = head_of(hf)
    if head is None:
        vocabulary = len(hf.get_output_embeddings().weight)
        losses = losses_of_logits(lambda tokens: hf(input_ids=tokens, use_cache=False).logits, batch, vocabulary)
        return losses, where.nonzero()[:, 0]
    hidden = hf.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state[where]
    logits = head.logits(hf.get_output_embeddings()(hidden))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, batch.tokens.roll(-1, 1)[where], reduction="none")
    return losses, where.nonzero()[:, 0]


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Logit of the right token minus that of the wrong one: logits [M, V], tokens int64 [M] -> [M]."""
    return logits.gather(1, right[:, None])[:, 0] - logits.gather(1, wrong[:, None])[:, 0]
