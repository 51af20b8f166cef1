"""Rounding of ablated models and of the engine, which is that of the whole model, however much is cut."""

import copy

import pytest
import torch
from helpers.models import small_gpt2, small_llama, small_neox
from test_other_hands import TOKENS, logits

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.models.families import describe


def large_stream(hf):
    hf.model.embed_tokens.weight.mul_(30)  # as an attention sink's


def relative_errors(dtype, edges_of, change=large_stream, small=small_llama) -> dict[str, float]:
    """Error of the logits of the whole model, of the ablated model and of the engine, relative to float64.

    Args:
        dtype: the precision.
        edges_of: gives the edges to cut in a graph.
        change: changes the weights of the model.
        small: makes the model.
    """
    torch.manual_seed(0)
    hf = small(**SHAPE[small]).double()
    with torch.no_grad():
        change(hf)
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


SHAPE = {
    small_llama: {"hidden_size": 64, "num_hidden_layers": 4},
    small_gpt2: {"n_embd": 64, "n_layer": 4, "n_head": 4},
    small_neox: {"hidden_size": 64, "num_hidden_layers": 4},
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.99, 1.0])
def test_rounding_stays_that_of_the_plain_model(dtype, share):
    """Also where almost all edges are cut, and what is kept would be lost in rounding errors of the stream."""

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", SHAPE)
@pytest.mark.parametrize("node", ["m1", "a1.1"])
def test_rounding_where_one_output_is_hundreds_of_times_as_large_as_the_others(node, small, dtype):
    """As the output of one MLP of SmolLM2 at the first token. Readers after it are cut off from it: fewer than half of
    their edges, so that it is subtracted from a stream which has little else."""

    def change(hf):
        layer = describe(hf).layers[1]
        if node == "m1":
            layer.down.weight.mul_(3000)
        else:
            layer.w_o[1].mul_(3000)

    def edges_of(graph):
        return [edge for edge in graph.edges if edge.source == node]

    errors = relative_errors(dtype, edges_of, change, small)
    assert max(errors.values()) < 6 * errors["whole"], errors
