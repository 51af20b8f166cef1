"""Learn a mask over a model's weights (layer 3).

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + penalty · (units masked)  over which units are set to zero
(`weight_masks.UNITS` says what a unit is), at most `max_masked` of them:

choose   First-order effect of masking each unit, from one batch of each task; the most promising are candidates.
relax    Each candidate has a weight in [0, 1], learned by a method of `METHODS`, with a penalty that rises.
anneal   The forward sees a binary mask of at most k units; gradients pass straight through. k falls to the budget.

Candidates, and why this takes little memory, are in `weight_candidates`. When training ends, well or not, the weights
are what they were, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from circuit_breaking.ablation.weight_mask import Matrix, WeightMask, find_matrices
from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import (
    Checkpoints,
    Saved,
    part_of,
    restore_parts,
    restore_training,
    state_of,
    training_state,
)
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.tasks.stock_model import StockModel
from circuit_breaking.training.config import WeightMaskSettings, check_weight_mask, weight_budget
from circuit_breaking.training.gates import METHODS, falling_count, next_penalty
from circuit_breaking.training.weight_units import Candidates, choose, gradients_taken


@dataclass
class WeightMaskResult:
    """What training found: the mask, and a row for every step."""

    mask: WeightMask
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def train_weight_mask(
    hf: nn.Module,
    break_task: Any,
    keep_task: Any,
    settings: WeightMaskSettings | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> WeightMaskResult:
    """Learn which few units of a stock Hugging Face model to mask. The model is left as it was.

    Args:
        hf: the model.
        break_task: behaviour to break, a `tasks.Task`.
        keep_task: behaviour to keep.
        settings: see `WeightMaskSettings`.
        on_step: called with each row of the history as it comes.
        progress: show a bar with the losses and the number of masked units.
        checkpoints: where the state goes every so many steps, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to go on from, of `checkpoints.load()`. The mask that comes out is that of a run that
            was never interrupted (bit for bit on CPU); the result's history begins where it goes on.

    Raises:
        UserError: a setting makes no sense, the model's family is not known, or a loss is not finite.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or WeightMaskSettings()
    check_weight_mask(settings)
    budget = weight_budget(settings, sum(matrix.count for matrix in find_matrices(hf, settings.granularity)))
    start, history = time.perf_counter(), []
    before = 0.0 if resume_from is None else resume_from.values["seconds"]
    trainer = _Trainer(hf, break_task, keep_task, settings, budget, resume_from)
    with (
        tqdm(
            total=trainer.total,
            initial=trainer.done,
            desc="weight mask",
            unit="step",
            disable=None if progress else True,
        ) as bar,
        stop_signals() if checkpoints is not None else nullcontext(()) as signals,
        closing(trainer.rows()) as rows,  # whatever happens, the weights are put back at once
    ):
        for row in rows if budget else ():
            seconds = round(before + time.perf_counter() - start, 3)
            row = {"step": trainer.done - 1, **row, "seconds": seconds}
            history.append(row)
            if on_step is not None:
                on_step(row)
            bar.set_postfix_str(
                f"{row['phase']}: keep {row['keep_loss']:.3f}, break {row['break_loss']:.3f}, {row['n_masked']} masked"
            )
            bar.update()
            if checkpoints is not None:
                values = {**trainer.values(), "seconds": seconds}
                checkpoints.after(trainer.done, trainer.tensors, values, signals, trainer.done == trainer.total)
    mask = WeightMask(settings.granularity, trainer.units)
    return WeightMaskResult(mask, history, before + time.perf_counter() - start)


