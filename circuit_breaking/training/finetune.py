"""Remove a behaviour from a Hugging Face model by one of the methods of `baselines.METHODS`.

A method trains on batches of toxic and ordinary text. Every few steps the model is measured on validation texts, which
are neither trained on nor reported. The best weights are kept, and training stops when no validation has been better
for a while. The score is the objective of masks, ordinary loss - alpha · toxic loss, for every method alike. A loss
that is not finite ends the run; the best weights before it are kept. A method without a loss has a few candidates
instead, of which the best on validation texts is kept (`baselines.search`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import (
    Checkpoints,
    Saved,
    part_of,
    restore_parts,
    restore_training,
    state_of,
    training_state,
)
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.training.baselines import METHODS, baseline
from circuit_breaking.training.baselines.base import BaselineRun, Edit, Method, Weights, candidates, start
from circuit_breaking.training.baselines.search import Search
from circuit_breaking.training.baselines.validation import Validation, load_weights
from circuit_breaking.training.config import FinetuneSettings, check_finetune
from circuit_breaking.training.loop import run_steps


@dataclass
class Finetuned:
    """What fine-tuning found; the model itself holds the best weights.

    Attributes:
        method: name of the method.
        settings: the settings of the run.
        best: the row of the best validation: step, scale, score, and the validation losses. Step 0 is the original. Of
            a method with candidates, `step` is the number of one, and what tells it from others is there too.
        history: the row of every validation.
        texts: number of texts of both kinds that training read, each counted whenever it was read.
        note: None, or why the run ended early.
    """

    method: str
    settings: FinetuneSettings
    best: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None
    texts: int = 0


def finetune(
    model: nn.Module,
    method: str,
    toxic: TextTask,
    ordinary: TextTask,
    settings: FinetuneSettings | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> Finetuned:
    """Change `model` in place by a method of `METHODS`, and leave the best weights in it.

    Dropout stays off, so that all methods, masks included, change the same function.

    Args:
        model: a Hugging Face causal language model.
        method: name of the method.
        toxic: texts to unlearn; `toxic.train` for training, `toxic.test` for validation.
        ordinary: texts to keep, likewise.
        settings: see `FinetuneSettings`.
        progress: show a progress bar.
        checkpoints: where the state is saved from time to time, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to continue from, from `checkpoints.load()`; `model` is still the original. The result is
            that of a run that was never interrupted (bit for bit on CPU).

    Raises:
        UserError: there is no such method, or a setting makes no sense.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or FinetuneSettings()
    check_finetune(settings)
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; choose from {', '.join(METHODS)}.")
    chosen = baseline(method)
    kind = Search if isinstance(chosen, Edit) else _Run
    run: BaselineRun = kind(model.eval(), chosen, toxic, ordinary, settings)
    if resume_from is None:
        run.begin()
    else:
        run.restore(resume_from)
    run_steps(
        run.advance,
        run.done if run.ended else run.steps,
        label=method,
        unit=run.unit,
        done=run.done,
        progress=progress,
        describe=run.describe,
        checkpoints=checkpoints,
        state=run.state_tensors,
        values=run.values,
        is_over=lambda: run.ended,
    )
    run.finish()
    note = run.note
    if run.best["step"] == 0:
        note = "; ".join(filter(None, [note, "no checkpoint was better than the original, which is what is left"]))
    elif note:
        note += f"; the checkpoint of step {run.best['step']} is kept"
    return Finetuned(method, settings, run.best, run.history, note, run.texts)


