"""Steering vectors and directional ablation: weights that do what changes of activations do, and the choice among
candidates."""

import json
import os
import signal

import pytest
import torch
from helpers.models import small, small_gpt2, small_llama
from test_finetuning import QUICK, run, task, texts

from circuit_breaking import load_model, load_tokenizer
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import share_of_changed_parameters
from circuit_breaking.models.families import FAMILIES, describe
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.training.baselines import baseline
from circuit_breaking.training.baselines.search import Search
from circuit_breaking.training.config import FinetuneSettings
from circuit_breaking.training.finetune import describe as record_of
from circuit_breaking.training.finetune import finetune

BIASED = ("gpt2", "gpt_neox", "llama", "granite")  # families whose MLPs have biases, or an option for them
NORMS_AFTER = ("gemma2", "gemma3_text", "olmo2")
TOKENS = texts(3).tokens


def edited(name, hf, candidate, measured):
    """The model with one candidate in it."""
    edit = baseline(name)
    edit.prepare(hf)
    parameters = dict(hf.named_parameters())
    with torch.no_grad():
        for key, weight in edit.weights(hf, measured, candidate).items():
            parameters[key].copy_(weight)
    return hf


def difference(hf, seed=0):
    width = describe(hf).width
    generator = torch.Generator().manual_seed(seed)
    return {"difference": torch.randn(2, width, generator=generator, dtype=torch.float64)}


def logits(hf):
    with torch.no_grad():
        return hf(TOKENS).logits


def tensor_of(output):
    return output[0] if isinstance(output, tuple) else output


def changed(output, new):
    return (new, *output[1:]) if isinstance(output, tuple) else new


def loaded_again(hf, folder):
    save_hf_folder(folder, hf)
    return load_hf_model(folder, "cpu")


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("layer", [0, 1])
def test_steering_subtracts_a_vector_after_a_layer(name, layer, tmp_path):
    plain, hf = small(name), small(name)
    measured = difference(hf)
    vector = 1.5 * measured["difference"][layer].float()
    hook = (
        describe(plain)
        .layers[layer]
        .layer.register_forward_hook(lambda module, args, output: changed(output, tensor_of(output) - vector))
    )
    expected = logits(plain)
    hook.remove()
    assert not torch.allclose(expected, logits(plain), atol=1e-2)
    edited("steering", hf, {"layer": layer, "scale": 1.5}, measured)
    torch.testing.assert_close(logits(hf), expected, atol=1e-4, rtol=1e-4)
    again = loaded_again(hf, tmp_path)
    assert type(again) is type(plain) and logits(again).equal(logits(hf))
    torch.testing.assert_close(load_model(again, device="cpu")(TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert 0 < share_of_changed_parameters(again, plain) < 0.02


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(BIASED)))
def test_steering_without_biases_is_refused(name):
    hf = small(name)
    before = hf.state_dict().keys()
    with pytest.raises(UserError, match=rf"a {name} model can have none there. Leave steering out of methods"):
        run("steering", hf)
    assert hf.state_dict().keys() == before


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(NORMS_AFTER)))
@pytest.mark.parametrize("tied", [False, True])
def test_directional_ablation_projects_everything_that_is_written(name, tied, tmp_path):
    plain, hf = (small(name, tie_word_embeddings=tied) for _ in range(2))
    measured = difference(hf)
    direction = measured["difference"][1].float()
    direction = direction / direction.norm()

    def project(module, args, output):
        written = tensor_of(output)
        return changed(output, written - (written @ direction)[..., None] * direction)

    spec = describe(plain)
    modules = [plain.get_input_embeddings(), *(part for layer in spec.layers for part in (layer.attention, layer.mlp))]
    if spec.positions is not None:
        modules.append(plain.transformer.wpe)
    hooks = [module.register_forward_hook(project) for module in modules]
    expected = logits(plain)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(expected, logits(plain), atol=1e-2)
    edited("direction", hf, {"layer": 1}, measured)
    torch.testing.assert_close(logits(hf), expected, atol=1e-4, rtol=1e-4)
    outputs = load_model(hf, device="cpu").node_outputs(TOKENS)
    assert float((outputs @ direction).abs().max()) < 1e-4 * float(outputs.abs().max())
    again = loaded_again(hf, tmp_path)
    assert type(again) is type(plain) and logits(again).equal(logits(hf))
    assert again.get_output_embeddings().weight.equal(plain.get_output_embeddings().weight)
    assert 0 < share_of_changed_parameters(again, plain) < 1


