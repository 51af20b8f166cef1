"""Records: each comes back from its file, an unknown version is refused, and files of the release before are read."""

import dataclasses
import json

import pytest
import torch
from helpers.models import small_gpt2
from helpers.records import EDGES, SHAPE

from circuit_breaking.ablation.config import EdgeAblation
from circuit_breaking.ablation.old_format import AblatedModelRecord
from circuit_breaking.ablation.weight_mask import (
    WeightMaskRecord,
)
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import read_mask_record, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.controls import random_edges
from circuit_breaking.evaluation.result_files import read_evidence, read_report
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.files import read_json, write_json
from circuit_breaking.runs.ioi_results import (
    Covering,
    Faithfulness,
    GraphRecord,
    IOIComparison,
    IOIReport,
    KnownCircuit,
    NextTokens,
    Stages,
)
from circuit_breaking.runs.mask_record import AblationValueRecord, CutEdges, KeptEdges, MaskRecord, MeansRecord
from circuit_breaking.runs.mnist_results import EdgesByMask, MnistMasks, MnistReport, NetworkRecord
from circuit_breaking.runs.records import RunSettings, fingerprint, note_old, read_value
from circuit_breaking.runs.results import Comparison, Evidence, FineTuning, MethodComparison, Relearning, Report
from circuit_breaking.runs.run_folder import is_up_to_date
from circuit_breaking.runs.sweep import results_of
from circuit_breaking.runs.tensors import read_tensors, write_tensors

RUN = {"settings": {"lr": 0.1}, "inputs": {"x": "00"}, "git_commit": None}
GRAPH = {"graph": SHAPE, "what": "kept", "edges": {"embed->a1.0": 0.5}}
RECORDS = [
    MaskRecord(
        model="m", graph=SHAPE, role="random", method="clamped", budget=12, seed=3, losses={"before": {"x": 1.5}},
        ablation_value=AblationValueRecord("optimal", "means.safetensors", "ff"), results={"kind": "outside"},
        data={"length": 50}, made_from="00", provenance=RUN,
    ),
    MeansRecord(model="m", graph=SHAPE, num_texts=7, made_from="00", provenance=RUN),
    WeightMaskRecord(granularity="head", shape_hash="00", units=1, all_units=2, weights=3, all_weights=4, model="m"),
    EdgeAblation(base_model_type="gpt2", edges=EDGES, ablation="mean", ablate_from=1, about={"a": 1}, results={"b": 2}),
    AblatedModelRecord(base="tiny", shape={"n_layers": 3}, edges=EDGES, ablation="mean", about={"a": 1}),
    CutEdges(edges=EDGES),
    KeptEdges(edges=EDGES),
    RunSettings(script="toxicity/train_mask.py", provenance=RUN),
    Report(models={"original": {"losses": {}}}, model="tiny", samples=5, edges=EDGES, n_edges=9, provenance=RUN),
    Evidence(masks={"a": {"edges": []}}, stability=[{"jaccard": 0.5}], provenance=RUN),
    Relearning(models={"a": {"note": None}}, provenance=RUN),
    Comparison(pareto={"on_front": True}, random_edges=[{"budget": 1}]),
    MethodComparison(original={"toxic": 1.5}, masks=[{"method": "clamped"}], texts_seen={"refined": 3}),
    FineTuning(method="joint", chosen={"lr": 0.1}, lrs=[0.1, 1], made_from="00"),
    IOIReport(models={"original": {"edges_cut": 0}}, measured_on={"prompts": 3}),
    IOIComparison(original={"accuracy": 1.0}, methods={"EAP": [{"n_cut": 1}]}, n_edges=9, seconds={"EAP": 0.5}),
    Covering(before={"accuracy": 1.0}, masks=[{"breaks": True}], union={"edges": EDGES}),
    GraphRecord(**GRAPH),
    KnownCircuit(**GRAPH, classes={"mover": ["a1.0"]}, in_circuit=[], overlap={"edges": {}}),
    NextTokens(prompt="a", IO="b", S="c", models={"original": [{"token": "b", "probability": 0.5}]}),
    Stages(faithful=0.9, n_edges=9, stages=[{"kept": 3, "share": 1.0}]),
    MnistReport(
        script="mnist/main.py", source="digits", side=8, groups=[[0, 3]], target_class=3, target_group=0, mates=[0],
        edges={"first layer": 9}, images={"train": 3}, test_accuracy=0.5, results={"original": {"edges cut": 0}},
        seconds={"all": 1}, device="cpu",
    ),
    NetworkRecord(source="digits", side=8, seed=0, target_class=3, n_bad=30),
    MnistMasks(provenance=RUN),
    EdgesByMask(masks={"naive": ["x0.0->h1"]}),
]  # fmt: skip
NAMES = [type(record).__name__ for record in RECORDS]


