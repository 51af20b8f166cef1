"""Records of masks, means and lists of edges: what is read from them, of this release and of the one before."""

import pytest
import torch
from helpers.models import small_gpt2
from helpers.records import EDGES, SHAPE

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, read_ablated, save_ablated
from circuit_breaking.ablation.weight_mask import (
    WeightMask,
    find_matrices,
    load_weight_mask,
    shape_hash,
    shares,
)
from circuit_breaking.engine.ablation_values import load_means, read_value, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, read_cut_edges, read_mask_record, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import engines_of, find_folders, load_masked, read_mask
from circuit_breaking.graph import EdgeGraph, describe, from_description
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.files import write_json
from circuit_breaking.runs.mask_record import (
    AblationValueRecord,
    CutEdges,
    KeptEdges,
    MaskRecord,
    MeansRecord,
    read_edges_of_interest,
    write_edges,
)
from circuit_breaking.runs.records import note_old
from circuit_breaking.runs.sweep import results_of
from circuit_breaking.runs.tensors import digest_of, read_tensors, write_tensors


@pytest.fixture(autouse=True)
def _notes_are_said_again():
    note_old.cache_clear()


def refused(load, message):
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "\n" not in str(error.value)


# Masks and what their cut edges carry


@pytest.fixture
def model():
    return load_model(small_gpt2(), device="cpu")


def old_mask(path, model, settings, **more):
    """A mask as the release before records wrote it: the settings of train_mask.py are its record."""
    about = {"model": "small", "graph": describe(model.graph), "settings": settings, "inputs": {"x": "00"}, **more}
    write_tensors(path, {"weights": model.mask.weights}, about)


def test_a_mask_of_the_release_before_is_read_with_a_note(tmp_path, model, capsys):
    save_means(tmp_path / "means", model, torch.ones(len(model.graph.sources), 24))
    model.mask.cut_(EDGES)
    common = {"model": "tiny", "max_edges": 5, "seed": 3, "method": "clamped", "length": 18, "toxic_test": "t.jsonl"}
    means = {**common, "means": str(tmp_path / "means")}
    losses = {"before": {"toxic": 1.5}}
    for settings, more, kind in (
        ({**common, "means": None, "means_lr": 0.1}, {}, "zero"),
        ({**means, "means_lr": 0.0}, {}, "mean"),
        ({**means, "means_lr": 0.1}, {}, "optimal"),
        ({**means, "training": {"means_lr": 0.1}}, {"kind": "random", "carry": "optimal"}, "optimal"),
    ):
        old_mask(tmp_path / "mask", model, settings, losses=losses, **more)
        note_old.cache_clear()
        record = read_mask_record(tmp_path / "mask")
        said = capsys.readouterr().err
        assert said.startswith("note: ") and "mask has the format of an older release" in said and said.count("\n") == 1
        assert record.ablation_value.kind == kind and record.role == more.get("kind", "mask")
        assert record.ablation_value.path == settings["means"]
        assert (record.model, record.budget, record.seed, record.losses) == ("tiny", 5, 3, losses)
        assert record.data == {"length": 18, "toxic_test": "t.jsonl"} and record.provenance["inputs"] == {"x": "00"}
        compared = read_mask("one", tmp_path / "mask", lambda split: model)
        assert compared.edges == EDGES and compared.about["ablation"] == kind and compared.kind == record.role
        assert (compared.means is None) == (kind == "zero")
    old_mask(tmp_path / "mask", model, {"means": 3})
    refused(lambda: read_mask_record(tmp_path / "mask"), "names no file of means, but 3")
    write_tensors(tmp_path / "mask", {"weights": model.mask.weights}, {"settings": common})
    refused(lambda: load_mask(tmp_path / "mask", model), "holds no edge mask")


def test_means_and_weight_masks_of_the_release_before(tmp_path, model, capsys):
    about = {"model": "small", "graph": describe(model.graph), "settings": {"kind": "mean"}, "num_texts": 7}
    write_tensors(tmp_path / "means", {"means": torch.ones(len(model.graph.sources), 24)}, about)
    record = load_means(tmp_path / "means", model)
    assert record.num_texts == 7 and record.provenance == {"settings": {"kind": "mean"}}
    hf = small_gpt2()
    units = {find_matrices(hf, "neuron")[0].name: torch.tensor([1, 5])}
    told = {"format": "weight mask, version 1", "granularity": "neuron", "shape_hash": shape_hash(hf)}
    told |= {**shares(WeightMask("neuron", units), hf), "settings": {"lr": 1}, "model": "small"}
    write_tensors(tmp_path / "weights", units, told)
    assert load_weight_mask(tmp_path / "weights", hf).provenance == {"settings": {"lr": 1}}
    assert capsys.readouterr().err.count("older release") == 2


