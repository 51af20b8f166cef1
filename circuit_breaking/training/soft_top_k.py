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

HALVINGS = 50  # of the interval in which the threshold lies


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
    """The threshold t of `soft_top_k` for scores [C], by bisection: a scalar on the device of the scores."""
    # t is between these two, because all scores are between their lowest and their highest
    shift = temperature * math.log(count / (len(scores) - count))
    low, high = scores.amin() - shift, scores.amax() - shift
    for _ in range(HALVINGS):  # nothing here waits for the device
        middle = (low + high) / 2
        too_many = torch.sigmoid((scores - middle) / temperature).sum() > count
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (low + high) / 2
