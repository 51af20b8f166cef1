"""Tasks: which texts they train on and hold out, their losses, and their errors when the data is missing."""

import math
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_gpt2
from helpers.scripts import PLAIN, RUDE, small_tokenizer

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.models.tokens import TokenBatch, encode, pad_right, prefix_token
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.tasks import OWTTask, TextTask, ToxicTask
from circuit_breaking.tasks.owt import load_texts


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def hf(tokenizer):
    return small_gpt2(vocab_size=len(tokenizer), n_positions=64)


def texts_of(tokenizer, batch):
    return [tokenizer.decode(row[1:n].tolist()) for row, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]


def numbered(n, seed=0):
    """A task whose text number i is the tokens 0, i, i."""
    return TextTask("numbers", pad_right([[0, i, i] for i in range(n)], 0), pad_right([[0, 1, 2]], 0), seed)


def test_every_text_comes_once_an_epoch_in_another_order():
    task = numbered(10)
    drawn = [int(row[1]) for _ in range(10) for row in task.draw(4).tokens]
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = numbered(10)
    assert [int(row[1]) for _ in range(10) for row in again.draw(4).tokens] == drawn
    other = numbered(10, seed=1)
    assert [int(row[1]) for _ in range(10) for row in other.draw(4).tokens] != drawn


def test_a_batch_may_be_larger_than_the_data():
    drawn = [int(row[1]) for row in numbered(3).draw(8).tokens]
    assert len(drawn) == 8 and sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]


def loss_by_hand(hf, batch, cap=math.inf):
    losses = []
    for row, n in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        logits = hf(row[None, :n]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, row[1:n], reduction="none").clamp(max=cap))
    return float(torch.cat(losses).double().mean())


def test_losses_are_those_of_hugging_face(hf, tokenizer):
    model = load_model(hf, device="cpu")
    batch = encode(tokenizer, PLAIN[:40], 0, 14)
    task = TextTask("plain", batch, batch[:23])
    assert task.get_test_loss(model) == pytest.approx(loss_by_hand(hf, batch[:23]), rel=1e-5)
    assert task.get_test_loss(model, 5) == pytest.approx(loss_by_hand(hf, batch[:5]), rel=1e-5)
    same = TextTask("plain", batch, batch)
    rows = same.draw(7)
    loss = task.get_train_loss(model, 7)
    assert float(loss.detach()) == pytest.approx(loss_by_hand(hf, rows), rel=1e-5)
    hits = [
        (hf(row[None, :n]).logits[0, :-1].argmax(-1) == row[1:n]).float()
        for row, n in zip(batch.tokens[:23], batch.lengths[:23].tolist(), strict=True)
    ]
    assert task.get_test_accuracy(model) == pytest.approx(float(torch.cat(hits).mean()))
    with pytest.raises(UserError, match="too few"):
        task.get_test_loss(model, 0)


def test_the_cap_counts_prediction_by_prediction(hf, tokenizer):
    model = load_model(hf, device="cpu")
    batch = encode(tokenizer, RUDE[:40], 0, 14)
    rows = TextTask("rude", batch, batch).draw(7)
    cap = loss_by_hand(hf, rows)  # some are above the mean, some below
    capped = TextTask("rude", batch, batch).get_train_loss(model, 7, cap=cap)
    assert float(capped.detach()) == pytest.approx(loss_by_hand(hf, rows, cap), rel=1e-5)
    assert float(capped.detach()) < cap
    capped.backward()
    assert model.mask.weights.grad.abs().sum() > 0
    model.mask.weights.grad = None
    TextTask("rude", batch, batch).get_train_loss(model, 7, cap=1e-9).backward()
    assert model.mask.weights.grad.abs().sum() == 0  # all losses are above the cap, so the gradient is zero


def test_a_mask_can_be_given(hf, tokenizer):
    model = load_model(hf, device="cpu")
    batch = encode(tokenizer, PLAIN[:9], 0, 14)
    cut = torch.ones(len(model.graph))
    cut[::5] = 0
    given = TextTask("plain", batch, batch).get_train_loss(model, 4, mask=cut)
    with torch.no_grad():
        model.mask.weights.copy_(cut)
    torch.testing.assert_close(TextTask("plain", batch, batch).get_train_loss(model, 4), given)


