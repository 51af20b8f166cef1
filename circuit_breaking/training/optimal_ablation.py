"""What cut edges carry, learned with the mask: one constant a node (optimal ablation; Li and Janson 2024; layer 3).

Zero or a mean output may be far from anything that a reader is used to, so that a cut harms for that alone. Here the
constants are learned from the engine's gradient of its means, by `constants_loss` for one of two things:

keep        The ordinary loss alone, as Li and Janson define them: the constants with which the model does best what it
            is meant to do. What they do to the behaviour is the cuts' own doing.
objective   The same objective as the mask. The constants then break the behaviour themselves, a steering vector for
            each node, which even random cuts let through.
"""

from typing import Any

import torch
from torch import Tensor

from circuit_breaking.runs.checkpoints import optimizer_state, restore_optimizer


class AblationConstants:
    """The constants of a model, [P, D], from its own means or zero on, with their optimizer (AdamW without decay)."""

    def __init__(self, model: Any, lr: float) -> None:
        start = model.means
        if start is None:
            start = model.embedding.new_zeros(len(model.graph.sources), model.embedding.shape[1])
        self.model = model
        self.constants = start.detach().to(model.mask.weights.dtype, copy=True).requires_grad_()
        model.means = self.constants
        self.optimizer = torch.optim.AdamW([self.constants], lr=lr, weight_decay=0.0)

    def descend(self, loss: Tensor) -> None:
        """The backward of a loss, and a step."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def settle(self) -> None:
        """Leave the constants in the model, to be learned no more."""
        self.model.means = self.constants.detach()

    def state(self) -> dict[str, Tensor]:
        """All that further steps depend on."""
        return {"constants": self.constants.detach(), **optimizer_state(self.optimizer, self.constants)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            self.constants.copy_(state["constants"])
        kept = {name: value for name, value in state.items() if name != "constants"}
        restore_optimizer(self.optimizer, self.constants, kept)
