"""Ways to find edges that are worth cutting, before they are refined by measured effects (layer 3).

Each spends `relax_steps + anneal_steps` steps, a step on one batch of each task with one backward, and leaves its
answer in the model's mask: edges with weights below 0.5 are to be cut, the lowest first.

clamped         The paper's (Li, Davies, Nadeau 2023). relax: weights in [0, 1], AdamW, a penalty for each cut edge that
                ramps up, rounding on a schedule. anneal: the forward sees a binary mask, at most the k lowest weights
                cut; gradients pass straight through to all weights, so that what is learned is learned about masks that
                can be saved. k falls geometrically to the budget, and the penalty follows it.
hard-concrete   L0 regularisation (Louizos, Welling, Kingma 2018): whether an edge is cut is a random variable whose log
                odds are learned. relax: a penalty on the expected number of cut edges. anneal: instead, all log odds
                are lowered alike after each step, so that this number falls to the budget. The answer: the edges most
                surely cut, of those that would be more likely cut than kept without that lowering.
attribution     EAP or EAP-IG of the objective (`attribution`), averaged over the batches of all steps: the edges whose
                cut is predicted to gain most.
given           None: all edges that may be cut are cut from the first step to the last, and only what they carry is
                learned, if that is. For controls, and for edges that are known.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.runs.checkpoints import optimizer_state, part_of, restore_optimizer
from circuit_breaking.training.attribution import line_points
from circuit_breaking.training.gates import HardConcrete, falling_count, next_penalty
from circuit_breaking.training.refine import Objective, differentiate

Step = tuple[str, float, int]  # phase, objective without its penalty, edges cut


class Method(ABC):
    """A way to find edges.

    Args:
        model: whose mask is learned, all ones at first.
        settings: see `training.MaskConfig`.
        allowed: bool [E], edges that may be cut; all when None.
        next_objective: from a number of texts, the objective on the next batches, without its penalty, as a function of
            the mask.
        backward: the backward of a loss.
    """

    def __init__(
        self,
        model: Any,
        settings: Any,
        allowed: Tensor | None,
        next_objective: Callable[[int], Objective],
        backward: Callable[[Tensor], None],
    ) -> None:
        self.model, self.settings, self.allowed = model, settings, allowed
        self.next_objective, self.backward = next_objective, backward
        self.weights = model.mask.weights

    @abstractmethod
    def step(self, number: int) -> Step:
        """Do step `number`, of `relax_steps + anneal_steps`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What the next steps depend on, apart from the model's mask, as tensors."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""


class Learned(Method):
    """By gradient descent in two phases: relax, with a penalty for each cut edge, and anneal, down to the budget."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.start = 0  # target at the start of annealing
        self.optimizer = self.make_optimizer()

    def step(self, number: int) -> Step:
        settings = self.settings
        if number < settings.relax_steps:
            ramp = min(1.0, number / max(1.0, settings.ramp * settings.relax_steps))
            return "relax", *self.relax(number, settings.edge_penalty * ramp)
        return "anneal", *self.anneal(number - settings.relax_steps)

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """What is learned."""

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer of `parameter`."""

    @abstractmethod
    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        """A step at a penalty; the objective, and edges cut."""

    @abstractmethod
    def anneal(self, number: int) -> tuple[float, int]:
        """A step towards the budget."""

    def target(self, number: int, count: float) -> int:
        """Most edges to cut at a step of annealing, when `count` are cut at its beginning."""
        budget = self.settings.max_edges
        if number == 0:
            self.start = max(1, round(count), round(self.settings.anneal_start * budget))
        return falling_count(self.start, budget, number, self.settings.anneal_steps)

    def state(self) -> dict[str, Tensor]:
        kept = optimizer_state(self.optimizer, self.parameter)
        return {"start": torch.tensor(self.start), **{f"optimizer.{name}": value for name, value in kept.items()}}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.start = int(state["start"])
        restore_optimizer(self.optimizer, self.parameter, part_of(state, "optimizer"))


