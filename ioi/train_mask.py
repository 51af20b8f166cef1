"""Learn which few edges to cut so that a model no longer knows the indirect object but still predicts ordinary text.

`--task` names another behaviour to remove (docs/tasks.md).

Reads   a model; prompts (make_ioi_datasets.py); ordinary text; ablation values (compute_means.py), if --means names a
        file.
Writes  data/ioi/<run>/: settings.json; metrics.jsonl, one row per step; mask.safetensors; edges.json; graph.json;
        next_tokens.json; ranking.safetensors, by methods that rank edges; and, made from these, training.png,
        graph.png, heat_map.png, next_tokens.png, report.html. During training also checkpoints, from which the same
        command continues an interrupted run.
Time    half a minute for the shipped model on one core.

`accelerate launch ioi/train_mask.py` trains on several GPUs, each with its share of every batch.
"""

from dataclasses import dataclass
from typing import ClassVar

from circuit_breaking.ioi.settings import IOIMaskSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.settings import ResumeSettings, TrackingSettings
from circuit_breaking.training.config import check_mask


@dataclass
class Settings(IOIMaskSettings, ResumeSettings, TrackingSettings):
    MOST_USED: ClassVar = (
        "model", "task", "prompts", "max_edges", "steps", "alpha", "means", "objective", "run", "seed", "device",
    )  # fmt: skip


if __name__ == "__main__":
    settings = read_settings(Settings, parallel=True)

from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.indirect_objects import draw_run
from circuit_breaking.ioi.experiment import open_experiment, write_run
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.mask_record import MASK
from circuit_breaking.runs.ranking_record import RANKING, RankingRecord
from circuit_breaking.runs.run_folder import hold
from circuit_breaking.training.edge_ranking import save_ranking
from circuit_breaking.training.run import train_into


def main(settings: Settings) -> None:
    settings.check()
    experiment = open_experiment(settings)
    check_mask(settings, len(experiment.model.graph))  # before anything is written
    folder = settings.out / settings.run
    with hold(folder):
        before = experiment.summary()
        result = train_into(
            folder, experiment.model, experiment.task, experiment.ordinary, settings, None, experiment.provenance,
            settings.resume, settings.checkpoint_every, lock=False, log_with=settings.log_with,
        )  # fmt: skip
        if not is_main():
            return
        after = experiment.summary()
        write_run(folder, "ioi/train_mask.py", experiment, {"before": before, "after": after})
        if result.ranking is not None:
            value, run = read_mask_record(folder / MASK).ablation_value, experiment.provenance
            record = RankingRecord(method=settings.method, seed=settings.seed, ablation_value=value, provenance=run)
            save_ranking(folder / RANKING, experiment.model, result.ranking, record)
        else:
            (folder / RANKING).unlink(missing_ok=True)  # of an earlier run
    draw_run(folder)
    end_with_page(folder)
    for name, value in before.items():
        print(f"{name.replace('_', ' ')}: {value:.3f} -> {after[name]:.3f}")
    edges = ", ".join(result.edges)
    print(f"{len(result.edges)} of {len(experiment.model.graph):,} edges cut in {result.seconds:.0f} s: {edges}")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
