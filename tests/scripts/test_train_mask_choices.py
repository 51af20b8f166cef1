"""Which edges `toxicity/train_mask.py` may cut, from which mask it starts, and what it measures meanwhile."""

import pytest
import torch
from helpers.scripts import load_script, save_toxic_data
from helpers.tasks import SHORT_CHOICE

from circuit_breaking.engine.ablation_values import read_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.runs.circuit_files import write_circuit
from circuit_breaking.runs.circuits import Circuit
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.mask_record import ControlRecord, CutEdges, MeansRecord
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.tasks import OWTTask
from circuit_breaking.training.localise import localise
from circuit_breaking.training.prefix_choice import PrefixChoice

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
script = load_script("toxicity/train_mask.py")
alternative = load_script("ioi/alternative_masks.py")


@pytest.fixture(autouse=True)
def as_many_edges_as_allowed(monkeypatch):
    """These tests ask which edges are cut: in so few steps, it may be that none is worth cutting."""
    monkeypatch.setattr(PrefixChoice, "length", lambda self, budget: budget)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_toxic_data(tmp_path_factory.mktemp("data"))


def train(data, out, run, **changes):
    """The edges that a run cuts, and its folder."""
    given = {
        "model": str(data / "model"), "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl",
        "ordinary": str(data / "plain.txt"), "out": out, "run": run, "steps": 4, "batch_size": 3, "max_edges": 3,
        "budgets": (2,), "num_texts": 5, "device": "cpu", "constants_lr": 0.0, **changes,
    }  # fmt: skip
    script.main(script.Settings(**given))
    return CutEdges.read(out / run / "edges.json").edges, out / run


def test_only_edges_of_a_circuit_are_cut(data, tmp_path):
    graph = load_model(str(data / "model"), device="cpu").graph
    kept = torch.zeros(len(graph), dtype=torch.bool)
    kept[[1, 4, 7, 9]] = True
    write_circuit(tmp_path / "circuit.json", Circuit(graph, kept), d_model=24)
    names = {str(graph.edges[at]) for at in (1, 4, 7, 9)}
    edges, folder = train(data, tmp_path, "circuit", inside=tmp_path / "circuit.json")
    assert len(edges) == 3 and set(edges) < names
    again, _ = train(data, tmp_path, "mask", inside=folder / "mask.safetensors", max_edges=2)
    assert len(again) == 2 and set(again) < set(edges)
    listed, _ = train(data, tmp_path, "list", inside=folder / "edges.json", max_edges=2)
    assert listed == again
    with pytest.raises(UserError, match="Give one of them"):
        train(data, tmp_path, "both", inside=folder / "edges.json", localise="eap")


@pytest.mark.parametrize("way", ["eap", "random"])
def test_localise_then_train(data, tmp_path, way):
    edges, _ = train(data, tmp_path, way, localise=way, localise_edges=4)
    assert len(edges) == 3
    if way == "random":
        model = load_model(str(data / "model"), device="cpu")
        allowed = localise(model, None, None, script.Settings(), "random", 4)
        assert int(allowed.sum()) == 4 and set(edges) < {str(model.graph.edges[at]) for at in allowed.nonzero()[:, 0]}
        for wrong, message in ((("eap", 0), "0 edges cannot be localised"), (("guess", 3), "no way 'guess'")):
            with pytest.raises(UserError, match=message):
                localise(model, None, None, script.Settings(), *wrong)


