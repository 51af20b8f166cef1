"""Models by their folders: found, read, opened, and what their edges are worth."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import save_small_model

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import save_ablated
from circuit_breaking.engine.ablation_values import load_means, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import ComparedModel, find_folders, read_compared_models
from circuit_breaking.evaluation.edge_effects import leave_one_out, stability
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.runs.cost import cost, resident, together
from circuit_breaking.runs.files import write_json
from circuit_breaking.runs.mask_record import MaskRecord, write_edges
from circuit_breaking.runs.results import FineTuning
from circuit_breaking.runs.tensors import read_tensors, write_tensors

EDGES = ["a0.1->m1", "m0->a2.0", "embed->output"]
TOKENS = torch.tensor([[0, 5, 7, 9, 11, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder of every kind."""
    folder = tmp_path_factory.mktemp("variants")
    save_small_model(folder / "base")
    engine = load_model(str(folder / "base"), device="cpu")
    torch.manual_seed(0)
    save_means(folder / "means.safetensors", engine, torch.randn(len(engine.graph.sources), 24))
    engine.mask.cut_(EDGES)
    record = MaskRecord(budget=5, seed=3)
    save_mask(folder / "all" / "zero" / "mask.safetensors", engine, record)
    write_edges(folder / "all" / "zero", EDGES)
    load_means(folder / "means.safetensors", engine)
    means = replace(record, role="random", ablation_value=value_in(folder / "means.safetensors"))
    save_mask(folder / "all" / "mean" / "mask.safetensors", engine, means)
    split = load_model(str(folder / "base"), split_qkv=True, device="cpu")
    split.mask.cut_(["m0->a2.0.q"])
    save_mask(folder / "all" / "split" / "mask.safetensors", split, record)
    save_ablated(folder / "all" / "saved", str(folder / "base"), EDGES)
    tuned = load_hf_model(str(folder / "base"), "cpu")
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight[:3] += 1
    tuned.save_pretrained(folder / "all" / "tuned")
    FineTuning(method="joint", note="short").write(folder / "all" / "tuned" / "finetuning.json")
    save_small_model(folder / "larger", n_layer=4)
    larger = load_model(str(folder / "larger"), device="cpu")
    save_mask(folder / "other" / "large" / "mask.safetensors", larger)
    return folder


def test_kinds_of_folders(folder):
    found = find_folders([folder / "all"])
    assert list(found) == ["mean", "saved", "split", "tuned", "zero"]
    assert find_folders([folder / "all" / "zero", folder / "all"])["zero"] == folder / "all" / "zero"
    with pytest.raises(UserError, match="holds no model to compare"):
        find_folders([folder / "all" / "nothing"])
    write_json(folder / "again" / "zero" / "mask.safetensors", 1)
    with pytest.raises(UserError, match="both called zero"):
        find_folders([folder / "all", folder / "again"])


def test_each_opens_as_the_model_it_is(folder):
    hf = load_hf_model(str(folder / "base"), "cpu")
    plain = hf(TOKENS).logits
    found = {one.name: one for one in read_compared_models(find_folders([folder / "all"]), hf)}
    assert {name: one.kind for name, one in found.items()} == {
        "mean": "random", "saved": "mask", "split": "mask", "tuned": "finetuned", "zero": "mask",
    }  # fmt: skip
    means = found["mean"].means
    expected = {"zero": (EDGES, None), "saved": (EDGES, None), "mean": (EDGES, means), "split": (["m0->a2.0.q"], None)}
    for name, (edges, carried) in expected.items():
        one = found[name]
        assert sorted(one.edges) == sorted(edges)
        with one.load(hf) as model:
            got = model(TOKENS).logits
        with ablate(hf, edges, carried):
            torch.testing.assert_close(got, hf(TOKENS).logits)
        assert not torch.allclose(got, plain, atol=1e-3)
        n_edges = len(load_model(hf, name == "split", "cpu").graph)
        assert one.changed_share(hf) == {"edges": len(edges) / n_edges, "parameters": 0.0}
        assert torch.equal(hf(TOKENS).logits, plain)
    assert found["zero"].about["budget"] == 5 and found["zero"].about["seed"] == 3
    assert found["mean"].about["ablation"] == "mean" and found["zero"].about["ablation"] == "zero"
    tuned = found["tuned"]
    total = sum(p.numel() for p in hf.parameters())
    assert tuned.changed_share(hf) == {"edges": 0.0, "parameters": pytest.approx(3 * 96 / total)}
    assert tuned.about == {"method": "joint", "note": "short"} and tuned.file.name == "model.safetensors"
    with tuned.load(hf) as model:
        assert model is not hf and not torch.allclose(model(TOKENS).logits, plain)
    with ComparedModel("original").load(hf) as model:
        assert model is hf


