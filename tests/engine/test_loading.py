"""Loading: weights are taken over one tensor at a time, and there is no second model in memory."""

import pytest
import torch
from helpers.masks import TOKENS
from helpers.models import small_gpt2, small_llama, small_phi3

from circuit_breaking.engine import blocks, load, weights
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model


def bytes_of(tensors):
    """Bytes of the memory behind tensors, each piece of memory once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "split", "dtype"),
    [(small_gpt2, False, "float32"), (small_phi3, True, "float32"), (small_llama, False, "bfloat16")],
)
def test_loading_from_files_frees_each_layer_when_its_block_is_made(make, split, dtype, tmp_path, monkeypatch):
    hf = make()
    hf.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read, left, fold = [], [], blocks.project_qkv

    def reading(*args, **kwargs):
        read.append(load_hf_model(*args, **kwargs))
        return read[0]

    def folding(layer, *args):
        left.append(bytes_of(one for name, one in read[0].named_parameters() if one.dim() > 1 and ".0." in name))
        return fold(layer, *args)

    monkeypatch.setattr(load, "load_hf_model", reading)
    monkeypatch.setattr(blocks, "project_qkv", folding)
    model = load_model(tmp_path, split, "cpu", dtype)
    assert left[0] > 0 and left[1:] == [0, 0]  # of the first layer, at the time when the next layers are built
    given = load_model(load_hf_model(tmp_path, "cpu", dtype), split, "cpu", dtype)
    assert torch.equal(model(TOKENS), given(TOKENS))
    if dtype == "float32":
        torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_given_model_is_never_copied_as_a_whole(family):
    """No copy in the type of the given model is made on the way to another type."""
    hf = family()
    hf.__class__.__deepcopy__ = None
    try:
        rounded, whole, shared = (
            load_model(hf, device="cpu", dtype=dtype, share_weights=share)
            for dtype, share in (("bfloat16", False), ("float32", False), ("float32", True))
        )
    finally:
        del hf.__class__.__deepcopy__
    theirs = {one.untyped_storage().data_ptr() for one in hf.parameters()}
    for model in (rounded, whole):
        assert not any(one.untyped_storage().data_ptr() in theirs for one in model.blocks.buffers())
    for one, other in zip(rounded.blocks.buffers(), whole.blocks.buffers(), strict=True):
        assert torch.equal(one, other.bfloat16())
    names = ("w_o", "w_up", "w_down")
    assert all(getattr(block, name).untyped_storage().data_ptr() in theirs for block in shared.blocks for name in names)
    assert torch.equal(shared(TOKENS), whole(TOKENS))


def test_offloaded_weights_are_refused():
    with pytest.raises(UserError, match="is offloaded"):
        load_model(small_gpt2().to("meta"), device="cpu")


def test_loading_needs_no_way_to_return_freed_memory(monkeypatch, tmp_path):
    """Only the GNU C library has `malloc_trim`."""
    small_gpt2().save_pretrained(tmp_path)
    expected = load_model(tmp_path, device="cpu")
    monkeypatch.setattr(weights.ctypes, "CDLL", lambda name: object())
    found = load_model(tmp_path, device="cpu")
    assert all(torch.equal(one, two) for one, two in zip(found.buffers(), expected.buffers(), strict=True))