def test_a_mask_names_the_means_it_was_trained_with_and_no_others(tmp_path, model):
    path, means = tmp_path / "mask", torch.randn(len(model.graph.sources), 24)
    save_means(tmp_path / "means", model, means)
    load_means(tmp_path / "means", model)
    value = value_in(tmp_path / "means")
    assert value == AblationValueRecord("mean", str(tmp_path / "means"), digest_of(means))
    assert value_in(None) == AblationValueRecord() and value_in(tmp_path / "means", learned=True).kind == "optimal"
    refused(lambda: save_mask(path, model), "model.means says otherwise")
    save_mask(path, model, MaskRecord(ablation_value=value))
    engine = engines_of(small_gpt2())
    loaded, record = load_masked(path, engine)
    assert torch.equal(loaded.means, means) and record.ablation_value == value
    save_means(tmp_path / "means", model, means, MeansRecord(num_texts=3))  # another header, the same means
    load_masked(path, engine)
    save_means(tmp_path / "means", model, means + 1)
    refused(lambda: load_masked(path, engine), "holds other means than those that .*mask was trained with")
    assert torch.equal(load_masked(path, engine, tmp_path / "means")[0].means, means + 1)  # where it is asked for
    (tmp_path / "means").unlink()
    refused(lambda: load_masked(path, engine), "no file .*means. It was used in training")
    refused(lambda: read_value(AblationValueRecord("mean"), path, 0), "does not say which file")
    save_means(tmp_path / "means", model, torch.zeros(5, len(model.graph.sources), 24))
    assert value_in(tmp_path / "means").kind == "position"


def test_a_mask_says_that_cut_edges_carry_outputs_on_counterfactuals(tmp_path, model):
    path, value = tmp_path / "mask.safetensors", value_in(None, resample=True)
    assert value == AblationValueRecord("counterfactual")
    refused(lambda: save_mask(path, model, MaskRecord(ablation_value=value)), "model.resample is False")
    model.resample = True
    refused(lambda: save_mask(path, model), r"carry zero, and model.resample is True.*resample=True")
    save_mask(path, model, MaskRecord(ablation_value=value))
    engine = engines_of(small_gpt2())
    loaded, record = load_masked(path, engine)
    assert loaded.resample and loaded.means is None and record.ablation_value == value
    for cuts_a_stock_model in (lambda: read_mask("run", path, engine), lambda: ablate(small_gpt2(), path)):
        refused(cuts_a_stock_model, "outputs on counterfactual prompts.*ioi/evaluation.py, or give means")
    # beside them, means for texts without a counterfactual
    save_means(tmp_path / "means", model, means := torch.randn(len(model.graph.sources), 24))
    value = value_in(tmp_path / "means", resample=True)
    assert value == AblationValueRecord("counterfactual", str(tmp_path / "means"), digest_of(means))
    refused(lambda: save_mask(path, model, MaskRecord(ablation_value=value)), "model.means says otherwise")
    load_means(tmp_path / "means", model)
    refused(lambda: save_mask(path, model, MaskRecord(ablation_value=record.ablation_value)), "means says otherwise")
    save_mask(path, model, MaskRecord(ablation_value=value))
    loaded, _ = load_masked(path, engine)
    assert loaded.resample and torch.equal(loaded.means, means)
    loaded, _ = load_masked(path, engine, tmp_path / "means")  # in their place
    assert not loaded.resample and torch.equal(loaded.means, means)
    assert read_mask("run", path, engine, tmp_path / "means").about["ablation"] == "mean"


def test_cut_edges_are_those_of_the_weights(tmp_path, model):
    model.mask.cut_(EDGES)
    save_mask(tmp_path / "mask", model)
    edges, record = read_cut_edges(tmp_path / "mask")
    assert sorted(edges) == sorted(EDGES) and record.graph == SHAPE
    weights, header = read_tensors(tmp_path / "mask")
    for changes in ({"n_layers": 10**9}, {"n_heads": 4}, {"n_heads": True}, {"n_edges": 3}, {"split_qkv": 1}):
        graph = {**SHAPE, **changes}
        write_tensors(tmp_path / "mask", weights, {**header, "graph": graph})
        refused(lambda: read_cut_edges(tmp_path / "mask"), "damaged|another shape")
    for graph in (EdgeGraph(), EdgeGraph(12, 12, True), EdgeGraph(2, 3, True, True), EdgeGraph(0, 1)):
        assert from_description(describe(graph)) == graph


