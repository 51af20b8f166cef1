"""The one mask-training loop (layer 3).

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + sparsity(m)  over masks m that cut at most `max_edges` edges
(Li, Davies, Nadeau 2023, section 3.2), in phases:

find     `relax_steps` and `anneal_steps`, used as the method says: the paper's clamped weights, hard-concrete gates, or
         attribution (`edge_methods`).
refine   Single edges are cut, restored or exchanged by their measured effect on fresh batches (`search`).
settle   The edges are chosen; what they carry, where that is learned, comes to fit them (`learned_means`).

The forward sees binary masks from there on, so nothing is left for a last rounding to harm.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.graph import Edge
from circuit_breaking.runs.checkpoints import Checkpoints, Saved, restore_parts, state_of
from circuit_breaking.runs.distributed import is_main, same_random_states
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.training.config import GIVEN, MaskConfig, check_mask
from circuit_breaking.training.edge_methods import METHODS, GivenEdges
from circuit_breaking.training.objective import StepObjective
from circuit_breaking.training.optimal_ablation import AblationConstants
from circuit_breaking.training.refine import EdgeRefiner


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
    settings: MaskConfig | None = None,
    allowed: Tensor | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> MaskResult:
    """Learn which few edges to cut. The model's mask is trained from all ones and left binary.

    Where several processes were launched (`parallel`), all call this alike, with the same tasks. Each computes its
    share of every batch, and all come to the same mask; the main one saves checkpoints and shows the bar.

    Args:
        model: an `EdgeMaskedTransformer`; its `means` say what a cut edge carries, and are replaced where they are
            learned.
        break_task: behaviour to break, a `tasks.Task`.
        keep_task: behaviour to keep.
        settings: see `MaskConfig`.
        allowed: bool [E], the edges that may be cut; all by default.
        on_step: called with each row of the history as it comes.
        progress: show a bar with the losses and the number of cut edges.
        checkpoints: where the state goes every so many steps, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to go on from, of `checkpoints.load()`. The mask that comes out is that of a run that
            was never interrupted (bit for bit on CPU); the result's history begins where it goes on.

    Raises:
        UserError: a setting makes no sense, or a loss is not finite.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or MaskConfig()
    trainer = _Trainer(model, break_task, keep_task, settings, allowed)
    before = 0.0
    if resume_from is not None:
        trainer.restore(resume_from)
        before = resume_from.values["seconds"]
    same_random_states(model.device)
    start, history = time.perf_counter(), []
    hidden = None if progress and is_main() else True  # None: shown on a terminal
    with (
        tqdm(total=trainer.total, initial=trainer.done, desc="mask", unit="step", disable=hidden) as bar,
        stop_signals() if checkpoints is not None else nullcontext(()) as signals,
        gradient_checkpointing_on(model, settings.gradient_checkpointing),
    ):
        while trainer.done < trainer.total:
            row = {"step": trainer.done, **trainer.step()}
            row["seconds"] = round(before + time.perf_counter() - start, 3)
            history.append(row)
            if on_step is not None:
                on_step(row)
            bar.set_postfix_str(
                f"{row['phase']}: keep {row['keep_loss']:.3f}, break {row['break_loss']:.3f}, {row['n_cut']} cut"
            )
            bar.update()
            if checkpoints is not None:
                last = trainer.done == trainer.total
                checkpoints.after(trainer.done, trainer.state, {"seconds": row["seconds"]}, signals, last)
    model.mask.keep_budget_(trainer.settings.max_edges)
    if trainer.means is not None:
        trainer.means.settle()
    seconds = before + time.perf_counter() - start
    return MaskResult(model.mask.weights.detach().clone(), model.mask.cut_edges(), history, seconds)


@contextmanager
def gradient_checkpointing_on(model: Any, on: bool) -> Iterator[None]:
    """Let the model's backward compute parts of each layer again, while the block lasts; then free what it holds."""
    before = model.gradient_checkpointing
    model.gradient_checkpointing = before or on
    try:
        yield
    finally:
        model.gradient_checkpointing = before
        model.cuda_graphs.clear()


