"""Evaluation against plain loops, and the script that runs it."""

import copy
import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_gpt2
from helpers.scripts import END, PLAIN, RUDE, called, load_script, save_small_model, small_tokenizer
from tqdm import tqdm

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.ablation_values import save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation import bootstrap
from circuit_breaking.evaluation import measure as evaluation
from circuit_breaking.evaluation.bootstrap import estimate
from circuit_breaking.evaluation.generate import Sampling, continuations
from circuit_breaking.evaluation.measure import evaluate, text_losses
from circuit_breaking.evaluation.measurements import Continuations, distinct
from circuit_breaking.evaluation.tables import show
from circuit_breaking.models.tokens import encode, pad_right
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.runs.mask_record import MaskRecord
from circuit_breaking.runs.results import Report
from circuit_breaking.tasks import TextTask

pytestmark = pytest.mark.usefixtures("coarse_pictures")
script = load_script("toxicity/evaluation.py")
ROWS = [[0, 5, 7, 9, 11, 3], [0, 4], [0, 8, 8, 8], [0, 21, 2, 6, 40]]


def loss_by_hand(hf, row, first=1):
    """Summed loss of the tokens of one text from `first` on, with all its logits and no padding."""
    logits = hf(torch.tensor([row])).logits[0, :-1].double()
    return F.cross_entropy(logits[first - 1 :], torch.tensor(row[first:]), reduction="sum").item()


def test_losses_equal_those_of_single_texts(family):
    hf, batch, first = family(), pad_right(ROWS, 0), torch.tensor([3, 1, 2, 5 - 1])
    for begin in (None, first):
        sums, counts = text_losses(hf, replace(batch, starts=begin), batch_size=3)
        starts = [1] * 4 if begin is None else begin.tolist()
        assert counts.tolist() == [len(row) - start for row, start in zip(ROWS, starts, strict=True)]
        expected = [loss_by_hand(hf, row, start) for row, start in zip(ROWS, starts, strict=True)]
        np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_intervals():
    random = np.random.default_rng(0)
    values = random.normal(3, 2, 400)
    got = estimate(values, np.ones(400), seed=1)
    half = 1.96 * values.std() / 20
    assert got["value"] == pytest.approx(values.mean())
    assert got["low"] == pytest.approx(values.mean() - half, abs=0.05)
    assert got["high"] == pytest.approx(values.mean() + half, abs=0.05)
    assert got == estimate(values, np.ones(400), seed=1) != estimate(values, np.ones(400), seed=2)
    # a ratio of totals, not a mean of ratios
    assert estimate(np.array([1.0, 9.0]), np.array([1.0, 3.0]))["value"] == 2.5
    single = estimate(np.array([1.5]), np.array([3.0]))
    assert single == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("seed", [0, 3])
def test_remembered_resamples_are_those_that_would_be_drawn(seed, monkeypatch):
    values = np.random.default_rng(1).normal(3, 2, 50)
    found = [estimate(values, np.ones(50), seed=seed) for _ in range(2)]
    monkeypatch.setattr(bootstrap, "REMEMBERED", 0)
    assert found == [estimate(values, np.ones(50), seed=seed)] * 2


