"""Learning a mask over weights: gradients by hand, the promised budget, the model left as it was, and the script."""

import copy
import json
import re

import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import PLAIN, RUDE, called, command, load_script, save_small_model
from helpers.tasks import make_task

from circuit_breaking.ablation.weight_mask import UNITS, find_matrices, load_weight_mask, mask_weights, save_weight_mask
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import TINY, load_hf_model
from circuit_breaking.runs.files import read_json, write_jsonl, write_text
from circuit_breaking.tasks import TextTask
from circuit_breaking.tasks.stock_model import StockModel
from circuit_breaking.training.config import WeightMaskSettings
from circuit_breaking.training.gates import METHODS, HardConcrete
from circuit_breaking.training.weight_trainer import train_weight_mask
from circuit_breaking.training.weight_units import Candidates, choose, gradients_taken

pytestmark = pytest.mark.usefixtures("coarse_importance")
script = load_script("mask_learning.py")
QUICK = {"relax_steps": 4, "anneal_steps": 6, "batch_size": 3, "choose_size": 6, "lr": 0.3, "alpha": 1.0, "penalty": 0}


def objective(model, keep, broken):
    return keep.loss(model, keep.train) - broken.loss(model, broken.train)


def run(hf=None, **changes):
    settings = WeightMaskSettings(**{**QUICK, **changes})
    return train_weight_mask(hf or small_gpt2(), make_task("break", 1), make_task("keep", 5), settings, progress=False)


def test_the_stock_model_gives_tasks_what_the_engine_does(family):
    hf = family()
    stock, engine = StockModel(hf), load_model(hf, device="cpu")
    tokens = make_task("any", 3).train.tokens
    at = torch.full((12,), 4)
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens), engine(tokens), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(stock(tokens, at=at), engine(tokens, at=at), atol=2e-5, rtol=1e-5)
    task = make_task("any", 3)
    assert task.get_test_loss(stock, 5) == pytest.approx(task.get_test_loss(engine, 5), abs=1e-5)
    assert task.get_test_accuracy(stock) == pytest.approx(task.get_test_accuracy(engine))


