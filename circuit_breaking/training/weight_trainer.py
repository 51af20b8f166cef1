"""Train a mask over a model's weights.

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + penalty · (units masked)  over which units are set to zero
(`ablation.weight_mask.UNITS` defines the units), at most `max_masked` of them:

choose   The first-order effect of masking each unit, from one batch of each task; the most promising are candidates.
relax    Each candidate has a weight in [0, 1], learned by a method of `gates.METHODS`, with a penalty that rises.
anneal   The forward pass sees a binary mask of at most k units; gradients pass straight through. k falls to the budget.

`weight_units` explains how candidates are masked in place with little memory. When training ends, successfully or not,
the weights are what they were, bit for bit.

Shapes: C candidates.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
from circuit_breaking.tasks.base import Task
from circuit_breaking.tasks.stock_model import StockModel
from circuit_breaking.training.config import WeightMaskSettings, check_weight_mask, weight_budget
from circuit_breaking.training.gates import METHODS, falling_count, next_penalty
from circuit_breaking.training.loop import Row, run_steps
from circuit_breaking.training.weight_units import Candidates, choose, gradients_taken


@dataclass
class WeightMaskResult:
    """What training found: the mask, and a row for every step."""

    mask: WeightMask
    history: list[Row] = field(default_factory=list)
    seconds: float = 0.0


def train_weight_mask(
    hf: nn.Module,
    break_task: Task,
    keep_task: Task,
    settings: WeightMaskSettings | None = None,
    on_step: Callable[[Row], None] | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> WeightMaskResult:
    """Learn which few units of a stock Hugging Face model to mask. The model is left as it was.

    Args:
        hf: the model.
        break_task: the behaviour to break.
        keep_task: the behaviour to keep.
        settings: see `WeightMaskSettings`.
        on_step: called with each row of the history, after its step.
        progress: show a progress bar with the losses and the number of masked units.
        checkpoints: where the state is saved from time to time, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to continue from, from `checkpoints.load()`. The mask is that of a run that was never
            interrupted (bit for bit on CPU); the history of the result holds the remaining steps.

    Raises:
        UserError: a setting makes no sense, the model's family is not supported, or a loss is not finite.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or WeightMaskSettings()
    check_weight_mask(settings)
    budget = weight_budget(settings, sum(matrix.count for matrix in find_matrices(hf, settings.granularity)))
    start = time.perf_counter()
    before = 0.0 if resume_from is None else resume_from.values["seconds"]
    history: list[Row] = []
    units: dict[str, Tensor] = {}
    # candidates are chosen before the first step; a signal that arrives then ends the run after that step
    with stop_signals() if checkpoints is not None else nullcontext():
        trainer = _Trainer(hf, break_task, keep_task, settings, budget)
        if budget and trainer.start(resume_from):
            with trainer.masked_in_place():
                history = run_steps(
                    trainer.step,
                    settings.relax_steps + settings.anneal_steps,
                    label="weight mask",
                    done=0 if resume_from is None else resume_from.step,
                    progress=progress,
                    describe=trainer.describe,
                    on_step=on_step,
                    seconds_before=before + time.perf_counter() - start,
                    checkpoints=checkpoints,
                    state=trainer.state,
                    values=trainer.values,
                )
            units = trainer.masked_units()
    mask = WeightMask(settings.granularity, units)
    return WeightMaskResult(mask, history, before + time.perf_counter() - start)


