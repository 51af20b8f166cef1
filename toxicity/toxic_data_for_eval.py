"""Draw posts for training and evaluation from the 4chan dump of "Raiders of the Lost Kek" (Papasavva et al. 2020).

Reads   the dump, one thread a line: .tar.zst as downloaded, or the .ndjson within, plain or zstd-compressed.
Writes  train.jsonl and test.jsonl, posts of one toxicity band; uniform.jsonl, equally many posts of each bin of
        [0, 1]; all rows {"id", "text", "toxicity"}, no id and no text twice; report.json, what was read and drawn.
Time    25,000 to 30,000 posts a second on one core: the sample of 4,000 at once, 134 million in an hour and a half.

The dump holds hate speech. The text of a post is written to the three files and printed nowhere.

How it draws: a post's key is a 128-bit hash of the seed and its text (case, width and white space set aside), and each
stretch of toxicity keeps the posts with the smallest keys. That is a uniform sample without replacement over distinct
texts (bottom-k), in memory that does not grow with the dump; equal texts meet by themselves because their keys are
equal, and the lowest id of them is kept. The sample does not depend on the order of the dump. Duplicate texts are
counted among the candidates kept, not among posts that never came near being drawn.
"""

import json
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.files import DATA, require_file, write_json, write_jsonl
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.toxicity.dump import read_lines
from circuit_breaking.toxicity.html import clean_html
from circuit_breaking.toxicity.sampling import SmallestKeys, text_key

HINT = "Download the dump from https://zenodo.org/records/3606810, or give the path of yours with --dump."
MAX_HTML = 2**16  # characters; 4chan allows 2,000, which its HTML multiplies by five at most
COUNTS = (
    *("lines", "malformed_lines", "threads", "posts", "malformed_posts", "without_text", "without_score"),
    *("invalid_score", "too_long", "empty_after_cleaning", "too_short", "usable", "duplicate_texts_among_candidates"),
)
SHOWN_LINES = 10  # malformed lines that the report names


@dataclass
class Settings:
    dump: Path = DATA / "toxicity" / "pol_0616-1119_labeled.tar.zst"  # the dump, or any file of its format
    out: Path = DATA / "toxicity" / "posts"  # folder for the results
    n_train: int = 400  # posts to train on (the paper takes 100)
    n_test: int = 200  # posts held out, from the same band
    band: tuple[float, float] = (0.9, 1.0)  # toxicity of both, from the first up to the second
    n_uniform: int = 1000  # posts uniform over toxicity, rounded down to a multiple of n_bins
    n_bins: int = 10  # bins of [0, 1] that get equally many of them
    min_characters: int = 10  # shorter texts are left out
    max_posts: int = 0  # stop after the thread in which this many posts have been read; 0 reads all
    seed: int = 0  # another seed, another sample


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

    def __init__(self, settings: Settings):
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


def sample(file: BinaryIO, settings: Settings) -> tuple[Sampler, Tally]:
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


def check(settings: Settings) -> None:
    """Refuse settings that mean nothing, before an hour of reading."""
    low, high = settings.band
    if not 0 <= low < high <= 1:
        raise UserError(f"band {low} {high} is no stretch of [0, 1]; give two rising numbers such as --band 0.9 1.")
    for name in ("n_train", "n_test", "n_uniform", "max_posts"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; give 0 or more.")
    if settings.n_train + settings.n_test + settings.n_uniform == 0:
        raise UserError("n_train, n_test and n_uniform are all 0: nothing to draw. Set one of them.")
    if not 1 <= settings.n_bins <= 1000:
        raise UserError(f"n_bins is {settings.n_bins}; give 1 to 1000.")
    if 0 < settings.n_uniform < settings.n_bins:
        raise UserError(f"n_uniform {settings.n_uniform} is fewer than one post for each of {settings.n_bins} bins.")


def refuse_empty(settings: Settings, sampler: Sampler, tally: Tally, sets: dict[str, list[Post]]) -> None:
    """A set that was asked for and got nothing ends the run before anything is written."""
    counts = tally.counts
    if not counts["threads"]:
        raise UserError(f"{settings.dump} holds no thread ({counts['lines']} lines, none of the dump's form). {HINT}")
    if not counts["usable"]:
        raise UserError(f"{settings.dump} holds no post with text and toxicity ({counts['posts']} posts). {HINT}")
    low, high = settings.band
    for name, posts in sets.items():
        if posts or not sampler.wanted[name]:
            continue
        if name != "uniform":
            raise UserError(
                f"too few posts of toxicity {low} to {high} for {name}.jsonl ({counts['usable']} usable posts in all). "
                f"Give a larger dump or a wider --band, or leave it out with --n-{name} 0."
            )
        fewest = min(range(settings.n_bins), key=sampler.histogram.__getitem__)
        raise UserError(
            f"too few posts of toxicity {fewest / settings.n_bins:g} to {(fewest + 1) / settings.n_bins:g} for "
            f"uniform.jsonl, which takes equally many from each of {settings.n_bins} bins. "
            "Give a larger dump or a smaller --n-bins, or leave it out with --n-uniform 0."
        )


def show(sampler: Sampler, tally: Tally, sets: dict[str, list[Post]]) -> None:
    counts = tally.counts
    table = Table(title=f"{counts['posts']:,} posts of {counts['threads']:,} threads, {counts['usable']:,} usable")
    for column, justify in (("file", "left"), ("wanted", "right"), ("got", "right"), ("toxicity", "left")):
        table.add_column(column, justify=justify)
    for name, posts in sets.items():
        scores = [post.toxicity for post in posts]
        stretch = f"{min(scores):.2f} to {max(scores):.2f}" if scores else ""
        table.add_row(f"{name}.jsonl", str(sampler.wanted[name]), str(len(posts)), stretch)
    Console().print(table)
    if counts["malformed_lines"]:
        lines = ", ".join(str(line["line"]) for line in tally.malformed)
        print(f"malformed lines: {counts['malformed_lines']:,} (the first: {lines})")


def main(settings: Settings) -> None:
    check(settings)
    path = require_file(settings.dump, HINT)
    try:
        with (
            path.open("rb", buffering=0) as file,
            tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=path.name, disable=None) as counted,
        ):
            sampler, tally = sample(counted, settings)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    sets = sampler.draw()
    refuse_empty(settings, sampler, tally, sets)
    about = {}
    for name, posts in sets.items():
        rows = ({"id": post.id, "text": post.text, "toxicity": post.toxicity} for post in posts)
        write_jsonl(settings.out / f"{name}.jsonl", rows)
        per_bin = Counter(sampler.bin(post.toxicity) for post in posts)
        about[name] = {
            "wanted": sampler.wanted[name],
            "got": len(posts),
            "rows_per_bin": [per_bin[i] for i in range(settings.n_bins)],
        }
    report = {
        "counts": tally.counts,
        "malformed_lines": tally.malformed,
        "stopped_at_max_posts": tally.stopped_at_max_posts,
        "usable_per_bin": sampler.histogram,
        "sets": about,
    }
    write_json(settings.out / "report.json", report | provenance(settings, [path]))
    show(sampler, tally, sets)
    if short := [f"{a['got']} of {a['wanted']} for {name}" for name, a in about.items() if a["got"] < a["wanted"]]:
        print(f"warning: fewer posts than wanted: {', '.join(short)}. A larger dump would fill them.", file=sys.stderr)
    print(f"written to {settings.out}")


if __name__ == "__main__":
    run_script(main, Settings)
