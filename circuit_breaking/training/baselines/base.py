"""What a baseline is: a loss over toxic and ordinary batches (`Method`), or a few edits to choose from (`Edit`).

Shapes: n texts, M predictions, D width.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.checkpoints import Saved
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines.lora import LowRank
from circuit_breaking.training.config import LossSettings

Weights = dict[str, Tensor]
Candidate = dict[str, Any]  # what tells one edit of a model from another, JSON-able
SLOW, FAST, ADAPTERS = (1e-5, 1e-4), (1e-4, 1e-3), (1e-3, 3e-3)  # learning rates to try


@dataclass
class State:
    """What a method needs while it trains.

    Attributes:
        model: the model that is trained. Inside a loss its weights hold the adapters, if the method has any.
        settings: settings of the losses.
        seed: of random directions.
        original: the original model, for methods that compare with it.
        progress: the present step, from 1, as a share of all steps.
        more: tensors that a method keeps between steps, by name.
    """

    model: nn.Module
    settings: LossSettings
    seed: int = 0
    original: nn.Module | None = None
    progress: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def cap(self) -> float:
        """Highest loss of a single toxic prediction, nats."""
        return self.settings.cap or math.log(self.model.config.vocab_size)

    def toxic_loss(self, batch: TokenBatch) -> Tensor:
        """Mean loss, clamped per prediction, so that predictions that are already unlikely have no gradient."""
        return trainable_prediction_losses(self.model, batch)[0].clamp(max=self.cap).mean()

    def ordinary_loss(self, batch: TokenBatch) -> Tensor:
        """Mean loss."""
        return trainable_prediction_losses(self.model, batch)[0].mean()


def every_parameter(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    """Train every parameter."""
    return lambda name: True


@dataclass(frozen=True)
class Method:
    """A way to change weights by gradient descent: its loss, and what it trains.

    Attributes:
        about: what it does, in a few words.
        loss: the loss of a toxic and an ordinary batch.
        trains: which parameters it trains, by name.
        compares: it needs the original model too.
        subtracts: the result is the original minus a multiple of the change.
        adapts: the weights that get low-rank adapters (LoRA), by name; the parameters themselves are then frozen. The
            adapters are merged into the weights at the end.
        spread: standard deviation of the adapters' initial output factors; see `LowRank`.
        lrs: learning rates that scripts try.
    """

    about: str
    loss: Callable[[State, TokenBatch, TokenBatch], Tensor]
    trains: Callable[[nn.Module, LossSettings], Callable[[str], bool]] = every_parameter
    compares: bool = False
    subtracts: bool = False
    adapts: Callable[[nn.Module, LossSettings], list[str]] | None = None
    spread: float = 0.0
    lrs: tuple[float, ...] = FAST


@dataclass(frozen=True)
class Edit:
    """A way to change weights without a loss: a few candidates, of which validation chooses one.

    Attributes:
        about: what it does, in a few words.
        prepare: changes the form of a model in place, such as giving it biases of zero, but not its function; refuses
            a model for which the edit is none of weights alone.
        candidates: the edits to choose from.
        measure: what the candidates are made of, from the training texts, by name; kept in checkpoints.
        weights: the weights that a candidate changes, by name, as new tensors.
    """

    about: str
    prepare: Callable[[nn.Module], None]
    candidates: Callable[[nn.Module, LossSettings], list[Candidate]]
    measure: Callable[[nn.Module, TextTask, TextTask], Weights]
    weights: Callable[[nn.Module, Weights, Candidate], Weights]


class BaselineRun(Protocol):
    """What `finetune` needs of a run: it trains by a `Method`, or searches the candidates of an `Edit`.

    Attributes:
        unit: what the progress bar calls a step.
        steps, done: number of steps of the whole run, and how many of them are done.
        ended: whether the last step is done; a run may end early.
        note: why the run ended early, or None.
        best: the row of the best validation so far; its `step` is 0 for the original model.
        history: the row of every validation.
        texts: texts of both kinds that were read, each counted whenever it was read.
    """

    unit: str
    steps: int
    done: int
    ended: bool
    note: str | None
    best: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def texts(self) -> int: ...

    def begin(self) -> None:
        """Measure the original model."""

    def advance(self, number: int) -> None:
        """Run step `number`, from 0."""

    def describe(self) -> str:
        """Text at the end of the progress bar."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors that the next steps depend on."""

    def values(self) -> dict[str, Any]:
        """Everything else that they depend on, JSON-able."""

    def restore(self, saved: Saved) -> None:
        """Continue from what `state_tensors` and `values` returned."""

    def finish(self) -> None:
        """Leave the best weights in the model."""


def start(method: Method, model: nn.Module, settings: LossSettings, seed: int = 0) -> tuple[State, LowRank | None]:
    """Prepare `model` for training by a method: the parameters that it trains require gradients, no others do.

    Returns:
        The state, and the adapters, if the method has any.
    """
    chosen = method.trains(model, settings) if method.adapts is None else lambda name: False
    original = None
    if method.compares:
        # weights that adapters leave as they are need no copy
        shared = {} if method.adapts is None else {id(parameter): parameter for parameter in model.parameters()}
        original = copy.deepcopy(model, shared).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    state = State(model, settings, seed, original)
    if method.adapts is None:
        return state, None
    return state, LowRank(model, method.adapts(model, settings), settings.lora_rank, seed, method.spread)


def candidates(method: Method, before: Weights, now: Weights, scales: tuple[float, ...]) -> Iterator[tuple]:
    """(scale, weights) of the models to validate: the trained one, or the original minus multiples of the change."""
    if not method.subtracts:
        yield None, now
        return
    for scale in scales:
        yield scale, {name: before[name] - scale * (now[name] - before[name]) for name in now}
