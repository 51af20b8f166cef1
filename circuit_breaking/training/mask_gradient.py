"""The value and the gradient of a function of the edge mask: what search, attribution and pruning differentiate.

Shapes: E edges.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# of a mask [E], a scalar that is differentiable in the mask: an objective to minimise, a metric, a loss
MaskFunction = Callable[[Tensor], Tensor]


def value_and_gradient(function: MaskFunction, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate a function at a mask.

    Args:
        function: a differentiable function of the mask.
        mask: [E]; it is copied, and gradients do not flow beyond it.

    Returns:
        the value, a detached scalar, and its gradient [E].
    """
    weights = mask.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(weights)
        (gradient,) = torch.autograd.grad(value, weights)
    return value.detach(), gradient
