"""`ablate` takes the file of a circuit: every form, with what a mask's cut edges carry; kept edges are not cut."""

import pytest
import torch
from helpers.models import small_gpt2

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.ablation_values import save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.circuit_files import write_circuit
from circuit_breaking.runs.circuits import Circuit, circuit_of
from circuit_breaking.runs.mask_record import MaskRecord, write_edges

WHOLE, SPLIT = EdgeGraph(3, 3), EdgeGraph(3, 3, split_qkv=True)  # of small_gpt2
TOKENS = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
CUT = ["embed->a0.0", "a0.1->m2", "m0->a2.1", "a1.0->output"]


def logits(hf, *cut, **options):
    with ablate(hf, *cut, **options), torch.no_grad():
        return hf(TOKENS).logits


def scored(graph, kept):
    return Circuit(graph, kept, torch.randn(len(graph), generator=torch.manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
@pytest.mark.parametrize("graph", [WHOLE, SPLIT], ids=["whole", "split"])
def test_edges_outside_a_circuit_are_cut(tmp_path, suffix, graph):
    circuit = scored(graph, torch.rand(len(graph), generator=torch.manual_seed(2)) > 0.3)
    write_circuit(tmp_path / f"c.{suffix}", circuit, d_model=24)
    hf = small_gpt2().double()
    expected = logits(hf, circuit.cut_edges())
    for path in (tmp_path / f"c.{suffix}", str(tmp_path / f"c.{suffix}")):
        torch.testing.assert_close(logits(hf, path), expected, atol=1e-10, rtol=0)
    assert (expected - logits(hf, circuit.kept_edges())).abs().max() > 1e-3


def test_a_list_of_kept_edges_is_not_taken_for_edges_to_cut(tmp_path):
    hf = small_gpt2().double()
    write_edges(tmp_path, CUT)
    assert torch.equal(logits(hf, tmp_path / "edges.json"), logits(hf, CUT))
    write_edges(tmp_path, CUT, kept=True)
    kept_alone = circuit_of(WHOLE, CUT).cut_edges()
    assert torch.equal(logits(hf, tmp_path / "kept_edges.json"), logits(hf, kept_alone))
    (tmp_path / "kept_edges.json").rename(tmp_path / "edges.json")
    assert torch.equal(logits(hf, tmp_path / "edges.json"), logits(hf, kept_alone))  # its record says what it is


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_mask_brings_what_its_cut_edges_carry_and_where_they_act(tmp_path, split):
    hf = small_gpt2()
    model = load_model(hf, split_qkv=split, device="cpu")
    model.ablate_from = 2
    edges = [edge for edge in model.graph.edges if edge.source == "a0.1"]
    model.mask.cut_(edges)
    means = torch.randn(len(model.graph.sources), 24)
    save_means(tmp_path / "means.safetensors", model, means)
    model.means = means
    save_mask(tmp_path / "mask.safetensors", model, MaskRecord(ablation_value=value_in(tmp_path / "means.safetensors")))
    assert torch.equal(logits(hf, tmp_path / "mask.safetensors"), logits(hf, edges, means, 2))
    other = means + 1
    assert torch.equal(logits(hf, tmp_path / "mask.safetensors", means=other), logits(hf, edges, other, 2))
    with pytest.raises(UserError, match="was made with ablate_from 2, and 1 is given"):
        ablate(hf, tmp_path / "mask.safetensors", ablate_from=1)
    save_means(tmp_path / "means.safetensors", model, other)
    with pytest.raises(UserError, match="holds other means than those"):
        ablate(hf, tmp_path / "mask.safetensors")
    assert not hasattr(hf, "edge_cuts")


def test_files_that_do_not_say_what_to_cut_are_refused(tmp_path):
    hf = small_gpt2()
    for kept, count in ((torch.zeros(len(SPLIT)), "none"), (torch.ones(len(SPLIT)), "all")):
        write_circuit(tmp_path / "scores.json", scored(SPLIT, kept), d_model=24)
        with pytest.raises(UserError, match=f"has scores, and {count} of its edges are in the circuit. Choose"):
            ablate(hf, tmp_path / "scores.json")
    other = EdgeGraph(2, 3)
    write_circuit(tmp_path / "other.csv", scored(other, torch.rand(len(other)) > 0.5))
    with pytest.raises(UserError, match=r"circuit is of a graph of 2 layers.*the model has a graph of 3 layers"):
        ablate(hf, tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"missing\.json"):
        ablate(hf, tmp_path / "missing.json")
    with pytest.raises(UserError, match="a list of names, not one text"):
        ablate(hf, "a0.0->m1")
