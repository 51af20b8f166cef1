"""IOITask: predictions at the end of right-padded prompts, against Hugging Face one prompt at a time."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_gpt2
from helpers.scripts import NAMES, small_tokenizer

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import TINY, load_tokenizer
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.tasks import IOITask
from circuit_breaking.tasks.ioi import Prompt, read_prompts

ENDS = ("at the market gave", "gave", "called a silly old drum and gave a towel to")
PROMPTS = [
    Prompt(f"{a} and {b} {end}", a, b) for number, a in enumerate(NAMES) for b in NAMES if a != b
    for end in ENDS[number % 3 :]
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def hf(tokenizer):
    return small_gpt2(vocab_size=len(tokenizer), n_positions=64)


def by_hand(hf, tokenizer, prompt):
    """Logits behind one prompt alone, and the tokens of its two names."""
    tokens = torch.tensor([[0, *tokenizer(prompt.text)["input_ids"]]])
    io, subject = (tokenizer(f"x {name}")["input_ids"][-1] for name in (prompt.io, prompt.subject))
    return hf(tokens).logits[0, -1], io, subject


def test_measures_are_those_of_each_prompt_alone(hf, tokenizer):
    test = PROMPTS[5:45]
    task, model = IOITask(tokenizer, PROMPTS[:5], test), load_model(hf, device="cpu")
    assert len(set(task.test.lengths.tolist())) >= 3  # so padding matters
    measured = task.measure(model)
    for row, prompt in enumerate(test):
        logits, io, subject = by_hand(hf, tokenizer, prompt)
        log_p = logits.log_softmax(-1)[io]
        expected = {
            "loss": -log_p, "logit_difference": logits[io] - logits[subject], "accuracy": logits.argmax() == io,
            "above_subject": logits[io] > logits[subject], "probability": log_p.exp(),
        }  # fmt: skip
        for key, value in expected.items():
            assert float(measured[key][row]) == pytest.approx(float(value), abs=2e-5), key
    assert task.get_test_loss(model) == pytest.approx(float(measured["loss"].mean()))
    assert task.get_test_accuracy(model, 7) == pytest.approx(float(measured["accuracy"][:7].mean()))
    assert task.get_test_logit_difference(model, 7) == pytest.approx(float(measured["logit_difference"][:7].mean()))
    assert task.get_test_probability(model) == pytest.approx(float(measured["probability"].mean()))
    assert 0 < measured["above_subject"].mean() < 1


@pytest.mark.parametrize("objective", ["cross_entropy", "logit_difference"])
def test_losses_caps_and_masks(hf, tokenizer, objective):
    task, model = IOITask(tokenizer, PROMPTS[:30], PROMPTS[30:], objective=objective), load_model(hf, device="cpu")
    batch = task.draw(12)
    losses = []
    for row, n, io, subject in zip(batch.tokens, batch.lengths, batch.right[:, 0], batch.wrong[:, 0], strict=True):
        logits = hf(row[None, :n]).logits[0, -1]
        losses.append(F.cross_entropy(logits, io) if objective == "cross_entropy" else logits[subject] - logits[io])
    losses = torch.stack(losses)
    torch.testing.assert_close(task.loss(model, batch).detach(), losses.mean(), atol=1e-5, rtol=1e-5)
    cap = float(losses.mean())
    torch.testing.assert_close(task.loss(model, batch, cap=cap).detach(), losses.clamp(max=cap).mean())
    cut = torch.ones(len(model.graph), requires_grad=True)
    task.loss(model, batch, mask=cut).backward()
    assert cut.grad.abs().sum() > 0
    sign = 1 if objective == "cross_entropy" else -1
    key = "loss" if objective == "cross_entropy" else "logit_difference"
    assert task.get_test_loss(model) == pytest.approx(sign * float(task.measure(model)[key].mean()))


def test_prompts_are_drawn_in_a_seeded_order_and_keep_their_answers(tokenizer):
    def drawn(seed):
        batch = IOITask(tokenizer, PROMPTS[:30], PROMPTS[30:], seed=seed).draw(30)
        return [(row[1], io) for row, io in zip(batch.tokens.tolist(), batch.right[:, 0].tolist(), strict=True)]

    assert drawn(0) == drawn(0) != drawn(1) and sorted(drawn(0)) == sorted(drawn(1))
    first = [tokenizer(f"x {prompt.io}")["input_ids"][-1] for prompt in PROMPTS[:4]]
    assert IOITask(tokenizer, PROMPTS[:30], PROMPTS[30:], examples=4).train.right[:, 0].tolist() == first


def test_means_leave_padding_out(hf, tokenizer):
    task, model = IOITask(tokenizer, PROMPTS[:6], PROMPTS[6:]), load_model(hf, device="cpu")
    outputs = [
        model.node_outputs(row[None, :n])[:, 0] for row, n in zip(task.train.tokens, task.train.lengths, strict=True)
    ]
    torch.testing.assert_close(task.compute_means(model), torch.cat(outputs, 1).mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in data/tiny_gpt2")
def test_the_shipped_model_knows_the_indirect_object():
    task, model = IOITask(load_tokenizer("tiny")), load_model("tiny", device="cpu")
    assert task.get_test_accuracy(model, 100) >= 0.95 and task.get_test_logit_difference(model, 100) > 3


def test_prompts_that_cannot_be_read(tmp_path, tokenizer):
    rows = [{"text": p.text, "IO": p.io, "S": p.subject} for p in PROMPTS[:4]]
    write_jsonl(tmp_path / "good.jsonl", rows)
    assert read_prompts(tmp_path / "good.jsonl") == PROMPTS[:4]
    write_jsonl(tmp_path / "whole.jsonl", [{**rows[0], "text": "more", "prompt": rows[0]["text"]}])
    assert read_prompts(tmp_path / "whole.jsonl") == PROMPTS[:1]
    write_jsonl(tmp_path / "no_io.jsonl", [rows[0], {"text": "a", "S": "b"}])
    write_jsonl(tmp_path / "number.jsonl", [{**rows[0], "IO": 3}])
    write_text(tmp_path / "empty.jsonl", "")
    for name, message in {
        "none": "there is no file .* Make prompts with ioi/make_ioi_datasets.py",
        "no_io": "row 2: there is no 'text', 'IO' and 'S'",
        "number": "row 1: there is no",
        "empty": "holds no rows",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            IOITask(tokenizer, tmp_path / "good.jsonl", tmp_path / f"{name}.jsonl")
        assert "\n" not in str(error.value)


def test_prompts_that_do_not_fit(tokenizer):
    with pytest.raises(UserError, match=r"' Gwendolyn' is \d+ tokens after .* and not one.*make_ioi_datasets"):
        IOITask(tokenizer, PROMPTS[:4], [Prompt("Mary gave", "Gwendolyn", "Mary")])
    with pytest.raises(UserError, match="prompts that are both in the training and the held-out data: 2"):
        IOITask(tokenizer, PROMPTS[:4], PROMPTS[2:6])
    with pytest.raises(UserError, match="no held-out prompts"):
        IOITask(tokenizer, PROMPTS[:4], [])
    with pytest.raises(UserError, match=r"neither .* nor a bos_token"):
        IOITask(without_prefix(), PROMPTS[:4], PROMPTS[4:6])


def without_prefix():
    """A tokenizer that has no token to start a text with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


