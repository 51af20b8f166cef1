"""The objective of a step of mask training, on a whole batch at once or added up over micro-batches.

A batch is split into micro-batches to save memory (`micro_batch`), or because several processes share it. Each
micro-batch is weighted by its number of predictions, so that the sums are the means over the whole batch. Its backward
pass follows its forward pass at once, so that memory never holds more than one micro-batch of one task. A caller that
differentiates the objective does not see the difference: the gradients of the mask and of the ablation constants are
computed in the forward pass, and the backward pass returns them.

Shapes: E edges, P source nodes, D width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

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


def terms_of_two(model: EdgeMaskedTransformer, keep_task: Task, break_task: Task, settings: MaskConfig) -> list[Term]:
    """keep_weight · L_keep - alpha · L_break, as terms.

    L_keep is the task's loss, or the divergence of the predictions from those of the original model (`keep_loss`).
    """
    kept = Term(keep_task, settings.keep_weight, divergence=keeps_predictions(settings))
    return [kept, _broken(model, break_task, -settings.alpha, settings)]


def terms_of(
    model: EdgeMaskedTransformer, tasks: Mapping[str, Task], weights: Mapping[str, float], settings: MaskConfig
) -> list[Term]:
    """Σ weight · L over tasks, as terms: a task of negative weight is broken, one of positive weight is kept.

    Args:
        model: the model.
        tasks: the tasks by name.
        weights: their weights in the objective; 1 for a task that is not named here.
        settings: `keep_loss`, `break_cap` and `constants_loss` say how each is measured, as with two tasks.

    Raises:
        UserError: a weight belongs to no task, or all weights are 0.
    """
    if unknown := sorted(weights.keys() - tasks.keys()):
        raise UserError(f"weights names {unknown[0]!r}, which is none of the tasks: {', '.join(tasks)}.")
    terms = []
    for name, task in tasks.items():
        weight = float(weights.get(name, 1.0))
        if weight < 0:
            terms.append(_broken(model, task, weight, settings))
        else:
            terms.append(Term(task, weight, divergence=keeps_predictions(replace(settings, keep_weight=weight))))
    if not any(term.weight for term in terms):
        raise UserError("every weight is 0, so there is nothing to train for. Give weights, negative to break a task.")
    return terms


def _broken(model: EdgeMaskedTransformer, task: Task, weight: float, settings: MaskConfig) -> Term:
    cap = settings.break_cap or math.log(len(model.unembedding))
    return Term(task, weight, cap, settings.constants_loss == "objective")


class StepObjective:
    """The sum of the weighted losses of some terms, on one batch of each task.

    Attributes:
        terms: the terms.
        losses: the loss of each over its whole batch, without the weight, at the last mask whose gradient was computed
            or that was recorded (see `draw`).
    """

    def __init__(self, model: EdgeMaskedTransformer, terms: Sequence[Term], micro_batch: int = 0) -> None:
        self.model, self.terms, self.micro_batch = model, list(terms), micro_batch
        self.losses = (0.0,) * len(self.terms)

    @classmethod
    def of_two(
        cls, model: EdgeMaskedTransformer, keep_task: Task, break_task: Task, settings: MaskConfig
    ) -> "StepObjective":
        """Of a task to keep and one to break; see `terms_of_two`."""
        return cls(model, terms_of_two(model, keep_task, break_task, settings), settings.micro_batch)

    def draw(self, batch_size: int, record: bool = False) -> MaskFunction:
        """The objective on the next batches of `batch_size` texts each, as a function of the mask [E].

        The function raises a `UserError` if a loss is not finite. With `record` it sets `losses` at every mask, not
        only where a gradient is computed.
        """
        batches = [term.task.draw(batch_size) for term in self.terms]

        def whole(mask: Tensor) -> Tensor:
            losses = [term.loss(self.model, batch, mask) for term, batch in zip(self.terms, batches, strict=True)]
            self._note([float(loss.detach()) for loss in losses], record or torch.is_grad_enabled())
            return self._sum(losses)

        def measure(mask: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
            return self._add_micro_batches(batches, mask, wanted, record)

        def in_micro_batches(mask: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return _Measured.apply(mask, self._learned(), measure)
            return measure(mask, (False, False))[0]

        # on a GPU, one pass at a time can be replayed as a CUDA graph
        return in_micro_batches if self.micro_batch or world().size > 1 or self.model.device.type == "cuda" else whole

    def _sum(self, losses: Sequence[Tensor | float]) -> Tensor | float:
        weighted = [term.weight * loss for term, loss in zip(self.terms, losses, strict=True)]
        return reduce(add, weighted)

    def _add_micro_batches(
        self, batches: Sequence[Batch], mask: Tensor, wanted: Sequence[bool], record: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mask = mask.detach().requires_grad_(wanted[0])
        leaves = [leaf for leaf, want in zip((mask, self._learned()), wanted, strict=True) if want]
        gradients, losses = [torch.zeros_like(leaf) for leaf in leaves], []
        for number, (term, batch) in enumerate(zip(self.terms, batches, strict=True)):
            count, total = term.task.predictions(batch), 0.0
            for micro_batch in self._micro_batches(batch, mirrored=number % 2 == 1):
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
        self._note(losses, record or bool(leaves))
        value = mask.new_tensor(self._sum(losses))
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

    def _note(self, losses: list[float], record: bool) -> None:
        """Keep the losses if `record`, and refuse losses that are not finite."""
        if record:
            self.losses = tuple(losses)
        if not math.isfinite(self._sum(losses)):
            values = ", ".join(
                f"{'break' if term.weight < 0 else 'keep'} {loss}"
                for term, loss in zip(self.terms, losses, strict=True)
            )
            raise UserError(f"the loss is not finite any more ({values}). Lower the learning rate or alpha.")

    def loss_of(self, broken: bool) -> float:
        """The last loss of the tasks that are broken, or of those that are kept: the mean weighted by their weights."""
        chosen = [(term, loss) for term, loss in zip(self.terms, self.losses, strict=True) if self._is(term, broken)]
        if len(chosen) == 1:
            return chosen[0][1]
        total = sum(abs(term.weight) for term, _ in chosen)
        return sum(abs(term.weight) * loss for term, loss in chosen) / total if total else 0.0

    def _is(self, term: Term, broken: bool) -> bool:
        # with two tasks the second one is the one to break, whatever its weight
        return (term.cap is not None) == broken
