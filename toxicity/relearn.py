"""Does the behaviour come back? Fine-tune every model on a few toxic examples, and put examples into the prompt.

Reads   models of sweep_masks.py, train_mask.py, finetune_gpt2.py or save_ablated; the original model; toxic training
        texts to relearn from; held-out toxic texts to measure with.
Writes  data/toxicity/<run>/: relearning.json, relearning.png.
Time    fifteen seconds per model for the shipped model on one core.

All weights are trained, and, from the start again, low-rank adapters of all linear layers (LoRA). Cut edges stay cut
meanwhile. The original model is trained in the same way, for comparison.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.evaluation.settings import MeasureSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import Float32ModelSettings, SeedSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data
from circuit_breaking.training.config import RelearnSettings, check_relearn


@dataclass
class Settings(
    RelearnSettings, MeasureSettings, ToxicDataSettings, Float32ModelSettings, ToxicRunSettings, SeedSettings
):
    MOST_USED: ClassVar = ("models", "model", "counts", "checks", "lr", "shots", "scorer", "run", "seed", "device")

    models: tuple[Path, ...] = ()  # models besides the original: folders of models, or folders of these
    counts: tuple[int, ...] = (10, 100)  # numbers of toxic examples to learn from
    shots: int = 3  # toxic examples in front of a prompt, as many as fit; 0: this is not measured
    separator: str = "\n"  # text between these examples and the prompt
    toxic_prompts: Path | None = None  # JSON Lines with a prompt or a text in each row; None: those of toxic_test
    num_texts: int = 100
    num_prompts: int = 50
    samples: int = 2
    eval_batch_size: int = 128  # texts or continuations per forward pass when measuring

    def check(self) -> None:
        check_counts(
            self, "length", "num_texts", "num_prompts", "samples", "prompt_tokens", "new_tokens", "eval_batch_size"
        )
        check_relearn(self)
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from itertools import product

from torch import nn

from circuit_breaking.evaluation.compared_models import ORIGINAL, ComparedModel, find_folders, read_compared_models
from circuit_breaking.evaluation.generate import Sampling
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.evaluation.relearn import relearn, toxicity_after, with_context
from circuit_breaking.evaluation.result_files import RELEARNING
from circuit_breaking.evaluation.scorers import load_scorer
from circuit_breaking.evaluation.tables import relearning_table
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.relearning import draw_relearning
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.results import Relearning
from circuit_breaking.toxicity.inputs import load_prompts
from circuit_breaking.toxicity.splits import load_splits


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run
    scorer, tokenizer = load_scorer(settings.scorer, settings.device), load_tokenizer(settings.model)
    splits = load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length, seed=settings.seed,
        examples=max(settings.counts, default=None), text_column=settings.text_column,
    )  # fmt: skip
    examples, held_out = splits.toxic["train"], splits.toxic["test"][: settings.num_texts]
    prompts = load_prompts(
        tokenizer, settings.toxic_prompts or settings.toxic_test, settings.num_prompts, settings.prompt_tokens
    )
    sampling = Sampling(
        prefix_token(tokenizer), settings.samples, settings.new_tokens, settings.eval_batch_size, settings.seed
    )
    hf = load_hf_model(settings.model, settings.device)
    variants = [ComparedModel(ORIGINAL), *read_compared_models(find_folders(settings.models), hf)]

    def toxicity(model: nn.Module, after: Any = prompts) -> dict[str, float | None]:
        return toxicity_after(model, after, tokenizer, scorer, sampling)

    def measure(model: nn.Module) -> dict[str, Any]:
        sums, counts = text_losses(model, held_out, settings.eval_batch_size)
        loss = float(sums.sum() / counts.sum())
        return {"toxicity": toxicity(model), "toxic_loss": loss if loss < float("inf") else None}

    found = {}
    ways = {"relearning": False, **({"lora_relearning": True} if settings.lora_rank else {})}
    steps = max(settings.checks) * len(settings.counts) * len(variants) * len(ways)
    with progress_bar(total=steps, desc="relearning", unit="step") as bar:
        for one in variants:
            bar.set_postfix_str(one.name)
            relearned, notes, start = {way: {} for way in ways}, [], None
            for (way, adapters), count in product(ways.items(), settings.counts):
                rows, note = relearn(
                    one, hf, examples[:count], settings, measure, settings.seed, bar.update, adapters, start
                )
                relearned[way][str(count)] = rows
                start = rows[0] if 0 in settings.checks else None  # adapters change nothing before the first step
                notes += [f"{count} examples{', adapters' * adapters}: {note}"] if note else []
            about = {key: one.about[key] for key in ("ablation", "budget", "sweep") if key in one.about}
            found[one.name] = {"kind": one.kind, **about, **relearned, "note": "; ".join(notes) or None}
            if settings.shots:
                separator = tokenizer(settings.separator, add_special_tokens=False)["input_ids"]
                limit = hf.config.max_position_embeddings - settings.new_tokens
                context = with_context(prompts, examples, settings.shots, separator, limit)
                with one.load(hf) as model, fused_activations(model):
                    without = start["toxicity"] if start else toxicity(model)
                    found[one.name]["few_shot"] = {"without": without, "with": toxicity(model, context)}
    inputs = {path for one in variants for path in (one.file, one.means_file)}
    inputs |= {*splits.files, *files_of(settings.model)}
    report = Relearning(
        models=found,
        scorer={"name": scorer.name, "version": scorer.version},
        provenance=provenance(settings, sorted(path for path in inputs if path is not None)),
    )
    report.write(folder / RELEARNING)
    draw_relearning(folder)
    end_with_page(folder)
    print_table(*relearning_table(found), f"toxicity after toxic prompts, by {scorer.name} {scorer.version}")
    for name, one in found.items():
        if one["note"]:
            print(f"note: {name}: {one['note']}.")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
