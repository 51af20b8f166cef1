"""Losses over next-token predictions (layer 0). All in nats.

Shapes: M predictions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24  # logits held at a time: 64 MB in float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        # The loss of a prediction depends on its own hidden state alone, so the gradient at unit weight can be
        # taken while the chunk's logits are at hand; the backward only scales it.
        want = ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if want else None
        size = max(1, LOGITS_AT_ONCE // len(unembedding))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], unembedding, bias).to(losses.dtype)
            chosen = logits.gather(1, targets[part, None])
            # logsumexp by hand: the exponentials are reused for the gradient
            peak = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(peak).exp_()
            total = exponentials.sum(1, keepdim=True)
            losses[part] = (total.log() + peak - chosen)[:, 0]
            if want:
                probabilities = exponentials.div_(total)
                probabilities.scatter_add_(1, targets[part, None], probabilities.new_full(chosen.shape, -1.0))
                torch.mm(probabilities.to(hidden.dtype), unembedding, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), None, None, None


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


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of every prediction: both logits [M, V] -> [M], nats."""
    return F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True).sum(-1)
