"""Type a prompt and read the continuations of the original and the ablated model side by side, as they are written.

Reads   a run folder of train_mask.py, or a folder that `save_ablated` wrote.
Writes  nothing; with --save, a folder with the ablated model, which needs no other file.
Time    about a second per prompt for GPT-2 small on two cores.

Prompts come from --prompt, from a file (--prompts), or line by line from the terminal or a pipe. --perplexity FILE
measures both models on a text instead. Both are the same Hugging Face model, with and without cut edges.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import is_text, read_lines, read_text, require_file
from circuit_breaking.runs.settings import ComputeSettings, SeedSettings
from circuit_breaking.toxicity.settings import FOLDER


@dataclass
class Settings(ComputeSettings, SeedSettings):
    MOST_USED: ClassVar = ("ablated", "prompt", "prompts", "perplexity", "save", "new_tokens", "temperature", "device")

    ablated: Path = FOLDER / "run"  # a run folder of train_mask.py, or a saved ablated model
    prompt: str = ""  # continue this text and stop
    prompts: Path | None = None  # continue each line of this file (or the prompt of each row of a .jsonl file) and stop
    perplexity: Path | None = None  # measure both models on this text file and stop
    save: Path | None = None  # folder to write the ablated model to, so that anyone can load it with load_ablated
    new_tokens: int = 40  # most tokens of a continuation
    temperature: float = 0.7  # temperature of sampling; 0: always the most likely token
    window: int = 0  # tokens that are read at once for the perplexity; 0: all positions of the model, at most 1024
    stride: int = 0  # tokens between windows for the perplexity; 0: half a window

    def check(self) -> None:
        if self.new_tokens < 1 or self.temperature < 0:
            raise UserError("new_tokens must be at least 1 and temperature at least 0.")
        if len(self.given()) > 1:
            raise UserError(f"{' and '.join(self.given())} were both given. Choose one.")
        for path in filter(None, (self.prompts, self.perplexity)):
            require_file(path)

    def given(self) -> list[str]:
        """Which of the settings that say what to continue or measure are set."""
        return [name for name in ("prompt", "prompts", "perplexity") if getattr(self, name)]


if __name__ == "__main__":
    settings = read_settings(Settings)

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import ablation_file, load_ablated, read_ablated, save_ablated
from circuit_breaking.engine.ablation_values import read_value
from circuit_breaking.engine.mask import read_cut_edges
from circuit_breaking.evaluation.perplexity import perplexity
from circuit_breaking.models.load import load_hf_model, load_tokenizer
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.mask_record import MASK
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.results import Report
from circuit_breaking.runs.texts import read_rows
from circuit_breaking.toxicity.inputs import read_prompt_rows

HINT = "Make one with toxicity/train_mask.py, or set the path of one."


@dataclass
class Ablated:
    """A base model, the edges that are cut in it, and how they were found."""

    base: str
    edges: list[str]
    means: Tensor | None
    about: dict[str, Any]
    results: dict[str, Any]
    ablate_from: int


def read_run(folder: Path) -> Ablated:
    """What a run folder of train_mask.py holds.

    The edges are those of the mask's weights, not of a list of edges beside them, so a sufficient circuit is read for
    what it is: all edges but a few are cut.
    """
    path = folder / MASK
    edges, record = read_cut_edges(path, HINT)
    if not record.model:
        raise UserError(f"{path} does not name the model that the mask belongs to. {HINT}")
    report = folder / "report.json"
    results = Report.read(report).to_json() if report.is_file() else {}
    means = read_value(record.ablation_value, path, record.ablate_from)
    return Ablated(record.model, edges, means, record.provenance, results, record.ablate_from)


def load_pair(settings: Settings) -> tuple[Any, dict[str, nn.Module]]:
    """The tokenizer, and the original and the ablated model, which share their weights."""
    folder = settings.ablated.expanduser()
    if ablation_file(folder) is not None:
        if settings.save is not None:
            raise UserError(f"{folder} is a saved ablated model already. Copy the folder.")
        tokenizer = load_tokenizer(read_ablated(folder).base)
        ablated = load_ablated(folder, settings.device, settings.dtype)
        original = twin(ablated)
        original.edge_cuts.remove()
    else:
        run = read_run(folder)
        tokenizer = load_tokenizer(run.base)
        original = load_hf_model(run.base, settings.device, settings.dtype, only_supported=True)
        ablated = twin(original)
        ablate(ablated, run.edges, run.means, run.ablate_from)
        if settings.save is not None:
            about = (run.about, run.results)
            save_ablated(settings.save, run.base, run.edges, run.means, *about, ablate_from=run.ablate_from)
            print(f"written to {settings.save}")
    return tokenizer, {"original": original, "ablated": ablated}


def twin(hf: nn.Module) -> nn.Module:
    """A copy of a model that shares its weights; edges can be cut in one and not in the other."""
    shared = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    return copy.deepcopy(hf, shared)


class Watcher:
    """A `streamer` for `generate`: hands on all the text so far at each new token."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.tokens is None:  # the prompt comes first
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def end(self) -> None:
        pass


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text as tokens behind the prefix token, however long."""
    if not is_text(text):
        raise UserError(f"the prompt {text[:80]!r} holds bytes or characters that are not UTF-8 text. Type it again.")
    # quietly: the tokenizer would warn of long texts, for which there are windows, or an error of ours
    return [prefix_token(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


@torch.no_grad()
def write_on(hf: nn.Module, tokenizer: Any, tokens: list[int], settings: Settings, show: Callable[[str], None]) -> None:
    """Show how one model continues a prompt."""
    inputs = torch.tensor([tokens], device=hf.device)
    chance = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(settings.seed)
    hf.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=settings.new_tokens,
        pad_token_id=tokens[0], streamer=Watcher(tokenizer, show),
        **(chance if settings.temperature > 0 else {"do_sample": False}),
    )  # fmt: skip


def compare(models: dict[str, nn.Module], tokenizer: Any, prompt: str, settings: Settings, console: Console) -> None:
    """Show both models' continuations in two columns, which fill as they are written where there is a terminal."""
    tokens = encode(tokenizer, prompt)
    positions = models["original"].config.max_position_embeddings
    if len(tokens) + settings.new_tokens > positions:
        raise UserError(
            f"a prompt of {len(tokens)} tokens leaves no room for {settings.new_tokens} new ones in the model's "
            f"{positions} positions. Shorten it, or set new_tokens to fewer."
        )
    texts = dict.fromkeys(models, "")

    def table() -> Table:
        shown = Table(title=Text(prompt), title_justify="left", expand=True)
        for name in models:
            shown.add_column(name, ratio=1)
        shown.add_row(*(Text(text) for text in texts.values()))
        return shown

    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        for name, hf in models.items():

            def show(text: str, name: str = name) -> None:
                texts[name] = text
                if live is not None:
                    live.update(table(), refresh=True)

            write_on(hf, tokenizer, tokens, settings, show)
    if live is None:
        console.print(table())


