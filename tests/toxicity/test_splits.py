"""No text is in two places: not in training, validation and what is held out, by id, by text or by tokens."""

import pytest
from helpers.scripts import PLAIN, RUDE, small_tokenizer

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.toxicity.splits import check_disjoint, load_splits, without


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def data(tmp_path):
    write_text(tmp_path / "plain.txt", "\n".join(PLAIN + PLAIN[1:30]))
    write_jsonl(tmp_path / "train.jsonl", [{"id": i, "text": text} for i, text in enumerate(RUDE[::2])])
    write_jsonl(tmp_path / "test.jsonl", [{"id": 1000 + i, "text": text} for i, text in enumerate(RUDE[1::2])])
    return tmp_path


def rows(batch):
    return [tuple(row[:n].tolist()) for row, n in zip(batch.tokens, batch.lengths, strict=True)]


def split(data, tokenizer, **changes):
    keywords = {"length": 20, "examples": 30, "validation": 10, "seed": 0, **changes}
    return load_splits(tokenizer, data / "train.jsonl", data / "test.jsonl", str(data / "plain.txt"), **keywords)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("length", [20, 9])  # at 9 tokens many texts begin alike
def test_parts_share_no_text(data, tokenizer, seed, length):
    splits = split(data, tokenizer, seed=seed, length=length)
    for parts in (splits.toxic, splits.ordinary):
        seen = {name: set(rows(batch)) for name, batch in parts.items()}
        assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]
    assert len(splits.toxic["train"]) <= 30 and len(splits.toxic["validation"]) == 10
    assert splits.about["toxic"]["test"] == len(RUDE[1::2])
    # what is trained on is text of the training file
    known = {tokenizer(text)["input_ids"][: length - 1].__repr__() for text in RUDE[::2]}
    assert {list(row[1:]).__repr__() for row in rows(splits.toxic["train"])} <= known


def test_tasks_train_on_one_part_and_test_on_another(data, tokenizer):
    splits = split(data, tokenizer)
    for validate, name in ((False, "test"), (True, "validation")):
        toxic, ordinary = splits.tasks(3, validate)
        assert rows(toxic.train) == rows(splits.toxic["train"]) and rows(toxic.test) == rows(splits.toxic[name])
        assert rows(ordinary.test) == rows(splits.ordinary[name])
    assert rows(split(data, tokenizer, seed=1).toxic["train"]) != rows(splits.toxic["train"])
    assert rows(split(data, tokenizer).toxic["train"]) == rows(splits.toxic["train"])


def test_a_row_in_both_files_is_an_error(data):
    check_disjoint(data / "train.jsonl", data / "test.jsonl")
    for row, what in (
        ({"id": 3, "text": "never seen"}, "id"),
        ({"id": "3", "text": "never seen"}, "id"),
        ({"id": 5000, "text": "  " + RUDE[0].upper() + "\n"}, "text"),
        ({"text": RUDE[2].replace(" ", "  ")}, "text"),
    ):
        write_jsonl(data / "other.jsonl", [{"id": 7000, "text": "fine"}, row])
        with pytest.raises(UserError, match=f"1 rows of .*other.jsonl are both in the training.* by their {what}"):
            check_disjoint(data / "train.jsonl", data / "other.jsonl")
    write_jsonl(data / "other.jsonl", [{"text": "no id"}])
    check_disjoint(data / "train.jsonl", data / "other.jsonl")


def test_too_few_texts(data, tokenizer):
    with pytest.raises(UserError, match="every training text is held out too"):
        without(pad_right([[0, 1]], 0), pad_right([[0, 1], [0, 2]], 0))
    write_jsonl(data / "train.jsonl", [{"text": text} for text in RUDE[0:8:2]])
    with pytest.raises(UserError, match="4 texts of toxic text are too few"):
        split(data, tokenizer)
