"""Dumps that tests make, with mild words, and how they are read."""

import io
import json
import random
import tarfile

import zstandard

from circuit_breaking.runs.files import ROOT
from circuit_breaking.toxicity.dump import read_lines
from helpers.scripts import load_script

SCRIPT = ROOT / "toxicity" / "toxic_data_for_eval.py"
SAMPLE = ROOT.parent / "shared" / "data" / "pol_sample.ndjson"
WORDS = ("you", "silly", "old", "goose", "duck", "bother", "muddle", "grumpy", "sofa", "pancake", "rain", "again")
FILES = ("train.jsonl", "test.jsonl", "uniform.jsonl")

script = load_script("toxicity/toxic_data_for_eval.py")
Settings = script.Settings


def post(no, com, score, **more):
    return {"no": no, "com": com, "perspectives": {"TOXICITY": score, "SPAM": 0.5}} | more


def random_threads(n_posts, seed=0, per_thread=20):
    rng = random.Random(seed)
    posts = [post(i, " ".join(rng.choices(WORDS, k=8)) + f" {i}", rng.random()) for i in range(1, n_posts + 1)]
    return [{"posts": posts[i : i + per_thread]} for i in range(0, n_posts, per_thread)]


def ndjson(threads):
    return "".join(json.dumps(thread) + "\n" for thread in threads).encode()


def tar(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


def lines_of(data, **options):
    return list(read_lines(io.BytesIO(data), "dump", **options))


def run(folder, data, **options):
    """Write the dump, run the script, return its rows and its report."""
    folder.mkdir(exist_ok=True)
    (folder / "dump").write_bytes(data)
    out = folder / "out"
    script.main(Settings(dump=folder / "dump", out=out, **options))
    rows = {name[:-6]: [json.loads(line) for line in (out / name).read_text().splitlines()] for name in FILES}
    return rows, json.loads((out / "report.json").read_text())
