"""The units of weight matrices that a mask is learned over: how candidates are chosen and scaled in place.

This takes little memory. Weights are changed in place, and only the original weights of candidates are stored. The
gradient of each matrix is reduced to its candidates as soon as autograd has computed it. So there is no second copy of
the model and no gradient of its size. (While candidates are chosen, autograd holds the gradients of one group of
matrices at a time, of `GROUPS`.)

Shapes: C candidates, U units of a matrix, c candidates of a matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.weight_mask import Matrix, find_matrices

GROUPS = 6  # of matrices; candidates are chosen in one after the other


class Candidates:
    """The units that have a mask weight. Their weights are scaled in place.

    Args:
        chosen: matrices, and in each the numbers of the chosen units.
    """

    def __init__(self, chosen: list[tuple[Matrix, Tensor]]) -> None:
        self.chosen = chosen
        self.kept = [matrix.by_unit(matrix.parameter.detach())[units] for matrix, units in chosen]  # [c, ...]
        self.sizes = [len(units) for _, units in chosen]
        self.gradient = torch.zeros(sum(self.sizes), device=chosen[0][0].parameter.device)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Scale the weights of each candidate by its value [C]."""
        for (matrix, units), kept, scale in zip(self.chosen, self.kept, values.split(self.sizes), strict=True):
            matrix.by_unit(matrix.parameter)[units] = kept * scale.to(kept.dtype).view(-1, *[1] * (kept.dim() - 1))

    def take(self, number: int, parameter: nn.Parameter) -> None:
        """Add the gradient of a matrix, as a gradient in the values of its candidates, to `gradient` [C]."""
        matrix, units = self.chosen[number]
        effect = _sum_by_unit(matrix.by_unit(parameter.grad)[units] * self.kept[number])
        self.gradient.split(self.sizes)[number].add_(effect)


def _sum_by_unit(products: Tensor) -> Tensor:
    """[c, ...] -> [c]."""
    return products.flatten(1).sum(1) if products.dim() > 1 else products


@contextmanager
def gradients_taken(hf: nn.Module, matrices: list[Matrix], take: Callable[[int, nn.Parameter], None]) -> Iterator[None]:
    """Inside the block, only these matrices have gradients; each is passed to `take` and then freed.

    A gradient is complete when `take` gets it. In the backward pass of a single forward pass, it is freed before the
    gradient of the next matrix is computed.
    """
    required = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    training, handles = hf.training, []

    def hook(number: int) -> Callable[[nn.Parameter], None]:
        def taken(parameter: nn.Parameter) -> None:
            with torch.no_grad():
                take(number, parameter)
            parameter.grad = None

        return taken

    try:
        hf.eval().requires_grad_(False)
        for number, matrix in enumerate(matrices):
            matrix.parameter.requires_grad_(True)
            handles.append(matrix.parameter.register_post_accumulate_grad_hook(hook(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        hf.train(training)


def choose(hf: nn.Module, granularity: str, count: int, backward: Callable[[], None]) -> list[tuple[Matrix, Tensor]]:
    """The `count` units whose masking should lower an objective most, to first order; fewer if fewer lower it.

    Args:
        backward: runs the backward pass of the objective; called for every group of matrices, each time on the same
            texts.

    Returns:
        matrices, and the numbers of their chosen units in ascending order.
    """
    matrices = find_matrices(hf, granularity)
    firsts = torch.tensor([0, *(matrix.count for matrix in matrices)]).cumsum(0).tolist()
    device = matrices[0].parameter.device
    gains, numbers = torch.empty(0, device=device), torch.empty(0, dtype=torch.long, device=device)  # the best so far

    def take(start: int, which: int, parameter: nn.Parameter) -> None:
        nonlocal gains, numbers
        which += start
        by_unit = matrices[which].by_unit
        gain, unit = (
            _sum_by_unit(by_unit(parameter.grad) * by_unit(parameter)).float().topk(min(count, matrices[which].count))
        )
        gains, numbers = torch.cat([gains, gain]), torch.cat([numbers, unit + firsts[which]])
        gains, best = gains.topk(min(count, len(gains)))
        numbers = numbers[best]

    size = -(-len(matrices) // GROUPS)
    for start in range(0, len(matrices), size):
        with gradients_taken(hf, matrices[start : start + size], partial(take, start)):
            backward()
    numbers = numbers[gains > 0].sort().values
    chosen = []
    for matrix, first in zip(matrices, firsts, strict=False):
        units = numbers[(numbers >= first) & (numbers < first + matrix.count)] - first
        if len(units):
            chosen.append((matrix, units))
    return chosen
