"""Greedy ablation: what every single further cut would do to an objective, for all edges at once.

Cutting edge (j, i) of the first layer moves one pre-activation of each example by M_ji W_ji (mean_i - x_bi), so only
hidden unit j changes and the logits move along column j of the last layer: no candidate needs a forward pass. Cutting
edge (c, j) of the last layer moves logit c alone.

Shapes: B examples, K candidates, D inputs, H hidden units, C outputs (groups).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.mnist.network import MaskableNetwork

CHUNK = 2**22  # numbers of a [C, K, B] block, 16 MiB: fits the caches of a CPU and keeps a GPU busy


@dataclass
class Objective:
    """sum_b weight_b min(cross-entropy_b, cap_b), to be made small: a negative weight asks for a high loss."""

    x: Tensor  # [B, D]
    y: Tensor  # [B] groups
    weight: Tensor  # [B]
    cap: Tensor  # [B] nats

    def value(self, logits: Tensor) -> Tensor:
        """The objective for logits [C, ..., B], as [...]."""
        index = self.y.expand(logits.shape[1:]).unsqueeze(0)
        losses = logits.logsumexp(0) - logits.gather(0, index).squeeze(0)
        return torch.minimum(losses, self.cap) @ self.weight


def make_objective(
    bad: tuple[Tensor, Tensor], keep: tuple[Tensor, Tensor] | None, ratio: float, cap: float
) -> Objective:
    """mean keep loss - ratio * mean capped loss of the bad examples; without `keep`, the second term alone."""
    parts = [(bad, -ratio / len(bad[0]), cap)]
    if keep is not None:
        parts.append((keep, 1 / len(keep[0]), float("inf")))
    return Objective(
        x=torch.cat([x for (x, _), _, _ in parts]),
        y=torch.cat([y for (_, y), _, _ in parts]),
        weight=torch.cat([torch.full_like(x[:, 0], weight) for (x, _), weight, _ in parts]),
        cap=torch.cat([torch.full_like(x[:, 0], cap) for (x, _), _, cap in parts]),
    )


@torch.no_grad()
def score_cuts(model: MaskableNetwork, mask: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The objective now, and what it would be after cutting each edge besides those cut in the binary `mask`.

    Returns (scalar, [n_edges]); edges that are cut already score the objective as it is.
    """
    first_mask, last_mask = model.split(mask)
    first, last = model.first.weight * first_mask, model.last.weight * last_mask  # [H, D], [C, H]
    before, logits = model.activations(objective.x, mask)  # [B, H], [B, C]
    hidden, logits = before.relu(), logits.T.contiguous()  # [C, B]
    now = objective.value(logits)
    scores = now.repeat(model.n_edges)

    n_outputs, n_examples = logits.shape
    per_chunk = max(1, CHUNK // (n_outputs * n_examples))
    away = (model.input_mean - objective.x).T.contiguous()  # [D, B]
    # a pixel at its mean in every example (a black margin) carries what its cut edge would: nothing changes
    moving = (first != 0) & (away != 0).any(1)
    units, pixels = moving.nonzero(as_tuple=True)
    before, hidden = before.T.contiguous(), hidden.T.contiguous()  # [H, B]
    for unit, pixel in zip(units.split(per_chunk), pixels.split(per_chunk), strict=True):
        after = torch.addcmul(before[unit], first[unit, pixel, None], away[pixel])  # [K, B]
        change = after.relu_().sub_(hidden[unit])
        moved = torch.addcmul(logits[:, None], last[:, unit, None], change)  # [C, K, B]
        scores[unit * model.first.in_features + pixel] = objective.value(moved)

    outputs, units = (last != 0).nonzero(as_tuple=True)
    for output, unit in zip(outputs.split(per_chunk), units.split(per_chunk), strict=True):
        moved = logits[:, None].repeat(1, len(unit), 1)  # [C, K, B]
        moved[output, torch.arange(len(unit), device=unit.device)] += last[output, unit, None] * (
            model.hidden_mean[unit, None] - hidden[unit]
        )
        scores[model.n_first + output * model.last.in_features + unit] = objective.value(moved)
    return now, scores
