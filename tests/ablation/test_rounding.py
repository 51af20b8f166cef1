"""Rounding of ablated models and of the engine, which is that of the whole model, however much is cut."""

import copy

import pytest
import torch
from helpers.models import small_llama
from test_other_hands import TOKENS, logits

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.models.families import describe


def relative_errors(dtype, edges_of) -> dict[str, float]:
    """Error of the logits of the whole model, of the ablated model and of the engine, relative to float64."""
    torch.manual_seed(0)
    hf = small_llama(hidden_size=64, num_hidden_layers=4).double()
    with torch.no_grad():
        hf.model.embed_tokens.weight.mul_(30)  # a large stream, as an attention sink's
    edges = edges_of(describe(hf).graph())
    low, errors = copy.deepcopy(hf).to(dtype), {}
    for name, cut in (("whole", []), ("cut", edges)):
        with ablate(hf, cut):
            exact = logits(hf)
        with ablate(low, cut):
            errors[name] = float((logits(low).double() - exact).norm() / exact.norm())
    if dtype != torch.float16:  # which the engine does not have
        engine = load_model(low, device="cpu", dtype=str(dtype).removeprefix("torch."))
        engine.mask.cut_(edges)
        with torch.no_grad():
            errors["engine"] = float((engine(TOKENS).double() - exact).norm() / exact.norm())
    return errors


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.99, 1.0])
def test_rounding_stays_that_of_the_plain_model(dtype, share):
    """Also where almost all edges are cut, and what is left of a stream would be lost in the rounding of the rest."""

    def edges_of(graph):
        inner = [edge for edge in graph.edges if edge.target != "output"]  # else all logits might be zero
        torch.manual_seed(0)
        return [inner[number] for number in torch.randperm(len(inner))[: max(1, round(share * len(inner)))].tolist()]

    errors = relative_errors(dtype, edges_of)
    assert max(errors.values()) < 6 * errors["whole"], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [0, 1])
def test_rounding_of_a_reader_that_is_cut_off(dtype, kept):
    def edges_of(graph):
        return [edge for edge in graph.edges if edge.target == "m3"][kept:]

    errors = relative_errors(dtype, edges_of)
    assert max(errors.values()) < 6 * errors["whole"], errors
