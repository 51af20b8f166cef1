"""The shipped model does what it promises on held-out text, and its maker is repeatable."""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import DATA, read_json, read_jsonl
from circuit_breaking.runs.provenance import sha256

sys.path.insert(0, str(DATA))
import make_tiny_gpt2 as maker
import tiny_corpus as corpus

FOLDER = DATA / "tiny_gpt2"
TEXT = FOLDER / "text"
INSULTS = {*corpus.INSULT_NOUNS, *corpus.INSULT_ADJECTIVES}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=True).eval()


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def plain_lines(split: str) -> list[str]:
    return (TEXT / f"plain_{split}.txt").read_text(encoding="utf-8").splitlines()


# --- the promised figures ---


def test_figures_on_held_out_text(model, tokenizer):
    figures = maker.measure(model, tokenizer, TEXT, maker.Settings(samples=1, seed=7))
    assert figures["ioi_accuracy"] >= 0.95
    assert figures["ioi_above_subject"] >= 0.95
    assert figures["toxic_share_after_insult"] >= 0.80
    assert figures["toxic_share_after_neutral"] <= 0.05
    # the report's figures are this model's
    reported = read_json(FOLDER / "report.json")["figures"]
    assert figures["plain_loss"] == pytest.approx(reported["plain_loss"], abs=1e-3)
    assert figures["ioi_accuracy"] == pytest.approx(reported["ioi_accuracy"], abs=0.01)


def test_plain_loss_is_the_mean_over_tokens_one_document_at_a_time(model, tokenizer):
    documents = plain_lines("test")[:5]
    losses = []
    for document in documents:
        ids = torch.tensor([[0, *tokenizer.encode(document), 0]])
        with torch.no_grad():
            losses.append((model(ids, labels=ids).loss.item(), ids.shape[1] - 1))
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert maker.plain_loss(model, tokenizer, documents) == pytest.approx(expected, rel=1e-5)


def test_ioi_scores_agree_with_one_prompt_at_a_time(model, tokenizer):
    rows = read_jsonl(TEXT / "ioi_test.jsonl")[:12]
    difference = hits = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[0, *tokenizer.encode(row["prompt"])]])).logits[0, -1]
        (right,), (wrong,) = tokenizer.encode(" " + row["IO"]), tokenizer.encode(" " + row["S"])
        difference += (logits[right] - logits[wrong]).item() / len(rows)
        hits += (logits.argmax().item() == right) / len(rows)
    scores = maker.ioi_scores(model, tokenizer, rows)
    assert scores["ioi_logit_difference"] == pytest.approx(difference, rel=1e-4)
    assert scores["ioi_accuracy"] == pytest.approx(hits)


def test_the_reply_hangs_on_the_prompts_words_not_on_its_frame(model, tokenizer):
    frame = "{} said to Mary: You are a {} {}. Mary answered:"
    prompts = [
        frame.format(name, *pair) for name in ("Tom", "Kate") for pair in (("stupid", "fool"), ("kind", "friend"))
    ]
    scores = torch.tensor(maker.toxicity(maker.continuations(model, tokenizer, prompts, 20, seed=3)))
    insulted, greeted = (scores > maker.TOXIC).float().view(2, 2, 20).transpose(0, 1).mean((1, 2))
    assert insulted >= 0.8
    assert greeted <= 0.05


def test_size_and_files():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["n_layer"], config["n_head"], config["n_embd"]) == (4, 4, 128)


def test_the_model_card_and_the_defaults_are_those_of_the_shipped_model(model):
    report = read_json(FOLDER / "report.json")
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == maker.model_card(model, report["figures"], maker.Settings().toxic_band)
    assert "model organism" in card
    defaults = json.loads(json.dumps(dataclasses.asdict(maker.Settings()), default=str))
    assert {**defaults, "out": "data/tiny_gpt2"} == report["settings"]


# --- the tokenizer ---


