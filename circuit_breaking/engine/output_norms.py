"""Norms after attention and after the MLP (Gemma 2, OLMo 2): of what a layer's heads, or its MLP, write together.

Node h of n writes its share of the normed sum, so that the shares add up to it. With y_h = z_h W_h + b / n,

    x_h = g y_h / σ,    s = Σ_h y_h,    σ² = mean of squares of s + eps

All heads of a layer share the divisor σ, and gradients flow through it:

    ∂L/∂y_h = g G_h / σ - s c / (D σ³),    G_h = ∂L/∂x_h,    c = Σ_h y_h · (g G_h)

Shapes: n nodes (the heads, or one MLP), N tokens, D width, F width of z.
"""

import torch
from torch import Tensor, nn

from circuit_breaking.engine.norms import inverse_size
from circuit_breaking.models.families.spec import NormSpec


class OutputNorm(nn.Module):
    """An RMSNorm, with a frozen gain, of the sum of what n nodes write."""

    def __init__(self, spec: NormSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.register_buffer("gain", spec.gain(spec.weight.dtype))  # [D]

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
        out.mul_(inverse_size(total, self.eps).to(out.dtype)).mul_(self.gain)
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
