"""Fine-tuning of all weights on the losses themselves.

joint             ordinary loss - ratio · toxic loss, the paper's fine-tuning (Li, Davies, Nadeau 2023, eq. 4)
ascent            gradient ascent on toxic text alone
task_arithmetic   fine-tune towards toxicity, then subtract the change times a scale (Ilharco et al. 2023)
"""

from torch import Tensor

from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines.base import SLOW, Method, State


def joint(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """Ordinary loss - ratio · toxic loss (the paper's eq. 4)."""
    return state.ordinary_loss(ordinary) - state.settings.ratio * state.toxic_loss(toxic)


def ascent(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """- toxic loss."""
    return -state.toxic_loss(toxic)


def towards_toxicity(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """Toxic loss, whose change of weights is subtracted in the end."""
    return trainable_prediction_losses(state.model, toxic)[0].mean()


JOINT = Method("ordinary loss - ratio · toxic loss (the paper's eq. 4)", joint)
# methods that only raise or lower one loss are trained more slowly
ASCENT = Method("gradient ascent on toxic text alone", ascent, lrs=SLOW)
TASK_ARITHMETIC = Method("minus the change that learning toxic text makes", towards_toxicity, subtracts=True, lrs=SLOW)
