"""The comparison from end to end on a small random model: its files, repeatable, and no training on held-out text."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch
import tyro
from helpers.scripts import PLAIN, RUDE, load_script, save_toxic_data
from transformers import AutoModelForCausalLM

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.report_markdown import COSTS_HEADING
from circuit_breaking.models.load import TINY, load_tokenizer
from circuit_breaking.models.tokens import encode
from circuit_breaking.runs.files import read_csv, read_jsonl, write_jsonl
from circuit_breaking.runs.mask_record import CutEdges
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.tasks.base import TextTask

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
compare = load_script("toxicity/compare.py")
LENGTH = 50  # the scripts' own
QUICK = {
    "steps": 5, "refine_rounds": 1, "batch_size": 3,
    "refine_batch_size": 3, "constants_steps": 2,
}  # fmt: skip
SHORT = [f"--training.{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
LITTLE = {"relearn.py": ["--new-tokens=3", "--checks", "0", "1"], "evaluation.py": ["--new-tokens=4"]}
MADE = ("joint", "task_arithmetic", "lora_npo", "rerouting", "steering")  # test_finetuning.py has the others
VARYING = {"cost.json", "costs.json"}  # and, of report.md and report.html, what is below the heading of costs
COSTS_SECTION = re.compile(rf"<section [^>]*>\n<h2>{COSTS_HEADING}</h2>.*?</section>", re.DOTALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = save_toxic_data(tmp_path_factory.mktemp("data"))
    rows = [{"id": 99_000 + i, "text": f"{text} Yes.", "toxicity": i / 200} for i, text in enumerate(RUDE[1::2])]
    write_jsonl(folder / "uniform.jsonl", rows[::3])
    return folder


def settings(data, out, **changes):
    small = {
        "budgets": (1, 2), "examined_budget": 2, "seeds": 2, "random_seeds": 2, "lrs": (1e-3,), "steps": 4,
        "num_texts": 6, "num_prompts": 2, "methods": MADE, "model": str(data / "model"), "out": out,
        "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl", "ordinary": str(data / "plain.txt"),
    }  # fmt: skip
    return compare.Settings(**{**small, **changes})


def run_parts(chosen, monkeypatch):
    """Every part of the comparison in this process, with short training of masks; the texts that were trained on."""
    drawn, plain = set(), TextTask.draw

    def spy(self, size):
        batch = plain(self, size)
        drawn.update(tuple(row[:n].tolist()) for row, n in zip(batch.tokens, batch.lengths, strict=True))
        return batch

    monkeypatch.setattr(TextTask, "draw", spy)
    for stage in compare.stages(chosen):
        for _, script, options in stage:
            module = load_script(f"toxicity/{script}")
            if script == "sweep_masks.py":
                options = [*options, *SHORT]
            if script in ("sweep_masks.py", "finetune_gpt2.py"):
                options = [*options, "--no-resume"]  # each run makes everything
            options = [*options, *LITTLE.get(script, [])]
            module.main(tyro.cli(module.Settings, args=options))
    monkeypatch.undo()
    return drawn


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run folder, the texts that were trained on, and the files after the first of two runs."""
    out = tmp_path_factory.mktemp("out")
    chosen = settings(data, out)
    with pytest.MonkeyPatch.context() as patch:
        drawn = run_parts(chosen, patch)
    run = out / "compare"
    first = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        run_parts(chosen, patch)
    return run, drawn, first


