"""Hard-concrete gates, L0 regularisation (Louizos, Welling, Kingma 2018): whether an edge is cut is a random variable.

relax   The log odds of each edge to be cut are learned, with a penalty on the expected number of cut edges.
anneal  Instead of the penalty, the log odds of all edges are lowered together after each step, so that the expected
        number of cut edges falls to the budget.

The answer is the edges that are most probably cut, among those that would be more probably cut than kept if their log
odds had not been lowered.

Shapes: E edges.
"""

import torch
from torch import Tensor

from circuit_breaking.training.gates import HardConcrete
from circuit_breaking.training.methods.base import RelaxAndAnneal

INIT_CUT_PROB = 0.5  # initial probability that a gate is below 1


class HardConcreteGates(RelaxAndAnneal):
    """A gate for each edge that may be cut. The mask holds each edge's probability to be kept, before lowering."""

    def setup(self) -> None:
        """Make a gate for each edge that may be cut."""
        every = torch.ones_like(self.weights, dtype=torch.bool)
        self.gated_edges = (every if self.allowed is None else self.allowed).nonzero()[:, 0]
        self.gates = HardConcrete(len(self.gated_edges), self.weights.device, INIT_CUT_PROB)
        self.parameter = self.gates.parameter
        self.lowered = 0.0  # by how much all log odds were lowered in the anneal phase
        super().setup()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam([self.parameter], lr=self.config.lr)

    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        """A step with a penalty on the expected number of cut edges."""
        return self._descend(penalty)

    def anneal(self, number: int) -> tuple[float, int]:
        """A step without the penalty, after which all log odds are lowered to the target."""
        return self._descend(0.0, self.target(number, float(self.gates.masked().detach())))

    def _descend(self, penalty: float, target: int | None = None) -> tuple[float, int]:
        mask = torch.ones_like(self.weights).index_put((self.gated_edges,), self.gates.sample().to(self.weights.dtype))
        objective = self.next_objective(self.config.batch_size)(mask)
        self.optimizer.zero_grad()
        self.backward(objective + penalty * self.gates.masked())
        self.optimizer.step()
        if target is not None:
            self.lowered += self.gates.at_most_(target)
        with torch.no_grad():
            kept = torch.sigmoid(-self.gates.log_odds - self.lowered)
            self.weights[self.gated_edges] = kept.to(self.weights.dtype)
        n_cut = self.model.mask.n_cut()
        return float(objective.detach()), n_cut if target is None else min(n_cut, target)

    def state(self) -> dict[str, Tensor]:
        """The gates, their optimizer's state, and by how much log odds were lowered."""
        lowered = torch.tensor(self.lowered, dtype=torch.float64)
        return {**super().state(), "parameter": self.parameter.detach(), "lowered": lowered}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        super().restore(state, device)
        with torch.no_grad():
            self.parameter.copy_(state["parameter"])
        self.lowered = float(state["lowered"])
