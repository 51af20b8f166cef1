"""Ablated models as older releases saved them: `ablation.json`, and the whole model in `base/`."""

import json

import pytest
import torch
from helpers.models import small_gpt2, small_neox
from helpers.records import damage_record

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.old_format import AblatedModelRecord, shape_of
from circuit_breaking.ablation.saved import load_ablated, read_ablated, save_ablated
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import graph_of
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.mask_record import MeansRecord
from circuit_breaking.runs.tensors import write_tensors

EDGES = ["embed->a1.0", "m0->m1", "a0.1->a2.2", "a1.1->output"]
TOKENS = torch.arange(1, 10)[None]


def write_old(folder, hf, edges, means=None, **more):
    """Write an ablated model as older releases did."""
    save_hf_folder(folder / "base", hf)
    if means is not None:
        write_tensors(folder / "means.safetensors", {"means": means}, MeansRecord().to_json())
    AblatedModelRecord(
        base=None, shape=shape_of(hf.config), edges=edges, ablation="zero" if means is None else "mean", **more
    ).write(folder / "ablation.json")


@pytest.mark.parametrize("make", [small_gpt2, small_neox])
@pytest.mark.parametrize("with_means", [False, True])
def test_an_older_folder_still_loads(tmp_path, make, with_means):
    hf = make()
    means = torch.randn(len(graph_of(hf.config).sources), hf.config.hidden_size) if with_means else None
    write_old(tmp_path / "model", hf, EDGES, means, about={"data": "here"}, results={"loss": 1.0})
    with ablate(hf, EDGES, means), torch.no_grad():
        expected = hf(TOKENS).logits
    again = load_ablated(tmp_path / "model", "cpu")
    with torch.no_grad():
        assert again(TOKENS).logits.equal(expected)
    assert again.edge_cuts.about == {"data": "here"}
    assert read_ablated(tmp_path / "model").results == {"loss": 1.0}
    save_ablated(tmp_path / "model", hf, EDGES[:1])  # the folder holds a model of this project, which is replaced
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert load_ablated(tmp_path / "model", "cpu").edge_cuts.edges == EDGES[:1]


def test_damaged_folders_of_older_releases(tmp_path):
    folder = tmp_path / "model"
    write_old(folder, small_gpt2(), EDGES, torch.zeros(13, 24))
    good = json.loads((folder / "ablation.json").read_text())

    def with_record(message, **changes):
        (folder / "ablation.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=message):
            load_ablated(folder, "cpu")

    damage_record(with_record)
    with_record("damaged", base=3)
    with_record("for a model of shape", shape={})
    with_record("neither a local folder", base="/no/such/folder")
    (folder / "ablation.json").write_text("[]")
    with pytest.raises(UserError, match="no saved ablated model"):
        load_ablated(folder)
    (folder / "ablation.json").write_text(json.dumps(good))
    (folder / "base" / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="no data file"):
        load_ablated(folder)
    (folder / "base" / "modeling.py").unlink()
    (folder / "means.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_ablated(folder)
    (folder / "means.safetensors").unlink()
    with pytest.raises(UserError, match="no file"):
        load_ablated(folder)
