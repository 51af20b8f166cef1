"""Induction (Olsson et al. 2022): a list of random words is repeated, and the word that followed before comes next.

    The words are: lamp river cat stone moon ... lamp river cat stone -> moon

The wrong answer is a later word of the list. In the counterfactual, the two have changed places in the first list.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.tasks.prompts import Example
from circuit_breaking.tasks.registry import single_words

WORDS = [
    "apple", "arm", "ball", "bank", "bed", "bell", "bird", "boat", "book", "bottle", "bowl", "box", "boy", "bread",
    "bridge", "brother", "bus", "cake", "car", "card", "cat", "chair", "child", "church", "city", "clock", "cloud",
    "coat", "coin", "cow", "cup", "day", "desk", "doctor", "dog", "door", "dress", "drum", "duck", "ear", "egg",
    "eye", "face", "farm", "father", "field", "finger", "fire", "fish", "floor", "flower", "food", "foot", "forest",
    "friend", "garden", "girl", "glass", "gold", "hair", "hand", "hat", "head", "heart", "hill", "horse", "house",
    "ice", "island", "jar", "key", "king", "kitchen", "knife", "lady", "lake", "lamp", "leaf", "leg", "letter",
    "lion", "man", "map", "market", "milk", "mirror", "money", "moon", "mother", "mountain", "mouse", "mouth",
    "music", "night", "nose", "ocean", "oil", "orange", "page", "paper", "park", "pen", "pencil", "phone",
    "picture", "pig", "pipe", "plane", "plant", "plate", "pocket", "prince", "queen", "rain", "ring", "river",
    "road", "rock", "room", "rope", "rose", "salt", "school", "sea", "shell", "ship", "shirt", "shoe", "shop",
    "sister", "sky", "snow", "soap", "sock", "song", "soup", "spoon", "star", "stone", "street", "sugar", "sun",
    "table", "tail", "tea", "teacher", "tent", "tiger", "toe", "tool", "tower", "town", "toy", "train", "tree",
    "truck", "wall", "watch", "water", "wheel", "wind", "window", "wing", "wolf", "woman", "wood",
]  # fmt: skip
LENGTH = 10  # words of the list


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random lists, each repeated up to a random word."""
    words = single_words(tokenizer, WORDS, 2 * LENGTH, name)
    while True:
        chosen = draw.sample(words, LENGTH)
        asked = draw.randrange(LENGTH // 2, LENGTH - 2)  # position of the answer in the list
        other = draw.randrange(asked + 2, LENGTH)  # after the part that is repeated, which both prompts share
        swapped = list(chosen)
        swapped[asked], swapped[other] = swapped[other], swapped[asked]
        prompts = [" ".join(["The words are:", *each, *chosen[:asked]]) for each in (chosen, swapped)]
        yield Example(prompts[0], (f" {chosen[asked]}",), (f" {chosen[other]}",), prompts[1])
