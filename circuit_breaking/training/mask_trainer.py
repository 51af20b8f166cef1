"""Train an edge mask.

Minimises  keep_weight · L_keep(m) - alpha · L_break(m) + penalty(m)  over masks m that cut at most `max_edges` edges
(Li, Davies, Nadeau 2023, section 3.2), or a weighted sum of any number of losses, in phases:

find       `steps` steps of a method: a ranking of the edges, clamped weights (the paper's), hard-concrete gates,
           uniform gradient sampling, or attribution (`training.methods`).
choose     For methods that learn a ranking: which budgets should cut fewer edges than they allow
           (`training.prefix_choice`).
refine     Single edges are cut, restored or exchanged by their measured effect on new batches (`training.refine`).
constants  The edges are fixed, and ablation constants, if they are learned, are trained for them
           (`training.optimal_ablation`).

From the refine phase on, the forward pass sees binary masks only, so rounding at the end changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge
from circuit_breaking.runs.checkpoints import Checkpoints, Saved, restore_parts, state_of
from circuit_breaking.runs.distributed import same_random_states
from circuit_breaking.tasks.base import Task
from circuit_breaking.training.config import MaskConfig, check_mask
from circuit_breaking.training.edge_ranking import EdgeRanking
from circuit_breaking.training.held_out import HeldOut
from circuit_breaking.training.loop import Row, run_steps
from circuit_breaking.training.methods import method_class
from circuit_breaking.training.methods.base import LearnedScores, StepResult
from circuit_breaking.training.objective import StepObjective, Term, terms_of, terms_of_two
from circuit_breaking.training.optimal_ablation import AblationConstants
from circuit_breaking.training.prefix_choice import PrefixChoice, choice_steps, lengths_to_measure
from circuit_breaking.training.refine import EdgeRefiner


@dataclass
class MaskResult:
    """What training found.

    Attributes:
        weights: the binary mask [E], also left in the model.
        edges: names of the edges that it cuts.
        history: a row for every step.
        seconds: training time.
        ranking: the edges in the order in which they are worth cutting, before any refinement; None for methods that
            find a mask for one budget only.
        choice: how many of the ranked edges a budget cuts; None if it cuts as many as it allows.
    """

    weights: Tensor
    edges: list[Edge]
    history: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    ranking: EdgeRanking | None = None
    choice: PrefixChoice | None = None

    def at(self, budget: int) -> Tensor:
        """A binary mask [E], on the CPU, that cuts at most `budget` edges, the first of the ranking.

        It cuts fewer than `budget` only if that was clearly better on training texts (`training.prefix_choice`).
        `ranking.mask(count)` always cuts `count` edges.

        Raises:
            UserError: there is no ranking, or it holds fewer edges.
        """
        if self.ranking is None:
            raise UserError("this mask was trained for one budget. Train with method ranking for a mask of any budget.")
        mask = self.ranking.mask(budget)
        return mask if self.choice is None else self.ranking.mask(self.choice.length(budget))


def train_mask(
    model: EdgeMaskedTransformer,
    break_task: Task | None = None,
    keep_task: Task | None = None,
    settings: MaskConfig | None = None,
    allowed: Tensor | None = None,
    on_step: Callable[[Row], None] | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
    *,
    tasks: Mapping[str, Task] | None = None,
    weights: Mapping[str, float] | None = None,
    eval_tasks: Mapping[str, Task] | None = None,
    eval_every: int = 50,
    eval_texts: int | None = None,
    start: Tensor | None = None,
) -> MaskResult:
    """Learn which few edges to cut. The model's mask is trained from all ones and left binary.

    If several processes were launched, all of them call this with the same arguments. Each computes its share of every
    batch, and all of them find the same mask; the main process saves checkpoints and shows the progress bar.

    Args:
        model: the model. Its `means` are the ablation values; they are replaced if ablation constants are learned.
        break_task: the behaviour to break.
        keep_task: the behaviour to keep.
        tasks, weights: in place of these two, any number of behaviours by name, and the weight of each one's loss in
            the objective: negative to break it, positive to keep it, 1 if it is not given. `alpha` and `keep_weight` of
            the settings are then not used.
        eval_tasks: tasks whose held-out losses are measured while the mask is trained, at the mask that would be saved.
            Rows of the history have them as `held_out`.
        eval_every: steps between these measurements.
        eval_texts: most held-out texts of each; all by default.
        start: binary mask [E] to start from. By default training starts with all edges kept.
        settings: see `MaskConfig`.
        allowed: bool [E], the edges that may be cut; all by default.
        on_step: called with each row of the history, after its step.
        progress: show a progress bar with the losses and the number of cut edges.
        checkpoints: where the state is saved from time to time, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to continue from, from `checkpoints.load()`. The mask is that of a run that was never
            interrupted (bit for bit on CPU); the history of the result holds the remaining steps.

    Returns:
        the mask and how training went.

    Raises:
        UserError: a setting makes no sense, or a loss is not finite.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or MaskConfig()
    two = break_task is not None and keep_task is not None
    if two == (tasks is not None) or (break_task is None) != (keep_task is None):
        raise UserError("give break_task and keep_task, or tasks with their weights.")
    if two:
        named = {"break": break_task, "keep": keep_task}
        terms = terms_of_two(model, keep_task, break_task, settings)
    else:
        if wrong := [name for name in tasks if "." in name or not name]:
            raise UserError(f"a task is named {wrong[0]!r}; give a name without dots.")
        named = {f"task_{name}": task for name, task in tasks.items()}
        terms = terms_of(model, tasks, weights or {}, settings)
    trainer = _Trainer(model, terms, named, settings, allowed, start)
    held_out = HeldOut(dict(eval_tasks or {}), eval_every, eval_texts)
    before = 0.0
    if resume_from is not None:
        trainer.restore(resume_from)
        before = resume_from.values["seconds"]
    same_random_states(model.device)
    with gradient_checkpointing_on(model, settings.gradient_checkpointing):
        history = run_steps(
            lambda number: {**trainer.step(), **held_out.row(model, settings.max_edges, number, trainer.total)},
            trainer.total,
            label="mask",
            done=trainer.done,
            progress=progress,
            describe=trainer.describe,
            on_step=on_step,
            seconds_before=before,
            checkpoints=checkpoints,
            state=trainer.state,
        )
    model.mask.keep_budget_(settings.max_edges)
    if trainer.constants is not None:
        trainer.constants.freeze()
    seconds = history[-1]["seconds"] if history else before
    mask = model.mask
    return MaskResult(
        mask.weights.detach().clone(), mask.cut_edges(), history, seconds, trainer.ranking(), trainer.choice
    )


