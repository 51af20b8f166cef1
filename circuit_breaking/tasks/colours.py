"""Multiple choice with the colour copied from the question (the form of MIB's MCQA; Wiegreffe et al. 2025).

    Question: The lamp is brown. What color is the lamp?
    A. gray
    B. brown
    C. white
    D. red
    Answer: -> B

The answer is the letter of the right colour. In the counterfactual, the right colour has changed places with another
one; the letter that is right there is the wrong answer.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.tasks.prompts import Example
from circuit_breaking.tasks.registry import single_words

COLOURS = [
    "red", "blue", "green", "white", "black", "brown", "gray", "yellow", "orange", "pink", "purple", "silver",
    "gold",
]  # fmt: skip
THINGS = [
    "lamp", "box", "car", "door", "chair", "table", "book", "cup", "ball", "boat", "house", "hat", "coat", "shirt",
    "dress", "bag", "bed", "bird", "horse", "cat", "dog", "flower", "phone", "truck", "train", "wall", "bottle",
    "clock", "key", "ring", "shoe", "tree",
]  # fmt: skip
LETTERS = "ABCD"


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random things, colours and places of the right answer."""
    colours, things = single_words(tokenizer, COLOURS, len(LETTERS), name), single_words(tokenizer, THINGS, 1, name)
    while True:
        thing, choices = draw.choice(things), draw.sample(colours, len(LETTERS))
        right, wrong = draw.sample(range(len(LETTERS)), 2)
        swapped = list(choices)
        swapped[right], swapped[wrong] = swapped[wrong], swapped[right]
        prompt, other = (ask(thing, choices[right], each) for each in (choices, swapped))
        # only a letter that is an answer counts as wrong; the others are as wrong in both prompts
        yield Example(prompt, (f" {LETTERS[right]}",), (f" {LETTERS[wrong]}",), other)


def ask(thing: str, colour: str, choices: list[str]) -> str:
    """The question with its four answers."""
    lines = [f"Question: The {thing} is {colour}. What color is the {thing}?"]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([*lines, "Answer:"])
