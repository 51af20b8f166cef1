"""What is different on a GPU: the engine, training, generation and the scripts there, against the CPU's numbers.

Run with `make test-gpu`; every test here fails where there is no GPU, so that none is skipped unseen.
"""

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means
from helpers.models import small_gpt2
from helpers.scripts import command
from helpers.tasks import QUICK, make_task
from transformers import GPT2Config, GPT2LMHeadModel

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine import reads
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.models.load import TINY
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import METHODS
from circuit_breaking.training.weight_trainer import WeightMaskSettings, train_weight_mask

pytestmark = pytest.mark.gpu
GPU = "cuda"
WAYS = ("replayed", "launched", "recomputed", "summed")


def set_way(model, way, monkeypatch):
    """Let passes be replayed, launched one by one, recomputed, or done by running sums as those of large models are."""
    model.cuda_graphs.clear()
    model.cuda_graphs.enabled, model.gradient_checkpointing = way == "replayed", way == "recomputed"
    if way == "summed":  # the last of them
        monkeypatch.setattr(reads, "SMALL_PRODUCT", 0)


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.parametrize("split", [False, True])
def test_any_mask_matches_the_oracle_there(family, split, kind, monkeypatch):
    hf = family().double()
    means = make_means(load_model(hf, split_qkv=split, device="cpu", dtype="float64"), kind)
    hf = hf.to(GPU)
    model = load_model(hf, split_qkv=split, device=GPU, dtype="float64")
    model.means = means
    for way in WAYS:
        set_way(model, way, monkeypatch)
        for mask in 2 * make_masks(len(model.graph)):
            mask = mask.to(GPU).requires_grad_()
            expected = ReferenceModel(hf, split)(TOKENS.to(GPU), mask, model.means)
            readout = torch.randn_like(expected)
            (expected_gradient,) = torch.autograd.grad((expected * readout).sum(), mask)
            logits = model(TOKENS.to(GPU), mask=mask)
            (gradient,) = torch.autograd.grad((logits * readout).sum(), mask)
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-8, rtol=1e-8)
        assert bool(model.cuda_graphs._kept) == (way == "replayed")


def test_learned_means_get_the_gradient_they_get_on_the_cpu():
    gradients = []
    for device in ("cpu", GPU):
        model = load_model(small_gpt2().double(), device=device, dtype="float64")
        mask = make_masks(len(model.graph))[0].to(device)
        torch.manual_seed(0)
        model.means = torch.randn(len(model.graph.sources), 24, dtype=torch.float64).to(device).requires_grad_()
        model(TOKENS.to(device), mask=mask).logsumexp(-1).mean().backward()
        gradients.append(model.means.grad.cpu())
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_gpt2_small_in_float32_is_hugging_faces():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).to(GPU).eval()
    model = load_model(hf, device=GPU)
    tokens = torch.randint(0, 50257, (2, 100), device=GPU)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_offloaded_layers_compute_the_same_in_less_memory():
    hf = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=4, n_embd=512, vocab_size=50))
    tokens, results, memory = TOKENS.to(GPU), [], []
    for offload in (False, True):
        model = load_model(hf, device=GPU, gradient_checkpointing=True, offload=offload)
        model.means = make_means(model, "mean").to(GPU).requires_grad_()
        mask = make_masks(len(model.graph))[0].float().to(GPU).requires_grad_()
        for _ in range(3):  # later passes take layers from slots that earlier ones filled
            logits = model(tokens, mask=mask)
            results.append((logits, *torch.autograd.grad(logits.square().mean(), (mask, model.means))))
        torch.cuda.synchronize()
        memory.append(torch.cuda.memory_allocated())
        del model
        torch.cuda.empty_cache()
    assert all(torch.equal(one, other) for result in results for one, other in zip(results[0], result, strict=True))
    assert memory[1] < memory[0] / 2


