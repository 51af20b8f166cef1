"""Feed every loader damaged files: each must be read or refused with a `UserError`, never end otherwise.

`make fuzz` runs 10,000 inputs a loader and prints the count; nothing is kept but an input that failed, in /tmp. Inputs
are valid files with bytes flipped, cut, repeated, exchanged, or with numbers of their headers made huge.
"""

import contextlib
import io
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import zstandard
from conftest import small_gpt2
from scripts import load_script

from circuit_breaking.checkpoints import NEWEST, Checkpoints
from circuit_breaking.cli import UserError, run_script
from circuit_breaking.dump import read_lines as read_dump
from circuit_breaking.files import read_json, read_jsonl, read_tensors
from circuit_breaking.masks import load_mask, save_mask
from circuit_breaking.means import load_means, save_means
from circuit_breaking.models import load_model
from circuit_breaking.sweeps import parse_grid, read_table
from circuit_breaking.tasks.ioi import read_prompts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.text import read_lines
from circuit_breaking.weight_masks import WeightMask, find_matrices, load_weight_mask, save_weight_mask

SLOW = 10.0  # seconds in which an input must be read or refused
MEMORY = 8 << 30  # bytes of address space beyond those in use when fuzzing starts
INTERESTING = [
    b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8, b"NaN", b"1e999", b"[" * 5000, b"-1", b"{}", b'"',
]  # fmt: skip


@dataclass
class Settings:
    inputs: int = 10_000  # damaged files a loader
    seed: int = 0  # another seed, other damage
    only: str = ""  # one loader's name; "" for all


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        # headers are where a byte does most
        at = min(at, rng.choice([8, 64, 512, len(changed)]))
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + rng.randint(1, 16)]
        elif kind == 3:
            changed[at:at] = rng.choice(INTERESTING)
        elif kind == 4:
            piece = rng.choice(INTERESTING)
            changed[at : at + len(piece)] = piece
        elif kind == 5:
            changed[at:at] = changed[max(0, at - rng.randint(1, 64)) : at] * rng.randint(1, 8)
        else:
            changed[at : at + 8] = rng.randbytes(8)
    return bytes(changed)


def make_loaders(folder: Path) -> dict[str, tuple[list[bytes], Callable[[Path], object]]]:
    """For each loader the valid files it starts from, and how it is called on a path."""
    hf = small_gpt2(n_layer=1, n_head=2, n_embd=8)
    model = load_model(hf, device="cpu")
    save_mask(folder / "mask", model)
    save_means(folder / "means", model, torch.randn(len(model.graph.sources), 8))
    unit = next(iter(find_matrices(hf, "weight")))
    save_weight_mask(folder / "weights", hf, WeightMask("weight", {unit.name: torch.tensor([1, 5, 9])}))
    run = folder / "run"
    run.mkdir()
    Checkpoints(run, {"seed": 0}).save(3, {"weights": torch.ones(4)}, {"price": 1.0})
    idx = load_script("mnist/idx.py")
    images = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 4, 4)) + bytes(range(32))
    posts = b"".join(
        json.dumps({"posts": [{"no": n, "com": "hello<br>there &gt; x", "perspectives": {"TOXICITY": 0.95}}]}).encode()
        + b"\n"
        for n in range(4)
    )
    rows = b"".join(json.dumps({"id": n, "text": f"text {n}", "toxicity": 0.9}).encode() + b"\n" for n in range(3))
    prompt = {
        "text": "Tom and Ann met, Tom gave it to", "IO": "Ann", "S": "Tom", "order": "BABA", "template": 0,
        "positions": {"IO": 3, "S1": 1, "S2": 5, "end": 8},
    }  # fmt: skip

    def checkpoint(path: Path) -> object:
        (run / NEWEST).write_bytes(path.read_bytes())
        with contextlib.redirect_stderr(io.StringIO()):
            return Checkpoints(run, {"seed": 0}).load()

    def dump(path: Path) -> None:
        with path.open("rb") as file:
            for _ in read_dump(file, "dump"):
                pass

    return {
        "dump": ([posts, zstandard.compress(posts)], dump),
        "text": ([b"one line\nanother\n\xc3\xa9\n"], read_lines),
        "examples": ([rows], read_examples),
        "prompts": ([json.dumps(prompt).encode() + b"\n"], read_prompts),
        "idx": ([images, images[:4]], lambda path: idx.read_idx(path, 3)),
        "json": ([json.dumps({"a": [1, 2.5, None, "x"]}).encode()], read_json),
        "jsonl": ([rows], read_jsonl),
        "table": ([b"a,b\n1,2\n3,x\n"], read_table),
        "tensors": ([(folder / "mask").read_bytes()], read_tensors),
        "mask": ([(folder / "mask").read_bytes()], lambda path: load_mask(path, model)),
        "means": ([(folder / "means").read_bytes()], lambda path: load_means(path, model)),
        "weight mask": ([(folder / "weights").read_bytes()], lambda path: load_weight_mask(path, hf)),
        "checkpoint": ([(run / NEWEST).read_bytes()], checkpoint),
        "grid": ([b"alpha=0.1,0.2", b"seed=0:5"], lambda path: parse_grid([path.read_text(errors="replace")])),
    }


def fuzz(settings: Settings) -> dict[str, tuple[int, int]]:
    """Inputs read and inputs refused, by loader. Raises `UserError` for the first that does neither."""
    counts = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = make_loaders(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
        try:
            for loader, (seeds, load) in loaders.items():
                if settings.only in ("", loader):
                    counts[loader] = fuzz_one(loader, seeds, load, settings, folder / "input")
                    print(f"{loader}: {sum(counts[loader]):,} inputs, {counts[loader][1]:,} refused", flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def fuzz_one(
    loader: str, seeds: list[bytes], load: Callable[[Path], object], settings: Settings, path: Path
) -> tuple[int, int]:
    rng = random.Random(f"{settings.seed} {loader}")
    read = refused = 0
    for _ in range(settings.inputs):
        data = damage(rng.choice(seeds), rng)
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            load(path)
            read += 1
        except UserError:
            refused += 1
        except BaseException as error:
            raise UserError(f"{loader}: {type(error).__name__}: {error}; input kept as {keep(loader, data)}") from error
        if time.perf_counter() - start > SLOW:
            raise UserError(f"{loader}: took {time.perf_counter() - start:.0f} s; input kept as {keep(loader, data)}")
    return read, refused


def keep(loader: str, data: bytes) -> Path:
    path = Path(tempfile.gettempdir()) / f"fuzz-{loader.replace(' ', '-')}"
    path.write_bytes(data)
    return path


def main(settings: Settings) -> None:
    total = sum(sum(pair) for pair in fuzz(settings).values())
    print(f"{total:,} damaged inputs, each read or refused")


if __name__ == "__main__":
    run_script(main, Settings)