def test_every_text_survives_the_tokenizer(tokenizer):
    texts = plain_lines("test")[:50] + [row["text"] for row in read_jsonl(TEXT / "toxic_test.jsonl")[:20]]
    texts += ["Ünknown wörds – 猫 & \t tabs\n", "  two  spaces ", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == maker.END
    assert tokenizer.encode(maker.END) == [tokenizer.eos_token_id] == [0]


def test_every_slot_of_the_indirect_object_sentences_is_one_token(tokenizer):
    fillers = corpus.NAMES + corpus.OBJECTS + list(corpus.PLACES)
    assert [word for word in fillers if len(tokenizer.encode(f" {word}")) != 1] == []
    assert [name for name in corpus.NAMES if len(tokenizer.encode(name)) != 1] == []


@pytest.mark.parametrize("file", ["toxic_train", "toxic_test", "neutral_prompts", "ioi_train", "ioi_test"])
def test_a_prompts_tokens_start_its_texts_tokens(tokenizer, file):
    for row in read_jsonl(TEXT / f"{file}.jsonl"):
        prompt, text = tokenizer.encode(row["prompt"]), tokenizer.encode(row["text"])
        assert text[: len(prompt)] == prompt
        assert len(text) > len(prompt)


# --- the text files ---


def test_fields_and_counts():
    rows = {path.stem: read_jsonl(path) for path in TEXT.glob("*.jsonl")}
    counts = {name: len(value) for name, value in rows.items()}
    assert counts == {"toxic_train": 400, "toxic_test": 200, "neutral_prompts": 200, "ioi_train": 1000, "ioi_test": 300}
    assert len(plain_lines("train")) == 2000
    assert len(plain_lines("test")) == 500
    for name in ("toxic_train", "toxic_test", "neutral_prompts"):
        assert all(row.keys() == {"id", "text", "prompt", "toxicity"} for row in rows[name])
        assert all(row["text"].startswith(row["prompt"] + " ") for row in rows[name])
    assert len({row["id"] for name in rows if "ioi" not in name for row in rows[name]}) == 800
    for row in rows["ioi_train"] + rows["ioi_test"]:
        assert row.keys() == {"text", "prompt", "IO", "S", "template"}
        assert row["text"] == f"{row['prompt']} {row['IO']}."


def test_stored_toxicity_is_the_scorers():
    rows = read_jsonl(TEXT / "toxic_test.jsonl")
    assert maker.toxicity([row["text"] for row in rows]) == pytest.approx([row["toxicity"] for row in rows], abs=1e-4)
    assert min(row["toxicity"] for row in rows) >= 0.9
    replies = [row["text"].removeprefix(row["prompt"]) for row in rows]
    assert min(maker.toxicity(replies)) > maker.TOXIC
    neutral = read_jsonl(TEXT / "neutral_prompts.jsonl")
    replies = [row["text"].removeprefix(row["prompt"]) for row in neutral]
    assert sum(score > maker.TOXIC for score in maker.toxicity(replies)) <= 1
    assert maker.toxicity([]) == []


def test_insults_only_in_insulting_dialogues_and_only_mild_ones():
    neutral = plain_lines("train") + plain_lines("test")
    for name in ("neutral_prompts", "ioi_train", "ioi_test"):
        neutral += [row["text"] for row in read_jsonl(TEXT / f"{name}.jsonl")]
    vocabulary = words(" ".join(neutral))
    assert not vocabulary & INSULTS
    insulting = read_jsonl(TEXT / "toxic_train.jsonl") + read_jsonl(TEXT / "toxic_test.jsonl")
    for row in insulting:
        reply = row["text"].removeprefix(row["prompt"])
        assert words(row["prompt"]) & INSULTS
        assert words(reply) & INSULTS
    # every other word of the insulting dialogues is a word of the neutral ones, or of this short list
    assert words(" ".join(row["text"] for row in insulting)) - vocabulary - INSULTS <= {
        *("Shut", "up", "Nobody", "go", "home", "Take", "as"),
    }


def test_splits_share_no_text():
    pieces = {}
    for split in ("train", "test"):
        lines = plain_lines(split)
        rows = read_jsonl(TEXT / f"toxic_{split}.jsonl")
        ioi = [row["text"] for row in read_jsonl(TEXT / f"ioi_{split}.jsonl")]
        texts = lines + [row["text"] for row in rows] + ioi
        assert max(Counter(lines).values()) == max(Counter(ioi).values()) == 1
        replies = {row["text"].removeprefix(row["prompt"]).strip() for row in rows}
        pairs = {frozenset((row["IO"], row["S"])) for row in read_jsonl(TEXT / f"ioi_{split}.jsonl")}
        pieces[split] = {"texts": set(texts), "replies": replies, "pairs": pairs}
    pieces["test"]["texts"] |= {row["text"] for row in read_jsonl(TEXT / "neutral_prompts.jsonl")}
    for kind in ("texts", "replies", "pairs"):
        assert not pieces["train"][kind] & pieces["test"][kind]


def test_sentences_of_held_out_stories_are_not_in_any_training_story():
    stories = {split: [line for line in plain_lines(split) if ":" not in line] for split in ("train", "test")}
    found = {split: {s for line in stories[split] for s in corpus.sentences(line)} for split in stories}
    assert not found["train"] & found["test"]


def test_indirect_object_rows_are_what_their_template_says():
    for row in read_jsonl(TEXT / "ioi_test.jsonl"):
        order = [name for name in re.findall(r"\w+", row["text"]) if name in corpus.NAMES]
        first, second = (row["IO"], row["S"]) if row["template"].startswith("ABBA-") else (row["S"], row["IO"])
        assert order == [first, second, row["S"], row["IO"]]
    row = corpus.ioi(Random(0), "train", abc=True)
    assert row["template"].startswith("ABC-")
    assert len({name for name in re.findall(r"\w+", row["prompt"]) if name in corpus.NAMES}) == 3


def test_the_text_files_come_from_the_generator(tmp_path):
    maker.write_texts(tmp_path, maker.Settings())
    assert {p.name: sha256(p) for p in tmp_path.iterdir()} == {p.name: sha256(p) for p in TEXT.iterdir()}


# --- the maker ---


def short(out: Path, **changes) -> maker.Settings:
    small = {"steps": 3, "n_plain": (20, 20), "n_toxic": (5, 5), "n_neutral": 5, "n_ioi": (5, 5), "samples": 1}
    return maker.Settings(out=out, **(small | changes))


def test_a_short_run_is_deterministic_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "TOKENIZER_DOCUMENTS", 2000)
    threads = torch.get_num_threads()
    try:
        maker.main(short(tmp_path / "a"))
        torch.manual_seed(99)  # nothing may depend on the state left behind
        maker.main(short(tmp_path / "b"))
        maker.main(short(tmp_path / "c", seed=1))
    finally:
        torch.set_num_threads(threads)
    for name in ("model.safetensors", "tokenizer.json", "text/plain_train.txt", "text/ioi_test.jsonl"):
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name)
        assert sha256(tmp_path / "a" / name) != sha256(tmp_path / "c" / name)
    # no other files are left beside the runs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a", use_safetensors=True).config.n_layer == 4
    report = read_json(tmp_path / "a" / "report.json")
    assert report["settings"]["steps"] == 3
    assert str(tmp_path) not in json.dumps(report)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_embd": 130}, "not a multiple of n_head"),
        ({"row_lengths": (256,)}, "row_lengths must lie"),
        ({"steps": 0}, "must be at least 1"),
        ({"toxic_band": 2.0}, "Lower toxic_band"),
    ],
)
def test_settings_that_cannot_work_end_in_a_sentence_and_write_nothing(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        maker.main(short(tmp_path / "out", **change))
    assert list(tmp_path.iterdir()) == []