class _Trainer:
    """State of a training run: `state` and `values` let an interrupted run continue."""

    def __init__(
        self, hf: nn.Module, break_task: Task, keep_task: Task, settings: WeightMaskSettings, budget: int
    ) -> None:
        self.hf, self.model = hf, StockModel(hf)
        self.break_task, self.keep_task, self.settings, self.budget = break_task, keep_task, settings, budget
        self.tasks = {"break": break_task, "keep": keep_task}  # by their names in checkpoints
        self.cap = settings.break_cap or math.log(len(self.model.unembedding))
        self.penalty = settings.penalty / max(1, budget)
        self.first_count = 0  # units that are masked when annealing starts
        self.last: Row = {}

    def start(self, saved: Saved | None) -> bool:
        """Choose candidates, or take those of a saved state. False if there are none."""
        if saved is None:
            chosen = self._choose()
        else:
            units = part_of(saved.tensors, "units")
            matrices = [one for one in find_matrices(self.hf, self.settings.granularity) if one.name in units]
            chosen = [(matrix, units[matrix.name].to(matrix.parameter.device)) for matrix in matrices]
        if not chosen:
            return False
        self.candidates = Candidates(chosen)
        self.gates = METHODS[self.settings.method](len(self.candidates.gradient), self.candidates.gradient.device)
        self.optimizer = torch.optim.Adam([self.gates.parameter], lr=self.settings.lr)
        if saved is not None:
            restore_training(self.optimizer, {"gates": self.gates.parameter}, saved.tensors)
            restore_parts(saved.tensors, self.tasks, self.gates.parameter.device)
            self.penalty, self.first_count = saved.values["penalty"], saved.values["first_count"]
        return True

    def state(self) -> dict[str, Tensor]:
        """The tensors that the next steps depend on: candidates, gates and their optimizer, the states of the tasks."""
        units = {f"units.{matrix.name}": units for matrix, units in self.candidates.chosen}
        learned = training_state(self.optimizer, {"gates": self.gates.parameter})
        return {**units, **learned, **state_of(**self.tasks)}

    def values(self) -> dict[str, Any]:
        """Everything else that they depend on."""
        return {"penalty": self.penalty, "first_count": self.first_count}

    @contextmanager
    def masked_in_place(self) -> Iterator[None]:
        """Inside the block, steps scale the weights of candidates in place; afterwards the weights are restored."""
        try:
            with gradients_taken(self.hf, [matrix for matrix, _ in self.candidates.chosen], self.candidates.take):
                yield
        finally:
            self.candidates.write(torch.ones_like(self.candidates.gradient))

    def masked_units(self) -> dict[str, Tensor]:
        """The numbers of the masked units, by matrix."""
        masked = lowest_cut(self.gates.scores().detach(), self.budget, threshold=0.5) == 0
        return {
            matrix.name: units[mine].cpu()
            for (matrix, units), mine in zip(self.candidates.chosen, masked.split(self.candidates.sizes), strict=True)
            if mine.any()
        }

    def step(self, number: int) -> Row:
        """Run a step and return its row."""
        self.last = self._relax(number) if number < self.settings.relax_steps else self._anneal(number)
        return self.last

    def describe(self) -> str:
        """The last step, for the progress bar."""
        row = self.last
        return f"{row['phase']}: keep {row['keep_loss']:.3f}, break {row['break_loss']:.3f}, {row['n_masked']} masked"

    def _relax(self, number: int) -> Row:
        ramp = min(1.0, 2 * (number + 1) / self.settings.relax_steps)
        return self._descend("relax", self.gates.sample(), ramp * self.penalty)

    def _anneal(self, number: int) -> Row:
        number, scores = number - self.settings.relax_steps, self.gates.scores()
        n_masked = int((scores < 0.5).sum())
        if number == 0:
            self.first_count = max(self.budget, n_masked)
        count = falling_count(self.first_count, self.budget, number, self.settings.anneal_steps)
        binary = lowest_cut(scores.detach(), count, threshold=0.5)
        self.penalty = next_penalty(self.penalty, n_masked, count)
        return self._descend("anneal", binary + (scores - scores.detach()), self.penalty)

    def _choose(self) -> list[tuple[Matrix, Tensor]]:
        """Candidates; empty if masking any unit would only do harm, to first order."""
        keep_texts, break_texts = (task.draw(self.settings.choose_size) for task in (self.keep_task, self.break_task))

        def backward() -> None:
            keep = self.keep_task.loss(self.model, keep_texts)
            broken = self.break_task.loss(self.model, break_texts, cap=self.cap)
            self._objective(keep, broken).backward()

        return choose(self.hf, self.settings.granularity, self.settings.candidates * self.budget, backward)

    def _descend(self, phase: str, values: Tensor, penalty: float) -> Row:
        """A step of the optimizer, with the candidates' weights scaled by `values` [C]."""
        settings, candidates, gates = self.settings, self.candidates, self.gates
        candidates.write(values.detach())
        candidates.gradient.zero_()
        # one backward pass after the other, so that memory holds the activations of one task at a time
        keep = self.keep_task.get_train_loss(self.model, settings.batch_size)
        (settings.keep_weight * keep).backward()
        broken = self.break_task.get_train_loss(self.model, settings.batch_size, cap=self.cap)
        (-settings.alpha * broken).backward()
        loss = float(self._objective(keep, broken).detach())
        self.optimizer.zero_grad()
        ((values * candidates.gradient).sum() + penalty * gates.masked()).backward()
        self.optimizer.step()
        gates.project_()
        n_masked = int((gates.scores() < 0.5).sum())
        losses = {"loss": loss, "keep_loss": float(keep.detach()), "break_loss": float(broken.detach())}
        return {"phase": phase, **losses, "n_masked": n_masked}

    def _objective(self, keep: Tensor, broken: Tensor) -> Tensor:
        """The objective without its penalty."""
        loss = self.settings.keep_weight * keep - self.settings.alpha * broken
        if not math.isfinite(float(loss.detach())):
            raise UserError(
                f"the loss is not finite (keep {float(keep.detach())}, break {float(broken.detach())}). "
                "Lower the learning rate or alpha."
            )
        return loss
