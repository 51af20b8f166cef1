"""Measure what each cut edge does, by itself and among the others, and how stable the choice of edges is.

Reads   masks of sweep_masks.py or train_mask.py; the original model; held-out toxic and ordinary texts.
Writes  data/toxicity/<run>/: evidence.json, evidence.png.
Time    two forward passes over the texts per cut edge: half a minute for 12 edges of the shipped model.

The edges of masks that differ in the training seed only are compared by their Jaccard similarity, next to that of
equally many edges drawn at random.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import ModelSettings, SeedSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data


@dataclass(kw_only=True)
class Settings(ToxicDataSettings, ModelSettings, ToxicRunSettings, SeedSettings):
    MOST_USED: ClassVar = ("masks", "similar", "model", "num_texts", "run", "device")

    masks: tuple[Path, ...]  # masks whose edges are measured one by one: folders of masks, or folders of these
    similar: tuple[Path, ...] = ()  # masks whose edges are compared with each other: folders of masks, or of these
    num_texts: int = 200  # most held-out texts of each kind
    batch_size: int = 64  # texts per forward pass
    seed: int = 0  # seed of the bootstrap intervals

    def check(self) -> None:
        check_counts(self, "length", "num_texts", "batch_size")
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from utils import held_out_texts

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.compared_models import find_folders, read_compared_models
from circuit_breaking.evaluation.edge_effects import leave_one_out, stability
from circuit_breaking.evaluation.result_files import EVIDENCE
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.edge_effects import draw_evidence
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.results import Evidence


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    texts = held_out_texts(settings, tokenizer)
    hf = load_hf_model(settings.model, settings.device, settings.dtype, only_supported=True)
    masks = read_compared_models(find_folders(settings.masks), hf)
    if other := [one.name for one in masks if one.kind == "finetuned"]:
        raise UserError(f"{other[0]} is a fine-tuned model and has no cut edges. Give masks only.")
    similar = [one for one in read_compared_models(find_folders(settings.similar), hf) if one.kind == "mask"]

    examined = {}
    with progress_bar(total=sum(2 + 2 * len(one.edges) for one in masks), desc="edges", unit="pass") as bar:
        for one in masks:
            bar.set_postfix_str(one.name)
            examined[one.name] = {
                "ablation": one.about["ablation"],
                **leave_one_out(one, hf, texts, settings.batch_size, settings.seed, bar.update),
            }
    inputs = {path for one in (*masks, *similar) for path in (one.file, one.means_file)}
    inputs |= {settings.toxic_test, *files_of(settings.model)}
    report = Evidence(
        masks=examined,
        stability=stability(similar),
        num_texts={name: len(batch) for name, batch in texts.items()},
        provenance=provenance(settings, sorted(path for path in inputs if path is not None)),
    )
    report.write(folder / EVIDENCE)
    draw_evidence(folder)
    end_with_page(folder)
    for row in report.stability:
        print(
            f"{row['ablation']} ablation, at most {row['budget']} edges, {len(row['masks'])} seeds: "
            f"Jaccard {row['jaccard']:.2f} (by chance {row['by_chance']:.2f})"
        )
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
