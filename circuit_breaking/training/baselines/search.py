"""Choose among the candidates of an `Edit`: each is measured on validation texts, and the best one is left."""

from typing import Any

import torch
from torch import Tensor, nn

from circuit_breaking.runs.checkpoints import Saved, part_of
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.training.baselines.base import Edit, State, Weights
from circuit_breaking.training.baselines.validation import Validation, load_weights
from circuit_breaking.training.config import FinetuneSettings


class Search:
    """State of a search, a `BaselineRun`: step `n` measures candidate `n`, from 1; 0 is the original model.

    Attributes:
        texts: texts of both kinds that the candidates were made from.
    """

    unit = "candidate"

    def __init__(
        self, model: nn.Module, edit: Edit, toxic: TextTask, ordinary: TextTask, settings: FinetuneSettings
    ) -> None:
        edit.prepare(model.requires_grad_(False))
        self.model, self.edit, self.settings = model, edit, settings
        self.parameters = dict(model.named_parameters())
        self.candidates = edit.candidates(model, settings)
        self.steps = len(self.candidates)
        self.tasks = toxic, ordinary
        self.validate = Validation(toxic, ordinary, State(model, settings).cap, settings.alpha)
        self.measured: Weights = {}
        self.texts = 2 * min(len(toxic.train), len(ordinary.train))
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.done, self.ended = 0, not self.candidates
        self.note: str | None = None

    def begin(self) -> None:
        """Measure the original model, and what the candidates are made of."""
        self.measured = self.edit.measure(self.model, *self.tasks)
        self.best = {"step": 0, **self.validate(self.model)}
        self.history.append(self.best)

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors that the next candidates depend on."""
        return {f"measured.{name}": tensor for name, tensor in self.measured.items()}

    def values(self) -> dict[str, Any]:
        """Everything else that they depend on."""
        return {name: getattr(self, name) for name in ("best", "history", "ended")}

    def restore(self, saved: Saved) -> None:
        """Continue from what `state_tensors` and `values` returned."""
        self.done = saved.step
        self.best, self.history, self.ended = (saved.values[name] for name in ("best", "history", "ended"))
        measured = part_of(saved.tensors, "measured")
        self.measured = {name: tensor.to(self.model.device) for name, tensor in measured.items()}

    def advance(self, number: int) -> None:
        """Measure a candidate, from 0, and leave the model as it was."""
        self.done = number + 1
        weights = self.edit.weights(self.model, self.measured, self.candidates[number])
        before = {name: self.parameters[name].detach().clone() for name in weights}
        load_weights(self.parameters, weights)
        row = {"step": self.done, **self.candidates[number], **self.validate(self.model)}
        load_weights(self.parameters, before)
        self.history.append(row)
        if row["score"] is not None and row["score"] < self.best["score"] - 1e-6:
            self.best = row
        self.ended = self.done == self.steps

    def describe(self) -> str:
        """The best candidate so far, for the progress bar."""
        return f"best: toxic {self.best['toxic']:.3f}, ordinary {self.best['ordinary']:.3f}"

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the best candidate in the model."""
        if self.best["step"]:
            candidate = self.candidates[self.best["step"] - 1]
            load_weights(self.parameters, self.edit.weights(self.model, self.measured, candidate))