def test_bfloat16_is_near_float32():
    hf = small_gpt2()
    exact = load_model(hf, device="cpu")(TOKENS)
    near = load_model(hf, device=GPU, dtype="bfloat16")(TOKENS.to(GPU)).float().cpu()
    assert (near - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_edges", [0, 7])
def test_training_keeps_the_budget_there(method, max_edges):
    model = load_model(small_gpt2(), device=GPU)
    settings = MaskConfig(**QUICK, max_edges=max_edges, method=method)
    result = train_mask(model, make_task("break", 1), make_task("keep", 5), settings, progress=False)
    assert len(result.edges) <= max_edges and len(result.edges) == model.mask.n_cut()
    assert model.mask.weights.device.type == GPU


def test_training_learns_constants_there():
    model = load_model(small_gpt2(), device=GPU)
    settings = MaskConfig(**QUICK, max_edges=5, constants_lr=0.05)
    keep = make_task("keep", 5)
    model.means = keep.compute_means(model)
    before = model.means.clone()
    train_mask(model, make_task("break", 1), keep, settings, progress=False)
    assert model.means.device.type == GPU and model.means.isfinite().all() and not torch.equal(model.means, before)


def test_generation_is_the_engines(family):
    hf = family().to(GPU)
    model = load_model(hf, device=GPU)
    edges = [model.graph.edges[index] for index in range(3, len(model.graph), 7)]
    model.mask.cut_(edges)
    tokens = TOKENS[:, :5].to(GPU)
    with ablate(hf, edges):
        out = hf.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, min_new_tokens=6, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    ours = model(out.sequences[:, :-1])[:, 4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), ours, atol=1e-3, rtol=1e-3)


def test_weight_masks_are_learned_there():
    settings = WeightMaskSettings(
        max_masked=30, relax_steps=4, anneal_steps=4, batch_size=3, choose_size=6, lr=0.3, penalty=0
    )
    hf = small_gpt2().to(GPU)
    result = train_weight_mask(hf, make_task("break", 1), make_task("keep", 5), settings, progress=False)
    assert result is not None and all(parameter.device.type == GPU for parameter in hf.parameters())


SHORT = ("--steps", 10, "--refine-rounds", 3)
SMALL = ("--num-texts", 20, "--num-prompts", 5, "--samples", 1)
CHAINS = {
    "toxicity": [
        ("toxicity/compute_means.py", "--num-texts", 30, "--out", "{out}/means.safetensors"),
        ("toxicity/train_mask.py", *SHORT, "--means", "{out}/means.safetensors", "--constants-lr", 0.01,
         "--constants-steps", 3, "--run", "cut", "--out", "{out}"),
        ("toxicity/finetune_gpt2.py", "--steps", 4, "--check-every", 2, "--lrs", 1e-4, "--run", "tuned",
         "--out", "{out}"),
        ("toxicity/evaluation.py", "--models", "{out}/tuned/finetuned", *SMALL, "--num-uniform", 20, "--num-control", 5,
         "--scorer", "profanity-check", "--run", "cut", "--out", "{out}"),
        ("toxicity/edge_evidence.py", "--masks", "{out}/cut", "--num-texts", 20, "--run", "cut", "--out", "{out}"),
        ("toxicity/report.py", "--run", "cut", "--out", "{out}"),
    ],
    "weights": [
        ("mask_learning.py", "--model", "tiny", "--relax-steps", 5, "--anneal-steps", 5, *SMALL, "--scorer",
         "profanity-check", "--out", "{out}"),
    ],
    "ioi": [
        ("ioi/train_mask.py", *SHORT, "--train", "{ioi}_train.jsonl", "--test", "{ioi}_test.jsonl", "--num-test", 20,
         "--run", "cut", "--out", "{out}"),
        ("ioi/compare.py", *SHORT, "--train", "{ioi}_train.jsonl", "--test", "{ioi}_test.jsonl", "--num-test", 20,
         "--budgets", 5, "--num-attribution", 10, "--ig-steps", 2, "--random-seeds", 1, "--out", "{out}"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_scripts_run_there(chain, tmp_path):
    places = {"out": tmp_path, "ioi": TINY / "text" / "ioi"}
    for script, *words in CHAINS[chain]:
        device = () if script == "toxicity/report.py" else ("--device", GPU)
        done = command(script, *(str(word).format(**places) for word in words), *device)
        assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
