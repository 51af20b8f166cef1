"""The indirect-object scripts from data to pictures on the shipped model, and their error messages."""

from dataclasses import asdict

import pytest
import torch
from helpers.scripts import load_script

from circuit_breaking.engine.ablation_values import value_in
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation import edge_importance
from circuit_breaking.models.load import TINY
from circuit_breaking.runs.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from circuit_breaking.runs.ioi_results import MASK_GRADIENTS
from circuit_breaking.runs.mask_record import CutEdges, KeptEdges
from circuit_breaking.runs.tensors import read_tensors

pytestmark = [
    pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in tiny_gpt2"),
    pytest.mark.usefixtures("coarse_importance", "blank_pictures", "short_choice"),
]
QUICK = {"steps": 6, "refine_rounds": 1, "refine_batch_size": 8, "num_test": 20, "device": "cpu"}
POINTS = edge_importance.STEPS
PICTURES = ["graph.png", "heat_map.png", "next_tokens.png"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts and ordinary texts for the shipped model, few enough to be encoded in no time, in a separate folder."""
    out = tmp_path_factory.mktemp("prompts")
    script = load_script("ioi/make_ioi_datasets.py")
    script.main(script.Settings(train=400, test=200, out=out))
    texts = (TINY / "text" / "plain_train.txt").read_text(encoding="utf-8").splitlines()
    write_text(out / "plain.txt", "\n".join(texts[:400]))
    return out


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with one trained run, "run"."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_importance, "STEPS", POINTS)  # a test adds up the importance of the edges
        start("train_mask", data, out, steps=30, refine_rounds=5, num_test=80)
    return out


def start(name, data, out, **changes):
    """Run a script with quick settings; its module."""
    script = load_script(f"ioi/{name}.py")
    known = asdict(script.Settings())
    prompts = {part: data / f"all_{part}.jsonl" for part in ("train", "test")}
    given = {**prompts, "ordinary": str(data / "plain.txt"), "out": out, **QUICK, **changes}
    script.main(script.Settings(**{key: value for key, value in given.items() if key in known}))
    return script


def test_breaking_with_few_edges_spares_ordinary_text(runs):
    """What the project promises of the shipped model."""
    about = read_tensors(runs / "run" / "mask.safetensors")[1]
    before, after = about["results"]["before"], about["results"]["after"]
    assert before["accuracy"] >= 0.95 and len(CutEdges.read(runs / "run" / "edges.json").edges) <= 10
    assert after["logit_difference"] < 0 and after["ordinary_loss"] - before["ordinary_loss"] <= 0.1
    left = {path.name for path in (runs / "run").iterdir() if "checkpoint" not in path.name and path.name != ".lock"}
    assert left == {
        "settings.json", "metrics.jsonl", "mask.safetensors", "edges.json", "graph.json", "next_tokens.json",
        "ranking.safetensors", "training.png", "edges.tex", "report.html", *PICTURES,
    }  # fmt: skip
    graph = read_json(runs / "run" / "graph.json")
    assert list(graph["edges"]) == CutEdges.read(runs / "run" / "edges.json").edges
    # the edges' shares add up to what cutting them changes, here on training prompts
    assert sum(graph["edges"].values()) == pytest.approx(
        before["logit_difference"] - after["logit_difference"], rel=0.3
    )
    tokens = read_json(runs / "run" / "next_tokens.json")
    assert all(
        name in [row["token"] for row in rows]
        for rows in tokens["models"].values()
        for name in (tokens["IO"], tokens["S"])
    )


@pytest.mark.parametrize("means", [False, True])
def test_half_of_the_edges_are_sufficient(data, tmp_path, means):
    path = None
    if means:
        path = tmp_path / "means.safetensors"
        script = load_script("ioi/compute_means.py")
        script.main(script.Settings(abc=data / "all_abc_train.jsonl", num_texts=200, out=path, device="cpu"))
    pruning = {"prune_rounds": 5 if means else 10, "shrink": 0.7}  # which takes less where cut edges carry means
    start("alternative_masks", data, tmp_path, kind="sufficient", means=path, num_test=80, **pruning)
    about = read_tensors(tmp_path / "sufficient" / "mask.safetensors")[1]
    before, after = about["results"]["before"], about["results"]["after"]
    kept = read_json(tmp_path / "sufficient" / "graph.json")
    assert KeptEdges.read(tmp_path / "sufficient" / "kept_edges.json").edges == list(kept["edges"])
    assert not (tmp_path / "sufficient" / "edges.json").exists()
    assert kept["what"] == "kept" and 0 < len(kept["edges"]) <= 207 // 2
    assert after["logit_difference"] >= 0.9 * before["logit_difference"]
    stages = read_json(tmp_path / "sufficient" / "stages.json")["stages"]
    assert [row["kept"] for row in stages] == sorted({row["kept"] for row in stages}, reverse=True)
    good = [row["share"] >= 0.9 for row in stages]
    assert stages[max(i for i, each in enumerate(good) if each)]["kept"] == len(kept["edges"])
    assert not any(good[-6:]) or stages[-1]["kept"] == 1
    assert all((tmp_path / "sufficient" / name).is_file() for name in ("stages.png", *PICTURES))


def test_necessary_and_outside(data, runs, tmp_path):
    start("alternative_masks", data, tmp_path, kind="necessary", steps=12)
    results = read_tensors(tmp_path / "necessary" / "mask.safetensors")[1]["results"]
    assert results["after"]["logit_difference"] < 0 < results["before"]["logit_difference"]
    frozen = CutEdges.read(runs / "run" / "edges.json").edges
    start("alternative_masks", data, tmp_path, kind="outside", frozen=str(runs / "run" / "edges.json"))
    assert not set(CutEdges.read(tmp_path / "outside" / "edges.json").edges) & set(frozen)
    assert read_tensors(tmp_path / "outside" / "mask.safetensors")[1]["results"]["frozen"] == frozen


def test_a_cover_is_made_of_masks_without_an_edge_in_common(data, tmp_path):
    start("alternative_masks", data, tmp_path, kind="covering", masks=3, max_edges=4, steps=8)
    about = read_json(tmp_path / "covering" / "covering.json")
    seen: list[str] = []
    for number, one in enumerate(about["masks"], 1):
        assert one["edges"] == CutEdges.read(tmp_path / "covering" / f"mask{number}" / "edges.json").edges
        assert not set(one["edges"]) & set(seen)
        assert one["breaks"] == (one["logit_difference"] <= 0.5 * about["before"]["logit_difference"])
        seen += one["edges"] if one["breaks"] else []
    assert about["masks"][0]["breaks"] and sorted(seen) == sorted(about["union"]["edges"])
    assert sorted(CutEdges.read(tmp_path / "covering" / "edges.json").edges) == sorted(seen)


def test_methods_are_compared(data, runs, tmp_path):
    options = {"num_attribution": 20, "ig_steps": 2, "random_seeds": 2}
    start("compare", data, tmp_path, budgets=(1, 4), **options)
    about = read_json(tmp_path / "comparison" / "ioi_comparison.json")
    methods = about["methods"]
    assert list(methods) == ["EAP", MASK_GRADIENTS, "learned", "random"] and len(methods["random"]) == 4
    for name in ("EAP", MASK_GRADIENTS):
        assert [row["n_cut"] for row in methods[name]] == [1, 4]
        assert set(methods[name][0]["edges"]) < set(methods[name][1]["edges"])  # one ranking
        assert methods[name][1]["logit_difference"] < about["original"]["logit_difference"]
    assert all(row["n_cut"] <= budget for row, budget in zip(methods["learned"], (1, 4), strict=True))
    assert (tmp_path / "comparison" / "comparison.png").is_file()
    # the same numbers of edges of one learned mask, those worth most first
    start("compare", data, runs, budgets=(1, 4), learned="run", **options)
    again = read_json(runs / "comparison" / "ioi_comparison.json")["methods"]
    assert again["random"] == methods["random"] and again["EAP"] == methods["EAP"]
    assert (
        set(again["learned"][0]["edges"])
        <= set(again["learned"][1]["edges"])
        <= set(CutEdges.read(runs / "run" / "edges.json").edges)
    )
    assert again["learned"][0]["logit_difference"] < 1  # one edge carries most of it here
    assert read_tensors(runs / "run" / "mask.safetensors")[1]["ablate_from"] == 1
    with pytest.raises(UserError, match="made with ablate_from 1, and the other methods have 0"):
        start("compare", data, runs, budgets=(1,), learned="run", ablate_from=0, **options)


def test_original_masks_and_fine_tuned_are_measured_alike(data, runs, capsys):
    start("finetune_gpt2", data, runs, steps=20, lr=6e-4)
    script = load_script("ioi/evaluation.py")
    script.main(script.Settings(runs=("run",), out=runs, num_test=60, device="cpu"))
    report = read_json(runs / "report" / "ioi_report.json")
    assert list(report["models"]) == ["original", "run", "fine-tuned"]
    original, masked, tuned = report["models"].values()
    assert (original["edges_cut"], tuned["edges_cut"]) == (0, 0) and 1 <= masked["edges_cut"] <= 10
    for one in report["models"].values():
        assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in one["measures"].values())
    for one in (masked, tuned):
        entry = one["measures"]["logit_difference"]
        change = entry["value"] - original["measures"]["logit_difference"]["value"]
        assert entry["change"]["value"] == pytest.approx(change) and change < -2
    assert (runs / "report" / "report.png").is_file() and "indirect objects" in capsys.readouterr().out
    script.main(script.Settings(runs=("run",), finetuned="none", out=runs, num_test=20, device="cpu"))
    assert list(read_json(runs / "report" / "ioi_report.json")["models"]) == ["original", "run"]


def test_means_of_prompts_by_template_position(data, tmp_path):
    script = load_script("ioi/compute_means.py")

    def means(**changes):
        given = {"abc": data / "two_abc_train.jsonl", "num_texts": 60, "out": tmp_path / "means.safetensors"}
        script.main(script.Settings(**{**given, "device": "cpu", **changes}))
        return read_tensors(tmp_path / "means.safetensors")

    plain, about = means()
    assert plain["means"].dim() == 2 and about["num_texts"] == 60
    by_position = means(kind="position", length=30)[0]["means"]
    assert by_position.shape == (30, *plain["means"].shape)
    longest = max(row["positions"]["end"] for row in read_jsonl(data / "two_abc_train.jsonl")) + 1
    torch.testing.assert_close(by_position[longest], plain["means"], atol=1e-5, rtol=1e-5)
    assert (by_position[1] - plain["means"]).abs().max() > 0.1
    torch.testing.assert_close(by_position[0], plain["means"], atol=1e-5, rtol=1e-5)  # the first position is left out
    every, about = means(kind="position", length=30, ablate_from=0)
    assert about["ablate_from"] == 0 and (every["means"][0] - plain["means"]).abs().max() > 0.1
    assert means(kind="position", texts="ordinary", length=12)[0]["means"].shape[0] == 12
    assert float(means(kind="zero")[0]["means"].abs().max()) == 0
    with pytest.raises(UserError, match="names at other positions in template 0"):
        means(kind="position", abc=data / "all_abc_train.jsonl")
    write_jsonl(
        tmp_path / "plain.jsonl", [{"text": "Then Mary and John met, Tom gave it to", "IO": "Mary", "S": "John"}]
    )
    with pytest.raises(UserError, match="row 1: there are no 'positions'"):
        means(kind="position", abc=tmp_path / "plain.jsonl")


def test_the_published_circuit_is_only_gpt2s(data, runs, tmp_path):
    script = load_script("ioi/known_circuit.py")
    with pytest.raises(UserError, match="GPT-2 small's, and this is a graph of 4 layers"):
        script.main(script.Settings(out=runs))
    edges = {"a8.6->a9.9": 1.0, "m0->a1.1": 0.1}
    shape = {"n_layers": 12, "n_heads": 12, "split_qkv": False, "parallel": False, "n_edges": 11611}
    write_json(tmp_path / "gpt2" / "graph.json", {"graph": shape, "what": "cut", "edges": edges})
    script.main(script.Settings(run="gpt2", out=tmp_path))
    about = read_json(tmp_path / "gpt2" / "known_circuit.json")
    assert about["overlap"]["edges"]["precision"] == 0.5 and (tmp_path / "gpt2" / "known_circuit.png").is_file()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("train_mask", {"train": "none.jsonl"}, "there is no file none.jsonl. Make prompts with"),
        ("train_mask", {"max_edges": 500}, "max_edges 500 is not between"),
        ("train_mask", {"num_test": 0}, "num_test is 0"),
        ("alternative_masks", {"kind": "outside", "frozen": "nothing"}, "there is no file .*nothing/edges.json"),
        ("alternative_masks", {"kind": "outside", "frozen": "published"}, "the published circuit is GPT-2 small's"),
        ("alternative_masks", {"kind": "sufficient", "shrink": 1.0}, "shrink is 1.0"),
        ("alternative_masks", {"kind": "sufficient", "shrink": 0.05, "prune_rounds": 1}, "no stage of pruning"),
        ("compare", {"budgets": (0,)}, r"budgets are \[0\]; each must be 1 or more"),
        ("compare", {"budgets": ()}, "no budget"),
        ("compare", {"learned": "nothing"}, "there is no file .*nothing/mask.safetensors"),
        ("finetune_gpt2", {"lr": 0.0}, "lr is 0.0"),
        ("evaluation", {"runs": ("nothing",)}, "there is no file .* Train one with ioi/train_mask.py"),
        ("evaluation", {"runs": ()}, "there is no run"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(data, tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message) as error:
        start(name, data, tmp_path, **changes)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.png"))


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("train_mask", "alternative_masks"):
        with pytest.raises(UserError, match=r"cannot write .*file/"):
            start(name, data, tmp_path / "file")


def test_scripts_work_for_other_tasks(data, tmp_path):
    quick = {**QUICK, "task": "agreement", "out": tmp_path, "num_test": 12, "ordinary": str(data / "plain.txt")}

    def run(name, **changes):
        script = load_script(f"ioi/{name}.py")
        known = asdict(script.Settings())
        script.main(script.Settings(**{key: value for key, value in {**quick, **changes}.items() if key in known}))

    means = tmp_path / "means.safetensors"
    run("compute_means", num_texts=20, out=means)
    run("train_mask", run="run", max_edges=3, means=means, ordinary=None)  # the shipped texts
    tokens = read_json(tmp_path / "run" / "next_tokens.json")
    assert tokens["prompt"].startswith("The ") and {tokens["IO"], tokens["S"]} <= {" are", " is"}
    run("train_mask", run="resampled", max_edges=3, means=means, resample=True)
    assert read_mask_record(tmp_path / "resampled" / "mask.safetensors").ablation_value == value_in(means, False, True)
    with pytest.raises(UserError, match=r"constants_lr learns .* resample"):
        run("train_mask", constants_lr=0.1, resample=True)
    run("finetune_gpt2", steps=1, batch_size=2)
    run("evaluation", runs=("run", "resampled"), task=None)
    report = read_json(tmp_path / "report" / "ioi_report.json")
    assert report["provenance"]["settings"]["task"] == "agreement" and report["measured_on"]["prompts"] == 12
    assert set(report["models"]) == {"original", "run", "resampled", "fine-tuned"}
    few = {"num_attribution": 8, "ig_steps": 2, "eap_ig_steps": 1, "rank_steps": 2}
    run("faithfulness", **few, activations=True, split_qkv=True, means=means)
    found = read_json(tmp_path / "faithfulness" / "faithfulness.json")
    ways = ["EAP", "EAP-IG", "EAP-IG activations", MASK_GRADIENTS, "ranking", "random"]
    assert list(found["circuits"]) == ways and found["num_prompts"] == 12
    assert all((tmp_path / "faithfulness" / f"{way.replace(' ', '-')}.json").is_file() for way in ways)
    assert found["n_edges"] == 479
    for one in found["circuits"].values():
        curve = one["curves"]["cpr"]
        assert curve["faithfulness"][-1] == pytest.approx(1) and curve["n_edges"][-1] == 479 and one["cmd"] > 0
    # circuits that were written are read, and measured the same; those of another shape are refused
    path = tmp_path / "submitted.json"
    path.write_bytes((tmp_path / "faithfulness" / "EAP.json").read_bytes())
    only_eap = {"num_attribution": 8, "ig_steps": 0, "eap_ig_steps": 0, "rank_steps": 0}
    run("faithfulness", **only_eap, split_qkv=True, means=means, circuits=(path,), run="again")
    again = read_json(tmp_path / "again" / "faithfulness.json")["circuits"]
    assert again["submitted"]["cpr"] == again["EAP"]["cpr"] == pytest.approx(found["circuits"]["EAP"]["cpr"], abs=1e-6)
    run("faithfulness", **only_eap, resample=True, run="resampled")
    run("faithfulness", **only_eap, attention_bias="stream", positions="stream")
    for name in ("resampled", "faithfulness"):
        one = read_json(tmp_path / name / "faithfulness.json")["circuits"]["EAP"]
        assert one["curves"]["cpr"]["faithfulness"][-1] == pytest.approx(1)
    with pytest.raises(UserError, match=r"that make up .* differ"):
        run("faithfulness", num_attribution=8, circuits=(path,))
    with pytest.raises(UserError, match="two circuits are called EAP"):
        run("faithfulness", circuits=(tmp_path / "faithfulness" / "EAP.json",))
    for name in ("train_mask", "faithfulness"):
        with pytest.raises(UserError, match=r"prompts of the task agreement are generated. Leave train out"):
            run(name, train=tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="differ in length"):
        run("compute_means", task="addition", kind="position", num_texts=50, out=tmp_path / "position.safetensors")