WANG = {"text": "Then, Jane and Lisa were working at the garden. Lisa decided to give a ring to Jane", "IO": "Jane"}
WANG |= {"S": "Lisa", "[PLACE]": "garden", "[OBJECT]": "ring", "TEMPLATE_IDX": 3}


def test_rows_of_wang_et_al_end_with_the_answer(tmp_path):
    prompt = Prompt(WANG["text"].removesuffix(" Jane"), "Jane", "Lisa")
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [WANG, {**WANG, "text": prompt.text}, {**WANG, "prompt": prompt.text, "text": "anything"}])
    assert read_prompts(path) == [prompt] * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": WANG["text"] + "."}, "the prompt already ends with 'Jane'"),
        ({"text": WANG["text"] + " Jane"}, "the prompt already ends with 'Jane'"),
        ({"prompt": WANG["text"]}, "the prompt already ends with 'Jane'"),
        ({"text": "Jane and Lisa were here. Someone gave a ring to Lisa"}, "the prompt already ends with 'Lisa'"),
        ({"S": "Jane"}, "IO and S are the same name, 'Jane'"),
        ({"prompt": "Jane and Lisa were here. Lisa gave a ring to "}, "the prompt ends in white space"),
        ({"text": "Jane and Lisa were here. Lisa gave a ring to  Jane"}, "the prompt ends in white space"),
        ({"text": "Lisa gave a ring to\n"}, "the prompt ends in white space"),
        ({"text": " Jane"}, "the prompt is empty"),
        ({"IO": " Jane"}, "must not begin or end with white space"),
        ({"IO": "Mary"}, "the prompt does not mention 'Mary'"),
        ({"S": "Lis"}, "the prompt does not mention 'Lis'"),
        ({"prompt": "Jane and Lisas were here. Someone gave a ring to"}, "the prompt does not mention 'Lisa'"),
    ],
)
def test_rows_whose_name_cannot_follow_are_refused(tmp_path, change, message):
    write_jsonl(tmp_path / "rows.jsonl", [WANG, {**WANG, **change}])
    with pytest.raises(UserError, match=rf"rows.jsonl, row 2: .*{message}") as error:
        read_prompts(tmp_path / "rows.jsonl")
    assert "\n" not in str(error.value)
