"""Draw posts from a dump of 4chan threads: uniformly at random, in memory that does not grow with the dump.

The key of a post is a 128-bit hash of the seed and its text, in which case, width and white space do not count. Each
interval of toxicity keeps the posts with the smallest keys. That is a uniform sample without replacement over distinct
texts (bottom-k). Equal texts have equal keys, and of these the lowest id is kept. The sample does not depend on the
order of the dump. Duplicate texts are counted among the candidates that are kept, not among all posts.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from circuit_breaking.toxicity.dump import read_lines
from circuit_breaking.toxicity.html import clean_html
from circuit_breaking.toxicity.sampling import SmallestKeys, text_key
from circuit_breaking.toxicity.settings import PostSettings

MAX_HTML = 2**16  # characters; 4chan allows 2,000, which its HTML multiplies by five at most
COUNTS = (
    *("lines", "malformed_lines", "threads", "posts", "malformed_posts", "without_text", "without_score"),
    *("invalid_score", "too_long", "empty_after_cleaning", "too_short", "usable", "duplicate_texts_among_candidates"),
)
SHOWN_LINES = 10  # malformed lines that the report names


class Post(NamedTuple):
    id: int
    toxicity: float
    text: str


@dataclass
class Tally:
    """What was read. `counts` has every key from the start, so that reports compare."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    malformed: list[dict[str, Any]] = field(default_factory=list)
    stopped_at_max_posts: bool = False

    def line_is_malformed(self, number: int, why: str) -> None:
        self.counts["malformed_lines"] += 1
        if len(self.malformed) < SHOWN_LINES:
            self.malformed.append({"line": number, "why": why})


class Sampler:
    """Candidates for each cell, the stretches into which the edges of bins and band cut [0, 1]."""

    def __init__(self, settings: PostSettings):
        self.settings = settings
        self.bin_edges = [i / settings.n_bins for i in range(settings.n_bins + 1)]
        self.edges = sorted({*self.bin_edges, *settings.band})
        self.per_bin = settings.n_uniform // settings.n_bins
        uniform = self.per_bin * settings.n_bins
        self.wanted = {"train": settings.n_train, "test": settings.n_test, "uniform": uniform}
        self.cells = []
        for low in self.edges[:-1]:
            need = self.per_bin + (settings.n_train + settings.n_test if self.in_band(low) else 0)
            # spare ones for texts that turn up in two cells, and so that small dumps are counted exactly
            self.cells.append(SmallestKeys(2 * need + 500))
        self.histogram = [0] * settings.n_bins

    def in_band(self, toxicity: float) -> bool:
        low, high = self.settings.band
        return low <= toxicity < high or toxicity == high == 1

    def bin(self, toxicity: float) -> int:
        return min(bisect_right(self.bin_edges, toxicity), self.settings.n_bins) - 1

    def offer(self, post: Post) -> None:
        self.histogram[self.bin(post.toxicity)] += 1
        cell = self.cells[min(bisect_right(self.edges, post.toxicity), len(self.cells)) - 1]
        cell.offer(text_key(post.text, self.settings.seed), post)

    def candidates(self) -> list[Post]:
        """Candidates of all cells in the order of their keys (a random order), each text and each id once."""
        by_text: dict[int, Post] = {}
        for cell in self.cells:
            for key, post in cell.kept.items():
                by_text[key] = min(by_text.get(key, post), post)
        by_id: dict[int, Post] = {}
        for _, post in sorted(by_text.items()):
            by_id.setdefault(post.id, post)
        return list(by_id.values())

    def duplicates(self) -> int:
        """Posts beyond the first of each candidate's text."""
        copies: Counter[int] = Counter()
        for cell in self.cells:
            copies.update(cell.copies)
        return copies.total() - len(copies)

    def draw(self) -> dict[str, list[Post]]:
        """The three sets. Where the band has too few posts, all that draw on it shrink by the same factor."""
        settings, ordered = self.settings, self.candidates()
        band = [post for post in ordered if self.in_band(post.toxicity)]
        split = settings.n_train + settings.n_test
        wanted = split + self.per_bin * len({self.bin(post.toxicity) for post in band})
        if len(band) < wanted:
            split = split * len(band) // wanted
        n_train = round(split * settings.n_train / max(1, settings.n_train + settings.n_test))
        if split > 1 and settings.n_train and settings.n_test:
            n_train = min(max(n_train, 1), split - 1)
        taken = set(band[:split])
        bins: list[list[Post]] = [[] for _ in range(settings.n_bins)]
        for post in ordered:
            if post not in taken:
                bins[self.bin(post.toxicity)].append(post)
        per_bin = min(self.per_bin, *map(len, bins))
        uniform = {post for posts in bins for post in posts[:per_bin]}
        return {
            "train": band[:n_train],
            "test": band[n_train:split],
            "uniform": [post for post in ordered if post in uniform],
        }


def read_threads(lines: Iterable[tuple[int, bytes | None]], tally: Tally) -> Iterator[list[Any]]:
    """The posts of each thread. A line that is no thread is counted, with its number."""
    for number, line in lines:
        tally.counts["lines"] += 1
        if line is None:
            tally.line_is_malformed(number, "too long")
            continue
        try:
            thread = json.loads(line)
        except UnicodeDecodeError:
            tally.line_is_malformed(number, "not UTF-8")
        except json.JSONDecodeError as error:
            tally.line_is_malformed(number, f"not JSON: {error.msg} (column {error.colno})")  # says nothing of the text
        except (ValueError, RecursionError):  # a number of too many digits, nesting too deep
            tally.line_is_malformed(number, "not JSON that can be read")
        else:
            if isinstance(thread, dict) and isinstance(thread.get("posts"), list):
                tally.counts["threads"] += 1
                yield thread["posts"]
            else:
                tally.line_is_malformed(number, "not a thread: no list of posts")


def read_post(raw: Any, min_characters: int) -> Post | str:
    """The post, or the name of the count under which it is left out."""
    if not isinstance(raw, dict) or type(raw.get("no")) is not int or not 0 <= raw["no"] < 2**63:
        return "malformed_posts"
    source, scores = raw.get("com"), raw.get("perspectives")
    if source is None or source == "":
        return "without_text"
    if not isinstance(source, str) or not isinstance(scores, dict | None):
        return "malformed_posts"
    toxicity = scores.get("TOXICITY") if scores else None
    if toxicity is None:
        return "without_score"
    if type(toxicity) not in (int, float) or not 0 <= toxicity <= 1:  # NaN is not between 0 and 1 either
        return "invalid_score"
    if len(source) > MAX_HTML:
        return "too_long"
    text = clean_html(source)
    if not text:
        return "empty_after_cleaning"
    if len(text) < min_characters:
        return "too_short"
    return Post(raw["no"], float(toxicity), text)


def sample(file: BinaryIO, settings: PostSettings) -> tuple[Sampler, Tally]:
    """Read an open dump, plain or compressed, into a sampler."""
    sampler, tally = Sampler(settings), Tally()
    counts = tally.counts
    for posts in read_threads(read_lines(file, str(settings.dump)), tally):
        for raw in posts:
            counts["posts"] += 1
            post = read_post(raw, settings.min_characters)
            if isinstance(post, str):
                counts[post] += 1
            else:
                counts["usable"] += 1
                sampler.offer(post)
        if settings.max_posts and counts["posts"] >= settings.max_posts:
            tally.stopped_at_max_posts = True
            break
    counts["duplicate_texts_among_candidates"] = sampler.duplicates()
    return sampler, tally
