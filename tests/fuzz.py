"""Feed every loader damaged files: each must be read or refused with a `UserError`, never end otherwise.

`make fuzz` runs 10,000 inputs a loader and prints the count; nothing is kept but an input that failed, in /tmp. Inputs
are valid files with bytes flipped, cut, repeated or exchanged, or with what they hold changed and encoded again
(`damage`): headers, lengths, shapes, records, settings; or bombs.
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
from helpers.damage import (
    damage,
    damage_gguf,
    damage_gzip,
    damage_json,
    damage_lines,
    damage_tensors,
    damage_zstd,
)
from helpers.gguf_files import write_gguf
from helpers.models import small_gpt2
from helpers.scripts import load_script, save_small_model
from transformers.utils import logging

from circuit_breaking.ablation.weight_mask import WeightMask, find_matrices, load_weight_mask, save_weight_mask
from circuit_breaking.engine.ablation_values import load_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import engines_of, read_mask
from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.graph import describe
from circuit_breaking.ioi import prompts as words
from circuit_breaking.mnist import idx
from circuit_breaking.mnist.network import save_network
from circuit_breaking.models.checks import check_sizes
from circuit_breaking.models.gguf import check_gguf
from circuit_breaking.models.load import load_config, load_tokenizer
from circuit_breaking.runs.checkpoints import NEWEST, Checkpoints
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import read_csv, read_json, read_jsonl, read_lines
from circuit_breaking.runs.grid import combinations, parse_grid
from circuit_breaking.runs.ioi_results import GraphRecord
from circuit_breaking.runs.mask_record import CutEdges, KeptEdges, MaskRecord
from circuit_breaking.runs.mnist_results import NetworkRecord
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.runs.results import Report
from circuit_breaking.runs.sweep import read_table
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.tasks.ioi import read_prompts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.toxicity.dump import read_lines as read_dump
from circuit_breaking.toxicity.html import clean_html
from circuit_breaking.toxicity.inputs import read_prompt_rows
from circuit_breaking.toxicity.uniform import read_uniform

SLOW = 10.0  # seconds in which an input must be read or refused
MEMORY = 4 << 30  # bytes of address space beyond those in use when fuzzing starts


@dataclass
class Settings:
    inputs: int = 10_000  # damaged files a loader
    seed: int = 0  # another seed, other damage
    only: str = ""  # one loader's name; "" for all


@dataclass
class Loader:
    seeds: list[bytes]  # valid files
    load: Callable[[Path], object]  # how it is called on a path
    damage: Callable[[bytes, random.Random], bytes] = damage


def make_loaders(folder: Path) -> dict[str, Loader]:
    """Every loader by name."""
    hf = small_gpt2(n_layer=1, n_head=2, n_embd=8)
    model = load_model(hf, device="cpu")
    save_mask(folder / "mask", model)
    save_means(folder / "means", model, torch.randn(len(model.graph.sources), 8))
    unit = next(iter(find_matrices(hf, "weight")))
    save_weight_mask(folder / "weights", hf, WeightMask("weight", {unit.name: torch.tensor([1, 5, 9])}))
    run = folder / "run"
    run.mkdir()
    Checkpoints(run, {"seed": 0}).save(3, {"weights": torch.ones(4)}, {"price": 1.0})
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

    mlp = load_script("mnist/mlp_model.py")
    save_network(folder / "network", mlp.MaskedMLP(4, 3, 2), NetworkRecord())
    network_bytes = (folder / "network").read_bytes()
    sampler = load_script("toxicity/toxic_data_for_eval.py")

    def dump_of_posts(path: Path) -> None:
        with path.open("rb") as file:
            sampler.sample(file, sampler.Settings(min_characters=1))[0].draw()

    def html(path: Path) -> None:
        text = clean_html(path.read_bytes().decode(errors="surrogateescape"))
        text.encode()

    def grid(path: Path) -> None:
        combinations(parse_grid([path.read_text(errors="replace")]))

    def dump(path: Path) -> None:
        with path.open("rb") as file:
            for _ in read_dump(file, "dump"):
                pass

    def folder_with(name: str, load: Callable[[Path], object]) -> tuple[list[bytes], Callable[[Path], object]]:
        """Calls a loader on a model's folder of which one file is the damaged one."""
        place = save_small_model(folder / f"with {name}", n_layer=1, n_head=2, n_embd=8)

        def call(path: Path) -> None:
            (place / name).write_bytes(path.read_bytes())
            load(place)

        return [(place / name).read_bytes()], call

    def gguf(path: Path) -> None:
        (folder / "model.gguf").write_bytes(path.read_bytes())
        with contextlib.redirect_stderr(io.StringIO()):
            load_model(folder / "model.gguf", device="cpu")

    def whole_model(place: Path) -> None:
        load_model(place, device="cpu")(torch.tensor([[0, 1, 2]]))

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_gguf(folder / "whole.gguf")
    ggufs = [(folder / "whole.gguf").read_bytes()]
    generate = load_script("toxicity/generate.py")
    run_of = folder / "trained"
    run_of.mkdir()
    trained = {"settings": {"model": "tiny", "means": None, "max_edges": 3}, "inputs": {}}
    settings = RunSettings(script="toxicity/train_mask.py", provenance=trained).to_json()
    cut, kept = (kind(edges=model.mask.graph.edges[:3]).to_json() for kind in (CutEdges, KeptEdges))
    report = Report(models={"original": {"losses": {}}}, provenance=trained).to_json()

    def trained_run(path: Path) -> None:
        (run_of / "mask.safetensors").write_bytes(path.read_bytes())
        generate.read_run(run_of)

    def mask_as_variant(path: Path) -> None:
        read_mask("ablated", path, engine)

    engine = engines_of(hf)
    model.name = "small"
    save_mask(folder / "recorded", model, MaskRecord(budget=3, data={"length": 18}, provenance=trained))
    mask, means, weights = ((folder / name).read_bytes() for name in ("mask", "means", "weights"))
    shown = GraphRecord(graph=describe(model.graph), edges=dict.fromkeys(model.graph.edges[:3], 0.5))
    graph = json.dumps(shown.to_json()).encode()
    bank = words.BANK.read_bytes()
    uniform = b"".join(json.dumps({"text": f"text {n}", "toxicity": n / 3}).encode() + b"\n" for n in range(3))
    prompts = json.dumps(prompt).encode() + b"\n"
    return {
        "dump": Loader([posts], dump),
        "dump, posts": Loader([posts], dump_of_posts, damage_lines),
        "dump, zstd": Loader([posts], dump, damage_zstd),
        "html": Loader([b"a<br>b <s>x</s> &gt; <span class='quote'>y</span>"], html),
        "text": Loader([b"one line\nanother\n\xc3\xa9\n"], read_lines),
        "examples": Loader([rows], read_examples, damage_lines),
        "uniform": Loader([uniform], read_uniform, damage_lines),
        "prompts": Loader([prompts], read_prompts, damage_lines),
        "prompt rows": Loader([prompts, rows], read_prompt_rows, damage_lines),
        "words": Loader([bank], words.read_words, damage_json),
        "idx": Loader([images, images[:4]], lambda path: idx.read_idx(path, 3)),
        "idx, gzip": Loader([images], lambda path: idx.read_idx(path, 3), damage_gzip),
        "json": Loader([json.dumps({"a": [1, 2.5, None, "x"]}).encode()], read_json, damage_json),
        "jsonl": Loader([rows], read_jsonl, damage_lines),
        "csv": Loader([b'a,b\n1,2\n3,"x\ny"\n'], read_csv),
        "table": Loader([b"a,b\n1,2\n3,x\n"], read_table),
        "graph": Loader([graph], read_graph, damage_json),
        "settings": Loader([json.dumps(one).encode() for one in (settings, trained)], RunSettings.read, damage_json),
        "cut edges": Loader([json.dumps(one).encode() for one in (cut, cut["edges"])], CutEdges.read, damage_json),
        "kept edges": Loader([json.dumps(kept).encode()], KeptEdges.read, damage_json),
        "report": Loader([json.dumps(report).encode()], Report.read, damage_json),
        "mask of a run": Loader([(folder / "recorded").read_bytes()], trained_run, damage_tensors),
        "tensors": Loader([mask, means], read_tensors, damage_tensors),
        "mask": Loader([mask], lambda path: load_mask(path, model), damage_tensors),
        "mask, record": Loader([(folder / "recorded").read_bytes()], mask_as_variant, damage_tensors),
        "means": Loader([means], lambda path: load_means(path, model), damage_tensors),
        "weight mask": Loader([weights], lambda path: load_weight_mask(path, hf), damage_tensors),
        "checkpoint": Loader([(run / NEWEST).read_bytes()], checkpoint, damage_tensors),
        "network": Loader([network_bytes], mlp.load_network, damage_tensors),
        "grid": Loader([b"alpha=0.1,0.2", b"seed=0:5", b"seed=0:10:2"], grid),
        "model's configuration": Loader(
            *folder_with("config.json", lambda place: check_sizes(load_config(place), place)), damage_json
        ),
        "model's weights": Loader(*folder_with("model.safetensors", whole_model), damage_tensors),
        "model, configuration": Loader(*folder_with("config.json", whole_model), damage_json),
        "tokenizer": Loader(*folder_with("tokenizer.json", load_tokenizer), damage_json),
        "tokenizer's settings": Loader(*folder_with("tokenizer_config.json", load_tokenizer), damage_json),
        "gguf, header": Loader(ggufs, check_gguf, damage_gguf),
        "gguf": Loader(ggufs, gguf, damage_gguf),
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
            for name, loader in loaders.items():
                if settings.only in ("", name):
                    start = time.process_time()
                    counts[name] = fuzz_one(name, loader, settings, folder / "input")
                    done, seconds = sum(counts[name]), time.process_time() - start
                    print(f"{name}: {done:,} inputs, {counts[name][1]:,} refused, {seconds:.0f} s", flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def fuzz_one(name: str, loader: Loader, settings: Settings, path: Path) -> tuple[int, int]:
    rng = random.Random(f"{settings.seed} {name}")
    read = refused = 0
    for _ in range(settings.inputs):
        data = loader.damage(rng.choice(loader.seeds), rng)
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            loader.load(path)
            read += 1
        except UserError:
            refused += 1
        except BaseException as error:
            raise UserError(f"{name}: {type(error).__name__}: {error}; input kept as {keep(name, data)}") from error
        if time.perf_counter() - start > SLOW:
            raise UserError(f"{name}: took {time.perf_counter() - start:.0f} s; input kept as {keep(name, data)}")
    return read, refused


def keep(loader: str, data: bytes) -> Path:
    path = Path(tempfile.gettempdir()) / f"fuzz-{loader.replace(' ', '-')}"
    path.write_bytes(data)
    return path


def main(settings: Settings) -> None:
    total = sum(sum(pair) for pair in fuzz(settings).values())
    print(f"{total:,} damaged inputs, each read or refused")


if __name__ == "__main__":
    run_script(main, read_settings(Settings))
