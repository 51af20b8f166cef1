"""Measure models: losses, toxicity and incoherence of their texts, and the share of the model that was changed.

Reads   data/toxicity/<run>/mask.safetensors and, for each setting below that is None, the settings of its training; any
        number of other models (--models: masks, saved ablated models, fine-tuned models); the original model; held-out
        toxic and ordinary texts, texts spread evenly over toxicity; prompts; the ablation values of masks that use any.
Writes  data/toxicity/<run>/: report.json; report.png; training.png, if there is a metrics.jsonl; with
        texts spread evenly over toxicity, uniform.csv and loss_by_toxicity.png; with --save-generations,
        generations.jsonl; report.html, which shows all of these.
Time    a minute for the shipped model and one mask on two cores; 80 s of one core for 64 texts and 32 continuations of
        each kind with a model of 135M parameters.

Toxic data is hate speech, and so may be what models write after it. No text is printed, and texts are kept only with
--save-generations.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.evaluation.settings import MeasureSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import ModelSettings, SeedSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data


@dataclass
class Settings(MeasureSettings, ToxicDataSettings, ModelSettings, ToxicRunSettings, SeedSettings):
    MOST_USED: ClassVar = (
        "run", "mask", "models", "model", "num_texts", "num_prompts", "samples", "scorer", "save_generations", "device",
    )  # fmt: skip

    mask: Path | None = None  # the mask; None: mask.safetensors of the run, which may be missing if models are given
    models: tuple[Path, ...] = ()  # more models: folders of masks, ablated or fine-tuned models, or folders of these
    model: str | None = None  # tiny, a name on the Hugging Face hub, a folder or a .gguf file; None: as in training
    means: Path | None = None  # file of the mask's ablation values, from compute_means.py; None: as in training
    toxic_train: Path | None = None  # training posts, none of which may be held out; None: as in training
    toxic_test: Path | None = None  # held-out toxic posts; None: as in training
    ordinary: str | None = None  # ordinary text: tiny, a file or a hub data set; None: as in training
    text_column: str | None = None  # column of a table or data set that holds the ordinary text; None: as in training
    uniform: Path | None = None  # held-out texts spread evenly over toxicity; None: shipped ones, if any
    toxic_prompts: Path | None = None  # JSON Lines with a prompt or a text in each row; None: those of toxic_test
    ordinary_prompts: Path | None = None  # the same; None: the shipped ones, or the first words of held-out texts
    length: int | None = None  # tokens of a text that are used; None: as in training
    num_uniform: int = 500  # most texts of uniform; 0: none
    num_control: int = 50  # most texts and prompts of each kind for random masks, with one continuation each
    seeds: int = 1  # number of times that continuations are sampled, each time with another seed
    greedy: bool = False  # also measure the most likely continuation of each prompt
    save_generations: bool = False  # keep the texts that the models write in generations.jsonl; they may be OFFENSIVE
    batch_size: int = 32  # texts or continuations per forward pass; sampled continuations depend on it
    seed: int = 0  # seed of sampling and of the bootstrap intervals

    def check(self) -> None:
        check_counts(
            self, "num_texts", "num_prompts", "num_control", "samples", "seeds", "prompt_tokens", "new_tokens",
            "batch_size",
        )  # fmt: skip


if __name__ == "__main__":
    settings = read_settings(Settings)

from collections.abc import Mapping
from functools import partial

from utils import held_out_texts, measure_uniform, uniform_texts

from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.evaluation.compared_models import (
    ORIGINAL,
    ComparedModel,
    engines_of,
    find_folders,
    read_compared_models,
    read_mask,
)
from circuit_breaking.evaluation.generate import Sampling
from circuit_breaking.evaluation.measure import evaluate
from circuit_breaking.evaluation.measurements import TOXIC
from circuit_breaking.evaluation.result_files import UNIFORM
from circuit_breaking.evaluation.scorers import load_scorer
from circuit_breaking.evaluation.tables import show
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.loss_by_toxicity import draw_loss_by_toxicity
from circuit_breaking.figures.report import draw_models, draw_report
from circuit_breaking.figures.training import draw_training
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.files import write_csv, write_jsonl
from circuit_breaking.runs.mask_record import MASK, MaskRecord
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.results import REPORT, Report
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.toxicity.inputs import load_prompts

MOST_COLOURS = 8  # most models that can be told from each other by colour


def as_trained(settings: Settings) -> tuple[Settings, dict[str, Path]]:
    """Settings with what is None taken from a mask's record, else from defaults; and the folders of more models."""
    mask = settings.mask or settings.out / settings.run / MASK
    folders = find_folders(settings.models)
    if settings.mask is None and folders and not mask.is_file():
        mask = None
    hint = "Train one with toxicity/train_mask.py, or set run or mask to one that is there."
    masks = [mask, *(folder / MASK for folder in folders.values())]
    first = next((path for path in masks if path is not None and (path.is_file() or path is mask)), None)
    trained = read_mask_record(first, hint) if first is not None else MaskRecord()
    model = settings.model or trained.model or "tiny"
    known = [{"model": model}, trained.data, default_data(model), {"length": 50, "text_column": "text"}]
    return resolve_defaults(settings, *([] if mask is None else [{"mask": mask}]), *known), folders


