"""A training script killed outright at random moments and started again each time."""

import json
import random
import subprocess
import sys
import time

import pytest
from helpers.scripts import PLAIN, RUDE, load_script, save_small_model
from helpers.tasks import SHORT_CHOICE

from circuit_breaking.engine.mask import read_cut_edges
from circuit_breaking.runs.files import ROOT, read_json, read_jsonl
from circuit_breaking.runs.mask_record import CutEdges
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training.edge_ranking import load_ranking
from circuit_breaking.training.prefix_choice import BATCHES

pytestmark = pytest.mark.usefixtures("coarse_importance", "short_choice")
PHASES = ["--steps=80", "--refine-rounds=50", "--constants-lr=0"]


def command(folder, name):
    options = {
        "model": folder / "model", "toxic-train": folder / "train.jsonl", "toxic-test": folder / "test.jsonl",
        "ordinary": folder / "plain.txt", "out": folder, "run": name, "checkpoint-every": 3, "max-edges": 5,
        "num-texts": 10, "device": "cpu",
    }  # fmt: skip
    return [
        sys.executable, str(ROOT / "toxicity" / "train_mask.py"), *PHASES,
        *(f"--{key}={value}" for key, value in options.items()),
    ]  # fmt: skip


def write_inputs(folder):
    save_small_model(folder / "model", n_layer=2)
    for name, texts in (("train", RUDE[:100]), ("test", RUDE[100:120])):
        rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts, 1000 * (name == "test"))]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "plain.txt").write_text("\n".join(PLAIN))


def test_the_same_seed_gives_the_same_files_twice(tmp_path):
    write_inputs(tmp_path)
    script = load_script("toxicity/train_mask.py")
    settings = script.Settings(
        model=str(tmp_path / "model"), toxic_train=tmp_path / "train.jsonl", toxic_test=tmp_path / "test.jsonl",
        ordinary=str(tmp_path / "plain.txt"), out=tmp_path, resume=False, max_edges=5, num_texts=10, device="cpu",
        steps=12, refine_rounds=7, constants_lr=0.05, constants_steps=3,
    )  # fmt: skip
    found = []
    for _ in range(2):
        script.main(settings)
        rows = [{**row, "seconds": 0} for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
        names = ("mask.safetensors", "means.safetensors", "edges.json", "settings.json")
        found.append(([(tmp_path / "run" / name).read_bytes() for name in names], rows))
        assert len(rows) == 22 + SHORT_CHOICE
    assert found[0] == found[1]


@pytest.mark.parametrize("constants_lr", [0.0, 0.05])
def test_a_ranking_is_written_with_masks_of_all_budgets_and_their_curve(tmp_path, constants_lr, capsys):
    write_inputs(tmp_path)
    script = load_script("toxicity/train_mask.py")
    settings = script.Settings(
        model=str(tmp_path / "model"), toxic_train=tmp_path / "train.jsonl", toxic_test=tmp_path / "test.jsonl",
        ordinary=str(tmp_path / "plain.txt"), out=tmp_path, max_edges=5, num_texts=10, device="cpu", method="ranking",
        steps=8, refine_rounds=0, constants_lr=constants_lr, constants_steps=2,
        budgets=(2, 9, 999_999),
    )  # fmt: skip
    script.main(settings)
    folder, curve = tmp_path / "run", read_json(tmp_path / "run" / "curve.json")
    ranking, record = load_ranking(folder / "ranking.safetensors")
    assert (record.method, record.ablation_value.kind) == ("ranking", "optimal" if constants_lr else "zero")
    assert [row["budget"] for row in curve["rows"]] == [2, 5, 9]
    for row in curve["rows"]:
        assert row["edges_cut"] <= row["budget"]
        here = folder / "masks" / f"ranking_{row['budget']}"
        edges, about = read_cut_edges(here / "mask.safetensors")
        assert set(edges) == set(ranking.edges[: row["edges_cut"]]) == set(CutEdges.read(here / "edges.json").edges)
        assert about.budget == row["budget"] and (here / "means.safetensors").is_file() == bool(constants_lr)
        losses = about.losses["after"]
        gain = curve["original"]["ordinary"] - losses["ordinary"] + 0.2 * (losses["toxic"] - curve["original"]["toxic"])
        assert row["gain"] == pytest.approx(gain) and losses["toxic"] == row["toxic"]
    assert set(read_cut_edges(folder / "mask.safetensors")[0]) == set(ranking.edges[: curve["rows"][1]["edges_cut"]])
    assert (folder / "curve.png").stat().st_size > 10_000
    if not constants_lr:  # else other constants are learned there
        main = read_cut_edges(folder / "mask.safetensors")[1]
        assert curve["rows"][1]["toxic"] == main.losses["after"]["toxic"]
    script.main(settings)  # resumes from the end of training
    assert read_json(folder / "curve.json")["rows"] == curve["rows"]


@pytest.mark.slow
def test_five_kills_leave_the_same_mask(tmp_path):
    write_inputs(tmp_path)
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)

    moments, folder = random.Random(0), tmp_path / "killed"
    for _ in range(5):
        process = subprocess.Popen(command(tmp_path, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = folder / "metrics.jsonl"
        there = len(path.read_text().splitlines()) if path.is_file() else 0
        target = there + moments.randrange(2, 25)
        while process.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) >= target):
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    done = subprocess.run(command(tmp_path, "killed"), capture_output=True, text=True, check=True)
    assert "resuming from step" in done.stderr

    masks = [read_tensors(tmp_path / name / "mask.safetensors")[0]["weights"] for name in ("whole", "killed")]
    assert masks[0].equal(masks[1])
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [row["step"] for row in rows[1]] == list(range(130 + BATCHES))
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
