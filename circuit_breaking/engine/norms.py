"""Norms with a fast backward: alone, with the projection that follows, and after the nodes of a layer.

Shapes: R readers, N tokens, D width, K width of what one reader projects to, n nodes that write, F width of their z.

Every reader normalises its own residual stream, so the norms before attention touch as much memory as all the rest of a
layer. Here a norm and its projection are one step that works in place: only the stream is saved, and its gradient
replaces it in the backward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.models.families.spec import NormSpec

CACHED = 1 << 20  # numbers that stay in a CPU's cache from one operation to the next


def inverse_size(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, which stays as 1; float32 or better."""
    precise = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def readers_at_once(x: Tensor) -> int:
    """How many readers of [R, N, D] to process together: on a CPU as many as fit its cache, else all."""
    return max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = inverse_size(x, eps)
        ctx.save_for_backward(x, gain, inverse)
        normed = x * inverse
        return normed.to(x.dtype) * gain if gain.dtype == x.dtype else (normed * gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, gain, inverse = ctx.saved_tensors
        at_normed = gradient * gain
        along = (at_normed * x).sum(-1, keepdim=True) * inverse.square() / x.shape[-1]
        return ((at_normed - x * along) * inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., D] (Zhang and Sennrich 2019), with a frozen gain [D].

    Where the gain is more precise than x, only the product with it is rounded.

    `F.rms_norm` takes ten times as long on a CPU, where its backward is not one kernel. Hugging Face's module computes
    in float32 even for a model in float64.
    """
    return _RMSNorm.apply(x, gain, eps)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms(x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
    return rms_norm(x, weight, eps)


def _rms_offset(x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
    return rms_norm(x, _gain(weight, offset=True), eps)


def _gain(weight: Tensor, offset: bool) -> Tensor:
    # 1 + weight in bfloat16 would lose most of a small weight, so Hugging Face adds in float32
    return 1 + weight.to(torch.promote_types(weight.dtype, torch.float32)) if offset else weight


# `kind` of a `NormSpec` -> (x, gain, bias, eps) -> normalised x
NORMS: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "layer": _layer, "rms": _rms, "rms_offset": _rms_offset, "none": lambda x, *_: x,
}  # fmt: skip


class Norm(nn.Module):
    """A norm of a Hugging Face model with frozen weights, computed in the model's own precision."""

    def __init__(self, spec: NormSpec, source: WeightSource) -> None:
        super().__init__()
        self.normalise, self.eps = NORMS[spec.kind], spec.eps
        self.register_buffer("weight", None if spec.kind == "none" else source.take(spec.weight))
        self.register_buffer("bias", None if spec.bias is None else source.take(spec.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]."""
        return self.normalise(x, self.weight, self.bias, self.eps)


class PlainProjection(nn.Module):
    """x · weight + bias for every reader: `NormedProjection` where there is no norm.

    Args:
        weight: [R, D, K].
        bias: [R, 1, K].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, inverse: None = None) -> tuple[Tensor, None]:
        """Project [R, N, D] to [R, N, K]."""
        return torch.baddbmm(self.bias, x, self.weight), None

    def of_stream(self, x: Tensor, readers: slice = slice(None)) -> Tensor:
        """Project one stream [N, D], which all readers (or some of them) read, to [R, N, K]."""
        bias, weight = self.bias[readers], self.weight[readers]
        return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)

    def backward_(self, x: Tensor, inverse: None, out: Tensor, gradient: Tensor) -> None:
        """Overwrite x with its gradient."""
        torch.bmm(gradient, self.weight.transpose(1, 2), out=x)


def centre(weight: Tensor) -> Tensor:
    """Weights [R, D, K] less their mean over D. The product with LayerNorm's input is the same, and the product with a
    gradient then includes the backward of subtracting the mean."""
    return weight - weight.mean(1, keepdim=True)


