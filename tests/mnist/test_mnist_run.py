"""The scripts on scikit-learn's small digits, end to end, and their promises on MNIST where its files are."""

import importlib.util
import json
import sys
import time
from dataclasses import fields

import pytest
import torch
from helpers.scripts import called

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import help_of, read_settings
from circuit_breaking.runs.files import ROOT, read_json, read_jsonl
from circuit_breaking.runs.tensors import read_tensors

pytestmark = pytest.mark.usefixtures("coarse_pictures")
sys.path.insert(0, str(ROOT / "mnist"))
FOLDERS = (ROOT / "data" / "mnist", ROOT.parent / "shared" / "data" / "mnist")
MNIST = next((folder for folder in FOLDERS if any(folder.glob("t10k*"))), None)
needs_mnist = pytest.mark.skipif(MNIST is None, reason="MNIST's IDX files are not in data/mnist")


def script(name):
    """A script of the folder as a module, under a name that no other folder's script has."""
    spec = importlib.util.spec_from_file_location(f"mnist_{name}", ROOT / "mnist" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


main, old, redraw = script("main"), script("old"), script("redraw")
SMALL = {"source": "digits"}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("mnist")
    begun = time.process_time()
    main.main(main.Settings(out=out, **SMALL))
    return out / "main", time.process_time() - begun


def test_small_digits_run_in_under_a_minute(digits_run):
    folder, seconds = digits_run
    assert seconds < 60
    report = read_json(folder / "mnist_report.json")
    assert "not MNIST" in report["source"]
    assert report["test_accuracy"] > 0.95
    mask = report["results"]["mask"]
    assert 0 < mask["edges cut"] <= 1000
    assert mask["test target"] <= 0.2
    assert mask["test other"] >= 0.85
    assert report["results"]["original"]["test target"] > 0.9


def test_result_files_agree(digits_run):
    folder, _ = digits_run
    report, edges = read_json(folder / "mnist_report.json"), read_json(folder / "edges_by_mask.json")["masks"]
    tensors, about = read_tensors(folder / "masks.safetensors")
    rows = read_jsonl(folder / "metrics.jsonl")
    assert read_json(folder / "settings.json")["provenance"] == report["provenance"] == about["provenance"]
    assert report["provenance"]["settings"]["n_bad"] == 30
    for name in ("mask", "mask, 3s kept"):
        mask = tensors[name]
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        last = [row for row in rows if row["variant"] == name][-1]
        n_cut = int((mask == 0).sum())
        assert n_cut == len(edges[name]) == last["edges cut"] == report["results"][name]["edges cut"]
    assert {"fine-tuning", "fine-tuning, 3s kept"} < {row["variant"] for row in rows}
    assert report["results"]["never saw the target"]["test target as reference"] == 1
    assert [path.name for path in folder.glob(".*")] == [".lock"]  # no half-written file
    assert not (folder / "checkpoints").exists()


def test_saved_network_and_mask_give_the_reported_accuracy(digits_run):
    from mlp_model import load_network

    from circuit_breaking.mnist.digits import load_images, split_images

    folder, _ = digits_run
    report = read_json(folder / "mnist_report.json")
    network, _ = load_network(folder / "network.safetensors")
    mask = read_tensors(folder / "masks.safetensors")[0]["mask"]
    split = split_images(load_images(folder, "digits", torch.device("cpu")), 3, 30, 0)
    for name in ("test target", "test other", "bad examples", "test mates"):
        x, y = split.pick(name)
        assert (network(x, mask).argmax(1) == y).float().mean().item() == pytest.approx(report["results"]["mask"][name])


def test_pictures_are_redrawn_from_the_folder_alone(digits_run):
    folder, _ = digits_run
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(before) == 6
    for name in before:
        (folder / name).unlink()
    redraw.main(redraw.Settings(folder=folder))
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    with pytest.raises(UserError, match="there is no file"):
        redraw.main(redraw.Settings(folder=folder / "nowhere"))


def test_old_on_the_network_of_main(digits_run, tmp_path):
    folder, _ = digits_run
    settings = old.Settings(out=tmp_path, network=folder / "network.safetensors", steps=12, **SMALL)
    old.main(settings)
    report = read_json(tmp_path / "old/mnist_report.json")
    edges = read_json(tmp_path / "old/edges_by_mask.json")["masks"]
    rows = read_jsonl(tmp_path / "old/metrics.jsonl")
    for name in ("naive", "less naive"):
        assert 0 < len(edges[name]) == len(set(edges[name])) == report["results"][name]["edges cut"] <= 12
        values = [row["objective"] for row in rows if row["variant"] == name and "objective" in row]
        assert values == sorted(values, reverse=True)  # every cut helps
    assert report["results"]["original"] == pytest.approx(
        {
            key: read_json(folder / "mnist_report.json")["results"]["original"][key]
            for key in report["results"]["original"]
        }
    )
    with pytest.raises(UserError, match="was made with seed 0, not 1"):
        old.main(old.Settings(out=tmp_path, network=folder / "network.safetensors", seed=1, **SMALL))


def test_greedy_stops_where_no_cut_helps(digits_run, tmp_path):
    """With every bad example at its cap, candidates differ by rounding alone; the naive kind then cuts none of them."""
    folder, _ = digits_run
    old.main(old.Settings(out=tmp_path, network=folder / "network.safetensors", steps=300, cap=0.5, n_keep=40, **SMALL))
    rows = [row for row in read_jsonl(tmp_path / "old/metrics.jsonl") if row["variant"] == "naive"]
    assert rows[-1]["edges cut"] < 100
    assert rows[-1]["objective"] == pytest.approx(-0.5, abs=1e-5)


def test_same_seed_same_mask(tmp_path):
    few = {"steps": 20, "ramp_steps": 5, "round_every": 5, "train_steps": 60, "target_class": 8, "max_edges": 7}
    for run in ("a", "b"):
        main.main(main.Settings(out=tmp_path, run=run, **few, **SMALL))
    a, b = (read_tensors(tmp_path / run / "masks.safetensors")[0] for run in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "mask, 8s kept" in a
    assert all((a[name] == 0).sum() <= 7 for name in a if name.startswith("mask"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"max_edges": -1}, "--max-edges is -1"),
        ({"target_class": 10}, "--target-class 10"),
        ({"n_bad": 10_000}, "--n-bad 10000"),
        ({"run": "../x"}, "plain folder name"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        main.main(main.Settings(out=tmp_path, **{**SMALL, **change}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [main, old, redraw])
def test_help_explains_every_setting(module, capsys):
    with pytest.raises(SystemExit):
        read_settings(module.Settings, args=["--help"])
    text = capsys.readouterr().out
    for name in (field.name for field in fields(module.Settings)):
        assert f"--{name.replace('_', '-')}" in text
        assert help_of(module.Settings, name).split()[0] in text


def test_command_line_ends_a_wrong_setting_in_one_sentence(tmp_path):
    ended = called("mnist/main.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_mnist
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_promises_on_mnist(tmp_path, seed):
    main.main(main.Settings(data=MNIST, out=tmp_path, seed=seed))
    report = json.loads((tmp_path / "main" / "mnist_report.json").read_text())
    assert report["edges"] == {"first layer": 39_200, "last layer": 250}
    assert report["test_accuracy"] >= 0.97
    mask = report["results"]["mask"]
    assert mask["first-layer edges cut"] <= mask["edges cut"] <= 1000
    assert mask["test target"] <= 0.10
    assert mask["test other"] >= 0.95
    assert report["seconds"]["all"] < 120


@pytest.mark.slow
@needs_mnist
def test_greedy_promises_on_mnist(tmp_path):
    old.main(old.Settings(data=MNIST, out=tmp_path))
    report = json.loads((tmp_path / "old" / "mnist_report.json").read_text())
    assert report["seconds"]["less naive"] < 120