# Lists of edges


def test_a_run_has_one_list_of_edges(tmp_path):
    write_edges(tmp_path, EDGES)
    assert CutEdges.read(tmp_path / "edges.json").edges == EDGES == read_edges_of_interest(tmp_path)
    write_edges(tmp_path, EDGES[:1], kept=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept_edges.json"]
    assert read_edges_of_interest(tmp_path) == EDGES[:1]
    write_edges(tmp_path, EDGES)
    assert [path.name for path in tmp_path.iterdir()] == ["edges.json"]


def test_bare_lists_of_the_release_before(tmp_path, capsys):
    write_json(tmp_path / "edges.json", EDGES)
    assert CutEdges.read(tmp_path / "edges.json").edges == EDGES
    assert "edges.json has the format of an older release" in capsys.readouterr().err
    assert results_of(tmp_path) == {"edges_cut": 2}
    # of a sufficient circuit: the list holds what is kept, and graph.json beside it says so
    write_json(tmp_path / "graph.json", {"graph": SHAPE, "what": "kept", "edges": dict.fromkeys(EDGES, 0.5)})
    refused(lambda: CutEdges.read(tmp_path / "edges.json"), "holds edges that a sufficient circuit keeps")
    refused(lambda: results_of(tmp_path), "holds edges that a sufficient circuit keeps")
    assert read_edges_of_interest(tmp_path) == EDGES
    for value in ({"edges": EDGES}, [1], "x", None):
        write_json(tmp_path / "edges.json", value)
        refused(lambda: CutEdges.read(tmp_path / "edges.json"), "holds no list of edges")


def test_kept_edges_are_not_taken_for_cut_ones(tmp_path):
    KeptEdges(edges=EDGES).write(tmp_path / "kept_edges.json")
    assert results_of(tmp_path) == {"edges_kept": 2}
    KeptEdges(edges=EDGES).write(tmp_path / "edges.json")  # someone renamed the file
    message = "edges.json holds a record of 'kept edges', and 'cut edges' is needed"
    refused(lambda: CutEdges.read(tmp_path / "edges.json"), message)
    refused(lambda: results_of(tmp_path), message)
    (tmp_path / "kept_edges.json").unlink()
    refused(lambda: read_edges_of_interest(tmp_path), message)
    KeptEdges(edges=EDGES).write(tmp_path / "ablation.json")
    refused(lambda: load_ablated(tmp_path), "holds a record of 'kept edges', and 'ablated model' is needed")
    CutEdges(edges=EDGES).write(tmp_path / "kept_edges.json")
    refused(lambda: KeptEdges.read(tmp_path / "kept_edges.json"), "holds a record of 'cut edges'")


def test_a_folder_with_lists_alone_is_no_model(tmp_path):
    for record in (KeptEdges(edges=EDGES), CutEdges(edges=EDGES)):
        record.write(tmp_path / "run" / "edges.json")
        refused(lambda: find_folders([tmp_path / "run"]), "holds no model to compare")


# Saved ablated models


def test_an_ablated_model_of_the_release_before(tmp_path, capsys):
    folder = tmp_path / "model"
    save_hf_folder(folder / "base", small_gpt2())
    shape = {"model_type": "gpt2", "n_layers": 3, "n_heads": 3, "width": 24}
    old = {"format": "edge-ablated model, version 1", "cut_edges_carry": "zero"}
    old |= {"base": None, "shape": shape, "edges": EDGES, "about": {"found": "here"}, "results": {}}
    write_json(folder / "edges.json", old)
    assert read_ablated(folder).about == {"found": "here"}
    assert "edges.json has the format of an older release" in capsys.readouterr().err
    assert load_ablated(folder, "cpu").edge_cuts.edges == EDGES
    assert list(find_folders([tmp_path])) == ["model"]
    for changes in ({"format": "edge-ablated model, version 3"}, {"cut_edges_carry": "x"}, {"edges": 3}):
        write_json(folder / "edges.json", {**old, **changes})
        refused(lambda: read_ablated(folder), "no saved ablated model|damaged")
    write_json(folder / "edges.json", old)
    save_ablated(folder, small_gpt2(), EDGES[:1])  # what is there is ours, and is replaced
    assert read_ablated(folder).edges == EDGES[:1] and not (folder / "edges.json").exists()
