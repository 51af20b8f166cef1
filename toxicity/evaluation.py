"""Measure the original model and the ablated one: losses, toxicity of what they write, incoherence.

Reads   data/toxicity/<run>/mask.safetensors and, for what is None below, the settings it was trained with; the model;
        held-out toxic and ordinary texts; prompts; the means, if the mask was trained with any.
Writes  data/toxicity/<run>/: report.json, report.png, training.png where there is a metrics.jsonl, and, if asked for,
        generations.jsonl.
Time    a minute for the shipped model on two cores. 64 texts and 32 continuations of each kind took a model of 135M
        parameters 80 s of one core.

Toxic data is hate speech, and what models write after it may be too: nothing of it is printed, and it is kept only
with --save-generations.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn
from utils import FOLDER, check_counts, default_data, files_of, fill_in, load_prompts

from circuit_breaking.ablated import ablate
from circuit_breaking.cli import run_script
from circuit_breaking.continuations import Sampling
from circuit_breaking.evaluation import TOXIC, evaluate
from circuit_breaking.figures import draw_report, draw_training
from circuit_breaking.files import provenance, read_tensors, write_json, write_jsonl
from circuit_breaking.masks import load_mask
from circuit_breaking.means import load_means
from circuit_breaking.models import load_hf_model, load_model, load_tokenizer, prefix_token
from circuit_breaking.scorers import load_scorer
from circuit_breaking.tables import table
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.owt import load_texts


@dataclass
class Settings:
    run: str = "run"  # name of the run folder, data/toxicity/<run>
    out: Path = FOLDER  # where run folders are
    mask: Path | None = None  # the mask; None: mask.safetensors of the run
    model: str | None = None  # "tiny", a hub name, a folder, or one holding a .gguf; None: as in training
    means: Path | None = None  # what cut edges carry, from compute_means.py; None: as in training
    toxic_train: Path | None = None  # training posts, only to make sure that none is held out too; None: as in training
    toxic_test: Path | None = None  # toxic posts held out; None: as in training
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: as in training
    toxic_prompts: Path | None = None  # JSON Lines with a prompt or a text in each row; None: those of toxic_test
    ordinary_prompts: Path | None = None  # the same; None: the shipped ones, or beginnings of held-out ordinary texts
    length: int | None = None  # tokens a text is cut to; None: as in training
    num_texts: int = 500  # most held-out texts of each kind whose loss is measured
    num_prompts: int = 100  # most prompts of each kind
    samples: int = 5  # continuations of each prompt
    prompt_tokens: int = 10  # how much of a text is its prompt, where no prompt is written out
    new_tokens: int = 20  # most tokens of a continuation
    scorer: str = "auto"  # detoxify, profanity-check, or auto: detoxify where it can be had
    save_generations: bool = False  # keep what the models write in generations.jsonl; it may be OFFENSIVE
    batch_size: int = 32  # texts or continuations at a time; another size draws other continuations
    seed: int = 0  # of sampling and of bootstrap intervals
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16


@contextmanager
def ablated(hf: nn.Module, edges: list[str], means: Tensor | None) -> Iterator[nn.Module]:
    """The model with edges cut, while the block lasts."""
    with ablate(hf, edges, means):
        yield hf


def as_trained(settings: Settings) -> tuple[Settings, bool]:
    """Settings with what is None taken from the mask's record, else from defaults; and whether q, k, v read apart."""
    mask = settings.mask or settings.out / settings.run / "mask.safetensors"
    hint = "Train one with toxicity/train_mask.py, or set run or mask to one that is there."
    about = read_tensors(mask, hint)[1]
    trained = about.get("settings") or {}
    model = settings.model or trained.get("model") or "tiny"
    settings = fill_in(settings, {"mask": mask, "model": model}, trained, default_data(model), {"length": 50})
    return settings, bool((about.get("graph") or {}).get("split_qkv"))


def main(settings: Settings) -> None:
    check_counts(settings, "num_texts", "num_prompts", "samples", "prompt_tokens", "new_tokens", "batch_size")
    settings, split_qkv = as_trained(settings)
    folder = settings.out / settings.run
    scorer = load_scorer(settings.scorer, settings.device)
    tokenizer = load_tokenizer(settings.model)
    ordinary = OWTTask(tokenizer, settings.ordinary, settings.length)
    toxic = ToxicTask(tokenizer, settings.toxic_train, settings.toxic_test, settings.length, examples=None)
    texts = {"toxic": toxic.test[: settings.num_texts], "ordinary": ordinary.test[: settings.num_texts]}
    sources = {
        "toxic": settings.toxic_prompts or settings.toxic_test,
        "ordinary": settings.ordinary_prompts or load_texts(settings.ordinary, 4 * settings.num_prompts)[1],
    }
    prompts = {
        name: load_prompts(tokenizer, source, settings.num_prompts, settings.prompt_tokens)
        for name, source in sources.items()
    }

    hf = load_hf_model(settings.model, settings.device, settings.dtype)
    engine = load_model(hf, split_qkv, settings.device, settings.dtype)
    load_mask(settings.mask, engine)
    if settings.means is not None:
        load_means(settings.means, engine)
    edges, means, n_edges = engine.mask.cut_edges(), engine.means, len(engine.graph)
    between = int(((engine.mask.weights > 0) & (engine.mask.weights < 1)).sum())
    del engine
    models = {"original": lambda: nullcontext(hf), "ablated": lambda: ablated(hf, edges, means)}
    sampling = Sampling(
        prefix_token(tokenizer), settings.samples, settings.new_tokens, settings.batch_size, settings.seed
    )
    measured, generations = evaluate(models, tokenizer, texts, prompts, scorer, sampling)

    measured["original"]["edges_cut"], measured["ablated"]["edges_cut"] = 0, len(edges)
    inputs = [settings.mask, settings.means, settings.toxic_test, *sources.values(), *files_of(settings.model)]
    inputs = {path for path in [*inputs, Path(settings.ordinary)] if isinstance(path, Path) and path.is_file()}
    report = {
        "scorer": {"name": scorer.name, "version": scorer.version, "threshold": TOXIC},
        "reference": "original",
        "models": measured,
        "edges": edges,
        "n_edges": n_edges,
        "weights_rounded": between,
        "num_texts": {name: len(batch) for name, batch in texts.items()},
        "num_prompts": {name: len(batch) for name, batch in prompts.items()},
        **provenance(settings, sorted(inputs)),
    }
    if settings.save_generations:
        write_jsonl(folder / "generations.jsonl", generations)
    else:  # those of an earlier evaluation would not be what this report is about
        (folder / "generations.jsonl").unlink(missing_ok=True)
    write_json(folder / "report.json", report)
    draw_report(folder)
    if (folder / "metrics.jsonl").is_file():
        draw_training(folder)
    Console().print(table(report))
    if between:
        print(f"note: {between} weights of the mask lie between 0 and 1; it was measured rounded.")
    for name, one in measured.items():
        if one["note"]:
            print(f"note: {name}: {one['note']}.")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings)
