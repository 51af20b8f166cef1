"""Draw posts for training and evaluation from the 4chan dump of "Raiders of the Lost Kek" (Papasavva et al. 2020).

Reads   the dump, one thread per line: .tar.zst as downloaded, or the .ndjson in it, plain or zstd-compressed.
Writes  data/toxicity/posts/: train.jsonl and test.jsonl, posts of one range of toxicity; uniform.jsonl, equally many
        posts of each bin of [0, 1]; all rows {"id", "text", "toxicity"}, without repeated ids or texts; report.json,
        what was read and drawn.
Time    25,000 to 30,000 posts per second on one core: no time for the sample of 4,000, an hour and a half for 134
        million.

The dump contains hate speech. The text of a post is written to the three files and printed nowhere. Posts are drawn
uniformly at random over distinct texts, in memory that does not grow with the dump (circuit_breaking/toxicity/posts.py
says how).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import require_file, write_json, write_jsonl
from circuit_breaking.toxicity.settings import POSTS, PostSettings

HINT = "Download the dump from https://zenodo.org/records/3606810, or give the path of yours with --dump."


@dataclass
class Settings(PostSettings):
    MOST_USED: ClassVar = ("dump", "out", "n_train", "n_test", "band", "n_uniform", "n_bins", "max_posts", "seed")

    out: Path = POSTS  # folder for the results

    def check(self) -> None:
        super().check()
        require_file(self.dump, HINT)


if __name__ == "__main__":
    settings = read_settings(Settings)

import sys
from collections import Counter

from tqdm import tqdm

from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.toxicity.posts import Post, Sampler, Tally, sample


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
    rows = []
    for name, posts in sets.items():
        scores = [post.toxicity for post in posts]
        stretch = f"{min(scores):.2f} to {max(scores):.2f}" if scores else ""
        rows.append([f"{name}.jsonl", str(sampler.wanted[name]), str(len(posts)), stretch])
    title = f"{counts['posts']:,} posts of {counts['threads']:,} threads, {counts['usable']:,} usable"
    print_table(["file", "wanted", "got", "toxicity"], rows, title)
    if counts["malformed_lines"]:
        lines = ", ".join(str(line["line"]) for line in tally.malformed)
        print(f"malformed lines: {counts['malformed_lines']:,} (the first: {lines})")


def main(settings: Settings) -> None:
    settings.check()
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
    run_script(main, settings)