def test_controls_of_learned_constants_lie_beside_the_mask_of_the_largest_budget(data, tmp_path):
    model, means = load_model(str(data / "model"), device="cpu"), tmp_path / "means.safetensors"
    average = torch.randn(len(model.graph.sources), 24, generator=torch.Generator().manual_seed(0))
    model.ablate_from = 1
    save_means(means, model, average, MeansRecord(num_texts=7))
    edges, folder = train(data, tmp_path, "learned", means=means, constants_lr=0.05, constants_steps=1)
    mask = folder / "masks/ranking_3"
    learned = read_means(mask / "means.safetensors")[0]
    for name, removes in (("bias", False), ("added", False), ("mean", True)):
        place = folder / f"masks/ranking_3_{name}"
        control = ControlRecord.read(place / "control.json")
        assert control.edges == edges and control.removes == removes and control.ablate_from == 1
        values = {"bias": learned - average, "added": learned, "mean": average}[name]
        torch.testing.assert_close(read_means(place / "means.safetensors")[0], values)
    assert not list(folder.glob("masks/ranking_2_*"))
    _, folder = train(data, tmp_path, "fixed", means=means)
    assert not list(folder.glob("masks/*_bias"))
    # constants of an earlier training are no mean outputs
    _, folder = train(data, tmp_path, "again", means=mask / "means.safetensors", constants_lr=0.05, constants_steps=1)
    assert list(folder.glob("masks/ranking_3/means.safetensors")) and not list(folder.glob("masks/*_bias"))


def test_constants_are_learned_by_default_in_any_model_but_the_shipped_one(data, tmp_path):
    edges, folder = train(data, tmp_path, "run", constants_lr=None, constants_steps=1)
    settings = RunSettings.read(folder / "settings.json").provenance["settings"]
    assert (settings["constants_lr"], settings["constants_loss"], settings["means"]) == (0.02, "objective", None)
    assert read_mask_record(folder / "mask.safetensors").ablation_value.kind == "optimal"
    # they start from mean outputs, which make controls possible
    averages, record = read_means(folder / "mean_outputs.safetensors")
    model = load_model(str(data / "model"), device="cpu")
    model.ablate_from = 1
    ordinary = OWTTask(load_tokenizer(str(data / "model")), str(data / "plain.txt"), 50)
    torch.testing.assert_close(averages, ordinary.compute_means(model, record.num_texts))
    learned = read_means(folder / "masks/ranking_3/means.safetensors")[0]
    bias = read_means(folder / "masks/ranking_3_bias/means.safetensors")[0]
    torch.testing.assert_close(bias, learned - averages)
    assert ControlRecord.read(folder / "masks/ranking_3_bias/control.json").edges == edges
    # a file of ablation values says what cut edges carry
    _, other = train(data, tmp_path, "fixed", constants_lr=None, means=folder / "mean_outputs.safetensors")
    assert read_mask_record(other / "mask.safetensors").ablation_value.kind == "mean"
    assert not (other / "means.safetensors").exists() and not (other / "mean_outputs.safetensors").exists()


def test_the_shipped_model_needs_no_constants():
    assert script.Settings().resolved().constants_lr == 0
    other = script.Settings(model="gpt2").resolved()
    assert (other.constants_lr, other.constants_loss) == (0.02, "objective")
    assert script.Settings(model="gpt2", constants_lr=0.0).resolved().constants_lr == 0
    assert script.Settings(constants_lr=0.1).resolved().constants_loss == "keep"


def test_a_run_starts_from_the_mask_of_another(data, tmp_path):
    edges, folder = train(data, tmp_path, "first")
    again, later = train(
        data, tmp_path, "more", from_mask=folder / "mask.safetensors", method="clamped", lr=1e-6, steps=2, eval_every=1
    )
    assert again == edges
    rows = read_jsonl(later / "metrics.jsonl")
    assert [sorted(row["held_out"]) for row in rows] == [["ordinary", "toxic"]] * 2
    plain = read_jsonl(folder / "metrics.jsonl")
    assert len(plain) == 4 + SHORT_CHOICE and not any("held_out" in row for row in plain)


def test_kinds_of_alternative_masks():
    assert set(alternative.KINDS) == {"necessary", "sufficient", "outside", "inside", "covering"}


def test_what_is_advised_where_nothing_is_cut_has_not_been_done_already(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PrefixChoice, "length", lambda self, budget: 0)
    for run, lr in (("fixed", 0.0), ("learned", None)):
        edges, _ = train(data, tmp_path, run, constants_lr=lr, constants_steps=1)
        said = capsys.readouterr().out
        assert not edges and "0 of" in said and script.NOTHING_CUT in said
        assert (script.LEARN_CONSTANTS in said) == (run == "fixed")
