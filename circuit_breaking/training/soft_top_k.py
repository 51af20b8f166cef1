"""A differentiable choice of the k highest of many scores: each is chosen to a degree, and the degrees add up to k.

Score e is chosen to the degree p_e = σ((s_e - t) / τ), where the threshold t solves Σ_e σ((s_e - t) / τ) = k. The
threshold depends on the scores; by the implicit function theorem

    dt = Σ_e w_e ds_e / Σ_e w_e,   w_e = p_e (1 - p_e).

Shapes: C candidates.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS = 16  # most thresholds that are tried at once
DEGREES = 1 << 16  # degrees that are computed at once, if one threshold does not need more


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, count: float, temperature: float) -> Tensor:
        degrees = torch.sigmoid((scores - threshold(scores, count, temperature)) / temperature)
        ctx.save_for_backward(degrees)
        ctx.temperature = temperature
        return degrees

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (degrees,) = ctx.saved_tensors
        slopes = degrees * (1 - degrees)
        # where all degrees are 0 or 1, the slopes are too small for their sum, and so is the gradient
        shared = (slopes * gradient).sum() / slopes.sum().clamp(min=torch.finfo(slopes.dtype).tiny)
        return slopes * (gradient - shared) / ctx.temperature, None, None


def soft_top_k(scores: Tensor, count: float, temperature: float) -> Tensor:
    """Degrees in [0, 1] to which scores are chosen, differentiable in the scores.

    Args:
        scores: [C].
        count: what the degrees add up to, above 0 and below C; it need not be whole.
        temperature: τ, above 0. The lower, the closer the degrees are to 0 and 1.

    Returns:
        degrees [C].
    """
    return _SoftTopK.apply(scores, count, temperature)


def threshold(scores: Tensor, count: float, temperature: float) -> Tensor:
    """The threshold t of `soft_top_k` for scores [C], to the precision of their type: a scalar on their device.

    The interval in which t lies is divided again and again. Of few scores, several thresholds are tried at once, which
    takes fewer operations.
    """
    # t is between these two, because all scores are between their lowest and their highest
    shift = temperature * math.log(count / (len(scores) - count))
    low, high = scores.amin() - shift, scores.amax() - shift
    parts = 1 + max(1, min(POINTS, DEGREES // len(scores)))
    inside = torch.arange(1, parts, device=scores.device, dtype=scores.dtype) / parts
    for _ in range(math.ceil(-math.log(torch.finfo(scores.dtype).eps / 4, parts))):  # nothing here waits for the device
        points = torch.cat([low[None], low + inside * (high - low), high[None]])
        sums = torch.sigmoid((scores - points[1:-1, None]) / temperature).sum(1)  # falling
        at = (sums > count).sum()  # how many of the points inside are below t
        low, high = points.index_select(0, torch.stack([at, at + 1]))  # points[at] would wait
    return (low + high) / 2
