"""Faithfulness of circuits: how much of a behaviour the edges of a circuit show by themselves.

The metric is a function m of the mask, such as the mean logit difference over prompts. With C the edges that are kept,
N all edges and ∅ none,

    f(C) = (m(C) - m(∅)) / (m(N) - m(∅))

is 0 for a circuit that does no more than the model with all edges cut, and 1 for one that does as much as the whole
model. What cut edges carry is part of the metric: zero or means are set in the model, and a metric may set other values
around its forward pass.

`faithfulness_curve` gives f for circuits of growing size: of each size, the edges with the highest scores. Two areas
summarise the curve, as defined by the Mechanistic Interpretability Benchmark (MIB; Mueller et al. 2025, section 3.1):

    CPR, integrated circuit performance ratio: ∫ f(C_k) dk, over the fraction k of edges kept. Higher is better.
    CMD, integrated circuit-model distance:    ∫ |1 - f(C_k)| dk. Lower is better, 0 is best.

For CPR the edges with the highest scores are kept, for CMD those whose scores are furthest from zero (`absolute`),
because edges that work against the behaviour belong to a circuit that acts as the model does.

Shapes: E edges.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.runs.circuits import Circuit
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.training.mask_gradient import MaskFunction

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, in MIB's curves

MaskMetric = Callable[[Tensor], float]  # of a mask [E]


@dataclass(frozen=True)
class Curve:
    """Faithfulness of circuits of growing size.

    Attributes:
        fractions: fraction of the edges that are kept before pruning.
        n_edges: number of edges of each circuit, after pruning.
        values: metric of each circuit.
        whole: metric of the whole model, m(N).
        empty: metric of the model with all edges cut, m(∅).
    """

    fractions: tuple[float, ...]
    n_edges: tuple[int, ...]
    values: tuple[float, ...]
    whole: float
    empty: float

    @property
    def faithfulness(self) -> tuple[float, ...]:
        """f of each circuit."""
        return tuple(faithfulness(value, self.whole, self.empty) for value in self.values)

    @property
    def cpr(self) -> float:
        """Area under the faithfulness, by the trapezoidal rule between the first fraction and the last."""
        return area(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area between the faithfulness and 1, by the trapezoidal rule over |1 - f|."""
        return area(self.fractions, [abs(1 - value) for value in self.faithfulness])


def faithfulness(value: float, whole: float, empty: float) -> float:
    """f of a circuit with this metric.

    Raises:
        UserError: the metric is the same with all edges and with none, so that there is nothing to explain.
    """
    if whole == empty:
        raise UserError(
            f"the metric is {whole:.4g} with all edges kept and with all edges cut, so that no circuit can be more or "
            "less faithful. Use a task that the model knows, or other ablation values."
        )
    return (value - empty) / (whole - empty)


def area(at: Sequence[float], heights: Sequence[float]) -> float:
    """Area under the line through some points, by the trapezoidal rule."""
    pairs = zip(at, at[1:], heights, heights[1:], strict=False)
    return sum((right - left) * (low + high) / 2 for left, right, low, high in pairs)


def mean_of(metrics: Iterable[MaskFunction]) -> MaskMetric:
    """The mean of metrics, one for each batch of equal size, as a number."""
    metrics = list(metrics)
    if not metrics:
        raise UserError("there is no batch to measure a circuit on. Give at least one example.")

    @torch.no_grad()
    def mean(mask: Tensor) -> float:
        return sum(float(metric(mask)) for metric in metrics) / len(metrics)

    return mean


def ends_of(metric: MaskMetric, mask: Tensor) -> tuple[float, float]:
    """The metric with all edges kept, m(N), and with all edges cut, m(∅). `mask` [E] gives their type and device."""
    return metric(torch.ones_like(mask)), metric(torch.zeros_like(mask))


def faithfulness_curve(
    metric: MaskMetric,
    circuit: Circuit,
    mask: Tensor,
    fractions: Sequence[float] = MIB_FRACTIONS,
    absolute: bool = False,
    prune: bool = True,
    progress: str | None = None,
    ends: tuple[float, float] | None = None,
) -> Curve:
    """The faithfulness of circuits that keep a growing fraction of the edges, by their scores.

    A fraction p of E edges is floor(p · E) edges, as in MIB. MIB's graphs have separate queries, keys and values: load
    the model with `split_qkv` for comparable figures.

    Args:
        metric: of a mask.
        circuit: its scores rank the edges.
        mask: weights [E] of the model's mask; only their type and device matter.
        fractions: of the edges to keep, rising, each above 0 and at most 1.
        absolute: whether scores far below zero count as high.
        prune: whether edges on no path from `embed` to `output` are cut too, as in MIB. They are part of `fractions`.
        progress: text of a progress bar; None: no bar.
        ends: m(N) and m(∅), where `ends_of` has measured them before; None: they are measured.

    Raises:
        UserError: the fractions do not rise from above 0 to at most 1, or there are no scores.
    """
    fractions = tuple(fractions)
    if not fractions or list(fractions) != sorted(set(fractions)) or not (fractions[0] > 0 and fractions[-1] <= 1):
        raise UserError(f"fractions {list(fractions)} do not rise from above 0 to at most 1.")

    def measure(kept: Tensor) -> float:
        return metric(kept.to(mask))

    counts, values = [], []
    for fraction in progress_bar(fractions, shown=bool(progress), desc=progress, unit="size"):
        chosen = circuit.top(int(fraction * len(circuit.graph)), absolute)
        kept = (chosen.pruned() if prune else chosen).kept
        counts.append(int(kept.sum()))
        values.append(measure(kept))
    return Curve(fractions, tuple(counts), tuple(values), *(ends or ends_of(metric, mask)))
