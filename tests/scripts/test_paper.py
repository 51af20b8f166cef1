"""The paper's experiment as one command: its texts, its prompts, and its table."""

import json

import pytest
import torch
from helpers.scripts import load_script, save_toxic_data

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.models.tokens import behind, packed, pad_right
from circuit_breaking.training.config import FinetuneSettings, MaskConfig

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
paper = load_script("toxicity/paper.py")
FIGURES = {"toxic", "ordinary", paper.BEHIND}


def test_texts_are_packed_into_full_contexts():
    texts = pad_right([[0, 1, 2, 3], [0, 4], [0, 5, 6, 7, 8]], 0)
    batch = packed(texts, 4)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [0, 0, 4, 0], [0, 5, 6, 7]]  # 8 is left over
    assert batch.lengths.tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="too few for a context of 50"):
        packed(texts, 50)


def test_only_the_text_counts_behind_a_prompt():
    prompts, texts = pad_right([[0, 9], [0, 8, 7]], 0), pad_right([[0, 1, 2], [0, 3], [0, 4, 5, 6]], 0)
    batch = behind(prompts, texts, limit=5)
    rows = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    assert rows == [[0, 9, 1, 2], [0, 8, 7, 3], [0, 9, 4, 5, 6]]
    counted = [row[at].tolist() for row, at in zip(batch.tokens.roll(-1, 1), batch.predicted, strict=True)]
    assert counted == [[1, 2], [3], [4, 5, 6]]
    hf = load_hf_model("tiny", "cpu")
    sums, counts = text_losses(hf, batch)
    with torch.no_grad():
        logits = hf(torch.tensor([rows[0]])).logits[0].log_softmax(-1)
    assert counts.tolist() == [2, 1, 3]
    assert sums[0] == pytest.approx(-float(logits[1, 1] + logits[2, 2]), rel=1e-4)


def quick(out, **changes):
    return paper.Settings(
        out=out, device="cpu", scorer="profanity-check", examples=20, validation=10, mean_texts=10, num_texts=10,
        num_prompts=4, new_tokens=6, training=MaskConfig(max_edges=3, steps=3, batch_size=2, keep_loss="loss"),
        finetuning=FinetuneSettings(steps=2, check_every=2, batch_size=2), **changes,
    )  # fmt: skip


def check(folder, most):
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"]) == ["original", "mask", "joint", "task_arithmetic", "ascent"]
    for model in report["models"].values():
        assert set(model["losses"]) == FIGURES and model["continuations"]["toxic"]["toxicity"]["value"] is not None
    assert 0 < report["models"]["mask"]["edges_cut"] <= most and len(report["edges"]) <= most
    text = (folder / "paper.md").read_text()
    assert text.count("\n") == 7 and "after a toxic prompt" in text
    for method in ("joint", "task_arithmetic", "ascent"):
        load_hf_model(folder / "finetuned" / method, "cpu")
    return report


def test_it_runs_from_end_to_end(tmp_path):
    paper.main(quick(tmp_path, model="tiny"))
    report = check(tmp_path / "paper", 3)
    assert report["models"]["original"]["continuations"]["toxic"]["toxicity"]["value"] >= 0.5  # so were they chosen
    hf = load_hf_model("tiny", "cpu")
    with ablate(hf, tmp_path / "paper" / "mask.safetensors"):
        assert hf.edge_cuts.edges == report["edges"] and hf.edge_cuts.means is not None
    with pytest.raises(UserError, match=r"the model continues none of .* prompts with a toxicity of at least 2"):
        paper.main(quick(tmp_path / "none", model="tiny", toxic_from=2.0))


@pytest.mark.slow
def test_the_shipped_model_as_in_the_paper(tmp_path):
    paper.main(paper.Settings(model="tiny", out=tmp_path, device="cpu", scorer="profanity-check"))
    models = check(tmp_path / "paper", 12)["models"]
    toxicity = {name: model["continuations"]["toxic"]["toxicity"]["value"] for name, model in models.items()}
    assert toxicity["mask"] < toxicity["original"] - 0.3


def test_the_data_of_another_model(tmp_path):
    """Posts of one's own; a random model continues nothing toxically, which is said."""
    data = save_toxic_data(tmp_path)
    given = {
        "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl", "ordinary": str(data / "plain.txt"),
        "model": str(data / "model"), "toxic_from": 1.1,
    }  # fmt: skip
    with pytest.raises(UserError, match="the model continues none"):
        paper.main(quick(tmp_path / "out", **given))