def test_every_promised_file_is_there(finished):
    run, _, _ = finished
    for name in ("report.json", "report.md", "report.csv", "evidence.json", "relearning.json", "uniform.csv",
                 "costs.json", "comparison.json", "pareto.png", "models.png", "loss_by_toxicity.png", "evidence.png",
                 "relearning.png", "finetuned/finetuning.png", "report.html"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert not (run / "generations.jsonl").exists()
    report = json.loads((run / "report.json").read_text())
    names = set(report["models"])
    masks = {f"{ablation}_{b}" for ablation in ("zero", "mean", "optimal") for b in ("1", "2", "2_seed1")} - {
        "optimal_1"
    }
    learned = {f"random_optimal_2_seed{s}" for s in (0, 1)}  # trained, among random edges of the same number
    chance = {f"random_{ablation}_{b}_seed{s}" for ablation in ("zero", "mean") for b in (1, 2) for s in (0, 1)}
    constants = {f"optimal_2_{control}" for control in ("bias", "added", "mean")}
    assert names == {"original", *MADE} | masks | chance | learned | constants
    for name in constants:
        one = report["models"][name]
        assert one["kind"] == "control" and one["note"] and one["budget"] == 2
        assert one["edges_cut"] == (report["models"]["optimal_2"]["edges_cut"] if name.endswith("mean") else 0)
    assert "Learned constants, with and without the cut" in (run / "report.md").read_text()
    for name, one in report["models"].items():
        if name in masks:
            assert one["edges_cut"] <= one["budget"]
        if name in learned:
            assert one["kind"] == "random" and one["edges_cut"] <= report["models"]["optimal_2"]["edges_cut"]
            drawn = CutEdges.read(run / "masks" / name / "edges.json").edges
            assert drawn and len(drawn) == one["edges_cut"]
        if name in chance:
            assert (
                one["edges_cut"] == report["models"][name.removeprefix("random_").rpartition("_seed")[0]]["edges_cut"]
            )
    joint = report["models"]["joint"]
    assert len(joint["continuations"]["toxic"]["toxicity_by_seed"]) == 2 and "toxicity" in joint["greedy"]["ordinary"]
    costs = json.loads((run / "costs.json").read_text())
    assert set(costs) == masks | learned | set(MADE)
    taught = json.loads((run / "relearning.json").read_text())["models"]
    assert set(taught) == {"original", "zero_2", "mean_2", "optimal_2", *MADE}
    assert set(taught["joint"]["relearning"]) == set(taught["mean_2"]["lora_relearning"]) == {"10", "100"}
    evidence = json.loads((run / "evidence.json").read_text())
    assert set(evidence["masks"]) == {"zero_2", "mean_2", "optimal_2"}
    assert {(row["ablation"], len(row["masks"])) for row in evidence["stability"]} == {
        (ablation, 2) for ablation in ("zero", "mean", "optimal")
    }
    assert len(read_csv(run / "uniform.csv")) > 20


def test_no_held_out_text_is_seen_in_training(data, finished):
    """No held-out text was drawn by any method, mask or relearning, and the files share no id."""
    _, drawn, _ = finished
    tokenizer = load_tokenizer(str(data / "model"))
    held_out = [row["text"] for name in ("test", "uniform") for row in read_jsonl(data / f"{name}.jsonl")]
    batch = encode(tokenizer, [*held_out, *PLAIN[::5]], 0, LENGTH)
    tests = {tuple(row[:n].tolist()) for row, n in zip(batch.tokens, batch.lengths, strict=True)}
    assert len(drawn) > 100 and len(tests) > 100 and not drawn & tests
    ids = [{row["id"] for row in read_jsonl(data / f"{name}.jsonl")} for name in ("train", "test", "uniform")]
    assert not ids[0] & (ids[1] | ids[2])


def test_same_seed_same_report_to_the_last_digit(finished):
    run, _, first = finished
    for path, before in first.items():
        after = (run / path).read_bytes()
        if path.name in VARYING or (path.name == "metrics.jsonl" and path.parts[0] == "masks"):
            continue
        if path.name == "report.md":
            before, after = (text.decode().split(f"## {COSTS_HEADING}")[0] for text in (before, after))
        if path.name == "report.html":
            (before, cut), (after, cut_again) = (COSTS_SECTION.subn("", text.decode()) for text in (before, after))
            assert cut == cut_again == 1
        assert before == after, path


def test_models_that_are_there_are_not_made_again(data, finished, tmp_path, monkeypatch, capsys):
    """A whole comparison's models stay what they are, byte for byte, when their scripts are started again."""
    run = shutil.copytree(finished[0], tmp_path / "compare")
    for script in ("sweep_masks.py", "finetune_gpt2.py"):
        module = load_script(f"toxicity/{script}")
        name = "train_into" if script == "sweep_masks.py" else "finetune"
        monkeypatch.setattr(module, name, lambda *words, **more: pytest.fail("trained once more"))
        folder = run / ("masks" if script == "sweep_masks.py" else "finetuned")
        before = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if "random_" not in str(path)}
        for _, other, options in compare.stages(settings(data, tmp_path))[0]:
            if other == script:
                short = SHORT if script == "sweep_masks.py" else []
                module.main(tyro.cli(module.Settings, args=[*options, *short]))
        assert before and {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out.count("is there, of the same settings") == 8 + 2 + 5


def test_nothing_but_numbers_in_the_files(finished):
    run, _, _ = finished
    for path in run.rglob("*.json*"):
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text(), path
    assert "nan" not in (run / "report.csv").read_text() and "nan" not in (run / "report.md").read_text()


def test_fine_tuned_models_are_ordinary_folders(finished):
    run, _, _ = finished
    for method in ("joint", "lora_npo"):
        model = AutoModelForCausalLM.from_pretrained(run / "finetuned" / method, use_safetensors=True)
        assert model.generate(torch.tensor([[0, 5]]), max_new_tokens=2).shape[1] > 2
        assert load_tokenizer(run / "finetuned" / method)
        record = json.loads((run / "finetuned" / method / "finetuning.json").read_text())
        assert record["chosen"]["lr"] == 1e-3
        assert record["provenance"]["inputs"] and record["provenance"]["texts"]["toxic"]["train"] == 84


def test_a_method_that_explodes_is_noted_in_the_report(data, tmp_path):
    finetuning, evaluation, report = (
        load_script(f"toxicity/{name}.py") for name in ("finetune_gpt2", "evaluation", "report")
    )
    given = {
        "toxic_train": data / "train.jsonl",
        "toxic_test": data / "test.jsonl",
        "ordinary": str(data / "plain.txt"),
    }
    common = {**given, "model": str(data / "model"), "out": tmp_path, "run": "x", "device": "cpu"}
    finetuning.main(
        finetuning.Settings(
            **common, methods=("ascent", "joint"), lrs=(1e30,), clip=1e30, warmup=0, steps=4, check_every=1
        )
    )
    evaluation.main(
        evaluation.Settings(
            **common, models=(tmp_path / "x" / "finetuned",), num_texts=8, num_prompts=3, scorer="profanity-check"
        )
    )
    report.main(report.Settings(run="x", out=tmp_path))
    page = (tmp_path / "x" / "report.md").read_text()
    assert "- ascent: lr 1e+30: the" in page and "not finite at step" in page and "what is left" in page
    assert "nan" not in page and "NaN" not in (tmp_path / "x" / "report.json").read_text()


def test_a_part_that_fails_ends_the_comparison(data, tmp_path, monkeypatch):
    chosen = settings(data, tmp_path, device="gpu")
    monkeypatch.setattr(compare, "stages", lambda settings, plain=compare.stages: [plain(settings)[0][:1]])
    with pytest.raises(UserError, match=r"ended with exit code 1 \(error: device 'gpu'.*logs.*tells the rest"):
        compare.main(chosen)
    assert not (tmp_path / "compare" / "report.json").exists()
    with pytest.raises(UserError, match="examined_budget is 3"):
        compare.main(settings(data, tmp_path, examined_budget=3))


def test_an_interrupted_comparison_goes_on(data, tmp_path, monkeypatch):
    def making(settings, plain=compare.stages):
        name, script, options = next(part for part in plain(settings)[0] if part[0] == "masks_zero")
        return [[(name, script, [*options, *SHORT])]]

    chosen = settings(data, tmp_path, examined_budget=1, budgets=(1, 2, 3), random_seeds=0, workers=1)
    monkeypatch.setattr(compare, "stages", making)
    for name in ("read_models", "statement"):
        monkeypatch.setattr(compare, name, lambda of: None)
    masks = tmp_path / "compare" / "masks"
    first = masks / "zero_1" / "mask.safetensors"

    def stop():
        while not first.is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped) as stopped:
        compare.main(chosen)
    begun, made = tmp_path / "compare" / "begun.json", first.stat().st_mtime_ns
    assert stopped.value.exit_code == 75 and begun.is_file()
    compare.main(dataclasses.replace(chosen, workers=2))
    assert len(list(masks.glob("*/mask.safetensors"))) == 4
    assert first.stat().st_mtime_ns == made and not begun.exists()
    compare.main(chosen)  # a finished one is computed again
    assert first.stat().st_mtime_ns > made
    with locked(tmp_path / "compare"), pytest.raises(UserError, match="another run is writing"):
        compare.main(chosen)


