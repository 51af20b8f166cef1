"""Subject-verb agreement (Linzen, Dupoux, Goldberg 2016): a verb has the number of its subject.

    The keys near the table -> are, were, have

Another noun, of either number, stands between subject and verb. In the counterfactual, the subject has
the other number.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.tasks.prompts import Example
from circuit_breaking.tasks.registry import single_words

NOUNS = [
    "key", "book", "table", "car", "tree", "house", "dog", "cat", "bird", "ship", "boat", "chair", "door", "window",
    "lamp", "clock", "picture", "letter", "map", "toy", "ball", "cup", "plate", "bottle", "boy", "girl", "friend",
    "teacher", "doctor", "farmer", "king", "queen", "artist", "writer", "horse", "cow", "duck", "flower", "stone",
    "road", "river", "bridge", "tower", "shop", "garden", "park", "school", "train", "truck", "plane",
]  # fmt: skip
BETWEEN = ("near", "behind", "beside", "with", "by")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))  # singular and plural


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random subjects, with a random noun between each and its verb."""
    plurals = set(single_words(tokenizer, [f"{noun}s" for noun in NOUNS], 2, name))
    nouns = [noun for noun in single_words(tokenizer, list(NOUNS), 2, name) if f"{noun}s" in plurals]
    known = set(single_words(tokenizer, [verb for pair in VERBS for verb in pair], 2, name))
    verbs = [pair for pair in VERBS if known.issuperset(pair)] or list(VERBS)
    while True:
        subject, other = draw.sample(NOUNS if len(nouns) < 2 else nouns, 2)
        rest = f"{draw.choice(BETWEEN)} the {other}{draw.choice(['', 's'])}"
        plural = draw.random() < 0.5
        prompts = [f"The {subject}{'s' * number} {rest}" for number in (plural, not plural)]
        answers = [tuple(f" {pair[number]}" for pair in verbs) for number in (plural, not plural)]
        yield Example(prompts[0], answers[0], answers[1], prompts[1])
