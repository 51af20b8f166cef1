"""Passes that are recorded and replayed, against passes that are computed. Without a GPU a recording is pretended: its
replay computes again, from the recording's own inputs into its own results; `make test-gpu` has the CUDA graphs."""

import copy
import os

import pytest
import torch
from helpers.masks import TOKENS
from helpers.models import small_gpt2
from helpers.tasks import QUICK, make_task

from circuit_breaking.engine import cuda_graphs, masked_pass
from circuit_breaking.engine.load import load_model
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask

DEVICE = "cuda" if "TEST_GPU" in os.environ else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


class Pretended:
    """Stands for a CUDA graph."""

    def __init__(self, part, result):
        self.part, self.result = part, result

    def replay(self):
        again = self.part()
        for into, new in zip(*(one if isinstance(one, tuple) else (one,) for one in (self.result, again)), strict=True):
            if into is not None:
                into.copy_(new)


def pretend(parts, device, pool):
    for part in parts:
        part()
    results = [part() for part in parts]
    return [Pretended(*pair) for pair in zip(parts, results, strict=True)], results


def pretend_captures(monkeypatch):
    """Let passes be recorded without a GPU."""
    monkeypatch.setattr(cuda_graphs, "capture", pretend)
    monkeypatch.setattr(cuda_graphs, "memory_of", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    for module in (masked_pass, cuda_graphs):
        monkeypatch.setattr(module, "product_is_small", lambda network, tokens: True)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    if DEVICE == "cpu":
        pretend_captures(monkeypatch)


def passes_of(model, kind):
    """Logits and gradients of passes that differ in everything, some of which come often enough to be recorded."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    found = []
    for number in range(12):
        tokens = torch.randint(0, 50, (2 + number % 2, 7 + number % 4), device=DEVICE, generator=generator)
        mask = torch.rand(len(model.graph), device=DEVICE, dtype=model.dtype, generator=generator).requires_grad_()
        shape = (*((12,) if kind == "position" else ()), len(model.graph.sources), model.embedding.shape[1])
        means = torch.randn(shape, device=DEVICE, dtype=model.dtype, generator=generator)
        model.means = means.requires_grad_(kind == "learned") if kind != "zero" else None
        with torch.no_grad():
            found.append(model(tokens, mask=mask))
        logits = model(tokens, mask=mask)
        (logits.sin() * torch.arange(50, device=DEVICE)).sum().backward()
        found += [logits.detach(), mask.grad] + [means.grad] * (kind == "learned")
        if kind == "learned":  # for a mask that stays what it is
            found += torch.autograd.grad(model(tokens, mask=mask.detach()).sin().sum(), means)
    return found


@pytest.mark.parametrize("kind", ["zero", "mean", "position", "learned"])
@pytest.mark.without_repeated
def test_what_is_replayed_is_what_is_launched(family, kind):
    replayed, launched = (load_model(family(), device=DEVICE, dtype="float64") for _ in range(2))
    launched.cuda_graphs.enabled = False
    for one, other in zip(passes_of(replayed, kind), passes_of(launched, kind), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)
    assert len(replayed.cuda_graphs._kept) >= 2 and replayed.cuda_graphs.enabled


def test_passes_that_overlap_or_come_twice_are_right():
    replayed, launched = (load_model(small_gpt2(), device=DEVICE, dtype="float64") for _ in range(2))
    launched.cuda_graphs.enabled = False
    results = []
    for model in (replayed, launched):
        torch.manual_seed(0)
        for _ in range(6):
            masks = [
                torch.rand(len(model.graph), device=DEVICE, dtype=torch.float64).requires_grad_() for _ in range(2)
            ]
            first, second = (model(TOKENS.to(DEVICE), mask=mask).logsumexp(-1).sum() for mask in masks)
            first.backward(retain_graph=True)
            second.backward()
            first.backward()  # again, after another pass
            results.append([mask.grad for mask in masks])
    for one, other in zip(results[:6], results[6:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_model_that_moves_or_is_copied_forgets_what_was_recorded():
    model = load_model(small_gpt2(), device=DEVICE)
    tokens = TOKENS.to(DEVICE)
    for _ in range(4):
        model(tokens).sum().backward()
    assert model.cuda_graphs._kept
    expected, twin = model(tokens), copy.deepcopy(model)
    assert not twin.cuda_graphs._kept
    model = model.to("cpu").to(DEVICE)
    assert not model.cuda_graphs._kept
    for one in (model, twin):
        for _ in range(4):
            torch.testing.assert_close(one(tokens), expected)


def test_training_is_the_same_replayed_or_launched():
    results = []
    for on in (True, False):
        model = load_model(small_gpt2(), device=DEVICE, dtype="float64")
        model.cuda_graphs.enabled = on
        torch.manual_seed(0)
        settings = MaskConfig(**{**QUICK, "steps": 25}, max_edges=7)
        results.append(train_mask(model, make_task("break", 1), make_task("keep", 5), settings, progress=False))
        assert not model.cuda_graphs._kept  # given back
    assert results[0].edges == results[1].edges
    losses = [[row["keep_loss"] for row in one.history if "keep_loss" in row] for one in results]
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_masks_that_a_search_measures_are_right():
    """A recording must not take layers of another batch for known; a pass that is computed may (`PrefixCache`)."""
    model, tokens = load_model(small_gpt2(), device=DEVICE, dtype="float64"), TOKENS.to(DEVICE)
    masks = (torch.rand(8, len(model.graph), device=DEVICE) > 0.1).double()
    expected = [load_model(small_gpt2(), device=DEVICE, dtype="float64")(tokens, mask=mask) for mask in masks]
    for shift in range(3):
        with torch.no_grad(), model.caching_prefixes():
            for mask, logits in zip(masks, expected, strict=True):
                torch.testing.assert_close(model(tokens.roll(shift, 0), mask=mask).roll(-shift, 0), logits)


def test_little_memory_and_what_cannot_be_recorded(monkeypatch):
    model, tokens = load_model(small_gpt2(), device=DEVICE), TOKENS.to(DEVICE)
    expected = model(tokens).detach()
    monkeypatch.setattr(cuda_graphs, "MEMORY_SHARE", 0)
    for _ in range(5):
        torch.testing.assert_close(model(tokens), expected)
    assert not model.cuda_graphs._kept and model.cuda_graphs.enabled
    monkeypatch.setattr(cuda_graphs, "MEMORY_SHARE", 0.25)

    def fails(*words):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", fails)
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph .operation not permitted") as warned:
        for _ in range(5):
            torch.testing.assert_close(model(tokens), expected)
    assert len(warned) == 1
    assert not model.cuda_graphs._kept and not model.cuda_graphs.enabled


def test_recordings_that_take_too_much_together_are_dropped(monkeypatch):
    model = load_model(small_gpt2(), device=DEVICE)
    monkeypatch.setattr(cuda_graphs, "memory_of", lambda device: 4 * 400_000)
    for batch in (1, 2, 3):
        for _ in range(5):
            tokens = TOKENS[:1].repeat(batch, 1).to(DEVICE)
            model(tokens).sum().backward()
        assert len(model.cuda_graphs._kept) == 1 + (batch == 2)