@pytest.mark.parametrize("name", NORMS_AFTER)
def test_directional_ablation_behind_norms_is_refused(name):
    with pytest.raises(UserError, match=rf"a {name} model has norms after attention and MLP"):
        run("direction", small(name))


@pytest.mark.seconds_per_family
def test_the_difference_of_means_by_hand(family):
    """Over the tokens of both kinds whose next one is predicted, without the first position."""
    hf = family()
    toxic, plain = task(1), task(2)
    means = []
    for one in (toxic, plain):
        rows = []
        for row, n in zip(one.train.tokens, one.train.lengths, strict=True):
            with torch.no_grad():
                states = hf(row[None, :n], output_hidden_states=True).hidden_states
            rows.append(torch.stack([state[0, 1 : n - 1] for state in states[1:-1]]))
        means.append(torch.cat(rows, 1).double().mean(1))
    found = baseline("steering").measure(hf, toxic, plain)["difference"]
    torch.testing.assert_close(found, means[0] - means[1], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def shipped():
    """Tasks of the shipped model, with a few texts that are used for validation."""
    tokenizer = load_tokenizer("tiny")
    tasks = ToxicTask(tokenizer), OWTTask(tokenizer)
    for one in tasks:
        one.train, one.test = one.train[:20], one.test[:10]
    return tasks


@pytest.mark.parametrize(("method", "candidates"), [("steering", 6), ("direction", 3)])
def test_the_best_candidate_is_chosen_and_left(method, candidates, shipped):
    hf, settings = load_hf_model("tiny", "cpu"), FinetuneSettings(scales=(1.0, 4.0))
    before = load_hf_model("tiny", "cpu")
    result = finetune(hf, method, *shipped, settings, progress=False)
    assert [row["step"] for row in result.history] == list(range(candidates + 1))
    scores = [row["score"] for row in result.history]
    assert result.best["score"] == min(scores) < scores[0] and result.texts == 40
    validate = Search(load_hf_model("tiny", "cpu"), baseline(method), *shipped, settings).validate
    assert validate(hf)["score"] == pytest.approx(min(scores), abs=1e-6)
    assert validate(before)["score"] == pytest.approx(scores[0], abs=1e-6)
    assert 0 < share_of_changed_parameters(hf, before) < 1
    chosen = record_of(result)["chosen"]
    assert "lr" not in chosen and chosen["layer"] in (0, 1, 2) and ("scale" in chosen) == (method == "steering")
    json.dumps(record_of(result), allow_nan=False)


def test_where_no_candidate_is_better_the_original_is_left():
    hf = small_llama()
    result, _ = run("steering", hf, scales=(-50.0,))
    assert result.best["step"] == 0 and "no checkpoint was better" in result.note
    torch.testing.assert_close(logits(hf), logits(small_llama()))


@pytest.mark.parametrize("method", ["steering", "direction"])
def test_a_search_that_is_stopped_comes_out_the_same(method, tmp_path, monkeypatch):
    settings = FinetuneSettings(**QUICK, scales=(-1.0, -0.5))

    def search(checkpoints=None):
        hf, saved = small_gpt2(), checkpoints.load() if checkpoints else None
        result = finetune(hf, method, task(1), task(2), settings, False, checkpoints, saved)
        return hf.state_dict(), vars(result)

    expected, plain = search(), Search.advance
    checkpoints = Checkpoints(tmp_path, {}, every=0)

    def advance(self, number):
        plain(self, number)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "advance", advance)
        with pytest.raises(Stopped, match="step 1; run the same command again to continue"):
            search(checkpoints)
    assert checkpoints.load().step == 1
    for _ in range(2):  # the second time, the end is read
        weights, result = search(checkpoints)
        assert result == expected[1]
        assert all(map(torch.equal, weights.values(), expected[0].values()))