class _Trainer:
    """State of a training run: `step` does one step, `state` and `restore` carry it over an interruption."""

    def __init__(
        self, model: Any, break_task: Any, keep_task: Any, settings: MaskConfig, allowed: Tensor | None
    ) -> None:
        check_mask(settings, len(model.graph), None if allowed is None else int(allowed.sum()))
        self.model, self.break_task, self.keep_task, self.settings = model, break_task, keep_task, settings
        self.weights = model.mask.weights
        self.allowed = None if allowed is None else allowed.to(self.weights.device)
        self.objective = StepObjective(model, keep_task, break_task, settings)
        self.means = (
            AblationConstants(model, settings.constants_lr) if settings.constants_lr and settings.max_edges else None
        )
        self.done = 0
        self.phases = [
            (self._find, settings.relax_steps + settings.anneal_steps),
            (self._refine, settings.refine_rounds),
            (self._settle, settings.constants_steps if self.means is not None else 0),
        ]
        self.total = sum(steps for _, steps in self.phases) if settings.max_edges else 0
        method = {**METHODS, GIVEN: GivenEdges}[settings.method]
        self.method = method(model, settings, self.allowed, self.objective.draw, self._backward)
        self.search = EdgeRefiner(settings.max_edges, self.allowed, settings.min_gain, settings.moves_per_round)
        model.mask.reset_()

    def step(self) -> dict[str, Any]:
        """Do the next step and return its row."""
        number = self.done
        for step, steps in self.phases:
            if number < steps:
                self.done += 1
                return step(number)
            number -= steps
        raise IndexError(f"there are no more than {self.total} steps")

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        return {"weights": self.weights.detach(), **state_of(**self._parts())}

    def restore(self, saved: Saved) -> None:
        """Go on from what `state` gave."""
        self.done = saved.step
        with torch.no_grad():
            self.weights.copy_(saved.tensors["weights"])
        restore_parts(saved.tensors, self._parts(), self.weights.device)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        parts = {"method": self.method, "search": self.search}
        parts |= {"break": self.break_task, "keep": self.keep_task}
        return parts if self.means is None else {**parts, "means": self.means}

    def _row(self, phase: str, loss: float, n_cut: int) -> dict[str, Any]:
        keep, broken = self.objective.losses
        return {"phase": phase, "loss": loss, "keep_loss": keep, "break_loss": broken, "n_cut": n_cut}

    def _backward(self, loss: Tensor) -> None:
        """The backward of a loss, with a step of what cut edges carry where that is learned."""
        loss.backward() if self.means is None else self.means.descend(loss)

    def _find(self, number: int) -> dict[str, Any]:
        return self._row(*self.method.step(number))

    def _refine(self, number: int) -> dict[str, Any]:
        settings = self.settings
        if number == 0:
            self.weights.data.copy_(self._lowest(settings.max_edges))
        mask = self.weights.detach().clone()
        with self.model.caching_prefixes(not settings.micro_batch):  # which is for those who lack the memory
            changed, loss = self.search.round(mask, self.objective.draw(settings.refine_batch_size))
        with torch.no_grad():
            self.weights.copy_(changed)
        self._adapt_means()
        return self._row("refine", loss, int((mask == 0).sum()))

    def _settle(self, number: int) -> dict[str, Any]:
        if number == 0:
            self.weights.data.copy_(self._lowest(self.settings.max_edges))
        loss = self._adapt_means()
        return self._row("settle", loss, self.model.mask.n_cut())

    def _adapt_means(self) -> float | None:
        """A step of what cut edges carry, where that is learned, for the mask as it is now; the objective there."""
        if self.means is None:
            return None
        loss = self.objective.draw(self.settings.batch_size)(self.weights.detach())
        self.means.descend(loss)
        return float(loss.detach())

    @torch.no_grad()
    def _lowest(self, count: int) -> Tensor:
        """Binary mask that cuts the `count` lowest of the weights that rounding would cut."""
        return lowest_cut(self.weights, count, threshold=0.5)
