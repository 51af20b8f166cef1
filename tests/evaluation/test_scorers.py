"""Scorers: sane scores, blank and odd input, and what happens without a network."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.scorers import SCORERS, Detoxify, load_scorer
from circuit_breaking.runs import hub

RUDE = ["You are a stupid idiot.", "shut up, you dumb moron", "what a fool you are"]
KIND = ["What a lovely morning.", "Mary gave the book to John.", "The train leaves at nine."]
LABELS = ["severe_toxic", "toxic", "insult"]  # "toxic" is not the first: labels are found by name
WORDS = ["you", "are", "a", "silly", "goose", "nice", "day", "the", "train", "what", "lovely", "morning"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier of the form of Detoxify's, tiny and random."""
    folder = tmp_path_factory.mktemp("detoxify")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 5 + len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 24, "id2label": dict(enumerate(LABELS))},
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def same_for_all_scorers(scorer):
    texts = ["", "you are a silly goose", " \n\t", "nice day", "\ud800 what", "\0", "day " * 3000, "é\U0001f600"]
    scores = scorer(texts)
    assert scores.shape == (8,) and scores.dtype == np.float64
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()
    assert scores[0] == scores[2] == 0
    assert scorer([]).shape == (0,) and scorer(["", " "]).tolist() == [0, 0]
    assert (scorer(texts) == scores).all()
    np.testing.assert_allclose(scorer(texts[::-1])[::-1], scores, atol=1e-6)
    assert scorer(tuple(texts)).tolist() == scores.tolist()
    with pytest.raises(TypeError, match="list of texts"):
        scorer("you are a silly goose")
    assert scorer.name in SCORERS and scorer.version


def test_profanity_check_is_sane():
    scorer = load_scorer("profanity-check")
    assert scorer(RUDE).min() > 0.9 and scorer(KIND).max() < 0.1
    same_for_all_scorers(scorer)


def test_profanity_check_loads_without_a_warning():
    """Its weights were fitted with the pinned scikit-learn: a mismatch would warn and could score anything."""
    code = (
        "from circuit_breaking.evaluation.scorers import load_scorer; "
        "print(load_scorer('profanity-check')(['you idiot']) > 0.9)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[ True]", "")


def test_detoxify_scores_as_its_model_does_text_by_text(checkpoint):
    scorer = Detoxify(device="cpu", checkpoint=str(checkpoint), batch_size=3)
    same_for_all_scorers(scorer)
    texts = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 7, 1, 5, 2, 8, 4])]
    model = BertForSequenceClassification.from_pretrained(checkpoint, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = [torch.sigmoid(model(**tokenizer(t, return_tensors="pt")).logits[0, 1]).item() for t in texts]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(scorer(texts), expected, atol=1e-6)


def test_auto_takes_detoxify_where_it_is(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(Detoxify.__init__, "__defaults__", ("auto", str(checkpoint), 64))
    assert load_scorer().name == "detoxify"
    assert capsys.readouterr().out == f"scorer: detoxify {checkpoint}\n"


def test_auto_falls_back_and_says_why(offline, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Detoxify.__init__, "__defaults__", ("auto", "nobody/no-such-model", 64))
    scorer = load_scorer()
    assert scorer.name == "profanity-check"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "not detoxify: nobody/no-such-model is not in the cache" in lines[0]


def test_detoxify_without_network_fails_at_once(offline):
    start = time.perf_counter()
    with pytest.raises(UserError, match="out of reach"):
        Detoxify(checkpoint="nobody/no-such-model")
    assert time.perf_counter() - start < 5


def test_a_hub_that_hangs_counts_as_out_of_reach(monkeypatch):
    class Hanging:
        def head(self, *_, **__):
            time.sleep(30)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Hanging)
    monkeypatch.setattr(hub, "HUB_WAIT", 0.2)
    hub.hub_answers.cache_clear()
    start = time.perf_counter()
    assert not hub.hub_answers()
    assert time.perf_counter() - start < 5
    hub.hub_answers.cache_clear()


@pytest.mark.parametrize(
    "damage", ["no weights", "weights cut", "pickle only", "config", "labels", "no head", "empty folder"]
)
def test_damaged_checkpoints(checkpoint, tmp_path, damage):
    if damage != "empty folder":
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        if damage == "no weights":
            weights.unlink()
        elif damage == "pickle only":  # never unpickled
            weights.rename(tmp_path / "pytorch_model.bin")
        elif damage == "weights cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif damage == "no head":
            tensors = {n: t for n, t in load_file(weights).items() if not n.startswith("classifier")}
            save_file(tensors, weights, {"format": "pt"})
        elif damage == "config":
            (tmp_path / "config.json").write_text("{")
        else:
            config = tmp_path / "config.json"
            config.write_text(config.read_text().replace('"toxic"', '"tidy"'))
    with pytest.raises(UserError) as error:
        Detoxify(checkpoint=str(tmp_path))
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(UserError, match="choose auto, detoxify or profanity-check"):
        load_scorer("perspective")


def test_profanity_check_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(UserError, match="pip install alt-profanity-check"):
        load_scorer("profanity-check")