class ClampedEdges(Learned):
    """The paper's: the mask's own weights, brought back into [0, 1] after every step."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.penalty = self.settings.edge_penalty  # while annealing
        self.admitted: Tensor | None = None  # mask [E] of the last step of annealing, where new cuts are measured

    @property
    def parameter(self) -> Tensor:
        return self.weights

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.weights], lr=self.settings.lr, weight_decay=0.0)

    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        settings = self.settings
        objective = self.next_objective(settings.batch_size)(self.weights)
        self._descend(objective + penalty * (1 - self.weights).sum())
        rounds = settings.round_every and (number + 1) % settings.round_every == 0
        if rounds and number + 1 < settings.relax_steps:
            self.model.mask.round_()
        return float(objective.detach()), self.model.mask.n_cut()

    def anneal(self, number: int) -> tuple[float, int]:
        weights = self.weights
        if number == 0:
            self.optimizer = self.make_optimizer()
        count = self.target(number, self.model.mask.n_cut())
        measure = self.next_objective(self.settings.batch_size)
        if self.settings.measure_new_cuts:
            binary = self._admit(count, measure)
        else:
            binary = lowest_cut(weights.detach(), count, threshold=0.5)
            self.penalty = next_penalty(self.penalty, self.model.mask.n_cut(), count)
        objective = measure(binary + (weights - weights.detach()))
        self._descend(objective + self.penalty * (1 - weights).sum())
        if self.admitted is not None and number + 1 == self.settings.anneal_steps:
            weights.data.copy_(self.admitted)  # nothing is cut in the end that was not measured
        return float(objective.detach()), int((binary == 0).sum())

    @torch.no_grad()
    def _admit(self, count: int, measure: Objective) -> Tensor:
        """The binary mask of the last step, but for cuts whose weights have risen, and with the lowest of the new ones
        if it is worth it by measure; else that one's weight is set to 1."""
        weights = self.weights
        if self.admitted is None:  # what relaxing found
            self.admitted = lowest_cut(weights, count, threshold=0.5)
            return self.admitted
        cut_before = weights.masked_fill(self.admitted == 1, torch.inf)
        binary = lowest_cut(cut_before, count, threshold=0.5)
        waiting = weights.masked_fill(self.admitted == 0, torch.inf).argmin()
        cut_before[waiting] = weights[waiting]
        proposed = lowest_cut(cut_before, count, threshold=0.5)
        if proposed[waiting] == 0:
            if measure(proposed) > measure(binary):
                weights[waiting] = 1.0
            else:
                binary = proposed
        self.admitted = binary
        return binary

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(loss)
        if self.allowed is not None:
            self.weights.grad[~self.allowed] = 0.0
        self.optimizer.step()
        self.model.mask.clamp_()

    def state(self) -> dict[str, Tensor]:
        kept = {} if self.admitted is None else {"admitted": self.admitted}
        return {**super().state(), **kept, "penalty": torch.tensor(self.penalty, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        super().restore(state, device)
        self.penalty = float(state["penalty"])
        self.admitted = state["admitted"].to(device) if "admitted" in state else None


class HardConcreteEdges(Learned):
    """A gate for each edge that may be cut. The mask shows the chance to be kept, were it not for the budget."""

    def __init__(self, model: Any, settings: Any, allowed: Tensor | None, *words: Any) -> None:
        every = torch.ones_like(model.mask.weights, dtype=torch.bool)
        self.places = (every if allowed is None else allowed).nonzero()[:, 0]
        self.gates = HardConcrete(len(self.places), model.mask.weights.device, settings.init_cut_prob)
        self.lowered = 0.0  # by how much all log odds were lowered for the sake of the budget
        super().__init__(model, settings, allowed, *words)

    @property
    def parameter(self) -> Tensor:
        return self.gates.parameter

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.parameter], lr=self.settings.lr)

    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        return self._descend(penalty)

    def anneal(self, number: int) -> tuple[float, int]:
        return self._descend(0.0, self.target(number, float(self.gates.masked().detach())))

    def _descend(self, penalty: float, target: int | None = None) -> tuple[float, int]:
        mask = torch.ones_like(self.weights).index_put((self.places,), self.gates.sample().to(self.weights.dtype))
        objective = self.next_objective(self.settings.batch_size)(mask)
        self.optimizer.zero_grad()
        self.backward(objective + penalty * self.gates.masked())
        self.optimizer.step()
        if target is not None:
            self.lowered += self.gates.at_most_(target)
        with torch.no_grad():
            kept = torch.sigmoid(-self.gates.log_odds - self.lowered)
            self.weights[self.places] = kept.to(self.weights.dtype)
        n_cut = self.model.mask.n_cut()
        return float(objective.detach()), n_cut if target is None else min(n_cut, target)

    def state(self) -> dict[str, Tensor]:
        lowered = torch.tensor(self.lowered, dtype=torch.float64)
        return {**super().state(), "parameter": self.parameter.detach(), "lowered": lowered}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        super().restore(state, device)
        with torch.no_grad():
            self.parameter.copy_(state["parameter"])
        self.lowered = float(state["lowered"])


