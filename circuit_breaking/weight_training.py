"""Learn a mask over a model's weights (layer 3).

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + price · (units masked)  over which units are set to zero
(`weight_masks.UNITS` says what a unit is), at most `max_masked` of them:

choose   First-order effect of masking each unit, from one batch of each task; the most promising are candidates.
relax    Each candidate has a weight in [0, 1], learned by a method of `METHODS`, with a price that rises.
anneal   The forward sees a binary mask of at most k units; gradients pass straight through. k falls to the budget.

What is small: weights are changed in place and only those of candidates are remembered, and each matrix's gradient is
reduced to its candidates as soon as autograd has it, so that no second copy of the model and no gradient of its size
exists. (While candidates are chosen, autograd holds the gradients of a part of the matrices, one in `PARTS`.) When
training ends, well or not, the weights are what they were, bit for bit.

Shapes: C candidates, U units of a matrix, c candidates of a matrix.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from circuit_breaking.cli import UserError
from circuit_breaking.gates import METHODS, falling_count, next_price
from circuit_breaking.masks import lowest_cut
from circuit_breaking.models import StockModel
from circuit_breaking.weight_masks import Matrix, WeightMask, find_matrices

PARTS = 6  # of the matrices, for which candidates are chosen one after the other
BUDGETS = {"weight": 0.0005, "neuron": 0.04, "head": 0.25}  # share of all units that may be masked by default


@dataclass
class WeightMaskSettings:
    """How a mask over weights is learned. Losses are in nats; a step sees `batch_size` texts of each task."""

    granularity: str = "weight"  # what is masked as a whole: weight, neuron or head
    max_masked: int | None = (
        None  # most units that may be masked, a promise; None: 0.05% of weights, 4% of neurons, 25% of heads
    )
    method: str = "clamped"  # weights in [0, 1]: clamped as in the paper, or hard-concrete (Louizos et al. 2018)
    alpha: float = 0.2  # weight of the loss to raise; negative to lower it too
    keep_weight: float = 1.0  # weight of the loss to keep low
    break_cap: float = 0.0  # most that one prediction counts towards the broken loss; 0: log of the vocabulary
    candidates: int = 10  # units that are learned about, as a multiple of max_masked
    choose_size: int = 50  # texts of each task by which candidates are chosen
    relax_steps: int = 100  # steps with weights in [0, 1]
    anneal_steps: int = 100  # steps with binary masks
    batch_size: int = 10  # texts of each task a step
    lr: float = 0.05  # Adam, on weights in [0, 1] (clamped) or on log odds (hard-concrete)
    sparsity: float = 0.002  # price of masking the whole budget at the end of the relax phase, nats


@dataclass
class WeightMaskResult:
    """What training found: the mask, and a row for every step."""

    mask: WeightMask
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Candidates:
    """The units that are learned about, whose weights are scaled in place.

    Args:
        chosen: matrices, and in each the numbers of the units that were chosen.
    """

    def __init__(self, chosen: list[tuple[Matrix, Tensor]]) -> None:
        self.chosen = chosen
        self.kept = [matrix.by_unit(matrix.parameter.detach())[units] for matrix, units in chosen]  # [c, ...]
        self.sizes = [len(units) for _, units in chosen]
        self.gradient = torch.zeros(sum(self.sizes), device=chosen[0][0].parameter.device)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Scale the weights of each candidate by its value [C]."""
        for (matrix, units), kept, part in zip(self.chosen, self.kept, values.split(self.sizes), strict=True):
            matrix.by_unit(matrix.parameter)[units] = kept * part.to(kept.dtype).view(-1, *[1] * (kept.dim() - 1))

    def take(self, number: int, parameter: nn.Parameter) -> None:
        """Add what the gradient of a matrix means for the values of its candidates to `gradient` [C]."""
        matrix, units = self.chosen[number]
        effect = _sum_by_unit(matrix.by_unit(parameter.grad)[units] * self.kept[number])
        self.gradient.split(self.sizes)[number].add_(effect)


def _sum_by_unit(products: Tensor) -> Tensor:
    """[c, ...] -> [c]."""
    return products.flatten(1).sum(1) if products.dim() > 1 else products