def test_ordinary_text_of_a_file(tmp_path, tokenizer):
    path = tmp_path / "plain.txt"
    lines = [*PLAIN[:50], PLAIN[0], PLAIN[5], *PLAIN[50:100], "", "  "]
    write_text(path, "\n".join(lines))
    train, held_out = load_texts(path, 1000)
    assert not set(train) & set(held_out)  # also those lines that stand twice
    assert held_out == lines[:102:5] and set(train) | set(held_out) == set(PLAIN[:100])
    fewer, held_out_fewer = load_texts(path, 8)
    assert fewer == train[:8] and held_out_fewer == held_out[:3]
    task = OWTTask(tokenizer, path, length=10)
    assert task.train.tokens.shape[1] == 10 and len(task.train) == len(train)
    assert all(text.startswith(got) for text, got in zip(train, texts_of(tokenizer, task.train), strict=True))
    assert (task.train.tokens[:, 0] == 0).all()


def test_toxic_text_is_shuffled_before_it_is_cut_to_the_examples(tokenizer):
    by_score = RUDE[:100]
    task = ToxicTask(tokenizer, by_score, RUDE[100:120], examples=30)
    chosen = texts_of(tokenizer, task.train)
    assert len(chosen) == 30 and set(chosen) <= set(by_score) and not set(chosen) <= set(by_score[:60])
    assert chosen == texts_of(tokenizer, ToxicTask(tokenizer, by_score, RUDE[100:120], examples=30).train)
    assert set(chosen) != set(
        texts_of(tokenizer, ToxicTask(tokenizer, by_score, RUDE[100:], examples=30, seed=1).train)
    )
    assert len(ToxicTask(tokenizer, by_score, RUDE[100:120], examples=None).train) == 100
    assert texts_of(tokenizer, task.test) == RUDE[100:120]
    assert by_score == RUDE[:100]  # the caller's list is left as it was


def test_no_held_out_text_is_seen_in_training(tmp_path, tokenizer):
    path = tmp_path / "plain.txt"
    write_text(path, "\n".join(PLAIN))
    for task in (OWTTask(tokenizer, path), ToxicTask(tokenizer, RUDE[:100], RUDE[100:])):
        held_out = set(texts_of(tokenizer, task.test))
        size = len(task.train)
        seen = {text for _ in range(3) for text in texts_of(tokenizer, task.draw(size))}
        assert len(seen) == size and not seen & held_out
    with pytest.raises(UserError, match="texts that are both in the training and the held-out toxic data: 2"):
        ToxicTask(tokenizer, RUDE[:100], RUDE[98:])


def test_batches_are_cut_to_their_longest_text():
    batch = pad_right([[0, 1], [0, 1, 2, 3], [0, 1, 2]], 9)
    assert batch.tokens.tolist() == [[0, 1, 9, 9], [0, 1, 2, 3], [0, 1, 2, 9]]
    assert [part.tokens.shape for part in batch.batches(2)] == [(2, 4), (1, 3)]
    assert batch.predicted.sum(1).tolist() == [1, 3, 2] and batch.real.sum(1).tolist() == [2, 4, 3]
    assert isinstance(batch[torch.tensor([2, 0])], TokenBatch) and batch[torch.tensor([2, 0])].tokens.shape == (2, 3)


