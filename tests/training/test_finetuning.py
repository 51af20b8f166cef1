"""The fine-tuning baselines: each loss by hand, and what the loop promises."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_gpt2

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import share_of_changed_parameters
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks import TextTask
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines import METHODS, baseline
from circuit_breaking.training.baselines.base import Method, start
from circuit_breaking.training.config import FinetuneSettings, LossSettings
from circuit_breaking.training.finetune import describe, finetune

TRAINED = [name for name in METHODS if isinstance(baseline(name), Method)]  # test_edits.py has the others
QUICK = {"steps": 12, "check_every": 3, "batch_size": 4, "lr": 3e-3, "warmup": 2}


def texts(seed, count=12):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (count, 9), generator=generator)
    tokens[:, 0] = 0
    return TokenBatch(tokens, torch.randint(4, 10, (count,), generator=generator))


def task(seed):
    # random texts have nothing in common, so a part of the training texts serves for validation
    return TextTask(f"text {seed}", texts(seed), texts(seed)[:6], seed)


def run(method, hf=None, **changes):
    hf = small_gpt2() if hf is None else hf
    settings = FinetuneSettings(**{**QUICK, **changes})
    return finetune(hf, method, task(1), task(2), settings, progress=False), hf


def loss_by_hand(hf, batch):
    """Loss of every prediction, text by text, with all logits and no padding."""
    rows = [row[:n] for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    return [F.cross_entropy(hf(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]


def loss_of(method, hf, **settings):
    state, _ = start(baseline(method), hf, LossSettings(**settings))
    return baseline(method).loss(state, texts(1, 5), texts(2, 5)), state


def test_predictions_are_those_that_count(family):
    hf, batch = family(), texts(3)
    batch = TokenBatch(batch.tokens, batch.lengths, torch.tensor([1, 2, 3] * 4))
    losses, owner = trainable_prediction_losses(hf, batch)
    expected = [one[start - 1 :] for one, start in zip(loss_by_hand(hf, batch), batch.starts, strict=True)]
    torch.testing.assert_close(losses, torch.cat(expected))
    assert owner.tolist() == [i for i, one in enumerate(expected) for _ in one]


def test_losses_by_hand():
    hf = small_gpt2()
    toxic, plain = (torch.cat(loss_by_hand(hf, texts(seed, 5))) for seed in (1, 2))
    assert toxic.max() > 4.0
    for cap, capped in ((0.0, toxic.clamp(max=math.log(50))), (1e9, toxic), (4.0, toxic.clamp(max=4.0))):
        expected = plain.mean() - 0.3 * capped.mean()
        torch.testing.assert_close(loss_of("joint", hf, ratio=0.3, cap=cap)[0], expected)
        torch.testing.assert_close(loss_of("ascent", hf, cap=cap)[0], -capped.mean())
    torch.testing.assert_close(loss_of("task_arithmetic", hf)[0], toxic.mean())


def test_npo_by_hand():
    """-(2/β) E log σ(-β log(π/π_original)) + the ordinary loss, the form of the paper's equation 3."""
    hf = small_gpt2()
    state, _ = start(baseline("npo"), hf, LossSettings(npo_beta=0.5, npo_retain=0.7))
    original = copy.deepcopy(hf)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.05)
    after, before = ([float(one.detach().sum()) for one in loss_by_hand(m, texts(1, 5))] for m in (hf, original))
    log_ratio = torch.tensor(before) - torch.tensor(after)
    assert log_ratio.abs().max() > 0.5
    expected = -2 / 0.5 * F.logsigmoid(-0.5 * log_ratio).mean() + 0.7 * torch.cat(loss_by_hand(hf, texts(2, 5))).mean()
    torch.testing.assert_close(baseline("npo").loss(state, texts(1, 5), texts(2, 5)), expected)