def test_changes_are_paired():
    random = np.random.default_rng(0)
    before = random.normal(3, 2, 400)
    after = before + 0.1 + random.normal(0, 0.01, 400)
    change = estimate(after, np.ones(400), reference=(before, np.ones(400)))["change"]
    assert change["value"] == pytest.approx(0.1, abs=0.002) and change["high"] - change["low"] < 0.003
    same = estimate(before, np.ones(400), reference=(before, np.ones(400)))["change"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    before[3] = math.inf
    broken = estimate(after, np.ones(400), reference=(before, np.ones(400)))
    assert set(broken) == {"value", "low", "high", "change"} and broken["value"] is broken["change"]["low"] is None


def test_what_is_written_twice_is_scored_once(monkeypatch):
    hf, prompts = small_gpt2(), pad_right([[0, 5, 7], [0, 3]], 0)
    written = [Continuations([[4, 9], [4, 9], [8], [1, 2, 3]], 2), Continuations([[8], [4, 9], [8], [8]], 2)]
    seen, plain = [], evaluation.text_losses
    monkeypatch.setattr(
        evaluation, "text_losses", lambda judge, texts, *more: seen.append(len(texts)) or plain(judge, texts, *more)
    )
    with tqdm(total=0, disable=True) as bar:
        evaluation._judge(hf, prompts, written, Sampling(49, batch_size=2), bar)
    assert seen == [4]  # of the first prompt [4, 9] and [8], of the second [8] and [1, 2, 3]
    for what in written:
        for number, row in enumerate(what.rows):
            head = [[0, 5, 7], [0, 3]][number // 2]
            logits = hf(torch.tensor([head + row])).logits[0].detach().log_softmax(-1)
            loss = -sum(float(logits[len(head) - 1 + k, token]) for k, token in enumerate(row))
            assert what.reference_losses[0][number] == pytest.approx(loss, abs=1e-5) and what.reference_losses[1][
                number
            ] == len(row)


def test_distinct_runs():
    rows = [[1, 2, 1, 2], [1, 2], [5]]
    assert [distinct(rows, n) for n in (1, 2, 3, 4, 5)] == [3 / 7, 2 / 4, 2 / 2, 1, None]
    assert distinct([[1], []], 2) is None


class CountsFools:
    name, version = "fools", "1"

    def __call__(self, texts):
        return np.array([min(1.0, text.count("o") / 3) for text in texts])


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def setting(tokenizer):
    """Models, token sets and a sampling: the original, one with edges cut, and one that is broken."""
    hf = small_gpt2(vocab_size=len(tokenizer), n_positions=64)
    broken = copy.deepcopy(hf)
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0] = math.nan

    @contextmanager
    def ablated():
        with ablate(hf, ["a0.1->m1", "embed->output", "m0->a2.0"]):
            yield hf

    models = {"original": lambda: nullcontext(hf), "ablated": ablated, "broken": lambda: nullcontext(broken)}
    texts = {"ordinary": encode(tokenizer, PLAIN[::9], 0, 20), "toxic": encode(tokenizer, RUDE[::9], 0, 20)}
    prompts = {"toxic": encode(tokenizer, RUDE[::29], 0, 7), "ordinary": encode(tokenizer, PLAIN[::31], 0, 5)}
    return hf, models, texts, prompts, Sampling(0, samples=3, new_tokens=8, batch_size=8)


def test_evaluate_against_plain_loops(setting, tokenizer):
    hf, models, texts, prompts, sampling = setting
    untouched = copy.deepcopy(hf)
    report, rows = evaluate(models, tokenizer, texts, prompts, CountsFools(), sampling)
    json.dumps([report, rows], allow_nan=False)
    assert list(report) == ["original", "ablated", "broken"]
    # losses of the ablated model are those of the edge-masked transformer, by way of a task
    engine = load_model(untouched, device="cpu")
    engine.mask.cut_(["a0.1->m1", "embed->output", "m0->a2.0"])
    for key, batch in texts.items():
        expected = TextTask(key, batch, batch).get_test_loss(engine)
        assert report["ablated"]["losses"][key]["value"] == pytest.approx(expected, rel=1e-5)
    engine.mask.reset_()
    assert report["original"]["losses"]["toxic"]["value"] == pytest.approx(
        TextTask("toxic", texts["toxic"], texts["toxic"]).get_test_loss(engine), rel=1e-5
    )
    change = report["ablated"]["losses"]["toxic"]["change"]["value"]
    assert change == pytest.approx(
        report["ablated"]["losses"]["toxic"]["value"] - report["original"]["losses"]["toxic"]["value"]
    )
    # continuations: the ablated model writes, the untouched one judges
    for name in ("original", "ablated"):
        for key, batch in prompts.items():
            with models[name]() as model:
                written = continuations(model, batch, sampling)
            heads = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
            loss = [loss_by_hand(untouched, heads[i // 3] + row, len(heads[i // 3])) for i, row in enumerate(written)]
            about = report[name]["continuations"][key]
            assert about["perplexity"]["value"] == pytest.approx(math.exp(sum(loss) / sum(map(len, written))), rel=1e-4)
            assert about["tokens"]["value"] == pytest.approx(np.mean([len(row) for row in written]))
            scores = CountsFools()(tokenizer.batch_decode(written, skip_special_tokens=True))
            assert about["toxicity"]["value"] == pytest.approx(scores.mean())
            assert about["toxic_share"]["value"] == pytest.approx((scores > 0.5).mean())
            assert about["distinct_bigrams"]["value"] == distinct(written, 2)
            mine = [row for row in rows if row["model"] == name and row["prompts"] == key]
            assert [row["toxicity"] for row in mine] == scores.tolist()
            assert mine[3]["prompt"] == tokenizer.decode(heads[1][1:])
            assert mine[3]["loss"] == pytest.approx(loss[3] / len(written[3]), rel=1e-4)
    assert report["broken"]["continuations"] == {} and "not finite" in report["broken"]["note"]
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), untouched.parameters(), strict=True))
    again, rows_again = evaluate(models, tokenizer, texts, prompts, CountsFools(), sampling)
    assert again == report and rows_again == rows


def test_progress_ends_at_its_total(setting, tokenizer, monkeypatch):
    _, models, texts, prompts, sampling = setting
    whole, bars = {name: models[name] for name in ("original", "ablated")}, []
    monkeypatch.setattr(evaluation, "progress_bar", lambda **about: bars.append(tqdm(**about)) or bars[-1])
    evaluate(whole, tokenizer, texts, prompts, CountsFools(), sampling, seeds=3, greedy=True)
    assert bars[0].n == bars[0].total > 0


def test_table_shows_every_model(setting, tokenizer, capsys, monkeypatch):
    _, models, texts, prompts, sampling = setting
    measured, _ = evaluate(models, tokenizer, texts, prompts, CountsFools(), sampling)
    measured["ablated"]["edges_cut"] = 3
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        show(Report(models=measured, scorer={"name": "fools", "version": "1"}).to_json())
        text = capsys.readouterr().out
        assert "fools 1" in text and "broken" in text and "nan" not in text
        for name in ("original", "ablated"):
            value = measured[name]["losses"]["toxic"]
            assert f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})" in text
        assert max(map(len, text.splitlines())) <= width