class _Trainer:
    """State of a training run: `tensors` and `values` carry it over an interruption."""

    def __init__(
        self,
        hf: nn.Module,
        break_task: Any,
        keep_task: Any,
        settings: WeightMaskSettings,
        budget: int,
        saved: Saved | None = None,
    ) -> None:
        self.hf, self.model = hf, StockModel(hf)
        self.break_task, self.keep_task, self.settings, self.budget = break_task, keep_task, settings, budget
        self.tasks = {"break": break_task, "keep": keep_task}  # by their names in checkpoints
        self.cap = settings.break_cap or math.log(len(self.model.unembedding))
        self.total = settings.relax_steps + settings.anneal_steps
        self.units: dict[str, Tensor] = {}  # the mask, once it is learned
        self.saved, self.done = saved, 0 if saved is None else saved.step
        self.penalty, self.first = settings.penalty / max(1, budget), 0  # the latter: masked as annealing begins

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next steps depend on: candidates, what is learned of them, the tasks' states."""
        units = {f"units.{matrix.name}": units for matrix, units in self.candidates.chosen}
        learned = training_state(self.optimizer, {"gates": self.method.parameter})
        return {**units, **learned, **state_of(**self.tasks)}

    def values(self) -> dict[str, Any]:
        """All else that they depend on."""
        return {"penalty": self.penalty, "first": self.first}

    def _start(self) -> bool:
        """Choose candidates, or take those of the saved state; False if there are none."""
        if self.saved is None:
            chosen = self._choose()
        else:
            units = part_of(self.saved.tensors, "units")
            matrices = [one for one in find_matrices(self.hf, self.settings.granularity) if one.name in units]
            chosen = [(matrix, units[matrix.name].to(matrix.parameter.device)) for matrix in matrices]
        if not chosen:
            return False
        self.candidates = Candidates(chosen)
        self.method = METHODS[self.settings.method](len(self.candidates.gradient), self.candidates.gradient.device)
        self.optimizer = torch.optim.Adam([self.method.parameter], lr=self.settings.lr)
        if self.saved is not None:
            restore_training(self.optimizer, {"gates": self.method.parameter}, self.saved.tensors)
            restore_parts(self.saved.tensors, self.tasks, self.method.parameter.device)
            self.penalty, self.first = self.saved.values["penalty"], self.saved.values["first"]
        return True

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the steps that are left, each done as its row is asked for; then the mask is in `units`."""
        if not self._start():
            return
        chosen = self.candidates.chosen
        try:
            with gradients_taken(self.hf, [matrix for matrix, _ in chosen], self.candidates.take):
                while self.done < self.total:
                    self.done += 1
                    yield self._relax() if self.done <= self.settings.relax_steps else self._anneal()
        finally:
            self.candidates.write(torch.ones_like(self.candidates.gradient))
        masked = lowest_cut(self.method.scores().detach(), self.budget, threshold=0.5) == 0
        self.units = {
            matrix.name: units[mine].cpu()
            for (matrix, units), mine in zip(chosen, masked.split(self.candidates.sizes), strict=True)
            if mine.any()
        }

    def _relax(self) -> dict[str, Any]:
        ramp = min(1.0, 2 * self.done / self.settings.relax_steps)
        return self._step("relax", self.method.sample(), ramp * self.penalty)

    def _anneal(self) -> dict[str, Any]:
        number, scores = self.done - self.settings.relax_steps - 1, self.method.scores()
        lowest = int((scores < 0.5).sum())
        if number == 0:
            self.first = max(self.budget, lowest)
        count = falling_count(self.first, self.budget, number, self.settings.anneal_steps)
        binary = lowest_cut(scores.detach(), count, threshold=0.5)
        self.penalty = next_penalty(self.penalty, lowest, count)
        return self._step("anneal", binary + (scores - scores.detach()), self.penalty)

    def _choose(self) -> list[tuple[Matrix, Tensor]]:
        """Empty if masking anything would only harm, to first order."""
        keep_texts, break_texts = (task.draw(self.settings.choose_size) for task in (self.keep_task, self.break_task))

        def backward() -> None:
            keep = self.keep_task.loss(self.model, keep_texts)
            broken = self.break_task.loss(self.model, break_texts, cap=self.cap)
            self._weigh(keep, broken).backward()

        return choose(self.hf, self.settings.granularity, self.settings.candidates * self.budget, backward)

    def _step(self, phase: str, values: Tensor, penalty: float) -> dict[str, Any]:
        settings, candidates, method = self.settings, self.candidates, self.method
        candidates.write(values.detach())
        candidates.gradient.zero_()
        # one backward after the other: the activations of one task at a time
        keep = self.keep_task.get_train_loss(self.model, settings.batch_size)
        (settings.keep_weight * keep).backward()
        broken = self.break_task.get_train_loss(self.model, settings.batch_size, cap=self.cap)
        (-settings.alpha * broken).backward()
        loss = float(self._weigh(keep, broken).detach())
        self.optimizer.zero_grad()
        ((values * candidates.gradient).sum() + penalty * method.masked()).backward()
        self.optimizer.step()
        method.settle_()
        n_masked = int((method.scores() < 0.5).sum())
        losses = {"loss": loss, "keep_loss": float(keep.detach()), "break_loss": float(broken.detach())}
        return {"phase": phase, **losses, "n_masked": n_masked}

    def _weigh(self, keep: Tensor, broken: Tensor) -> Tensor:
        """The objective without its penalty."""
        loss = self.settings.keep_weight * keep - self.settings.alpha * broken
        if not math.isfinite(float(loss.detach())):
            raise UserError(
                f"the loss is not finite (keep {float(keep.detach())}, break {float(broken.detach())}). "
                "Lower the learning rate or alpha."
            )
        return loss