def test_a_mask_of_another_model_is_named(folder):
    hf = load_hf_model(str(folder / "base"), "cpu")
    with pytest.raises(UserError, match="made for another model"):
        read_compared_models(find_folders([folder / "other"]), hf)


# Evidence for each edge


def test_an_ablated_model_with_other_weights_is_refused(folder, tmp_path):
    """With the weights of the original, its cut edges would be another model than the saved one."""
    hf = load_hf_model(str(folder / "base"), "cpu")
    with ablate(hf, EDGES), torch.no_grad():
        hf.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
        hf.save_pretrained(tmp_path / "trained")
    original = load_hf_model(str(folder / "base"), "cpu")
    with pytest.raises(UserError, match="trained has other weights than the original"):
        read_compared_models({"trained": tmp_path / "trained"}, original)


def test_leave_one_out_against_plain_runs():
    hf = small_gpt2()
    texts = {name: pad_right([[0, *row] for row in rows], 0) for name, rows in (
        ("toxic", [[5, 9, 3], [8, 8], [1, 2, 3, 4]]), ("ordinary", [[7, 7, 7], [30, 20, 10]]),
    )}  # fmt: skip
    untouched = copy.deepcopy(hf)
    report = leave_one_out(ComparedModel("mask", edges=EDGES), hf, texts, batch_size=2)
    json.dumps(report, allow_nan=False)

    def loss(name, cut):
        with ablate(untouched, cut):
            sums, counts = text_losses(untouched, texts[name])
        return sums.sum() / counts.sum()

    assert [row["edge"] for row in report["edges"]] == EDGES
    for name in texts:
        assert report["together"][name]["value"] == pytest.approx(loss(name, EDGES) - loss(name, []))
        for row in report["edges"]:
            others = [edge for edge in EDGES if edge != row["edge"]]
            assert row["restore_effect"][name]["value"] == pytest.approx(
                loss(name, EDGES) - loss(name, others), abs=1e-6
            )
            assert row["single_cut_effect"][name]["value"] == pytest.approx(
                loss(name, [row["edge"]]) - loss(name, []), abs=1e-6
            )
            assert (
                row["restore_effect"][name]["low"]
                <= row["restore_effect"][name]["value"]
                <= row["restore_effect"][name]["high"]
            )


def test_stability_groups_masks_that_differ_in_seed():
    def mask(name, edges, ablation="zero", budget=2, kind="mask"):
        return ComparedModel(name, kind, edges=edges, about={"ablation": ablation, "budget": budget, "n_edges": 10})

    masks = [mask("a", ["x", "y"]), mask("b", ["x", "z"]), mask("c", ["x", "y"]), mask("alone", ["x"], "mean")]
    masks += [mask("other", ["x"], budget=1), mask("chance", ["q", "r"], kind="random")]
    (row,) = stability(masks)
    assert row["masks"] == ["a", "b", "c"] and row["jaccard"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert row["chosen_by"] == {"x": 3, "y": 2, "z": 1}
    assert row["by_chance"] == pytest.approx((1 * 1 + 16 * (1 / 3) + 28 * 0) / 45)  # of 45 pairs of edges
    assert not {"sweep", "method"} & row.keys()
    for model in masks[:2]:
        model.about |= {"sweep": "first", "method": "ranking"}
    (row,) = stability(masks)
    assert row["masks"] == ["a", "b"] and (row["sweep"], row["method"]) == ("first", "ranking")


# Files and costs


def test_tensors_are_written_the_same_each_time(tmp_path):
    contents = set()
    for number in range(8):
        write_tensors(tmp_path / f"{number}.safetensors", {"b": torch.ones(2), "a": torch.zeros(1)}, {"x": 1, "y": [2]})
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    assert read_tensors(tmp_path / "0.safetensors")[1] == {"x": 1, "y": [2]}


def test_costs_are_measured():
    with cost() as spent:
        held = [torch.ones(8_000_000) for _ in range(2)]  # 64 MB
        del held
    assert 0 < spent["seconds"] < 60 and spent["cpu_seconds"] >= 0
    if resident() is None:
        assert spent["peak_gb"] is None
    else:
        assert 0.03 < spent["peak_gb"] < 0.3
    with cost() as small:
        pass
    assert small["peak_gb"] is None or small["peak_gb"] < 0.03  # what was freed before does not count


def test_costs_add_up():
    one, other = (
        {"seconds": 1.1, "cpu_seconds": 2.0, "peak_gb": 0.5},
        {"seconds": 2.2, "cpu_seconds": 3, "peak_gb": 0.4},
    )
    assert together(one, other) == {"seconds": 3.3, "cpu_seconds": 5.0, "peak_gb": 0.5}
    unknown = {"cpu_seconds": None, "peak_gb": None}
    assert together(one, {**other, **unknown}) == {"seconds": 3.3, **unknown}