def read_prompts(settings: Settings) -> Iterator[str]:
    """The prompts of the settings, or of standard input as they come."""
    if settings.prompt:
        yield settings.prompt
    elif settings.prompts is not None and read_rows(settings.prompts) is not None:
        if settings.prompts.suffix.lower() != ".jsonl":
            raise UserError(f"{settings.prompts} is a table. Give JSON Lines (.jsonl) or a text file with one a line.")
        yield from (prompt for prompt, _whole in read_prompt_rows(settings.prompts))
    elif settings.prompts is not None:
        yield from read_lines(settings.prompts)
    else:
        if sys.stdin.isatty():
            print("Type one prompt per line; Ctrl-D ends.")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 must not end the session
        for line in sys.stdin:
            if line.strip():
                yield line.strip()


def show_perplexity(models: dict[str, nn.Module], tokenizer: Any, settings: Settings) -> None:
    if read_rows(settings.perplexity) is not None:
        raise UserError(f"{settings.perplexity} is a table. Give a text file, of which all is read.")
    text = read_text(settings.perplexity)
    tokens = torch.tensor(encode(tokenizer, text))
    rows = []
    for name, hf in models.items():
        found = perplexity(hf, tokens, settings.window, settings.stride)
        rows.append([name, f"{found.loss:.4f}", f"{found.perplexity:.2f}", f"{found.tokens:,}"])
    print_table(["", "loss, nats per token", "perplexity", "tokens"], rows, str(settings.perplexity))


def main(settings: Settings) -> None:
    settings.check()
    console = Console()
    tokenizer, models = load_pair(settings)
    if settings.perplexity is not None:
        show_perplexity(models, tokenizer, settings)
        return
    if settings.save is not None and not settings.given() and sys.stdin.isatty():
        return  # asked to save, nothing more
    for prompt in read_prompts(settings):
        try:
            compare(models, tokenizer, prompt, settings, console)
        except UserError as error:
            if settings.given():
                raise
            print(f"error: {error}", file=sys.stderr)  # at the keyboard, the next prompt may fit


if __name__ == "__main__":
    run_script(main, settings)