@pytest.mark.parametrize("granularity", UNITS)
def test_gradients_of_values_are_those_of_finite_differences(family, granularity):
    # Hugging Face's RMSNorm goes through float32 even in float64, hence the tolerances
    hf = family().double()
    keep, broken, model = make_task("keep", 5), make_task("break", 1), StockModel(hf)
    generator = torch.Generator().manual_seed(0)
    chosen = [
        (matrix, torch.randperm(matrix.count, generator=generator)[:2].sort().values)
        for matrix in find_matrices(hf, granularity)
    ]
    candidates = Candidates(chosen)
    candidates.gradient = candidates.gradient.double()
    values = torch.rand(len(candidates.gradient), dtype=torch.float64, generator=generator)
    candidates.write(values)
    with gradients_taken(hf, [matrix for matrix, _ in chosen], candidates.take):
        objective(model, keep, broken).backward()
    direction = torch.randn(len(values), dtype=torch.float64, generator=generator)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            candidates.write(values + sign * 2e-3 * direction)
            ends.append(objective(model, keep, broken))
    slope = (ends[0] - ends[1]) / 4e-3
    torch.testing.assert_close(candidates.gradient @ direction, slope, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("granularity", UNITS)
def test_candidates_are_those_with_the_largest_first_order_gain(family, granularity):
    hf, keep, broken = family(), make_task("keep", 5), make_task("break", 1)
    matrices = find_matrices(hf, granularity)
    hf.requires_grad_(True)
    objective(StockModel(hf), keep, broken).backward()
    gains = torch.cat([
        (m.by_unit(m.parameter.grad) * m.by_unit(m.parameter)).detach().reshape(m.count, -1).sum(1) for m in matrices
    ])  # fmt: skip
    hf.zero_grad()
    count = min(20, int((gains > 0).sum()) - 1)
    chosen = choose(hf, granularity, count, lambda: objective(StockModel(hf), keep, broken).backward())
    firsts = torch.tensor([0, *(matrix.count for matrix in matrices)]).cumsum(0)
    place = {matrix.name: int(first) for matrix, first in zip(matrices, firsts, strict=False)}
    found = torch.cat([units + place[matrix.name] for matrix, units in chosen])
    assert torch.equal(found, gains.topk(count).indices.sort().values)
    every = choose(hf, granularity, len(gains), lambda: objective(StockModel(hf), keep, broken).backward())
    assert sum(len(units) for _, units in every) == int((gains > 0).sum())


def test_one_gradient_at_a_time_and_none_left(family):
    hf = family()
    matrices = find_matrices(hf, "weight")
    most = 0

    def take(number, parameter):
        nonlocal most
        most = max(most, sum(other.grad is not None for other in hf.parameters()))

    task = make_task("keep", 5)
    with gradients_taken(hf, matrices, take):
        task.loss(StockModel(hf), task.train).backward()
    assert most == 1 and all(parameter.grad is None for parameter in hf.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("granularity", "max_masked"),
    [("weight", n) for n in (1, 2, 5, 12, 40, 20_736)] + [("neuron", n) for n in (1, 7, 12, 288)]
    + [("head", n) for n in (1, 2, 5, 9)],
)  # fmt: skip
def test_budget_is_a_promise(granularity, max_masked, method):
    hf = small_gpt2()
    before, flags = copy.deepcopy(hf.state_dict()), [parameter.requires_grad for parameter in hf.parameters()]
    result = run(hf, granularity=granularity, max_masked=max_masked, method=method)
    assert len(result.mask) <= max_masked and len(result.history) == 10
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())
    assert [parameter.requires_grad for parameter in hf.parameters()] == flags
    with mask_weights(hf, result.mask):  # its numbers are those of units that exist
        pass
    if method == "clamped":
        assert len(result.mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", UNITS)
def test_a_budget_of_nothing_leaves_the_model_as_it_was(granularity, method, tmp_path):
    hf, tokens = small_gpt2(), torch.arange(6)[None]
    before = hf(tokens).logits
    result = run(hf, granularity=granularity, max_masked=0, method=method)
    assert len(result.mask) == 0 and result.history == []
    save_weight_mask(tmp_path / "mask.safetensors", hf, result.mask)
    for mask in (result.mask, load_weight_mask(tmp_path / "mask.safetensors", hf)):
        with mask_weights(hf, mask):
            assert torch.equal(hf(tokens).logits, before)


def test_nothing_worth_masking_is_masked():
    hf = small_gpt2()
    result = run(hf, max_masked=40, alpha=0.0, penalty=50.0)
    assert len(result.mask) == 0


def test_the_default_budget_is_a_share_of_all_units():
    assert len(run(granularity="head", alpha=9.0).mask) <= round(0.25 * 9)
    assert len(run(granularity="weight", alpha=9.0).mask) <= round(0.0005 * 3 * 12 * 24 * 24)


def test_masks_do_what_they_are_learned_for(family):
    hf = family()
    keep, broken = make_task("keep", 5), make_task("break", 1)
    settings = WeightMaskSettings(
        max_masked=60, relax_steps=10, anneal_steps=20, batch_size=12, choose_size=12, lr=0.2, alpha=1.0
    )
    result = train_weight_mask(hf, broken, keep, settings, progress=False)
    with torch.no_grad():
        before = objective(StockModel(hf), keep, broken)
        with mask_weights(hf, result.mask):
            assert objective(StockModel(hf), keep, broken) < before - 0.05


def test_same_seed_same_mask():
    for method in METHODS:
        masks = []
        for _ in range(2):
            torch.manual_seed(0)
            masks.append(run(max_masked=30, method=method).mask.units)
        assert masks[0].keys() == masks[1].keys()
        assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_hard_concrete_is_what_the_paper_says():
    """Its expected number of masked candidates against a count over many samples."""
    method = HardConcrete(5, torch.device("cpu"))
    with torch.no_grad():
        method.parameter.copy_(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]) / method.scale)
        torch.manual_seed(0)
        samples = torch.stack([method.sample() for _ in range(20_000)])
        assert samples.min() == 0 and samples.max() == 1
        assert float((samples < 1).float().mean(0).sum()) == pytest.approx(float(method.masked()), abs=0.02)
        assert torch.equal(method.scores() < 0.5, torch.tensor([False, False, False, True, True]))


