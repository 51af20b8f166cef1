"""What a step of mask training minimises, on its batch as a whole or added up over parts of it (layer 3).

A batch is taken in parts where memory is short (`micro_batch`) or several processes share it (`parallel`). Each part is
weighed by its number of predictions, so that the sums are the means over the whole batch, and its backward comes right
after its forward, so that there is never more in memory than one part of one task needs. Whoever differentiates the
objective does not see the difference: the gradients of the mask and of what cut edges carry, where that is learned,
are taken on the way and handed on by the backward.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.errors import UserError
from circuit_breaking.runs.distributed import share, sum_, world
from circuit_breaking.training.refine import Objective

# of a mask and of whether gradients in the mask and the means are wanted: the value, these gradients or None
Measure = Callable[[Tensor, Sequence[bool]], tuple[Tensor, Tensor | None, Tensor | None]]


class _Measured(torch.autograd.Function):
    """The value of a `Measure`, with the gradients that it took."""

    @staticmethod
    def forward(ctx, mask: Tensor, means: Tensor | None, measure: Measure) -> Tensor:
        value, *ctx.gradients = measure(mask.detach(), ctx.needs_input_grad[:2])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        return *(None if gradient is None else scale * gradient for gradient in ctx.gradients), None


@dataclass(frozen=True)
class Term:
    """A task's share of the objective: its weight, the cap of its loss (see `tasks.Task.loss`), and whether what cut
    edges carry, where that is learned, is learned for it too or held fixed while it is computed."""

    task: Any
    weight: float
    cap: float | None = None
    teaches: bool = True

    def loss(self, model: Any, batch: Any, mask: Tensor) -> Tensor:
        """The task's loss on a batch, without the weight."""
        with nullcontext() if self.teaches else model.detached_means():
            return self.task.loss(model, batch, mask, self.cap)


class StepObjective:
    """keep_weight · L_keep - alpha · L_break, on a pair of batches at a time.

    Attributes:
        losses: L_keep and L_break over the whole batches, of the last mask whose gradient was taken.
    """

    def __init__(self, model: Any, keep_task: Any, break_task: Any, settings: Any) -> None:
        self.model, self.micro_batch = model, settings.micro_batch
        cap = settings.break_cap or math.log(len(model.unembedding))
        self.keep = Term(keep_task, settings.keep_weight)
        self.broken = Term(break_task, -settings.alpha, cap, settings.constants_loss == "objective")
        self.losses = (0.0, 0.0)

    def draw(self, batch_size: int) -> Objective:
        """The objective on the next batches of `batch_size` texts each, as a function of the mask [E].

        The function raises a `UserError` where a loss is not finite.
        """
        keep, broken = self.keep.task.draw(batch_size), self.broken.task.draw(batch_size)

        def whole(mask: Tensor) -> Tensor:
            losses = [term.loss(self.model, batch, mask) for term, batch in ((self.keep, keep), (self.broken, broken))]
            self._note(*(float(loss.detach()) for loss in losses), torch.is_grad_enabled())
            return self.keep.weight * losses[0] + self.broken.weight * losses[1]

        def measure(mask: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
            return self._in_parts(keep, broken, mask, wanted)

        def in_parts(mask: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return _Measured.apply(mask, self._learned(), measure)
            return measure(mask, (False, False))[0]

        # on a GPU, so that one pass is under way at a time and can be replayed
        return in_parts if self.micro_batch or world().size > 1 or self.model.device.type == "cuda" else whole

    def _in_parts(
        self, keep: Any, broken: Any, mask: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mask = mask.detach().requires_grad_(wanted[0])
        leaves = [leaf for leaf, want in zip((mask, self._learned()), wanted, strict=True) if want]
        gradients, losses = [torch.zeros_like(leaf) for leaf in leaves], []
        for term, batch in ((self.keep, keep), (self.broken, broken)):
            count, total = term.task.predictions(batch), 0.0
            for part in self._parts(batch, mirrored=term is self.broken):
                weight = term.task.predictions(part) / count if count else math.nan
                if weight == 0:
                    continue
                with torch.set_grad_enabled(bool(leaves)):
                    loss = weight * term.loss(self.model, part, mask)
                    # held means have no part in a term, and nothing has where it is all that was asked for
                    known = bool(leaves) and loss.requires_grad
                    none = [None] * len(leaves)
                    more = torch.autograd.grad(term.weight * loss, leaves, allow_unused=True) if known else none
                total += float(loss.detach())
                for gradient, addition in zip(gradients, more, strict=True):
                    if addition is not None:
                        gradient += addition
            losses.append(total)
        losses = sum_(torch.tensor(losses, dtype=torch.float64)).tolist()
        self._note(*losses, bool(leaves))
        value = mask.new_tensor(self.keep.weight * losses[0] + self.broken.weight * losses[1])
        found = iter([sum_(gradient) for gradient in gradients])
        return value, *(next(found) if want else None for want in wanted)

    def _parts(self, batch: Any, mirrored: bool) -> Iterator[Any]:
        """This process's texts of a batch, at most `micro_batch` at a time."""
        mine = share(len(batch), mirrored)
        for start in range(mine.start, mine.stop, self.micro_batch or len(batch)):
            yield batch[start : min(start + (self.micro_batch or len(batch)), mine.stop)]

    def _learned(self) -> Tensor | None:
        means = self.model.means
        return means if means is not None and means.requires_grad else None

    def _note(self, keep: float, broken: float, record: bool) -> None:
        if record:
            self.losses = (keep, broken)
        if not math.isfinite(self.keep.weight * keep + self.broken.weight * broken):
            raise UserError(
                f"the loss is not finite any more (keep {keep}, break {broken}). Lower the learning rate or alpha."
            )
