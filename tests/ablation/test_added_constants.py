"""Controls in which the readers of some edges get constants in addition, and no edge is cut."""

import pytest
import torch
from helpers.models import small_gpt2

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import save_ablated
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.controls import control_values
from circuit_breaking.models.families import describe

EDGES = ["embed->a0.1", "a0.0->m0", "m0->a1.0", "a0.1->a1.2", "m0->m1", "a1.1->a2.1", "m1->output", "embed->output"]
TINY = 1e-6


@pytest.fixture
def made(family):
    hf = family().double()
    graph = describe(hf).graph()
    edges = [edge for edge in EDGES if edge in graph.edges]
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(len(graph.sources), describe(hf).width, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 50, (3, 7), generator=generator)
    return hf, graph, edges, means, tokens


@pytest.mark.seconds_per_family
@pytest.mark.parametrize("ablate_from", [0, 1])
def test_constants_are_added_at_the_readers_of_the_edges(made, ablate_from):
    """The reference with weights a little below 1 at these edges and constants that are as much larger: r_j is then
    Σ (1 - ε) x_i + μ_i at each, which is Σ x_i + μ_i but for ε x_i."""
    hf, graph, edges, means, tokens = made
    mask = torch.ones(len(graph), dtype=torch.float64)
    mask[[graph.index(edge) for edge in edges]] = 1 - TINY
    reference = ReferenceModel(hf)
    expected = reference(tokens, mask, means / TINY, ablate_from=ablate_from)
    with torch.no_grad(), ablate(hf, edges, means, ablate_from, removes=False):
        got = hf(tokens).logits
        generated = hf.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
        # with a KV cache as without
        torch.testing.assert_close(hf(generated[:, :-1]).logits[:, -1].argmax(-1), generated[:, -1])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        plain = hf(tokens).logits
        assert not torch.allclose(plain, got, atol=1e-2)
        with ablate(hf, edges, means, ablate_from):
            assert not torch.allclose(hf(tokens).logits, got, atol=1e-2)
        with ablate(hf, edges, None, ablate_from, removes=False):
            torch.testing.assert_close(hf(tokens).logits, plain, atol=1e-6, rtol=1e-6)


def test_bias_and_mean_ablation_add_up_at_a_reader():
    """At one reader, the change by the mask is the sum of the changes by the constants alone and by mean ablation."""
    generator = torch.Generator().manual_seed(1)
    outputs, constants, means = (torch.randn(5, 8, generator=generator) for _ in range(3))
    cut = torch.tensor([True, False, True, True, False])

    def read(values, removes):
        kept = outputs[~cut] if removes else outputs
        return kept.sum(0) + values[cut].sum(0)

    bias = read(control_values("bias", constants, means), False) - outputs.sum(0)
    mean = read(control_values("mean", constants, means), True) - outputs.sum(0)
    torch.testing.assert_close(bias + mean, read(constants, True) - outputs.sum(0))
    assert control_values("added", constants, means) is constants


def test_it_is_not_saved(tmp_path):
    hf = small_gpt2()
    means = torch.ones(len(describe(hf).graph().sources), 24)
    with ablate(hf, ["m0->m1"], means, removes=False), pytest.raises(UserError, match="no edge is cut"):
        hf.save_pretrained(tmp_path / "model")
    save_ablated(tmp_path / "cut", hf, ["m0->m1"], means)
