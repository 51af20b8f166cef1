"""Masks and means that were made for another first position: applied with it, or refused."""

import pytest
import torch
from helpers.models import small_gpt2

from circuit_breaking.engine.ablation_values import load_means, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, read_mask_record, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import engines_of, load_masked, read_mask
from circuit_breaking.runs.mask_record import MaskRecord
from circuit_breaking.runs.tensors import read_tensors, write_tensors


@pytest.fixture
def model():
    model = load_model(small_gpt2(), device="cpu")
    model.mask.cut_(["a0.1->m2", "embed->m0"])
    return model


def save_with_means(folder, model):
    """A mask and its means, both made with the model's `ablate_from`."""
    torch.manual_seed(0)
    save_means(folder / "means", model, torch.randn(len(model.graph.sources), 24))
    load_means(folder / "means", model)
    save_mask(folder / "mask", model, MaskRecord(ablation_value=value_in(folder / "means")))


def test_a_mask_acts_from_where_it_acted_in_training(tmp_path, model):
    model.ablate_from = 2
    save_mask(tmp_path / "mask", model)
    assert read_mask_record(tmp_path / "mask").ablate_from == 2
    other = load_model(small_gpt2(), device="cpu")
    load_mask(tmp_path / "mask", other)
    assert other.ablate_from == 2
    engine = engines_of(small_gpt2())
    assert load_masked(tmp_path / "mask", engine)[0].ablate_from == 2
    assert read_mask("one", tmp_path / "mask", engine).ablate_from == 2
    model.ablate_from = 0
    save_mask(tmp_path / "mask", model)
    assert load_masked(tmp_path / "mask", engine)[0].ablate_from == 0  # the engine is the same one


def test_files_without_it_count_as_0(tmp_path, model):
    save_with_means(tmp_path, model)
    for name in ("mask", "means"):
        tensors, header = read_tensors(tmp_path / name)
        assert header.pop("ablate_from") == 0
        write_tensors(tmp_path / name, tensors, header)
    assert load_masked(tmp_path / "mask", engines_of(small_gpt2()))[0].ablate_from == 0
    model.ablate_from = 1
    with pytest.raises(UserError, match=r"made with ablate_from 0, and are needed for 1\. Compute them"):
        load_means(tmp_path / "means", model)


def test_means_of_another_are_refused(tmp_path, model):
    model.ablate_from = 1
    save_with_means(tmp_path, model)
    engine = engines_of(small_gpt2())
    assert load_masked(tmp_path / "mask", engine)[0].means is not None
    load_masked(tmp_path / "mask", engine, tmp_path / "means")
    model.ablate_from = 0
    with pytest.raises(UserError, match="made with ablate_from 1, and are needed for 0"):
        load_means(tmp_path / "means", model)
    means = model.means
    save_means(tmp_path / "means", model, means)  # the same numbers, under a header that says 0
    for more in ((), (tmp_path / "means",)):
        with pytest.raises(UserError, match="made with ablate_from 0, and are needed for 1"):
            load_masked(tmp_path / "mask", engine, *more)
    before = model.mask.weights.detach().clone()
    with pytest.raises(UserError, match=r"made with ablate_from 1, and the model.s means for 0\. Load the mask before"):
        load_mask(tmp_path / "mask", model)
    assert model.ablate_from == 0 and torch.equal(model.mask.weights, before)
    model.means = None
    load_mask(tmp_path / "mask", model)
    assert model.ablate_from == 1


@pytest.mark.parametrize("wrong", [-1, "1", 1.5, True, None])
def test_a_damaged_value_is_refused(tmp_path, model, wrong):
    save_mask(tmp_path / "mask", model)
    tensors, header = read_tensors(tmp_path / "mask")
    write_tensors(tmp_path / "mask", tensors, {**header, "ablate_from": wrong})
    with pytest.raises(UserError, match="mask is damaged"):
        load_mask(tmp_path / "mask", model)