class AttributedEdges(Method):
    """The mask shows at every step which edges the gradients so far would cut."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        # places on the line from all edges cut to all kept, one a step in turn
        self.points = line_points(self.settings.ig_steps) if self.settings.ig_steps else [(1.0, 1.0)]
        self.totals = torch.zeros(len(self.points), len(self.weights), device=self.weights.device)
        self.seen = torch.zeros(len(self.points), dtype=torch.int64)

    def step(self, number: int) -> Step:
        settings, at = self.settings, number % len(self.points)
        line = torch.full_like(self.weights, self.points[at][0])
        value, gradient = differentiate(line, self.next_objective(settings.batch_size))
        self.totals[at] += gradient
        self.seen[at] += 1
        # cutting an edge gains its score, what keeping it adds to the objective
        loss = settings.min_gain - self.scores()
        if self.allowed is not None:
            loss = loss.masked_fill(~self.allowed, float("inf"))
        with torch.no_grad():
            self.weights.copy_(lowest_cut(loss, settings.max_edges, threshold=0.0))
        return "attribute", value, self.model.mask.n_cut()

    def scores(self) -> Tensor:
        """EAP or EAP-IG scores of all edges: [E]."""
        weights = torch.tensor([weight for _, weight in self.points], dtype=torch.float64) / self.seen.clamp(min=1)
        return weights.to(self.totals) @ self.totals

    def state(self) -> dict[str, Tensor]:
        return {"totals": self.totals, "seen": self.seen}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.totals, self.seen = state["totals"].to(device), state["seen"]


class GivenEdges(Method):
    """Cuts what may be cut. A step is one for what cut edges carry."""

    def step(self, number: int) -> Step:
        with torch.no_grad():
            self.weights.copy_(~self.allowed)
        objective = self.next_objective(self.settings.batch_size)(self.weights.detach())
        if objective.requires_grad:
            self.backward(objective)
        return "given", float(objective.detach()), self.model.mask.n_cut()

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        pass


METHODS = {"clamped": ClampedEdges, "hard-concrete": HardConcreteEdges, "attribution": AttributedEdges}  # that find


def relaxing(settings: Any) -> dict[str, Any] | None:
    """Changes to settings that leave the relax phase alone, which is the same whatever the budget; None where there is
    none."""
    if settings.relax_steps == 0 or not issubclass(METHODS.get(settings.method, Method), Learned):
        return None
    return {"max_edges": 1, "anneal_steps": 0, "refine_rounds": 0, "constants_steps": 0}