def bad_ordinary(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    write_text(tmp_path / "blank.txt", "\n \n")
    write_text(tmp_path / "one.txt", "a single line\n")
    return {
        "none.txt": "there is no file",
        "latin.txt": "is not UTF-8",
        "blank.txt": "holds no text",
        "one.txt": "too few to train on some and hold out others",
        ".": "is a folder",
    }


def test_ordinary_text_that_cannot_be_read(tmp_path, tokenizer):
    for name, message in bad_ordinary(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            OWTTask(tokenizer, tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_toxic_text_that_cannot_be_read(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in RUDE[:9]])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    write_text(tmp_path / "damaged.jsonl", '{"text": "a"}\n\n{"text": \n')
    for name, rows in {"empty": [], "other": [{"txt": "a"}], "number": [{"text": 3}], "blank": [{"text": ""}]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for name, message in {
        "none": "there is no file .* Make it with toxicity/toxic_data_for_eval.py",
        "latin": "not UTF-8",
        "damaged": "line 3: not JSON",
        "empty": "holds no rows",
        "other": "row 1: there is no 'text'",
        "number": "row 1: 'text' holds int, not text",
        "blank": "none has a token",
    }.items():
        for train, test in ((f"{name}.jsonl", "train.jsonl"), ("train.jsonl", f"{name}.jsonl")):
            with pytest.raises(UserError, match=message) as error:
                ToxicTask(tokenizer, tmp_path / train, tmp_path / test)
            assert "\n" not in str(error.value)


def test_a_context_too_short_to_predict_anything(tokenizer):
    with pytest.raises(UserError, match="nothing to predict"):
        ToxicTask(tokenizer, RUDE[:9], RUDE[9:], length=1)


def test_a_hub_out_of_reach_is_one_sentence(tokenizer, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"'NeelNanda/pile-10k' is not to be had from the Hugging Face hub") as error:
        OWTTask(tokenizer, "NeelNanda/pile-10k")
    assert "\n" not in str(error.value) and "text file" in str(error.value)
    assert time.perf_counter() - start < 20


def test_only_what_follows_a_prompt_counts(tmp_path, tokenizer, hf):
    """The loss by hand over replies, and the same one from the evaluation of a stock model."""
    model = load_model(hf, device="cpu")
    rows = [{"text": text, "prompt": text[: text.index(" a silly")]} for text in RUDE[:4]]
    write_jsonl(tmp_path / "train.jsonl", rows[:2])
    write_jsonl(tmp_path / "test.jsonl", rows[2:])
    task = ToxicTask(tokenizer, tmp_path / "train.jsonl", tmp_path / "test.jsonl", length=30)
    by_hand = []
    for row in rows[2:]:
        tokens = torch.tensor([[prefix_token(tokenizer), *tokenizer(row["text"])["input_ids"]]])[:, :30]
        start = 1 + len(tokenizer(row["prompt"])["input_ids"])
        log_p = hf(tokens).logits.log_softmax(-1)[0]
        by_hand += [-log_p[i - 1, tokens[0, i]] for i in range(start, tokens.shape[1])]
    expected = float(torch.stack(by_hand).mean())
    assert task.get_test_loss(model) == pytest.approx(expected, abs=1e-5)
    sums, counts = text_losses(hf, task.test)
    assert counts.sum() == len(by_hand) and sums.sum() / counts.sum() == pytest.approx(expected, abs=1e-5)
    write_jsonl(tmp_path / "test.jsonl", [{"text": rows[2]["text"], "prompt": "something else"}])
    with pytest.raises(UserError, match="not the beginning"):
        ToxicTask(tokenizer, tmp_path / "train.jsonl", tmp_path / "test.jsonl")


class SlowTokenizer:
    """A tokenizer without character offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)


@pytest.mark.parametrize(
    "prompt, text, counted",
    [
        ("You are ", "You are stupid.", [" stupid", "."]),  # the join falls inside a token
        ("You are", "You are stupid.", [" stupid", "."]),
        ("You are st", "You are stupid.", [" stupid", "."]),
        ("You are \u20ac", "You are \u20ac stupid.", [" stupid", "."]),  # a character of three tokens
        ("", " stupid.", [" stupid", "."]),
    ],
)
def test_the_first_token_that_counts_holds_the_first_character_after_the_prompt(prompt, text, counted):
    tokenizer = load_tokenizer("tiny")
    batch = encode(tokenizer, [text], prefix_token(tokenizer), 50, prompts=[prompt])
    row = batch.tokens[0, int(batch.starts) :]
    assert [tokenizer.decode([token]) for token in row] == counted
    slow = SlowTokenizer(tokenizer)
    if prompt in ("", "You are", "You are \u20ac"):
        assert torch.equal(encode(slow, [text], prefix_token(tokenizer), 50, prompts=[prompt]).starts, batch.starts)
    else:
        with pytest.raises(UserError, match="ends inside a token of its text") as error:
            encode(slow, [text], prefix_token(tokenizer), 50, prompts=[prompt])
        assert "\n" not in str(error.value)
