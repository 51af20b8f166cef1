"""EAP and EAP-IG with counterfactual prompts against their definitions, written out with hooks on Hugging Face's GPT-2;
and exact patching of single edges, which all of them estimate."""

import pytest
import torch
from helpers.models import small_gpt2
from torch import nn

from circuit_breaking.engine.conventions import values_left_in_stream
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.score_stability import score_stability
from circuit_breaking.tasks.losses import logit_difference
from circuit_breaking.training.attribution import average, eap
from circuit_breaking.training.edge_patching import edge_effects
from circuit_breaking.training.input_attribution import PairedMetric, eap_ig_activations, eap_ig_inputs
from circuit_breaking.training.mask_gradient import value_and_gradient

DRAW = torch.Generator().manual_seed(5)
TEXTS, OTHERS = torch.randint(0, 50, (2, 4, 7), generator=DRAW)
RIGHT, WRONG = torch.randint(0, 50, (2, 4), generator=DRAW)
LAST = torch.tensor([6, 3, 5, 6])


def difference(model, tokens=TEXTS):
    def metric(mask):
        return logit_difference(model(tokens, at=LAST, mask=mask), RIGHT, WRONG).mean()

    return metric


def exact(make=small_gpt2, split=False):
    return load_model(make().double(), split, device="cpu", dtype="float64")


class Hooked:
    """Hugging Face's GPT-2 with hooks: outputs of all nodes, and the gradient at every reader, of one pass."""

    def __init__(self, hf, split):
        self.hf, self.split, self.layers = hf, split, hf.transformer.h
        self.heads, self.width = hf.config.n_head, hf.config.n_embd

    def run(self, tokens, embedded=None, replaced=None):
        """Outputs [P, B, T, D] in the order of the graph, and gradients [R, B, T, D] of the mean logit difference.

        `embedded` takes the place of the token embeddings, `replaced` (module, tensor) that of a module's output.
        """
        seen, hooks = {}, []

        def keep(name):
            def hook(module, given, out):
                seen[name] = given[0], out
                out.retain_grad()

            return hook

        for number, layer in enumerate(self.layers):
            for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp"):
                hooks.append(layer.get_submodule(name).register_forward_hook(keep((number, name))))
        hooks.append(self.hf.transformer.ln_f.register_forward_hook(keep("ln_f")))
        if replaced is not None:
            hooks.insert(0, replaced[0].register_forward_hook(lambda module, given, out: replaced[1], prepend=True))
        words = self.hf.transformer.wte(tokens) if embedded is None else embedded
        words = words.detach().requires_grad_()
        logits = self.hf(inputs_embeds=words).logits[torch.arange(len(tokens)), LAST]
        logit_difference(logits, RIGHT, WRONG).mean().backward()
        for hook in hooks:
            hook.remove()
        outputs = [seen[0, "ln_1"][0].detach()]
        gradients = []
        for number, layer in enumerate(self.layers):
            z, _ = seen[number, "attn.c_proj"]
            weight = layer.attn.c_proj.weight.view(self.heads, -1, self.width)
            share = layer.attn.c_proj.bias / self.heads
            outputs += [z[..., k].detach() @ w + share for k, w in zip(self.columns(z), weight, strict=True)]
            outputs.append(seen[number, "mlp"][1].detach())
            stream, qkv = seen[number, "ln_1"][0], seen[number, "attn.c_attn"][1]
            read = nn.Sequential(layer.ln_1, layer.attn.c_attn)
            for own in self.columns(qkv[..., : self.width]):
                parts = [[n] for n in range(3)] if self.split else [range(3)]
                for part in parts:
                    only = torch.zeros_like(qkv)
                    for n in part:
                        columns = slice(n * self.width + own.start, n * self.width + own.stop)
                        if qkv.grad is not None:  # else its heads were replaced
                            only[..., columns] = qkv.grad[..., columns]
                    gradients.append(self.back(read, stream, only))
            gradients.append(self.back(layer.ln_2, *[seen[number, "ln_2"][n] for n in (0, 1)]))
        gradients.append(self.back(self.hf.transformer.ln_f, *seen["ln_f"]))
        return torch.stack(outputs), torch.stack(gradients)

    def columns(self, x):
        size = x.shape[-1] // self.heads
        return [slice(head * size, head * size + size) for head in range(self.heads)]

    @staticmethod
    def back(function, stream, out):
        """The gradient that reaches a residual stream through one function of it."""
        stream = stream.detach().requires_grad_()
        gradient = out if out.grad_fn is None else out.grad
        gradient = torch.zeros_like(stream) if gradient is None else gradient  # of an MLP that was replaced
        return torch.autograd.grad(function(stream), stream, gradient)[0]

    def embed(self, tokens):
        return self.hf.transformer.wte(tokens)

    def scores(self, graph, changes, gradients):
        """(x_i - x'_i) · gradient at j for every edge: [E]."""
        products = torch.einsum("ibtd,jbtd->ji", changes, gradients)
        return products[graph.edge_readers, graph.edge_sources]


