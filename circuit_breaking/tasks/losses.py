"""Losses over next-token predictions (layer 0). All in nats.

Shapes: M predictions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at a time: at most 64 MB in float32. Whole multiples of a cache line keep matrix products at full speed.
WORDS_AT_ONCE = PREDICTIONS_AT_ONCE = 1 << 12


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The vocabulary is taken in chunks, with a running peak and sum, as attention may be over keys.

    All predictions meet a chunk of the unembedding while it is in the cache: much faster than a chunk of predictions
    at a time, each of which would meet it all.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        # The loss of a prediction depends on its own hidden state alone, so the gradient at unit weight can be
        # taken while the chunk's logits are at hand; the backward only scales it.
        want = ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if want else None
        for start in range(0, len(hidden), PREDICTIONS_AT_ONCE):
            part = slice(start, start + PREDICTIONS_AT_ONCE)
            at = None if gradient is None else gradient[part]
            losses[part] = losses_of_part(hidden[part], unembedding, bias, targets[part], losses.dtype, at)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), None, None, None


def losses_of_part(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    gradient: Tensor | None,
) -> Tensor:
    """Losses [M] of predictions few enough to be taken at once; sets `gradient` [M, D] to that of each in its state."""
    peak = hidden.new_full((len(hidden), 1), float("-inf"), dtype=dtype)
    total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
    mean = None if gradient is None else torch.zeros_like(gradient, dtype=dtype)  # unembedding, by probability * total
    for start in range(0, len(unembedding), WORDS_AT_ONCE):
        words = slice(start, start + WORDS_AT_ONCE)
        logits = F.linear(hidden, unembedding[words], None if bias is None else bias[words]).to(dtype)
        place = targets[:, None] - start
        here = (place >= 0) & (place < logits.shape[1])
        chosen = torch.where(here, logits.gather(1, place.clamp(0, logits.shape[1] - 1)), chosen)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        shrink = (peak - higher).exp_()
        exponentials = logits.sub_(higher).exp_()
        total = total * shrink + exponentials.sum(1, keepdim=True)
        peak = higher
        if mean is not None:
            mean *= shrink
            if dtype == hidden.dtype:
                mean.addmm_(exponentials, unembedding[words])
            else:
                mean += exponentials.to(hidden.dtype) @ unembedding[words]
    if mean is not None:
        torch.sub((mean / total).to(hidden.dtype), unembedding[targets], out=gradient)
    return (total.log() + peak - chosen)[:, 0]


def cross_entropy_of_hidden(hidden: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Loss of every prediction, without ever holding all logits at once.

    Args:
        hidden: final hidden states [M, D]; gradients flow to it.
        unembedding: [V, D], frozen; bias: [V] or None.
        targets: int64 [M].

    Returns:
        losses [M] in nats, float32 or better.
    """
    return _ChunkedCrossEntropy.apply(hidden, unembedding, bias, targets)


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Logit of the right token minus that of the wrong one: logits [M, V], tokens int64 [M] -> [M]."""
    return logits.gather(1, right[:, None])[:, 0] - logits.gather(1, wrong[:, None])[:, 0]