@pytest.fixture(autouse=True)
def _notes_are_said_again():
    note_old.cache_clear()


def refused(load, message):
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "\n" not in str(error.value)


# All records


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_a_record_comes_back_from_its_file(tmp_path, record, capsys):
    path = tmp_path / "file.json"
    record.write(path)
    assert list(read_json(path))[:2] == ["record", "version"]
    assert type(record).read(path) == record
    write_tensors(tmp_path / "file.safetensors", {}, record.to_json())
    assert type(record).from_json(read_tensors(tmp_path / "file.safetensors")[1], path) == record
    assert capsys.readouterr().err == ""


def test_every_format_has_a_name_of_its_own():
    assert len({record.NAME for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
@pytest.mark.parametrize("version", [0, "next", "1", 1.0, True, None])
def test_an_unknown_version_is_refused(tmp_path, record, version):
    path, version = tmp_path / "file.json", record.VERSION + 1 if version == "next" else version
    write_json(path, {**record.to_json(), "version": version})
    refused(lambda: type(record).read(path, "Make it."), f"file.json is version {version!r} of the format .*reads vers"
            f"ion {record.VERSION}. Make it.")  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_another_record_and_a_damaged_one_are_refused(tmp_path, record):
    path, kind = tmp_path / "file.json", type(record)
    write_json(path, {**record.to_json(), "record": "other"})
    refused(lambda: kind.read(path), f"holds a record of 'other', and '{kind.NAME}' is needed")
    write_json(path, {**record.to_json(), "more": 1})
    refused(lambda: kind.read(path), "damaged: it holds 'more'")
    for field in dataclasses.fields(record):
        whole = record.to_json()
        lacking = {key: value for key, value in whole.items() if key != field.name}
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        write_json(path, lacking)
        if needed:
            refused(lambda: kind.read(path), f"damaged: it lacks '{field.name}'")
        else:
            kind.read(path)
        if field.name != "granularity":  # any value, for what masks its own check names
            write_json(path, {**whole, field.name: [["x"]]})
            refused(lambda: kind.read(path), f"damaged: .*({field.name}|no JSON object)")
    for value in ([], "x", 3, None):
        write_json(path, value)
        if not (kind in (CutEdges, KeptEdges) and value == []):
            refused(lambda: kind.read(path), ".")


# Results of the release before


@pytest.fixture
def model():
    return load_model(small_gpt2(), device="cpu")


def test_results_of_the_release_before_have_new_names(tmp_path, capsys):
    told = {"settings": {"model": "tiny", "samples": 5, "seeds": 2}, "inputs": {}}
    one = {"kind": "mask", "carry": "mean", "touched": {"edges": 0.5}, "losses": {}, "continuations": {}}
    write_json(tmp_path / "report.json", {"models": {"ablated": one}, "reference": "original", **told})
    report = Report.read(tmp_path / "report.json")
    assert (report.model, report.samples, report.seeds, report.provenance) == ("tiny", 5, 2, told)
    found = read_report(tmp_path)
    expected = {"kind": "mask", "ablation": "mean", "changed_share": {"edges": 0.5}, "losses": {}, "continuations": {}}
    assert found["models"] == {"ablated": expected}
    assert (found["model"], found["samples"], found["seeds"]) == ("tiny", 5, 2)
    report.write(tmp_path / "report.json")
    assert read_report(tmp_path)["models"] == found["models"] and read_report(tmp_path)["samples"] == 5
    write_json(tmp_path / "report.json", {**report.to_json(), "version": 2})
    refused(lambda: read_report(tmp_path), "is version 2 of the format")
    both = {name: dict.fromkeys(("value", "low", "high"), 0.5) for name in ("toxic", "ordinary")}
    edges = [{"edge": EDGES[0], "within": both, "alone": both}]
    write_json(
        tmp_path / "evidence.json",
        {"masks": {"m": {"carry": "zero", "together": both, "edges": edges}}, "stability": []},
    )
    evidence = read_evidence(tmp_path)
    assert list(evidence["masks"]["m"]["edges"][0]) == ["edge", "restore_effect", "single_cut_effect"]
    assert evidence["masks"]["m"]["ablation"] == "zero"
    write_json(tmp_path / "settings.json", {"settings": {"lr": 1}, "inputs": {}})
    assert RunSettings.read(tmp_path / "settings.json").provenance == {"settings": {"lr": 1}, "inputs": {}}
    write_json(tmp_path / "settings.json", {"lr": 1})  # of the MNIST scripts
    assert RunSettings.read(tmp_path / "settings.json").provenance == {"settings": {"lr": 1}}
    assert capsys.readouterr().err.count("older release") == 3  # once a file


def test_sweeps_take_numbers_from_reports_alone(tmp_path):
    record = next(record for record in RECORDS if isinstance(record, MnistReport))
    record.write(tmp_path / "mnist_report.json")
    found = results_of(tmp_path)
    assert found["test_accuracy"] == 0.5 and "version" not in found
    assert not any(key.startswith("provenance") for key in found)
    write_json(tmp_path / "mnist_report.json", {**record.to_json(), "version": 9})
    refused(lambda: results_of(tmp_path), "is version 9 of the format")
    # what the MNIST scripts of the release before called edges.json and mask.safetensors
    (tmp_path / "mnist_report.json").unlink()
    write_json(tmp_path / "edges.json", {"naive": ["x0.0->h1"]})
    write_tensors(tmp_path / "mask.safetensors", {"naive": torch.ones(3)}, {"settings": {}})
    assert results_of(tmp_path) == {}


# Up to date, and random edges


def test_what_was_made_from_the_same_is_up_to_date(tmp_path, model, capsys):
    key = fingerprint({"b": 1, "a": [1, 2]})
    assert key == fingerprint(json.loads('{"a": [1, 2], "b": 1}')) != fingerprint({"a": [1, 2], "b": 2})
    path = tmp_path / "mask"
    assert not is_up_to_date(path, key, read_mask_record)
    save_mask(path, model, MaskRecord(made_from=key))
    assert is_up_to_date(path, key, read_mask_record) and not is_up_to_date(path, "0", read_mask_record)
    save_mask(path, model)
    assert not is_up_to_date(path, key, read_mask_record)
    path.write_bytes(b"no")
    assert not is_up_to_date(path, key, read_mask_record) and "made again: " in capsys.readouterr().err


def test_random_edges():
    graph = EdgeGraph(4, 4)
    drawn = random_edges(graph, 12, seed=0)
    assert len(set(drawn)) == 12 and all(edge in graph for edge in drawn)
    assert drawn == random_edges(graph, 12, 0) != random_edges(graph, 12, 1)
    assert random_edges(graph, 12, 0, budget=12) == drawn != random_edges(graph, 12, 0, budget=13)
    assert set(random_edges(graph, len(graph), 0)) == set(graph.edges)
    refused(lambda: random_edges(graph, len(graph) + 1, 0), "random edges were asked for")


def test_integrated_mask_gradients_have_their_name_in_older_results(tmp_path, capsys):
    """Version 1 called them EAP-IG, which is something else."""
    rows, path = [{"n_cut": 1}], tmp_path / "ioi_comparison.json"
    old = {"original": {"accuracy": 1.0}, "methods": {"EAP": rows, "EAP-IG": rows}, "seconds": {"EAP-IG": 0.5}}
    for value in ({"record": "IOI comparison", "version": 1, **old}, old):
        write_json(path, value)
        for found in (IOIComparison.read(path).to_json(), read_value(path, "", IOIComparison)):
            assert list(found["methods"]) == ["EAP", "integrated mask gradients"]
            assert found["seconds"] == {"integrated mask gradients": 0.5}
    assert "older release" in capsys.readouterr().err
    circuits = {"EAP-IG": {"cpr": 1.0}, "random": {"cpr": 0.5}}
    about = {"record": "faithfulness", "task": "ioi", "n_edges": 9, "num_prompts": 3, "circuits": circuits}
    write_json(path, {**about, "version": 1})
    assert list(Faithfulness.read(path).circuits) == ["integrated mask gradients", "random"]
    write_json(path, {**about, "version": 2})
    assert list(Faithfulness.read(path).circuits) == ["EAP-IG", "random"]
    write_json(path, {**about, "version": 3})
    with pytest.raises(UserError, match="is version 3 of the format"):
        Faithfulness.read(path)