def test_many_models_fit_a_narrow_terminal(setting, tokenizer, capsys, monkeypatch):
    _, models, texts, prompts, sampling = setting
    measured, _ = evaluate(models, tokenizer, texts, prompts, CountsFools(), sampling)
    measured |= {f"optimal_{budget}_seed{seed}": measured["ablated"] for budget in (12, 200) for seed in range(3)}
    monkeypatch.setenv("COLUMNS", "80")
    show(Report(models=measured, scorer={"name": "fools", "version": "1"}).to_json())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text and "…" not in text
    value = measured["ablated"]["losses"]["ordinary"]
    assert text.count(f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})") >= 7
    assert all(name in text for name in measured)


# The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, means and a run folder with a mask, as the other scripts would leave them."""
    folder = tmp_path_factory.mktemp("toxicity")
    save_small_model(folder / "model")
    save_small_model(folder / "larger", n_layer=4)
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in RUDE[::2]])
    write_jsonl(folder / "test.jsonl", [{"text": text} for text in RUDE[1::2]])
    write_text(folder / "empty.jsonl", "")
    write_jsonl(folder / "no_text.jsonl", [{"id": 3}])
    for name in ("model", "larger"):
        model = load_model(str(folder / name), device="cpu")
        save_means(folder / f"{name}_means.safetensors", model, torch.randn(len(model.graph.sources), 24))
        save_means(folder / f"{name}_position.safetensors", model, torch.randn(20, len(model.graph.sources), 24))
        model.mask.cut_(["a0.1->m1", "embed->output"])
        data = {
            "toxic_train": str(folder / "train.jsonl"),
            "toxic_test": str(folder / "test.jsonl"),
            "ordinary": str(folder / "plain.txt"),
            "length": 18,
        }
        save_mask(folder / f"run_{name}" / "mask.safetensors", model, MaskRecord(data=data, seed=3))
    return folder


def settings(folder, **changes):
    small = {"num_texts": 12, "num_prompts": 5, "samples": 2, "new_tokens": 6, "scorer": "profanity-check"}
    return script.Settings(**{"run": "run_model", "out": folder, "device": "cpu", **small, **changes})


