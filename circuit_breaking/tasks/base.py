"""What a task is: a behaviour to break or to keep, as losses over its own data (layer 2)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import compute_means
from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import cross_entropy_of_hidden

EVALUATION_BATCH = 16


class Task(ABC):
    """A behaviour of a model, with a loss that is low when the model shows it.

    `model` is an `EdgeMaskedTransformer` everywhere; losses are means over predictions, in nats.
    """

    name: str

    @abstractmethod
    def draw(self, size: int) -> Any:
        """The next `size` training examples, on which `loss` can be measured more than once."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Where `draw` stands, as tensors, for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor], device: Any = None) -> None:
        """Draw on from what `state` gave."""

    @abstractmethod
    def loss(self, model: Any, batch: Any, mask: Tensor | None = None, cap: float | None = None) -> Tensor:
        """Loss on a batch that `draw` gave, differentiable in the mask.

        Args:
            model: the model.
            batch: training examples.
            mask: weights [E] to use instead of the model's own.
            cap: highest loss that one prediction counts with, so that none can dominate the mean.
        """

    def predictions(self, batch: Any) -> int:
        """How many predictions the `loss` of a batch is the mean of: by this the losses of its parts are weighed.

        Needed where batches are taken in parts (`micro_batch`, or several processes), together with batches that have
        a `len` and give the texts of a slice.
        """
        raise UserError(
            f"the task {self.name} does not say how many predictions its loss is the mean of, so its batches cannot "
            "be taken in parts. Define `predictions`, or set micro_batch to 0 and train in one process."
        )

    def get_train_loss(
        self, model: Any, batch_size: int, mask: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Loss on the next `batch_size` training examples; see `loss`."""
        return self.loss(model, self.draw(batch_size), mask, cap)

    @abstractmethod
    def get_test_loss(self, model: Any, num_data: int | None = None) -> float:
        """Loss on the first `num_data` held-out examples (all by default)."""

    @abstractmethod
    def get_test_accuracy(self, model: Any, num_data: int | None = None) -> float:
        """Share of held-out predictions that are right."""

    @abstractmethod
    def compute_means(self, model: Any, num_data: int | None = None) -> Tensor:
        """Mean output of every node over the training examples: [P, D]."""


class TextTask(Task):
    """Next-token prediction on texts: training and held-out `TokenBatch`es, drawn in a seeded order.

    Attributes:
        evaluation_batch: held-out texts that are measured at a time.
    """

    evaluation_batch = EVALUATION_BATCH

    def __init__(self, name: str, train: TokenBatch, test: TokenBatch, seed: int = 0) -> None:
        self.name, self.train, self.test = name, train, test
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)

    def draw(self, size: int) -> TokenBatch:
        """The next training texts: every text once in a random order, then again in another."""
        while len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(len(self.train), generator=self._generator)])
        rows, self._order = self._order[:size], self._order[size:]
        return self.train[rows]

    def state(self) -> dict[str, Tensor]:
        """The random state and the rest of the order in force."""
        return {"generator": self._generator.get_state(), "order": self._order}

    def restore(self, state: dict[str, Tensor], device: Any = None) -> None:
        """Draw on from what `state` gave."""
        self._generator.set_state(state["generator"])
        self._order = state["order"].clone()

    def loss(self, model: Any, batch: TokenBatch, mask: Tensor | None = None, cap: float | None = None) -> Tensor:
        """Mean loss over the predictions of a batch; see `Task`."""
        losses = prediction_losses(model, batch, mask)
        return (losses if cap is None else losses.clamp(max=cap)).mean()

    def predictions(self, batch: TokenBatch) -> int:
        """Number of tokens in a batch whose prediction counts. A `loss` that is a mean over others needs its own."""
        return int(batch.predicted.sum())

    @torch.no_grad()
    def get_test_loss(self, model: Any, num_data: int | None = None) -> float:
        """Mean loss over the predictions of the first `num_data` held-out texts."""
        losses = [prediction_losses(model, batch) for batch in self._test_batches(num_data)]
        return float(torch.cat(losses).double().mean())

    @torch.no_grad()
    def get_test_accuracy(self, model: Any, num_data: int | None = None) -> float:
        """Share of held-out tokens that are the model's first choice."""
        hits, total = 0, 0
        for batch in self._test_batches(num_data):
            batch = batch.to(model.device)
            where = batch.predicted
            logits = torch.nn.functional.linear(
                model.hidden(batch.tokens)[where], model.unembedding, model.unembedding_bias
            )
            hits += int((logits.argmax(-1) == batch.tokens.roll(-1, 1)[where]).sum())
            total += len(logits)
        return hits / total

    def compute_means(self, model: Any, num_data: int | None = None) -> Tensor:
        """Mean output of every node over the first `num_data` training texts, padding left out: [P, D]."""
        return compute_means(model, self.train[: num_data or len(self.train)])

    def _test_batches(self, num_data: int | None) -> Iterator[TokenBatch]:
        if num_data is not None and num_data < 1:
            raise UserError(f"{num_data} held-out texts are too few to measure anything.")
        return self.test[: num_data or len(self.test)].batches(self.evaluation_batch)


def prediction_losses(model: Any, batch: TokenBatch, mask: Tensor | None = None) -> Tensor:
    """Loss of every prediction in a batch, text by text, padding left out: [predictions], nats."""
    batch = batch.to(model.device)
    where = batch.predicted
    hidden = model.hidden(batch.tokens, mask=mask)[where]
    return cross_entropy_of_hidden(hidden, model.unembedding, model.unembedding_bias, batch.tokens.roll(-1, 1)[where])
