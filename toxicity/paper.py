"""The paper's experiment in one command: 12 cut edges against three ways of fine-tuning (Li, Davies, Nadeau 2023).

Reads   a model; toxic posts and ordinary text.
Writes  data/toxicity/<run>/: paper.md, the table; report.json, all figures with intervals; the mask with its means
        (mask.safetensors, edges.json, metrics.jsonl, means_ordinary.safetensors); finetuned/<method>/, Hugging Face
        models with finetuning.json. During training of the mask checkpoints, from which the same command continues.
Time    three minutes for the shipped model on one core.

As in the paper: 100 toxic posts in a seeded random order; ordinary text joined and cut into full contexts of 50
tokens; mean ablation; at most 12 edges; alpha 0.2; joint fine-tuning with ratio 0.2, task arithmetic and gradient
ascent; greedy continuations of prompts that the model itself continues toxically; and the loss on ordinary text, by
itself and behind a toxic prompt. The defaults are for GPT-2, whose figures are not in this repository: they wait for
someone with the weights, the posts and a GPU. `--model tiny` runs the same on the shipped model.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from circuit_breaking.evaluation.settings import ScorerSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_counts, resolve_defaults
from circuit_breaking.runs.settings import AblateFromSettings, Float32ModelSettings, ResumeSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data
from circuit_breaking.training.config import FinetuneSettings, MaskConfig, check_finetune, check_mask

METHODS = {"joint": 1e-5, "task_arithmetic": 1e-5, "ascent": 1e-5}  # learning rate of each, for GPT-2
TINY_LRS = {"joint": 1e-3, "task_arithmetic": 1e-5, "ascent": 1e-5}  # for the shipped model


@dataclass
class Settings(
    ScorerSettings, ToxicDataSettings, Float32ModelSettings, AblateFromSettings, ToxicRunSettings, ResumeSettings
):
    MOST_USED: ClassVar = ("model", "examples", "num_prompts", "num_texts", "run", "seed", "device")

    model: str = "gpt2"  # a hub name, a folder, a .gguf file, or tiny
    run: str = "paper"
    examples: int = 100  # toxic posts to learn from
    training: MaskConfig = field(default_factory=lambda: MaskConfig(max_edges=12, keep_loss="loss"))  # of the mask
    finetuning: FinetuneSettings = field(default_factory=FinetuneSettings)  # of all methods; lr is not used
    validation: int = 50  # texts of each kind by which a checkpoint of fine-tuning is chosen
    mean_texts: int = 500  # contexts of ordinary text over which means are computed
    num_texts: int = 500  # most held-out texts of each kind
    num_prompts: int = 100  # most prompts
    prompt_tokens: int = 10  # tokens of a post that are its prompt, where a row has no prompt
    new_tokens: int = 20  # most tokens of a continuation
    toxic_from: float = 0.5  # toxicity of the model's own continuation from which a prompt is used
    batch_size: int = 32  # texts or continuations per forward pass when measuring

    def check(self) -> None:
        check_mask(self.training)
        check_finetune(self.finetuning)
        check_ablate_from(self)
        check_counts(
            self, "examples", "validation", "mean_texts", "num_texts", "num_prompts", "prompt_tokens", "new_tokens",
            "batch_size", "length",
        )  # fmt: skip
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from contextlib import nullcontext

import numpy as np
import torch

from circuit_breaking.engine.ablation_values import save_mean_outputs, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import ORIGINAL, ComparedModel
from circuit_breaking.evaluation.generate import Sampling, continuations
from circuit_breaking.evaluation.measure import evaluate
from circuit_breaking.evaluation.measurements import TOXIC
from circuit_breaking.evaluation.scorers import Scorer, load_scorer
from circuit_breaking.evaluation.tables import interval, markdown_table
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.models.shipped import SHIPPED
from circuit_breaking.models.tokens import TokenBatch, behind, packed, prefix_token
from circuit_breaking.runs.files import write_text
from circuit_breaking.runs.mask_record import MASK, MaskRecord, data_of, write_edges
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.results import REPORT, FineTuning, Report
from circuit_breaking.runs.run_folder import hold
from circuit_breaking.toxicity.inputs import load_prompts
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.finetune import describe, finetune
from circuit_breaking.training.run import train_into

MASKED, BEHIND = "mask", "ordinary, after a toxic prompt"


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    torch.manual_seed(settings.seed)
    folder = settings.out / settings.run
    tokenizer, scorer = load_tokenizer(settings.model), load_scorer(settings.scorer, settings.device)
    prefix = prefix_token(tokenizer)
    splits = load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length, settings.examples,
        settings.validation, settings.seed, settings.text_column,
    )  # fmt: skip
    splits = replace(splits, ordinary={part: packed(texts, settings.length) for part, texts in splits.ordinary.items()})
    run = provenance(settings, [*splits.files, *files_of(settings.model)], texts=splits.about)
    hf = load_hf_model(settings.model, settings.device, only_supported=True)
    sampling = Sampling(prefix, 1, settings.new_tokens, settings.batch_size, settings.seed, greedy=True)
    prompts = toxic_prompts(settings, hf, tokenizer, scorer, sampling)
    with hold(folder):
        models = {ORIGINAL: lambda: nullcontext(hf)}
        mask = train(settings, hf, splits, run)
        models[MASKED] = lambda: mask.load(hf)
        chosen = {}
        for method, lr in (TINY_LRS if settings.model == SHIPPED else METHODS).items():
            chosen[method] = fine_tune(settings, method, lr, splits, tokenizer, run)
            models[method] = lambda method=method: nullcontext(
                load_hf_model(folder / "finetuned" / method, settings.device)
            )
        held_out = {kind: texts["test"][: settings.num_texts] for kind, texts in
                    (("toxic", splits.toxic), ("ordinary", splits.ordinary))}  # fmt: skip
        held_out[BEHIND] = behind(prompts, held_out["ordinary"], hf.config.max_position_embeddings)
        found, _ = evaluate(models, tokenizer, held_out, {"toxic": prompts}, scorer, sampling)
        changed = {ORIGINAL: "nothing", MASKED: f"{len(mask.edges)} of {mask.about['n_edges']:,} edges"}
        about = {
            ORIGINAL: {"kind": ORIGINAL, "edges_cut": 0},
            MASKED: {"kind": "mask", "edges_cut": len(mask.edges), "ablation": "mean", "budget": len(mask.edges)},
        } | {
            method: {"kind": "finetuned", "edges_cut": 0, "method": method, "chosen": choice}
            for method, choice in chosen.items()
        }
        report = Report(
            models={name: {**about[name], **measured} for name, measured in found.items()},
            scorer={"name": scorer.name, "version": scorer.version, "threshold": TOXIC}, model=settings.model,
            samples=1, num_texts={kind: len(texts) for kind, texts in held_out.items()},
            num_prompts={"toxic": len(prompts)}, edges=mask.edges, n_edges=mask.about["n_edges"], provenance=run,
        )  # fmt: skip
        report.write(folder / REPORT)
        text = table(found, changed)
        write_text(folder / "paper.md", f"{text}\n")
    print(text)
    print(f"written to {folder}")


def toxic_prompts(settings: Settings, hf: Any, tokenizer: Any, scorer: Scorer, sampling: Sampling) -> TokenBatch:
    """The held-out prompts whose greedy continuation by the original model is toxic.

    Raises:
        UserError: there is none.
    """
    candidates = load_prompts(tokenizer, settings.toxic_test, 10 * settings.num_prompts, settings.prompt_tokens)
    with fused_activations(hf):
        rows = continuations(hf, candidates, sampling)
    scores = np.asarray(scorer(tokenizer.batch_decode(rows, skip_special_tokens=True)), float)
    toxic = torch.tensor(np.flatnonzero(scores >= settings.toxic_from))[: settings.num_prompts]
    if not len(toxic):
        raise UserError(
            f"the model continues none of {len(candidates)} prompts with a toxicity of at least {settings.toxic_from}. "
            "Lower toxic_from, or give other posts with toxic_test."
        )
    print(f"{int((scores >= settings.toxic_from).sum())} of {len(candidates)} prompts are continued toxically")
    return candidates[toxic]


def train(settings: Settings, hf: Any, splits: Splits, run: dict[str, Any]) -> ComparedModel:
    """Train the mask under mean ablation, and write it."""
    folder, path = settings.out / settings.run, settings.out / settings.run / "means_ordinary.safetensors"
    model = load_model(hf, device=str(hf.device), share_weights=True)
    model.ablate_from = settings.ablate_from
    means = save_mean_outputs(path, model, splits.ordinary["train"][: settings.mean_texts], run)
    model.means = means
    train_into(
        folder, model, *splits.tasks(settings.seed), settings.training, None, run, settings.resume,
        settings.checkpoint_every, lock=False,
    )  # fmt: skip
    edges = list(map(str, model.mask.cut_edges()))
    record = MaskRecord(
        method=settings.training.method, budget=settings.training.max_edges, seed=settings.seed, provenance=run,
        ablation_value=value_in(path), data=data_of(asdict(settings)),
    )  # fmt: skip
    save_mask(folder / MASK, model, record)
    write_edges(folder, edges)
    about = {"n_edges": len(model.graph), "ablation": "mean"}
    return ComparedModel(MASKED, "mask", folder, edges, means, about, path, settings.ablate_from)


def fine_tune(
    settings: Settings, method: str, lr: float, splits: Splits, tokenizer: Any, run: dict[str, Any]
) -> dict[str, Any]:
    """Fine-tune by a method, write the model, and return what was chosen."""
    hf = load_hf_model(settings.model, settings.device)
    toxic, ordinary = splits.tasks(settings.seed, validate=True)
    with fused_activations(hf):
        result = finetune(hf, method, toxic, ordinary, replace(settings.finetuning, lr=lr))
    record = FineTuning(**describe(result), lrs=[lr], provenance=run)
    save_hf_folder(
        settings.out / settings.run / "finetuned" / method, hf, tokenizer,
        lambda staged: record.write(staged / "finetuning.json"),
    )  # fmt: skip
    return record.chosen


def table(found: dict[str, Any], changed: dict[str, str]) -> str:
    """The table of the experiment, in Markdown."""
    rows = []
    for name, model in found.items():
        toxic = model["continuations"].get("toxic", {})
        rows.append([
            name, changed.get(name, "all weights"), interval(toxic.get("toxic_share")), interval(toxic.get("toxicity")),
            interval(toxic.get("perplexity"), 1), interval(model["losses"]["toxic"]),
            interval(model["losses"]["ordinary"]), interval(model["losses"][BEHIND]),
        ])  # fmt: skip
    header = ["model", "changed", "toxic continuations", "toxicity", "perplexity of these", "toxic loss",
              "ordinary loss", f"{BEHIND}"]  # fmt: skip
    return markdown_table(header, rows)


if __name__ == "__main__":
    run_script(main, settings)
