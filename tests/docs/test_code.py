"""The Python code in the documentation runs without changes."""

from contextlib import chdir

import pytest
import torch
from helpers.markdown import PAGES, blocks, name_of
from helpers.scripts import called, load_script

from circuit_breaking.ablation.weight_mask import WeightMask, save_weight_mask
from circuit_breaking.models import load_hf_model
from circuit_breaking.runs.files import ROOT

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")


def run(page: str, number: int, folder, **names) -> dict:
    """Run a page's block of Python in a folder; the names that it leaves."""
    names["__name__"] = "__main__"
    with chdir(folder):
        exec(compile(blocks(ROOT / page, "python")[number], f"{page}, block {number}", "exec"), names)
    return names


def test_readme(tmp_path, capsys):
    names = run("README.md", 0, tmp_path)
    text = capsys.readouterr().out
    assert text.startswith("<|endoftext|>Tom went to the shop.") and len(text) > 40
    assert names["model"].edge_cuts.edges == names["edges"]
    lines = blocks(ROOT / "README.md", "python")[0].strip().splitlines()
    assert len([line for line in lines if line and "import" not in line]) <= 10


def test_getting_started(tmp_path):
    names = run("docs/getting-started.md", 0, tmp_path)
    assert names["model"].mask.weights.grad.isfinite().all() and not hasattr(names["hf"], "edge_cuts")


def test_training_in_getting_started(tmp_path):
    names = run("docs/getting-started.md", 1, tmp_path)
    assert 0 < len(names["result"].edges) <= 12
    assert (tmp_path / "mask.safetensors").is_file()


def test_weight_mask_in_experiments(tmp_path):
    hf = load_hf_model("tiny")
    name = next(name for name, _ in hf.named_parameters() if name.endswith("0.mlp.c_proj.weight"))
    path = tmp_path / "data/mask_learning/run/weight_mask.safetensors"
    save_weight_mask(path, hf, WeightMask("weight", {name: torch.tensor([3, 5])}))
    run("docs/experiments.md", 0, tmp_path, tokens=torch.zeros(1, 3, dtype=torch.int64))


def test_masks_in_file_formats(tmp_path, capsys):
    names = run("docs/file-formats.md", 0, tmp_path)
    assert names["model"].mask.cut_edges() == ["m1->m2"]
    assert capsys.readouterr().out.split()[:2] == ["tiny", "207"]


def test_resampling_in_methods(tmp_path):
    names = run("docs/methods.md", 0, tmp_path)
    assert (names["logits"] - names["model"](names["tokens"])).abs().max() > 1e-3  # without: zero ablation


def test_several_behaviours_in_methods(tmp_path):
    names = run("docs/methods.md", 1, tmp_path)
    assert len(names["result"].edges) == 12
    assert set(names["result"].history[-1]["held_out"]) == {"toxic", "copies", "ordinary"}


def test_circuits_in_file_formats(tmp_path):
    names = run("docs/file-formats.md", 1, tmp_path)
    assert int(names["circuit"].kept.sum()) == 50 and (tmp_path / "circuit.json").is_file()
    assert len(names["edges"]) == int((names["scores"] <= 0).sum()) > 0


def test_auto_classes_in_ablated_models(tmp_path):
    names = run("docs/ablated-models.md", 0, tmp_path)
    assert names["model"].edge_cuts.edges == names["same"].edge_cuts.edges == ["m1->m2", "m1->a3.2"]
    lm = run("docs/ablated-models.md", 1, tmp_path)["lm"]
    assert lm.loglikelihood_rolling and lm.model.edge_cuts.edges == ["m1->m2", "m1->a3.2"]


def test_tasks(tmp_path, capsys):
    names = run("docs/tasks.md", 0, tmp_path)
    assert names["pairs"].tokens.shape == names["batch"].tokens.shape
    assert capsys.readouterr().out.split()[1] == "correct,"


def test_the_picture_of_the_readme_is_drawn_as_the_page_says(tmp_path):
    out = f"--out={tmp_path}"
    steps = [f"--{name}=2" for name in ("max-edges", "steps", "num-texts")]
    assert called("toxicity/train_mask.py", out, "--run=demo", *steps).returncode == 0
    evidence = called("toxicity/edge_evidence.py", "--run=demo", f"--masks={tmp_path / 'demo'}", out, "--num-texts=4")
    assert evidence.returncode == 0
    script = load_script("docs/images/draw.py")
    script.main(script.Settings(tmp_path / "demo", tmp_path / "edges.png"))
    assert (tmp_path / "edges.png").read_bytes().startswith(b"\x89PNG")


BLOCKS = {
    "README.md": 1,
    "docs/ablated-models.md": 2,
    "docs/getting-started.md": 2,
    "docs/experiments.md": 1,
    "docs/file-formats.md": 2,
    "docs/methods.md": 2,
    "docs/tasks.md": 1,
}


def test_every_block_is_run():
    """Those of `docs/extending.md` are run by `test_extending.py`."""
    counts = {name_of(page): len(blocks(page, "python")) for page in PAGES if page.name != "extending.md"}
    assert {name: count for name, count in counts.items() if count} == BLOCKS
