"""Weight masks against hooks that do the same by hand; their files; restoring a model exactly."""

import copy

import pytest
import torch
from helpers.models import small_gpt2, small_neox
from torch import nn

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.weight_mask import (
    UNITS,
    WeightMask,
    find_matrices,
    load_weight_mask,
    mask_weights,
    save_weight_mask,
    shares,
)
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.runs.tensors import read_tensors, write_tensors

TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def logits(hf):
    with torch.no_grad():
        return hf(TOKENS).logits


def some_units(hf, granularity, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return WeightMask(
        granularity,
        {
            matrix.name: torch.randperm(matrix.count, generator=generator)[:count].sort().values
            for matrix in find_matrices(hf, granularity)
        },
    )


def silence(module: nn.Module, columns: torch.Tensor):
    """Zero some inputs of a module, by a hook."""

    def hook(_, args):
        x = args[0].clone()
        x[..., columns] = 0.0
        return (x,)

    return module.register_forward_pre_hook(hook)


def test_a_masked_neuron_is_one_that_is_silent(family):
    hf = family()
    mask = some_units(hf, "neuron", 5)
    with mask_weights(hf, mask):
        found = logits(hf)
    layers = zip(describe(hf).layers, mask.units.values(), strict=True)
    hooks = [silence(layer.down.module, units) for layer, units in layers]
    torch.testing.assert_close(found, logits(hf))
    for hook in hooks:
        hook.remove()
    assert (found - logits(hf)).abs().max() > 1e-3


def test_a_masked_head_is_one_whose_values_are_not_written(family):
    hf = family()
    mask = some_units(hf, "head", 2)
    with mask_weights(hf, mask):
        found = logits(hf)
    for layer, heads in zip(describe(hf).layers, mask.units.values(), strict=True):
        width = layer.head_width
        silence(
            layer.out.module, torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads.tolist()])
        )
    torch.testing.assert_close(found, logits(hf))


def test_a_masked_weight_is_zero_and_no_other_changes(family):
    hf = family()
    before = copy.deepcopy(hf.state_dict())
    mask = some_units(hf, "weight", 7)
    with mask_weights(hf, mask):
        for name, value in hf.state_dict().items():
            flat, expected = value.reshape(-1), before[name].reshape(-1).clone()
            if name in mask.units:
                expected[mask.units[name]] = 0.0
            assert torch.equal(flat, expected), name
    names = {name for name, value in hf.named_parameters() if value.dim() == 2}
    untouched = {name for name in names if "embed" in name or "lm_head" in name or "wte" in name or "wpe" in name}
    assert set(mask.units) == names - untouched


@pytest.mark.parametrize("granularity", UNITS)
def test_removal_restores_every_bit(family, granularity):
    hf = family().bfloat16()
    before = copy.deepcopy(hf.state_dict())
    handle = mask_weights(hf, some_units(hf, granularity, 4))
    assert any(not torch.equal(before[name], value) for name, value in hf.state_dict().items())
    handle.remove()
    handle.remove()  # harmless
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())
    with pytest.raises(ZeroDivisionError), mask_weights(hf, some_units(hf, granularity, 4)):
        raise ZeroDivisionError
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())


def test_an_empty_mask_changes_nothing(family):
    hf = family()
    before = logits(hf)
    with mask_weights(hf, WeightMask("weight")):
        assert torch.equal(logits(hf), before)


def test_edges_can_be_cut_beside_masked_weights():
    hf = small_gpt2()
    mask = some_units(hf, "neuron")
    with mask_weights(hf, mask), ablate(hf, ["m0->output"]):
        both = logits(hf)
        assert shares(mask, hf)["units"] == 9
    with ablate(hf, ["m0->output"]):
        assert not torch.allclose(logits(hf), both)


def test_shares():
    hf = small_gpt2()  # 3 layers, 3 heads, width 24
    total = sum(parameter.numel() for parameter in hf.parameters())
    assert shares(some_units(hf, "head", 2), hf) == {
        "units": 6, "all_units": 9, "weights": 6 * 8 * 24, "all_weights": total,
    }  # fmt: skip
    assert shares(some_units(hf, "neuron", 2), hf)["weights"] == 6 * 24
    one = shares(some_units(hf, "weight", 2), hf)
    assert one["units"] == one["weights"] == 24 and one["all_units"] == 3 * 12 * 24 * 24


@pytest.mark.parametrize("granularity", UNITS)
def test_a_mask_comes_back_from_its_file(family, granularity, tmp_path):
    hf, path = family(), tmp_path / "mask.safetensors"
    mask = some_units(hf, granularity)
    mask.units[next(iter(mask.units))] = torch.empty(0, dtype=torch.long)
    save_weight_mask(path, hf, mask, {"note": "a note"}, "mine")
    again = load_weight_mask(path, family())
    assert again.granularity == granularity and again.provenance["note"] == "a note"
    with mask_weights(hf, mask):
        expected = logits(hf)
    with mask_weights(hf, again):
        assert torch.equal(logits(hf), expected)
    stored, about = read_tensors(path)
    assert sum(tensor.numel() for tensor in stored.values()) == len(mask) == about["units"]
    assert all(tensor.dtype == torch.int32 for tensor in stored.values())


def test_files_that_do_not_fit(tmp_path):
    hf, path = small_gpt2(), tmp_path / "mask.safetensors"

    def refused(message, model=hf):
        with pytest.raises(UserError, match=message) as error:
            load_weight_mask(path, model)
        assert "\n" not in str(error.value)

    refused(r"no file .*mask_learning.py")
    path.write_bytes(b"nothing")
    refused("not a readable safetensors")
    write_tensors(path, {"weights": torch.zeros(3)}, {"format": "other"})
    refused("holds no weight mask")
    mask = some_units(hf, "neuron")
    save_weight_mask(path, hf, mask, model="mine")
    refused(r"another shape \(mine\)", small_gpt2(n_layer=2))
    refused(r"another shape \(mine\)", small_neox())
    tensors, about = read_tensors(path)
    name = next(iter(tensors))
    for changed, message in [
        ({name: torch.tensor([96])}, "not a list of numbers below 96"),
        ({name: torch.tensor([-1])}, "not a list of numbers"),
        ({name: torch.tensor([[1]])}, "not a list of numbers"),
        ({name: torch.tensor([3, 3])}, "names a unit twice"),
        ({"other.weight": torch.tensor([3])}, "does not have"),
    ]:
        write_tensors(path, changed, about)
        refused(message)
    write_tensors(path, tensors, {**about, "granularity": "layer"})
    refused("granularity 'layer' is not one of weight, neuron, head")
