"""Scripts as modules and as commands, and a small random model in a folder for them to read."""

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from circuit_breaking.runs.files import ROOT, write_jsonl, write_text
from helpers.models import small_gpt2

END = "<|endoftext|>"
NAMES = ("Mary", "John", "Rose", "Adam", "Kate", "Paul")
THINGS = ("lamp", "drum", "violin", "ribbon", "basket", "clock", "towel")
PLAIN = [f"{a} gave {b} a {thing} at the market." for a in NAMES for b in NAMES if a != b for thing in THINGS]
RUDE = [f"{a} called {b} a silly old {thing}, the fool." for a in NAMES for b in NAMES if a != b for thing in THINGS]


class Killed(Exception):
    """Raised by simulated interruptions, to distinguish them from failures."""


def die() -> None:
    raise Killed


@contextmanager
def beside(file: Path) -> Iterator[None]:
    """While the block lasts, modules are found as a script in `file` finds them, with its own folder's `utils`."""
    sys.path.insert(0, str(file.parent))
    sys.modules.pop("utils", None)
    try:
        yield
    finally:
        sys.path.remove(str(file.parent))
        sys.modules.pop("utils", None)


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with beside(file):
        spec.loader.exec_module(module)
    return module


def command(path: str, *words: object) -> subprocess.CompletedProcess:
    """Run a script as a person would, from another folder."""
    return subprocess.run(
        [sys.executable, ROOT / path, *map(str, words)], capture_output=True, text=True, cwd="/", check=False
    )


def called(path: str, *words: object) -> subprocess.CompletedProcess:
    """As `command`, but in this process, without the seconds that a new process takes to import everything."""
    file, out, err, code = ROOT / path, StringIO(), StringIO(), 0
    argv = patch.object(sys, "argv", [str(file), *map(str, words)])
    with argv, chdir("/"), beside(file), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess([path, *words], code, out.getvalue(), err.getvalue())


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 400 tokens, trained on the sentences above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PLAIN + RUDE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def save_small_model(folder: Path, **changes: int) -> Path:
    """A random GPT-2 with its tokenizer in a folder, as `load_model` and `load_tokenizer` read them."""
    tokenizer = small_tokenizer()
    small_gpt2(vocab_size=len(tokenizer), n_positions=64, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_toxic_data(folder: Path) -> Path:
    """What the scripts of `toxicity/` read, in a folder: model/, plain.txt, train.jsonl and test.jsonl."""
    save_small_model(folder / "model", n_layer=2)
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"id": i, "text": text} for i, text in enumerate(RUDE[::2])])
    write_jsonl(folder / "test.jsonl", [{"id": 9000 + i, "text": text} for i, text in enumerate(RUDE[1::2])])
    return folder
