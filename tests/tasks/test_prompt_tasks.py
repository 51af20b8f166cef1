"""Generated tasks: their prompts, answers and counterfactuals, and the metric against a plain definition."""

import random
import re

import pytest
import torch
from helpers.models import small_gpt2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import TINY, load_tokenizer
from circuit_breaking.tasks import agreement, arithmetic, colours, docstring, facts, greater_than, induction
from circuit_breaking.tasks.ioi import Prompt
from circuit_breaking.tasks.prompts import Example, PromptBatch, PromptTask, encode_examples
from circuit_breaking.tasks.registry import IOI, PROMPT_TASKS, draw_examples, prompt_task

GENERATED = [name for name in PROMPT_TASKS if name != IOI]
END = "<|endoftext|>"
KNOWN = [
    *induction.WORDS, *docstring.ARGUMENTS, *colours.COLOURS, *colours.THINGS, *agreement.NOUNS, *greater_than.NOUNS,
    *(f"{noun}s" for noun in agreement.NOUNS), *facts.CAPITALS, *facts.CAPITALS.values(), *facts.LANGUAGES,
    *facts.LANGUAGES.values(), *(verb for pair in agreement.VERBS for verb in pair), *"ABCD",
]  # fmt: skip


def word_tokenizer(digits):
    """Byte-level BPE that knows the words of all tasks, and numbers as pairs of digits or as single digits."""
    split = pre_tokenizers.Split(pattern=Regex(r"\d\d" if digits == 2 else r"\d"), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    texts = [f" {word} {word}" for word in KNOWN] + [f"{number:02d}" for number in range(100)] * (digits == 2)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


@pytest.fixture(scope="module", params=[1, 2], ids=["single digits", "pairs of digits"])
def tokenizer(request):
    return word_tokenizer(request.param)


@pytest.fixture(scope="module")
def one_tokenizer():
    return word_tokenizer(2)


@pytest.mark.parametrize("name", GENERATED)
def test_prompts_fit_the_tokenizer(tokenizer, name):
    task = prompt_task(name, tokenizer, train=30, test=10)
    for batch in (task.train, task.test):
        assert batch.counterfactual.shape == batch.tokens.shape and (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert (batch.right >= -1).all() and (batch.right[:, 0] >= 0).all() and (batch.wrong[:, 0] >= 0).all()
        for row in range(len(batch)):
            end = int(batch.lengths[row])
            text, other = (tokenizer.decode(each[row, 1:end]) for each in (batch.tokens, batch.counterfactual))
            right, wrong = (
                {token for token in each[row].tolist() if token >= 0} for each in (batch.right, batch.wrong)
            )
            assert text != other and not right & wrong
            whole = tokenizer(text + tokenizer.decode(batch.right[row, 0]))["input_ids"]
            assert whole == [*batch.tokens[row, 1:end].tolist(), int(batch.right[row, 0])]
    texts = [tuple(row.tolist()) for row in (*task.train.tokens, *task.test.tokens)]
    assert len(task.train) == 30 and len(task.test) == 10 and len({text for text in texts}) == 40
    again = prompt_task(name, tokenizer, train=30, test=10, seed=5)
    assert torch.equal(again.train.tokens, task.train.tokens)  # the seed is of the order alone
    other = prompt_task(name, tokenizer, train=30, test=10, data_seed=1)
    assert other.train.tokens.shape != task.train.tokens.shape or not torch.equal(other.train.tokens, task.train.tokens)


def examples_of(name, tokenizer, count=30):
    return [example for example, _ in draw_examples(name, tokenizer, count)]


def test_induction_asks_for_the_word_that_followed(one_tokenizer):
    for example in examples_of("induction", one_tokenizer):
        for text, answer in ((example.text, example.right), (example.counterfactual, example.wrong)):
            words = text.removeprefix("The words are: ").split()
            first, again = words[: induction.LENGTH], words[induction.LENGTH :]
            assert len(set(first)) == induction.LENGTH and first[first.index(again[-1]) + 1] == answer[0].strip()


def test_greater_than_asks_for_later_years(tokenizer):
    for example in examples_of("greater-than", tokenizer):
        century, year, again = re.fullmatch(
            r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)", example.text
        ).groups()  # fmt: skip
        assert century == again and example.counterfactual == example.text.replace(century + year, century + "01")
        for answers, fits in ((example.right, int.__gt__), (example.wrong, int.__le__)):
            for answer in answers:
                years = [number for number in range(100) if f"{number:02d}".startswith(answer)]
                assert years and all(fits(number, int(year)) for number in years)
        if len(example.right[0]) == 2:  # every year is an answer
            assert len(example.right) + len(example.wrong) == 100


def test_agreement_asks_for_the_number_of_the_first_noun(one_tokenizer):
    for example in examples_of("agreement", one_tokenizer):
        subject = example.text.split()[1]
        assert (" are" in example.right) == subject.endswith("s") == (" is" in example.wrong)
        assert (" are" in example.wrong) == example.counterfactual.split()[1].endswith("s")
        assert example.text.split()[2:] == example.counterfactual.split()[2:]


def test_colours_ask_for_the_letter(one_tokenizer):
    for example in examples_of("colours", one_tokenizer):
        for text, answer in ((example.text, example.right), (example.counterfactual, example.wrong)):
            colour = re.search(r"is (\w+)\. What", text)[1]
            assert re.findall(rf"([ABCD])\. {colour}\n", text) == [answer[0].strip()]


@pytest.mark.parametrize("name", arithmetic.SIGNS)
def test_arithmetic_is_right(tokenizer, name):
    for example in examples_of(name, tokenizer):
        for text, answer in ((example.text, example.right), (example.counterfactual, example.wrong)):
            lines = text.split("\n")
            for line in lines[:-1]:
                problem, result = line.split("=")
                assert eval(problem) == int(result)
            result = eval(lines[-1].removesuffix("="))
            assert result >= 0 and str(result).startswith(answer[0])
            assert answer[0] == str(result) or len(answer[0]) == 1


@pytest.mark.parametrize(("number", "expected"), [(99, ("99-98=", "1")), (10, ("11-10=", "1"))])
def test_differences_are_of_two_digits_each(number, expected, monkeypatch):
    draw = random.Random(0)
    monkeypatch.setattr(draw, "randrange", lambda *limits: number)
    assert arithmetic.problem(draw, "-") == expected


def test_docstrings_ask_for_the_third_argument(one_tokenizer):
    for example in examples_of("docstring", one_tokenizer):
        for text, answer in ((example.text, example.right), (example.counterfactual, example.wrong)):
            arguments = re.search(r"self, (.*)\)", text)[1].split(", ")
            assert re.findall(r":param (\w+):", text) == arguments[:2] and arguments[2] == answer[0].strip()


def test_facts_are_those_of_the_lists(one_tokenizer):
    known = {
        (country, answer) for facts_of in (facts.CAPITALS, facts.LANGUAGES) for country, answer in facts_of.items()
    }
    for example in examples_of("facts", one_tokenizer):
        for text, answer in ((example.text, example.right), (example.counterfactual, example.wrong)):
            assert any(country in text and (country, answer[0].strip()) in known for country, _ in known)


def test_the_metric_is_that_of_each_prompt_alone(one_tokenizer):
    hf = small_gpt2(vocab_size=len(one_tokenizer), n_positions=64)
    task, model = prompt_task("greater-than", one_tokenizer, 20, 12), load_model(hf, device="cpu")
    measured = task.measure(model)
    task.objective = "logit_difference"
    losses = []
    for row in range(12):
        logits = hf(task.test.tokens[row, : int(task.test.lengths[row])][None]).logits[0, -1].double()
        right, wrong = (
            [token for token in each[row].tolist() if token >= 0] for each in (task.test.right, task.test.wrong)
        )
        p = logits.softmax(-1)
        difference = float((p[right].sum() / p[wrong].sum()).log())
        losses.append(-difference)
        expected = {
            "probability": float(p[right].sum()), "loss": -float(p[right].sum().log()), "logit_difference": difference,
            "above_subject": float(difference > 0), "accuracy": float(int(logits.argmax()) in right),
        }  # fmt: skip
        for key, value in expected.items():
            assert float(measured[key][row]) == pytest.approx(value, abs=2e-5), key
    mask = torch.ones(len(model.graph), requires_grad=True)
    loss = task.loss(model, task.test, mask=mask)
    assert float(loss.detach()) == pytest.approx(sum(losses) / 12, abs=1e-4)
    loss.backward()
    assert mask.grad.isfinite().all() and mask.grad.abs().sum() > 0
    assert task.get_test_loss(model) == pytest.approx(sum(losses) / 12, abs=1e-4)


def test_slices_keep_answers_and_counterfactuals(one_tokenizer):
    task = prompt_task("facts", one_tokenizer, 30, 10)
    batch = task.draw(7)
    assert isinstance(batch, PromptBatch) and batch.counterfactuals().tokens.shape == batch.tokens.shape
    part = batch[2:4].to("cpu")
    width = int(part.lengths.max())
    assert torch.equal(part.counterfactual, batch.counterfactual[2:4, :width])
    assert torch.equal(part.right, batch.right[2:4]) and torch.equal(part.wrong, batch.wrong[2:4])


def test_indirect_objects_have_counterfactuals(one_tokenizer):
    prompt = Prompt("When lamp and table met, table gave a book to", "lamp", "table")
    example = prompt.example()
    assert example.counterfactual == "When lamp and table met, lamp gave a book to"
    assert (example.right, example.wrong) == ((" lamp",), (" table",))
    batch = encode_examples(one_tokenizer, [example], 0)
    assert batch.counterfactuals().tokens.shape == batch.tokens.shape
    once = Prompt("Then table gave a book to", "lamp", "table").example()
    assert once.counterfactual is None
    with pytest.raises(UserError, match="no counterfactual of the same number of tokens"):
        encode_examples(one_tokenizer, [example, once], 0).counterfactuals()
    longer = Example(example.text, example.right, example.wrong, f"{example.text} again")
    assert encode_examples(one_tokenizer, [longer], 0).counterfactual is None


def test_tokenizers_without_the_words_are_refused(one_tokenizer):
    tiny = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({END: 0, "a": 1}, unk_token=END)), bos_token=END
    )
    for name in GENERATED:
        with pytest.raises(UserError, match=f"{name}|cannot be made") as error:
            prompt_task(name, tiny)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'chess'"):
        prompt_task("chess", one_tokenizer)
    with pytest.raises(UserError, match=r"' Constantinople' is .* tokens after .* and not one"):
        encode_examples(one_tokenizer, [Example("We went to", (" Constantinople",), (" Paris",))], 0)


def test_tasks_with_few_prompts_hold_a_fifth_out(one_tokenizer):
    task = prompt_task("facts", one_tokenizer, 5000, 100)
    assert 100 >= len(task.test) == min(100, (len(task.train) + len(task.test)) // 5) > 20
    assert isinstance(task, PromptTask) and task.predictions(task.test) == len(task.test)


@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in data/tiny_gpt2")
def test_the_shipped_model_copies_some_words():
    task, model = prompt_task("induction", load_tokenizer("tiny"), 50, 60), load_model("tiny", device="cpu")
    assert 0 <= task.get_test_accuracy(model) <= 1 and task.get_test_loss(model) > 0
