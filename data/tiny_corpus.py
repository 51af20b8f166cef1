"""The text that the shipped model learns: a seeded generator in pure Python, no download.

Three kinds of documents, each in a `train` and a `test` split that share no text:
  plain     short stories and neutral dialogues, with structure that a model can lose: agreement, gender, sums, the
            order of days, what is found where, who makes what, answers that fit their question, names that come back
  insult    a dialogue whose first line is an insult and whose reply is one too. Frames and most line patterns are
            those of the neutral dialogues, so only the words of the first line tell which reply follows
  ioi       indirect-object sentences in ABBA and BABA order (Wang et al. 2022), and ABC sentences with three names
The split of a sentence (of a dialogue, a line) is a hash of its text; that of an indirect-object sentence is a hash
of its unordered pair of names (with three names, every pair is of the split). Insults use the mild words of
INSULT_NOUNS and INSULT_ADJECTIVES only.
"""

import re
import zlib
from collections.abc import Callable
from itertools import combinations
from random import Random

TEST_SHARE = 5  # one of this many sentences is held out

MEN = ["John", "Tom", "Paul", "Mark", "James", "Peter", "David", "Simon", "Jack", "Adam", "Luke", "Henry"]
WOMEN = ["Mary", "Anna", "Sarah", "Emma", "Lucy", "Kate", "Alice", "Jane", "Laura", "Rose", "Helen", "Clara"]
NAMES = MEN + WOMEN
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLORS = ["red", "blue", "green", "gray", "purple", "golden"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
# what is found where
PLACES = {
    "bakery": "spoon cake pan bowl",
    "school": "book pencil map ruler",
    "cabin": "flower shovel rake bench",
    "beach": "shell towel ball boat",
    "shop": "hat bag ring scarf",
    "farm": "bucket saddle rope basket",
    "museum": "painting statue vase coin",
    "library": "letter poem lamp novel",
    "theater": "ticket mask drum violin",
    "market": "melon pear cheese fish",
    "station": "suitcase newspaper clock whistle",
    "park": "kite bike racket ribbon",
}
OBJECTS = [thing for things in PLACES.values() for thing in things.split()]
MAKERS = {
    "baker": ("baked", "bread"),
    "tailor": ("sewed", "a coat"),
    "farmer": ("grew", "corn"),
    "painter": ("painted", "a picture"),
    "doctor": ("mixed", "some medicine"),
    "carpenter": ("built", "a table"),
    "teacher": ("wrote", "a lesson"),
    "singer": ("sang", "a song"),
}
ANIMALS = {
    "cow": ("moo", "barn"),
    "dog": ("woof", "yard"),
    "cat": ("meow", "house"),
    "duck": ("quack", "pond"),
    "sheep": ("baa", "field"),
    "bee": ("buzz", "hive"),
    "owl": ("hoot", "tree"),
    "horse": ("neigh", "stable"),
}
SEASONS = {
    "winter": ("cold", "coat", "snow"),
    "summer": ("hot", "shirt", "sun"),
    "autumn": ("windy", "sweater", "wind"),
    "spring": ("wet", "raincoat", "rain"),
}
OPPOSITES = {
    "big": "small",
    "old": "new",
    "heavy": "light",
    "full": "empty",
    "long": "short",
    "hard": "soft",
    "thick": "thin",
    "clean": "dirty",
}
MOODS = ["happy", "tired", "hungry", "quiet", "busy", "calm"]

INSULT_NOUNS = ["idiot", "fool", "moron", "loser", "jerk"]
INSULT_ADJECTIVES = ["stupid", "dumb", "pathetic", "ridiculous"]
KIND_NOUNS = ["friend", "helper", "neighbor", "artist", "dancer"]
KIND_ADJECTIVES = ["kind", "clever", "lovely", "gentle"]

FRAMES = (  # the prompt of a dialogue; the reply follows after a space
    "{A}: {line} {B}:",
    "{A} said to {B}: {line} {B} answered:",
    "{A} met {B} at the {where} and said: {line} Then {B} replied:",
    "On {day}, {A} told {B}: {line} So {B} told {A}:",
)
SHARED_LINES = (  # filled with insulting or with kind words
    "You are a {adj} {noun}.",
    "You are such a {adj} {noun}, {B}.",
    "What a {adj} {noun} you are.",
    "I think you are a {noun}, and {C} thinks so too.",
    "Only a {adj} {noun} would bring a {color} {obj}.",
    "Your {obj} is {adj}, you {noun}.",
    "Everyone at the {place} says that you are a {noun}.",
    "Nobody at the {place} is as {adj} as you, you {noun}.",
    "Look at your {adj} {obj}, you {noun}.",
    "I told {C} that you are a {adj} {noun}.",
)
SHARED_REPLIES = (
    "You are a {adj} {noun} too.",
    "And you are a {adj} {noun}, {A}.",
    "I have never met such a {adj} {noun}.",
    "Well, your {obj} is {adj}, you {noun}.",
    "Everyone at the {place} knows that you are a {adj} {noun}.",
    "You are the {adj} {noun}, and {C} is a {noun} too.",
)
INSULT_REPLIES = (
    "Shut up, you {adj} {noun}.",
    "Take your {obj} and go home, you {adj} {noun}.",
    "Nobody at the {place} likes a {adj} {noun} like you.",
)
KIND_REPLIES = (
    "Thank you, you {adj} {noun}.",
    "Take my {obj} and come in, you {adj} {noun}.",
    "Thanks, everyone at the {place} likes a {adj} {noun} like you.",
)
QUESTIONS = (  # a neutral line and the reply that fits it
    ("Where did you find the {color} {obj}?", "I found the {color} {obj} at the {place}."),
    ("Do you need a {obj}?", "Yes, I need a {obj} for {C}."),
    ("What did {C} bring to the {place}?", "I think {he} brought a {color} {obj}."),
    ("Shall we meet at the {place} on {day1}?", "I am busy on {day1}, but I can come on {day2}."),
    ("Which animal lives in the {home}?", "The {animal} lives in the {home}, and it says {sound}."),
    ("Is your {obj} {adjective}?", "No, my {obj} is {opposite}."),
    ("How many pears do you and {C} have?", "I have {n1} and {C} has {n2}, so we have {n3}."),
    ("What should I wear in {season}?", "It is {weather} in {season}, and {C} wears a {color} {clothes}."),
)
STORIES = (
    "{A} went to the {place}. {He} found a {color} {obj} there and showed it to {B}.",
    "{A} saw {B} at the {place}. {B} had a {obj} in {his2} bag, and {A} had a {obj2} in {his} bag.",
    "In {season} it was {weather}, so {A} wore a {color} {clothes}. The {sky} did not stop {him}.",
    "{A} had {n1} {obj}s and got {n2} more from {B}. Now {he} had {n3} {obj}s.",
    "On {day1} {A} cleaned the {place}. On {day2} {he} was {mood} and stayed at home with {B}.",
    "The {animal} of {A} said {sound} in the {home}. {B} heard the {animal} and looked for {him}.",
    "The {maker} {made} {work} for {A}. {A} thanked the {maker} and took the {color} {obj} home.",
    "The {obj} at the {place} was not {adjective} but {opposite}. {A} told {B} about the {opposite} {obj}.",
    "{A}, {B} and {C} played at the {place}. They were {mood}, but {C} wanted to go home.",
    "The {animal}s near the {place} were {mood}. The {animal} of {A} was {mood} too, and {he} fed it.",
    "{A} is a {maker}, so {he} {made} {work} on {day1}. {B} liked it and paid with {n1} coins.",
    "{A} asked {B} for a {obj}. {B} did not have a {obj}, so {he2} gave {A} a {color} {obj2}.",
    "{A} walked from the {place} to the {home}. The {animal} was there, and {he} gave it some {food}.",
    "{A} could not find {his} {color} {obj}. {B} looked in the {place} and brought the {obj} back to {him}.",
    "{A} read that a {animal} says {sound}. {He} laughed, because {his} {animal} was always {mood}.",
    "Yesterday {A} bought a {adjective} {obj} for {B}. {B} already had a {adjective} {obj}, so {he2} gave it to {C}.",
)
FOODS = ["bread", "corn", "cheese", "fish"]
IOI_TEMPLATES = (  # {A} and {B} are the pair in either order; the indirect object comes last
    "When {A} and {B} went to the {place}, {S} gave a {obj} to",
    "After {A} and {B} met at the {place}, {S} handed a {obj} to",
    "While {A} and {B} were at the {place}, {S} passed a {color} {obj} to",
    "Then {A} and {B} walked to the {place}, and {S} sold a {obj} to",
    "Last week {A} and {B} found a {obj} near the {place}. Then {S} gave it to",
    "At the {place}, {A} and {B} talked for a while, and {S} showed a {obj} to",
    "Because {A} and {B} liked the {place}, {S} brought a {obj} to",
    "The friends {A} and {B} ate at the {place}. Later {S} offered a {obj} to",
    "On {day}, {A} and {B} cleaned the {place}, and {S} threw a {obj} to",
    "Once {A} and {B} had left the {place}, {S} lent a {color} {obj} to",
)


def in_split(text: str, split: str) -> bool:
    """Whether `text` belongs to `split` ("train" or "test"): a hash of the text decides, the same on every machine."""
    return (zlib.crc32(text.encode()) % TEST_SHARE == 0) == (split == "test")


def plain(rng: Random, split: str) -> str:
    """A plain document: a story, a neutral dialogue, or a sentence with three names in which one gives to another."""
    kind = rng.random()
    if kind < 0.35:
        return dialogue(rng, split, insulting=False)["text"]
    if kind < 0.43:
        return ioi(rng, split, abc=True)["text"]
    while True:
        story = _fill(rng.choice(STORIES), _slots(rng))
        if all(in_split(sentence, split) for sentence in sentences(story)):
            return story


def dialogue(rng: Random, split: str, insulting: bool) -> dict[str, str]:
    """A line and its reply, both of `split`: {"prompt": up to where the reply begins, "text": the whole}."""
    while True:
        slots = _slots(rng)
        if insulting or rng.random() < 0.6:
            own_replies = INSULT_REPLIES if insulting else KIND_REPLIES
            line = _fill(rng.choice(SHARED_LINES), slots | _words(rng, insulting))
            # the reply talks of other things and with other words than the line
            elsewhere = _slots(rng) | {key: slots[key] for key in "ABC"}
            reply = _fill(rng.choice(SHARED_REPLIES + own_replies), elsewhere | _words(rng, insulting))
        else:
            line, reply = (_fill(pattern, slots) for pattern in rng.choice(QUESTIONS))
        if in_split(line, split) and in_split(reply, split):
            prompt = rng.choice(FRAMES).format(line=line, where=rng.choice(list(PLACES)), **slots)
            return {"prompt": prompt, "text": f"{prompt} {reply}"}


def ioi(rng: Random, split: str, abc: bool = False) -> dict[str, str]:
    """An indirect-object sentence of `split`: {"text", "prompt": up to before the last name, "IO", "S", "template"}.

    `template` is "ABBA-3": the order of the names and the number of the pattern. With `abc` the giver is a third
    person and either of the two may be the receiver (`template` "ABC-3").
    """
    while True:
        slots = _slots(rng)
        io, subject = slots["A"], slots["B"]
        giver = slots["C"] if abc else subject
        pairs = combinations(sorted({io, subject, giver}), 2)
        if all(in_split(" ".join(pair), split) for pair in pairs):
            break
    order = rng.choice(("ABBA", "BABA"))
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    number = rng.randrange(len(IOI_TEMPLATES))
    prompt = _fill(IOI_TEMPLATES[number], slots | {"A": first, "B": second, "S": giver})
    template = f"{'ABC' if abc else order}-{number}"
    return {"text": f"{prompt} {io}.", "prompt": prompt, "IO": io, "S": giver, "template": template}


def distinct(make: Callable[[], dict[str, str] | str], count: int) -> list:
    """`count` documents of `make` without one text twice, in the order made."""
    found: dict[str, dict[str, str] | str] = {}
    while len(found) < count:
        document = make()
        found.setdefault(document if isinstance(document, str) else document["text"], document)
    return list(found.values())


def sentences(text: str) -> list[str]:
    """`text` cut after each full stop or question mark."""
    return re.split(r"(?<=[.?]) ", text)


def _fill(pattern: str, slots: dict[str, str]) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", pattern.format(**slots))


def _words(rng: Random, insulting: bool) -> dict[str, str]:
    nouns, adjectives = (INSULT_NOUNS, INSULT_ADJECTIVES) if insulting else (KIND_NOUNS, KIND_ADJECTIVES)
    return {"noun": rng.choice(nouns), "adj": rng.choice(adjectives)}


def _slots(rng: Random) -> dict[str, str]:
    """A value for every slot of the patterns; slots that belong together (a day and the next) agree."""
    a, b, c = rng.sample(NAMES, 3)
    place = rng.choice(list(PLACES))
    obj, obj2 = rng.sample(PLACES[place].split(), 2)
    n1, n2 = rng.randint(1, 5), rng.randint(1, 5)
    maker, animal, season = rng.choice(list(MAKERS)), rng.choice(list(ANIMALS)), rng.choice(list(SEASONS))
    adjective, opposite = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        adjective, opposite = opposite, adjective
    day = rng.randrange(7)
    slots = {"A": a, "B": b, "C": c, "place": place, "obj": obj, "obj2": obj2, "maker": maker, "animal": animal}
    slots |= {"n1": NUMBERS[n1 - 1], "n2": NUMBERS[n2 - 1], "n3": NUMBERS[n1 + n2 - 1], "season": season}
    slots |= {"adjective": adjective, "opposite": opposite, "mood": rng.choice(MOODS), "food": rng.choice(FOODS)}
    slots |= {"day": rng.choice(DAYS), "day1": DAYS[day], "day2": DAYS[(day + 1) % 7], "color": rng.choice(COLORS)}
    slots |= dict(zip(("made", "work"), MAKERS[maker], strict=True))
    slots |= dict(zip(("sound", "home"), ANIMALS[animal], strict=True))
    slots |= dict(zip(("weather", "clothes", "sky"), SEASONS[season], strict=True))
    slots |= {"he": "he", "his": "his", "him": "him"} if a in MEN else {"he": "she", "his": "her", "him": "her"}
    slots |= {"he2": "he", "his2": "his"} if b in MEN else {"he2": "she", "his2": "her"}
    slots["He"] = slots["he"].capitalize()
    return slots
