"""Relearning: gradients through cut edges against the reference, and the loop on a model that must learn."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_gpt2

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import ComparedModel
from circuit_breaking.evaluation.generate import Sampling
from circuit_breaking.evaluation.relearn import relearn, toxicity_after, with_context
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines.lora import LowRank, linear_weights
from circuit_breaking.training.config import RelearnSettings, check_relearn

pytestmark = pytest.mark.usefixtures("coarse_pictures")
EDGES = ["embed->a0.1", "a0.0->m1", "a0.1->a1.2", "a0.1->a2.0", "m0->a2.0", "m1->output", "embed->output"]


@pytest.mark.parametrize("with_means", [False, True])
def test_gradients_reach_every_weight_through_the_cuts(family, with_means):
    hf = family().double()
    engine = load_model(hf, device="cpu", dtype="float64")
    means = (
        torch.randn(len(engine.graph.sources), engine.embedding.shape[1], dtype=torch.float64) if with_means else None
    )
    engine.mask.cut_(EDGES)
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))

    def gradients(model, logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    twin = copy.deepcopy(hf)
    naive = ReferenceModel(twin)
    twin.requires_grad_(True)
    expected = gradients(twin, naive(tokens, engine.mask.weights.detach().double(), means))
    hf.requires_grad_(True)
    with ablate(hf, EDGES, means):
        got = gradients(hf, hf(tokens).logits)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # Hugging Face's RMSNorm goes through float32 even in float64
        exact = hf.config.model_type == "gpt2"
        torch.testing.assert_close(got[name], gradient, rtol=1e-9 if exact else 1e-3, atol=1e-12 if exact else 1e-6)


def learner(seed=0):
    hf = small_gpt2()
    rows = torch.randint(1, 50, (6, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    return hf, pad_right([[0, *row] for row in rows], 0)


def losses(examples):
    from circuit_breaking.evaluation.measure import text_losses

    def measure(model):
        sums, counts = text_losses(model, examples)
        return {"loss": sums.sum() / counts.sum()}

    return measure


def test_a_cut_model_learns_with_its_edges_cut():
    hf, examples = learner()
    before = copy.deepcopy(hf.state_dict())
    cut = ComparedModel("cut", "mask", edges=EDGES, about={"n_edges": 100})
    settings = RelearnSettings(checks=(0, 5, 30), lr=1e-2, batch_size=6)
    rows, note = relearn(cut, hf, examples, settings, losses(examples))
    assert note is None and [row["step"] for row in rows] == [0, 5, 30]
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"] + 0.5
    with ablate(hf, EDGES):
        assert rows[0]["loss"] == pytest.approx(losses(examples)(hf)["loss"])
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert not any(p.requires_grad for p in hf.parameters())
    assert relearn(cut, hf, examples, settings, losses(examples))[0] == rows
    # the last loss is that of the cut model, not of the whole one with the same weights
    whole, _ = relearn(ComparedModel("whole"), hf, examples, settings, losses(examples))
    assert whole[0]["loss"] != rows[0]["loss"] and whole[2]["loss"] != rows[2]["loss"]


def test_edges_are_cut_once_and_no_measurement_is_lost(monkeypatch):
    from circuit_breaking.evaluation import compared_models as room

    hf, examples = learner()
    cuts, plain = [], room.ablate
    monkeypatch.setattr(room, "ablate", lambda *args, **more: cuts.append(1) or plain(*args, **more))
    cut = ComparedModel("cut", "mask", edges=EDGES, about={"n_edges": 100})
    ticks = []
    settings = RelearnSettings(checks=(2, 5), batch_size=6)
    rows, note = relearn(cut, hf, examples, settings, losses(examples), tick=lambda: ticks.append(1))
    assert len(cuts) == 2  # to load the model, and for all steps
    assert len(ticks) == 5 and note is None and [row["step"] for row in rows] == [2, 5]
    # step by step, with the edges cut again at each step
    model = copy.deepcopy(hf).requires_grad_(True)
    task, optimizer = (
        TextTask("x", examples, examples, 0),
        torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0),
    )
    for _ in range(2):
        with fused_activations(model), ablate(model, EDGES):
            loss = trainable_prediction_losses(model, task.draw(6))[0].mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
    with fused_activations(model), ablate(model, EDGES):
        assert losses(examples)(model)["loss"] == rows[0]["loss"]
    assert relearn(cut, hf, examples, RelearnSettings(checks=(0,)), losses(examples))[0][0]["step"] == 0


def test_adapters_learn_around_the_cuts():
    """Like `LowRank` by hand; all weights stay, and cut edges stay cut while the adapters are measured."""
    hf, examples = learner()
    cut = ComparedModel("cut", "mask", edges=EDGES, about={"n_edges": 100})
    settings = RelearnSettings(checks=(0, 3, 30), lora_lr=1e-2, lora_rank=4, batch_size=6)
    rows, note = relearn(cut, hf, examples, settings, losses(examples), adapters=True)
    full, _ = relearn(cut, hf, examples, settings, losses(examples))
    assert note is None and rows[0] == full[0] and rows[1] != full[1]
    known, _ = relearn(cut, hf, examples, settings, losses(examples), adapters=True, start={"step": 0, "known": 1})
    assert known == [{"step": 0, "known": 1}, *rows[1:]]  # it is not measured again
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"] + 0.3
    model = copy.deepcopy(hf).requires_grad_(False)
    added = LowRank(model, linear_weights(model), 4)
    task = TextTask("x", examples, examples, 0)
    optimizer = torch.optim.AdamW(added.factors.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        with ablate(model, EDGES):
            loss = added.call(trainable_prediction_losses, model, task.draw(6))[0].mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(added.factors.values(), settings.clip)
        optimizer.step()
    added.merge_()
    with ablate(model, EDGES):
        assert losses(examples)(model)["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)


def test_relearning_that_explodes_is_noted():
    hf, examples = learner()
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_fc.weight[0] = math.nan
    rows, note = relearn(ComparedModel("original"), hf, examples, RelearnSettings(checks=(0, 3)), lambda model: {})
    assert [row["step"] for row in rows] == [0] and "not finite at step 1" in note
    for changes in (
        {"checks": ()},
        {"checks": (-1,)},
        {"lr": 0.0},
        {"lora_lr": 0.0},
        {"lora_rank": -1},
        {"batch_size": 0},
    ):
        with pytest.raises(UserError, match=next(iter(changes))):
            check_relearn(RelearnSettings(**changes))


class FirstToken:
    def __call__(self, texts):
        return np.array([float(text.startswith("a")) for text in texts])


class Letters:
    def batch_decode(self, rows, skip_special_tokens):
        return ["a" if row[0] < 25 else "b" for row in rows]


def test_toxicity_is_a_mean_over_prompts():
    hf, examples = learner()
    sampling = Sampling(49, samples=4, new_tokens=2)
    got = toxicity_after(hf, examples, Letters(), FirstToken(), sampling)
    assert 0 <= got["low"] <= got["value"] <= got["high"] <= 1 and got["value"] * 24 == pytest.approx(
        round(got["value"] * 24)
    )
    with torch.no_grad():
        hf.transformer.ln_f.weight.fill_(math.nan)
    assert toxicity_after(hf, examples, Letters(), FirstToken(), sampling)["value"] is None


def test_examples_come_before_the_prompt():
    prompts = pad_right([[0, 1, 2], [0, 3]], 0)
    examples = pad_right([[0, 5, 5, 5], [0, 6], [0, 7, 7]], 0)
    batch = with_context(prompts, examples, 2, [9], limit=9)
    rows = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    assert rows == [[0, 6, 9, 5, 5, 5, 9, 1, 2], [0, 5, 5, 5, 9, 7, 7, 9, 3]]
    batch = with_context(prompts, examples, 2, [9], limit=7)
    assert [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)] == [
        [0, 5, 5, 5, 9, 1, 2], [0, 7, 7, 9, 3],
    ]  # fmt: skip
    with pytest.raises(UserError, match="2 fit"):
        with_context(prompts, examples, 2, [9], limit=2)
