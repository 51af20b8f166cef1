"""Norms whose backward is fast, alone and together with the projection that follows (layer 1).

Shapes: R readers, N tokens, D width, K what one reader projects to.

Every reader normalises a stream of its own, so the norms before attention touch as much memory as all the rest of a
layer. Here a norm and its projection are one step that works in place: what is kept of a stream is the stream itself,
which its gradient replaces in the backward.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED = 1 << 20  # numbers that one step after another finds in a CPU's cache


def inverse_size(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, which stays as 1; float32 or better."""
    precise = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def readers_at_once(x: Tensor) -> int:
    """How many readers of [R, N, D] to take at a time: as many as stay in a CPU's cache between two steps, else all."""
    return max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = inverse_size(x, eps)
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).to(x.dtype) * gain

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, gain, inverse = ctx.saved_tensors
        at_normed = gradient * gain
        along = (at_normed * x).sum(-1, keepdim=True) * inverse.square() / x.shape[-1]
        return ((at_normed - x * along) * inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., D] (Zhang and Sennrich 2019), with a gain [D] that is frozen.

    PyTorch's own has no backward of its own on CPU and takes ten times as long there.
    """
    return _RMSNorm.apply(x, gain, eps)


class NormedProjection(nn.Module):
    """norm(x) · weight + bias for every reader, with a backward by hand.

    Args:
        weight: [R, D, K], the norm's gain in it.
        bias: [R, 1, K], with the norm's own bias projected in it.
        eps: added to the variance.
        centred: LayerNorm, which takes the mean off; else RMSNorm.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        if centred:  # the backward of taking the mean off is then in the product
            weight = weight - weight.mean(1, keepdim=True)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project [R, N, D] to [R, N, K]; x is centred in place. Also 1 / the norm's divisor, [R, N, 1].

        With the divisor of an earlier call, x is taken to be as that call left it.
        """
        if inverse is None:
            inverse = torch.cat([self._centre(part) for part in x.split(readers_at_once(x))])
        out = torch.bmm(x, self.weight)
        return out.mul_(inverse).add_(self.bias), inverse

    def _centre(self, x: Tensor) -> Tensor:
        """1 / the divisor of x; centres it in place, where the norm does."""
        if self.centred:
            x.sub_(x.mean(-1, keepdim=True))
        return inverse_size(x, self.eps)

    def backward_(self, x: Tensor, inverse: Tensor, out: Tensor, gradient: Tensor) -> None:
        """Replace x, as `forward` left it, by its gradient, given what `forward` returned and the gradient of `out`."""
        along = ((out - self.bias) * gradient).sum(-1, keepdim=True)
        along.mul_(inverse.square()).div_(-x.shape[-1])
        at_once = readers_at_once(x)
        operands = x, along, (gradient * inverse).to(x.dtype), self.weight.transpose(1, 2)
        for part, factor, *product in zip(*(one.split(at_once) for one in operands), strict=True):
            part.mul_(factor).baddbmm_(*product)
