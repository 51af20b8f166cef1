"""Indirect-object prompts: names at recorded positions for three kinds of tokenizers; impossible prompts."""

import re
from random import Random

import pytest
from helpers.scripts import called, command
from helpers.shared import SHARED
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuit_breaking.errors import UserError
from circuit_breaking.ioi import prompts
from circuit_breaking.models.load import TINY, load_tokenizer
from circuit_breaking.runs.files import read_json, read_jsonl, write_json


def shipped():
    if not (TINY / "tokenizer.json").is_file():
        pytest.skip("the shipped model is not in data/tiny_gpt2")
    return load_tokenizer("tiny")


def gpt2():
    if not (SHARED / "gpt2-tokenizer").is_dir():
        pytest.skip("GPT-2's tokenizer is not beside this checkout, in shared/data/gpt2-tokenizer")
    return AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")


def sentencepiece():
    """Whole words with the space before them written as a mark, as Llama's tokenizer has them."""
    bank = prompts.read_words(prompts.BANK)
    text = " ".join([*bank.names, *bank.places, *bank.objects, *bank.templates, "in a an"])
    words = [word for word in dict.fromkeys(re.findall(r"\w+", text)) if word != "Mary"]
    vocabulary = ["<unk>", "<s>", ",", ".", *words, *(f"\u2581{word}" for word in words), "\u2581Ma", "ry", "\u2581"]
    pieces = [(piece, 0.0 if i == 0 else -1.0) for i, piece in enumerate(dict.fromkeys(vocabulary))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(params=[shipped, gpt2, sentencepiece])
def tokenizer(request):
    return request.param()


def make(tokenizer, count=300, pairs=True, seed=0):
    words = prompts.known_words(prompts.read_words(prompts.BANK), tokenizer)
    frames = prompts.draw_frames(words, count, Random(seed))
    both = list(prompts.make_rows(words, frames, Random(seed), pairs))
    return words, *(list(prompts.with_positions([pair[kind] for pair in both], tokenizer)) for kind in (0, 1))


def test_every_position_holds_its_name(tokenizer):
    words, plain, abc = make(tokenizer)
    assert len(words.templates) >= 6 and len(words.names) >= 20
    for row in [*plain, *abc]:
        tokens = [None, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]  # behind the prefix token
        at = row["positions"]
        said = {"IO": row["IO"], "S1": row["S"], "S2": row.get("giver", row["S"])}
        for key, name in said.items():
            assert tokenizer.decode([tokens[at[key]]]).strip() == name
        assert at["end"] == len(tokens) - 1 and at["IO"] < at["S2"] and at["S1"] < at["S2"]
        assert "{" not in row["text"] and re.search(r"\w$", row["text"])


def test_orders_pairs_and_counterparts(tokenizer):
    words, plain, abc = make(tokenizer)
    assert len(plain) == len(abc) == 600 and len({row["text"] for row in plain}) == 600
    for number, (row, other) in enumerate(zip(plain, abc, strict=True)):
        assert row["order"] == ("ABBA", "BABA")[number % 2] and other["order"] == ("ABC", "BAC")[number % 2]
        first_is_io = row["positions"]["IO"] < row["positions"]["S1"]
        assert first_is_io == (row["order"] == "ABBA")
        names = [word for word in re.findall(r"\w+", row["text"]) if word in words.names]
        assert sorted(names) == sorted([row["IO"], row["S"], row["S"]])
        three = [word for word in re.findall(r"\w+", other["text"]) if word in words.names]
        assert len(set(three)) == 3 and three[:2] == names[:2]  # no name comes twice
        assert row["positions"] == other["positions"] and row["template"] == other["template"]
    for one, two in zip(plain[::2], plain[1::2], strict=True):
        assert (one["IO"], one["S"]) == (two["S"], two["IO"])
        differing = [(a, b) for a, b in zip(one["text"].split(), two["text"].split(), strict=True) if a != b]
        assert differing == [(one["S"], two["S"])]
    _, single, _ = make(tokenizer, pairs=False)
    assert {row["order"] for row in single} == {"ABBA", "BABA"} and len(single) == 300


def test_a_file_of_words_must_be_of_single_tokens():
    tokenizer = sentencepiece()
    assert "Mary" not in prompts.known_words(prompts.read_words(prompts.BANK), tokenizer).names
    with pytest.raises(UserError, match=r"'Mary', one of the names, is 2 tokens of this tokenizer and not one"):
        prompts.check_single(prompts.Words(["John", "Mary"], [], [], []), tokenizer)
    with pytest.raises(UserError, match="of the 77 names of the project's list 0 are made of single tokens"):
        prompts.known_words(prompts.read_words(prompts.BANK), bare())


def bare():
    """A tokenizer of letters, which has no token to start a text with either."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,."]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Then {A} met {B} and gave a {object} to", r"lacks the slot \{S\}"),
        ("Then {A} met, {S} gave a {object} to", r"lacks the slot \{B\}"),
        ("Then {A} met {B} and {A}, {S} gave it to", r"more than one slot \{A\}"),
        ("{A} met {B}, {S} gave it to", r"no space before \{A\}"),
        ("Then {A} met {B}, {S} gave a {thing} to", r"has the slot \{thing\}"),
        ("Then {A} met {B}, {S} gave { it to", "a brace that is no slot"),
        ("Then {S} told {A} and {B} to give it to", r"its giver \{S\} before"),
        ("Then {A} met {B}, {S} gave a {object}", "must end with the word before the name"),
        ("Then {A} met {B}, {S} gave it to ", "must end with the word before the name"),
    ],
)
def test_templates_that_do_not_work(template, message):
    with pytest.raises(UserError, match=message) as error:
        prompts.check_template(template)
    assert template in str(error.value) and "\n" not in str(error.value)


def test_word_files_that_do_not_work(tmp_path):
    good = read_json(prompts.BANK)
    for change, message in (
        ({"names": None}, "has no list of texts 'names'"),
        ({"places": ["shop", 3]}, "has no list of texts 'places'"),
        ({"names": ["John", "Tom"]}, "gives 2 names; at least 3"),
        ({"objects": ["hat", "hat"]}, "gives 'hat' twice"),
        ({"templates": ["Then {A} met {B}, he gave it to"]}, r"lacks the slot \{S\}"),
    ):
        write_json(tmp_path / "words.json", {**good, **change})
        with pytest.raises(UserError, match=message):
            prompts.read_words(tmp_path / "words.json")
    write_json(tmp_path / "words.json", ["a"])
    with pytest.raises(UserError, match="has no list"):
        prompts.read_words(tmp_path / "words.json")


def test_no_more_prompts_than_there_are():
    words = prompts.Words(
        ["John", "Tom", "Mary"], ["shop"], ["hat", "orange"], ["Then {A} met {B}, {S} gave a {object} to"]
    )
    frames = prompts.draw_frames(words, 12, Random(0))
    assert len({(frame.first, frame.second, frame.object) for frame in frames}) == 12  # every one
    with pytest.raises(UserError, match=r"13 prompts without a repetition were asked for.* give 12"):
        prompts.draw_frames(words, 13, Random(0))
    texts = {prompts.fill(words.templates[0], frame, frame.second)[0] for frame in frames}
    assert any("gave an orange to" in text for text in texts) and not any("a orange" in text for text in texts)


def test_the_script_writes_sets_that_share_nothing(tmp_path):
    shipped()
    options = ("--train", 200, "--test", 50, "--out")
    done = command("ioi/make_ioi_datasets.py", *options, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert called("ioi/make_ioi_datasets.py", *options, tmp_path / "b").returncode == 0
    report = read_json(tmp_path / "a" / "report.json")
    assert report["settings"]["seed"] == 0 and "office" in report["left_out"]["places"]
    assert called("ioi/make_ioi_datasets.py", "--seed", 1, *options, tmp_path / "c").returncode == 0
    for name, templates in (("one", 1), ("two", 2), ("all", len(report["words"]["templates"]))):
        rows = {part: read_jsonl(tmp_path / "a" / f"{name}_{part}.jsonl") for part in ("train", "test")}
        abc = {part: read_jsonl(tmp_path / "a" / f"{name}_abc_{part}.jsonl") for part in ("train", "test")}
        assert [len(each) for each in (*rows.values(), *abc.values())] == [200, 50, 200, 50]
        for found in (rows, abc):
            sets = [{row["text"] for row in part} for part in found.values()]
            assert not sets[0] & sets[1]
        assert len({row["template"] for row in rows["train"]}) == templates
        for part in rows:
            path = f"{name}_{part}.jsonl"
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
            assert (tmp_path / "a" / path).read_bytes() != (tmp_path / "c" / path).read_bytes()


def test_the_script_says_what_is_wrong(tmp_path):
    shipped()
    words = read_json(prompts.BANK)
    write_json(tmp_path / "words.json", {**words, "names": ["John", "Tom", "Gwendolyn"]})
    bare().save_pretrained(tmp_path / "bare")
    for options, message in (
        (("--words", tmp_path / "words.json"), "'Gwendolyn', one of the names, is"),
        (("--words", tmp_path / "none.json"), "there is no file"),
        (("--train", 0), "train is 0"),
        (("--test", 51), "do not come in pairs"),
        (("--train", 8_000_000), "prompts without a repetition"),
        (("--model", tmp_path / "bare"), "neither <|endoftext|> nor a bos_token"),
    ):
        done = called("ioi/make_ioi_datasets.py", "--out", tmp_path / "out", *options)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
