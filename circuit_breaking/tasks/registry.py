"""The tasks of prompts by name: `PROMPT_TASKS`, and `prompt_task`, which makes one for a tokenizer.

A task is a file with a function that yields random examples; `generate` is its name. Imports no large library, so that
a script can print the names in its `--help`.
"""

import random
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING

from circuit_breaking.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from circuit_breaking.tasks.prompts import EncodedExample, Example, Objective, PromptTask

IOI = "ioi"  # its prompts are in files, which ioi/make_ioi_datasets.py writes
PROMPT_TASKS = {  # name: module that makes its prompts, and what it asks
    IOI: ("ioi", "which of two people is given something"),
    "induction": ("induction", "which word followed this one before"),
    "greater-than": ("greater_than", "a year in which something that began in another year can end"),
    "agreement": ("agreement", "whether a verb is singular or plural"),
    "colours": ("colours", "the letter of the right answer to a question with four answers"),
    "addition": ("arithmetic", "the sum of two numbers of two digits"),
    "subtraction": ("arithmetic", "the difference of two numbers of two digits"),
    "facts": ("facts", "the capital or the language of a country"),
    "docstring": ("docstring", "the next argument of a function in its docstring"),
}
TRAIN, TEST = 500, 200  # prompts of a task
FEWEST = 20  # examples that a tokenizer must know
CHUNK = 200  # most examples per call of the tokenizer
PATIENCE = 4  # chunks without a new example after which there are taken to be no more

Generator = Callable[["PreTrainedTokenizerBase", random.Random, str], Iterator["Example"]]


def prompt_task(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    train: int = TRAIN,
    test: int = TEST,
    seed: int = 0,
    objective: "Objective" = "cross_entropy",
    data_seed: int = 0,
) -> "PromptTask":
    """Make a task of generated prompts. No prompt is both in training and held out.

    Args:
        name: one of `PROMPT_TASKS` but `ioi`, for which there is `IOITask`.
        tokenizer: the model's tokenizer.
        train, test: number of training and held-out prompts. If there are fewer in all, a fifth is held out.
        seed: of the order of training prompts.
        objective: as for `PromptTask`.
        data_seed: of the prompts themselves.

    Raises:
        UserError: the tokenizer knows too few of the words.
    """
    from circuit_breaking.models.tokens import prefix_token
    from circuit_breaking.tasks.prompts import PromptTask, batch_of

    examples = [encoded for _, encoded in draw_examples(name, tokenizer, train + test, data_seed)]
    held_out = test if len(examples) == train + test else min(test, len(examples) // 5)
    prefix = prefix_token(tokenizer)
    parts = (examples[held_out:][:train], examples[:held_out])
    return PromptTask(name, *(batch_of(part, prefix) for part in parts), seed, objective)


def draw_examples(
    name: str, tokenizer: "PreTrainedTokenizerBase", count: int, seed: int = 0
) -> list[tuple["Example", "EncodedExample"]]:
    """Up to `count` different examples of a task that have single tokens as answers, and a counterfactual as long.

    Raises:
        UserError: there are fewer than `FEWEST`.
    """
    from circuit_breaking.tasks.prompts import encode_each

    if name not in PROMPT_TASKS or name == IOI:
        raise UserError(
            f"there are no prompts to generate for the task {name!r}. Use one of {', '.join(PROMPT_TASKS)}."
        )
    generate: Generator = import_module(f"circuit_breaking.tasks.{PROMPT_TASKS[name][0]}").generate
    drawn, patience = generate(tokenizer, random.Random(f"{name} {seed}"), name), PATIENCE
    seen: set[str] = set()
    found: list[tuple[Example, EncodedExample]] = []
    while len(found) < max(count, FEWEST) and patience:
        new = {
            example.text: example
            for example in islice(drawn, min(CHUNK, max(25, 2 * (count - len(found)))))
            if example.text not in seen
        }
        seen |= new.keys()
        pairs = zip(new.values(), encode_each(tokenizer, list(new.values())), strict=True)
        usable = [(one, encoded) for one, encoded in pairs if not encoded.problem and encoded.counterfactual]
        found += usable
        patience = PATIENCE if usable else patience - 1
    if len(found) < FEWEST:
        raise UserError(
            f"{len(found)} prompts of the task {name} have answers that are single tokens of this tokenizer; at least "
            f"{FEWEST} are needed. Use a model whose tokenizer knows more words, or another task."
        )
    return found[:count]


def single_words(tokenizer: "PreTrainedTokenizerBase", words: list[str], least: int, name: str) -> list[str]:
    """Those of some words that are a single token after a space.

    Raises:
        UserError: there are fewer than `least`.
    """
    from circuit_breaking.tasks.prompts import tokens_of

    before = len(tokens_of(tokenizer, ["a"])[0])
    found = [
        word
        for word, tokens in zip(words, tokens_of(tokenizer, [f"a {word}" for word in words]), strict=True)
        if len(tokens) == before + 1
    ]
    if len(found) < least:
        raise UserError(
            f"of the {len(words)} words of the task {name}, {len(found)} are single tokens of this tokenizer; at least "
            f"{least} are needed. Use a model whose tokenizer knows more words, or another task."
        )
    return found