class _Run:
    """State of a run by a `Method`, a `BaselineRun`."""

    unit = "step"

    def __init__(
        self, model: nn.Module, method: Method, toxic: TextTask, ordinary: TextTask, settings: FinetuneSettings
    ) -> None:
        self.method, self.settings, self.steps = method, settings, settings.steps
        self.tasks = {"toxic": toxic, "ordinary": ordinary}
        self.state, self.adapters = start(method, model, settings, settings.seed)
        self.model, self.validate = model, Validation(toxic, ordinary, self.state.cap, settings.alpha)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = own if self.adapters is None else self.adapters.factors
        self.kept: Weights = self._weights()
        self.before: Weights = self.kept if method.subtracts else {}  # which needs the original to the end
        self.best: dict[str, Any] = {}
        self.stale = 0  # validations since the best one
        self.done, self.ended = 0, False
        self.note: str | None = None
        self.history: list[dict[str, Any]] = []
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.lr, weight_decay=0.0)

    def begin(self) -> None:
        """Measure the original model, which adapters that start at random are not."""
        if self.adapters is None:
            self.history.append(self.check(0))
            return
        self.best = {"step": 0, "scale": None, **self.validate(self.model)}
        self.kept = {name: torch.zeros_like(factor) for name, factor in self.trained.items()}
        self.history.append(self.best)

    @property
    def texts(self) -> int:
        """Texts of both kinds that the steps so far read."""
        return 2 * self.settings.batch_size * self.done

    def _weights(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the model with its adapters, if it has any."""
        return function(*arguments) if self.adapters is None else self.adapters.call(function, *arguments)

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors that the next steps depend on, except for the original; after the last step, the best weights."""
        kept = {f"kept.{name}": weights for name, weights in self.kept.items()}
        if self.ended:
            return kept
        state = training_state(self.optimizer, self.trained) | state_of(**self.tasks)
        return kept | state | {f"more.{name}": tensor for name, tensor in self.state.more.items()}

    def values(self) -> dict[str, Any]:
        """Everything else that they depend on."""
        names = ("best", "stale", "ended", "note", "history")
        return {name: getattr(self, name) for name in names}

    def restore(self, saved: Saved) -> None:
        """Continue from what `state_tensors` and `values` returned."""
        self.done = saved.step
        for name in self.values():
            setattr(self, name, saved.values[name])
        kept = part_of(saved.tensors, "kept")
        self.kept = {name: kept[name].to(parameter.device) for name, parameter in self.trained.items()}
        if self.ended:
            return
        restore_training(self.optimizer, self.trained, saved.tensors)
        restore_parts(saved.tensors, self.tasks)
        more = part_of(saved.tensors, "more")
        self.state.more = {name: tensor.to(self.model.device) for name, tensor in more.items()}

    def advance(self, number: int) -> None:
        """Run step `number`, from 0, and its validation if one is due; sets `ended` if that was the last step."""
        settings = self.settings
        self.done = number + 1
        loss = self.step(self.done)
        self.ended = self.done == settings.steps
        if loss is None:
            self.ended, self.note = True, f"the loss was not finite at step {self.done}, where training ended"
            return
        if self.done % settings.check_every and not self.ended:
            return
        self.history.append({**self.check(self.done), "train_loss": loss})
        if self.history[-1]["score"] is None:
            self.note = f"the validation loss was not finite at step {self.done}, where training ended"
        if self.note or self.stale >= settings.patience:
            self.ended = True

    def describe(self) -> str:
        """The last validation, for the progress bar."""
        row = self.history[-1]
        toxic, ordinary = ("–" if row[name] is None else f"{row[name]:.3f}" for name in ("toxic", "ordinary"))
        return f"toxic {toxic}, ordinary {ordinary}"

    def step(self, number: int) -> float | None:
        """A step of the optimizer. Returns the loss, or None, without a step, if it or its gradient is not finite."""
        settings = self.settings
        self.state.progress = number / settings.steps
        batches = [task.draw(settings.batch_size) for task in self.tasks.values()]
        loss = self._call(self.method.loss, self.state, *batches)
        value = float(loss.detach())
        if not math.isfinite(value):
            return None
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), settings.clip)
        if not math.isfinite(float(norm)):
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, number / max(1, settings.warmup))
        self.optimizer.step()
        return value

    def check(self, step: int) -> dict[str, Any]:
        """Validate the candidates of this step, keep the best weights so far, and return the best candidate's row."""
        now, rows = self._weights(), []
        for scale, weights in candidates(self.method, self.before, now, self.settings.scales):
            if scale is not None:
                load_weights(self.trained, weights)
            row = {"step": step, "scale": scale, **self._call(self.validate, self.model)}
            rows.append(row)
            if row["score"] is not None and (not self.best or row["score"] < self.best["score"] - 1e-6):
                # `weights` are new tensors: a copy of the model's, or scaled ones
                self.best, self.kept, self.stale = row, weights, -1
            if step == 0:
                break
        if self.method.subtracts:
            load_weights(self.trained, now)
        self.stale += 1
        finite = [row for row in rows if row["score"] is not None]
        return min(finite, key=lambda row: row["score"]) if finite else rows[0]

    def finish(self) -> None:
        """Leave the best weights in the model, frozen."""
        load_weights(self.trained, self.kept)
        if self.adapters is not None:
            self.adapters.merge_()
        self.model.requires_grad_(False)
        self.state.original = None


def describe(result: Finetuned) -> dict[str, Any]:
    """The record of a fine-tuned model: what was chosen, and the settings."""
    method = baseline(result.method)
    trained = {} if isinstance(method, Edit) else {"lr": result.settings.lr, "ratio": result.settings.ratio}
    return {
        "method": result.method,
        "about": method.about,
        "chosen": {**trained, **result.best},
        "note": result.note,
        "texts": result.texts,
        "finetuning": asdict(result.settings),
    }