def read_models(settings: Settings, folders: Mapping[str, Path], hf: Any) -> list[ComparedModel]:
    """The original, the mask of the run where there is one, and all others."""
    variants = [ComparedModel(ORIGINAL)]
    if settings.mask is not None:
        one = read_mask("ablated", settings.mask, engines_of(hf), settings.means)
        variants.append(replace(one, folder=None))
    return variants + read_compared_models(folders, hf)


def main(settings: Settings) -> None:
    settings.check()
    settings, folders = as_trained(settings)
    folder = settings.out / settings.run
    scorer = load_scorer(settings.scorer, settings.device)
    tokenizer = load_tokenizer(settings.model)
    texts = held_out_texts(settings, tokenizer)
    sources = {
        "toxic": settings.toxic_prompts or settings.toxic_test,
        "ordinary": settings.ordinary_prompts
        or load_texts(settings.ordinary, 4 * settings.num_prompts, settings.text_column)[1],
    }
    prompts = {
        name: load_prompts(tokenizer, source, settings.num_prompts, settings.prompt_tokens)
        for name, source in sources.items()
    }
    uniform = uniform_texts(settings, tokenizer, scorer)

    hf = load_hf_model(settings.model, settings.device, settings.dtype)
    variants = {one.name: one for one in read_models(settings, folders, hf)}
    models = {name: partial(one.load, hf) for name, one in variants.items()}
    sampling = Sampling(
        prefix_token(tokenizer), settings.samples, settings.new_tokens, settings.batch_size, settings.seed
    )
    full = {name: models[name] for name, one in variants.items() if one.kind != "random"}
    measured, generations = evaluate(
        full, tokenizer, texts, prompts, scorer, sampling, ORIGINAL, settings.seeds, settings.greedy
    )
    control = {name: load for name, load in models.items() if name not in full}
    if control:  # many, and compared with the original on the same few texts
        few = [{name: batch[: settings.num_control] for name, batch in sets.items()} for sets in (texts, prompts)]
        some = {ORIGINAL: models[ORIGINAL], **control}
        found, _ = evaluate(some, tokenizer, *few, scorer, replace(sampling, samples=1), ORIGINAL)
        measured |= {name: found[name] for name in control}
    for name, one in variants.items():
        notes = filter(None, [one.about.get("note"), measured[name]["note"]])
        about = {key: value for key, value in one.about.items() if key not in ("n_edges", "note")}
        measured[name] |= {
            "kind": one.kind,
            **about,
            "edges_cut": len(one.edges) if one.removes else 0,
            "changed_share": one.changed_share(hf),
        }
        measured[name]["note"] = "; ".join(notes) or None
    inputs = [settings.mask, settings.toxic_test, *sources.values(), *files_of(settings.model)]
    inputs += [Path(settings.ordinary), *(path for one in variants.values() for path in (one.file, one.means_file))]
    inputs = {path for path in inputs if isinstance(path, Path) and path.is_file()}
    cut = variants.get("ablated")
    report = Report(
        models=measured,
        scorer={"name": scorer.name, "version": scorer.version, "threshold": TOXIC},
        reference=ORIGINAL,
        model=settings.model,
        samples=settings.samples,
        seeds=settings.seeds,
        num_texts={name: len(batch) for name, batch in texts.items()},
        num_prompts={name: len(batch) for name, batch in prompts.items()},
        edges=cut and cut.edges,
        n_edges=cut and cut.about["n_edges"],
        weights_rounded=cut and cut.about["weights_rounded"],
        provenance=provenance(settings, sorted(inputs)),
    )
    rows = []
    if uniform is not None:
        drawn = {name: one for name, one in variants.items() if one.kind != "random"}
        rows = measure_uniform(drawn, hf, uniform, settings.batch_size)
    if settings.save_generations:
        write_jsonl(folder / "generations.jsonl", generations)
    if rows:
        write_csv(folder / UNIFORM, rows)
    report.write(folder / REPORT)
    # those of an earlier evaluation would not be what this report is about
    for name, written in (("generations.jsonl", settings.save_generations), (UNIFORM, rows)):
        if not written:
            (folder / name).unlink(missing_ok=True)
    if len(measured) <= MOST_COLOURS:
        draw_report(folder)
    else:  # too many for colours: one row for each model, without random masks
        (folder / "report.png").unlink(missing_ok=True)
        draw_models(folder)
    if rows:
        draw_loss_by_toxicity(folder)
    if (folder / "metrics.jsonl").is_file():
        draw_training(folder)
    end_with_page(folder)
    show(report.to_json())
    for name, one in measured.items():
        if one.get("weights_rounded"):
            print(f"note: {name}: {one['weights_rounded']} weights lie between 0 and 1; it was measured rounded.")
        if one["note"]:
            print(f"note: {name}: {one['note']}.")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