@pytest.mark.parametrize(
    "script, changes, message",
    [
        ("sweep_masks", {"budgets": ()}, "budgets are"),
        ("sweep_masks", {"ablations": ("nothing",)}, "ablations are"),
        ("sweep_masks", {"seeds": -1}, "seeds is -1"),
        ("finetune_gpt2", {"methods": ("joy",)}, "no method 'joy'"),
        ("finetune_gpt2", {"methods": ()}, "methods is empty"),
        ("finetune_gpt2", {"validation": 0}, "validation is 0"),
        ("finetune_gpt2", {"model": "nowhere/at-all"}, "neither a local folder"),
        ("relearn", {"checks": ()}, "checks are"),
        ("relearn", {"models": ("train.jsonl",)}, "holds no model"),
        ("edge_evidence", {"masks": ("model",)}, "has no cut edges"),
        ("edge_evidence", {"masks": ("model",), "num_texts": 0}, "num_texts is 0"),
        ("sweep_masks", {"toxic_test": "train.jsonl"}, "both in the training and the held-out"),
        ("relearn", {"toxic_test": "train.jsonl"}, "both in the training and the held-out"),
        ("edge_evidence", {"masks": ("model",), "toxic_test": "train.jsonl"}, "both in the training and the held-out"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(data, tmp_path, script, changes, message):
    module = load_script(f"toxicity/{script}.py")
    given = {
        "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl", "ordinary": str(data / "plain.txt"),
        "model": str(data / "model"), "out": tmp_path, "device": "cpu",
    }  # fmt: skip
    if script in ("relearn",):
        given["scorer"] = "profanity-check"
    paths = {key: tuple(data / one for one in value) for key, value in changes.items() if key in ("masks", "models")}
    paths |= {key: data / value for key, value in changes.items() if key == "toxic_test"}
    with pytest.raises(UserError, match=message) as error:
        module.main(module.Settings(**{**given, **changes, **paths}))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in data/tiny_gpt2")
def test_the_shipped_model_is_compared_in_time(tmp_path):
    start = time.perf_counter()
    compare.main(compare.Settings(out=tmp_path))
    assert time.perf_counter() - start < 15 * 60
    found = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    page = (tmp_path / "compare" / "report.md").read_text()
    said = (
        "On the Pareto front" if found["pareto"]["on_front"] else "No mask of at most 12 edges is on the Pareto front"
    )
    assert said in page
    for row in found["random_edges"]:
        if row["budget"] <= 12:
            assert row["ordinary_loss"]["mean"] < 0.15
        # no draw of 12 random edges does what the mask does; under mean ablation one does more (README.md)
        if row["budget"] == 12 and row["ablation"] != "mean":
            assert row["toxicity"]["mask"] < row["toxicity"]["lowest"]