def test_a_failure_leaves_the_model_as_it_was():
    class Failing(TextTask):
        calls = 0

        def loss(self, *words, **more):
            self.calls += 1
            if self.calls > 9:
                raise ZeroDivisionError
            return super().loss(*words, **more)

    hf = small_gpt2()
    before = copy.deepcopy(hf.state_dict())
    with pytest.raises(ZeroDivisionError):
        train_weight_mask(
            hf,
            Failing("break", make_task("break", 1).train, make_task("break", 1).test),
            make_task("keep", 5),
            WeightMaskSettings(**QUICK, max_masked=9),
            progress=False,
        )
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())

    def on_step(row):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as held:  # with its traceback, which keeps all local variables alive
        train_weight_mask(
            hf, make_task("break", 1), make_task("keep", 5), WeightMaskSettings(**QUICK, max_masked=9), on_step, False
        )
    assert held.tb and all(torch.equal(before[name], value) for name, value in hf.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in hf.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in hf.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "layer"}, "granularity 'layer' is not one of"),
        ({"method": "magic"}, "method 'magic' is not one of"),
        ({"max_masked": -1}, "not between 0"),
        ({"max_masked": 10, "granularity": "head"}, "not between 0 and the model's 9 heads"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"anneal_steps": -1}, "anneal_steps is -1"),
        ({"alpha": float("nan")}, "the loss is not finite"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        run(**changes)


# The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_small_model(folder / "model")
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in RUDE[::2]])
    write_jsonl(folder / "test.jsonl", [{"text": text} for text in RUDE[1::2]])
    return folder


def settings(folder, **changes):
    given = {
        **QUICK, "model": str(folder / "model"), "ordinary": str(folder / "plain.txt"), "device": "cpu",
        "toxic_train": folder / "train.jsonl", "toxic_test": folder / "test.jsonl", "num_texts": 6, "num_prompts": 3,
        "samples": 2, "new_tokens": 4, "scorer": "profanity-check", **changes,
    }  # fmt: skip
    return script.Settings(**given)


def test_the_script_writes_a_mask_and_a_report(folder, tmp_path, capsys):
    script.main(settings(folder, out=tmp_path, max_masked=20, save_model=True))
    said = capsys.readouterr().out
    made = tmp_path / "run"
    report = read_json(made / "report.json")
    hf = load_hf_model(folder / "model", "cpu")
    mask = load_weight_mask(made / "weight_mask.safetensors", hf)
    share = report["models"]["masked"]["masked"]
    assert (made / "training.png").stat().st_size > 10_000
    assert not any("edges_cut" in one for one in report["models"].values())  # a mask over weights cuts no edges
    assert 0 < len(mask) == share["units"] <= 20 and f"{len(mask)} of 20,736 weights masked" in said
    assert set(report["models"]) == {"original", "masked"}
    assert set(report["models"]["masked"]["continuations"]) == {"toxic", "ordinary"}
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 10
    assert (made / "report.png").stat().st_size > 10_000 and (made / "settings.json").is_file()
    saved, tokens = load_hf_model(made / "model", "cpu"), torch.arange(9)[None]
    with mask_weights(hf, mask), torch.no_grad():
        assert torch.equal(saved(tokens).logits, hf(tokens).logits)


def test_a_budget_of_nothing_in_the_script(folder, tmp_path, capsys):
    script.main(settings(folder, out=tmp_path, max_masked=0, num_prompts=0))
    report = read_json(tmp_path / "run" / "report.json")
    losses = [report["models"][name]["losses"] for name in ("original", "masked")]
    for key in losses[0]:
        assert losses[0][key]["value"] == losses[1][key]["value"] and losses[1][key]["change"]["value"] == 0
    assert "0 of 20,736 weights masked" in capsys.readouterr().out


def test_on_the_command_line(folder, tmp_path):
    failed = called("mask_learning.py", "--model", folder / "model", "--ordinary", "none.txt", "--out", tmp_path / "x")
    assert failed.returncode == 1 and failed.stdout == "" and not (tmp_path / "x").exists()
    assert failed.stderr.splitlines()[-1].startswith("error: there is no file")


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in data/tiny_gpt2")
def test_the_promise_on_the_shipped_model(tmp_path):
    done = command("mask_learning.py", "--model", "tiny", "--out", tmp_path, "--scorer", "profanity-check")
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads((tmp_path / "run" / "report.json").read_text())["models"]
    toxic = [models[name]["continuations"]["toxic"]["toxic_share"]["value"] for name in ("original", "masked")]
    assert toxic[0] >= 0.8 and toxic[1] <= 0.3 * toxic[0]
    assert models["masked"]["losses"]["ordinary"]["change"]["value"] <= 0.1
    assert re.search(r"weights masked, [\d,]+ of the model's 953,344 weights \(0\.0\d+%\)", done.stdout)
