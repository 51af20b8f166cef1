"""Uniform gradient sampling, UGS (Li and Janson 2024, "Optimal ablation for interpretability").

Each edge is kept with a probability p = σ(θ), and θ is learned. A sample draws u, uniform in (0, 1), for each edge and
gives it the mask weight

    m = 1 - clamp((u - p) / w + 1/2, 0, 1),   with the window w = p (1 - p), treated as a constant.

So E[m] = p. The edge is kept or cut except inside the window, which u meets with probability w and where m is uniform
in (0, 1). The mean of ∂L/∂m over samples inside the window is therefore an estimate of L(1) - L(0), the whole effect of
the edge, and not of the slope at one point. This mean, minus the price `edge_penalty` of a cut edge, times
∂p/∂θ = p (1 - p) is the gradient in θ. It is 0 for an edge that no sample of the step meets inside its window.

A step draws `MASKS` masks, at most one per text, and shares its texts among them. If ablation constants are
learned, only wholly cut edges train them: they see the same samples with every other edge kept.

Li and Janson look for the few edges that are enough for a behaviour and drop edges without a path from input to
output. Here few edges are cut. In the whole graph every edge is on a path from input to output, so none is dropped.

Shapes: E edges, C edges that may be cut (candidates).
"""

import math

import torch
from torch import Tensor

from circuit_breaking.training.mask_gradient import value_and_gradient
from circuit_breaking.training.methods.base import LearnedScores, StepResult, shares_of

MASKS = 5  # masks of a step
BETAS = 0.9, 0.995  # of AdamW
CLIP = 1.0  # largest norm of the gradient
MOST_CUT = 0.1  # initial probability of an edge to be cut, at most
FIRST_CUT = 4.0  # expected number of cut edges at first, as a multiple of max_edges, if that is less


def sample_masks(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Sample mask weights for edges that are kept with probabilities `kept` [C], each in (0, 1).

    Returns:
        weights [C] in [0, 1], and which of them were drawn inside the window, bool [C].
    """
    window = kept * (1 - kept)
    drawn = (torch.rand_like(kept) - kept) / window + 0.5
    return 1 - drawn.clamp(0, 1), (drawn > 0) & (drawn < 1)


class UniformGradientSampling(LearnedScores):
    """One logit θ per edge that may be cut: the log odds that it is kept."""

    sign = -1.0

    def setup(self) -> None:
        """Start with equal probabilities."""
        n_edges = len(self.weights) if self.allowed is None else max(int(self.allowed.sum()), 1)
        cut = min(MOST_CUT, FIRST_CUT * max(self.config.max_edges, 1) / n_edges)
        self.learn(math.log((1 - cut) / cut))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=self.config.lr, betas=BETAS, weight_decay=0.0)

    def step(self, number: int) -> StepResult:
        """A step from the samples of a few masks."""
        config, kept = self.config, torch.sigmoid(self.parameter.detach())
        sums, inside = torch.zeros_like(kept), torch.zeros_like(kept)
        values = []
        for texts in shares_of(config.batch_size, MASKS):
            sampled, in_window = sample_masks(kept)
            objective = self.next_objective(texts)
            value, gradient = value_and_gradient(objective, self.whole_mask(sampled))
            sums += torch.where(in_window, gradient[self.candidates], 0)
            inside += in_window
            values.append(value)
            if self.model.means is not None and self.model.means.requires_grad:
                # an edge that is not wholly cut is kept; the mask is a constant, so only the constants are trained
                at_wholly_cut = objective(self.whole_mask((sampled > 0).to(sampled)))
                if at_wholly_cut.requires_grad:
                    self.backward(at_wholly_cut)
        effects = sums / inside.clamp(min=1)  # estimates of L(1) - L(0)
        self.parameter.grad = (effects - config.edge_penalty) * (inside > 0) * kept * (1 - kept)
        torch.nn.utils.clip_grad_norm_([self.parameter], CLIP)
        self.optimizer.step()
        self.answer()
        return StepResult("sample", float(torch.stack(values).mean()), self.model.mask.n_cut())
