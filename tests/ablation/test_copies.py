"""Copies of cut models: in memory, in other processes, with other weights, and revisions of one on the hub."""

import copy
from multiprocessing.reduction import ForkingPickler

import pytest
from helpers.models import small_gpt2
from test_ablated import some_edges
from test_auto_classes import means_of
from test_other_hands import logits
from transformers import AutoModelForCausalLM

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, save_ablated
from circuit_breaking.errors import UserError


def test_copies_and_replicas_are_cut_too(family):
    hf = family()
    edges = some_edges(hf, 20)
    with ablate(hf, edges):
        cut, twin = logits(hf), copy.deepcopy(hf)
        replica = hf._replicate_for_data_parallel()  # what DataParallel makes of each module
        assert type(replica) is type(hf)
    assert logits(twin).equal(cut) and not logits(hf).equal(cut)
    twin.edge_cuts.remove()
    assert logits(twin).equal(logits(hf))


def test_a_whole_model_travels_to_other_processes_with_its_cuts(family):
    """As `torch.save(model)` and processes that are spawned store it."""
    hf = family()
    with ablate(hf, some_edges(hf, 20), ablate_from=1):
        cut, stored = logits(hf), ForkingPickler.dumps(hf)
    twin = ForkingPickler.loads(stored)
    assert logits(twin).equal(cut)
    twin.edge_cuts.remove()
    assert type(twin) is type(hf) and logits(twin).equal(logits(hf))


def test_new_weights_of_another_precision_count(family):
    hf, new = family(), family()
    for parameter in new.parameters():
        parameter.data = parameter.data.bfloat16()
    edges = some_edges(hf, 20)
    with ablate(new, edges):
        expected = logits(new)
    with ablate(hf, edges):
        hf.load_state_dict(new.state_dict(), assign=True)
        assert logits(hf).equal(expected)


def test_a_revision_is_of_all_files(tmp_path, monkeypatch):
    """In a cache of the hub that holds two revisions of one repository."""
    hf, repository = small_gpt2(), tmp_path / "models--user--repo"
    cuts = {"main": (some_edges(hf, 4), 1.0), "v1": (some_edges(hf, 12), 2.0)}  # edges, and factor of the means
    (repository / "refs").mkdir(parents=True)
    for number, (revision, (edges, factor)) in enumerate(cuts.items()):
        (repository / "refs" / revision).write_text(str(number) * 40)
        save_ablated(repository / "snapshots" / (str(number) * 40), hf, edges, factor * means_of(hf))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision, (edges, factor) in cuts.items():
        where = {"revision": revision, "cache_dir": tmp_path, "local_files_only": True}
        auto = AutoModelForCausalLM.from_pretrained("user/repo", use_safetensors=True, **where)
        for found in (auto, load_ablated("user/repo", "cpu", revision=revision)):
            assert found.edge_cuts.edges == edges and found.edge_cuts.means.equal(factor * means_of(hf))
    assert load_ablated("user/repo", "cpu").edge_cuts.edges == cuts["main"][0]
    with pytest.raises(UserError, match="user/repo"):
        load_ablated("user/repo", "cpu", revision="v2")
