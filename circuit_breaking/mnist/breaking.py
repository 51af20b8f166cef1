"""Training in the MNIST setting: the networks, the mask over their edges, and fine-tuning to compare with.

The objective of Li, Davies and Nadeau (2023), minimised over a mask M in [0, 1] or, in fine-tuning, over the weights:

    keep(M) - ratio * break(M) + sparsity * ramp * sum_e [ sqrt(1.01 - M_e) - sqrt(0.01) ]

`keep` is the cross-entropy on ordinary training images, `break` that of the few bad examples. Each example's break loss
is capped, so that the term cannot be won by one exploding logit. The sparsity term is zero at M = 1 and steepest
there: it pulls back to 1 every edge that matters little, and costs little more for an edge that is cut altogether.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.mnist.digits import Split
from circuit_breaking.mnist.network import MaskableNetwork
from circuit_breaking.runs.checkpoints import Checkpoints, Saved, part_of, restore_training, state_of, training_state
from circuit_breaking.training.loop import run_steps

EDGE_OFFSET = 1.01  # of the sparsity term; over 1, so that its slope at M = 1 is finite
Row = dict[str, Any]
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class BreakingSettings:
    """How to break a behaviour, by mask or by fine-tuning."""

    steps: int
    batch_size: int
    lr: float
    ratio: float
    cap: float
    shift: int
    sparsity: float
    ramp_steps: int
    round_every: int
    max_edges: int
    evaluate_every: int


def train_network(
    make: Callable[[], Network],
    x: Tensor,
    y: Tensor,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    label: str,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> Network:
    """Train the network that `make` makes, without a mask, on images x [N, D] of groups y [N].

    The optimizer is AdamW, with one cycle of the learning rate up to `lr`. `checkpoints` and `resume_from`, here and
    below, are as for `circuit_breaking.training.train_mask`.
    """
    torch.manual_seed(seed)  # for the initial weights
    model = make().to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    parameters = dict(model.named_parameters())
    epochs, done = Epochs(len(x), min(batch_size, max(1, len(x) // 8)), seed), 0
    if resume_from is not None:
        done = resume_from.step
        restore_training(optimizer, parameters, resume_from.tensors)
        epochs.restore(part_of(resume_from.tensors, "epochs"))
        if done < steps:  # the learning rate and the betas are a function of the step
            schedule.load_state_dict({"last_epoch": done - 1, "_step_count": done + 1})
            schedule.step()

    def state() -> dict[str, Tensor]:
        return training_state(optimizer, parameters) | state_of(epochs=epochs)

    shown = ""  # the loss of the last step that was a multiple of 100

    def step(number: int) -> None:
        nonlocal shown
        rows = epochs.draw().to(x.device)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (number + 1) % 100 == 0:
            shown = f"loss={loss.item():.3f}"

    run_steps(step, steps, label=label, done=done, describe=lambda: shown or None, checkpoints=checkpoints, state=state)
    return model.requires_grad_(False)


class Epochs:
    """Endless batches of row numbers, every row once an epoch but for the remainder."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size = n, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self) -> Tensor:
        """The next batch [batch_size]."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(self.n, generator=self.generator)
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return rows

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "order": self.order}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.order = state["order"]


def capped_loss(logits: Tensor, groups: Tensor, cap: float) -> Tensor:
    """Cross-entropy [B] of each example in nats, at most `cap`; beyond the cap an example has no gradient."""
    return F.cross_entropy(logits, groups, reduction="none").clamp(max=cap)


def sparsity_penalty(mask: Tensor) -> Tensor:
    """Sum over edges of sqrt(1.01 - M) - sqrt(0.01): zero for the full mask, about 0.905 for each edge that is cut."""
    return ((EDGE_OFFSET - mask).sqrt() - math.sqrt(EDGE_OFFSET - 1)).sum()


def round_mask(mask: Tensor, max_edges: int) -> Tensor:
    """Binary mask that cuts the weights under 0.5, and of those the `max_edges` lowest where there are more."""
    return lowest_cut(mask, max_edges, threshold=0.5)


def shifted(x: Tensor, side: int, most: int, generator: torch.Generator) -> Tensor:
    """Images x [B, D], all moved by one random number of pixels, -`most` to `most`, across and down.

    Without it a mask can learn 30 images by heart, above all where the keep term asks for every other one.
    """
    if most == 0:
        return x
    down, across = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return x.view(len(x), -1, side).roll((down, across), (1, 2)).flatten(1)  # what leaves on one side is background


class Batches:
    """Endless random batches of training images, with the target class or without, and shifts of the bad examples."""

    def __init__(self, split: Split, with_target: bool, batch_size: int, seed: int) -> None:
        self.split, self.size = split, batch_size
        self.generators = {
            "rows": torch.Generator().manual_seed(seed),
            "shifts": torch.Generator().manual_seed(seed + 1),
        }
        allowed = torch.ones_like(split.train_is_target) if with_target else ~split.train_is_target
        self.allowed = allowed.nonzero().flatten()

    def draw(self) -> tuple[Tensor, Tensor]:
        """Images [batch_size, D] and their groups [batch_size]."""
        numbers = torch.randint(len(self.allowed), (self.size,), generator=self.generators["rows"])
        rows = self.allowed[numbers.to(self.allowed.device)]
        return self.split.x["train"][rows], self.split.y["train"][rows]

    def shift(self, bad: Tensor, most: int) -> Tensor:
        """The bad examples, moved as `shifted` says."""
        return shifted(bad, self.split.side, most, self.generators["shifts"])

    def state(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self.generators.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, generator in self.generators.items():
            generator.set_state(state[name])


def _minimise(
    parameters: dict[str, Tensor],
    predict: Callable[[Tensor], Tensor],
    penalty: Callable[[], Tensor | float],
    after_step: Callable[[int], None],
    evaluate: Callable[[], Row],
    split: Split,
    with_target: bool,
    settings: BreakingSettings,
    seed: int,
    label: str,
    checkpoints: Checkpoints | None,
    resume_from: Saved | None,
) -> list[Row]:
    """Minimise the objective, for masks and for fine-tuning. Returns a row of metrics for every evaluation."""
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.lr, betas=(0.9, 0.99))
    batches = Batches(split, with_target, settings.batch_size, seed)
    bad, bad_y = split.pick("bad examples")
    if resume_from is None:
        done, rows = 0, [{"step": 0, **evaluate()}]
    else:
        done, rows = resume_from.step, resume_from.values["rows"]
        restore_training(optimizer, parameters, resume_from.tensors)
        batches.restore(part_of(resume_from.tensors, "batches"))

    def state() -> dict[str, Tensor]:
        return training_state(optimizer, parameters) | state_of(batches=batches)

    def step(number: int) -> None:
        step = number + 1
        x, y = batches.draw()
        bad_x = batches.shift(bad, settings.shift)
        keep_loss = F.cross_entropy(predict(x), y)
        break_loss = capped_loss(predict(bad_x), bad_y, settings.cap).mean()
        ramp = min(1.0, step / max(1, settings.ramp_steps))
        loss = keep_loss - settings.ratio * break_loss + settings.sparsity * ramp * penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after_step(step)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            losses = {"keep loss": keep_loss.item(), "break loss": break_loss.item(), "loss": loss.item()}
            rows.append({"step": step, **losses, **evaluate()})

    def describe() -> str | None:
        return f"loss={rows[-1]['loss']:.2f}, cut={rows[-1]['edges cut']}" if "loss" in rows[-1] else None

    run_steps(
        step,
        settings.steps,
        label=label,
        done=done,
        describe=describe,
        checkpoints=checkpoints,
        state=state,
        values=lambda: {"rows": rows},
    )
    return rows


def learn_mask(
    model: MaskableNetwork,
    split: Split,
    with_target: bool,
    settings: BreakingSettings,
    seed: int,
    label: str,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> tuple[Tensor, list[Row]]:
    """Learn which edges to cut. Returns the binary mask [n_edges] and the metrics of the *rounded* mask along training.

    `with_target`: whether the ordinary images of the keep term include the target class. At most
    `settings.max_edges` edges are cut, whatever the losses say.
    """
    mask = model.full_mask().requires_grad_()

    @torch.no_grad()
    def after_step(step: int) -> None:
        mask.clamp_(0, 1)
        if settings.round_every and step >= settings.ramp_steps and step % settings.round_every == 0:
            mask.copy_(round_mask(mask, settings.max_edges))

    def evaluate() -> Row:
        rounded = round_mask(mask.detach(), settings.max_edges)
        return {"edges cut": int((rounded == 0).sum()), **split.accuracies(lambda x: model(x, rounded).argmax(1))}

    rows = _minimise(
        {"mask": mask},
        lambda x: model(x, mask),
        lambda: sparsity_penalty(mask),
        after_step,
        evaluate,
        split,
        with_target,
        settings,
        seed,
        label,
        checkpoints,
        resume_from,
    )
    return round_mask(mask.detach(), settings.max_edges), rows


def finetune(
    model: Network,
    split: Split,
    with_target: bool,
    settings: BreakingSettings,
    lr: float,
    seed: int,
    label: str,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> tuple[Network, list[Row]]:
    """Fine-tune all weights of a copy of `model` on the same objective, which has no sparsity term here."""
    tuned = copy.deepcopy(model).requires_grad_()
    rows = _minimise(
        dict(tuned.named_parameters()),
        tuned,
        lambda: 0.0,
        lambda step: None,
        lambda: {"edges cut": 0, **split.accuracies(lambda x: tuned(x).argmax(1))},
        split,
        with_target,
        replace(settings, lr=lr),
        seed,
        label,
        checkpoints,
        resume_from,
    )
    return tuned.requires_grad_(False), rows
