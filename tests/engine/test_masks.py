"""The mask parameter, its budget, and its files."""

from dataclasses import replace

import pytest
import torch
from helpers.models import small_gpt2, small_llama

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import EdgeMask, load_mask, lowest_cut, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph, describe
from circuit_breaking.runs.mask_record import MaskRecord
from circuit_breaking.runs.tensors import write_tensors


def test_round_clamp_and_count():
    mask = EdgeMask(EdgeGraph(1, 1))
    with torch.no_grad():
        mask.weights.copy_(torch.tensor([-1.0, 0.2, 0.5, 0.7, 3.0, 0.49]))
    mask.clamp_()
    assert mask.weights.min() == 0 and mask.weights.max() == 1 and mask.n_cut() == 3
    assert mask.cut_edges() == [mask.graph.edges[i] for i in (0, 1, 5)]
    mask.round_()
    assert mask.weights.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 6])
def test_budget_keeps_its_promise(budget):
    mask = EdgeMask(EdgeGraph(1, 1))
    with torch.no_grad():
        mask.weights.copy_(torch.tensor([0.3, 0.1, 0.9, 0.3, 1.0, 0.5]))
    mask.keep_budget_(budget)
    assert mask.n_cut() == min(budget, 3)  # never more, and never an edge that rounding would keep
    expected = {0: [], 1: [1], 2: [0, 1], 3: [0, 1, 3], 6: [0, 1, 3]}[budget]
    assert (mask.weights == 0).nonzero()[:, 0].tolist() == expected


def test_ties_go_by_order():
    assert lowest_cut(torch.zeros(1000), 3).nonzero()[:, 0].tolist() == list(range(3, 1000))


def test_cut_by_name_and_reset():
    mask = EdgeMask(EdgeGraph(2, 2))
    mask.cut_(["m0->a1.0", "embed->output"])
    assert mask.cut_edges() == ["m0->a1.0", "embed->output"]
    with pytest.raises(UserError, match="no reader"):
        mask.cut_(["m0->a9.0"])
    mask.reset_()
    assert mask.n_cut() == 0


def test_file_round_trip(tmp_path, family):
    model = load_model(family(), device="cpu")
    torch.manual_seed(0)
    weights = torch.rand_like(model.mask.weights)
    model.mask.weights.data.copy_(weights)
    record = MaskRecord(budget=3, seed=1, results={"note": "x"})
    save_mask(tmp_path / "mask.safetensors", model, record)
    model.mask.reset_()
    found = load_mask(tmp_path / "mask.safetensors", model)
    assert torch.equal(model.mask.weights, weights) and found.results["note"] == "x" and found.graph["n_layers"] == 3
    assert found == replace(record, model=model.name, graph=describe(model.graph))


def test_files_of_others_are_refused(tmp_path):
    path, model = tmp_path / "mask.safetensors", load_model(small_gpt2(), device="cpu")
    with pytest.raises(UserError, match="no file"):
        load_mask(path, model)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_mask(path, model)
    write_tensors(path, {"other": torch.zeros(3)})
    with pytest.raises(UserError, match="no edge mask"):
        load_mask(path, model)
    save_mask(path, load_model(small_llama(), device="cpu"))
    with pytest.raises(UserError, match="another model"):
        load_mask(path, model)
    save_mask(path, load_model(small_gpt2(), split_qkv=True, device="cpu"))
    with pytest.raises(UserError, match="split_qkv True there, False here"):
        load_mask(path, model)
    model.mask.weights.data[0] = float("nan")
    save_mask(path, model)
    with pytest.raises(UserError, match="outside"):
        load_mask(path, model)
