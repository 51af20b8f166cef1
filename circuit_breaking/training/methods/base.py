"""The interface of a mask method, and what methods with an optimizer share.

A method runs `steps` steps. Each step sees one batch of each task and does one backward pass. The method leaves its
answer in the model's mask: edges whose weight is below 0.5 will be cut, the lowest weights first.

Shapes: E edges.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import optimizer_state, part_of, restore_optimizer
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.gates import falling_count
from circuit_breaking.training.mask_gradient import MaskFunction

RAMP = 0.1  # share of the relax phase during which the penalty rises from 0
ANNEAL_START = 3.0  # edges cut when annealing starts, as a multiple of the budget (or more, if relaxing found more)


class StepResult(NamedTuple):
    """What a step of training reports: its phase, the objective without its penalty, and the number of cut edges."""

    phase: str
    loss: float | None
    n_cut: int


def shares_of(texts: int, masks: int) -> list[int]:
    """Number of texts for each of `masks` masks that share `texts` texts; fewer masks if there are not enough texts."""
    masks = min(masks, texts)
    return [texts // masks + (mask < texts % masks) for mask in range(masks)]


class MaskMethod(ABC):
    """A way to find edges: a subclass has `step`, `state` and `restore`, and `setup` if it has a state.

    Args:
        model: the model whose mask is learned; all its weights are 1 at first.
        config: the settings of training.
        allowed: bool [E], the edges that may be cut; None if all may be.
        next_objective: given a number of texts, draws the next batches of that size and returns the objective on them,
            without its penalty, as a function of the mask.
        backward: runs the backward pass of a loss, and updates ablation constants if they are learned.
    """

    def __init__(
        self,
        model: EdgeMaskedTransformer,
        config: MaskConfig,
        allowed: Tensor | None,
        next_objective: Callable[[int], MaskFunction],
        backward: Callable[[Tensor], None],
    ) -> None:
        self.model, self.config, self.allowed = model, config, allowed
        self.next_objective, self.backward = next_objective, backward
        self.weights = model.mask.weights
        self.setup()

    def setup(self) -> None:  # noqa: B027
        """Create the state of the method. The constructor calls it at its end; a method without state leaves it out."""

    @abstractmethod
    def step(self, number: int) -> StepResult:
        """Run step `number`, from 0 to `steps - 1`."""

    def start_from(self, cut: Tensor) -> None:
        """Start from a mask that cuts some edges, bool [E], instead of from none."""
        raise UserError(f"method {self.config.method} cannot start from a mask. Use ranking, ugs or clamped.")

    def scores(self) -> Tensor | None:
        """Scores of all edges [E], by which they are cut at any budget, the highest first; None if there are none.

        Edges that may not be cut have a score of minus infinity.
        """
        return None

    def answer(self) -> None:  # noqa: B027
        """Put what has been found so far into the model's mask. `step` does that; this is for a state that is restored.

        A method whose steps do not depend on the budget can continue from the state of a run with another budget, and
        has to put its own answer there.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, in addition to the model's mask, for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""


class LearnedScores(MaskMethod):
    """A method that learns one number per edge that may be cut (candidate), by which edges are ranked at the end.

    The mask cuts the `max_edges` edges with the highest scores. A subclass calls `learn` in its `setup`.
    """

    parameter: Tensor  # [C], C candidates
    optimizer: torch.optim.Optimizer
    sign = 1.0  # a candidate's score is its number times this

    def learn(self, start: float) -> None:
        """Create the numbers, all equal to `start`. The subclass makes their optimizer."""
        every = torch.ones_like(self.weights, dtype=torch.bool)
        self.candidates = (every if self.allowed is None else self.allowed).nonzero()[:, 0]  # [C]
        self.parameter = torch.full_like(self.weights[self.candidates], start).requires_grad_()

    @torch.no_grad()
    def start_from(self, cut: Tensor) -> None:
        """Let the scores of cut edges lead all others by `head_start`."""
        self.parameter += self.sign * self.head_start() * cut[self.candidates]

    def head_start(self) -> float:
        """By how much the scores of the edges of a mask to start from lead those of others."""
        return 2 * abs(float(self.parameter[0]))

    def whole_mask(self, weights: Tensor) -> Tensor:
        """A mask [E] from the weights of the candidates [C]."""
        return torch.ones_like(self.weights).index_put((self.candidates,), weights)

    @torch.no_grad()
    def answer(self) -> None:
        """Cut the edges with the highest scores in the model's mask, as many as the budget allows."""
        self.weights.copy_(lowest_cut(-self.scores(), self.config.max_edges))

    def scores(self) -> Tensor:
        """The scores of all edges [E]; minus infinity for edges that may not be cut."""
        lowest = torch.full_like(self.weights, float("-inf"))
        return lowest.index_put_((self.candidates,), self.sign * self.parameter.detach())

    def state(self) -> dict[str, Tensor]:
        """The numbers and the state of their optimizer."""
        kept = optimizer_state(self.optimizer, self.parameter)
        return {"parameter": self.parameter.detach(), **{f"optimizer.{name}": value for name, value in kept.items()}}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            self.parameter.copy_(state["parameter"])
        restore_optimizer(self.optimizer, self.parameter, part_of(state, "optimizer"))


class RelaxAndAnneal(MaskMethod):
    """Gradient descent in two phases: relax, with a penalty for each cut edge, then anneal, down to the budget.

    A subclass sets `parameter`, the tensor that is learned, in its `setup`, and then calls this `setup`.
    """

    parameter: Tensor

    def setup(self) -> None:
        """Make the optimizer, and give each phase half of the steps."""
        self.anneal_steps = self.config.steps // 2
        self.relax_steps = self.config.steps - self.anneal_steps
        self.first_count = 0  # target number of cut edges when annealing starts
        self.optimizer = self.make_optimizer()

    def step(self, number: int) -> StepResult:
        """A step of the relax phase, with its part of the penalty, or of the anneal phase."""
        if number < self.relax_steps:
            ramp = min(1.0, number / max(1.0, RAMP * self.relax_steps))
            return StepResult("relax", *self.relax(number, self.config.edge_penalty * ramp))
        return StepResult("anneal", *self.anneal(number - self.relax_steps))

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make an optimizer of `parameter`."""

    @abstractmethod
    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        """Run a step with a penalty for each cut edge. Returns the objective and the number of cut edges."""

    @abstractmethod
    def anneal(self, number: int) -> tuple[float, int]:
        """Run a step towards the budget. Returns the objective and the number of cut edges."""

    def target(self, number: int, n_cut: float) -> int:
        """Largest number of edges to cut at step `number` of annealing; `n_cut` edges are cut when it starts."""
        budget = self.config.max_edges
        if number == 0:
            self.first_count = max(1, round(n_cut), round(ANNEAL_START * budget))
        return falling_count(self.first_count, budget, number, self.anneal_steps)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state and the target at the start of annealing."""
        kept = optimizer_state(self.optimizer, self.parameter)
        first = torch.tensor(self.first_count)
        return {"first_count": first, **{f"optimizer.{name}": value for name, value in kept.items()}}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        self.first_count = int(state["first_count"])
        restore_optimizer(self.optimizer, self.parameter, part_of(state, "optimizer"))
