"""Uniform gradient sampling: its masks and its estimate of an edge's whole effect."""

import pytest
import torch
from helpers.tasks import make_task, small

from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.edge_ranking import EdgeRanking
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import ugs
from circuit_breaking.training.methods.ugs import UniformGradientSampling, sample_masks

MANY = 200_000


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9])
def test_masks_have_the_mean_and_the_window_of_the_paper(kept):
    torch.manual_seed(0)
    masks, inside = sample_masks(torch.full((MANY,), kept))
    assert float(masks.mean()) == pytest.approx(kept, abs=0.005)
    assert float(inside.float().mean()) == pytest.approx(kept * (1 - kept), abs=0.005)
    assert torch.equal(inside, (masks > 0) & (masks < 1))
    quartiles = torch.quantile(masks[inside][:100_000], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.03, rtol=0)


def test_the_estimate_is_the_whole_effect_and_not_a_slope():
    """L(m) = e^(3m): its slopes at both ends are 3 and 60, its whole effect is e^3 - 1 = 19.1."""
    torch.manual_seed(1)
    masks, inside = sample_masks(torch.full((MANY,), 0.7))
    masks.requires_grad_()
    (slopes,) = torch.autograd.grad((3 * masks).exp().sum(), masks)
    effect = float(torch.tensor(3.0).exp() - 1)
    assert float(slopes[inside].mean()) == pytest.approx(effect, rel=0.01)
    # and so the derivative of the expected loss, p (1 - p) (L(1) - L(0)), as for a mask that is 0 or 1
    assert float((slopes * inside).mean()) == pytest.approx(0.21 * effect, rel=0.02)


def method_on(objective, **changes):
    model = small()
    config = MaskConfig(method="ugs", max_edges=4, **changes)
    return UniformGradientSampling(model, config, None, lambda size: objective, lambda loss: loss.backward())


def test_a_step_follows_the_effects_and_the_price(monkeypatch):
    monkeypatch.setattr(ugs, "MASKS", 200)
    effects = torch.linspace(-1, 1, 26)  # what keeping each edge adds
    method = method_on(lambda mask: (mask * effects).sum(), batch_size=200, edge_penalty=0.5)
    before = method.parameter.detach().clone()
    torch.manual_seed(0)
    method.step(0)
    kept = torch.sigmoid(before)
    direction = (effects - 0.5) * kept * (1 - kept)
    torch.testing.assert_close(method.parameter.grad, direction * min(1, 1 / float(direction.norm())))
    assert torch.equal((method.parameter < before), effects > 0.5)  # with AdamW, against the gradient


def test_edges_whose_cut_is_worth_its_price_are_ranked_first():
    effects = torch.randn(26, generator=torch.Generator().manual_seed(2))
    method, worth = method_on(lambda mask: (mask * effects).sum(), lr=0.1, edge_penalty=0.6), int((effects > 0.6).sum())
    torch.manual_seed(0)
    for number in range(300):
        method.step(number)
    found = EdgeRanking.of_scores(method.model.graph, method.scores()).order
    assert set(found[:worth].tolist()) == set(effects.topk(worth).indices.tolist()) and 4 < worth < 13
    assert method.model.mask.n_cut() == 4


def test_only_wholly_cut_edges_train_the_constants():
    model, seen = small(), []
    config = MaskConfig(method="ugs", max_edges=4, steps=2, refine_rounds=0, constants_lr=0.05,
                        constants_steps=0, batch_size=5)  # fmt: skip
    plain = UniformGradientSampling.step

    def step(self, number):
        backward = self.backward

        def noted(loss):
            before = self.model.means.detach().clone()
            backward(loss)
            seen.append((self.masks[-1], self.model.means.detach() - before))

        self.backward, self.masks = noted, []
        whole = self.whole_mask
        self.whole_mask = lambda weights: self.masks.append(whole(weights)) or self.masks[-1]
        result = plain(self, number)
        del self.whole_mask
        self.backward = backward
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UniformGradientSampling, "step", step)
        torch.manual_seed(0)
        train_mask(model, make_task("break", 1), make_task("keep", 5), config, progress=False)
    assert len(seen) == 10
    for mask, _ in seen:
        assert set(mask.tolist()) <= {0.0, 1.0}
    # the first step of AdamW with a gradient moves what has one and nothing else
    mask, change = next(one for one in seen if (one[0] == 0).any())
    cut_sources = {model.graph.edges[index].source for index in (mask == 0).nonzero()[:, 0].tolist()}
    moved = {model.graph.sources[index] for index in change.abs().sum(1).nonzero()[:, 0].tolist()}
    assert moved <= cut_sources and moved