@contextmanager
def gradient_checkpointing_on(model: EdgeMaskedTransformer, on: bool) -> Iterator[None]:
    """Inside the block, the model uses gradient checkpointing if `on`. Afterwards, captured CUDA graphs are freed."""
    before = model.gradient_checkpointing
    model.gradient_checkpointing = before or on
    try:
        yield
    finally:
        model.gradient_checkpointing = before
        model.cuda_graphs.clear()


class _Trainer:
    """State of a training run: `step` runs one step; `state` and `restore` let an interrupted run continue."""

    def __init__(
        self,
        model: EdgeMaskedTransformer,
        terms: Sequence[Term],
        tasks: Mapping[str, Task],
        config: MaskConfig,
        allowed: Tensor | None,
        start: Tensor | None,
    ) -> None:
        check_mask(config, len(model.graph), None if allowed is None else int(allowed.sum()))
        self.model, self.tasks, self.config = model, tasks, config
        self.weights = model.mask.weights
        allowed = None if allowed is None else allowed.to(self.weights.device)
        self.objective = StepObjective(model, terms, config.micro_batch)
        learns_constants = config.constants_lr and config.max_edges
        if learns_constants and model.resample:
            raise UserError(
                "constants_lr learns ablation constants, and model.resample gives prompts outputs on their "
                "counterfactuals instead. Use one of them."
            )
        self.constants = AblationConstants(model, config.constants_lr) if learns_constants else None
        self.done = 0
        method = method_class(config.method)
        self.method = method(model, config, allowed, self.objective.draw, self._backward)
        self.choice = None
        if config.steps and isinstance(self.method, LearnedScores):
            self.choice = PrefixChoice(lengths_to_measure(config, len(self.method.candidates)))
        self.phases = [
            (self._find, config.steps),
            (self._choose, choice_steps(config)),
            (self._refine, config.refine_rounds),
            (self._fit_constants, config.constants_steps if self.constants is not None else 0),
        ]
        self.total = sum(steps for _, steps in self.phases) if config.max_edges else 0
        self.refiner = EdgeRefiner(config.max_edges, allowed)
        self.last: StepResult | None = None
        model.mask.reset_()
        if start is not None:
            self._start_from(start.to(self.weights.device), allowed)

    def step(self) -> Row:
        """Run the next step and return its row."""
        number = self.done
        for step, steps in self.phases:
            if number < steps:
                self.done += 1
                self.last = step(number)
                keep, broken = (self.objective.loss_of(broken) for broken in (False, True))
                losses = {"loss": self.last.loss, "keep_loss": keep, "break_loss": broken}
                if len(self.objective.terms) > 2:
                    names = (name.removeprefix("task_") for name in self.tasks)
                    losses["losses"] = dict(zip(names, self.objective.losses, strict=True))
                return {"phase": self.last.phase, **losses, "n_cut": self.last.n_cut}
            number -= steps
        raise IndexError(f"there are no more than {self.total} steps")

    def describe(self) -> str:
        """The last step, for the progress bar."""
        keep, broken = (self.objective.loss_of(broken) for broken in (False, True))
        return f"{self.last.phase}: keep {keep:.3f}, break {broken:.3f}, {self.last.n_cut} cut"

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        return {"weights": self.weights.detach(), **state_of(**self._stateful())}

    def restore(self, saved: Saved) -> None:
        """Continue from what `state` returned."""
        self.done = saved.step
        with torch.no_grad():
            self.weights.copy_(saved.tensors["weights"])
        restore_parts(saved.tensors, self._stateful(), self.weights.device)
        if saved.step <= self.config.steps:
            self.method.answer()
        elif self.choice is not None and saved.step == self.config.steps + choice_steps(self.config):
            self._cut_chosen()

    def ranking(self) -> EdgeRanking | None:
        """The edges by their scores; None if the method has none."""
        scores = self.method.scores()
        return None if scores is None else EdgeRanking.of_scores(self.model.graph, scores)

    def _stateful(self) -> dict[str, Any]:
        """The objects that have a `state`, by their names in checkpoints."""
        objects = {"method": self.method, "refiner": self.refiner, **self.tasks}
        optional = {"choice": self.choice, "constants": self.constants}
        return objects | {name: part for name, part in optional.items() if part is not None}

    def _start_from(self, mask: Tensor, allowed: Tensor | None) -> None:
        """Start from a binary mask. Raises a `UserError` if it cuts edges that may not be cut."""
        cut = mask < 0.5
        if cut.shape != self.weights.shape:
            raise UserError(f"the mask to start from has {cut.numel():,} edges, the model {len(self.weights):,}.")
        if allowed is not None and bool((cut & ~allowed).any()):
            raise UserError("the mask to start from cuts edges that may not be cut. Start from another one.")
        self.method.start_from(cut)

    def _backward(self, loss: Tensor) -> None:
        """The backward pass of a loss, with a step of the ablation constants if they are learned."""
        loss.backward() if self.constants is None else self.constants.descend(loss)

    def _find(self, number: int) -> StepResult:
        return self.method.step(number)

    def _choose(self, number: int) -> StepResult:
        config, order = self.config, self.ranking().order
        with self.model.caching_prefixes(not config.micro_batch):  # the cache takes memory, which micro_batch saves
            objective = self.objective.draw(config.batch_size, record=True)
            loss = self.choice.measure(objective, order.to(self.weights.device), torch.ones_like(self.weights))
        if number + 1 == choice_steps(config):
            self._cut_chosen()
        return StepResult("choose", loss, self.choice.lengths[-1])

    @torch.no_grad()
    def _cut_chosen(self) -> None:
        """Cut as many of the first edges of the ranking as are chosen for the budget."""
        ranking, budget = self.ranking(), self.config.max_edges
        self.weights.copy_(ranking.mask(self.choice.length(min(budget, len(ranking)))))

    def _refine(self, number: int) -> StepResult:
        config = self.config
        if number == 0:
            self._make_binary()
        mask = self.weights.detach().clone()
        with self.model.caching_prefixes(not config.micro_batch):  # the cache takes memory, which micro_batch saves
            changed, loss = self.refiner.round(mask, self.objective.draw(config.refine_batch_size))
        with torch.no_grad():
            self.weights.copy_(changed)
        self._adapt_constants()
        return StepResult("refine", loss, int((mask == 0).sum()))

    def _fit_constants(self, number: int) -> StepResult:
        if number == 0:
            self._make_binary()
        loss = self._adapt_constants()
        return StepResult("constants", loss, self.model.mask.n_cut())

    def _adapt_constants(self) -> float | None:
        """A step of the ablation constants at the current mask, if they are learned; returns the objective there."""
        if self.constants is None:
            return None
        loss = self.objective.draw(self.config.batch_size)(self.weights.detach())
        self.constants.descend(loss)
        return float(loss.detach())

    @torch.no_grad()
    def _make_binary(self) -> None:
        """Cut the lowest weights among those that rounding would cut, at most as many as the budget allows."""
        self.weights.copy_(lowest_cut(self.weights, self.config.max_edges, threshold=0.5))