def test_rmu_by_hand(family):
    hf = family()
    loss, state = loss_of("rmu", hf, rmu_steer=3.0, rmu_retain=10.0)
    layer = 1  # of three
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
    blocks = hf.get_submodule(blocks.get(hf.config.model_type, "model.layers"))
    seen = []
    hook = blocks[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    batch = texts(1, 5)
    with torch.no_grad():
        hf(batch.tokens)
    hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    stream = output[batch.predicted]
    target = state.more["target"]
    assert float(target.norm()) == pytest.approx(3.0 * float(stream.norm(dim=-1).mean()), rel=1e-5)
    assert (target > 0).all()  # of one sign, as in the paper's draw from [0, 1)
    assert float(loss.detach()) == pytest.approx(float((stream - target).square().mean()), rel=1e-5)  # nothing else yet
    trained = [name for name, p in hf.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all(
        ".mlp." in name and name.endswith(("proj.weight", "dense_4h_to_h.weight")) for name in trained
    )
    with pytest.raises(UserError, match="rmu_layer is 2"):
        loss_of("rmu", hf, rmu_layer=2)


@pytest.mark.parametrize("method", TRAINED)
def test_the_best_checkpoint_is_left_and_is_the_best(method):
    before = small_gpt2()
    changes = {"lr": 3e-2} if method == "rerouting" else {}  # the usual rate does not help here
    result, hf = run(method, **changes)
    scores = [row["score"] for row in result.history]
    assert result.best["score"] == min(scores) < scores[0]
    losses = {}
    for name, one in (("toxic", task(1)), ("ordinary", task(2))):
        with torch.no_grad():
            found = trainable_prediction_losses(hf, one.test)[0]
        losses[name] = float(found.clamp(max=math.log(50) if name == "toxic" else math.inf).mean())
        assert losses[name] == pytest.approx(result.best[name], rel=1e-5)
    assert result.best["score"] == pytest.approx(losses["ordinary"] - 0.2 * losses["toxic"], rel=1e-5)
    assert not any(p.requires_grad for p in hf.parameters()) and not hf.training
    share = share_of_changed_parameters(hf, before)
    expected = {"rmu": (0, 0.3), "lora_npo": (0.7, 0.9), "rerouting": (0.7, 0.9)}
    low, high = expected.get(method, (0.9, 1.0))
    assert low < share <= high
    again, twin = run(method, **changes)
    assert again.history == result.history and all(
        map(torch.equal, hf.state_dict().values(), twin.state_dict().values())
    )
    json.dumps(describe(result), allow_nan=False)


def test_task_arithmetic_subtracts_what_was_learned():
    """Against the plain loop: learn toxic text, subtract."""
    settings = {"scales": (0.5, 3.0), "steps": 4, "check_every": 4, "alpha": 5.0}
    result, hf = run("task_arithmetic", **settings)
    assert result.best["step"] == 4 and result.best["scale"] in (0.5, 3.0)
    original, learner = small_gpt2(), small_gpt2().requires_grad_(True)
    optimizer, toxic, plain = torch.optim.AdamW(learner.parameters(), lr=1.0, weight_decay=0.0), task(1), task(2)
    for step in range(1, 5):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 2)
        batch, _ = toxic.draw(4), plain.draw(4)
        optimizer.zero_grad()
        torch.cat(loss_by_hand(learner, batch)).mean().backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    learned = dict(learner.named_parameters())
    for name, before in original.named_parameters():
        if name.endswith("c_attn.bias"):  # keys' biases change no loss: AdamW follows the sign of rounding errors
            continue
        expected = before - result.best["scale"] * (learned[name] - before)
        torch.testing.assert_close(dict(hf.named_parameters())[name], expected.detach(), rtol=1e-3, atol=1e-4)


def test_training_stops_when_nothing_gets_better():
    result, hf = run("ascent", lr=1e-9, patience=2, steps=60, check_every=1)
    assert len(result.history) <= 1 + 60 and result.history[-1]["step"] < 60
    steps = [row["step"] for row in result.history]
    assert steps == list(range(len(steps)))
    bad, hf = run("task_arithmetic", scales=(-1.0,), steps=20)  # towards toxicity
    assert bad.best["step"] == 0 and "no checkpoint was better" in bad.note
    assert share_of_changed_parameters(hf, small_gpt2()) == 0.0


@pytest.mark.parametrize("method", ["joint", "ascent", "task_arithmetic"])
def test_a_loss_that_explodes_ends_the_method_with_a_note(method):
    result, hf = run(method, lr=1e30, clip=1e30, warmup=0, check_every=1)
    assert "not finite" in result.note and len(result.history) < 5
    assert all(p.isfinite().all() for p in hf.parameters())
    text = json.dumps([describe(result), result.history], allow_nan=False)
    assert "NaN" not in text and "null" in text
    assert share_of_changed_parameters(hf, small_gpt2()) == 0.0


def test_a_checkpoint_before_the_explosion_is_kept():
    class Breaks(TextTask):
        def draw(self, size):
            batch = super().draw(size)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 8:
                with torch.no_grad():
                    hf.transformer.ln_f.weight.fill_(math.nan)
            return batch

    hf, plain = small_gpt2(), task(2)
    broken = Breaks("text 1", texts(1), texts(1)[:6], 1)
    result = finetune(hf, "joint", broken, plain, FinetuneSettings(**QUICK), progress=False)
    assert result.note.startswith("the loss was not finite at step 8, where training ended; the checkpoint of step ")
    assert result.best["step"] in (3, 6) and hf.transformer.ln_f.weight.isfinite().all()


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"steps": 0}, {"batch_size": -1}, {"patience": 0}, {"scales": ()}])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        run("joint", **changes)
    with pytest.raises(UserError, match="no method 'joy'"):
        run("joy")
