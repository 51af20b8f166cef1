"""The setting `ablate_from` from training to generation: every script applies a mask from where it was trained."""

import pytest
import torch
from helpers.scripts import PLAIN, RUDE, load_script, save_small_model

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.ablation_values import read_means
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import engines_of, load_masked, read_compared_models
from circuit_breaking.evaluation.edge_effects import leave_one_out
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.runs.mask_record import CutEdges

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
generate, means_script = load_script("toxicity/generate.py"), load_script("toxicity/compute_means.py")
train, sweep = load_script("toxicity/train_mask.py"), load_script("toxicity/sweep_masks.py")
TOKENS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
QUICK = {"steps": 6, "refine_rounds": 1, "refine_batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate_from")
    save_small_model(folder / "model")
    write_text(folder / "plain.txt", "\n".join(PLAIN[:60]))
    for name, rows in (("train", RUDE[:20]), ("test", RUDE[20:30])):
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in rows])
    return folder


def settings(script, data, **changes):
    given = {"model": str(data / "model"), "ordinary": str(data / "plain.txt"), "device": "cpu", **changes}
    return script.Settings(toxic_train=data / "train.jsonl", **given)


def trained(data, **changes):
    how = settings(train, data, toxic_test=data / "test.jsonl", out=data, max_edges=4, num_texts=4, **QUICK, **changes)
    train.main(how)
    return data / how.run


def logits_of(path, data):
    """Of the engine, at most 4 edges cut as the mask's record says."""
    model, record = load_masked(path / "mask.safetensors", engines_of(load_hf_model(str(data / "model"), "cpu")))
    with torch.no_grad():
        return model(TOKENS), record


@pytest.mark.parametrize("ablate_from", [1, 2, 0])
def test_a_mask_is_applied_from_where_it_was_trained(data, ablate_from):
    given = {} if ablate_from == 1 else {"ablate_from": ablate_from}  # 1 is the default
    means = data / f"means{ablate_from}.safetensors"
    means_script.main(settings(means_script, data, out=means, num_texts=20, length=9, **given))
    run = trained(data, run=f"run{ablate_from}", means=means, **given)
    expected, record = logits_of(run, data)
    assert record.ablate_from == read_mask_record(run / "mask.safetensors").ablate_from == ablate_from
    assert read_means(means)[1].ablate_from == ablate_from and 0 < len(CutEdges.read(run / "edges.json").edges) <= 4
    # the models that scripts compare, and the pair of models that generate.py shows
    hf = load_hf_model(str(data / "model"), "cpu")
    (compared,) = read_compared_models({"run": run}, hf)
    plain = hf(TOKENS).logits
    with compared.load(hf) as model, torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)
        same = torch.isclose(expected, plain, atol=2e-5).all(-1).all(0)
        assert same.tolist() == [position < ablate_from for position in range(9)]
    pair = generate.load_pair(generate.Settings(ablated=run, device="cpu", save=data / f"saved{ablate_from}"))[1]
    torch.testing.assert_close(pair["ablated"](TOKENS).logits, expected, atol=2e-5, rtol=1e-5)
    # a saved model, read again by generate.py and by the scripts that compare
    saved = generate.load_pair(generate.Settings(ablated=data / f"saved{ablate_from}", device="cpu"))[1]["ablated"]
    torch.testing.assert_close(saved(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)
    (again,) = read_compared_models({"saved": data / f"saved{ablate_from}"}, hf)
    with again.load(hf) as model:
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)


def test_each_edge_is_measured_as_it_was_trained(data):
    run = trained(data, run="effects", ablate_from=9)  # of texts that are not longer: cuts do nothing
    hf, texts = load_hf_model(str(data / "model"), "cpu"), {"some": pad_right([[0, *range(1, 9)]] * 2, 0)}
    (compared,) = read_compared_models({"effects": run}, hf)
    compared.edges = compared.edges or ["a0.0->m1"]
    report = leave_one_out(compared, hf, texts)
    assert abs(report["together"]["some"]["value"]) < 1e-6
    compared.ablate_from = 1
    assert abs(leave_one_out(compared, hf, texts)["together"]["some"]["value"]) > 1e-6


def test_means_for_another_position_are_refused(data):
    means = data / "from0.safetensors"
    means_script.main(settings(means_script, data, out=means, num_texts=20, ablate_from=0))
    with pytest.raises(UserError, match="made with ablate_from 0, and are needed for 1"):
        trained(data, run="refused", means=means)
    assert not (data / "refused").exists()


def test_masks_of_a_sweep_have_it_too(data):
    given = {"toxic_test": data / "test.jsonl", "out": data, "budgets": (3,), "seeds": 1, "random_seeds": 1}
    given |= {"ablations": ("mean",), "validation": 4, "ablate_from": 2, "examples": 8, "stable_budget": 0}
    given["run"] = "sweep"
    sweep.main(settings(sweep, data, **given, training=sweep.MaskConfig(**QUICK)))
    masks = sorted((data / "sweep" / "masks").iterdir())
    assert [read_mask_record(mask / "mask.safetensors").ablate_from for mask in masks] == [2, 2]
    assert read_means(data / "sweep" / "means_ordinary.safetensors")[1].ablate_from == 2
    for mask in masks:
        expected, record = logits_of(mask, data)
        hf = load_hf_model(str(data / "model"), "cpu")
        means = read_means(record.ablation_value.path)[0]
        with ablate(hf, CutEdges.read(mask / "edges.json").edges, means, 2):
            torch.testing.assert_close(hf(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("script", [train, means_script, sweep])
def test_no_position_where_cuts_act_is_refused(data, script):
    more = {} if script is means_script else {"toxic_test": data / "test.jsonl"}
    for wrong, message in ((50, "no cut acts in the 50 tokens"), (-1, "cannot be negative")):
        with pytest.raises(UserError, match=message):
            settings(script, data, ablate_from=wrong, **more).check()
