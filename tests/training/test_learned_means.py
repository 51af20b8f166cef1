"""Gradients of learned ablation constants."""

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means, width
from helpers.models import small_gpt2
from helpers.scripts import PLAIN, RUDE, load_script, save_small_model
from helpers.tasks import QUICK, make_task

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.ablation_values import load_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")


@pytest.mark.parametrize("split", [False, True])
def test_gradients_of_learned_means_match_the_oracle(family, split):
    hf = family().double()
    model = load_model(hf, split_qkv=split, device="cpu", dtype="float64")
    means = make_means(model, "mean").requires_grad_()
    model.means = means
    for mask in make_masks(len(model.graph)):
        mask.requires_grad_()
        expected = ReferenceModel(hf, split)(TOKENS, mask, means)
        readout = torch.randn_like(expected)
        at_mask, at_means = torch.autograd.grad((expected * readout).sum(), (mask, means))
        logits = model(TOKENS, mask=mask)
        found = torch.autograd.grad((logits * readout).sum(), (mask, means))
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found[0], at_mask, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(found[1], at_means, atol=1e-8, rtol=1e-8)
        (alone,) = torch.autograd.grad(
            (model(TOKENS, mask=mask.detach()) * readout).sum(), means
        )  # with the mask fixed
        torch.testing.assert_close(alone, at_means, atol=1e-8, rtol=1e-8)


def test_gradcheck_of_learned_means():
    model = load_model(small_gpt2(n_layer=2, n_head=2, n_embd=8).double(), device="cpu", dtype="float64")
    mask = torch.rand(len(model.graph), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    means = make_means(model, "mean").requires_grad_()

    def logits(means):
        model.means = means
        return model(TOKENS[:2, :5], at=torch.tensor([4, 2]), mask=mask)

    assert torch.autograd.gradcheck(logits, means)


def test_learned_means_follow_their_optimizer(family):
    """And make the outputs of cut edges better than the means they start from."""
    model = load_model(family(), device="cpu")
    model.mask.cut_(model.graph.edges[::3])
    model.mask.weights.requires_grad_(False)
    means = torch.zeros(len(model.graph.sources), width(model), requires_grad=True)
    model.means = means
    optimizer = torch.optim.Adam([means], lr=0.02)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and model.means is means
    assert "means" not in dict(model.named_parameters()) and len(list(model.parameters())) == 1
    fixed = load_model(family(), device="cpu")
    fixed.mask.cut_(model.graph.edges[::3])
    fixed.means = means.detach()
    torch.testing.assert_close(fixed(TOKENS), model(TOKENS))
    model.means = None
    assert model.means is None and not model(TOKENS).requires_grad


def test_learned_means_in_bfloat16_and_by_position():
    model = load_model(small_gpt2(), device="cpu", dtype="bfloat16")
    means = torch.zeros(len(model.graph.sources), width(model), requires_grad=True)
    model.means = means
    model.mask.cut_(model.graph.edges[::3])
    model(TOKENS).float().square().mean().backward()
    assert means.grad.dtype == torch.float32 and means.grad.abs().sum() > 0 and means.grad.isfinite().all()
    with pytest.raises(UserError, match="by position cannot be learned"):
        model.means = torch.zeros(9, *means.shape, requires_grad=True)


def test_the_script_saves_what_it_learned(tmp_path):
    """And the stock model with these edges cut and these means computes what the engine does."""
    script = load_script("toxicity/train_mask.py")
    save_small_model(tmp_path / "model", n_layer=2)
    write_text(tmp_path / "plain.txt", "\n".join(PLAIN))
    for name, rows in (("train", RUDE[::2]), ("test", RUDE[1::2])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in rows])
    settings = script.Settings(
        model=str(tmp_path / "model"), ordinary=str(tmp_path / "plain.txt"), toxic_train=tmp_path / "train.jsonl",
        toxic_test=tmp_path / "test.jsonl", out=tmp_path, device="cpu", num_texts=4, constants_lr=0.05, alpha=1.0,
        max_edges=6, steps=10, refine_rounds=2, batch_size=3, refine_batch_size=3,
    )  # fmt: skip
    script.main(settings)
    model = load_model(str(tmp_path / "model"), device="cpu")
    record = load_mask(tmp_path / "run" / "mask.safetensors", model)
    assert (
        record.ablation_value.kind == "optimal"
        and record.budget == 6
        and record.provenance["settings"]["means"] is None
    )
    assert record.ablation_value.path == str(tmp_path / "run" / "means.safetensors")
    load_means(record.ablation_value.path, model)
    edges = model.mask.cut_edges()
    assert edges and model.means.abs().sum() > 0
    hf = load_hf_model(tmp_path / "model", "cpu")
    with ablate(hf, edges, model.means, model.ablate_from), torch.no_grad():
        torch.testing.assert_close(hf(TOKENS).logits, model(TOKENS), atol=2e-5, rtol=1e-5)


def learned(checkpoints=None, stop_at=None):
    """A model of two layers after training, from the newest of the checkpoints if there are some."""
    settings = MaskConfig(max_edges=6, constants_lr=0.05, **QUICK)

    def on_step(row):
        if row["step"] == stop_at:
            raise ZeroDivisionError

    model = load_model(small_gpt2(n_layer=2), device="cpu")
    tasks, saved = (make_task("break", 1), make_task("keep", 5)), checkpoints.load() if checkpoints else None
    train_mask(model, *tasks, settings, None, on_step, False, checkpoints, saved)
    return model


@pytest.fixture(scope="module")
def whole():
    return learned()


@pytest.mark.parametrize("die_at", [2, 8, 15])
def test_an_interrupted_run_learns_the_same(tmp_path, whole, die_at):
    checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=3)
    with pytest.raises(ZeroDivisionError):
        learned(checkpoints, die_at)
    resumed = learned(checkpoints)
    assert torch.equal(resumed.mask.weights, whole.mask.weights) and torch.equal(resumed.means, whole.means)
