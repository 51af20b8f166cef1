"""A task: a behaviour to break or to keep, as a loss over its own data."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import compute_means
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.models.causal_model import CausalModel
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import prediction_divergences, prediction_losses

EVALUATION_BATCH = 16


class Batch(Protocol):
    """Examples of a task. `TokenBatch` is one."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, rows: slice) -> "Batch":
        """The examples of a slice."""
        ...


class Task(ABC):
    """A behaviour of a model, with a loss that is low when the model shows it.

    Losses are means over predictions, in nats. Models are an `EdgeMaskedTransformer` or any other `CausalModel`.
    """

    name: str

    @abstractmethod
    def draw(self, size: int) -> Batch:
        """The next `size` training examples; `loss` can be measured on them more than once."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The state of `draw`, for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Continue from what `state` returned."""

    @abstractmethod
    def loss(self, model: CausalModel, batch: Batch, mask: Tensor | None = None, cap: float | None = None) -> Tensor:
        """Loss on a batch from `draw`, differentiable in the mask.

        Args:
            model: the model.
            batch: training examples.
            mask: weights [E] to use instead of the model's own.
            cap: the loss of a single prediction is clamped to this, so that none can dominate the mean.
        """

    def divergence(self, model: EdgeMaskedTransformer, batch: Batch, mask: Tensor) -> Tensor:
        """Mean of KL(original || ablated) over the predictions of a batch, in nats, differentiable in the mask [E].

        Needed if this is the task to keep and `keep_loss` is `"kl"`.
        """
        raise UserError(
            f"the task {self.name} does not say how far predictions are from those of the original model. "
            "Define `divergence`, or set keep_loss to loss."
        )

    def predictions(self, batch: Batch) -> int:
        """Number of predictions over which the `loss` of a batch is a mean: the weight of a micro-batch.

        Needed if batches are split (`micro_batch`, or several processes).
        """
        raise UserError(
            f"the task {self.name} does not say how many predictions its loss is the mean of, so its batches cannot "
            "be taken in parts. Define `predictions`, or set micro_batch to 0 and train in one process."
        )

    def get_train_loss(
        self, model: CausalModel, batch_size: int, mask: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Loss on the next `batch_size` training examples; see `loss`."""
        return self.loss(model, self.draw(batch_size), mask, cap)

    @abstractmethod
    def get_test_loss(self, model: CausalModel, num_data: int | None = None) -> float:
        """Loss on the first `num_data` held-out examples (all by default)."""

    @abstractmethod
    def get_test_accuracy(self, model: CausalModel, num_data: int | None = None) -> float:
        """Share of held-out predictions that are correct."""

    @abstractmethod
    def compute_means(self, model: EdgeMaskedTransformer, num_data: int | None = None) -> Tensor:
        """Mean output of every node over the training examples, from position `model.ablate_from` on: [P, D]."""


class TextTask(Task):
    """Next-token prediction on texts, which are drawn in a seeded random order.

    Args:
        name: what the task is called in messages.
        train: texts to draw from.
        test: held-out texts.
        seed: of the order.

    Attributes:
        evaluation_batch: number of held-out texts in a forward pass.
    """

    evaluation_batch = EVALUATION_BATCH

    def __init__(self, name: str, train: TokenBatch, test: TokenBatch, seed: int = 0) -> None:
        self.name, self.train, self.test = name, train, test
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)

    def draw(self, size: int) -> TokenBatch:
        """The next training texts. Every text is drawn once, then all of them again in another order."""
        while len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(len(self.train), generator=self._generator)])
        rows, self._order = self._order[:size], self._order[size:]
        return self.train[rows]

    def state(self) -> dict[str, Tensor]:
        """The random state, and the texts that are left of the current order."""
        return {"generator": self._generator.get_state(), "order": self._order}

    def restore(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Continue from what `state` returned."""
        self._generator.set_state(state["generator"])
        self._order = state["order"].clone()

    def loss(
        self, model: CausalModel, batch: TokenBatch, mask: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Mean loss over the predictions of a batch; see `Task`."""
        losses = prediction_losses(model, batch, mask)
        return (losses if cap is None else losses.clamp(max=cap)).mean()

    def divergence(self, model: EdgeMaskedTransformer, batch: TokenBatch, mask: Tensor) -> Tensor:
        """Mean KL(original || ablated) of the next-token predictions of a batch; see `Task`."""
        return prediction_divergences(model, batch, mask).mean()

    def predictions(self, batch: TokenBatch) -> int:
        """Number of tokens in a batch whose prediction counts. A subclass with another `loss` defines its own."""
        return int(batch.predicted.sum())

    @torch.no_grad()
    def get_test_loss(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean loss over the predictions of the first `num_data` held-out texts."""
        losses = [prediction_losses(model, batch) for batch in self._test_batches(num_data)]
        return float(torch.cat(losses).double().mean())

    @torch.no_grad()
    def get_test_accuracy(self, model: CausalModel, num_data: int | None = None) -> float:
        """Share of held-out tokens to which the model gives the highest probability."""
        hits, total = 0, 0
        for batch in self._test_batches(num_data):
            batch = batch.to(model.device)
            where = batch.predicted
            if model.plain_head:
                hidden = model.hidden(batch.tokens)[where]
                logits = torch.nn.functional.linear(hidden, model.unembedding, model.unembedding_bias)
            else:
                logits = model(batch.tokens)[where]
            hits += int((logits.argmax(-1) == batch.tokens.roll(-1, 1)[where]).sum())
            total += len(logits)
        return hits / total

    def compute_means(self, model: EdgeMaskedTransformer, num_data: int | None = None) -> Tensor:
        """Mean output of every node over the first `num_data` training texts, as `compute_means` counts: [P, D]."""
        return compute_means(model, self.train[: num_data or len(self.train)])

    def _test_batches(self, num_data: int | None) -> Iterator[TokenBatch]:
        if num_data is not None and num_data < 1:
            raise UserError(f"{num_data} held-out texts are too few to measure anything.")
        return self.test[: num_data or len(self.test)].batches(self.evaluation_batch)