def test_same_seed_same_report(folder, capsys):
    script.main(settings(folder))
    run = folder / "run_model"
    first = (run / "report.json").read_bytes()
    files = ["mask.safetensors", "report.html", "report.json", "report.png"]
    assert sorted(path.name for path in run.iterdir()) == files
    printed = capsys.readouterr()
    assert "ablated" in printed.out and "fool" not in printed.out + printed.err  # no text of the data
    script.main(settings(folder, save_generations=True))
    report = json.loads((run / "report.json").read_bytes())
    expected = json.loads(first)
    expected["provenance"]["settings"]["save_generations"] = True
    assert report == expected
    used = report["provenance"]["settings"]
    assert used["length"] == 18 and used["seed"] == 0  # the data's as trained, not the seed
    assert report["edges"] == ["a0.1->m1", "embed->output"] and report["models"]["ablated"]["edges_cut"] == 2
    assert report["scorer"]["name"] == "profanity-check"
    assert len(report["provenance"]["inputs"]) == 4  # mask, model, toxic and ordinary texts
    rows = [json.loads(line) for line in (run / "generations.jsonl").open()]
    assert len(rows) == 2 * 2 * 5 * 2
    script.main(settings(folder))
    assert (run / "report.json").read_bytes() == first and not (run / "generations.jsonl").exists()


def test_means_change_what_the_ablated_model_does(folder):
    script.main(settings(folder))
    zero = json.loads((folder / "run_model" / "report.json").read_text())["models"]
    script.main(settings(folder, means=folder / "model_means.safetensors"))
    mean = json.loads((folder / "run_model" / "report.json").read_text())["models"]
    assert mean["original"] == zero["original"] and mean["ablated"]["losses"] != zero["ablated"]["losses"]


BAD = {
    "no mask": ({"run": "none"}, "no file .*mask.safetensors. Train one"),
    "no model": ({"model": "nowhere/at-all"}, "neither a local folder nor available"),
    "mask of another model": ({"mask": "run_larger/mask.safetensors", "model": "model"}, "made for another model"),
    "means of another model": ({"means": "larger_means.safetensors"}, "do not fit this model"),
    "means per position": ({"means": "model_position.safetensors"}, "per position"),
    "no means there": ({"means": "run_model/mask.safetensors"}, "holds no means"),
    "no toxic data": ({"toxic_test": "none.jsonl"}, "no file"),
    "empty toxic data": ({"toxic_test": "empty.jsonl"}, "holds no rows"),
    "seen in training": ({"toxic_test": "train.jsonl"}, "both in the training and the held-out"),
    "rows without text": ({"toxic_prompts": "no_text.jsonl"}, "row 1: there is neither a 'prompt' nor a 'text'"),
    "no prompts": ({"ordinary_prompts": "empty.jsonl"}, "holds no prompt"),
    "no ordinary text": ({"ordinary": "none.txt"}, "no file"),
    "no such scorer": ({"scorer": "vibes"}, "no scorer 'vibes'"),
    "no samples": ({"samples": 0}, "samples is 0"),
    "too long": ({"new_tokens": 60}, "positions"),
    "no device": ({"device": "gpu"}, "device 'gpu'"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(folder, tmp_path, changes, message):
    paths = {name: folder / value for name, value in changes.items() if isinstance(value, str) and "." in value}
    if changes.get("model") == "model":
        paths["model"] = str(folder / "model")
    if "ordinary" in paths:
        paths["ordinary"] = str(paths["ordinary"])
    mask = folder / "run_model" / "mask.safetensors"
    given = {"out": tmp_path, **({} if "run" in changes else {"mask": mask}), **changes, **paths}
    with pytest.raises(UserError, match=message) as error:
        script.main(settings(folder, **given))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line(folder, tmp_path):
    missing = called("toxicity/evaluation.py", "--run", "none", "--out", tmp_path)
    assert missing.returncode == 1 and missing.stdout == "" and list(tmp_path.iterdir()) == []
    assert missing.stderr.startswith("error: there is no file") and len(missing.stderr.splitlines()) == 1


# Prompts


def test_prompts_are_written_out_or_beginnings(tmp_path, tokenizer):
    load = script.load_prompts
    rows = [{"prompt": PLAIN[0], "text": "x"}, {"text": RUDE[0]}, {"text": ""}, {"text": "beyond the third"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    batch = load(tokenizer, tmp_path / "a.jsonl", 3, 4)
    rows = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    assert tokenizer.decode(rows[0]) == END + PLAIN[0]
    assert rows[1:] == [[0, *tokenizer(RUDE[0])["input_ids"][:4]]]
    assert len(load(tokenizer, PLAIN, 9, 4)) == 9