class NormedProjection(nn.Module):
    """norm(x) · weight + bias for every reader, with a hand-written backward.

    Args:
        weight: [R, D, K], multiplied by the norm's gain and, for LayerNorm, centred by `centre`.
        bias: [R, 1, K], to which the norm's own bias, projected, is added.
        eps: added to the variance.
        centred: True for LayerNorm, which subtracts the mean; False for RMSNorm.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project [R, N, D] to [R, N, K]; LayerNorm centres x in place.

        Args:
            x: what the readers read.
            inverse: the second result of an earlier call, to compute the first one again. x must be as that call left
                it.

        Returns:
            The projection [R, N, K], and 1 / the norm's divisor [R, N, 1].
        """
        if inverse is None:
            inverse = torch.cat([self._centre(part) for part in x.split(readers_at_once(x))])
        out = torch.bmm(x, self.weight)
        return out.mul_(inverse).add_(self.bias), inverse

    def of_stream(self, x: Tensor, readers: slice = slice(None)) -> Tensor:
        """Project one stream [N, D], which all readers (or some of them) read, to [R, N, K]."""
        bias, weight, x = self.bias[readers], self.weight[readers], x.clone()
        x.mul_(self._centre(x))
        return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)

    def _centre(self, x: Tensor) -> Tensor:
        """Centre x in place where the norm does; return 1 / the norm's divisor."""
        if self.centred:
            x.sub_(x.mean(-1, keepdim=True))
        return inverse_size(x, self.eps)

    def backward_(self, x: Tensor, inverse: Tensor, out: Tensor, gradient: Tensor) -> None:
        """Overwrite x, as `forward` left it, with its gradient, from the results of `forward` and the gradient of
        `out`."""
        along = ((out - self.bias) * gradient).sum(-1, keepdim=True)
        along.mul_(inverse.square()).div_(-x.shape[-1])
        at_once = readers_at_once(x)
        operands = x, along, (gradient * inverse).to(x.dtype), self.weight.transpose(1, 2)
        for part, factor, *product in zip(*(one.split(at_once) for one in operands), strict=True):
            part.mul_(factor).baddbmm_(*product)


class OutputNorm(nn.Module):
    """An RMSNorm after attention or the MLP, of what n nodes write: the heads of a layer, or its MLP (Gemma 2, OLMo 2).

    Node h writes its share of the normed sum, so that the shares add up to it. With y_h = z_h W_h + b / n,

        x_h = g y_h / σ,    s = Σ_h y_h,    σ² = mean of squares of s + eps

    All heads of a layer share the divisor σ, and gradients flow through it:

        ∂L/∂y_h = g G_h / σ - s c / (D σ³),    G_h = ∂L/∂x_h,    c = Σ_h y_h · (g G_h)
    """

    def __init__(self, spec: NormSpec, source: WeightSource) -> None:
        super().__init__()
        self.eps, self.offset = spec.eps, spec.kind == "rms_offset"
        self.register_buffer("weight", source.take(spec.weight))  # [D]

    @property
    def gain(self) -> Tensor:
        """g, [D]."""
        return _gain(self.weight, self.offset)

    def write(self, out: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Set `out` [n, N, D] to the outputs x_h of the nodes.

        Args:
            out: where the outputs go.
            z: [n, N, F]; weight: [n, F, D]; bias: a node's share of it, b / n, [D].

        Returns:
            Their sum before the norm, s [N, D].
        """
        torch.baddbmm(bias, z, weight, out=out)
        total = out.sum(0)
        out.mul_(inverse_size(total, self.eps) * self.gain)  # rounded once, as in Hugging Face's modules
        return total

    def grad_z(self, gradient: Tensor, z: Tensor, weight: Tensor, bias: Tensor, total: Tensor) -> Tensor:
        """∂L/∂z [n, N, F] from ∂L/∂x_h [n, N, D], which is overwritten; the others as in `write`."""
        inverse, back = inverse_size(total, self.eps), weight.transpose(1, 2)
        at_sum = gradient.mul_(self.gain)  # g G_h
        grad = torch.bmm(at_sum, back)
        along = torch.linalg.vecdot(grad, z).sum(0) + at_sum.sum(0) @ bias  # c, [N]
        factor = (along[:, None] * inverse.pow(3) / total.shape[1]).to(total.dtype)
        through_sum = torch.bmm((total * factor).expand(len(z), -1, -1), back)
        return grad.mul_(inverse.to(grad.dtype)).sub_(through_sum)
