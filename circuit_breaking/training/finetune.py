"""The one loop that fine-tunes a Hugging Face model, whatever the method: `unlearning.METHODS` (layer 3).

A method trains on batches of toxic and ordinary text. Every few steps its checkpoint is measured on validation texts,
which are neither trained on nor reported; the best is kept, and training stops when none has been better for a while.
Best is by the objective that masks are trained for, ordinary loss - alpha · toxic loss, so that no method is chosen by
a goal of its own. A loss that is not finite ends the run; the best checkpoint before it stays.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

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
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.training.config import FinetuneSettings, check_finetune
from circuit_breaking.training.unlearning import (
    METHODS,
    Method,
    State,
    Weights,
    candidates,
    prediction_losses_of,
    start,
)


@dataclass
class Finetuned:
    """What fine-tuning found; the model itself holds the best checkpoint.

    `best` is that checkpoint's row: step, scale, score, and its losses on validation texts. Step 0 is the original.
    """

    method: str
    settings: FinetuneSettings
    best: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None


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
    """Fine-tune `model` in place by a method of `METHODS`, and leave the best checkpoint in it.

    Dropout stays off, so that every method, the mask included, works on the same function.

    Args:
        model: a Hugging Face causal language model.
        method: its name.
        toxic: texts to unlearn; `toxic.train` is trained on, `toxic.test` validates.
        ordinary: texts to keep, the same way.
        settings: see `FinetuneSettings`.
        progress: show a bar.
        checkpoints: where the state goes every so many steps, and on SIGTERM or SIGUSR1, which then end the run.
        resume_from: a state to go on from, of `checkpoints.load()`; `model` is the original all the same. What comes
            out is what a run that was never interrupted gives (bit for bit on CPU).

    Raises:
        UserError: there is no such method, or a setting makes no sense.
        Stopped: a signal ended the run; its state is saved.
    """
    settings = settings or FinetuneSettings()
    check_finetune(settings)
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; choose from {', '.join(METHODS)}.")
    run = _Run(model.eval(), METHODS[method], toxic, ordinary, settings)
    if resume_from is None:
        run.history.append(run.check(0))
    else:
        run.restore(resume_from)
    with (
        tqdm(
            total=settings.steps, initial=run.done, desc=method, unit="step", disable=None if progress else True
        ) as bar,
        stop_signals() if checkpoints is not None else nullcontext(()) as signals,
    ):
        while not run.ended:
            run.advance()
            bar.update()
            row = run.history[-1]
            bar.set_postfix_str(f"toxic {_short(row['toxic'])}, ordinary {_short(row['ordinary'])}")
            if checkpoints is not None:
                checkpoints.after(run.done, run.tensors, run.values(), signals, run.ended)
    run.finish()
    note = run.note
    if run.best["step"] == 0:
        note = "; ".join(filter(None, [note, "no checkpoint was better than the original, which is what is left"]))
    elif note:
        note += f"; the checkpoint of step {run.best['step']} is kept"
    return Finetuned(method, settings, run.best, run.history, note)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class _Run:
    def __init__(
        self, model: nn.Module, method: Method, toxic: TextTask, ordinary: TextTask, settings: FinetuneSettings
    ) -> None:
        self.method, self.settings = method, settings
        self.tasks = {"toxic": toxic, "ordinary": ordinary}
        self.state: State = start(method, model, settings, settings.seed)
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.kept: Weights = self._weights()
        self.before: Weights = self.kept if method.subtracts else {}  # only those need the original to the end
        self.best: dict[str, Any] = {}
        self.stale = 0
        self.done, self.ended = 0, False
        self.note: str | None = None
        self.history: list[dict[str, Any]] = []
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.lr, weight_decay=0.0)

    def _weights(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def _load(self, weights: Weights) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that what follows depends on, but for the original's: after the last step the best weights."""
        kept = {f"kept.{name}": weights for name, weights in self.kept.items()}
        if self.ended:
            return kept
        state = training_state(self.optimizer, self.trained) | state_of(**self.tasks)
        return kept | state | {f"more.{name}": tensor for name, tensor in self.state.more.items()}

    def values(self) -> dict[str, Any]:
        """All else that they depend on."""
        names = ("best", "stale", "ended", "note", "history")
        return {name: getattr(self, name) for name in names}

    def restore(self, saved: Saved) -> None:
        """Go on from what `tensors` and `values` gave."""
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

    def advance(self) -> None:
        """The next step and, where one is due, its checkpoint; afterwards `ended` says whether that was the last."""
        settings = self.settings
        self.done += 1
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

    def step(self, number: int) -> float | None:
        """One step; its loss, or None, with the weights as they were, where that or its gradient is not finite."""
        settings = self.settings
        loss = self.method.loss(self.state, *(task.draw(settings.batch_size) for task in self.tasks.values()))
        value = float(loss.detach())
        if not math.isfinite(value):
            return None
        self.optimizer.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(self.trained.values(), settings.clip)
        if not math.isfinite(float(length)):
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, number / max(1, settings.warmup))
        self.optimizer.step()
        return value

    def check(self, step: int) -> dict[str, Any]:
        """Measure the models that this checkpoint offers, keep the best of all; the row of the best here."""
        now, rows = self._weights(), []
        for scale, weights in candidates(self.method, self.before, now, self.settings.scales):
            if scale is not None:
                self._load(weights)
            row = {"step": step, "scale": scale, **self._validate()}
            rows.append(row)
            if row["score"] is not None and (not self.best or row["score"] < self.best["score"] - 1e-6):
                # a scale's weights are new tensors, and so is a copy of the checkpoint
                self.best, self.kept, self.stale = row, weights, -1
            if step == 0:
                break
        if self.method.subtracts:
            self._load(now)
        self.stale += 1
        finite = [row for row in rows if row["score"] is not None]
        return min(finite, key=lambda row: row["score"]) if finite else rows[0]

    @torch.no_grad()
    def _validate(self) -> dict[str, float | None]:
        losses = {}
        for name, cap in (("toxic", self.state.cap), ("ordinary", math.inf)):
            found = [
                prediction_losses_of(self.model, batch)[0].clamp(max=cap) for batch in self.tasks[name].test.batches(32)
            ]
            losses[name] = float(torch.cat(found).double().mean())
        # `clamp` lets a NaN through
        score = losses["ordinary"] - self.settings.alpha * losses["toxic"]
        finite = math.isfinite(score)
        return {**(losses if finite else dict.fromkeys(losses)), "score": score if finite else None}

    def finish(self) -> None:
        """Leave the best checkpoint in the model, frozen."""
        self._load(self.kept)
        self.model.requires_grad_(False)
        self.state.original = None


def describe(result: Finetuned) -> dict[str, Any]:
    """What a fine-tuned model's file says of how it came to be."""
    return {
        "method": result.method,
        "about": METHODS[result.method].about,
        "chosen": {"lr": result.settings.lr, "ratio": result.settings.ratio, **result.best},
        "note": result.note,
        "finetuning": asdict(result.settings),
    }