@pytest.fixture(params=[False, True])
def both(request):
    """The engine and the hooked model, and x - x' of all nodes."""
    hf = small_gpt2().double()
    model, hooked = load_model(hf, request.param, device="cpu", dtype="float64"), Hooked(hf, request.param)
    return model, hooked, hooked.run(TEXTS)[0] - hooked.run(OTHERS)[0]


def paired(model):
    return [PairedMetric(difference(model), TEXTS, OTHERS)]


def assert_scores(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert expected.abs().max() > 1e-3


def test_eap_with_counterfactuals(both):
    model, hooked, changes = both
    with model.resampling(OTHERS):
        found = eap([difference(model)], model)
    assert_scores(found, hooked.scores(model.graph, changes, hooked.run(TEXTS)[1]))


def test_eap_ig_over_inputs(both):
    model, hooked, changes = both
    expected = 0
    for k in range(3):
        there, here = hooked.embed(OTHERS), hooked.embed(TEXTS)
        _, gradients = hooked.run(TEXTS, embedded=there + k / 3 * (here - there))
        expected += hooked.scores(model.graph, changes, gradients) / 3
    assert_scores(eap_ig_inputs(paired(model), model, 3, "even"), expected)
    model.resample, model.means = True, torch.ones(len(model.graph.sources), 24)  # which do not matter
    assert_scores(eap_ig_inputs(paired(model), model, 3, "even"), expected)


def test_eap_ig_over_activations(both):
    model, hooked, changes = both
    x, transformer = hooked.run(TEXTS)[0], hooked.hf.transformer
    expected, groups, heads = 0, 1 + 2 * len(hooked.layers), hooked.heads
    for k in (1, 2):
        there, here = hooked.embed(OTHERS), hooked.embed(TEXTS)
        _, gradients = hooked.run(TEXTS, embedded=there + k / 2 * (here - there))
        expected += hooked.scores(model.graph, changes, gradients)
        for number, layer in enumerate(transformer.h):
            first = 1 + number * (heads + 1)
            for module, own in (
                (layer.attn.c_proj, slice(first, first + heads)),
                (layer.mlp, slice(first + heads, None)),
            ):
                own = slice(own.start, own.start + 1) if own.stop is None else own
                between = (x - (1 - k / 2) * changes)[own].sum(0).requires_grad_()
                _, gradients = hooked.run(TEXTS, replaced=(module, between))
                expected += hooked.scores(model.graph, changes, gradients)
    assert_scores(eap_ig_activations(paired(model), model, 2, "even"), expected / (2 * groups))


@pytest.mark.seconds_per_family
def test_scores_of_embed_add_up_to_the_change_of_the_metric(family):
    model = exact(family)
    ones = torch.ones(len(model.graph), dtype=torch.float64)
    change = float(difference(model)(ones) - difference(model, OTHERS)(ones))
    scores = eap_ig_inputs(paired(model), model, 60)
    total = float(scores[model.edge_sources == 0].sum())
    assert abs(change) > 0.01 and total == pytest.approx(change, rel=0.01)


def test_nothing_is_attributed_before_ablate_from():
    model = exact()
    model.ablate_from = TEXTS.shape[1]
    for attribute in (eap_ig_inputs, eap_ig_activations):
        assert not attribute(paired(model), model, 1).any()
    model.ablate_from = 2
    early = [PairedMetric(difference(model), TEXTS, torch.cat([OTHERS[:, :2], TEXTS[:, 2:]], 1))]
    model.ablate_from = 0
    whole = eap_ig_inputs(early, model, 2)
    model.ablate_from = 2
    assert (eap_ig_inputs(early, model, 2) - whole).abs().max() > 1e-6


def test_a_metric_that_compares_with_a_pass_of_its_own_is_refused():
    model = exact()

    def divergence(mask):
        with torch.no_grad():
            before = model(TEXTS, at=LAST).softmax(-1)
        return -(before * model(TEXTS, at=LAST, mask=mask).log_softmax(-1)).sum(-1).mean()

    batches = [PairedMetric(divergence, TEXTS, OTHERS)]
    with pytest.raises(UserError, match="without gradient"):
        eap_ig_inputs(batches, model, 2)
    assert model(TEXTS).isfinite().all()
    assert eap_ig_activations(batches, model, 2).any()  # whose passes without gradient are those of the model


def by_masks(model, metric):
    """Effects of single edges, one masked pass for each."""
    ones, found = torch.ones(len(model.graph), dtype=torch.float64), []
    for edge in range(len(ones)):
        mask = ones.clone()
        mask[edge] = 0
        found.append(metric(ones) - metric(mask))
    return torch.stack(found)


@pytest.mark.seconds_per_family
def test_effects_of_single_edges_are_those_of_masks(family):
    split = family.args[0] in ("gpt2", "llama")
    model = exact(family, split)

    def rows(logits, row):
        return logit_difference(logits, RIGHT[row], WRONG[row])

    with torch.no_grad():
        found = edge_effects(model, TEXTS, LAST, rows, edges_at_once=5)
        some = torch.arange(0, len(found), 29 if split else 11)
        masks = torch.ones(len(some), len(found), dtype=torch.float64)
        masks[torch.arange(len(some)), some] = 0
        metric, ones = difference(model), torch.ones(len(found), dtype=torch.float64)
        expected = torch.stack([metric(ones) - metric(mask) for mask in masks])
        torch.testing.assert_close(found[some], expected, atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_effects_of_single_edges_with_other_ablation_values():
    model = exact(lambda: small_gpt2(n_layer=2))
    metric = difference(model)

    def rows(logits, row):
        return logit_difference(logits, RIGHT[row], WRONG[row])

    model.ablate_from, model.means = 2, torch.randn(len(model.graph.sources), 24, dtype=torch.float64)
    assert_scores(edge_effects(model, TEXTS, LAST, rows), by_masks(model, metric))
    with model.resampling(OTHERS):
        assert_scores(edge_effects(model, TEXTS, LAST, rows), by_masks(model, metric))


def test_conventions_of_bias_and_positions(both):
    """Zero ablation with the attention bias, or the positions too, left in the stream, against hooks."""
    model, hooked, _ = both
    x, gradients = hooked.run(TEXTS)
    without = x.clone()
    for number, layer in enumerate(hooked.layers):
        first = 1 + number * (hooked.heads + 1)
        without[first : first + hooked.heads] -= layer.attn.c_proj.bias / hooked.heads
    model.means = values_left_in_stream(model)
    bias = eap([difference(model)], model)
    assert_scores(bias, hooked.scores(model.graph, without, gradients))
    without[0] -= hooked.hf.transformer.wpe.weight[: TEXTS.shape[1]]
    model.means = None
    ours = eap([difference(model)], model)
    model.means = values_left_in_stream(model, positions=True, length=7)
    positions = eap([difference(model)], model)
    assert_scores(positions, hooked.scores(model.graph, without, gradients))
    assert (ours - bias).abs().max() > 1e-3 < (bias - positions).abs().max()
    model.means = torch.zeros(len(model.graph.sources), 24)
    with pytest.raises(UserError, match="taken over positions too"):
        values_left_in_stream(model, positions=True)


def test_batches_count_alike_or_by_their_examples():
    model = exact()
    mask = torch.ones(len(model.graph), dtype=torch.float64)
    metrics = [difference(model), difference(model, OTHERS)]
    scores = [value_and_gradient(metric, mask)[1] for metric in metrics]
    torch.testing.assert_close(eap(metrics, model), (scores[0] + scores[1]) / 2)
    torch.testing.assert_close(eap(metrics, model, counts=[3, 1]), (3 * scores[0] + scores[1]) / 4)
    with pytest.raises(ValueError, match="shorter"):
        average(scores, [1])
    for wrong in ({"steps": 0}, {"points": "middle"}):
        with pytest.raises(UserError, match=r"over 0 steps|points are gauss or even"):
            eap_ig_inputs(paired(model), model, **wrong)


def test_a_bootstrap_over_examples():
    draw = torch.Generator().manual_seed(0)
    truth = torch.linspace(-1, 1, 60)
    scores = truth + 0.5 * torch.randn(40, 60, generator=draw)
    found = score_stability(scores, count=10, resamples=400)
    torch.testing.assert_close(found.mean, scores.double().mean(0))
    error = scores.std(0).double() / 40**0.5
    torch.testing.assert_close(found.high - found.low, 2 * 1.96 * error, rtol=0.25, atol=0)
    inside = (found.low <= truth) & (truth <= found.high)
    assert inside.double().mean() > 0.85
    assert found.chosen.sum() == pytest.approx(10, abs=1e-3) and found.chosen[-1] > 0.9 > found.chosen[30] * 10
    assert 0.5 < found.overlap < 1
    same = score_stability(scores[:1].repeat(5, 1), count=10)
    assert same.overlap == pytest.approx(1) and torch.allclose(same.low, same.high)
    for wrong, message in (
        ((scores[:1], 3), "at least two"),
        ((scores, 0), "cannot be chosen"),
        ((scores, 61), "61 edges"),
    ):
        with pytest.raises(UserError, match=message):
            score_stability(*wrong)