@contextmanager
def gradients_taken(hf: nn.Module, matrices: list[Matrix], take: Callable[[int, nn.Parameter], None]) -> Iterator[None]:
    """While the block lasts, only these matrices have gradients, each of which `take` gets and which is then dropped.

    A matrix's gradient is complete when `take` gets it, and, if the backward is one through a single forward pass, gone
    before the next one's is made.
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
    """The `count` units whose masking should lower an objective most, to first order; fewer if not so many should.

    Args:
        backward: makes the gradient of the objective in one backward; called for every part of the matrices, each time
            on the same texts.

    Returns:
        matrices, and the numbers of their chosen units in rising order.
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

    size = -(-len(matrices) // PARTS)
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


def train_weight_mask(
    hf: nn.Module,
    break_task: Any,
    keep_task: Any,
    settings: WeightMaskSettings | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> WeightMaskResult:
    """Learn which few units of a stock Hugging Face model to mask. The model is left as it was.

    Args:
        hf: the model.
        break_task: behaviour to break, a `tasks.Task`.
        keep_task: behaviour to keep.
        settings: see `WeightMaskSettings`.
        on_step: called with each row of the history as it comes.
        progress: show a bar with the losses and the number of masked units.

    Raises:
        UserError: a setting makes no sense, the model's family is not known, or a loss is not finite.
    """
    settings = settings or WeightMaskSettings()
    budget = check(settings, sum(matrix.count for matrix in find_matrices(hf, settings.granularity)))
    start, history = time.perf_counter(), []
    trainer = _Trainer(hf, break_task, keep_task, settings, budget)
    total = settings.relax_steps + settings.anneal_steps
    with (
        tqdm(total=total, desc="weight mask", unit="step", disable=None if progress else True) as bar,
        closing(trainer.rows()) as rows,  # whatever happens, the weights are put back at once
    ):
        for row in rows if budget else ():
            row = {"step": len(history), **row, "seconds": round(time.perf_counter() - start, 3)}
            history.append(row)
            if on_step is not None:
                on_step(row)
            bar.set_postfix_str(
                f"{row['phase']}: keep {row['keep_loss']:.3f}, break {row['break_loss']:.3f}, {row['n_masked']} masked"
            )
            bar.update()
    mask = WeightMask(settings.granularity, trainer.units)
    return WeightMaskResult(mask, history, time.perf_counter() - start)


class _Trainer:
    def __init__(
        self, hf: nn.Module, break_task: Any, keep_task: Any, settings: WeightMaskSettings, budget: int
    ) -> None:
        self.hf, self.model = hf, StockModel(hf)
        self.break_task, self.keep_task, self.settings, self.budget = break_task, keep_task, settings, budget
        self.cap = settings.break_cap or math.log(len(self.model.unembedding))
        self.units: dict[str, Tensor] = {}  # the mask, once it is learned

    def rows(self) -> Iterator[dict[str, Any]]:
        settings, candidates = self.settings, self._choose()
        if candidates is None:
            return
        method = METHODS[settings.method](len(candidates.gradient), candidates.gradient.device)
        optimizer = torch.optim.Adam([method.parameter], lr=settings.lr)
        price = settings.sparsity / self.budget
        matrices = [matrix for matrix, _ in candidates.chosen]
        try:
            with gradients_taken(self.hf, matrices, candidates.take):
                for step in range(settings.relax_steps):
                    ramp = min(1.0, 2 * (step + 1) / settings.relax_steps)
                    yield self._step("relax", candidates, method, optimizer, method.sample(), ramp * price)
                first = max(self.budget, int((method.scores() < 0.5).sum()))
                for step in range(settings.anneal_steps):
                    count = falling_count(first, self.budget, step, settings.anneal_steps)
                    scores = method.scores()
                    binary = lowest_cut(scores.detach(), count, threshold=0.5)
                    values = binary + (scores - scores.detach())
                    price = next_price(price, int((scores < 0.5).sum()), count)
                    yield self._step("anneal", candidates, method, optimizer, values, price)
        finally:
            candidates.write(torch.ones_like(candidates.gradient))
        masked = lowest_cut(method.scores().detach(), self.budget, threshold=0.5) == 0
        self.units = {
            matrix.name: units[mine].cpu()
            for (matrix, units), mine in zip(candidates.chosen, masked.split(candidates.sizes), strict=True)
            if mine.any()
        }

    def _choose(self) -> Candidates | None:
        """None if masking anything would only harm, to first order."""
        keep_texts, break_texts = (task.draw(self.settings.choose_size) for task in (self.keep_task, self.break_task))

        def backward() -> None:
            keep = self.keep_task.loss(self.model, keep_texts)
            broken = self.break_task.loss(self.model, break_texts, cap=self.cap)
            self._weigh(keep, broken).backward()

        chosen = choose(self.hf, self.settings.granularity, self.settings.candidates * self.budget, backward)
        return Candidates(chosen) if chosen else None

    def _step(
        self, phase: str, candidates: Candidates, method: Any, optimizer: torch.optim.Optimizer, values: Tensor,
        price: float,
    ) -> dict[str, Any]:  # fmt: skip
        settings = self.settings
        candidates.write(values.detach())
        candidates.gradient.zero_()
        # one backward after the other: the activations of one task at a time
        keep = self.keep_task.get_train_loss(self.model, settings.batch_size)
        (settings.keep_weight * keep).backward()
        broken = self.break_task.get_train_loss(self.model, settings.batch_size, cap=self.cap)
        (-settings.alpha * broken).backward()
        loss = float(self._weigh(keep, broken).detach())
        optimizer.zero_grad()
        ((values * candidates.gradient).sum() + price * method.masked()).backward()
        optimizer.step()
        method.settle_()
        n_masked = int((method.scores() < 0.5).sum())
        losses = {"loss": loss, "keep_loss": float(keep.detach()), "break_loss": float(broken.detach())}
        return {"phase": phase, **losses, "n_masked": n_masked}

    def _weigh(self, keep: Tensor, broken: Tensor) -> Tensor:
        """The objective without its price."""
        loss = self.settings.keep_weight * keep - self.settings.alpha * broken
        if not math.isfinite(float(loss.detach())):
            raise UserError(
                f"the loss is not finite (keep {float(keep.detach())}, break {float(broken.detach())}). "
                "Lower the learning rate or alpha."
            )
        return loss


def check(settings: WeightMaskSettings, n_units: int) -> int:
    """The budget in units. Raises a `UserError` for settings that make no sense."""
    if settings.method not in METHODS:
        raise UserError(f"method {settings.method!r} is not one of {', '.join(METHODS)}.")
    for name in ("relax_steps", "anneal_steps", "sparsity"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it cannot be negative.")
    for name in ("batch_size", "choose_size", "lr", "candidates"):
        if getattr(settings, name) <= 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be above 0.")
    budget = settings.max_masked
    if budget is None:
        budget = round(BUDGETS[settings.granularity] * n_units)
    if not 0 <= budget <= n_units:
        raise UserError(f"max_masked {budget} is not between 0 and the model's {n_units:,} {settings.granularity}s.")
    return budget
