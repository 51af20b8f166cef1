"""Ablation constants that are learned with the mask: one vector per node (optimal ablation; Li and Janson 2024).

Zero or a mean output may be far from every input that a reader has seen, so that cutting an edge does damage for this
reason alone. Here the constants are learned by gradient descent; `constants_loss` says what they minimise:

keep        The loss to keep low, as Li and Janson define them: the constants with which the model performs best. What
            breaks the behaviour is then the cut edges alone.
objective   The objective of the mask. The constants then help to break the behaviour: each is a steering vector that
            even random cuts let through.

Shapes: P source nodes, D width.
"""

import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.runs.checkpoints import optimizer_state, restore_optimizer


class AblationConstants:
    """The learned constants [P, D] of a model, with their optimizer (AdamW without weight decay).

    They start from the model's own ablation values, or from zero, and replace `model.means`.
    """

    def __init__(self, model: EdgeMaskedTransformer, lr: float) -> None:
        start = model.means
        if start is None:
            start = model.embedding.new_zeros(len(model.graph.sources), model.embedding.shape[1])
        self.model = model
        self.constants = start.detach().to(model.mask.weights.dtype, copy=True).requires_grad_()
        model.means = self.constants
        self.optimizer = torch.optim.AdamW([self.constants], lr=lr, weight_decay=0.0)

    def descend(self, loss: Tensor) -> None:
        """Run the backward pass of a loss, and take a step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def freeze(self) -> None:
        """Leave the constants in the model as fixed ablation values."""
        self.model.means = self.constants.detach()

    def state(self) -> dict[str, Tensor]:
        """The constants and their optimizer's state, for a checkpoint."""
        return {"constants": self.constants.detach(), **optimizer_state(self.optimizer, self.constants)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            self.constants.copy_(state["constants"])
        kept = {name: value for name, value in state.items() if name != "constants"}
        restore_optimizer(self.optimizer, self.constants, kept)
