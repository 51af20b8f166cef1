"""The one mask-training loop (layer 3).

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + sparsity(m)  over masks m that cut at most `max_edges` edges
(Li, Davies, Nadeau 2023, section 3.2), in three phases:

relax    The paper's: weights in [0, 1], AdamW, a sparsity price that ramps up, rounding on a schedule.
anneal   The forward sees a binary mask, at most the k lowest weights cut; gradients pass straight through to all
         weights, so that what is learned is learned about masks that can be saved. k falls geometrically to the
         budget, and the price follows it.
refine   Single edges are cut, restored or exchanged by their measured effect on fresh batches (`search`).

The forward sees binary masks from the second phase on, so nothing is left for a last rounding to harm.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_breaking.cli import UserError
from circuit_breaking.graph import Edge
from circuit_breaking.masks import lowest_cut
from circuit_breaking.search import MeasuredSearch

PRICE_STEP = 1.1  # factor by which the price of a cut edge moves at each step of the anneal phase


@dataclass
class MaskSettings:
    """How a mask is trained. Losses are in nats; a step sees `batch_size` texts of each task."""

    max_edges: int = 12  # most edges that the mask may cut: a promise
    alpha: float = 0.2  # weight of the loss to raise (paper: 0.2); negative to lower it too
    keep_weight: float = 1.0  # weight of the loss to keep low; 0 finds edges that the behaviour needs
    break_cap: float = 0.0  # most that one prediction counts towards the broken loss; 0: log of the vocabulary
    relax_steps: int = 100  # steps with weights in [0, 1], as in the paper
    anneal_steps: int = 100  # steps with binary masks whose number of cut edges falls to the budget
    refine_rounds: int = 60  # rounds of single changes by measured effect
    batch_size: int = 5  # texts of each task a step
    refine_batch_size: int = 20  # texts of each task a round of refinement
    tries: int = 8  # most masks measured in a round of refinement
    lr: float = 0.05  # AdamW without decay, on weights in [0, 1]
    sparsity: float = 0.0005  # price of a cut edge in the relax phase, after its ramp, nats
    refine_price: float = 0.0  # what a change must win for each edge that it cuts, nats
    ramp: float = 0.1  # share of the relax phase over which the price rises from 0
    round_every: int = 50  # steps between roundings in the relax phase; 0: never
    candidates: int = 3  # edges cut at the start of annealing, as a multiple of the budget


@dataclass
class MaskResult:
    """What training found: the binary mask [E] (also left in the model), its cut edges, and a row for every step."""

    weights: Tensor
    edges: list[Edge]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def train_mask(
    model: Any,
    break_task: Any,
    keep_task: Any,
    settings: MaskSettings | None = None,
    allowed: Tensor | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> MaskResult:
    """Learn which few edges to cut. The model's mask is trained from all ones and left binary.

    Args:
        model: an `EdgeMaskedTransformer`; its `means` say what a cut edge carries.
        break_task: behaviour to break, a `tasks.Task`.
        keep_task: behaviour to keep.
        settings: see `MaskSettings`.
        allowed: bool [E], the edges that may be cut; all by default.
        on_step: called with each row of the history as it comes.
        progress: show a bar with the losses and the number of cut edges.

    Raises:
        UserError: a setting makes no sense, or a loss is not finite.
    """
    trainer = _Trainer(model, break_task, keep_task, settings or MaskSettings(), allowed)
    start = time.perf_counter()
    history = []
    with tqdm(total=trainer.total, desc="mask", unit="step", disable=None if progress else True) as bar:
        for row in trainer.rows():
            row = {"step": len(history), **row, "seconds": round(time.perf_counter() - start, 3)}
            history.append(row)
            if on_step is not None:
                on_step(row)
            bar.set_postfix_str(
                f"{row['phase']}: keep {row['keep_loss']:.3f}, break {row['break_loss']:.3f}, {row['n_cut']} cut"
            )
            bar.update()
    model.mask.keep_budget_(trainer.settings.max_edges)
    return MaskResult(model.mask.weights.detach().clone(), model.mask.cut_edges(), history, time.perf_counter() - start)


class _Trainer:
    def __init__(
        self, model: Any, break_task: Any, keep_task: Any, settings: MaskSettings, allowed: Tensor | None
    ) -> None:
        check(settings, len(model.graph))
        self.model, self.break_task, self.keep_task, self.settings = model, break_task, keep_task, settings
        self.weights = model.mask.weights
        self.allowed = None if allowed is None else allowed.to(self.weights.device)
        self.cap = settings.break_cap or math.log(len(model.unembedding))
        self.losses = (0.0, 0.0)
        self.total = settings.relax_steps + settings.anneal_steps + settings.refine_rounds

    def rows(self) -> Iterator[dict[str, Any]]:
        model, settings = self.model, self.settings
        model.mask.reset_()
        if settings.max_edges == 0:
            return
        yield from self._relax()
        yield from self._anneal()
        model.mask.weights.data.copy_(self._lowest(settings.max_edges))
        yield from self._refine()

    def _next_objective(self, batch_size: int) -> Callable[[Tensor], Tensor]:
        """The objective, as a function of the mask, on the next pair of batches."""
        keep, broken = self.keep_task.draw(batch_size), self.break_task.draw(batch_size)

        def objective(mask: Tensor) -> Tensor:
            return self._weigh(
                self.keep_task.loss(self.model, keep, mask), self.break_task.loss(self.model, broken, mask, self.cap)
            )

        return objective

    def _weigh(self, keep: Tensor, broken: Tensor) -> Tensor:
        """The objective without its sparsity term. The losses of the mask whose gradient is taken, one a step, are
        noted for the record."""
        loss = self.settings.keep_weight * keep - self.settings.alpha * broken
        losses = (float(keep.detach()), float(broken.detach()))
        if torch.is_grad_enabled():
            self.losses = losses
        if not math.isfinite(float(loss.detach())):
            raise UserError(
                f"the loss is not finite any more (keep {losses[0]}, break {losses[1]}). "
                "Lower the learning rate or alpha."
            )
        return loss

    def _row(self, phase: str, loss: float, n_cut: int) -> dict[str, Any]:
        keep, broken = self.losses
        return {"phase": phase, "loss": loss, "keep_loss": keep, "break_loss": broken, "n_cut": n_cut}

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.weights], lr=self.settings.lr, weight_decay=0.0)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.allowed is not None:
            self.weights.grad[~self.allowed] = 0.0
        optimizer.step()
        self.model.mask.clamp_()

    def _relax(self) -> Iterator[dict[str, Any]]:
        settings, optimizer = self.settings, self._optimizer()
        for step in range(settings.relax_steps):
            objective = self._next_objective(settings.batch_size)(self.weights)
            price = settings.sparsity * min(1.0, step / max(1.0, settings.ramp * settings.relax_steps))
            self._step(optimizer, objective + price * (1 - self.weights).sum())
            if settings.round_every and (step + 1) % settings.round_every == 0 and step + 1 < settings.relax_steps:
                self.model.mask.round_()
            yield self._row("relax", float(objective.detach()), self.model.mask.n_cut())

    def _anneal(self) -> Iterator[dict[str, Any]]:
        settings, weights, optimizer = self.settings, self.weights, self._optimizer()
        price = settings.sparsity
        start = max(self.model.mask.n_cut(), settings.candidates * settings.max_edges)
        for step in range(settings.anneal_steps):
            # the budget is reached for the last quarter, so that the masks that can be saved are learned longest
            progress = min(1.0, step / max(1.0, 0.75 * settings.anneal_steps))
            count = round(start * (settings.max_edges / start) ** progress)
            binary = self._lowest(count)
            objective = self._next_objective(settings.batch_size)(binary + (weights - weights.detach()))
            # The price goes where it holds the number of edges at the count: it tells which effects are too small for
            # the budget, which AdamW, blind to their size, would not
            price *= PRICE_STEP if self.model.mask.n_cut() > count else 1 / PRICE_STEP
            self._step(optimizer, objective + price * (1 - weights).sum())
            yield self._row("anneal", float(objective.detach()), int((binary == 0).sum()))

    @torch.no_grad()
    def _lowest(self, count: int) -> Tensor:
        """Binary mask that cuts the `count` lowest of the weights that rounding would cut."""
        return lowest_cut(self.weights, count, threshold=0.5)

    def _refine(self) -> Iterator[dict[str, Any]]:
        settings = self.settings
        search = MeasuredSearch(settings.max_edges, self.allowed, settings.refine_price, settings.tries)
        mask = self.weights.detach().clone()
        for _ in range(settings.refine_rounds):
            n_cut = int((mask == 0).sum())
            mask, loss = search.round(mask, self._next_objective(settings.refine_batch_size))
            with torch.no_grad():
                self.weights.copy_(mask)
            yield self._row("refine", loss, n_cut)


def check(settings: MaskSettings, n_edges: int) -> None:
    """Raise a `UserError` for settings that make no sense."""
    if not 0 <= settings.max_edges <= n_edges:
        raise UserError(f"max_edges {settings.max_edges} is not between 0 and the model's {n_edges:,} edges.")
    for name in ("relax_steps", "anneal_steps", "refine_rounds", "sparsity", "round_every"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it cannot be negative.")
    for name in ("batch_size", "refine_batch_size", "tries", "lr", "candidates"):
        if getattr(settings, name) <= 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be above 0.")
