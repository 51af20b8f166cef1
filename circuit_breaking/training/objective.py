"""The objective of a step of mask training, on a whole batch at once or added up over micro-batches.

A batch is split into micro-batches to save memory (`micro_batch`), or because several processes share it. Each
micro-batch is weighted by its number of predictions, so that the sums are the means over the whole batch. Its backward
pass follows its forward pass at once, so that memory never holds more than one micro-batch of one task. A caller that
differentiates the objective does not see the difference: the gradients of the mask and of the ablation constants are
computed in the forward pass, and the backward pass returns them.

Shapes: E edges, P source nodes, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.runs.distributed import share, sum_, world
from circuit_breaking.tasks.base import Batch, Task
from circuit_breaking.training.config import MaskConfig, keeps_predictions
from circuit_breaking.training.mask_gradient import MaskFunction

# (mask, which of the gradients of mask and ablation constants are needed) -> value, and these gradients or None
Measure = Callable[[Tensor, Sequence[bool]], tuple[Tensor, Tensor | None, Tensor | None]]


class _Measured(torch.autograd.Function):
    """The value of a `Measure`, whose backward pass returns the gradients that it computed."""

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
    """One task of the objective.

    Attributes:
        task: the task.
        weight: its weight in the objective.
        cap: highest loss of a single prediction; see `tasks.Task.loss`.
        trains_constants: whether its gradient reaches the ablation constants, if they are learned.
        divergence: whether its loss is the divergence from the original model's predictions.
    """

    task: Task
    weight: float
    cap: float | None = None
    trains_constants: bool = True
    divergence: bool = False

    def loss(self, model: EdgeMaskedTransformer, batch: Batch, mask: Tensor) -> Tensor:
        """The loss of the task on a batch, without the weight."""
        with nullcontext() if self.trains_constants else model.detached_means():
            if self.divergence:
                return self.task.divergence(model, batch, mask)
            return self.task.loss(model, batch, mask, self.cap)


class StepObjective:
    """keep_weight · L_keep - alpha · L_break, on one batch of each task.

    L_keep is the task's loss, or the divergence of the predictions from those of the original model (`keep_loss`).

    Attributes:
        losses: L_keep and L_break over the whole batches, at the last mask whose gradient was computed.
    """

    def __init__(self, model: EdgeMaskedTransformer, keep_task: Task, break_task: Task, settings: MaskConfig) -> None:
        self.model, self.micro_batch = model, settings.micro_batch
        cap = settings.break_cap or math.log(len(model.unembedding))
        self.keep = Term(keep_task, settings.keep_weight, divergence=keeps_predictions(settings))
        self.broken = Term(break_task, -settings.alpha, cap, settings.constants_loss == "objective")
        self.losses = (0.0, 0.0)

    def draw(self, batch_size: int) -> MaskFunction:
        """The objective on the next batches of `batch_size` texts each, as a function of the mask [E].

        The function raises a `UserError` if a loss is not finite.
        """
        keep, broken = self.keep.task.draw(batch_size), self.broken.task.draw(batch_size)

        def whole(mask: Tensor) -> Tensor:
            losses = [term.loss(self.model, batch, mask) for term, batch in ((self.keep, keep), (self.broken, broken))]
            self._note(*(float(loss.detach()) for loss in losses), torch.is_grad_enabled())
            return self.keep.weight * losses[0] + self.broken.weight * losses[1]

        def measure(mask: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
            return self._add_micro_batches(keep, broken, mask, wanted)

        def in_micro_batches(mask: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return _Measured.apply(mask, self._learned(), measure)
            return measure(mask, (False, False))[0]

        # on a GPU, one pass at a time can be replayed as a CUDA graph
        return in_micro_batches if self.micro_batch or world().size > 1 or self.model.device.type == "cuda" else whole

    def _add_micro_batches(
        self, keep: Batch, broken: Batch, mask: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mask = mask.detach().requires_grad_(wanted[0])
        leaves = [leaf for leaf, want in zip((mask, self._learned()), wanted, strict=True) if want]
        gradients, losses = [torch.zeros_like(leaf) for leaf in leaves], []
        for term, batch in ((self.keep, keep), (self.broken, broken)):
            count, total = term.task.predictions(batch), 0.0
            for micro_batch in self._micro_batches(batch, mirrored=term is self.broken):
                weight = term.task.predictions(micro_batch) / count if count else math.nan
                if weight == 0:
                    continue
                with torch.set_grad_enabled(bool(leaves)):
                    loss = weight * term.loss(self.model, micro_batch, mask)
                    # a term may depend on neither: constants that it does not train, a mask that needs no gradient
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

    def _micro_batches(self, batch: Batch, mirrored: bool) -> Iterator[Batch]:
        """The texts of this process, at most `micro_batch` at a time."""
        mine = share(len(batch), mirrored)
        for start in range(mine.start, mine.stop, self.micro_batch or len(batch)):
            yield batch[start : min(start + (self.micro_batch or len(batch)), mine.stop)]

    def _learned(self) -> Tensor | None:
        means = self.model.means
        return means if means is not None and means.requires_grad else None

    def _note(self, keep: float, broken: float, record: bool) -> None:
        """Keep the losses if `record`, and refuse losses that are not finite."""
        if record:
            self.losses = (keep, broken)
        if not math.isfinite(self.keep.weight * keep + self.broken.weight * broken):
            raise UserError(
                f"the loss is not finite any more (keep {keep}, break {broken}). Lower the learning rate or alpha."
            )
