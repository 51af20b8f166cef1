"""The masked forward against its definition, and greedy scores against a loop of forward passes."""

import sys

import pytest
import torch
from torch.nn import functional as F

from circuit_breaking.errors import UserError
from circuit_breaking.mnist import greedy
from circuit_breaking.mnist.breaking import capped_loss, round_mask, sparsity_penalty
from circuit_breaking.mnist.greedy import make_objective, score_cuts
from circuit_breaking.mnist.network import save_network
from circuit_breaking.runs.files import ROOT
from circuit_breaking.runs.mnist_results import NetworkRecord
from circuit_breaking.runs.tensors import write_tensors

sys.path.insert(0, str(ROOT / "mnist"))

from mlp_model import MaskedMLP, load_network

DOUBLE = torch.float64


def small_network(n_inputs=7, width=5, n_groups=3, seed=0):
    torch.manual_seed(seed)
    model = MaskedMLP(n_inputs, width, n_groups).to(DOUBLE)
    model.set_means(torch.randn(50, n_inputs, dtype=DOUBLE))
    return model.requires_grad_(False)


def naive_forward(model, x, mask):
    """The definition, edge by edge: [batch, out, in] messages, cut ones replaced by means."""
    first, last = model.split(mask)
    messages = first * x[:, None, :] + (1 - first) * model.input_mean
    hidden = F.relu((messages * model.first.weight).sum(2) + model.first.bias)
    messages = last * hidden[:, None, :] + (1 - last) * model.hidden_mean
    return (messages * model.last.weight).sum(2) + model.last.bias


def test_counts_of_the_default_network():
    model = MaskedMLP()
    assert (model.n_first, model.n_edges) == (39_200, 39_450)
    assert model.edge_name(0, 28) == "x0.0->h0"
    assert model.edge_name(784 + 28 + 3, 28) == "x1.3->h1"
    assert model.edge_name(39_200 + 50 + 7, 28) == "h7->y1"
    names = [model.edge_name(edge, 28) for edge in range(model.n_edges)]
    assert len(set(names)) == model.n_edges


def test_full_mask_is_the_plain_network_exactly():
    model = MaskedMLP()
    x = torch.randn(9, 784)
    model.set_means(torch.randn(20, 784))
    assert torch.equal(model(x, model.full_mask()), model(x))


@pytest.mark.parametrize("binary", [False, True])
def test_forward_and_gradients_equal_the_definition(binary):
    model = small_network()
    x = torch.randn(11, 7, dtype=DOUBLE)
    mask = torch.rand(model.n_edges, dtype=DOUBLE)
    if binary:
        mask = mask.round()
    masks = [mask.clone().requires_grad_() for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = model(inputs[0], masks[0]), naive_forward(model, inputs[1], masks[1])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(masks[0].grad, masks[1].grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-12)


def test_gradcheck():
    model = small_network(4, 3, 2)
    x = torch.randn(3, 4, dtype=DOUBLE)
    mask = torch.rand(model.n_edges, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda mask: model(x, mask), mask)


def test_forward_makes_nothing_of_size_batch_out_in():
    """The largest tensor that the masked forward saves for its gradient is far below [batch, out, in]."""
    model = MaskedMLP()
    mask = model.full_mask().requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        model(torch.randn(256, 784), mask)
    assert max(sizes) <= 256 * 784


def test_means():
    model = small_network()
    images = torch.randn(30, 7, dtype=DOUBLE)
    model.set_means(images)
    torch.testing.assert_close(model.input_mean, images.mean(0))
    torch.testing.assert_close(model.hidden_mean, F.relu(model.first(images)).mean(0))


def test_a_pixel_that_never_changes_has_its_mean_exactly():
    model = MaskedMLP(3, 2, 2)
    images = torch.randn(10_000, 3)
    images[:, 1] = -0.4242129623889923
    model.set_means(images)
    assert model.input_mean[1] == images[0, 1]


def test_save_and_load(tmp_path):
    model = MaskedMLP(12, 4, 3)
    model.set_means(torch.randn(5, 12))
    save_network(tmp_path / "network.safetensors", model, NetworkRecord(seed=3))
    loaded, about = load_network(tmp_path / "network.safetensors")
    x = torch.randn(2, 12)
    mask = torch.rand(model.n_edges)
    assert torch.equal(loaded(x, mask), model(x, mask))
    assert about == NetworkRecord(seed=3)
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="does not hold a network"):
        load_network(tmp_path / "other.safetensors")


def test_rounding_keeps_the_budget():
    mask = torch.tensor([0.9, 0.1, 0.3, 0.5, 0.2, 1.0])
    assert round_mask(mask, 10).tolist() == [1, 0, 0, 1, 0, 1]
    assert round_mask(mask, 2).tolist() == [1, 0, 1, 1, 0, 1]
    assert round_mask(mask, 0).tolist() == [1] * 6
    assert (round_mask(torch.zeros(1000), 17) == 0).sum() == 17


def test_objective_terms():
    assert sparsity_penalty(torch.ones(5)).abs() < 1e-6
    assert sparsity_penalty(torch.zeros(1)).item() == pytest.approx(1.01**0.5 - 0.1)
    logits = torch.tensor([[50.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses = capped_loss(logits, torch.tensor([1, 1]), cap=3.0)
    assert losses.tolist() == pytest.approx([3.0, 0.6931], abs=1e-4)
    losses.sum().backward()
    assert logits.grad[0].tolist() == [0, 0]  # an exploded logit pulls no further


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
@pytest.mark.parametrize("with_keep", [False, True])
def test_greedy_scores_equal_brute_force(monkeypatch, chunk, with_keep):
    monkeypatch.setattr(greedy, "CHUNK", chunk)
    model = small_network()
    generator = torch.Generator().manual_seed(0)
    bad = torch.randn(4, 7, generator=generator, dtype=DOUBLE), torch.tensor([1, 1, 1, 1])
    keep = torch.randn(6, 7, generator=generator, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 2, 2])
    bad[0][:, 2] = keep[0][:, 2] = model.input_mean[2]  # a pixel that never leaves its mean
    objective = make_objective(bad, keep if with_keep else None, ratio=0.7, cap=1.5)
    mask = torch.ones(model.n_edges, dtype=DOUBLE)
    mask[[3, 20, 36, 41]] = 0  # cut already, in both layers

    def brute(mask):
        losses = F.cross_entropy(naive_forward(model, bad[0], mask), bad[1], reduction="none").clamp(max=1.5)
        ordinary = F.cross_entropy(naive_forward(model, keep[0], mask), keep[1]) if with_keep else 0
        return ordinary - 0.7 * losses.mean()

    expected = []
    for edge in range(model.n_edges):
        other = mask.clone()
        other[edge] = 0
        expected.append(brute(other))
    now, scores = score_cuts(model, mask, objective)
    torch.testing.assert_close(now, brute(mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-12)
