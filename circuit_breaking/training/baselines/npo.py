"""Negative preference optimisation with a term that retains (Zhang, Lin, Bai, Mei 2024, arXiv:2404.05868, eq. 3).

    (2/β) E[log(1 + (π/π_original)^β)] over toxic texts + retain · ordinary loss

π is the probability that the model gives to a text. `npo` trains all weights, `lora_npo` low-rank adapters of all
linear layers, which are merged into the weights at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines.base import ADAPTERS, Method, State
from circuit_breaking.training.baselines.lora import linear_weights


def npo(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """(2/β) E[log(1 + (π/π_original)^β)] over toxic texts, plus the ordinary loss."""
    losses, text = trainable_prediction_losses(state.model, toxic)
    with torch.no_grad():
        before, _ = trainable_prediction_losses(state.original, toxic)
    ratio = torch.zeros(len(toxic), device=losses.device).index_add(0, text, before - losses)  # log(π/π_original)
    beta = state.settings.npo_beta
    return 2 / beta * F.softplus(beta * ratio).mean() + state.settings.npo_retain * state.ordinary_loss(ordinary)


NPO = Method("negative preference optimisation, with the ordinary loss", npo, compares=True)
LORA_NPO = Method(
    "the same, by low-rank adapters of all linear layers", npo, compares=True,
    adapts=lambda model, settings: linear_weights(model), lrs=ADAPTERS,
)  # fmt: skip
