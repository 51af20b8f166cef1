"""Layers whose weights are kept in CPU memory and copied to the device one at a time."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means
from helpers.models import small_gpt2, small_llama

from circuit_breaking.engine import offload
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError


def results(model, mask):
    """Logits, and gradients of the mask and of learned means."""
    model.means = make_means(model, "mean").clone().requires_grad_()
    mask = mask.float().requires_grad_()
    logits = model(TOKENS, mask=mask)
    return logits, *torch.autograd.grad(logits.square().mean(), (mask, model.means))


def test_results_are_those_of_a_model_on_the_device(family):
    hf = family()
    split = hf.config.model_type in ("gpt2", "qwen3", "olmo2")
    plain = load_model(hf, split, "cpu", gradient_checkpointing=True)
    offloaded = load_model(hf, split, "cpu", offload=True)
    for mask in make_masks(len(plain.graph))[::2]:
        for one, other in zip(results(plain, mask), results(offloaded, mask), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(plain.node_outputs(TOKENS), offloaded.node_outputs(TOKENS))


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_the_device_has_the_weights_of_one_layer(make, monkeypatch):
    model, copied = load_model(make(), device="cpu", offload=True), []
    (slot,) = model.blocks.slots
    assert len(slot.memory) == max(len(packed) for packed in model.blocks.packed)
    inside = range(slot.memory.data_ptr(), slot.memory.data_ptr() + len(slot.memory))
    assert all(tensor.data_ptr() in inside for block in model.blocks for tensor in block.buffers())
    assert not [name for name, _ in model.named_buffers() if name.startswith("blocks")]
    fetch = offload.OffloadedBlocks._fetch
    monkeypatch.setattr(
        offload.OffloadedBlocks, "_fetch", lambda self, layer: copied.append(layer) or fetch(self, layer)
    )
    model(TOKENS).sum().backward()
    assert copied == [0, 1, 2, 1, 0]  # forward, and then back from the last layer, which is there already


def test_the_next_layer_is_copied_while_one_computes(monkeypatch):
    """With streams that only note what they do, as there is no GPU here."""
    events = []
    streams = SimpleNamespace(
        Event=lambda: SimpleNamespace(record=lambda: None),
        Stream=lambda device: SimpleNamespace(wait_stream=lambda other: events.append("wait")),
        current_stream=lambda device: SimpleNamespace(wait_event=lambda event: None),
        stream=lambda side: nullcontext(),
    )
    monkeypatch.setattr(offload, "copies_ahead", lambda device: True)
    plain = load_model(small_gpt2(), device="cpu", gradient_checkpointing=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Event", streams.Event)
        patch.setattr(torch.cuda, "Stream", streams.Stream)
        patch.setattr(torch.cuda, "current_stream", streams.current_stream)
        patch.setattr(torch.cuda, "stream", streams.stream)
        model = load_model(small_gpt2(), device="cpu", offload=True)
        assert len(model.blocks.slots) == 2
        for mask in make_masks(len(model.graph)):
            for one, other in zip(results(plain, mask), results(model, mask), strict=True):
                assert torch.equal(one, other)
        blocks, there = model.blocks, []
        for layer in (0, 1, 2, 1, 0):
            block = blocks[layer]
            assert torch.equal(block.w_o, plain.blocks[layer].w_o)
            there.append({slot.layer for slot in blocks.slots})
    assert there == [{0, 1}, {1, 2}, {1, 2}, {0, 1}, {0, 1}]
    assert events  # a copy waits for the layer that was in its slot before


def test_an_offloaded_model_stays_where_it_is():
    model = load_model(small_gpt2(), device="cpu", offload=True)
    assert model.to("cpu") is model
    with pytest.raises(UserError, match="Load it again with another device or dtype"):
        model.double()
