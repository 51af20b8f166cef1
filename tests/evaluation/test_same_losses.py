"""Training and evaluation report the same losses of a mask, and a run writes pictures of its edges."""

import json

import pytest
from helpers.scripts import PLAIN, RUDE, load_script, save_small_model

from circuit_breaking.runs.files import write_jsonl, write_text

pytestmark = pytest.mark.usefixtures("coarse_importance", "short_choice")
train, evaluation = load_script("toxicity/train_mask.py"), load_script("toxicity/evaluation.py")


def test_training_and_evaluation_report_the_same_losses(tmp_path, capsys):
    folder = tmp_path / "data"
    save_small_model(folder / "model", n_layer=2)
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in RUDE[::2]])
    write_jsonl(folder / "test.jsonl", [{"text": text} for text in RUDE[1::2]])
    assert (
        train.Settings().num_texts == evaluation.Settings().num_texts
        and train.Settings().run == evaluation.Settings().run
    )
    train.main(
        train.Settings(
            model=str(folder / "model"), toxic_train=folder / "train.jsonl", toxic_test=folder / "test.jsonl",
            ordinary=str(folder / "plain.txt"), out=tmp_path, length=18, num_texts=12, max_edges=3, steps=4,
            refine_rounds=1, constants_steps=2, device="cpu",
        )
    )  # fmt: skip
    printed, run = capsys.readouterr().out, tmp_path / "run"
    graph = json.loads((run / "graph.json").read_text())
    assert list(graph["edges"]) == json.loads((run / "edges.json").read_text())["edges"] and any(
        graph["edges"].values()
    )
    assert graph["measure"] == "fall of toxic loss, nats" and graph["measure"] in (run / "edges.tex").read_text()
    assert all((run / name).stat().st_size > 10_000 for name in ("graph.png", "heat_map.png"))
    evaluation.main(
        evaluation.Settings(
            out=tmp_path, device="cpu", num_texts=12, num_prompts=3, samples=1, new_tokens=4, scorer="profanity-check"
        )
    )
    models = json.loads((tmp_path / "run" / "report.json").read_text())["models"]
    for text in ("toxic", "ordinary"):
        values = [models[name]["losses"][text]["value"] for name in ("original", "ablated")]
        assert f"held-out loss on {text} text: {values[0]:.3f} -> {values[1]:.3f}" in printed
